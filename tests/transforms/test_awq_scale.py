"""Scaling a block changes weights and norms, never what the float block computes; the recipe runs end to end."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import anybit
from anybit.calibration.activations import Activations
from anybit.calibration.parallel import workers
from anybit.calibration.statistics import BlockCall
from anybit.models.graph import block_inputs, run_block, trace_block
from anybit.models.normalize import normalize
from anybit.models.structure import find_structure
from anybit.transforms.awq_scale import AWQScale
from tiny_checkpoints import quantize_tiny
from tiny_models import tiny, token_ids

TOKENS = 24
READERS = {  # linears whose input must have been offered for scaling; o_proj is not, across grouped-query heads
    "llama": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"},
    "qwen2": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"},
    "gemma3": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"},
    "opt": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2"},
}  # fmt: skip


@pytest.mark.parametrize("family", READERS)
def test_float_output_is_unchanged(family, tmp_path):
    model = tiny(family)
    normalize(model)
    blocks = find_structure(model).blocks
    for p in model.get_submodule(blocks[0]).parameters():  # a few salient channels, or there is nothing to scale for
        if p.dim() == 1:
            p[::16] *= 8
    source = Activations(tmp_path / "hidden", 2, TOKENS, 64)
    for sample in range(2):
        hidden, kwargs = block_inputs(model, blocks, token_ids(TOKENS, seed=sample))[0]
        source.write(sample, hidden)
    block = model.get_submodule(blocks[0])
    before = [run_block(block, source.read(sample), kwargs) for sample in range(2)]
    weights = {name: p.clone() for name, p in block.named_parameters()}
    graph = trace_block(block, source.read(0), kwargs)
    with workers(2) as pool:
        notes = AWQScale(bits=3, group_size=16).apply(BlockCall(block, kwargs), graph, source, pool)
    assert {note.split(":")[0] for note in notes} == READERS[family]
    assert all("input scaled by AWQ" in note for note in notes)
    for sample in range(2):
        after = run_block(block, source.read(sample), kwargs)
        assert float((after - before[sample]).abs().max()) < 2e-5 * float(before[sample].abs().max())
    changed = {name for name, p in block.named_parameters() if not torch.allclose(p, weights[name], rtol=1e-3)}
    assert sum(name.removesuffix(".weight") in READERS[family] for name in changed) >= 2
    assert not any(module._forward_pre_hooks for module in block.modules())


def tensors(directory):
    """Everything in a directory's shards, by name."""
    return {name: t for file in directory.glob("*.safetensors") for name, t in load_file(file).items()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_the_recipe_end_to_end(family, tmp_path):
    """Scales from a coarse search, weights at 8 bits: the float model must come out, or the scaling is no identity."""
    out = quantize_tiny(family, tmp_path, "awq-w4", overrides=["weights.bits=8", "transform.bits=2"])
    ids = token_ids(20)
    with torch.inference_mode():
        logits = anybit.load(out)(input_ids=ids).logits
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "float", dtype=torch.float32)(input_ids=ids).logits
    difference = (logits - expected).abs().amax(-1).median() / expected.std()
    assert 1e-5 < float(difference) < 0.1
    before, after = (tensors(directory) for directory in (tmp_path / "float", out))
    norms = [name for name in before if "norm" in name or "ln_" in name]
    assert any(not torch.allclose(before[name], after[name], rtol=1e-2) for name in norms)  # something was scaled
    rows = json.loads((out / "ledger.json").read_text())["tensors"]
    linears = [row for row in rows if row["calibration_tokens"]]
    assert linears
    assert {row["actual"] for row in linears} == {"affine8g32"}
