"""Weight-only linear on a GPU: y = x W^T at the precision that a device integer says; NOTES.md has versions and numbers.

    skinny  up to 8 tokens: a block of rows is decoded once and multiplied with every token, sums in float32
    gemm    more tokens: blocks of the weight are decoded to bfloat16 and go to the matrix units, sums in float32

Runs on the CPU too, in Triton's interpreter (TRITON_INTERPRET=1 before the first import): so tests prove it without a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from anybit.errors import FormatError
from anybit.kernels.linear_w_a16.gpu_weight import GpuWeight

SKINNY_TOKENS = 8
KINDS = {"affine": 0, "binary_coded": 1, "codebook": 2}
AFFINE, BINARY_CODED = tl.constexpr(0), tl.constexpr(1)


@triton.jit
def _plane(planes, j, n, byte, N, KB, mask, BN: tl.constexpr, BK: tl.constexpr):
    """Bits int32 [BN, BK] of plane j: rows n, eight columns of every byte, first column lowest."""
    found = tl.load(planes + (j * N + n)[:, None].to(tl.int64) * KB + byte[None, :], mask=mask, other=0).to(tl.int32)
    return tl.reshape((found[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1, (BN, BK))


@triton.jit
def _values(
    planes, first, second, starts, factors, bits, n, start, N, K, KB, G, group,
    KIND: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The weight float32 [BN, BK] of rows n and columns start .. start + BK - 1; 0 outside."""
    byte = start // 8 + tl.arange(0, BK // 8)
    k = start + tl.arange(0, BK)
    inside = (n < N)[:, None] & (k < K)[None, :]
    mask = (n < N)[:, None] & (byte < KB)[None, :]
    table, other = tl.load(starts + 2 * bits), tl.load(starts + 2 * bits + 1)
    at = n[:, None].to(tl.int64) * G + (k // group)[None, :]
    if KIND == BINARY_CODED:
        values = tl.zeros((BN, BK), tl.float32)
        if other >= 0:
            values += tl.load(second + other + at, mask=inside, other=0.0).to(tl.float32)
        for j in range(bits):
            sign = (2 * _plane(planes, j, n, byte, N, KB, mask, BN, BK) - 1).to(tl.float32)
            values += sign * tl.load(first + table + at * bits + j, mask=inside, other=0.0).to(tl.float32)
    else:
        codes = tl.zeros((BN, BK), tl.int32)
        for j in range(bits):
            codes = 2 * codes + _plane(planes, j, n, byte, N, KB, mask, BN, BK)
        if KIND == AFFINE:
            zero = tl.zeros((BN, BK), tl.float32)
            if other >= 0:
                zero += tl.load(second + other + at, mask=inside, other=0).to(tl.float32)
            zero = tl.load(factors + 3 * bits + 1) * zero + tl.load(factors + 3 * bits + 2)
            scale = tl.load(factors + 3 * bits) * tl.load(first + table + at, mask=inside, other=0.0).to(tl.float32)
            values = scale * (codes.to(tl.float32) - zero)
        else:
            entry = first + table + (n[:, None].to(tl.int64) << bits.to(tl.int64)) + codes
            values = tl.load(entry, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, values, 0.0)


@triton.jit
def _skinny(
    x, y, cell, planes, first, second, starts, factors, N, K, KB, G, group, T,
    KIND: tl.constexpr, M: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    bits = tl.load(cell)
    n, t = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, M)
    total = tl.zeros((M, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        values = _values(
            planes, first, second, starts, factors, bits, n, start, N, K, KB, G, group, KIND, BN, BK
        )  # fmt: skip
        mask = (t < T)[:, None] & (k < K)[None, :]
        tokens = tl.load(x + t[:, None] * K + k[None, :], mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(values[None, :, :] * tokens[:, None, :], axis=2)
    tl.store(y + t[:, None] * N + n[None, :], total, mask=(t < T)[:, None] & (n < N)[None, :])


@triton.jit
def _gemm(
    x, y, cell, planes, first, second, starts, factors, N, K, KB, G, group, T,
    KIND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    bits = tl.load(cell)
    n, t = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1) * BM + tl.arange(0, BM)
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        values = _values(
            planes, first, second, starts, factors, bits, n, start, N, K, KB, G, group, KIND, BN, BK
        )  # fmt: skip
        mask = (t < T)[:, None] & (k < K)[None, :]
        tokens = tl.load(x + t[:, None].to(tl.int64) * K + k[None, :], mask=mask, other=0.0).to(tl.bfloat16)
        halves = tl.trans(values.to(tl.bfloat16))
        if UNITS:
            total = tl.dot(tokens, halves, total)
        else:  # the interpreter multiplies the bits of bfloat16 as if they were integers
            total = tl.dot(tokens.to(tl.float32), halves.to(tl.float32), total)
    tl.store(y + t[:, None].to(tl.int64) * N + n[None, :], total, mask=(t < T)[:, None] & (n < N)[None, :])


def linear(x: Tensor, weight: GpuWeight, cell: Tensor) -> Tensor:
    """x float [..., K] @ W^T as float32 [..., N].

    Args:
        x: contiguous, on the weight's device.
        weight: with every width it may be asked for.
        cell: int32 [1] on the same device, the width to read; the caller has checked it against `weight.precisions`.

    Raises:
        FormatError: another number of columns, or tensors of different devices.
    """
    if x.shape[-1] != weight.columns:
        raise FormatError(f"x has {x.shape[-1]} columns, the weight has {weight.columns}")
    if len({x.device, weight.planes.device, cell.device}) > 1:
        raise FormatError(f"x is on {x.device}, the weight on {weight.planes.device}, the precision on {cell.device}")
    tokens = x.numel() // max(weight.columns, 1)
    y = torch.empty(*x.shape[:-1], weight.rows, dtype=torch.float32, device=x.device)
    if not y.numel():
        return y
    count = -(-weight.columns // weight.group_size)
    tensors = (x.contiguous(), y, cell, weight.planes, weight.first, weight.second, weight.starts, weight.factors)
    sizes = (weight.rows, weight.columns, weight.planes.shape[2], count, weight.group_size, tokens)
    kind = KINDS[weight.kind]
    if tokens <= SKINNY_TOKENS:
        _skinny[(triton.cdiv(weight.rows, 16),)](
            *tensors, *sizes, KIND=kind, M=triton.next_power_of_2(tokens), BN=16, BK=256
        )
    else:
        blocks = (triton.cdiv(weight.rows, 64), triton.cdiv(tokens, 64))
        _gemm[blocks](*tensors, *sizes, KIND=kind, BM=64, BN=64, BK=64, UNITS=x.is_cuda)
    return y
