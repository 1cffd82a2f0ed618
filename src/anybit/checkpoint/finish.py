"""Shards as they are made, and the files that make a finished directory out of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from anybit.checkpoint.layout import INDEX, quantization_config, shard_name
from anybit.checkpoint.ledger import Ledger, Row, check_numbers, tensor_sha256
from anybit.checkpoint.partial import Partial, write_json
from anybit.errors import PromiseError
from anybit.formats.decoder import Form
from anybit.formats.kv import KVSpec

# What a tokenizer and a chat need, copied as they are; weights and code are not.
COMPANIONS = [
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.jinja",
    "generation_config.json",
]


def copy_companions(source: Path, target: Path) -> None:
    """The files of `COMPANIONS` that directory `source` has, into directory `target`."""
    for pattern in COMPANIONS:
        for file in sorted(file for file in source.glob(pattern) if file.is_file()):
            shutil.copyfile(file, target / file.name)


def float_tensors(module: nn.Module, prefix: str, quantized: set[str], dtype: torch.dtype) -> dict[str, Tensor]:
    """Every parameter of `module` at `prefix` that is not a quantized weight, by full name, in `dtype`."""
    named = {f"{prefix}.{name}": p for name, p in module.named_parameters()}
    kept = {name: p.data.to(dtype) for name, p in named.items() if _stays_float(name, quantized)}
    for name, tensor in kept.items():
        check_numbers(name, {"value": tensor})
    return kept


def finish_directory(
    partial: Partial,
    source: Path,
    shards: int,
    ledger: Mapping[str, Any],
    forms: Mapping[str, Form],
    rows: Sequence[Row],
    changes: Mapping[str, Any] | None = None,
    kv: KVSpec | None = None,
) -> Ledger:
    """Index, ledger, config (the source's with `changes`) and tokenizer files; then the rename that makes the checkpoint exist.

    Raises:
        PromiseError: a tensor that was planned is not in the shards, the other way round, or the size is another.
    """
    root = partial.root
    planned = {row.name for row in rows}
    if planned != forms.keys():
        odd = sorted(planned ^ forms.keys())[0]
        raise PromiseError(f"'{odd}' was planned and not written, or written and not planned")
    weight_map, kept, size = _read_back(root, shards, planned)
    if size != ledger["size_bytes"]:
        raise PromiseError(f"{ledger['size_bytes']} bytes of tensors were planned and {size} written")
    complete = Ledger(tensors=list(rows), float_tensors=kept, **ledger)
    write_json(root / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))})
    complete.write(root)
    copy_companions(source, root)
    config = json.loads((source / "config.json").read_text()) | dict(changes or {})
    config["quantization_config"] = quantization_config(complete.recipe, dict(forms), kv.as_dict() if kv else None)
    write_json(root / "config.json", config)
    partial.finish()
    return complete


def _read_back(root: Path, count: int, planned: set[str]) -> tuple[dict[str, str], dict[str, str], int]:
    """From the shards as they are on disk: tensor -> file, float tensor -> sha256, and total bytes."""
    weight_map: dict[str, str] = {}
    kept: dict[str, str] = {}
    size = 0
    for number in range(1, count + 1):
        file = shard_name(number, count)
        with safe_open(root / file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (not a dict)
                tensor = shard.get_tensor(name)
                weight_map[name] = file
                size += tensor.numel() * tensor.element_size()
                if _stays_float(name, planned):
                    kept[name] = tensor_sha256(tensor)
    return weight_map, kept, size


def _stays_float(name: str, quantized: set[str]) -> bool:
    """Whether a tensor belongs to no quantized layer; a quantized layer's bias stays float too."""
    return name.rpartition(".")[0] not in quantized or name.endswith(".bias")
