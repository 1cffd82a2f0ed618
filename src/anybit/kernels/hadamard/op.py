"""Walsh-Hadamard transform over the last axis, in place: mixes columns so that outliers spread (QuaRot, SpinQuant).

A block of `block` = 2^m neighbouring values becomes H x / sqrt(block), H[i, j] = (-1)^(number of common one bits of i and
j) (Sylvester). H / sqrt(block) is symmetric and orthogonal, so the transform is its own inverse.

`hadamard_` takes powers of two: n = 2^m is the full transform, for any other n = 2^m q, q odd (576 = 64 * 9), it is the
*block-Hadamard* transform: n / 2^m blocks, not mixed with one another. `hadamard` takes any order m 2^k with m of
`orders.py`, such as 576 = 36 * 16; natively the decoder's own function, so both give the same bits.

`native` gives the same bits on every instruction set, and is within float32 rounding of `reference` (float64).
"""

from __future__ import annotations

import torch
from torch import Tensor

from anybit.errors import FormatError, KernelUnavailable
from anybit.kernels import native
from anybit.kernels.hadamard import reference
from anybit.kernels.hadamard.matrices import matrix
from anybit.kernels.hadamard.orders import Sizes, known, order

IMPLEMENTATIONS = ("native", "reference")


def largest_block(columns: int) -> int:
    """The largest power of two that divides `columns`: the whole row where that is one."""
    return columns & -columns


def hadamard_(x: Tensor, block: int | None = None, impl: str | None = None) -> Tensor:
    """Transform x float32 [..., n], contiguous, in place, and return it. Not differentiable.

    Args:
        x: its last axis is cut into blocks.
        block: a power of two that divides n; default the largest one.
        impl: force `native` or `reference`.

    Raises:
        FormatError: x is not contiguous float32, or block does not divide n or is no power of two.
        KernelUnavailable: the forced `impl` cannot run here.
    """
    block = largest_block(x.shape[-1]) if block is None else block
    (hadamard_op if torch.compiler.is_compiling() else _hadamard)(x, block, impl)
    return x


def hadamard(x: Tensor, sizes: Sizes, impl: str | None = None) -> Tensor:
    """x float [..., K] times the orthogonal matrix of order n = m 2^k, H_m (x) H_2^k over sqrt(n), in blocks of n columns.

    Computed in float32, given in the dtype of x. Differentiable.

    Args:
        x: any float dtype and strides.
        sizes: (m, 2^k) with m 2^k a divisor of K; `orders.sizes_for(K)` picks them.
        impl: as for `hadamard_`.

    Raises:
        FormatError: sizes that do not fit K, or no Hadamard matrix of order m. KernelUnavailable: as for `hadamard_`.
    """
    m, block = sizes
    if m < 1 or not known(m) or block < 1 or block & (block - 1) or x.shape[-1] % (m * block):
        raise FormatError(f"no Hadamard transform of sizes {m} x {block} for {x.shape[-1]} columns")
    if x.requires_grad:
        return reference.factored(x.float(), sizes).to(x.dtype)
    y = x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if m > 1 and not torch.compiler.is_compiling() and _choose(impl, y) == "native":
        rows = y.numel() // y.shape[-1]
        native.loaded().rotate_rows(y.data_ptr(), rows, y.shape[-1], matrix(m).ctypes.data, m, block)
        return y.to(x.dtype)
    y = hadamard_(y, block, impl)
    if m > 1:
        mixing = (order(m) / m**0.5).to(y)
        y = (mixing.T @ y.view(*x.shape[:-1], -1, m, block)).view(x.shape)
    return y.to(x.dtype)


def _hadamard(x: Tensor, block: int, impl: str | None = None) -> None:
    columns = x.shape[-1]
    if x.dtype != torch.float32 or not x.is_contiguous() or not columns:
        raise FormatError(f"x must be contiguous float32 [..., n] with n > 0, got {x.dtype} {tuple(x.shape)}")
    if block < 1 or block & (block - 1) or columns % block:
        raise FormatError(f"block must be a power of two that divides {columns}, got {block}")
    if _choose(impl, x) == "reference":
        x.copy_(reference.transform(x, block))
    else:
        native.loaded().hadamard_rows(x.data_ptr(), x.numel() // columns, columns, block)


def _choose(impl: str | None, x: Tensor) -> str:
    if impl not in (None, *IMPLEMENTATIONS):
        raise KernelUnavailable(f"hadamard has no implementation '{impl}'; known: {', '.join(IMPLEMENTATIONS)}")
    reason = native.refusal(x)
    if impl == "native" and reason:
        raise KernelUnavailable(f"hadamard 'native' cannot run: {reason}")
    return impl or ("reference" if reason else "native")


hadamard_op = torch.library.custom_op("anybit::hadamard_", _hadamard, mutates_args=("x",))


@hadamard_op.register_fake
def _(x: Tensor, block: int, impl: str | None = None) -> None:  # noqa: ARG001 (the names are the schema's)
    return None
