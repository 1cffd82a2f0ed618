"""Every recipe of the other number forms, whole: quantize a tiny model, load it, and compare with what the blocks computed."""

from __future__ import annotations

import json

import pytest
import torch

from anybit.checkpoint.canary import check_canary
from anybit.loading import load_any
from tiny_checkpoints import quantize_tiny

RECIPES = {
    "fp8-w8a8": [],
    "fp8-w8a8 auto": ["weights.type=auto"],
    "flexq-w6a6": ["activations.group_size=32", "weights.group_size=32"],
    "flexq-w6a8": ["activations.group_size=32", "weights.group_size=32"],
    "bipolar-w4a4": ["activations.group_size=32", "weights.group_size=32"],
    "tender-w8a8": ["activations.groups=12"],
    "tender-w4a4": ["activations.static=true", "activations.groups=5"],
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_checkpoint_answers_as_when_it_was_written(name: str, tmp_path) -> None:
    out = quantize_tiny("llama", tmp_path, name.split()[0], overrides=RECIPES[name])
    model, _ = load_any(str(out))
    check_canary(out, model)
    rows = json.loads((out / "ledger.json").read_text())["tensors"]
    linears = [row for row in rows if "layers" in row["name"]]
    assert all("@" in row["actual"] for row in linears)
    if "auto" in name:
        assert all("vote" in row["notes"][-1] for row in linears)
    with torch.inference_mode():
        logits = model(input_ids=torch.arange(20)[None]).logits
    assert bool(logits.isfinite().all())
