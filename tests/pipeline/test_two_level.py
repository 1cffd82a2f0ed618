"""The recipes of QoQ and DGQ end to end on tiny models: int8 products, int8 activations, output near the float model's."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import anybit
from anybit.formats.activation import IntActivations
from anybit.layers.integer import refusal
from anybit.layers.linear import QuantLinear
from dual_case import products
from tiny_checkpoints import quantize_tiny
from tiny_models import token_ids


@pytest.mark.parametrize(("family", "bits", "most"), [("llama", 4, 0.4), ("qwen3", 4, 0.4), ("qwen2", 8, 0.05)])
@pytest.mark.parametrize("recipe", ["qoq-w4a8kv4", "dgq-w4a8"])
def test_recipes_give_integers_on_both_sides(recipe, family, bits, most, tmp_path):
    out = quantize_tiny(family, tmp_path, recipe, overrides=[f"weights.bits={bits}"])
    layers = json.loads((out / "config.json").read_text())["quantization_config"]["layers"]
    blocks = {name: form for name, form in layers.items() if "layers." in name}
    assert {form["terms"][0]["kind"] for form in blocks.values()} == {"dual_grained"}
    assert all(form["activations"]["bits"] == 8 for form in blocks.values())
    model = anybit.load(out)
    linears = [m for n, m in model.named_modules() if isinstance(m, QuantLinear) and "layers." in n]
    assert len(linears) == len(blocks) > 6
    for linear in linears:
        (term,) = linear.terms()
        assert refusal([term], IntActivations()) == ""
        assert int(products(term).abs().max()) <= (121 if recipe.startswith("qoq") else 127)
    ids = token_ids(20)
    with torch.inference_mode():
        logits = model(input_ids=ids).logits
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "float", dtype=torch.float32)(input_ids=ids).logits
    assert 1e-4 < float((logits - expected).norm() / expected.norm()) < most
