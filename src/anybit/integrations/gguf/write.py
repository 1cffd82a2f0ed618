"""anybit -> GGUF: for every tensor the smallest type that says it exactly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type

from anybit.calibration.progress import Progress
from anybit.integrations.exchange.account import Account
from anybit.integrations.exchange.checkpoint import Checkpoint, Layer, exact_float
from anybit.integrations.exchange.grid import Grid
from anybit.integrations.exchange.rules import check_layer, lose_cache
from anybit.integrations.gguf.blocks import BLOCK, Bytes, pack_q4_0, pack_q4_1, pack_q5_0, pack_q8_0
from anybit.integrations.gguf.kquants import pack_q4_k, pack_q6_k
from anybit.integrations.gguf.metadata import write_metadata
from anybit.integrations.gguf.names import Names

# Smallest first: 4.5, 4.5, 5, 5.5, 6.56 and 8.5 bits a weight.
EXACT: tuple[tuple[Type, Callable[[Grid], Bytes | None]], ...] = (
    (Type.Q4_0, pack_q4_0),
    (Type.Q4_K, pack_q4_k),
    (Type.Q4_1, pack_q4_1),
    (Type.Q5_0, pack_q5_0),
    (Type.Q6_K, pack_q6_k),
    (Type.Q8_0, pack_q8_0),
)


def write(source: Checkpoint, target: Path, account: Account, progress: Progress) -> None:
    """One .gguf file. Tensors wait in a temporary file until all headers are known."""
    names = Names(source.config)
    lose_cache(source, account)
    writer = gguf.GGUFWriter(target, gguf.MODEL_ARCH_NAMES[names.architecture], use_temp_file=True)
    try:
        factors = write_metadata(writer, source.config, source.directory, account)
        if factors is not None:
            writer.add_tensor("rope_freqs.weight", factors)
        used = _tensors(source, writer, names, account, progress)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
        if writer.temp_file is not None:
            writer.temp_file.close()
    account.note("types: " + ", ".join(f"{kind.name} {count}" for kind, count in used.most_common()))


def _tensors(
    source: Checkpoint, writer: gguf.GGUFWriter, names: Names, account: Account, progress: Progress
) -> Counter[Type]:
    used: Counter[Type] = Counter()
    shards, linears = list(source.shards()), set(source.linears())
    for number, (layers, kept) in enumerate(shards):
        progress("export", number, len(shards))
        for name in kept:
            values = source.tensor(name).float()
            order = names.order(name, values.shape[0])
            data = (values if order is None else values[order]).numpy()
            # llama.cpp reads norms and biases in float32, matrices in any float type
            kind = Type.F32 if values.dim() == 1 or not torch.equal(values.half().float(), values) else Type.F16
            writer.add_tensor(names.gguf_name(name), data if kind == Type.F32 else data.astype(np.float16))
        for name in layers:
            check_layer(name, source.forms[name], account)
            kind, data = _quantized(source.layer(name), name in linears, account)
            order = names.order(f"{name}.weight", len(data))
            data = data if order is None else data[order.numpy()]
            writer.add_tensor(names.gguf_name(f"{name}.weight"), data, raw_dtype=kind)
            used[kind] += 1
    progress("export", len(shards), len(shards))
    return used


def _quantized(layer: Layer, linear: bool, account: Account) -> tuple[Type, Bytes]:
    """Type and bytes [N, bytes of a row] of a layer; an embedding or head that no type says exactly becomes float."""
    grid = layer.grid(account)
    for kind, pack in EXACT:
        if (data := pack(grid)) is not None:
            return kind, data
    if account.allow_loss:
        return _nearest(layer, grid, account)
    if linear:
        account.lose("these codes: no GGUF type has their scales, zeros and groups", layer.name)
    values = exact_float(layer.values(), torch.float16)
    kind = Type.F16 if values.dtype == torch.float16 else Type.F32
    account.note(f"{layer.name} is written as {kind.name}, value by value the same: no smaller type says it exactly")
    return kind, values.numpy().view(np.uint8)


def _nearest(layer: Layer, grid: Grid, account: Account) -> tuple[Type, Bytes]:
    """Codes as they are over a rounded minimum, where 4 bits hold them; else 8 bits anew."""
    if (data := pack_q4_1(grid, rounded=True)) is not None:
        account.lose("minima of more bits than float16; Q4_1 has them rounded", layer.name)
        return Type.Q4_1, data
    values = layer.values().numpy()
    if values.shape[1] % BLOCK:
        raise account.refuse(f"{values.shape[1]} columns, which are no whole blocks of {BLOCK}", layer.name)
    account.lose("these codes and scales; they are rounded again, to Q8_0", layer.name)
    return Type.Q8_0, gguf.quantize(values, Type.Q8_0)
