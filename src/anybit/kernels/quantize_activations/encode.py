"""Activations by any integer scheme (`formats/activation.py`), as the integer kernels read them.

`native` knows `IntActivations` and agrees with its `encode` bit for bit; other schemes run as their format says. A token's
result depends on its row alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from anybit.errors import FormatError, KernelUnavailable
from anybit.formats.activation import ActivationSpec, IntActivations
from anybit.formats.decoder import by_group, groups
from anybit.kernels import native
from anybit.kernels.quantize_activations import reference


@dataclass(frozen=True)
class Encoded:
    """Activations [T, K].

    Attributes:
        codes: int8 [T, stride(K)], zeros beyond K.
        scale: float32 [T, G], G = ceil(K / group_size); groups of the kernel, which the scheme's are made of.
        sums: float32 [T, G], exact sums of a group's codes.
        side: float32 [T, W]: the offsets of the scheme's groups, unless it is symmetric, then x in the columns that bypass.
    """

    codes: Tensor
    scale: Tensor
    sums: Tensor
    side: Tensor


def encode(
    x: Tensor,
    spec: ActivationSpec,
    group_size: int,
    tensors: Mapping[str, Tensor] | None = None,
    bypass: Tensor | None = None,
    impl: str | None = None,
) -> Encoded:
    """x float32 [T, K] by `spec`, whose groups are whole groups of `group_size` (a multiple of 32) or the row.

    Args:
        x: rows.
        spec: the scheme.
        group_size: columns per scale of the kernel.
        tensors: static scales, those of `spec.specs(K)`.
        bypass: int [n], ascending, the columns left out.
        impl: force `native` or `reference`.

    Raises:
        FormatError: x is not float32 [T, K], or groups that do not nest. KernelUnavailable: native was forced and cannot run.
    """
    columns = x.shape[-1]
    reach = spec.columns_per_group(columns)
    if x.dtype != torch.float32 or x.ndim != 2:
        raise FormatError(f"activations must be float32 [T, K], got {x.dtype} {tuple(x.shape)}")
    if group_size < columns and (group_size % 32 or (reach < columns and reach % group_size)):
        raise FormatError(f"groups of {reach} activations are not whole groups of {group_size}, a multiple of 32")
    reason = native.refusal(x) if isinstance(spec, IntActivations) else f"it does not know '{spec.kind}' activations"
    if impl == "native" and reason:
        raise KernelUnavailable(f"quantize_activations 'native' cannot run: {reason}")
    if impl == "reference" or not isinstance(spec, IntActivations) or reason:
        return _reference(x, spec, group_size, tensors or {}, bypass)
    x, tokens = x.contiguous(), len(x)
    table = (tokens, groups(columns, group_size))
    offsets = 0 if spec.symmetric else groups(columns, reach)
    out = Encoded(
        torch.empty(tokens, reference.stride(columns), dtype=torch.int8),
        torch.empty(table),
        torch.empty(table),
        torch.empty(tokens, offsets + (0 if bypass is None else len(bypass))),
    )
    known = {name: (tensors or {})[name].float().contiguous() for name in spec.specs(columns)}
    fixed = [known.get(name) for name in ("input_scale", "input_offset")]
    index = None if bypass is None else bypass.to(torch.int32).contiguous()
    native.loaded().encode_rows(
        *(x.data_ptr(), out.codes.data_ptr(), out.scale.data_ptr(), out.sums.data_ptr(), out.side.data_ptr()),
        *(tokens, columns, group_size, facts(spec, columns)),
        *(0 if tensor is None else tensor.data_ptr() for tensor in (*fixed, index)),
        0 if index is None else len(index),
    )
    return out


def facts(spec: IntActivations, columns: int) -> tuple[int, bool, bool, float, int]:
    """The scheme as the native module takes it."""
    return spec.bits, spec.symmetric, spec.rounded_zero, spec.clip, spec.columns_per_group(columns)


def _reference(
    x: Tensor, spec: ActivationSpec, group_size: int, tensors: Mapping[str, Tensor], bypass: Tensor | None
) -> Encoded:
    found = spec.encode(x, tensors, bypass)
    side = [] if found.offset is None else [found.offset]
    side += [] if bypass is None else [x[:, bypass.long()]]
    empty = torch.empty(len(x), 0)
    return Encoded(*laid_out(found.codes, found.scale, found.group_size, group_size), torch.cat([empty, *side], 1))


def laid_out(codes: Tensor, scale: Tensor, reach: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int8 [T, K] with one scale for `reach` columns as the kernels read them: codes, scale and sums of `Encoded`."""
    columns = codes.shape[1]
    size = min(group_size, columns)
    scale = scale.repeat_interleave(-(-reach // size), 1)[:, : groups(columns, size)]
    padded = torch.zeros(len(codes), reference.stride(columns), dtype=torch.int8)
    padded[:, :columns] = codes
    return padded, scale.contiguous(), by_group(codes.float(), size).sum(-1)
