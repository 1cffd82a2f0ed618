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


def _split(block: Tensor, shape: KvShape) -> tuple[Tensor, Tensor, Tensor]:
    """One kv head's block as views: keys uint8 [rows, 64 * bytes], values [rows, D * bytes], scales float16 [4, 64]."""
    keys, values, scales = block.split([shape.code_bytes, shape.code_bytes, shape.head_bytes - 2 * shape.code_bytes])
    rows = (shape.head_dim // 2, PAGE_TOKENS // 2) if shape.bits == 4 else (shape.head_dim, PAGE_TOKENS)
    return keys.view(rows[0], -1), values.view(rows[1], -1), scales.view(torch.float16).view(-1, PAGE_TOKENS)


def write_token(block: Tensor, shape: KvShape, slot: int, key: Tensor, value: Tensor) -> None:
    """Key and value float32 [D] into slot 0..63 of one kv head's block, uint8 [head_bytes]."""
    keys, values, scales = _split(block, shape)
    if shape.bits == 16:
        keys.view(torch.float16)[:, slot] = _half(key)
        values.view(torch.float16)[slot] = _half(value)
        return
    key_codes, scales[0, slot], scales[1, slot] = quantize(key, shape.bits)
    value_codes, scales[2, slot], scales[3, slot] = quantize(value, shape.bits)
    if shape.bits == 8:
        keys[:, slot], values[slot] = key_codes, value_codes
        return
    low, high = key_codes.chunk(2)
    keys[:, slot] = low | high << 4
    row = values[slot % (PAGE_TOKENS // 2)]
    row[:] = (row & 0x0F) | value_codes << 4 if slot >= PAGE_TOKENS // 2 else (row & 0xF0) | value_codes


def read_page(page: Tensor, shape: KvShape) -> tuple[Tensor, Tensor]:
    """Page uint8 [page_bytes] to keys and values, float64 [64, kv_heads, D]; unused slots hold anything."""
    keys, values = [], []
    for block in page.view(shape.kv_heads, -1):
        key, value, scales = _split(block, shape)
        if shape.bits == 16:
            keys.append(key.view(torch.float16).double().T)
            values.append(value.view(torch.float16).double())
            continue
        if shape.bits == 4:
            key, value = torch.cat([key & 15, key >> 4]), torch.cat([value & 15, value >> 4])
        s = scales.double()[..., None]
        keys.append(s[1] + s[0] * key.double().T)
        values.append(s[3] + s[2] * value.double())
    return torch.stack(keys, 1), torch.stack(values, 1)


def attend_token(q: Tensor, keys: Tensor, values: Tensor, scaling: float, softcap: float, positions: slice) -> Tensor:
    """Query [heads, D] over keys and values float64 [T, kv_heads, D] at `positions`: float64 [heads, D]."""
    group = len(q) // keys.shape[1]
    seen_keys, seen_values = (x[positions].repeat_interleave(group, 1) for x in (keys, values))
    scores = torch.einsum("hd,thd->ht", q.double(), seen_keys) * scaling
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    return torch.einsum("ht,thd->hd", scores.softmax(-1), seen_values)


def read_table(pages: Tensor, table: Sequence[int], shape: KvShape) -> tuple[Tensor, Tensor]:
    """All positions of one sequence: keys and values float64 [64 * len(table), kv_heads, D]."""
    read = [read_page(pages[page], shape) for page in table]
    return torch.cat([keys for keys, _ in read]), torch.cat([values for _, values in read])
