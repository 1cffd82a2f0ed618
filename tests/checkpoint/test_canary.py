"""The canary notices a model that answers otherwise, by the tolerance of its dtype."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from anybit.checkpoint.canary import CANARY, TOLERANCE, TOP, check_canary, echoes, write_canary
from anybit.errors import FormatError, PromiseError

IDS = torch.tensor([5, 2, 9])


class Model(nn.Module):
    """Answers `logits` at the last position if it is asked IDS, noise elsewhere."""

    def __init__(self, logits, dtype=torch.float32):
        super().__init__()
        self.norm, self.logits = nn.Parameter(torch.ones(3, dtype=dtype)), logits

    def forward(self, input_ids, use_cache):
        assert torch.equal(input_ids, IDS[None])
        before = torch.full((1, len(IDS) - 1, len(self.logits)), 99.0)
        return SimpleNamespace(logits=torch.cat([before, self.logits[None, None]], 1))


@pytest.fixture
def logits(tmp_path):
    values = 7 * torch.randn(50, generator=torch.Generator().manual_seed(0))
    write_canary(tmp_path / "canary.json", IDS, values)
    return values


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("at", [0, TOP - 1])
@pytest.mark.parametrize("sign", [-1, 1])
def test_tolerance(tmp_path, logits, dtype, at, sign):
    spread, index = float(logits.std()), logits.argsort(descending=True)[at]
    for share, fine in ((0.9, True), (1.1, False)):
        moved = logits.clone()
        moved[index] += sign * share * TOLERANCE[dtype] * spread
        if fine:
            found = check_canary(tmp_path, Model(moved, dtype))
            assert found == pytest.approx(share * TOLERANCE[dtype], rel=1e-2)
        else:
            with pytest.raises(PromiseError, match=r"canary.*anybit doctor"):
                check_canary(tmp_path, Model(moved, dtype))


def test_tolerances_are_what_the_format_says():
    assert {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1} == TOLERANCE


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_no_number_is_no_answer(tmp_path, logits, bad):
    logits[logits.argmax()] = bad
    with pytest.raises(PromiseError, match="canary"):
        check_canary(tmp_path, Model(logits))


def test_fewer_tokens_than_the_canary_keeps(tmp_path):
    few = torch.tensor([1.0, 3.0, 2.0])
    write_canary(tmp_path / "canary.json", IDS, few)
    assert json.loads((tmp_path / "canary.json").read_text())["top_ids"] == [1, 2, 0]
    assert check_canary(tmp_path, Model(few)) == 0


def test_a_canary_that_cannot_be_read(tmp_path, logits):
    path = tmp_path / "canary.json"
    record = json.loads(path.read_text())
    for text in ("{", json.dumps({**record, "spread": None}), json.dumps({k: record[k] for k in ("ids", "top_ids")})):
        path.write_text(text)
        with pytest.raises(FormatError, match="missing or damaged"):
            check_canary(tmp_path, Model(logits))
    path.unlink()
    with pytest.raises(FormatError, match="missing or damaged"):
        check_canary(tmp_path, Model(logits))


def test_echoes_widen_what_is_allowed_by_what_they_show(tmp_path):
    logits = torch.linspace(-3, 3, 40)
    echo = logits.clone()
    echo[-1] += 0.25
    write_canary(tmp_path / CANARY, IDS, logits, [logits, echo])
    near, far = logits.clone(), logits.clone()
    near[-1] += 0.4  # within twice the echo
    far[-1] += 0.6
    assert check_canary(tmp_path, Model(near)) > TOLERANCE[torch.float32]
    with pytest.raises(PromiseError, match="does not answer"):
        check_canary(tmp_path, Model(far))


def test_echoes_are_rounding_sized_noise_and_the_same_every_time():
    states = torch.randn(1, 5, 7, generator=torch.Generator().manual_seed(0))
    found = echoes(states, 3)
    assert len({tuple(echo.flatten().tolist()) for echo in found}) == 3
    for echo, again in zip(found, echoes(states, 3), strict=True):
        assert torch.equal(echo, again)
        assert 0 < float((echo / states - 1).abs().max()) < 1e-5
