"""Causal attention over a paged cache of 16-, 8-, 4- or 2-bit keys and values.

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
        tables: page numbers, one list per sequence; P + i is page i of `opened`.
        opened: uint8 [Q, shape.opened.page_bytes], pages that are (still) in 16 bits.

    Raises:
        FormatError: pages of another shape or dtype, or a page number outside 0..P+Q-1.
    """

    def __init__(
        self, shape: KvShape, pages: Tensor, tables: Sequence[Sequence[int]], opened: Tensor | None = None
    ) -> None:
        self.shape, self.pages, self.tables = shape, pages, [list(table) for table in tables]
        self.opened = pages.new_empty(0, shape.opened.page_bytes) if opened is None else opened
        for name, found, size in (("pages", pages, shape.page_bytes), ("opened", self.opened, shape.opened.page_bytes)):
            if found.dtype != torch.uint8 or found.ndim != 2 or found.shape[1] != size:
                raise FormatError(f"attention: {name} must be uint8 [P, {size}], got {_form(found)}")
            if not found.is_contiguous():
                raise FormatError(f"attention: {name} must be contiguous: they are written in place")
        count = len(pages) + len(self.opened)
        wrong = [page for table in tables for page in table if not 0 <= page < count]
        if wrong:
            raise FormatError(f"attention: page {wrong[0]} is not one of the {count} pages; fix the page table")

    def page(self, number: int) -> tuple[Tensor, KvShape]:
        """Bytes and shape of a page of a table."""
        if number < len(self.pages):
            return self.pages[number], self.shape
        return self.opened[number - len(self.pages)], self.shape.opened

    def addresses(self) -> list[list[int]]:
        """The tables as the native functions take them: bit 0 marks open pages."""
        count = len(self.pages)
        first, first_open = self.pages.data_ptr(), self.opened.data_ptr() + 1
        size, size_open = self.shape.page_bytes, self.shape.opened.page_bytes
        return [
            [first + n * size if n < count else first_open + (n - count) * size_open for n in table]
            for table in self.tables
        ]

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
            Or a page that is sealed channel by channel: it cannot take single tokens.
        KernelUnavailable: the forced `impl` cannot run here.
    """
    shape = cache.shape
    cache.check(looks)
    numbers = [cache.tables[look.sequence][look.last // PAGE_TOKENS] for look in looks]
    if shape.channels and any(number < len(cache.pages) for number in numbers):
        raise FormatError("attention: ranges per channel need a whole page; write to an open one, then `seal` it")
    want = (len(looks), shape.kv_heads, shape.head_dim)
    keys, values = _floats(keys, "keys", want), _floats(values, "values", want)
    if _choose(impl, cache.pages, keys, values) == "reference":
        for number, look, key, value in zip(numbers, looks, keys, values, strict=True):
            page, form = cache.page(number)
            for head, block in enumerate(page.view(shape.kv_heads, -1)):
                reference.write_token(block, form, look.last % PAGE_TOKENS, key[head], value[head])
        return
    where = _looks(looks)
    native.loaded().kv_write(
        shape.sizes,
        cache.addresses(),
        where.data_ptr(),
        len(looks),
        keys.data_ptr(),
        values.data_ptr(),
    )


def seal(shape: KvShape, opened: Tensor, sealed: Tensor, impl: str | None = None) -> None:
    """Turn a full 16-bit page, uint8 [shape.opened.page_bytes], into codes and ranges, uint8 [shape.page_bytes].

    |x - x~| <= s / 2 for the float16 x of the open page and the scale s of its range.

    Raises:
        FormatError: pages of other sizes. KernelUnavailable: the forced `impl` cannot run here.
    """
    for name, page, size in (("open", opened, shape.opened.page_bytes), ("sealed", sealed, shape.page_bytes)):
        if page.dtype != torch.uint8 or tuple(page.shape) != (size,) or not page.is_contiguous():
            raise FormatError(f"attention: the {name} page must be contiguous uint8 [{size}], got {_form(page)}")
    if _choose(impl, opened, sealed) == "reference":
        reference.seal(opened, sealed, shape)
    else:
        native.loaded().kv_seal(shape.sizes, opened.data_ptr(), sealed.data_ptr())


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
            weights and what is held in 16 bits to bfloat16 (codes are exact in it); elsewhere it changes nothing. It
            always does where keys or values have 4 or 2 bits.

    Raises:
        FormatError: shapes that do not fit, or positions outside the page tables.
        KernelUnavailable: the forced `impl` cannot run here.
    """
    shape = cache.shape
    cache.check(looks)
    q = _floats(q, "q", (len(looks), shape.heads, shape.head_dim))
    out = torch.empty_like(q)
    if _choose(impl, cache.pages, q) == "reference":
        read = [reference.read_table(cache.pages, table, shape, cache.opened) for table in cache.tables]
        for t, look in enumerate(looks):
            seen = slice(look.first, look.last + 1)
            out[t] = reference.attend_token(q[t], *read[look.sequence], scaling, softcap, seen)
        return out
    where = _looks(looks)
    native.loaded().attend(
        shape.sizes,
        cache.addresses(),
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
