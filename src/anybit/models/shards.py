"""Reading tensors out of a directory of safetensors files with bounded memory.

The format (https://github.com/huggingface/safetensors): 8 bytes little-endian header length, a JSON header
`{name: {"dtype", "shape", "data_offsets": [start, end]}}`, then the bytes. We parse the headers ourselves and read each
tensor with one plain `readinto`: nothing stays mapped, so resident memory is exactly the tensors that were asked for.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anybit.cache import sampled_sha256
from anybit.errors import InputError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MAX_HEADER = 100_000_000
_MAX_SIZE = 1 << 50
_DAMAGED = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What parsing JSON, and looking for things where they are not, raises."""


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: `start` is the byte offset in `file`."""

    file: Path
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Shards:
    """All safetensors files of one model directory; `entries` maps each stored name to its place."""

    def __init__(self, directory: Path) -> None:
        """Reads the headers only. Raises InputError for a missing, truncated or corrupt file."""
        self.directory = directory
        self.files = _shard_files(directory)
        self.entries: dict[str, Entry] = {}
        for file in self.files:
            self.entries.update(_read_header(file))

    def read(self, name: str, index: int | None = None) -> Tensor:
        """The stored tensor `name`, or slice `[index]` of its first axis, as a fresh CPU tensor in its stored dtype."""
        entry = self.entries[name]
        shape, start = entry.shape, entry.start
        if index is not None:
            shape = shape[1:]
            start += index * math.prod(shape) * entry.dtype.itemsize
        out = torch.empty(shape, dtype=entry.dtype)
        view = memoryview(out.reshape(-1).view(torch.uint8).numpy().data)
        with entry.file.open("rb", buffering=0) as file:
            file.seek(start)
            done = 0
            while done < len(view):
                got = file.readinto(view[done:])
                if not got:
                    raise InputError(f"{entry.file}: ends inside tensor {name}; copy or download the file again")
                done += got
        return out

    def identity(self) -> dict[str, Any]:
        """File name -> size in bytes and sampled content hash (see `sampled_sha256`)."""
        return {f.name: {"size": f.stat().st_size, "sha256_sampled": sampled_sha256(f)} for f in self.files}


def _shard_files(directory: Path) -> tuple[Path, ...]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except _DAMAGED as error:
            raise InputError(f"{index}: not a safetensors index ({error}); download it again") from error
        here = {file.name for file in directory.iterdir()}
        for name in names:
            if name not in here:  # gone, or a path that leads elsewhere
                raise InputError(
                    f"{directory}: shard {str(name)[:80]!r} named by the index is missing; download it again"
                )
        files = tuple(directory / name for name in names)
    elif (directory / "model.safetensors").is_file():
        files = (directory / "model.safetensors",)
    else:
        files = tuple(sorted(directory.glob("*.safetensors")))
    for file in files:
        if not file.is_file():
            raise InputError(f"{directory}: {file.name}, named by the index as a shard, is no file; download it again")
    if not files:
        raise InputError(_nothing_to_read(directory))
    return files


def _nothing_to_read(directory: Path) -> str:
    pickles = sorted([*directory.glob("*.bin"), *directory.glob("*.pt"), *directory.glob("*.pth")])
    if pickles:
        return (
            f"{directory}: only pickle weights ({pickles[0].name}), which anybit never opens; convert them where you "
            "trust them: AutoModelForCausalLM.from_pretrained(dir).save_pretrained(new_dir)"
        )
    return f"{directory}: no *.safetensors files; give a Hugging Face model directory, a .gguf file or a hub id"


def _read_header(file: Path) -> dict[str, Entry]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise InputError(f"{file}: not a safetensors file or cut short ({size} bytes); download it again")
        raw = stream.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        return {name: _entry(file, 8 + length, size, name, row) for name, row in header.items()}
    except _DAMAGED as error:
        raise InputError(f"{file}: corrupt safetensors header ({error}); download it again") from error


def _entry(file: Path, base: int, size: int, name: str, row: dict[str, Any]) -> Entry:
    if row["dtype"] not in _DTYPES:
        raise InputError(f"{file}: tensor {name} has dtype {row['dtype']}; known: {', '.join(_DTYPES)}")
    dtype, shape = _DTYPES[row["dtype"]], tuple(row["shape"])
    start, end = row["data_offsets"]
    whole = all(type(n) is int and n >= 0 for n in (*shape, start, end))
    if not whole or math.prod(n or 1 for n in shape) > _MAX_SIZE:
        raise InputError(f"{file}: tensor {name} has shape {list(shape)} at {[start, end]}; download it again")
    if end - start != math.prod(shape) * dtype.itemsize:
        raise InputError(f"{file}: tensor {name} has {end - start} bytes for shape {list(shape)} {row['dtype']}")
    if base + end > size:
        raise InputError(f"{file}: cut short, {size} bytes but tensor {name} ends at {base + end}; download it again")
    return Entry(file, base + start, shape, dtype)
