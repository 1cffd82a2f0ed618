"""Rows of an affine bit-plane table [V, H] as float32, times a multiplier; only the asked rows are decoded.

out[t, k] = scale[id, g] * (code[id, k] - zero[id, g]) * multiplier with id = ids[t], g = k // group_size. `native` and
`reference` agree bit for bit, on every instruction set.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anybit.errors import FormatError, InputError, KernelUnavailable
from anybit.kernels import native
from anybit.kernels.embedding import reference
from anybit.kernels.linear_w_a16.op import check_weight

IMPLEMENTATIONS = ("native", "reference")


def embed(
    ids: Tensor,
    planes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group_size: int,
    columns: int,
    multiplier: float = 1.0,
    impl: str | None = None,
) -> Tensor:
    """ids int64 [T] to float32 [T, H].

    Args:
        ids: rows, each in 0..V-1.
        planes: uint8 [b, V, ceil(H/8)], most significant first; padding bits are ignored.
        scale: float16 [V, G], G = ceil(H / group_size).
        zero: uint8 [V, G], or None: 2^(b-1).
        group_size: columns per scale, 1..H.
        columns: H.
        multiplier: a float32 number (Gemma: sqrt(H)).
        impl: force `native` or `reference`.

    Raises:
        FormatError: shapes or dtypes that do not fit together.
        InputError: an id outside the table.
        KernelUnavailable: the forced `impl` cannot run here.
    """
    run = embed_op if torch.compiler.is_compiling() else _embed
    return run(ids, planes, scale, zero, group_size, columns, multiplier, impl)


def _embed(
    ids: Tensor,
    planes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group_size: int,
    columns: int,
    multiplier: float = 1.0,
    impl: str | None = None,
) -> Tensor:
    check_weight(planes, scale, zero, group_size, columns)
    _check_ids(ids, planes.shape[1])
    if _choose(impl, ids, planes, scale, zero) == "reference":
        return reference.embed(ids, planes, scale, zero, group_size, columns, multiplier)
    ids, planes, scale = ids.contiguous(), planes.contiguous(), scale.contiguous()
    zero = None if zero is None else zero.contiguous()
    out = torch.empty(len(ids), columns)
    addresses = (planes.data_ptr(), scale.data_ptr(), 0 if zero is None else zero.data_ptr(), ids.data_ptr())
    sizes = (len(ids), *planes.shape[:2], columns, group_size)
    native.loaded().embed_rows(*addresses, out.data_ptr(), multiplier, *sizes)
    return out


def _check_ids(ids: Tensor, rows: int) -> None:
    if ids.dtype != torch.int64 or ids.ndim != 1:
        raise FormatError(f"ids must be int64 [T], got {ids.dtype} {tuple(ids.shape)}")
    if len(ids):
        low, high = (int(end) for end in ids.aminmax())
        if low < 0 or high >= rows:
            raise InputError(f"id {low if low < 0 else high} is not in a table of {rows} rows (0 to {rows - 1})")


def _choose(impl: str | None, *tensors: Tensor | None) -> str:
    if impl not in (None, *IMPLEMENTATIONS):
        raise KernelUnavailable(f"embedding has no implementation '{impl}'; known: {', '.join(IMPLEMENTATIONS)}")
    reason = native.refusal(*tensors)
    if impl == "native" and reason:
        raise KernelUnavailable(f"embedding 'native' cannot run: {reason}")
    return impl or ("reference" if reason else "native")


embed_op = torch.library.custom_op("anybit::embedding", _embed, mutates_args=())


@embed_op.register_fake
def _(
    ids: Tensor,
    planes: Tensor,  # noqa: ARG001 (the names are the schema's)
    scale: Tensor,
    zero: Tensor | None,  # noqa: ARG001
    group_size: int,  # noqa: ARG001
    columns: int,
    multiplier: float = 1.0,  # noqa: ARG001
    impl: str | None = None,  # noqa: ARG001
) -> Tensor:
    return scale.new_empty(ids.shape[0], columns, dtype=torch.float32)
