"""What lies in a checkpoint directory, and how names map to files (docs/FORMAT.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from anybit.errors import FormatError

VERSION = 1
METHOD = "anybit"
INDEX = "model.safetensors.index.json"


def shard_name(number: int, count: int) -> str:
    """File name of shard `number` of `count`, counted from 1."""
    return f"model-{number:05}-of-{count:05}.safetensors"


def quantization_config(recipe: str, layers: dict[str, Any], kv: dict[str, Any] | None = None) -> dict[str, Any]:
    """The `quantization_config` of config.json: how every quantized layer is written, by module name, and how keys and values
    are to be cached (`KVSpec.as_dict`) where the recipe says so."""
    config = {"quant_method": METHOD, "version": VERSION, "recipe": recipe, "layers": layers}
    return config | ({"kv": kv} if kv else {})


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of an anybit checkpoint.

    Raises:
        FormatError: not an anybit checkpoint, damaged, or written by a later version.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise FormatError(f"{directory} has no config.json; give a directory that `anybit quantize` wrote")
    try:
        config = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not JSON ({error}); restore it or quantize again") from None
    quantization = (config if isinstance(config, dict) else {}).get("quantization_config") or {}
    if quantization.get("quant_method") != METHOD:
        found = quantization.get("quant_method", "no quantization at all")
        raise FormatError(f"{directory} holds {found}, not an anybit checkpoint; quantize it with `anybit quantize`")
    if quantization.get("version", 0) > VERSION:
        raise FormatError(
            f"{directory} has format version {quantization['version']}, this anybit reads {VERSION}; update anybit"
        )
    return config
