"""2:4-sparse weights in compressed tiles: int32 sums and floats equal those of the dense tiles bit for bit, and int64."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from anybit.errors import FormatError
from anybit.formats.decoder import groups
from anybit.formats.planes import pack
from anybit.kernels import native
from anybit.kernels.linear_w_a8 import op, reference, sparse, stored
from anybit.kernels.linear_w_bf16 import op as linear_w_bf16
from integer_case import every_machine

pytestmark = pytest.mark.skipif(native.native() is None, reason="anybit._native is not built")
COLUMNS = (1, 2, 3, 5, 31, 32, 33, 63, 64, 65, 95, 129, 256, 577, 768, 2688)
ROWS, TOKENS = (1, 15, 16, 17, 33, 48, 83), (1, 2, 3, 5, 7, 8, 9, 16, 17, 37, 70)


class Sparse:
    """Random 2:4 codes over their whole range, in both layouts; some fours keep fewer than two, masks of all six kinds occur."""

    def __init__(self, bits: int, rows: int, columns: int, group: int, tokens: int) -> None:
        g = torch.Generator().manual_seed(bits * 131 + rows * 7919 + columns * 31 + tokens)
        self.columns, self.group, zero = columns, group, 2 ** (bits - 1)
        fours = torch.randint(0, 2**bits, (rows, -(-columns // 4), 4), dtype=torch.uint8, generator=g)
        fours[0] = 2**bits - 1
        fours[-1] = 0  # the farthest from the zero: -2^(b-1)
        pruned = torch.rand(fours.shape, generator=g).argsort(2)
        fours.scatter_(2, pruned[:, :, :2], zero)
        fours[torch.rand(fours.shape, generator=g) < 0.1] = zero
        self.codes = fours.flatten(1)[:, :columns].contiguous()
        self.scale = (10.0 ** (torch.rand(rows, groups(columns, group), generator=g) * 4 - 4)).half()
        self.planes = pack(self.codes, bits)
        if columns % 8:
            self.planes[:, :, -1] |= 0xFF << (columns % 8) & 0xFF  # poisoned padding must not matter
        self.dense = op.tile(self.planes, self.scale, None, group, columns)
        parts = [(self.planes.numpy(), self.scale.numpy())]
        self.weight = op.of_numpy(sparse.tile_sparse(parts, group, columns))
        self.x = op.quantize(torch.randn(tokens, columns, generator=g), group)
        self.x.codes[-1, :columns] = -127
        sums = [part.long().sum(1) for part in self.x.codes[:, :columns].split(group, 1)]
        self.x = replace(self.x, sums=torch.stack(sums, 1).float())


def cases(bits: int):
    """Every K with every kind of group, N and T going round."""
    rows, tokens = itertools.cycle(ROWS), itertools.cycle(TOKENS)
    for columns in COLUMNS:
        for group in dict.fromkeys(min(g, columns) for g in (64, 128, columns)):
            yield Sparse(bits, next(rows), columns, group, next(tokens))


@pytest.mark.parametrize("bits", range(2, 9))
def test_sums_and_floats_are_those_of_dense_tiles(bits):
    for case in cases(bits):
        exact = reference.sums(case.x.codes[:, : case.columns], case.codes, case.group)
        wanted = op.linear_quantized(case.x, case.dense)
        for machine in every_machine():
            about = (machine, case.weight.sizes, len(case.x.codes))
            assert torch.equal(op.sums(case.x, case.weight).long(), exact), about
            assert torch.equal(op.linear_quantized(case.x, case.weight), wanted), about


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("columns", "group"), [(320, 64), (577, 577)])
def test_every_number_of_tokens(tokens, columns, group):
    case = Sparse(4, 83, columns, group, tokens)
    wanted = op.linear_quantized(case.x, case.dense)
    assert all(torch.equal(op.linear_quantized(case.x, case.weight), wanted) for _ in every_machine())


@pytest.mark.parametrize("columns", COLUMNS)
def test_tiles_are_reversible_and_as_small_as_said(columns):
    case = Sparse(4, 21, columns, columns, 1)
    weight = case.weight
    assert weight.mask is not None
    assert torch.equal(reference.decompress(weight.planes, weight.mask, 21, columns), case.codes)
    blocks, chunks = 2, -(-columns // 32)
    assert weight.planes.nbytes + weight.mask.nbytes == blocks * 64 * (4 * -(-chunks // 2) + chunks)


def test_a_column_moved_within_its_four_is_seen():
    case = Sparse(4, 16, 64, 64, 3)
    moved = case.codes.view(16, 16, 4).roll(1, 2).flatten(1)
    other = sparse.tile_sparse([(pack(moved, 4).numpy(), case.scale.numpy())], 64, 64)
    assert not torch.equal(op.sums(case.x, op.of_numpy(other)), op.sums(case.x, case.weight))


def test_weights_that_share_an_input_are_joined_below_each_other():
    first, second = Sparse(4, 19, 192, 192, 5), Sparse(4, 30, 192, 192, 5)
    parts = [(case.planes.numpy(), case.scale.numpy()) for case in (first, second)]
    joined = op.of_numpy(sparse.tile_sparse(parts, 192, 192))
    wanted = [op.linear_quantized(first.x, case.dense) for case in (first, second)]
    assert torch.equal(op.linear_quantized(first.x, joined), torch.cat(wanted, 1))


def test_three_of_four_are_refused():
    case = Sparse(4, 16, 64, 64, 1)
    for bad in (0b0111, 0b1111, 0b1101):
        codes = case.codes.clone()
        codes[9, 60:] = torch.tensor([15 if bad >> i & 1 else 8 for i in range(4)], dtype=torch.uint8)
        with pytest.raises(FormatError, match="more than two values in four columns"):
            sparse.compress(pack(codes, 4).numpy(), 64)


def test_groups_that_cut_a_line_are_refused():
    case = Sparse(4, 16, 128, 64, 1)
    with pytest.raises(FormatError, match="group_size 32 of a 2:4-sparse weight is no multiple of 64"):
        sparse.tile_sparse([(case.planes.numpy(), case.scale.repeat_interleave(2, 1).numpy())], 32, 128)


def part(bits: int, group: int, sparsity: str = "2:4") -> dict[str, object]:
    return {"kind": "affine", "symmetric": True, "bits": bits, "group_size": group, "sparsity": sparsity}


@pytest.mark.parametrize(
    ("form", "reach", "compressed"),
    [
        (part(4, 128), 128, True),
        (part(4, 128, ""), 128, False),
        (part(4, 128), None, False),  # float activations: linear_w_bf16 reads dense tiles
        (part(2, 128), 128, False),
        (part(4, 128), 32, False),
        (part(4, 64), 128, True),
    ],
)
def test_what_is_compressed(form, reach, compressed, monkeypatch):
    monkeypatch.setattr(sparse, "NARROW", 128)
    case = Sparse(form["bits"], 16, 128, form["group_size"], 1)
    saved = {"weight": case.planes.numpy(), "scale": case.scale.numpy()}
    assert stored.in_pairs(form, 128, reach) == compressed
    assert (stored.tile(form, [saved], 128, reach).mask is not None) == compressed


def test_the_table_says_why_a_layer_stays_dense():
    reasons = {}
    for isa, _ in every_machine():
        reasons[isa] = sparse.dense_reason(part(4, 2048), 2048, 2048)
    assert all(("without vectors" in reason) == (isa == "scalar") for isa, reason in reasons.items())
    assert not any(reason for isa, reason in reasons.items() if isa != "scalar")
    if native.isa() == "scalar":
        return
    for form, columns, group, reason in (
        (part(4, 1020), 1020, 1020, "has 1020 columns, fewer than 1024"),
        (part(2, 2048), 2048, 2048, "has 2 bits"),
        (part(4, 32), 2048, 32, "groups of 32 columns, not of whole 64"),
        (part(4, 2048, ""), 2048, 2048, "is not sparse"),
    ):
        assert reason in sparse.dense_reason(form, columns, group)


def test_row_sums_are_exact(monkeypatch):
    monkeypatch.setattr(sparse, "NARROW", 0)
    case = Sparse(4, 35, 300, 300, 1)
    saved = {"weight": case.planes.numpy(), "scale": case.scale.numpy()}
    tiled = stored.tile(part(4, 300), [saved], 300, 300)
    assert tiled.mask is not None
    found = stored.row_sums(tiled, 300)
    wanted = (case.codes.double() - 8).sum(1, keepdim=True) * case.scale.double()
    assert torch.equal(torch.from_numpy(found), wanted.float())


def test_the_kernel_for_float_activations_refuses_it():
    case = Sparse(4, 16, 64, 64, 1)
    with pytest.raises(FormatError, match="reads dense tiles"):
        linear_w_bf16.linear(torch.randn(1, 64), case.weight)
