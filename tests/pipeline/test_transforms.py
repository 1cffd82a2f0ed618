"""Recipes with transforms, end to end: at 8 bits the float model comes out, whatever was rotated, shifted or reordered."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import anybit
from anybit.errors import AnybitError, FormatError, RecipeError, StructureError
from tiny_checkpoints import quantize_tiny
from tiny_models import token_ids

EMBEDDINGS = [{"name": "rtn", "targets": ["embedding", "head"], "options": {"bits": 8, "group_size": 16}}]
GPTQ = {"name": "gptq", "options": {"bits": 8, "group_size": 16}}
EVERYTHING = [
    {"name": "rotate", "options": {"values": True}},
    {"name": "reorder"},
    {"name": "smooth-attention"},
    {"name": "smooth", "options": {"linears": ["*down_proj", "*fc2"], "alpha": 0.2}},
    {"name": "hadamard"},
]
POST = "post_attention_layernorm"
NOT_ROTATED = {"gemma2": POST, "gemma3": POST, "bloom": "word_embeddings_layernorm"}


def recipe(where, transforms, **stages):
    path = where / "mine.yaml"
    stages = {"transform": transforms, "weights": [GPTQ], "embeddings": EMBEDDINGS} | stages
    path.write_text(yaml.dump({"name": "mine", "paper": "-", "summary": "-", "weights": "-", "stages": stages}))
    return str(path)


def difference(out, where):
    ids = token_ids(20)
    with torch.inference_mode():
        logits = anybit.load(out)(input_ids=ids).logits
        expected = AutoModelForCausalLM.from_pretrained(where / "float", dtype=torch.float32)(input_ids=ids).logits
    return float((logits - expected).abs().amax(-1).median() / expected.std())


def test_the_ledger_says_what_was_done_to_each_linear(tmp_path):
    out = quantize_tiny("llama", tmp_path, recipe(tmp_path, EVERYTHING))
    rows = json.loads((out / "ledger.json").read_text())["tensors"]
    said = {row["name"].removeprefix("model.layers.1."): " / ".join(row["notes"]) for row in rows}
    assert "reads the rotated stream" in said["self_attn.q_proj"]
    assert "outputs divided by" in said["self_attn.k_proj"]
    assert "writes the rotated stream" in said["mlp.down_proj"]
    assert "input turned by Hadamard blocks" in said["mlp.down_proj"]
    assert "input channels sorted" in said["mlp.down_proj"]
    assert "divided" not in said["mlp.down_proj"]


@pytest.mark.parametrize(
    "family",
    ["llama", "qwen2", "qwen3", "phi3", "mistral", "mixtral", "qwen2_moe", "opt", "gpt2", "gpt_neox", "falcon"],
)
def test_rotated_and_all_the_rest(family, tmp_path):
    tied = {"tie_word_embeddings": True} if family in ("llama", "opt", "gpt2", "falcon") else {}
    out = quantize_tiny(family, tmp_path, recipe(tmp_path, EVERYTHING), config=tied)
    assert 1e-5 < difference(out, tmp_path) < 0.15
    config = json.loads((out / "config.json").read_text())
    layers = config["quantization_config"]["layers"]
    turned = {name: form["inputs"] for name, form in layers.items() if "inputs" in form}
    assert len(turned) >= 2
    assert all(ops[0]["op"] == "hadamard" for ops in turned.values())
    gains = [
        t for file in out.glob("*.safetensors") for n, t in load_file(file).items() if n.endswith("layernorm.weight")
    ]
    assert all(torch.equal(gain, torch.ones_like(gain)) for gain in gains if gain.numel() == 64)
    if tied:
        assert config["tie_word_embeddings"] is False
        assert (
            sum(form["shape"][0] >= 256 and form["shape"][1] == 64 for form in layers.values()) >= 2
        )  # head of its own


@pytest.mark.parametrize("family", NOT_ROTATED)
def test_a_stream_that_cannot_be_rotated_is_refused(family, tmp_path):
    with pytest.raises(StructureError, match=NOT_ROTATED[family]):
        quantize_tiny(family, tmp_path, recipe(tmp_path, EVERYTHING[:1]))


def test_a_layer_without_its_operation_is_refused(tmp_path):
    out = quantize_tiny("llama", tmp_path, recipe(tmp_path, EVERYTHING[-1:]))
    row = next(row for row in json.loads((out / "ledger.json").read_text())["tensors"] if "down" in row["name"])
    assert row["actual"] == "affine8g16@hadamard12x8"
    config = json.loads((out / "config.json").read_text())
    for name, form in config["quantization_config"]["layers"].items():
        if "down" in name:
            del form["inputs"]
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"down_proj' is affine8g16, the ledger planned affine8g16@hadamard"):
        anybit.load(out)
    with pytest.raises(AnybitError, match="canary"):
        anybit.load(out, verify=False)


def test_quantized_inputs_are_those_behind_the_operation(tmp_path):
    """8-bit activations of a turned layer: codes of the transformed input, in calibration and at run time."""
    activations = [{"name": "int", "options": {"bits": 8}}]
    out = quantize_tiny("llama", tmp_path, recipe(tmp_path, EVERYTHING, activations=activations))
    assert 1e-5 < difference(out, tmp_path) < 0.3


def test_a_float_layer_cannot_turn_its_input(tmp_path):
    weights = [{"name": "float", "targets": ["*down_proj"]}, GPTQ]
    with pytest.raises(
        RecipeError, match=r"hadamard changes the input of model.layers.0.mlp.down_proj, which keeps float"
    ):
        quantize_tiny("llama", tmp_path, recipe(tmp_path, EVERYTHING[-1:], weights=weights))


def test_recipes_that_make_no_sense(tmp_path):
    with pytest.raises(RecipeError, match="rotate comes once and first"):
        quantize_tiny("llama", tmp_path, recipe(tmp_path, [EVERYTHING[1], EVERYTHING[0]]))
    nothing = [{"name": "hadamard", "options": {"linears": ["*dwon_proj"]}}]
    with pytest.raises(RecipeError, match=r"hadamard.linears \['\*dwon_proj'\] matches no linear"):
        quantize_tiny("llama", tmp_path, recipe(tmp_path, nothing))
