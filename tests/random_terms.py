"""Random weights in every written form: decoders of every kind, and sums of several terms."""

from __future__ import annotations

import torch

from anybit.formats.affine import Affine
from anybit.formats.binary_coded import BinaryCoded
from anybit.formats.bipolar import Bipolar
from anybit.formats.blocked import Blocked
from anybit.formats.codebook import Codebook
from anybit.formats.decoder import Decoder
from anybit.formats.dual_grained import DualGrained
from anybit.formats.floating import Floating, FloatType
from anybit.formats.nested_affine import NestedAffine
from anybit.formats.planes import pack
from anybit.formats.terms import CodeTerm, ColumnsTerm, LowRankTerm, Term

KINDS = ("affine", "affine-symmetric", "bipolar", "codebook", "binary_coded", "dual_grained", "float", "nested_affine")


def decoder(kind: str, rows: int, columns: int, bits: int = 3, group: int = 16) -> Decoder:
    """A decoder of `kind` whose numbers have both signs."""
    g = -(-columns // group)
    weight, scales = torch.randn(rows, columns), (torch.rand(rows, g, bits) + 0.1).half()
    if kind.startswith("affine"):
        return Affine.fit(weight, bits, group, symmetric=kind.endswith("symmetric"))
    if kind == "bipolar":
        return Bipolar.fit(weight, bits, group)
    if kind == "codebook":
        return Codebook(bits, {bits: torch.randn(rows, 2**bits).half()})
    if kind == "binary_coded":
        return BinaryCoded(bits, group, {bits: scales}, {bits: torch.randn(rows, g).half()})
    if kind == "dual_grained":
        whole = torch.randint(1, 9, (rows, g), dtype=torch.uint8)
        zero = torch.randint(0, 2**bits, (rows, g), dtype=torch.uint8)
        return DualGrained(bits, group, scales[:, :1, 0].contiguous(), whole, zero)
    if kind == "nested_affine":
        zeros = {width: torch.randint(0, 2**bits, (rows, g), dtype=torch.uint8) for width in (2, bits)}
        ratios = {width: torch.randint(90, 160, (rows, g), dtype=torch.uint8) for width in zeros if width < bits}
        return NestedAffine(bits, group, tuple(range(2, bits + 1)), scales[:, :, 0].contiguous(), zeros, ratios)
    if kind == "blocked":  # as GGUF's K types: three groups to a block
        b = -(-columns // (3 * group))
        steps = [torch.randint(-63, 64, (rows, g), dtype=torch.int8) for _ in range(2)]
        scale, offset = ((torch.rand(rows, b) + 0.1).half() for _ in range(2))
        return Blocked(bits, group, 3 * group, scale, steps[0], offset, steps[1])
    return Floating.fit(weight, FloatType(2, bits - 3), group)


def code_term(
    kind: str, rows: int, columns: int, part: tuple[int, int] | None = None, bits: int = 3, group: int = 16
) -> CodeTerm:
    """Random codes under a random decoder, over columns `part` (default: all)."""
    start, stop = part or (0, columns)
    codes = torch.randint(0, 2**bits, (rows, stop - start), dtype=torch.uint8)
    return CodeTerm(pack(codes, bits), decoder(kind, rows, stop - start, bits, group), (rows, columns), (start, stop))


def mixed_terms(rows: int, columns: int, first: str = "affine", second: str = "affine") -> list[Term]:
    """Two code terms on two ranges of columns (one column is in neither), three exact columns, rank two."""
    index = torch.tensor([0, columns // 2, columns - 1], dtype=torch.int32)
    return [
        code_term(first, rows, columns, (0, 24)),
        code_term(second, rows, columns, (24, columns - 1), bits=4),
        ColumnsTerm(index, torch.randn(rows, 3).half(), (rows, columns)),
        LowRankTerm(torch.randn(rows, 2).half(), torch.randn(2, columns).half()),
    ]
