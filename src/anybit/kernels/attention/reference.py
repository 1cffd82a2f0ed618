"""What the native attention equals: quantize as stored, dequantize everything, softmax in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from anybit.kernels.attention.shape import PAGE_TOKENS, KvShape

LARGEST_HALF = 65504.0


def _half(x: Tensor) -> Tensor:
    return x.clamp(-LARGEST_HALF, LARGEST_HALF).half()


def _below(x: Tensor) -> Tensor:
    """The largest float16 <= x, saturated."""
    nearest = _half(x)
    down = torch.nextafter(nearest, torch.tensor(-LARGEST_HALF, dtype=torch.float16))
    return torch.where(nearest.float() > x, down, nearest)


def quantize(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Float32 [..., D] to codes uint8 [..., D], scale and minimum float16 [...]; |x - (m + s c)| <= s / 2."""
    minimum = _below(x.amin(-1))
    scale = _below((minimum.float() - x.amax(-1)) / (2**bits - 1)).abs()  # of the negative: rounds up
    exact = (x - minimum.float()[..., None]) / scale.float()[..., None]
    return exact.nan_to_num(0.0).clamp(0, 2**bits - 1).round().to(torch.uint8), scale, minimum


class _Block:
    """One kv head's block of a page, as views: codes as they share bytes, ranges float16 [2, runs]."""

    def __init__(self, block: Tensor, shape: KvShape) -> None:
        sizes = [shape.key_bytes, shape.value_bytes, 4 * shape.key_ranges, 4 * shape.value_ranges]
        keys, values, key_ranges, value_ranges = block.split(sizes)
        self.keys = keys.view(torch.float16 if shape.key_bits == 16 else torch.uint8).view(-1, PAGE_TOKENS)
        self.values = values.view(torch.float16 if shape.value_bits == 16 else torch.uint8).view(-1, shape.head_dim)
        self.key_ranges = key_ranges.view(torch.float16).view(2, -1)
        self.value_ranges = value_ranges.view(torch.float16).view(2, -1)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 [R, ...] to [R * bits / 8, ...]: rows r, r + R * bits / 8, ... share bytes, the first in the lowest bits."""
    parts = codes.chunk(8 // bits)
    return sum((part << (i * bits) for i, part in enumerate(parts)), torch.zeros_like(parts[0]))


def _unpack(stored: Tensor, bits: int) -> Tensor:
    """The codes of `_pack`; float16 passes."""
    if bits == 16:
        return stored
    return torch.cat([stored >> (i * bits) & (2**bits - 1) for i in range(8 // bits)])


def write_token(block: Tensor, shape: KvShape, slot: int, key: Tensor, value: Tensor) -> None:
    """Key and value float32 [D] into slot 0..63 of one kv head's block, uint8 [head_bytes]."""
    view = _Block(block, shape)
    if shape.key_bits == 16:
        view.keys[:, slot] = _half(key)
    else:
        codes, view.key_ranges[0, slot], view.key_ranges[1, slot] = quantize(key, shape.key_bits)
        view.keys[:, slot] = _pack(codes, shape.key_bits)
    _write_value(view, shape, slot, value)


def _write_value(view: _Block, shape: KvShape, slot: int, value: Tensor) -> None:
    bits = shape.value_bits
    if bits == 16:
        view.values[slot] = _half(value)
        return
    codes, view.value_ranges[0, slot], view.value_ranges[1, slot] = quantize(value, bits)
    step = len(view.values)
    shift = slot // step * bits
    row = view.values[slot % step]
    row[:] = (row & (0xFF ^ (2**bits - 1) << shift)) | codes << shift


def seal(opened: Tensor, sealed: Tensor, shape: KvShape) -> None:
    """Codes and ranges of a full 16-bit page into a page of `shape`, uint8 [page_bytes] each."""
    keys, values = (x.float() for x in read_page(opened, shape.opened))
    for head, block in enumerate(sealed.view(shape.kv_heads, -1)):
        view = _Block(block, shape)
        for slot in range(PAGE_TOKENS):
            if not shape.channels:
                write_token(block, shape, slot, keys[slot, head], values[slot, head])
            else:
                _write_value(view, shape, slot, values[slot, head])
        if shape.channels:
            codes, view.key_ranges[0], view.key_ranges[1] = quantize(keys[:, head].T.contiguous(), shape.key_bits)
            view.keys[:] = _pack(codes, shape.key_bits)


def read_page(page: Tensor, shape: KvShape) -> tuple[Tensor, Tensor]:
    """Page uint8 [page_bytes] to keys and values, float64 [64, kv_heads, D]; unused slots hold anything."""
    keys, values = [], []
    for block in page.view(shape.kv_heads, -1):
        view = _Block(block, shape)
        key, value = _unpack(view.keys, shape.key_bits).double().T, _unpack(view.values, shape.value_bits).double()
        if shape.key_bits < 16:
            scale, minimum = view.key_ranges.double() if shape.channels else view.key_ranges.double()[..., None]
            key = minimum + scale * key
        if shape.value_bits < 16:
            scale, minimum = view.value_ranges.double()[..., None]
            value = minimum + scale * value
        keys.append(key)
        values.append(value)
    return torch.stack(keys, 1), torch.stack(values, 1)


def attend_token(q: Tensor, keys: Tensor, values: Tensor, scaling: float, softcap: float, positions: slice) -> Tensor:
    """Query [heads, D] over keys and values float64 [T, kv_heads, D] at `positions`: float64 [heads, D]."""
    group = len(q) // keys.shape[1]
    seen_keys, seen_values = (x[positions].repeat_interleave(group, 1) for x in (keys, values))
    scores = torch.einsum("hd,thd->ht", q.double(), seen_keys) * scaling
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    return torch.einsum("ht,thd->hd", scores.softmax(-1), seen_values)


def read_table(
    pages: Tensor, table: Sequence[int], shape: KvShape, opened: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """All positions of one sequence: keys and values float64 [64 * len(table), kv_heads, D]; numbers from P on are 16-bit
    pages of `opened`."""
    count = len(pages)
    read = [
        read_page(pages[page], shape)
        if opened is None or page < count
        else read_page(opened[page - count], shape.opened)
        for page in table
    ]
    return torch.cat([keys for keys, _ in read]), torch.cat([values for _, values in read])
