"""Activation schemes: the arithmetic of each against a slow loop, and what must hold for every one."""

from __future__ import annotations

import math

import pytest
import torch

from anybit.errors import FormatError
from anybit.formats.activation import FloatActivations, IntActivations, restore_activations
from anybit.formats.floating import FloatType

COLUMNS = 70
SCHEMES = [
    IntActivations(),
    IntActivations(bits=4),
    IntActivations(bits=6, granularity="group", group_size=32),
    IntActivations(bits=4, symmetric=False),
    IntActivations(bits=3, symmetric=False, rounded_zero=True),
    IntActivations(bits=8, symmetric=False, granularity="group", group_size=64),
    IntActivations(bits=4, clip=0.8),
    FloatActivations(),
    FloatActivations("e3m4", "group", 32),
]


def values(tokens: int = 9) -> torch.Tensor:
    """Rows that are hard: outliers, all positive, constant, zero, tiny, huge."""
    x = torch.randn(tokens, COLUMNS, generator=torch.Generator().manual_seed(1))
    x[0, 3] *= 200
    x[1] = x[1].abs() + 5
    x[2], x[3] = 1.25, 0
    x[4] *= 1e-20
    x[5] *= 1e20
    return x


@pytest.mark.parametrize("spec", [s for s in SCHEMES if isinstance(s, IntActivations)])
@pytest.mark.parametrize("bypass", [None, torch.tensor([3, 60])])
def test_integers_are_those_of_a_loop_over_groups(spec: IntActivations, bypass: torch.Tensor | None) -> None:
    x, size = values(), spec.columns_per_group(COLUMNS)
    found = spec.encode(x, {}, bypass)
    left = set() if bypass is None else set(bypass.tolist())
    for t in range(len(x)):
        for g, start in enumerate(range(0, COLUMNS, size)):
            inside = [k for k in range(start, min(start + size, COLUMNS)) if k not in left]
            group = [float(x[t, k]) for k in inside]
            if spec.symmetric:
                low, high, levels = 0.0, max(map(abs, group)) * spec.clip, 2 ** (spec.bits - 1) - 1
            else:
                low, high, levels = min(group) * spec.clip, max(group) * spec.clip, 2**spec.bits - 1
                if spec.rounded_zero:
                    low, high = min(low, 0.0), max(high, 0.0)
            scale = (high - low) / levels
            assert float(found.scale[t, g]) == pytest.approx(scale, rel=1e-6, abs=1e-37)
            for k, value in zip(inside, group, strict=True):
                decoded = float(found.values()[t, k])
                inside_range = min(max(value, -high if spec.symmetric else low), high)
                slack = scale * (1.0 if spec.rounded_zero else 0.5) + 1e-5 * max(abs(low), abs(high))
                assert abs(decoded - inside_range) <= slack
    for k in left:
        assert not found.codes[:, k].any()
    top = 2 ** (spec.bits - 1)
    assert int(found.codes.min()) >= (1 - top if spec.symmetric else -top)
    assert int(found.codes.max()) <= top - 1


@pytest.mark.parametrize("spec", SCHEMES)
def test_a_token_does_not_see_the_others_and_forms_come_back(spec: IntActivations | FloatActivations) -> None:
    x = values()
    whole = spec.encode(x, {})
    for t in range(len(x)):
        alone = spec.encode(x[t : t + 1], {})
        assert torch.equal(alone.codes[0], whole.codes[t])
        assert torch.equal(alone.scale[0], whole.scale[t])
    assert restore_activations({"activations": spec.form()}) == spec


def test_asymmetric_ends_are_exact_and_zero_is_exact_when_rounded() -> None:
    x = values()
    plain = IntActivations(bits=4, symmetric=False).encode(x, {})
    assert int(plain.codes[1].min()) == -8
    assert int(plain.codes[1].max()) == 7
    assert torch.allclose(plain.values()[2], x[2])  # a constant row
    rounded = IntActivations(bits=4, symmetric=False, rounded_zero=True).encode(x, {})
    steps = rounded.offset[6:] / rounded.scale[6:]
    assert torch.allclose(steps, steps.round(), atol=1e-4)


def test_not_a_number_stays_visible_in_its_token_alone() -> None:
    x = values()
    x[6, 5], x[7, 5] = math.nan, math.inf
    for spec in SCHEMES:
        found = spec.encode(x, {}).values()
        assert found[6].isnan().any()
        assert found[7].isnan().any()
        assert found[8].isfinite().all()


def test_small_floats_saturate_and_are_nearest() -> None:
    x, numbers = values(), FloatType.parse("e4m3")
    found = FloatActivations().encode(x, {})
    grid = torch.cat([numbers.magnitudes[numbers.magnitudes.isfinite()]] * 2) * torch.tensor(
        [1.0, -1.0]
    ).repeat_interleave(127)
    scaled = x[6] / found.scale[6]
    nearest = (scaled[:, None] - grid).abs().amin(1)
    assert torch.allclose((found.codes[6] - scaled).abs(), nearest, atol=1e-4)
    static = FloatActivations(granularity="tensor", static=True).encode(x, {"input_scale": torch.tensor([1e-3])})
    assert float(static.codes.max()) == 448
    assert static.codes.isfinite().all()


@pytest.mark.parametrize(
    "wrong",
    [{"bits": 9}, {"granularity": "tensor"}, {"static": True}, {"bits": 1}],
    ids=["9", "dynamic", "static", "1"],
)
def test_impossible_schemes_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(FormatError):
        IntActivations(**wrong)  # type: ignore[arg-type]
    with pytest.raises(FormatError, match="update anybit"):
        restore_activations({"activations": {"kind": "posit"}})
