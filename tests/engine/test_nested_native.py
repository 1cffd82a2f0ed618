"""Nested checkpoints in the native decoder: every width against a dense model, switches, offsets and bytes touched."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from anybit.checkpoint.layout import INDEX, read_config
from anybit.engine.weight_bytes import planned_bytes
from anybit.errors import InputError
from anybit.formats.terms import tensor_specs
from anybit.kernels import native
from anybit.layers.linear import Terms
from anybit.layers.precision import Precision
from native_tensors import NativeModel
from nested_case import WIDTHS, nest
from tiny_checkpoints import quantize_tiny
from tiny_models import logits, token_ids

pytestmark = pytest.mark.skipif(native.native() is None, reason="anybit._native is not built")
MIXED = ("v_proj", "embed", "lm_head")  # left affine: q and k are joined with nothing, v stays at 4 bits


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    made = {}

    def make(family="llama", but=()):
        if (family, but) not in made:
            where = tmp_path_factory.mktemp("nested")
            made[family, but] = nest(quantize_tiny(family, where), but=but)
        return made[family, but]

    return make


def text(tokens, seed=0):
    return token_ids(tokens, seed)[0].tolist()


def opened(directory, **options):
    return NativeModel.open(directory, max_tokens=256, **options)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_every_width_is_the_dense_model(family, checkpoint):
    """A float model whose weights are what the format decodes to; what is left is the rounding of activations to bytes."""
    directory = checkpoint(family)
    model = opened(directory, kv=16)
    dense = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()
    ids, found = text(40), {}
    for bits in WIDTHS:
        model.precision.bits = dense.precision.bits = bits
        expected = logits(dense, torch.tensor([ids]))[0]
        found[bits] = (model.logits(ids), expected)
    for bits, (ours, _) in found.items():
        distance = {other: float((ours - expected).norm() / expected.norm()) for other, (_, expected) in found.items()}
        assert distance[bits] < 0.06, distance
        assert distance[bits] < 0.5 * min(d for other, d in distance.items() if other != bits), distance


def test_a_switch_in_a_text_is_a_dense_model_that_switches_on_the_same_cache(checkpoint):
    directory = checkpoint()
    model = opened(directory, kv=16)
    dense = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()
    ids, schedule = text(60), [8] * 20 + [4] * 10 + [2] * 10 + [3] * 5 + [6] * 15
    cache, worst, never = None, 0.0, 0.0
    unswitched = model.logits(ids)
    model.reset()
    for t, bits in enumerate(schedule):
        model.precision.bits = dense.precision.bits = bits
        with torch.no_grad():
            output = dense(torch.tensor([[ids[t]]]), past_key_values=cache, use_cache=True)
        cache, expected = output.past_key_values, output.logits[0, -1]
        ours = model.step({0: ids[t]})[0]
        worst = max(worst, float((ours - expected).norm() / expected.norm()))
        if t >= 20:
            never = max(never, float((unswitched[t] - expected).norm() / expected.norm()))
    assert worst < 0.06
    assert never > 2 * worst


def rewritten(directory, out, change):
    """A copy of a nested checkpoint: change(form, tensors) returns the form and the tensors of each nested layer anew."""
    shutil.copytree(directory, out)
    config, index = (json.loads((out / name).read_text()) for name in ("config.json", INDEX))
    files, layers = index["weight_map"], config["quantization_config"]["layers"]
    shards = {file: load_file(out / file) for file in set(files.values())}
    for name, form in layers.items():
        if form["terms"][0]["kind"] != "nested_affine":
            continue
        file, keys = files[f"{name}.weight"], list(tensor_specs(form))
        tensors = {key: shards[file].pop(f"{name}.{key}") for key in keys if files.pop(f"{name}.{key}")}
        layers[name], tensors = change(form, tensors)
        shards[file] |= {f"{name}.{key}": tensor for key, tensor in tensors.items()}
        files |= {f"{name}.{key}": file for key in tensors}
    for file, tensors in shards.items():
        save_file(tensors, out / file, metadata={"format": "pt"})
    for name, data in (("config.json", config), (INDEX, index)):
        (out / name).write_text(json.dumps(data))
    return out


def greedy(model, ids, count):
    model.reset()
    new, rows = [], [(token, 0) for token in ids]
    for step in range(count):
        _, best = model.top(rows, [len(rows) - 1], prompt=step == 0)
        new.append(int(best[0, 0]))
        rows = [(new[-1], 0)]
    return new


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_constant_schedule_is_the_checkpoint_that_stores_nothing_else(bits, checkpoint, tmp_path):
    """Lower planes and other tables are noise there: the same tokens, and the same logits to the bit."""

    def only(form, tensors):
        table = min(t for t in form["terms"][0]["tables"] if t >= bits)
        noise = {key: torch.randint(1, 255, t.shape, dtype=torch.uint8) for key, t in tensors.items() if key != "scale"}
        kept = {key: tensors[key] for key in ("scale", f"zero{table}", f"ratio{table}") if key in tensors}
        weight = torch.cat([tensors["weight"][:bits], noise["weight"][bits:]])
        return form, {**noise, **kept, "weight": weight}

    directory = checkpoint("llama", ("embed",))  # rows of the embedding are always read at full width
    whole, alone = opened(directory), opened(rewritten(directory, tmp_path / "only", only), verify=False)
    whole.precision.bits = alone.precision.bits = bits
    assert greedy(whole, text(20), 30) == greedy(alone, text(20), 30)
    assert torch.equal(whole.logits(text(50)), alone.logits(text(50)))
    if bits < 8:
        alone.precision.bits = 8
        assert not torch.equal(whole.logits(text(50)), alone.logits(text(50)))


def test_full_width_is_the_affine_checkpoint(checkpoint, tmp_path):
    def affine(form, tensors):
        part = {"term": "code", "columns": form["terms"][0]["columns"], "kind": "affine", "bits": 8, "group_size": 32}
        kept = {"weight": tensors["weight"], "scale": tensors["scale"], "zero": tensors["zero8"]}
        return {**form, "terms": [{**part, "symmetric": False}]}, kept

    model, plain = opened(checkpoint()), opened(rewritten(checkpoint(), tmp_path / "plain", affine), verify=False)
    assert torch.equal(model.logits(text(50)), plain.logits(text(50)))
    assert torch.equal(model.prefill(text(50), 1), plain.prefill(text(50), 1))
    assert plain.precision.available == (8,)
    with pytest.raises(InputError, match=r"precision 4 is not in this checkpoint; it holds \[8\]"):
        plain.precision.bits = 4


def test_precisions_that_are_not_there_are_refused_and_nothing_changes(checkpoint):
    model = opened(checkpoint())
    before = model.logits(text(10))
    for bits in (1, 5, 16):
        with pytest.raises(
            InputError, match=rf"precision {bits} is not in this checkpoint; it holds \[2, 3, 4, 6, 8\]"
        ):
            model.precision.bits = bits
    assert torch.equal(model.logits(text(10)), before)


@pytest.mark.parametrize(("family", "but"), [("llama", ()), ("llama", MIXED), ("qwen2", ()), ("gemma2", ("q_proj",))])
def test_bytes_touched_are_the_plan(family, but, checkpoint):
    directory = checkpoint(family, but)
    config, model = read_config(directory), opened(directory)
    layers = model.facts.layers
    assert model.weight_bytes() == (0, 0, 0)
    seen = set()
    for bits in WIDTHS:
        for offsets in ([0] * layers, [-2] * (layers - 1) + [1]):
            model.precision.bits = bits
            model.set_offsets(offsets)
            model.reset()
            model.prefill(text(20))
            assert model.weight_bytes() == planned_bytes(config, bits, offsets, tokens=20)
            model.step({0: 5})
            model.top([(6, 0)], [0])
            once, both = planned_bytes(config, bits, offsets), model.weight_bytes()
            assert both == tuple(2 * part for part in once)
            assert model.weight_bytes() == (0, 0, 0)
            seen.add(both)
    assert len(seen) >= 7  # some sums are the same by two ways


def test_planned_bytes_by_hand(checkpoint):
    """One layer's o_proj of 8 planes: 64 rows are 4 blocks, columns 2 chunks of 32 and 2 groups."""
    config = read_config(checkpoint())
    name = "model.layers.0.self_attn.o_proj"
    rows, columns = config["quantization_config"]["layers"][name]["shape"]
    less = {**config, "quantization_config": {"layers": dict(config["quantization_config"]["layers"])}}
    form = less["quantization_config"]["layers"][name]
    less["quantization_config"]["layers"][name] = {**form, "shape": [rows - 16, columns]}
    for bits in WIDTHS:
        difference = planned_bytes(config, bits).layers - planned_bytes(less, bits).layers
        assert difference == bits * 16 * -(-columns // 32) * 4 + -(-columns // 32) * 16 * 3


def test_offsets_move_single_layers(checkpoint):
    model, ids = opened(checkpoint()), text(30)
    by_bits = {}
    for bits in WIDTHS:
        model.precision.bits = bits
        by_bits[bits] = model.logits(ids)
    model.precision.bits = 4
    layers = model.facts.layers
    low, high = (planned_bytes(read_config(checkpoint()), bits) for bits in (2, 8))
    for offset, bits in (
        (-2, 2),
        (-1, 3),
        (-9, 2),
        (2, 6),
        (1, 6),
        (3, 8),
        (9, 8),
    ):  # 5 and 7 are read wider, at 6 and 8
        model.set_offsets([offset] * layers)
        model.weight_bytes()
        moved = model.logits(ids)
        assert low.layers <= model.weight_bytes().layers <= high.layers
        model.set_offsets([bits - 4] * layers)
        assert torch.equal(model.logits(ids), moved)
        assert not torch.equal(moved, by_bits[bits])  # the head stays at 4
    model.set_offsets([0] * layers)
    assert torch.equal(model.logits(ids), by_bits[4])
    one_low = [-2] + [0] * (layers - 1)
    model.set_offsets(one_low)
    assert not torch.equal(model.logits(ids), by_bits[4])
    with pytest.raises(InputError, match=f"this model has {layers} layers, got 1 precision offsets"):
        model.set_offsets([0])


def test_layers_of_unlike_precision_are_the_dense_model_of_such_layers(checkpoint):
    directory, ids = checkpoint(), text(40)
    model = opened(directory, kv=16)
    dense = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()
    model.precision.bits = dense.precision.bits = 4
    model.set_offsets([-2, 4])
    distance = []
    for widths in ((2, 8), (8, 2), (4, 4)):
        for layer, bits in zip(dense.model.layers, widths, strict=True):
            own = Precision(WIDTHS)
            own.bits = bits
            for module in layer.modules():
                if isinstance(module, Terms):
                    module.precision = own
        expected = logits(dense, torch.tensor([ids]))[0]
        distance.append(float((model.logits(ids) - expected).norm() / expected.norm()))
    assert distance[0] < 0.06
    assert distance[0] < 0.5 * min(distance[1:])


@pytest.mark.parametrize("kv_bits", [16, 8, 4])
def test_last_keys_and_values_are_those_of_transformers(kv_bits, checkpoint):
    directory = checkpoint("qwen3")
    model = opened(directory, kv=kv_bits)
    dense = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()
    ids = text(100)
    with torch.no_grad():
        cache = dense(torch.tensor([ids]), use_cache=True).past_key_values.layers[-1]
    model.logits(ids, 1)
    keys, values = model.last_keys_values(1)
    assert keys.shape == values.shape == (model.facts.kv_heads, 100, model.facts.head_dim)
    for ours, theirs in ((keys, cache.keys[0]), (values, cache.values[0])):
        distance = (torch.from_numpy(ours) - theirs).norm() / theirs.norm()
        assert float(distance) < (0.12 if kv_bits == 4 else 0.05)
    assert model.last_keys_values(0)[0].shape[1] == 0
    with pytest.raises(InputError, match="slot 9"):
        model.last_keys_values(9)


def test_a_switch_takes_no_memory(checkpoint):
    model = opened(checkpoint())
    model.logits(text(64))

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1])

    def run(rounds):
        for t in range(rounds):
            model.precision.bits = WIDTHS[t % 5]
            model.set_offsets([t % 3 - 1] * model.facts.layers)
            model.truncate(0, 63)
            model.step({0: 5})

    run(50)
    before, blocks = resident(), sys.getallocatedblocks()
    run(500)
    assert resident() - before <= 4  # pages
    assert abs(sys.getallocatedblocks() - blocks) < 50
