"""From other engines' numbers to a layer of ours, with every check that their bytes need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from anybit.errors import FormatError
from anybit.formats.affine import Affine
from anybit.formats.decoder import Form, per_column
from anybit.formats.terms import CodeTerm, save_terms
from anybit.integrations.exchange.account import Account

Shape = tuple[int, int]
Stored = tuple[Form, dict[str, Tensor]]
"""A layer as `save_terms` writes it."""
Value = TypeVar("Value", int, str, bool)


def setting(config: Mapping[str, Any], key: str, kind: type[Value], among: Sequence[Value] = ()) -> Value:
    """`config[key]`. Raises FormatError when it is missing, of another type or not `among` those that are read."""
    found = config.get(key)
    if type(found) is not kind or (among and found not in among):
        choices = f" among {', '.join(map(str, among[:8]))}" if among else ""
        raise FormatError(f"quantization_config.{key} is {found!r}; need {kind.__name__}{choices}")
    return found


def check_blocks(count: Any, tensors: int) -> None:
    """Raise FormatError for a number of blocks that cannot be: each has a tensor, and a model is built block by block."""
    if type(count) is not int or not 0 < count <= tensors:
        raise FormatError(
            f"its configuration says {count!r} blocks, its files hold {tensors} tensors; download it again"
        )


def group_setting(config: Mapping[str, Any], columns: int) -> int:
    """`group_size` of GPTQ and AWQ for rows of `columns`; -1, 0 and more than a row stand for a row. Raises FormatError
    for less."""
    found = setting(config, "group_size", int)
    if found < -1:
        raise FormatError(f"quantization_config.group_size is {found}; need -1 or a number of columns")
    return min(found, columns) if found > 0 else columns


def wanted(
    tensors: Mapping[str, Tensor], key: str, layer: str, dtype: torch.dtype | None, shape: tuple[int, ...]
) -> Tensor:
    """`tensors[key]`; `dtype` None: any float. Raises FormatError when it is missing, of another shape or dtype, not finite."""
    if key not in tensors:
        raise FormatError(f"{layer}.{key} is in no file; the checkpoint is incomplete, download it again")
    found = tensors[key]
    fits = found.is_floating_point() if dtype is None else found.dtype == dtype
    if not fits or tuple(found.shape) != shape:
        kind = "float" if dtype is None else str(dtype).removeprefix("torch.")
        raise FormatError(f"{layer}.{key} is {found.dtype} {list(found.shape)}, config.json wants {kind} {list(shape)}")
    if found.is_floating_point() and not bool(torch.isfinite(found.float()).all()):
        raise FormatError(f"{layer}.{key} holds NaN or infinity; the checkpoint is damaged, download it again")
    return found


def affine_layer(
    name: str, sizes: tuple[int, int], codes: Tensor, scale: Tensor, zero: Tensor, account: Account
) -> Stored:
    """value = scale * (code - zero) with `sizes` (bits, columns of a group), codes uint8 [N, K], scale float32 and zero int
    [N, G]. The values stay what they are:

    A negative scale is turned with its codes, c to 2^b - 1 - c. A scale of 0 becomes 1 with codes at the zero.

    Raises:
        FormatError: a code or zero that is not 0..2^b - 1. InputError: scales that float16 rounds, and no loss is allowed.
    """
    bits, size = sizes
    columns, top = codes.shape[1], 2**bits - 1
    if int(codes.max()) > top or int(zero.min()) < 0 or int(zero.max()) > top:
        raise FormatError(f"{name} holds codes or zero points that do not fit {bits} bits")
    negative, empty = scale < 0, scale == 0
    zero = torch.where(negative, top - zero, zero)
    codes = torch.where(per_column(negative, columns, size), top - codes, codes)
    codes = torch.where(per_column(empty, columns, size), per_column(zero, columns, size).to(torch.uint8), codes)
    half = half_scale(name, torch.where(empty, 1.0, scale.abs()), account)
    stored = None if bool((zero == 2 ** (bits - 1)).all()) else zero.to(torch.uint8).contiguous()
    term = CodeTerm.from_codes(codes.contiguous(), Affine(bits, size, half, stored))
    return save_terms([term], (codes.shape[0], columns))


def half_scale(name: str, scale: Tensor, account: Account) -> Tensor:
    """Positive float32 scales in float16; a loss where that rounds."""
    half = scale.half()
    if not torch.equal(half.float(), scale):
        account.lose("scales of more bits than float16; they are rounded", name)
        half = scale.clamp(2.0**-24, 65504).half()
    return half.contiguous()
