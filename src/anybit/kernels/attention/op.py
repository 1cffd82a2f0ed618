"""Causal attention over a paged cache of 16-, 8- or 4-bit keys and values.

    native     streaming softmax, page by page, straight from the codes (cpu.cpp; prompts with AMX: tiles_amx.h)
    reference  everything dequantized, float64

A token's result depends on its own query and cache alone, bit for bit (`native`): not on the other tokens of the call, nor
on threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from anybit.errors import FormatError, KernelUnavailable
from anybit.kernels import native
from anybit.kernels.attention import reference
from anybit.kernels.attention.shape import PAGE_TOKENS, KvShape

IMPLEMENTATIONS = ("native", "reference")


class Look(NamedTuple):
    """What one query token sees: positions first..last of a sequence; `last` is its own."""

    sequence: int
    first: int
    last: int


class PagedCache:
    """Pages of one layer, and which of them each sequence uses: page tables[s][p] holds positions 64 p .. 64 p + 63.

    Args:
        shape: sizes of the cache.
        pages: uint8 [P, shape.page_bytes], on the CPU, contiguous; contents of unused slots do not matter.
        tables: page numbers, one list per sequence.

    Raises:
        FormatError: pages of another shape or dtype, or a page number outside 0..P-1.
    """

    def __init__(self, shape: KvShape, pages: Tensor, tables: Sequence[Sequence[int]]) -> None:
        if pages.dtype != torch.uint8 or pages.ndim != 2 or pages.shape[1] != shape.page_bytes:
            raise FormatError(f"attention: pages must be uint8 [P, {shape.page_bytes}], got {_form(pages)}")
        if not pages.is_contiguous():
            raise FormatError("attention: pages must be contiguous: they are written in place")
        wrong = [page for table in tables for page in table if not 0 <= page < len(pages)]
        if wrong:
            raise FormatError(f"attention: page {wrong[0]} is not one of the {len(pages)} pages; fix the page table")
        self.shape, self.pages, self.tables = shape, pages, [list(table) for table in tables]

    def check(self, looks: Sequence[Look]) -> None:
        """Refuse, with a FormatError, what lies outside the tables."""
        for t, look in enumerate(looks):
            if not 0 <= look.sequence < len(self.tables):
                raise FormatError(f"attention: token {t} names sequence {look.sequence} of {len(self.tables)}")
            end = len(self.tables[look.sequence]) * PAGE_TOKENS
            if not 0 <= look.first <= look.last < end:
                raise FormatError(
                    f"attention: token {t} looks at positions {look.first}..{look.last}; "
                    f"the pages of sequence {look.sequence} hold 0..{end - 1}"
                )


def write(cache: PagedCache, looks: Sequence[Look], keys: Tensor, values: Tensor, impl: str | None = None) -> None:
    """Store token t's key and value, rows t of float [T, kv_heads, D], at position looks[t].last of its sequence.

    Raises:
        FormatError: shapes that do not fit, or positions outside the page tables.
        KernelUnavailable: the forced `impl` cannot run here.
    """
    shape = cache.shape
    cache.check(looks)
    want = (len(looks), shape.kv_heads, shape.head_dim)
    keys, values = _floats(keys, "keys", want), _floats(values, "values", want)
    if _choose(impl, cache.pages, keys, values) == "reference":
        for look, key, value in zip(looks, keys, values, strict=True):
            page = cache.pages[cache.tables[look.sequence][look.last // PAGE_TOKENS]].view(shape.kv_heads, -1)
            for head in range(shape.kv_heads):
                reference.write_token(page[head], shape, look.last % PAGE_TOKENS, key[head], value[head])
        return
    where = _looks(looks)
    native.loaded().kv_write(
        shape.sizes,
        cache.pages.data_ptr(),
        cache.tables,
        where.data_ptr(),
        len(looks),
        keys.data_ptr(),
        values.data_ptr(),
    )


def attend(
    cache: PagedCache,
    looks: Sequence[Look],
    q: Tensor,
    scaling: float,
    softcap: float = 0.0,
    impl: str | None = None,
    *,
    prompt: bool = False,
) -> Tensor:
    """softmax(scaling * q K^T) V for every token, as float32 [T, heads, D].

    Args:
        cache: keys and values; every position that a token sees has been written.
        looks: what each token sees.
        q: float [T, heads, D], computed in float32.
        scaling: factor of the scores, commonly D ** -0.5.
        softcap: if > 0, scores are bounded by softcap * tanh(score / softcap).
        impl: force one of the implementations above.
        prompt: the tokens are text that is given: where the processor has a bfloat16 matrix unit, `native` rounds queries,
            weights and what a 16-bit cache holds to bfloat16 (codes are exact in it); elsewhere it changes nothing.

    Raises:
        FormatError: shapes that do not fit, or positions outside the page tables.
        KernelUnavailable: the forced `impl` cannot run here.
    """
    shape = cache.shape
    cache.check(looks)
    q = _floats(q, "q", (len(looks), shape.heads, shape.head_dim))
    out = torch.empty_like(q)
    if _choose(impl, cache.pages, q) == "reference":
        read = [reference.read_table(cache.pages, table, shape) for table in cache.tables]
        for t, look in enumerate(looks):
            seen = slice(look.first, look.last + 1)
            out[t] = reference.attend_token(q[t], *read[look.sequence], scaling, softcap, seen)
        return out
    where = _looks(looks)
    native.loaded().attend(
        shape.sizes,
        cache.pages.data_ptr(),
        cache.tables,
        where.data_ptr(),
        len(looks),
        q.data_ptr(),
        scaling,
        softcap,
        prompt,
        out.data_ptr(),
    )
    return out


def _looks(looks: Sequence[Look]) -> Tensor:
    return torch.tensor([tuple(look) for look in looks], dtype=torch.int64).reshape(-1, 3)


def _floats(x: Tensor, name: str, want: tuple[int, int, int]) -> Tensor:
    if tuple(x.shape) != want or not x.is_floating_point():
        raise FormatError(f"attention: {name} must be float {list(want)}, got {_form(x)}")
    return x.detach().float().contiguous()


def _form(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"


def _choose(impl: str | None, *tensors: Tensor) -> str:
    if impl not in (None, *IMPLEMENTATIONS):
        raise KernelUnavailable(f"attention has no implementation '{impl}'; known: {', '.join(IMPLEMENTATIONS)}")
    reason = native.refusal(*tensors)
    if impl == "native" and reason:
        raise KernelUnavailable(f"attention 'native' cannot run: {reason}")
    return impl or ("reference" if reason else "native")
