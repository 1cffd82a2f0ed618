"""The Triton kernels against the decoders in float64: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from anybit.errors import FormatError
from anybit.formats.binary_coded import BinaryCoded
from anybit.formats.codebook import Codebook
from anybit.formats.decoder import Decoder
from anybit.formats.nested_affine import NestedAffine
from anybit.formats.planes import pack
from anybit.kernels.linear_w_a16.gpu_weight import gpu_weight
from random_terms import decoder

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed (there are no wheels for this platform)", allow_module_level=True)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
from anybit.kernels.linear_w_a16 import triton as kernels  # noqa: E402

NESTED = ("nested_affine", "codebook", "binary_coded")
SINGLE = ("affine", "affine-symmetric", "bipolar")


def nested(kind: str, rows: int, columns: int, group: int) -> Decoder:
    """Eight stored bits, readable at 2, 3, 4 and 8."""
    g, widths = -(-columns // group), (2, 3, 4, 8)
    if kind == "codebook":
        return Codebook(8, {p: torch.randn(rows, 2**p).half() for p in widths})
    if kind == "binary_coded":
        alphas = {p: (torch.rand(rows, g, p) + 0.1).half() for p in widths}
        return BinaryCoded(8, group, alphas, {p: torch.randn(rows, g).half() for p in widths})
    zeros = {p: torch.randint(0, 256, (rows, g), dtype=torch.uint8) for p in widths}
    ratios = {p: torch.randint(60, 200, (rows, g), dtype=torch.uint8) for p in widths[:-1]}
    return NestedAffine(8, group, widths, (torch.rand(rows, g) + 0.1).half(), zeros, ratios)


def check(form: Decoder, rows: int, columns: int, tokens: int, relative: float) -> None:
    codes = torch.randint(0, 2**form.bits, (rows, columns), dtype=torch.uint8)
    weight = gpu_weight(pack(codes, form.bits), form, columns).to(DEVICE)
    x = torch.randn(tokens, columns)
    cell = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    for bits in form.precisions:
        cell.fill_(bits)  # the one thing that changes between launches
        y = kernels.linear(x.to(DEVICE), weight, cell).cpu().double()
        dense = form.decode(codes, bits).double()
        bound = relative * (x.double().abs() @ dense.abs().T) + 1e-6
        assert bool(((y - x.double() @ dense.T).abs() <= bound).all()), (form.kind, bits)


@pytest.mark.parametrize("kind", NESTED)
@pytest.mark.parametrize(("rows", "columns", "group"), [(16, 256, 32), (33, 320, 32), (5, 40, 40), (70, 520, 128)])
@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_a_few_tokens_at_every_width(kind: str, rows: int, columns: int, group: int, tokens: int) -> None:
    torch.manual_seed(rows + tokens)
    check(nested(kind, rows, columns, group), rows, columns, tokens, 1e-5)


@pytest.mark.parametrize("kind", NESTED)
@pytest.mark.parametrize(("rows", "columns", "tokens"), [(64, 128, 64), (70, 200, 9), (3, 72, 65)])
def test_many_tokens_at_every_width(kind: str, rows: int, columns: int, tokens: int) -> None:
    torch.manual_seed(rows)
    check(nested(kind, rows, columns, 32), rows, columns, tokens, 2**-7)  # both factors are rounded to bfloat16


@pytest.mark.parametrize("kind", SINGLE)
def test_weights_of_one_width(kind: str) -> None:
    torch.manual_seed(1)
    check(decoder(kind, 19, 100, bits=5, group=32), 19, 100, 2, 1e-5)


def test_planes_and_tables_of_other_widths_are_not_read() -> None:
    torch.manual_seed(2)
    form = nested("nested_affine", 20, 96, 32)
    codes = torch.randint(0, 256, (20, 96), dtype=torch.uint8)
    weight, x = gpu_weight(pack(codes, 8), form, 96), torch.randn(2, 96)
    expected = kernels.linear(x.to(DEVICE), weight.to(DEVICE), torch.tensor([3], dtype=torch.int32, device=DEVICE))
    weight.planes[3:] ^= 255
    size = 20 * 3
    used = weight.starts[3]
    keep = weight.first[used[0] : used[0] + size].clone(), weight.second[used[1] : used[1] + size].clone()
    weight.first.fill_(float("nan"))
    weight.second.fill_(77)
    weight.first[used[0] : used[0] + size], weight.second[used[1] : used[1] + size] = keep
    again = kernels.linear(x.to(DEVICE), weight.to(DEVICE), torch.tensor([3], dtype=torch.int32, device=DEVICE))
    assert torch.equal(again, expected)


def test_bytes_of_a_step() -> None:
    form = nested("nested_affine", 20, 96, 32)
    weight = gpu_weight(pack(torch.zeros(20, 96, dtype=torch.uint8), 8), form, 96)
    assert weight.step_bytes(3) == 20 * 96 * 3 // 8 + 20 * 3 * (2 + 1)


def test_what_does_not_fit_is_refused() -> None:
    form = nested("codebook", 4, 16, 16)
    weight = gpu_weight(pack(torch.zeros(4, 16, dtype=torch.uint8), 8), form, 16).to(DEVICE)
    cell = torch.tensor([2], dtype=torch.int32, device=DEVICE)
    with pytest.raises(FormatError, match="17 columns"):
        kernels.linear(torch.randn(1, 17, device=DEVICE), weight, cell)
    with pytest.raises(FormatError, match="no GPU kernel reads dual_grained"):
        gpu_weight(torch.zeros(3, 4, 2, dtype=torch.uint8), decoder("dual_grained", 4, 16), 16)
    assert kernels.linear(torch.randn(0, 16, device=DEVICE), weight, cell).shape == (0, 4)
