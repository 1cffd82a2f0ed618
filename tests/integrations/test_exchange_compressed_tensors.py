"""compressed-tensors: our words against the package's own packer, there and back, and through transformers."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import anybit
from anybit.errors import FormatError, InputError
from anybit.formats.terms import dense, load_terms
from anybit.integrations.compressed_tensors.read import Reader
from anybit.integrations.exchange.account import Account
from anybit.integrations.exchange.packing import pack_words
from exchange_case import alter, alter_config, config_of, same_values, tensors_of, values_of
from tiny_checkpoints import quantize_tiny

UP = "model.layers.0.mlp.up_proj"
IDS = torch.arange(4, 24)[None]


def recipe(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return str(path)


SOURCES = {
    "4 bits, asymmetric": {"overrides": ["weights.group_size=32"]},
    "3 bits, symmetric": {"overrides": ["weights.bits=3", "weights.group_size=16", "weights.symmetric=true"]},
    "7 bits, rows": {"overrides": ["weights.bits=7", "weights.group_size=4096"]},
    "w8a8": {"recipe": "smoothquant-w8a8"},
    "fp8": {"recipe": "fp8-w8a8"},
}


@pytest.fixture(scope="module", params=SOURCES)
def pair(request, tmp_path_factory):
    where = tmp_path_factory.mktemp("ct")
    source = quantize_tiny("llama", where, **SOURCES[request.param])
    result = anybit.export(source, to="compressed-tensors", out=where / "ct")
    return request.param, source, where / "ct", result


def test_there_and_back_is_the_same_model(pair, tmp_path):
    kind, source, exported, result = pair
    assert result["lossless"]
    assert anybit.import_checkpoint(exported, out=tmp_path / "back")["lossless"]
    assert same_values(values_of(tmp_path / "back"), values_of(source))
    inputs = [config_of(d)["layers"][UP].get("activations", {}).get("kind") for d in (source, tmp_path / "back")]
    assert inputs == [{"w8a8": "int", "fp8": "float"}.get(kind)] * 2
    ours, back = (anybit.load(d) for d in (source, tmp_path / "back"))
    with torch.inference_mode():
        assert torch.allclose(ours(IDS).logits, back(IDS).logits, atol=1e-4)


def test_the_words_are_those_of_the_package(pair):
    package = pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    assert package
    _, source, exported, _ = pair
    tensors = tensors_of(exported)
    if f"{UP}.weight_packed" not in tensors:
        pytest.skip("codes of 8 bits are not packed")
    weights = config_of(exported)["config_groups"]["group_0"]["weights"]
    shape = torch.Size(tensors[f"{UP}.weight_shape"].tolist())
    codes = unpack_from_int32(tensors[f"{UP}.weight_packed"], weights["num_bits"], shape).float()
    scale, zero = tensors[f"{UP}.weight_scale"].float(), torch.zeros(1, 1)
    if not weights["symmetric"]:
        size = torch.Size((shape[0], scale.shape[1]))
        zero = unpack_from_int32(tensors[f"{UP}.weight_zero_point"], weights["num_bits"], size, packed_dim=0).float()
    each = shape[1] // scale.shape[1]
    spread = lambda table: table.repeat_interleave(each, 1) if table.numel() > 1 else table  # noqa: E731
    assert torch.equal(spread(scale) * (codes - spread(zero)), values_of(source)[f"{UP}.weight"])


@pytest.mark.filterwarnings("ignore")
def test_transformers_answers_the_same(pair):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    kind, source, exported, _ = pair
    dequantize = config_of(exported)["config_groups"]["group_0"]["weights"]["symmetric"] is False
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    theirs = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32, **options).eval()
    with torch.inference_mode():
        found, expected = theirs(IDS).logits, anybit.load(source)(IDS).logits
    # To dequantize at load, the package multiplies in the scales' float16; left alone, in float32 at the first forward.
    weight = values_of(source)[f"{UP}.weight"]
    assert torch.equal(theirs.get_submodule(UP).weight.float(), weight.half().float() if dequantize else weight)
    # Its activations lie on a grid of its own (largest / 127.5): not the same numbers, near ones.
    bound = {"w8a8": 0.3, "fp8": 0.3}.get(kind, 1e-2)
    assert float((found - expected).abs().max()) < bound * float(expected.std())


STAGES = """
name: mixed
paper: none
summary: two widths and a cache
weights: 4 and 8 bits
needs: []
stages:
  weights:
    - {name: rtn, targets: [down], options: {bits: 8, group_size: -1, symmetric: true}}
    - {name: rtn, targets: [linears], options: {bits: 4, group_size: 32, symmetric: true}}
  activations:
    - {name: int, targets: [down], options: {bits: 8}}
"""


def test_layers_of_several_kinds_share_one_model(tmp_path):
    source = quantize_tiny("llama", tmp_path, recipe=recipe(tmp_path, STAGES))
    anybit.export(source, to="compressed-tensors", out=tmp_path / "ct")
    config = config_of(tmp_path / "ct")
    assert config["format"] == "mixed-precision"
    kinds = {group["format"]: group["targets"] for group in config["config_groups"].values()}
    assert kinds.keys() == {"int-quantized", "pack-quantized"}
    assert kinds["int-quantized"] == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    anybit.import_checkpoint(tmp_path / "ct", out=tmp_path / "back")
    assert same_values(values_of(tmp_path / "back"), values_of(source))
    forms = [config_of(d)["layers"] for d in (source, tmp_path / "back")]
    assert forms[1].items() <= forms[0].items()


def test_a_cache_scheme_is_a_loss_and_written_as_float8(tmp_path):
    kv = "  kv:\n    - {name: kv, options: {key_bits: 8, value_bits: 8}}\n"
    source = quantize_tiny("llama", tmp_path, recipe=recipe(tmp_path, STAGES + kv))
    with pytest.raises(InputError, match="ranges found per token"):
        anybit.export(source, to="compressed-tensors", out=tmp_path / "ct")
    assert not (tmp_path / "ct").exists()
    assert not anybit.export(source, to="compressed-tensors", out=tmp_path / "ct", allow_loss=True)["lossless"]
    scheme = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
    assert config_of(tmp_path / "ct")["kv_cache_scheme"] == scheme
    tensors = tensors_of(tmp_path / "ct")
    scales = [tensors[f"model.layers.{i}.self_attn.{which}_scale"].tolist() for i in (0, 1) for which in "kv"]
    assert scales == [[1.0]] * 4
    for format in ("gptq", "awq"):
        with pytest.raises(InputError):
            anybit.export(source, to=format, out=tmp_path / "other")


HOSTILE = {
    "NaN scales": (lambda d: alter(d, f"{UP}.weight_scale", lambda t: t * float("nan")), "NaN or infinity"),
    "short words": (lambda d: alter(d, f"{UP}.weight_packed", lambda t: t[:, :-1].contiguous()), "wants int32"),
    "no zeros": (lambda d: alter(d, f"{UP}.weight_zero_point", lambda _: None), "weight_zero_point is in no file"),
    "no groups": (lambda d: alter_config(d, config_groups={}), "in no config group"),
    "groups of a list": (lambda d: alter_config(d, config_groups=[1]), "config_groups is missing"),
    "a broken regex": (lambda d: _targets(d, ["re:("]), "no regular expression"),
    "77 bits": (lambda d: _weights(d, num_bits=77), "num_bits is 77"),
    "group of 0": (lambda d: _weights(d, group_size=0), "with group_size 0"),
    "group of text": (lambda d: _weights(d, group_size="32"), "with group_size 32"),
    "by block": (lambda d: _weights(d, strategy="block"), "by 'block'"),
    "targets of a word": (lambda d: _targets(d, "Linear"), "without a list of targets"),
    "targets of a number": (lambda d: _targets(d, 5), "without a list of targets"),
    "a regex too deep": (lambda d: _targets(d, ["re:" + "(" * 5000 + ")" * 5000]), "no regular expression"),
    "a repetition too large": (lambda d: _targets(d, ["re:a{99999999999}"]), "no regular expression"),
    "a format of one group": (lambda d: _whole_group(d, format="naive-quantized"), "'naive-quantized' are not read"),
    "floats in words": (lambda d: _weights(d, type="float"), "type is 'float'"),
    "symmetry in text": (lambda d: _weights(d, symmetric="false"), "symmetric is 'false'"),
    "inputs of a word": (lambda d: _whole_group(d, input_activations="int8"), "num_bits is None"),
    "inputs in groups of text": (lambda d: _inputs(d, strategy="group", group_size="x"), "group_size is 'x'"),
    "inputs in groups of a trillion": (lambda d: _inputs(d, strategy="group", group_size=10**12), "group_size is 1000"),
    "another shape": (lambda d: alter(d, f"{UP}.weight_shape", lambda t: t - 1), "weight_shape is not the"),
    "unknown format": (lambda d: alter_config(d, format="nvfp4-pack-quantized"), "format is 'nvfp4"),
}


def _group(directory):
    return config_of(directory)["config_groups"]["group_0"]


def _targets(directory, targets):
    alter_config(directory, config_groups={"group_0": _group(directory) | {"targets": targets}})


def _whole_group(directory, **changes):
    alter_config(directory, config_groups={"group_0": _group(directory) | {"targets": ["Linear"]} | changes})


def _inputs(directory, **changes):
    tokens = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
    _whole_group(directory, input_activations=tokens | changes)


def _weights(directory, **changes):
    group = _group(directory)
    alter_config(
        directory, config_groups={"group_0": group | {"targets": ["Linear"], "weights": group["weights"] | changes}}
    )


@pytest.fixture(scope="module")
def asymmetric(tmp_path_factory):
    where = tmp_path_factory.mktemp("hostile")
    source = quantize_tiny("llama", where, overrides=["weights.group_size=32"], config={"tie_word_embeddings": True})
    anybit.export(source, to="compressed-tensors", out=where / "ct")
    return where / "ct"


@pytest.mark.parametrize("how", HOSTILE)
def test_hostile_files_are_one_clear_error(how, asymmetric, tmp_path):
    damage, message = HOSTILE[how]
    shutil.copytree(asymmetric, tmp_path / "in")
    damage(tmp_path / "in")
    with pytest.raises(InputError, match=message):
        anybit.import_checkpoint(tmp_path / "in", out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_zero_points_that_are_no_codes_are_refused():
    weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "channel"}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    reader = Reader({"format": "int-quantized", "config_groups": groups}, Account("anybit", False))
    codes, zero = torch.ones(2, 8, dtype=torch.int8), torch.tensor([[100], [0]], dtype=torch.int8)
    tensors = {"weight": codes, "weight_scale": torch.ones(2, 1), "weight_zero_point": zero}
    with pytest.raises(FormatError, match="zero points that do not fit 4 bits"):
        reader.layer("x", (2, 8), tensors)
    form, found = reader.layer("x", (2, 8), tensors | {"weight_zero_point": zero.clamp(-8, 7)})
    assert dense(load_terms(form, found)).tolist() == [[-6.0] * 8, [1.0] * 8]


def test_quantized_outputs_are_a_loss():
    group = {
        "targets": ["Linear"],
        "weights": {"num_bits": 8, "strategy": "channel"},
        "output_activations": {"num_bits": 8},
    }
    reader = Reader({"format": "int-quantized", "config_groups": {"group_0": group}}, Account("anybit", False))
    tensors = {"weight": torch.ones(2, 8, dtype=torch.int8), "weight_scale": torch.ones(2, 1)}
    with pytest.raises(InputError, match="quantized outputs"):
        reader.layer("x", (2, 8), tensors)


def test_a_late_block_that_rounds_its_input_is_allowed_to_move(tmp_path):
    source = quantize_tiny("llama", tmp_path, recipe="smoothquant-w8a8")
    anybit.export(source, to="compressed-tensors", out=tmp_path / "ct")
    group = _group(tmp_path / "ct")
    first = group | {"targets": [r"re:model\.layers\.0\."], "input_activations": None}
    alter_config(tmp_path / "ct", config_groups={"group_0": first, "group_1": group | {"targets": ["Linear"]}})
    anybit.import_checkpoint(tmp_path / "ct", out=tmp_path / "back")
    inputs = ["activations" in config_of(tmp_path / "back")["layers"][UP.replace("0", each)] for each in "01"]
    assert inputs == [False, True]
    assert json.loads((tmp_path / "back" / "canary.json").read_text())["allowed"] > 0


def test_scales_beyond_float16_are_a_loss(asymmetric, tmp_path):
    shutil.copytree(asymmetric, tmp_path / "in")
    alter(tmp_path / "in", f"{UP}.weight_scale", lambda t: t.float() * 1.0001)
    with pytest.raises(InputError, match="more bits than float16"):
        anybit.import_checkpoint(tmp_path / "in", out=tmp_path / "out")
    result = anybit.import_checkpoint(tmp_path / "in", out=tmp_path / "out", allow_loss=True)
    assert not result["lossless"]
    assert anybit.load(tmp_path / "out")


def test_packing_pads_with_zeros():
    assert pack_words(torch.full((1, 3), 7, dtype=torch.uint8), 3).tolist() == [[0b111111111]]
