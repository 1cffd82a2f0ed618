"""Linear for many tokens: bit-plane weights times bfloat16 activations in the processor's matrix unit.

Weights are the tiles of `linear_w_a8`, decoded to bfloat16 on the way (one rounding); sums are float32. Scales are inside
the weights, so that nothing leaves the unit before a row is done: at 32 columns per scale this is several times faster
than exact integers, and it is what reading a prompt uses where there is such a unit. y[t] depends on x[t] alone, bit for
bit, so a prompt may be read in pieces of any length.

    native     AMX with bfloat16
    reference  anything else, in PyTorch
"""

from __future__ import annotations

import torch
from torch import Tensor

from anybit.errors import FormatError, KernelUnavailable
from anybit.kernels import native
from anybit.kernels.linear_w_a8.op import Tiled
from anybit.kernels.linear_w_bf16 import reference

IMPLEMENTATIONS = ("native", "reference")


def refusal() -> str:
    """Why `native` cannot run here; empty when it can."""
    if reason := native.refusal():
        return reason
    runs = native.loaded().linear_w_bf16_runs()
    return "" if runs else f"instruction set '{native.isa()}' has no bfloat16 matrix unit (AMX)"


def linear(x: Tensor, w: Tiled, impl: str | None = None) -> Tensor:
    """x float32 or bfloat16 [T, K] @ W^T: [T, N] in the dtype of x; x and the decoded weights are rounded to bfloat16.

    Raises:
        FormatError: x is neither, or w is 2:4 sparse. KernelUnavailable: the forced `impl` cannot run here.
    """
    if x.dtype not in (torch.float32, torch.bfloat16) or x.ndim != 2 or x.shape[1] != w.columns:
        raise FormatError(f"x must be float32 or bfloat16 [T, {w.columns}], got {x.dtype} {tuple(x.shape)}")
    if impl not in (None, *IMPLEMENTATIONS):
        raise KernelUnavailable(f"linear_w_bf16 has no implementation '{impl}'; known: {', '.join(IMPLEMENTATIONS)}")
    if w.mask is not None:
        raise FormatError("linear_w_bf16 reads dense tiles, not those of a 2:4-sparse weight")
    reason = refusal()
    if impl == "native" and reason:
        raise KernelUnavailable(f"linear_w_bf16 'native' cannot run: {reason}")
    if reason or impl == "reference":
        return reference.linear(x.float(), w).to(x.dtype)
    return _native(x.contiguous(), w)


def _native(x: Tensor, w: Tiled) -> Tensor:
    y = torch.empty(len(x), w.rows, dtype=x.dtype)
    zero = 0 if w.zero is None else w.zero.data_ptr()
    weight = (w.planes.data_ptr(), w.scale.data_ptr(), zero, w.sizes, w.factors)
    native.loaded().linear_w_bf16(x.data_ptr(), len(x), x.dtype == torch.bfloat16, *weight, y.data_ptr())
    return y
