"""GPTQ checkpoints (AutoGPTQ, GPTQModel): codes in words along K, one width and group size for all linears.

qweight int32 [K bits / 32, N]     codes of a column of W^T, densely, from row 0 up
qzeros  int32 [G, N bits / 32]     zeros densely along N; version 1 stores zero - 1, version 2 the zero
scales  float16 [G, N]             value = scale * (code - zero)
g_idx   int32 [K]                  the group of every column
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anybit.calibration.progress import Progress
from anybit.checkpoint.partial import write_json
from anybit.errors import FormatError
from anybit.formats.decoder import Form
from anybit.integrations.exchange.account import Account
from anybit.integrations.exchange.checkpoint import Checkpoint, Layer
from anybit.integrations.exchange.directory import write_directory
from anybit.integrations.exchange.foreign import Shape, Stored, affine_layer, group_setting, setting, wanted
from anybit.integrations.exchange.packing import WORD, pack_words, unpack_words, words
from anybit.integrations.exchange.rules import check_layer, lose_cache, uniform_linears

BITS = (2, 3, 4, 8)


def write(source: Checkpoint, root: Path, account: Account, progress: Progress) -> None:
    """A GPTQ version 2 directory."""
    bits, group_size = uniform_linears(source, account)
    linears = source.linears()
    if bits not in BITS:
        raise account.refuse(f"{bits} bits (it has {', '.join(map(str, BITS))})", linears[0])
    for name in linears:
        _check(name, source.forms[name], bits, group_size, account)
    symmetric = all(source.forms[name]["terms"][0].get("symmetric", False) for name in linears)
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size or -1,
        "desc_act": False,
        "sym": symmetric,
        "lm_head": False,
        "checkpoint_format": "gptq_v2",
        "pack_dtype": "int32",
    }
    lose_cache(source, account)
    account.note("checkpoint_format gptq_v2: a reader of version 1 would take every zero one too high")
    if not symmetric:
        account.note("asymmetric: GPTQModel reads it; vLLM's CPU kernel takes symmetric GPTQ only")
    write_directory(
        source, root, dict.fromkeys(linears, lambda layer: _encode(layer, account)), config, account, progress
    )
    write_json(root / "quantize_config.json", config)


def _check(name: str, form: Form, bits: int, group_size: int, account: Account) -> None:
    check_layer(name, form, account)
    rows, columns = form["shape"]
    if group_size and columns % group_size:
        raise account.refuse(f"groups of {group_size} that do not divide {columns} columns", name)
    if rows * bits % WORD or columns * bits % WORD:
        raise account.refuse(f"a weight {rows} x {columns} of {bits} bits, whose rows do not fill whole words", name)


def _encode(layer: Layer, account: Account) -> dict[str, Tensor]:
    grid = layer.integer_grid(account).with_half_scales(account, layer.name)
    return {
        "qweight": pack_words(grid.codes, grid.bits).T.contiguous(),
        "qzeros": pack_words(grid.zero.T.contiguous().to(torch.uint8), grid.bits),
        "scales": grid.scale.half().T.contiguous(),
        "g_idx": torch.arange(grid.codes.shape[1], dtype=torch.int32) // grid.group_size,
    }


class Reader:
    """`quantization_config` of a GPTQ directory, and layers as forms and tensors of ours."""

    names = ("qweight", "qzeros", "scales", "g_idx")

    def __init__(self, config: Mapping[str, Any], account: Account) -> None:
        """Raises FormatError for settings that make no sense."""
        self._account, self._config = account, config
        self.bits = setting(config, "bits", int, among=BITS)
        found = config.get("checkpoint_format", config.get("format", "gptq"))
        if found not in ("gptq", "gptq_v2"):
            raise FormatError(f"GPTQ checkpoint_format '{found}' is not read; gptq and gptq_v2 are")
        self.offset = 0 if found == "gptq_v2" else 1
        self.format = f"GPTQ version {2 - self.offset}"

    def layer(self, name: str, shape: Shape, tensors: Mapping[str, Tensor]) -> Stored:
        """`tensors` are those of `names` that the files have. Raises FormatError for shapes that do not fit."""
        rows, columns = shape
        size = group_setting(self._config, columns)
        count = -(-columns // size)
        packed = wanted(tensors, "qweight", name, torch.int32, (words(columns, self.bits), rows))
        packed_zeros = wanted(tensors, "qzeros", name, torch.int32, (count, words(rows, self.bits)))
        scale = wanted(tensors, "scales", name, None, (count, rows))
        in_turn = torch.arange(columns) // size
        # Without g_idx they are in turn, unless the settings say otherwise: which they are is then nowhere.
        order = tensors.get("g_idx", torch.empty(0) if self._config.get("desc_act") and count > 1 else in_turn)
        if not torch.equal(order.long(), in_turn):
            raise FormatError(
                f"{name}: columns were quantized in another order (desc_act), which an anybit layer has no word for; "
                "take a checkpoint made with desc_act false"
            )
        codes = unpack_words(packed.T.contiguous(), self.bits, columns)
        zero = (unpack_words(packed_zeros, self.bits, rows).int() + self.offset) & (2**self.bits - 1)
        return affine_layer(name, (self.bits, size), codes, scale.T.float(), zero.T, self._account)
