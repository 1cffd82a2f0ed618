"""AWQ checkpoints, version "gemm": 4 bits, eight columns of W^T to a word, interleaved.

qweight int32 [K, N / 8]     nibble p of a word holds output 8 w + ORDER[p]
qzeros  int32 [G, N / 8]     the same for zeros
scales  float16 [G, N]       value = scale * (code - zero)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anybit.calibration.progress import Progress
from anybit.errors import FormatError
from anybit.integrations.exchange.account import Account
from anybit.integrations.exchange.checkpoint import Checkpoint, Layer
from anybit.integrations.exchange.directory import write_directory
from anybit.integrations.exchange.foreign import Shape, Stored, affine_layer, group_setting, setting, wanted
from anybit.integrations.exchange.packing import pack_words, unpack_words
from anybit.integrations.exchange.rules import check_layer, lose_cache, uniform_linears

BITS = 4
NIBBLES = 8
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def write(source: Checkpoint, root: Path, account: Account, progress: Progress) -> None:
    """An AWQ directory."""
    bits, group_size = uniform_linears(source, account)
    linears = source.linears()
    if bits != BITS:
        raise account.refuse(f"{bits} bits (it has {BITS})", linears[0])
    for name in linears:
        check_layer(name, source.forms[name], account)
        rows, columns = source.forms[name]["shape"]
        if rows % NIBBLES or (group_size and columns % group_size):
            raise account.refuse(f"a weight {rows} x {columns} in groups of {group_size}: they must fill words", name)
    lose_cache(source, account)
    config = {
        "quant_method": "awq",
        "bits": BITS,
        "group_size": group_size or -1,
        "zero_point": True,
        "version": "gemm",
    }
    encoders = dict.fromkeys(linears, lambda layer: _encode(layer, account))
    write_directory(source, root, encoders, config, account, progress)


def _encode(layer: Layer, account: Account) -> dict[str, Tensor]:
    grid = layer.integer_grid(account).with_half_scales(account, layer.name)
    return {
        "qweight": _pack(grid.codes.T),
        "qzeros": _pack(grid.zero.T.to(torch.uint8)),
        "scales": grid.scale.half().T.contiguous(),
    }


def _pack(table: Tensor) -> Tensor:
    """uint8 [R, N] to int32 [R, N / 8]."""
    return pack_words(table.reshape(len(table), -1, NIBBLES)[:, :, list(ORDER)].reshape(len(table), -1), BITS)


def _unpack(packed: Tensor, rows: int) -> Tensor:
    """int32 [R, N / 8] to uint8 [R, N]."""
    places = [ORDER.index(column) for column in range(NIBBLES)]
    nibbles = unpack_words(packed, BITS, rows)
    return nibbles.reshape(len(packed), -1, NIBBLES)[:, :, places].reshape(len(packed), -1)


class Reader:
    """`quantization_config` of an AWQ directory, and layers as forms and tensors of ours."""

    names = ("qweight", "qzeros", "scales")
    format = "AWQ gemm"

    def __init__(self, config: Mapping[str, Any], account: Account) -> None:
        """Raises FormatError for settings that make no sense."""
        self._account, self._config = account, config
        setting(config, "bits", int, among=(BITS,))
        version = str(config.get("version", "gemm")).lower()
        if version != "gemm":
            raise FormatError(f"AWQ version '{version}' is not read; gemm is")

    def layer(self, name: str, shape: Shape, tensors: Mapping[str, Tensor]) -> Stored:
        """`tensors` are those of `names` that the files have. Raises FormatError for shapes that do not fit."""
        rows, columns = shape
        size = group_setting(self._config, columns)
        count = -(-columns // size)
        if rows % NIBBLES:
            raise FormatError(f"{name}: AWQ cannot hold {rows} outputs, eight share a word")
        packed = wanted(tensors, "qweight", name, torch.int32, (columns, rows // NIBBLES))
        scale = wanted(tensors, "scales", name, None, (count, rows))
        zero = torch.full((count, rows), 2 ** (BITS - 1))
        if "qzeros" in tensors:
            zero = _unpack(wanted(tensors, "qzeros", name, torch.int32, (count, rows // NIBBLES)), rows).int()
        return affine_layer(name, (BITS, size), _unpack(packed, rows).T, scale.T.float(), zero.T, self._account)
