"""A quantized weight cut along its inputs, and weights stacked along their outputs: what tensor parallelism and fused layers
need (`terms.row_slice` cuts along the outputs).

Nothing is decoded: planes are cut at bytes, scales at groups, so a piece decodes to the same numbers as before.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from anybit.errors import FormatError
from anybit.formats.activation import ActivationSpec
from anybit.formats.decoder import Decoder, Form, groups
from anybit.formats.terms import DECODERS, CodeTerm, ColumnsTerm, LowRankTerm, Term


def column_slice(term: Term, start: int, stop: int) -> Term | None:
    """The term of columns start..stop-1 alone; None for a columns term that has none of them.

    Raises:
        FormatError: a cut inside a byte of a plane or inside a group, or codes that cover some of the columns only.
    """
    if isinstance(term, LowRankTerm):
        return LowRankTerm(term.u, term.v[:, start:stop])
    shape = (term.shape[0], stop - start)
    if isinstance(term, ColumnsTerm):
        inside = (term.index >= start) & (term.index < stop)
        return ColumnsTerm(term.index[inside] - start, term.weight[:, inside], shape) if bool(inside.any()) else None
    if term.columns != (0, term.shape[1]):
        raise FormatError("its precision is mixed along its inputs, which cannot be divided")
    if start % 8 or (stop % 8 and stop != term.shape[1]):
        raise FormatError(
            f"columns {start} to {stop} are no whole bytes of its planes; each part needs a multiple of 8"
        )
    decoder = _cut_decoder(term.decoder, term.shape, start, stop)
    planes = term.planes[:, :, start // 8 : -(-stop // 8)]
    return replace(term, planes=planes, decoder=decoder, shape=shape, columns=(0, stop - start))


def _cut_decoder(decoder: Decoder, shape: tuple[int, int], start: int, stop: int) -> Decoder:
    """The decoder of columns start..stop-1. Which axis of a table runs along the columns is read off the sizes it must have."""
    form, width = decoder.form(), stop - start
    group: int = form.get("group_size", shape[1])
    block: int = form.get("block_size", group)  # groups of groups: some tables have an entry for each of these
    for size in (group, block):
        if size < shape[1]:
            check_groups(size, start, width)
    cut = {**form, "group_size": min(group, width)} if "group_size" in form else form
    before, after = decoder.specs(form, shape), decoder.specs(cut, (shape[0], width))
    tables = {}
    for name, table in decoder.tensors().items():
        old, new = before[name][0], after[name][0]
        axes = [axis for axis, (one, other) in enumerate(zip(old, new, strict=True)) if one != other]
        if axes:
            size = block if old[axes[0]] == groups(shape[1], block) else group
            table = table.narrow(axes[0], start // size, new[axes[0]])
        tables[name] = table
    return DECODERS[form["kind"]].restore(cut, tables)


def check_groups(group: int, start: int, width: int) -> None:
    """Raise FormatError unless `width` columns from `start` are whole groups."""
    if start % group or width % group:
        raise FormatError(f"{width} columns from {start} are no whole groups of {group}")


def static_slice(
    spec: ActivationSpec | None, static: Mapping[str, Tensor], columns: int, start: int, stop: int
) -> dict[str, Tensor]:
    """The static tensors of an activation scheme over `columns` columns, for columns start..stop-1 alone.

    A scheme with one dynamic scale per token finds it in the columns that it sees.

    Raises:
        FormatError: a cut inside a group, or a scheme that needs all columns at once (tender).
    """
    if spec is None or (start, stop) == (0, columns):
        return dict(static)
    if spec.kind == "tender":
        raise FormatError("its activations (tender) are ordered over all inputs, which cannot be divided")
    group = spec.columns_per_group(columns)
    if group >= columns:
        return dict(static)
    check_groups(group, start, stop - start)
    return {name: table[start // group : stop // group] for name, table in static.items()}


def stacked(parts: Sequence[Sequence[Term]]) -> list[Term] | None:
    """The terms of weights over the same inputs as those of one weight, rows of the first on top; None where they are not
    written alike: other kinds, widths or groups, other float columns, or a low-rank term."""
    if len({len(terms) for terms in parts}) > 1:
        return None
    found = [_stack(column) for column in zip(*parts, strict=True)]
    return None if any(term is None for term in found) else [term for term in found if term is not None]


def _stack(terms: Sequence[Term]) -> Term | None:
    first, rows = terms[0], 0
    for term in terms:
        if isinstance(term, LowRankTerm) or not _alike(first, term):
            return None
        rows += term.shape[0]
    if isinstance(first, ColumnsTerm):
        weights = [term.weight for term in terms if isinstance(term, ColumnsTerm)]
        return ColumnsTerm(first.index, torch.cat(weights), (rows, first.shape[1]))
    assert isinstance(first, CodeTerm)
    codes = [term for term in terms if isinstance(term, CodeTerm)]
    form: Form = first.decoder.form()
    tables = {name: torch.cat([term.decoder.tensors()[name] for term in codes]) for name in first.decoder.tensors()}
    decoder = DECODERS[form["kind"]].restore(form, tables)
    planes = torch.cat([term.planes for term in codes], 1)
    return replace(first, planes=planes, decoder=decoder, shape=(rows, first.shape[1]))


def _alike(one: Term, other: Term) -> bool:
    if isinstance(one, ColumnsTerm) and isinstance(other, ColumnsTerm):
        return torch.equal(one.index, other.index)
    if isinstance(one, CodeTerm) and isinstance(other, CodeTerm):
        same = one.decoder.form() == other.decoder.form() and one.sparsity == other.sparsity
        return same and one.columns == other.columns and one.shape[1] == other.shape[1]
    return False


def same_tensors(all_tables: Sequence[Mapping[str, Tensor]]) -> bool:
    """Whether dictionaries of tensors hold the same names and values."""
    return all(
        one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
        for one, other in itertools.pairwise(all_tables)
    )
