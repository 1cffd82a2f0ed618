"""Every kernel as an operator of torch: checked by torch's own opcheck, inside compiled graphs, inside exported programs."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from torch import nn

from anybit.errors import FormatError, KernelUnavailable
from anybit.formats.affine import Affine
from anybit.formats.planes import pack, unpack
from anybit.formats.terms import save_terms
from anybit.kernels.embedding.op import embed_op
from anybit.kernels.hadamard.op import hadamard_, hadamard_op
from anybit.kernels.linear_bf16.op import linear_op as linear_bf16_op
from anybit.kernels.linear_w_a8 import library
from anybit.kernels.linear_w_a8.op import tile
from anybit.kernels.linear_w_a16.op import linear_op as linear_w_a16_op
from anybit.kernels.linear_w_a16.weight import of_decoder
from anybit.kernels.quantize_activations.op import quantize_op
from anybit.layers.linear import QuantLinear
from random_terms import KINDS, code_term, decoder, mixed_terms
from tiny_checkpoints import quantize_tiny

ROWS, COLUMNS, GROUP = 24, 64, 32


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    torch.compiler.reset()


def affine(bits=4):
    fitted = Affine.fit(torch.randn(ROWS, COLUMNS), bits, GROUP)
    return pack(torch.randint(0, 2**bits, (ROWS, COLUMNS), dtype=torch.uint8), bits), fitted.scale, fitted.zero


def tiled(bits=4):
    return tile(*affine(bits), GROUP, COLUMNS)


def w_a16_samples():
    x = torch.randn(2, 3, COLUMNS)
    for kind in ("affine", "affine-symmetric", "bipolar", "codebook", "binary_coded", "nested_affine"):
        planes = code_term(kind, ROWS, COLUMNS, group=GROUP).planes
        weight = of_decoder(planes, decoder(kind, ROWS, COLUMNS, group=GROUP), COLUMNS)
        parts = (weight.planes, weight.first, weight.second, weight.group_size, COLUMNS)
        yield (x, *parts, None, weight.kind)
        yield (x.clone().requires_grad_(), *parts, "native-decode", weight.kind)


def w_a8_samples():
    for w, dtype in ((tiled(), torch.float32), (replace(tiled(), zero=None, zero_add=8.0), torch.bfloat16)):
        sizes = [w.bits, w.rows, w.columns, w.group_size]
        yield torch.randn(2, 3, COLUMNS, dtype=dtype), w.planes, w.scale, w.zero, sizes, list(w.factors)


SAMPLES = {
    linear_w_a16_op: w_a16_samples,
    library.linear_op: w_a8_samples,
    quantize_op: lambda: [(torch.randn(3, 70), 32), (torch.randn(1, 70), 70, "reference")],
    embed_op: lambda: [(torch.tensor([3, 0, 23]), *affine(), GROUP, COLUMNS, 2.0)],
    linear_bf16_op: lambda: [(torch.randn(n, 70), torch.randn(5, 70).bfloat16()) for n in (1, 9)],
    hadamard_op: lambda: [(torch.randn(3, 24), 8)],
}


@pytest.mark.parametrize("op", SAMPLES, ids=lambda op: op._opoverload.name())
def test_opcheck(op):
    for sample in SAMPLES[op]():
        torch.library.opcheck(op, sample)


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_linear_w_a8_is_within_the_rounding_of_activations(tokens):
    planes, scale, zero = affine()
    w, x = tile(planes, scale, zero, GROUP, COLUMNS), torch.randn(tokens, COLUMNS)
    dense = Affine(4, GROUP, scale, zero).decode(unpack(planes, COLUMNS))
    # A code is off by half a step at most, a step being the group's amax / 127; 2e-5 for float32 sums.
    steps = x.view(tokens, -1, GROUP).abs().amax(-1).repeat_interleave(GROUP, 1) / 127
    allowed = (0.5 * steps + 2e-5 * x.abs()).double() @ dense.double().abs().T
    y = library.linear(x, w)
    assert bool(((y.double() - x.double() @ dense.double().T).abs() <= allowed).all())
    assert not torch.equal(y, x @ dense.T), "activations were not quantized at all"
    assert torch.equal(torch.cat([library.linear(row[None], w) for row in x]), y)
    assert torch.equal(library.linear(x.bfloat16(), w), library.linear(x.bfloat16().float(), w).bfloat16())
    assert library.linear(x[:0], w).shape == (0, ROWS)


def test_linear_w_a8_refuses_what_does_not_fit():
    w, x = tiled(), torch.randn(2, COLUMNS)
    with pytest.raises(FormatError, match=r"x must be float \[\.\.\., 64\]"):
        library.linear(x[:, :32], w)
    with pytest.raises(FormatError, match="planes must be contiguous uint8"):
        library.linear(x, replace(w, rows=ROWS + 16))
    with pytest.raises(FormatError, match="scale must be contiguous float16"):
        library.linear(x, replace(w, scale=w.scale[:, :1]))
    with pytest.raises(FormatError, match="bits must be 1 to 4"):
        library.linear(x, replace(w, bits=5))
    with pytest.raises(KernelUnavailable, match="needs CPU tensors, got meta"):
        library._linear(x.to("meta"), w.planes, w.scale, w.zero, [4, ROWS, COLUMNS, GROUP], list(w.factors))


class Stack(nn.Module):
    """A Hadamard transform, both kinds of integer kernel, a sum of every kind of term."""

    def __init__(self) -> None:
        super().__init__()
        terms = mixed_terms(ROWS, COLUMNS, "codebook", "binary_coded")
        form, tensors = save_terms(terms, (ROWS, COLUMNS))
        self.mixed = QuantLinear(form, bias=False)
        self.mixed.fill(tensors)
        self.integer = tiled()

    def forward(self, x):
        x = hadamard_(x * 2)
        return torch.relu(self.mixed(x)) + library.linear(x, self.integer)


@pytest.mark.parametrize("tokens", [3, 40])
def test_a_layer_compiles_without_warming_up_and_without_graph_breaks(tokens):
    stack, x = Stack(), torch.randn(tokens, COLUMNS)
    with torch.no_grad():
        compiled = torch.compile(stack, fullgraph=True, backend="aot_eager")(x)
        assert torch.equal(compiled, stack(x))


@pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")
def test_inductor_calls_the_kernels(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # a graph kept from an older schema must not serve
    stack, x = Stack(), torch.randn(3, COLUMNS)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(stack, fullgraph=True)(x), stack(x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_every_decoder_is_exported(kind):
    form, tensors = save_terms([code_term(kind, ROWS, COLUMNS)], (ROWS, COLUMNS))
    layer, x = QuantLinear(form, bias=False), torch.randn(3, COLUMNS)
    layer.fill(tensors)
    with torch.no_grad():
        program = torch.export.export(layer, (x,))
        assert torch.equal(program.module()(x), layer(x))
    if kind != "float":
        assert any("anybit.linear_w_a16" in str(node.target) for node in program.graph.nodes)


def test_a_whole_llama_compiles_and_is_exported_with_equal_logits(tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(quantize_tiny("llama", tmp_path)).eval()
    ids = torch.arange(12)[None] + 3
    with torch.no_grad():
        compiled = torch.compile(lambda i: model(i, use_cache=False).logits, fullgraph=True, backend="aot_eager")(ids)
        program = torch.export.export(model, (ids,), {"use_cache": False})
        want = model(ids, use_cache=False).logits
        assert torch.equal(compiled, want)
        assert torch.equal(program.module()(ids, use_cache=False).logits, want)
    called = {str(node.target) for node in program.graph.nodes if "anybit" in str(node.target)}
    assert called == {"anybit.embedding.default", "anybit.linear_w_a16.default"}
