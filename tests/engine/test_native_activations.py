"""Quantized activations in the native decoder: one linear bit for bit, whole models against transformers, prompts as decoding."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import anybit
from anybit.checkpoint.layout import read_config
from anybit.engine import build, linears
from anybit.engine.memory import Memory
from anybit.engine.weight_bytes import planned_bytes
from anybit.errors import KernelUnavailable
from anybit.formats.activation import FloatActivations, IntActivations
from anybit.formats.affine import Affine
from anybit.formats.dual_grained import DualGrained
from anybit.formats.planes import unpack
from anybit.formats.terms import CodeTerm, ColumnsTerm, Term, save_terms
from anybit.kernels import native
from anybit.kernels.hadamard.matrices import matrix
from anybit.kernels.linear_w_a8 import sparse, tiles
from anybit.kernels.quantize_activations import op as quantize_activations
from anybit.layers.embedding import TiedHead
from anybit.layers.integer import IntegerProduct
from anybit.layers.linear import QuantLinear
from integer_case import every_machine
from native_tensors import NativeModel
from tiny_checkpoints import quantize_tiny
from tiny_models import logits, save_tiny, token_ids

pytestmark = pytest.mark.skipif(native.native() is None, reason="anybit._native is not built")
COLUMNS = 192
Layer = tuple[list[Term], IntActivations, dict[str, torch.Tensor]]


class Saved(dict[str, np.ndarray[Any, Any]]):
    """Tensors by name, as a checkpoint's."""

    def get(self, name: str) -> np.ndarray[Any, Any]:  # type: ignore[override]
        return self[name]

    def floats(self, name: str) -> np.ndarray[Any, Any]:
        return np.asarray(self[name], np.float32)


def zero_linear(rows: int, columns: int, kept: list[Any]) -> Any:
    planes, scale = np.zeros((1, rows, -(-columns // 8)), np.uint8), np.zeros((rows, 1), np.float16)
    tiled = tiles.tile_joined([(planes, scale, None)], columns, columns)
    kept.append(tiled)
    linear = native.loaded().decoder.Linear()
    linear.add_part(tiled.planes.ctypes.data, tiled.scale.ctypes.data, 0, tiled.sizes, tiled.factors, 0)
    return linear


class OneLinear:
    """A decoder whose layer adds nothing and whose head is the linear under test: its logits are that of the normed rows."""

    def __init__(self, layers: list[Layer], inputs: list[dict[str, Any]] | None = None) -> None:
        forms, saved = {}, Saved()
        for i, (terms, spec, static) in enumerate(layers):
            form, tensors = save_terms(terms, (terms[0].shape[0], COLUMNS))  # type: ignore[union-attr]
            forms[f"l{i}"] = form | {"activations": spec.form()} | ({"inputs": inputs} if inputs else {})
            assert linears.refusal(forms[f"l{i}"]) == ""
            saved |= {f"l{i}.{name}": tensor.numpy() for name, tensor in (tensors | static).items()}
        self.kept: list[Any] = [saved, np.array([8], np.int32), np.ones(COLUMNS, np.float32), np.ones(8, np.float32)]
        module = native.loaded().decoder
        model, layer = module.Model(), module.Layer()
        model.hidden, model.heads, model.kv_heads, model.head_dim, model.intermediate = COLUMNS, 1, 1, 16, 32
        model.epsilon, model.attention_scale, model.embedding_scale = 1e-5, 0.25, 1.0
        self.rows = torch.randn(sum(f["shape"][0] for f in forms.values()), COLUMNS) * 3
        self.rows[:, 77] *= 30
        model.vocabulary = len(self.rows)
        model.set_embedding_rows(self.rows.data_ptr(), 1)
        model.set_precision(self.kept[1].ctypes.data)
        model.set_final_norm(self.kept[2].ctypes.data)
        model.add_rope(self.kept[3].ctypes.data, 8, 1.0)
        for name, shape in (
            ("qkv", (48, COLUMNS)),
            ("output", (COLUMNS, 16)),
            ("gate_up", (64, COLUMNS)),
            ("down", (COLUMNS, 32)),
        ):
            setattr(layer, name, zero_linear(*shape, self.kept))
        norm = self.kept[2].ctypes.data
        layer.set_norms(norm, 0, norm, 0, 0, 0)
        model.add_layer(layer)
        builder = linears.LinearBuilder(saved, forms, Memory(), self.kept)  # type: ignore[arg-type]
        model.head = builder.build(list(forms))
        self.decoder = module.Decoder(model, (16, 16, False, False, 0, 0), 4096, 1, 64)

    def __call__(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The normed rows of tokens 0.. and what the linear makes of them."""
        ids, slots, wanted = (
            np.arange(tokens, dtype=np.int32),
            np.zeros(tokens, np.int32),
            np.arange(tokens, dtype=np.int32),
        )
        out = torch.empty(tokens, len(self.rows))
        self.decoder.truncate(0, 0)
        pointers = (ids.ctypes.data, slots.ctypes.data, tokens, wanted.ctypes.data, tokens)
        self.decoder.logits(*pointers, False, out.data_ptr())
        return quantize_activations.rms_norm(self.rows[:tokens], torch.ones(COLUMNS), False, 1e-5), out


def affine(rows: int, bits: int, group: int, symmetric: bool, bypass: torch.Tensor | None = None) -> list[Term]:
    weight = torch.randn(rows, COLUMNS)
    columns = [] if bypass is None else [ColumnsTerm(bypass, torch.randn(rows, len(bypass)).half(), (rows, COLUMNS))]
    if bypass is not None:
        weight[:, bypass.long()] = 0
    grid = Affine.fit(weight, bits, group, symmetric)
    return [CodeTerm.from_codes(grid.encode(weight), grid), *columns]


def sparse_24(rows: int) -> list[Term]:
    terms = affine(rows, 4, COLUMNS, True, BYPASS)
    assert isinstance(terms[0], CodeTerm)
    codes = unpack(terms[0].planes, COLUMNS)
    pruned = torch.rand(rows, COLUMNS // 4, 4).argsort(2)[:, :, :2]
    codes = codes.view(rows, -1, 4).scatter(2, pruned, 8).view(rows, COLUMNS)
    return [CodeTerm.from_codes(codes, terms[0].decoder, "2:4"), terms[1]]


def dual(rows: int, group: int) -> list[Term]:
    scale, zero = (
        torch.full((rows, COLUMNS // group), 11, dtype=torch.uint8),
        torch.randint(5, 11, (rows, COLUMNS // group)),
    )
    made = DualGrained(4, group, torch.rand(rows, 1).half() * 0.01, scale, zero.to(torch.uint8))
    return [CodeTerm.from_codes(torch.randint(0, 16, (rows, COLUMNS), dtype=torch.uint8), made)]


BYPASS = torch.tensor([0, 77, 190], dtype=torch.int32)
STATIC = {"input_scale": torch.tensor([0.03])}
LAYERS = {
    "w8a8": lambda: (affine(40, 8, COLUMNS, True), IntActivations(), {}),
    "w4a8-groups": lambda: (affine(40, 4, 64, False), IntActivations(), {}),
    "w4a4-asymmetric": lambda: (affine(40, 4, COLUMNS, True, BYPASS), IntActivations(bits=4, symmetric=False), {}),
    "w6a6-groups": lambda: (affine(40, 6, 32, True), IntActivations(bits=6, granularity="group", group_size=64), {}),
    "2:4-sparse": lambda: (sparse_24(40), IntActivations(bits=4, symmetric=False), {}),
    "rounded-zero": lambda: (
        affine(40, 3, 64, False),
        IntActivations(bits=4, symmetric=False, rounded_zero=True, clip=0.9),
        {},
    ),
    "grouped-offsets": lambda: (
        affine(40, 4, COLUMNS, False, BYPASS),
        IntActivations(symmetric=False, granularity="group", group_size=64),
        {},
    ),
    "static": lambda: (affine(40, 8, COLUMNS, True), IntActivations(granularity="tensor", static=True), STATIC),
    "dual-grained": lambda: (dual(40, 64), IntActivations(), {}),
    "dual-grained-asymmetric": lambda: (dual(40, 64), IntActivations(symmetric=False), {}),
    "dual-grained-as-bytes": lambda: (dual(40, 48), IntActivations(), {}),
}


@pytest.mark.parametrize("case", LAYERS)
def test_a_linear_is_the_torch_layer_bit_for_bit(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "NARROW", 0)
    torch.manual_seed(0)
    layers = [LAYERS[case](), LAYERS["w4a8-groups"](), LAYERS[case]()]
    one = OneLinear(layers)
    products = [IntegerProduct(*layer) for layer in layers]
    for _ in every_machine():  # the generator itself sets them: nothing may run it ahead
        for tokens in (1, 5, 70):
            x, y = one(tokens)
            assert torch.equal(y, torch.cat([product(x) for product in products], 1))
            assert torch.equal(one(1)[1], y[:1])


def test_the_torch_layer_is_compressed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "NARROW", 0)
    for isa, _ in every_machine():
        found = IntegerProduct(*LAYERS["2:4-sparse"]())._weight.mask
        assert (found is None) == (isa == "scalar")


def test_joined_layers_share_scheme_and_side() -> None:
    torch.manual_seed(0)
    layers = [LAYERS["w4a4-asymmetric"]() for _ in range(2)]
    x, y = OneLinear(layers)(70)
    assert torch.equal(y, torch.cat([IntegerProduct(*layer)(x) for layer in layers], 1))


def test_columns_that_bypass_may_differ_between_layers() -> None:
    torch.manual_seed(0)
    spec = IntActivations(bits=4, symmetric=False)
    layers: list[Layer] = [(affine(32, 4, 192, True, index), spec, {}) for index in (BYPASS, BYPASS + 1)]
    x, y = OneLinear(layers)(9)
    assert torch.equal(y, torch.cat([IntegerProduct(*layer)(x) for layer in layers], 1))


@pytest.mark.parametrize("sizes", [(1, 64), (12, 16), (12, 4), (1, 2)])
def test_the_input_is_rotated_first(sizes: tuple[int, int]) -> None:
    torch.manual_seed(0)
    order, power = sizes
    layers, block = [LAYERS["w8a8"](), LAYERS["w4a4-asymmetric"]()], order * power
    sylvester = torch.ones(1, 1)
    while len(sylvester) < power:
        sylvester = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), sylvester)
    whole = torch.kron(torch.from_numpy(matrix(order)), sylvester).double() / block**0.5
    one = OneLinear(layers, [{"op": "hadamard", "sizes": list(sizes)}])
    for _ in every_machine():
        x, y = one(6)
        turned = x.clone()
        native.loaded().rotate_rows(turned.data_ptr(), 6, COLUMNS, matrix(order).ctypes.data, order, power)
        wanted = (x.double().view(6, -1, block) @ whole).view(6, COLUMNS)
        assert float((turned - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())
        assert torch.equal(y, torch.cat([IntegerProduct(*layer)(turned) for layer in layers], 1))


def test_hadamard_orders() -> None:
    for order in (12, 20, 28, 36, 44, 60):
        found = matrix(order)
        assert np.array_equal(found @ found.T, order * np.eye(order))
        assert set(np.unique(found)) == {-1.0, 1.0}


RECIPE = """
name: quantized-inputs
paper: none
summary: test
weights: int
activations: int
stages:
  weights:
    - {name: rtn, targets: ["*v_proj", "*down_proj"], options: {bits: 8, group_size: -1, symmetric: true}}
    - {name: rtn, targets: [linears], options: {bits: %d, group_size: %d, symmetric: %s}}
  activations:
    - {name: int, targets: [linears], options: %s}
  embeddings:
    - {name: rtn, targets: [embedding, head], options: {bits: 8, group_size: 32}}
"""
RECIPES = {
    "w8a8": RECIPE % (8, -1, "true", "{bits: 8}"),
    "w4a8": RECIPE % (4, 32, "false", "{bits: 8, symmetric: false}"),
    "w4a6": RECIPE % (4, 32, "true", "{bits: 6, granularity: group, group_size: 32}"),
    "static": RECIPE % (8, -1, "true", "{bits: 8, granularity: tensor, static: true}"),
}


def made(case: str, where: Path, family: str = "llama") -> Path:
    (where / "recipe.yaml").write_text(RECIPES[case])
    return quantize_tiny(family, where, str(where / "recipe.yaml"))


def text(tokens: int, seed: int = 0) -> list[int]:
    return [int(token) for token in token_ids(tokens, seed)[0]]


def transformers_model(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The torch model with float16 keys and values and the head's input in int8, as the native decoder has them."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()
    model.set_attn_implementation("eager")
    home = sys.modules[type(model).__module__]
    eager = home.eager_attention_forward

    def rounded(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        return eager(module, query, key.half().float(), value.half().float(), *args, **kwargs)

    def as_int8(_: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        spec = IntActivations(granularity="group", group_size=32)
        rows = args[0].reshape(-1, args[0].shape[-1])
        return (spec.encode(rows, {}).values().view(args[0].shape),)

    monkeypatch.setattr(home, "eager_attention_forward", rounded)
    for module in model.modules():
        if isinstance(module, TiedHead) or (isinstance(module, QuantLinear) and "activations" not in module.form):
            module.register_forward_pre_hook(as_int8)
    return model


@pytest.mark.parametrize(
    ("case", "family"), [*((case, "llama") for case in RECIPES), ("w4a8", "qwen2"), ("w8a8", "gemma2")]
)
def test_logits_are_those_of_transformers(
    case: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To float32 rounding in a text where no code falls on the other side of a tie; else to a few codes' size."""
    directory = made(case, tmp_path, family)
    expect = transformers_model(directory, monkeypatch)
    model = NativeModel.open(directory, kv=16, max_tokens=64, verify=False)
    largest: list[float] = []
    while not largest or largest[-1] > 1e-4:
        ids = text(12, len(largest))
        expected = logits(expect, torch.tensor([ids]))[0]
        largest.append(float(((model.logits(ids) - expected).abs() / expected.std()).max()))
        assert largest[-1] < 0.5
        assert len(largest) < 12, largest


@pytest.mark.parametrize("case", ["w8a8", "w4a8"])
def test_a_prompt_multiplies_what_decoding_multiplies(case: str, tmp_path: Path) -> None:
    """With values of 0 attention adds nothing, and linears alone decide: integers in a prompt too."""
    model = save_tiny("llama", tmp_path / "float")
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight.zero_()
    model.save_pretrained(tmp_path / "float")
    (tmp_path / "text.txt").write_text("some words of text " * 50)
    (tmp_path / "recipe.yaml").write_text(RECIPES[case])
    options: dict[str, Any] = {"samples": 2, "seq_len": 32, "threads": 1, "calibration": str(tmp_path / "text.txt")}
    anybit.quantize(str(tmp_path / "float"), recipe=str(tmp_path / "recipe.yaml"), out=str(tmp_path / "out"), **options)
    found = NativeModel.open(tmp_path / "out", max_tokens=128, verify=False)
    ids = text(70)
    whole = found.logits(ids, prompt=True)
    assert torch.equal(whole, found.logits(ids))
    found.reset()
    assert torch.equal(whole[-1], torch.cat([found.step({0: token}) for token in ids])[-1])


def test_bytes_read_are_what_forms_say(tmp_path: Path) -> None:
    directory = made("w4a8", tmp_path)
    model = NativeModel.open(directory, max_tokens=64, verify=False)
    model.prefill(text(5))
    assert model.weight_bytes() == planned_bytes(read_config(directory), 8, tokens=5)


def test_a_sparse_model_reads_less_and_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "NARROW", 0)
    save_tiny("llama", tmp_path / "float")
    (tmp_path / "text.txt").write_text("some words of text " * 50)
    recipe = RECIPES["w4a8"].replace("name: rtn, targets: [linears]", "name: quik, targets: [linears]")
    recipe = recipe.replace("group_size: 32, symmetric: false", 'outliers: 8, sparsity: "2:4"')
    (tmp_path / "recipe.yaml").write_text(recipe)
    options: dict[str, Any] = {"samples": 2, "seq_len": 32, "threads": 1, "calibration": str(tmp_path / "text.txt")}
    anybit.quantize(str(tmp_path / "float"), recipe=str(tmp_path / "recipe.yaml"), out=str(tmp_path / "out"), **options)
    rows = json.loads((tmp_path / "out" / "ledger.json").read_text())["tensors"]
    kernels = {row["name"]: row["kernel"] for row in rows}
    vectors = native.isa() != "scalar"
    assert kernels["model.layers.0.self_attn.q_proj"] == f"linear_w_a8 ({'2:4' if vectors else 'dense'})"
    assert kernels["model.layers.0.mlp.down_proj"] == "linear_w_a8"
    found, read = [], []
    for narrow in (0, 1024):
        monkeypatch.setattr(sparse, "NARROW", narrow)
        model = NativeModel.open(tmp_path / "out", max_tokens=128, verify=False)
        found.append(model.logits(text(20)))
        read.append(model.weight_bytes())
        assert read[-1] == planned_bytes(read_config(tmp_path / "out"), 8, tokens=20)
    assert torch.equal(*found)
    assert (read[0].layers < read[1].layers) == vectors


def test_what_does_not_run_is_refused_with_the_reason(tmp_path: Path) -> None:
    directory = made("w8a8", tmp_path)
    config = read_config(directory)
    forms = config["quantization_config"]["layers"]
    name = "model.layers.1.mlp.up_proj"
    for change, reason in (
        ({"activations": FloatActivations().form()}, "has float activations, which only the torch engine"),
        ({"inputs": [{"op": "permute"}]}, "changes its input by permute"),
        ({"inputs": [{"op": "hadamard", "sizes": [3, 32]}]}, "Hadamard transform of sizes 3 x 32 for 64 columns"),
        ({"inputs": [{"op": "hadamard", "sizes": [1, 64]}]}, "read the same input but change it differently"),
        ({"terms": [*forms[name]["terms"], {"term": "low_rank", "rank": 2}]}, "is not one code term and float columns"),
    ):
        assert reason in build.refusal(config, forms | {name: forms[name] | change})
    path = directory / "config.json"
    path.write_text(path.read_text().replace('"kind": "int"', '"kind": "float"'))
    with pytest.raises(KernelUnavailable):
        NativeModel.open(directory, verify=False)
