"""Layers kept in float: y = x W^T with bfloat16 weights; also the float baseline of benchmarks.

    native-vector  up to 4 tokens: weights are streamed once, float32 sums
    torch          more tokens: bfloat16 x is multiplied as it is (oneDNN); float32 x by blocks of W made float32
    reference      all of W made float32

x keeps its precision in all of them: a float32 x is never rounded to bfloat16. Sums are float32. y has the dtype of x.
For `native-vector`, y[t] depends on x[t] alone, bit for bit: not on the other tokens, not on the number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anybit.errors import FormatError, KernelUnavailable
from anybit.kernels import native
from anybit.kernels.linear_bf16 import reference

VECTOR_TOKENS = 4
BLOCK_FLOATS = 1 << 20  # weights made float32 at a time: 4 MiB


def linear(x: Tensor, weight: Tensor, impl: str | None = None) -> Tensor:
    """x [..., K] float32 or bfloat16, weight bfloat16 [N, K] -> [..., N] in the dtype of x. Not differentiable.

    Raises:
        FormatError: shapes or dtypes that do not fit together.
        KernelUnavailable: the forced `impl` cannot run here.
    """
    return (linear_op if torch.compiler.is_compiling() else _linear)(x, weight, impl)


def _linear(x: Tensor, weight: Tensor, impl: str | None = None) -> Tensor:
    if weight.ndim != 2 or weight.dtype != torch.bfloat16 or x.shape[-1:] != weight.shape[1:]:
        raise FormatError(
            f"weight must be bfloat16 [N, K] and x [..., K], got {weight.dtype} {tuple(weight.shape)} and {tuple(x.shape)}"
        )
    if x.dtype not in (torch.float32, torch.bfloat16):
        raise FormatError(f"x must be float32 or bfloat16, got {x.dtype}")
    rows = x.detach().reshape(-1, x.shape[-1])
    y = IMPLEMENTATIONS[_pick(impl, len(rows), native.refusal(x, weight))](rows, weight.detach())
    return y.to(x.dtype).view(*x.shape[:-1], weight.shape[0])


def _pick(impl: str | None, tokens: int, reason: str) -> str:
    if impl not in (None, *IMPLEMENTATIONS):
        raise KernelUnavailable(f"linear_bf16 has no implementation '{impl}'; known: {', '.join(IMPLEMENTATIONS)}")
    if impl == "native-vector" and reason:
        raise KernelUnavailable(f"linear_bf16 'native-vector' cannot run: {reason}")
    return impl or ("torch" if reason or tokens > VECTOR_TOKENS else "native-vector")


def _vector(x: Tensor, weight: Tensor) -> Tensor:
    x, weight = x.float().contiguous(), weight.contiguous()
    y = torch.empty(x.shape[0], weight.shape[0])
    native.loaded().linear_bf16(x=x.data_ptr(), weight=weight.data_ptr(), y=y.data_ptr(), **_sizes(x, weight))
    return y


def _sizes(x: Tensor, weight: Tensor) -> dict[str, int]:
    return {"tokens": x.shape[0], "rows": weight.shape[0], "columns": weight.shape[1]}


def _torch(x: Tensor, weight: Tensor) -> Tensor:
    if x.dtype == torch.bfloat16:
        return torch.nn.functional.linear(x, weight)
    block = max(1, BLOCK_FLOATS // max(weight.shape[1], 1))
    return torch.cat([torch.nn.functional.linear(x, part.float()) for part in weight.split(block)], 1)


IMPLEMENTATIONS = {"native-vector": _vector, "torch": _torch, "reference": reference.linear}

linear_op = torch.library.custom_op("anybit::linear_bf16", _linear, mutates_args=())


@linear_op.register_fake
def _(x: Tensor, weight: Tensor, impl: str | None = None) -> Tensor:  # noqa: ARG001 (the names are the schema's)
    return x.new_empty(*x.shape[:-1], weight.shape[0])
