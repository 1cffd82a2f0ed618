"""Nested weights with everything that an oracle needs, and tiny checkpoints of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from anybit.checkpoint.canary import CANARY, write_canary
from anybit.checkpoint.layout import INDEX
from anybit.formats.affine import Affine
from anybit.formats.decoder import groups
from anybit.formats.nested_affine import NestedAffine
from anybit.formats.terms import CodeTerm, save_terms

WIDTHS = (2, 3, 4, 6, 8)


def nested(rows: int, columns: int, group: int, bits: int = 8, seed: int = 0) -> tuple[Tensor, NestedAffine]:
    """Random codes over the full range and a grid of every readable width, tabled at some of them."""
    draw = torch.Generator().manual_seed(seed * 31 + bits * 131 + rows * 7919 + columns)
    shape = (rows, groups(columns, group))
    widths = (*(width for width in WIDTHS if width < bits), bits)
    tables = [width for width in widths if width not in (3, 6) or width == bits]
    zeros = {t: torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=draw) for t in tables}
    ratios = {t: torch.randint(100, 160, shape, dtype=torch.uint8, generator=draw) for t in tables if t < bits}
    scale = (10.0 ** (torch.rand(shape, generator=draw) * 3 - 4)).half()
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=draw)
    codes[0], codes[-1] = 2**bits - 1, 0
    return codes, NestedAffine(bits, group, widths, scale, zeros, ratios)


def fitted(values: Tensor, group: int) -> CodeTerm:
    """A weight float32 [N, K] on a nested grid: 8-bit min-max codes, zeros of narrower widths moved a little at random so that
    using the wrong table shows."""
    grid = Affine.fit(values, 8, group)
    assert grid.zero is not None
    zeros, ratios = {8: grid.zero}, {}
    for table in (2, 4):
        moved = grid.zero.int() + torch.randint(-6, 7, grid.zero.shape)
        zeros[table] = moved.clamp(0, 255).to(torch.uint8)
        ratios[table] = torch.randint(110, 140, grid.zero.shape, dtype=torch.uint8)
    decoder = NestedAffine(8, group, WIDTHS, grid.scale, zeros, ratios)
    return CodeTerm.from_codes(grid.encode(values), decoder)


def nest(checkpoint: Path, group: int = 32, but: Sequence[str] = (), only: Sequence[int] = WIDTHS) -> Path:
    """Rewrite a quantized checkpoint with nested weights in place of all its affine ones except those named like `but`; the
    ledger's hashes and the canary follow. `only` are the widths its form offers."""
    torch.manual_seed(0)
    config, index = (json.loads((checkpoint / name).read_text()) for name in ("config.json", INDEX))
    ledger = json.loads((checkpoint / "ledger.json").read_text())
    layers, files = config["quantization_config"]["layers"], index["weight_map"]
    shards = {file: load_file(checkpoint / file) for file in set(files.values())}
    for row in ledger["tensors"]:
        name = row["name"]
        if any(part in name for part in but):
            continue
        file = files[f"{name}.weight"]
        shape = layers[name]["shape"]
        made = _nested_tensors(name, shape, group, only)
        for key in [key for key in files if key.rpartition(".")[0] == name and not key.endswith(".bias")]:
            del shards[file][key], files[key]
        layers[name] = made[0]
        shards[file] |= {f"{name}.{key}": tensor for key, tensor in made[1].items()}
        files |= {f"{name}.{key}": file for key in made[1]}
        word = f"nested_affine8g{group}"
        row |= {"planned": word, "actual": word, "bits": 8, "group_size": group, "precisions": list(only)}
        row["sha256"] = {key: hashlib.sha256(t.numpy().tobytes()).hexdigest() for key, t in made[1].items()}
    for file, tensors in shards.items():
        save_file(tensors, checkpoint / file, metadata={"format": "pt"})
    for name, data in (("config.json", config), (INDEX, index), ("ledger.json", ledger)):
        (checkpoint / name).write_text(json.dumps(data))
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, local_files_only=True).eval()
    ids = torch.arange(5, 21)
    with torch.no_grad():
        write_canary(checkpoint / CANARY, ids, model(input_ids=ids[None]).logits[0, -1])
    return checkpoint


def _nested_tensors(name: str, shape: Sequence[int], group: int, only: Sequence[int]) -> tuple[dict, dict[str, Tensor]]:
    torch.manual_seed(sum(name.encode()))
    values = torch.randn(shape[0], shape[1]) * 0.05
    term = fitted(values, min(group, shape[1]))
    form, tensors = save_terms([term], (shape[0], shape[1]))
    form["terms"][0]["precisions"] = list(only)
    return form, tensors
