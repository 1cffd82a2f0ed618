"""linear_w_a8 against int64 sums of products, and its floats against float64 with a derived bound."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from anybit.errors import FormatError
from anybit.formats.planes import pack
from anybit.kernels.linear_w_a8 import op, reference, tiles
from anybit.kernels.native import set_threads
from integer_case import Case, every_machine

COLUMNS = (1, 3, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257, 576, 1536, 2688, 14464)
ROWS = (1, 3, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257, 576)
TOKENS = (1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 21, 37, 70)


def cases(bits: int):
    """Every K with every kind of group; N and T go round (test_grid has all of them); the widest K gets few rows."""
    rows, tokens = itertools.cycle(ROWS), itertools.cycle(TOKENS)
    for columns in COLUMNS:
        for group in dict.fromkeys(min(g, columns) for g in (32, 64, 128, columns)):
            yield Case(bits, next(rows) if columns < 14464 else 5, columns, group, next(tokens))
    yield Case(bits, 14464, 33, 32, 3)


@pytest.mark.parametrize("bits", range(1, 9))
def test_integer_sums_are_exact(isa, bits):
    for number, case in enumerate(cases(bits)):
        set_threads(1 + number % 2)
        found = op.sums(case.x, case.weight)
        shape = (case.weight.rows, case.columns, case.group, len(case.x.codes))
        assert torch.equal(found.long(), case.integers()), shape


@pytest.mark.parametrize("bits", range(1, 9))
def test_floats_stay_within_their_bound_and_no_choice_changes_a_bit(bits):
    for case in cases(bits):
        results = [op.linear_quantized(case.x, case.weight) for _ in every_machine()]
        assert all(torch.equal(results[0], other) for other in results), (case.columns, case.group)
        args = (case.x.codes[:, : case.columns], case.x.scale, case.codes, case.scale, case.zero, case.group)
        wanted = reference.linear(*args)
        # Terms |x_scale scale (sum - zero x_sum)| <= x_scale scale 127 (2^b - 1) group. Three roundings inside a term, one
        # for every later addition.
        reach = case.x.scale.double() @ case.scale.double().T * 127 * (2**bits - 1) * case.group
        bound = 1.001 * 2.0**-24 * (3 + case.scale.shape[1]) * reach
        assert bool(((results[0].double() - wanted).abs() <= bound).all()), (case.columns, case.group)


@pytest.mark.parametrize(("columns", "group"), [(576, 32), (160, 64), (257, 257)])
def test_a_token_does_not_depend_on_its_neighbours(isa, columns, group):
    case = Case(4, 83, columns, group, 70)
    whole = op.linear_quantized(case.x, case.weight)
    for start, stop in ((0, 1), (0, 5), (5, 14), (14, 46), (46, 70)):
        part = op.Quantized(*(t[start:stop].contiguous() for t in (case.x.codes, case.x.scale, case.x.sums)))
        assert torch.equal(op.linear_quantized(part, case.weight), whole[start:stop]), (start, stop)


@pytest.mark.parametrize("stored", [8, 5])
def test_fewer_planes_are_the_high_bits(isa, stored):
    case = Case(stored, 40, 96, 32, 3)
    for bits in range(1, stored + 1):
        lower = replace(case.weight, bits=bits)
        wanted = reference.sums(case.x.codes[:, :96], case.codes >> (stored - bits), 32)
        assert torch.equal(op.sums(case.x, lower).long(), wanted)


@pytest.mark.parametrize("tokens", [3, 40])
def test_the_three_factors_move_the_grid(isa, tokens):
    case = Case(4, 40, 96, 32, tokens)
    moved = replace(case.weight, scale_mul=2.0, zero_mul=0.5, zero_add=-0.25)
    zero = case.zero.double() * 0.5 - 0.25
    wanted = reference.linear(case.x.codes[:, :96], case.x.scale, case.codes, case.scale.double() * 2, zero, 32)
    torch.testing.assert_close(
        op.linear_quantized(case.x, moved).double(), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max())
    )


def test_symmetric_codes_have_their_zero_in_the_middle(isa):
    case = Case(3, 20, 64, 32, 18)
    symmetric = op.tile(case.planes, case.scale, None, 32, 64)
    explicit = op.tile(case.planes, case.scale, torch.full_like(case.zero, 4), 32, 64)
    assert torch.equal(op.linear_quantized(case.x, symmetric), op.linear_quantized(case.x, explicit))


@pytest.mark.parametrize(("bits", "rows", "columns"), [(1, 1, 1), (4, 17, 33), (8, 16, 64), (3, 50, 257)])
def test_tiles_are_reversible_and_as_documented(isa, bits, rows, columns):
    case = Case(bits, rows, columns, columns, 1)
    assert torch.equal(case.weight.planes, reference.tile(case.planes, columns))
    assert torch.equal(reference.untile(case.weight.planes, rows, columns), case.codes)


def test_the_widest_group_that_fits_32_bits_and_no_wider():
    columns = tiles.MAX_COLUMNS
    codes = torch.full((1, columns), 255, dtype=torch.uint8)
    args = (torch.ones(1, 1).half(), torch.zeros(1, 1, dtype=torch.uint8))
    weight = op.tile(pack(codes, 8), *args, columns, columns)
    x = op.quantize(-torch.ones(1, columns), columns)
    assert op.sums(x, weight).item() == -127 * 255 * columns
    wide = pack(torch.zeros(1, columns + 1, dtype=torch.uint8), 8)
    with pytest.raises(FormatError, match="66312 columns in one group could overflow"):
        op.tile(wide, *args, columns + 1, columns + 1)


def test_a_group_that_is_no_multiple_of_32_is_refused():
    case = Case(4, 8, 96, 32, 1)
    with pytest.raises(FormatError, match="group_size 48 is neither a multiple of 32 nor the whole row of 96"):
        op.tile(case.planes, case.scale[:, :2].contiguous(), None, 48, 96)


def test_quantized_activations_are_within_half_a_step():
    x = torch.randn(5, 100) * 10.0 ** torch.randint(-3, 3, (5, 100))
    x[2] = 0
    q = op.quantize(x, 32)
    back = q.codes[:, :100] * q.scale.repeat_interleave(32, 1)[:, :100]
    assert bool(((back - x).abs() <= 0.5001 * q.scale.repeat_interleave(32, 1)[:, :100]).all())
    assert bool((q.codes[:, 100:] == 0).all())
