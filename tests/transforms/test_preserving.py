"""Every transform, alone and one after the other, leaves the float output of every family's block; and does something."""

from __future__ import annotations

import pytest
import torch

from anybit.calibration.parallel import workers
from anybit.transforms.hadamard import Hadamard
from anybit.transforms.reorder import Reorder
from anybit.transforms.rotate import Rotate, rotate_values
from anybit.transforms.shift import Shift
from anybit.transforms.smooth import Smooth
from anybit.transforms.smooth_attention import SmoothAttention
from tiny_models import FAMILIES
from transform_case import case

ALL = {
    "smooth": Smooth(linears=("norm", "*")),
    "hadamard": Hadamard(),
    "reorder": Reorder(),
    "smooth-attention": SmoothAttention(),
    "shift": Shift(),
}
BIASED = {"opt", "gpt_neox", "gpt2", "bloom"}  # layer norms and linears with biases
VALUES = {"opt": "self_attn.out_proj", "falcon": "self_attention.dense", "gpt2": "attn.c_proj"} | dict.fromkeys(
    ("gpt_neox", "bloom"), None
)


DOWN = {"opt": "fc2", "gpt2": "mlp.c_proj", **dict.fromkeys(("falcon", "gpt_neox", "bloom"), "mlp.dense_4h_to_h")}
DOWN |= dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe"), "mlp.experts.0.down")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ALL)
def test_output_stays(name, family, tmp_path):
    found = case(family, tmp_path)
    before = {n: p.clone() for n, p in found.call.block.named_parameters()}
    with workers(1) as pool:
        notes = ALL[name].apply(found.call, found.graph, found.source, pool)
    assert found.error() < 1e-4
    changed = [n for n, p in found.call.block.named_parameters() if not torch.equal(p, before[n])]
    if name == "shift" and family not in BIASED:
        assert not changed
        return
    assert changed
    assert notes
    if name in ("hadamard", "reorder"):
        assert DOWN.get(family, "mlp.down_proj") in [note.split(":")[0] for note in notes]
    found.call.detach()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in found.call.block.modules())


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "qwen3", "mixtral"])
def test_all_in_a_row(family, tmp_path):
    found = case(family, tmp_path)
    order = ["reorder", "smooth-attention", "shift", "smooth", "hadamard"]
    with workers(1) as pool:
        for name in order:
            ALL[name].apply(found.call, found.graph, found.source, pool)
        once = found.error()
        for name in order:  # and again: the second time they find a block already turned
            if name != "hadamard":
                ALL[name].apply(found.call, found.graph, found.source, pool)
    assert once < 1e-4
    assert found.error() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_value_rotation(family, tmp_path):
    found = case(family, tmp_path)
    consumers = [note.split(":")[0] for note in rotate_values(found.call, found.graph, found.source)]
    assert found.error() < 1e-4
    default = "self_attn.o_proj"
    assert consumers == [name for name in [VALUES.get(family, default)] if name] or family in ("gpt_neox", "bloom")


def test_online_operation_belongs_to_the_weight(tmp_path):
    found = case("llama", tmp_path)
    with workers(1) as pool:
        Hadamard().apply(found.call, found.graph, found.source, pool)
    found.call.detach()
    assert found.error() > 0.05


def test_a_rotation_without_its_gains_is_seen(tmp_path):
    """What `rotate` does but for folding the gains first."""
    found = case("llama", tmp_path)
    stream = Rotate().stream(64, centred=False)
    for group in found.graph.groups:
        for name in group.linears:
            module = found.call.block.get_submodule(name)
            if group.norm:
                module.weight.copy_(stream.turn(module.weight))
            else:
                stream.write(module)
    turned = [stream.turn(b).float() for b in found.before]
    for i in range(found.source.samples):
        found.source.write(i, stream.turn(found.source.read(i)).float())
    assert found.error(turned) > 0.05
