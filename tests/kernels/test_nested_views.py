"""Nested weights on the integer and the bfloat16 kernel: every width against the format's own numbers."""

from __future__ import annotations

import ctypes
import itertools
import mmap
from dataclasses import replace

import pytest
import torch

from anybit.errors import FormatError
from anybit.formats.planes import pack
from anybit.kernels.linear_w_a8 import op, reference
from anybit.kernels.linear_w_a8.nested import tile_nested
from anybit.kernels.linear_w_bf16 import op as linear_w_bf16
from anybit.kernels.linear_w_bf16 import reference as bf16_reference
from anybit.kernels.native import set_threads
from nested_case import nested

# N, K, group: 32, 64, 128 and one group a row, none of them whole
SHAPES = [(1, 1, 1), (17, 33, 32), (40, 160, 64), (33, 257, 257), (65, 300, 128), (48, 576, 32), (7, 1500, 1500)]
TOKENS = (1, 2, 3, 9, 16, 21, 70)


def views(rows, columns, group, bits=8):
    codes, decoder = nested(rows, columns, group, bits)
    return codes, decoder, tile_nested([(pack(codes, bits), decoder)], columns)


def activations(tokens, columns, group):
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens))
    return op.quantize(x, group)


@pytest.mark.parametrize("bits", [8, 6, 4, 2])
def test_integer_sums_are_exact(isa, bits):
    tokens = itertools.cycle(TOKENS)
    for rows, columns, group in SHAPES:
        codes, _, found = views(rows, columns, group, bits)
        for width, view in found.items():
            x = activations(next(tokens), columns, group)
            wanted = reference.sums(x.codes[:, :columns], codes >> (bits - width), group)
            assert torch.equal(op.sums(x, view).long(), wanted), (rows, columns, width)


@pytest.mark.parametrize("bits", [8, 4])
def test_every_width_is_the_format(isa, bits):
    """`decode` is exact in float32, so the kernel's own roundings bound the difference."""
    tokens = itertools.cycle(TOKENS)
    for rows, columns, group in SHAPES:
        codes, decoder, found = views(rows, columns, group, bits)
        assert set(found) == set(decoder.precisions)
        for (width, view), threads in zip(found.items(), itertools.cycle((1, 2)), strict=False):
            set_threads(threads)
            x = activations(next(tokens), columns, group)
            step = x.scale.double().repeat_interleave(group, 1)[:, :columns]
            wanted = (x.codes[:, :columns].double() * step) @ decoder.decode(codes, width).double().T
            # Terms x_scale scale (sum - zero x_sum), both products at most 127 group 2^b in steps of the stored codes. Three
            # roundings inside a term, one for every later addition.
            reach = x.scale.double() @ decoder.grid(width)[0].double().T * 127 * 2**bits * group
            bound = 1.001 * 2.0**-24 * (3 + decoder.scale.shape[1]) * reach
            found_here = op.linear_quantized(x, view).double()
            assert bool(((found_here - wanted).abs() <= bound).all()), (rows, columns, width)
            other = decoder.decode(codes, min(w for w in (*decoder.precisions, 2) if w != width))
            if columns > 30 and width != 2 and rows > 1:  # the bound tells widths apart
                wrong = (x.codes[:, :columns].double() * step) @ other.double().T
                assert not bool(((found_here - wrong).abs() <= bound).all())


@pytest.mark.parametrize("bits", [8, 5])
def test_bfloat16_weights_are_the_format_rounded_once(bits):
    for rows, columns, group in SHAPES:
        codes, decoder, found = views(rows, columns, group, bits)
        for width, view in found.items():
            exact = decoder.decode(codes, width).double()
            scale = decoder.grid(width)[0].double().repeat_interleave(group, 1)[:, :columns]
            error = (bf16_reference.weights(view).double() - exact).abs()
            assert bool((error <= 2.0**-8 * exact.abs() + 2.0**-23 * 2**bits * scale).all()), (columns, width)


@pytest.mark.parametrize("tokens", [1, 17, 70])
def test_bfloat16_products(tokens):
    if reason := linear_w_bf16.refusal():
        pytest.skip(reason)
    for rows, columns, group in SHAPES:
        _, _, found = views(rows, columns, group)
        x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens))
        for view in found.values():
            weights = bf16_reference.weights(view).double()
            exact = x.bfloat16().double() @ weights.T
            bound = columns * (2.0**-24 * 1.01 * (x.bfloat16().double().abs() @ weights.abs().T) + 2.0**-125)
            assert bool(((linear_w_bf16.linear(x, view, "native").double() - exact).abs() <= bound).all())


def guarded(tensor):
    """A copy that ends where a page begins that nobody may touch."""
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    pages = -(-len(flat) // mmap.PAGESIZE)
    block = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    whole = torch.frombuffer(block, dtype=torch.uint8)
    fence = ctypes.c_void_p(whole.data_ptr() + pages * mmap.PAGESIZE)
    assert ctypes.CDLL(None).mprotect(fence, mmap.PAGESIZE, 0) == 0  # PROT_NONE
    begin = pages * mmap.PAGESIZE - len(flat)
    copy = whole[begin : begin + len(flat)]
    copy.copy_(flat)
    return copy.view(tensor.dtype).view(tensor.shape)


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_planes_and_tables_of_other_widths_are_not_touched(isa, tokens):
    """The planes in use, and the tables, each end at a page that kills the process when read."""
    for rows, columns, group in [(40, 160, 64), (33, 257, 257), (16, 512, 32)]:
        _, _, found = views(rows, columns, group)
        x, floats = activations(tokens, columns, group), torch.randn(tokens, columns)
        for width, view in found.items():
            alone = replace(
                view, planes=guarded(view.planes[:width]), scale=guarded(view.scale), zero=guarded(view.zero)
            )
            assert torch.equal(op.linear_quantized(x, alone), op.linear_quantized(x, view))
            if not linear_w_bf16.refusal():
                assert torch.equal(linear_w_bf16.linear(floats, alone), linear_w_bf16.linear(floats, view))


def test_planes_are_shared_and_tables_only_where_the_format_shares_them():
    _, _, found = views(40, 160, 64)
    assert len({view.planes.data_ptr() for view in found.values()}) == 1
    assert found[3].scale.data_ptr() == found[4].scale.data_ptr()
    assert found[6].zero.data_ptr() == found[8].zero.data_ptr()
    assert len({view.scale.data_ptr() for view in found.values()}) == 3


@pytest.mark.parametrize("rows", [16, 20])
def test_joined_weights_are_one_below_the_other(rows):
    parts = [nested(rows, 96, 32, seed=seed) for seed in (1, 2, 3)]
    joined = tile_nested([(pack(codes, 8), decoder) for codes, decoder in parts], 96)
    x = activations(5, 96, 32)
    for width, view in joined.items():
        alone = [tile_nested([(pack(codes, 8), decoder)], 96)[width] for codes, decoder in parts]
        assert torch.equal(op.linear_quantized(x, view), torch.cat([op.linear_quantized(x, one) for one in alone], 1))


def test_unlike_weights_are_not_joined():
    parts = [nested(16, 96, group) for group in (32, 96)]
    with pytest.raises(FormatError, match="different widths, groups or tables"):
        tile_nested([(pack(codes, 8), decoder) for codes, decoder in parts], 96)
