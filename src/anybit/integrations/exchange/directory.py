"""A Hugging Face directory in another quantization: one shard of ours makes one of theirs, so memory holds one shard."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from anybit.calibration.progress import Progress
from anybit.checkpoint.finish import copy_companions
from anybit.checkpoint.layout import INDEX, shard_name
from anybit.checkpoint.partial import write_json, write_shard
from anybit.integrations.exchange.account import Account
from anybit.integrations.exchange.checkpoint import Checkpoint, Layer, exact_float

Encode = Callable[[Layer], dict[str, Tensor]]
"""A layer's tensors in the other format, by the last part of their names."""


def write_directory(
    source: Checkpoint,
    root: Path,
    encoders: Mapping[str, Encode],
    quantization: Mapping[str, Any],
    account: Account,
    progress: Progress,
    extra: Mapping[str, Tensor] | None = None,
) -> None:
    """Shards, index, config.json with `quantization` as its quantization_config, and the tokenizer's files.

    `encoders` has one function per layer that stays quantized; other quantized layers are written as floats that hold
    their exact values. `extra` tensors go into the last shard.
    """
    shards, size = list(source.shards()), 0
    weight_map: dict[str, str] = {}
    for number, (layers, kept) in enumerate(shards, start=1):
        progress("export", number - 1, len(shards))
        tensors = {name: source.tensor(name) for name in kept}
        for name in layers:
            encode = encoders.get(name, lambda layer: {"weight": dequantized(layer, source, account)})
            tensors |= {f"{name}.{key}": tensor for key, tensor in encode(source.layer(name)).items()}
        if number == len(shards):
            tensors |= extra or {}
        file = shard_name(number, len(shards))
        write_shard(root / file, tensors)
        weight_map |= dict.fromkeys(tensors, file)
        size += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    progress("export", len(shards), len(shards))
    write_json(root / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))})
    copy_companions(source.directory, root)
    write_json(root / "config.json", source.config | {"quantization_config": dict(quantization)})


def dequantized(layer: Layer, source: Checkpoint, account: Account) -> Tensor:
    """The layer's values in the checkpoint's float dtype if that is exact, else in float32."""
    if "activations" in layer.form or "inputs" in layer.form:
        raise account.refuse("a float layer that quantizes or rotates its input", layer.name)
    values = exact_float(layer.values(), source.dtype)
    account.note(
        f"{layer.name} is written as {str(values.dtype).removeprefix('torch.')}, value by value the same: "
        f"{account.format} keeps embeddings and heads in float"
    )
    return values
