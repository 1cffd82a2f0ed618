"""Tensors of a checkpoint by name, memory-mapped: nothing is read before it is used, nothing stays after it was."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anybit.checkpoint.layout import INDEX
from anybit.errors import FormatError

Array = NDArray[Any]
BFLOAT16 = "BF16"
_DTYPES = {"U8": "u1", "I8": "i1", "I32": "<i4", "I64": "<i8", "F16": "<f2", "F32": "<f4", BFLOAT16: "<u2"}
"""Names of the safetensors format; NumPy has no bfloat16, its bits come as uint16."""
_PIECE = 1 << 20


class Shard:
    """One safetensors file: 8 bytes of header length, a JSON header of names, the tensors."""

    def __init__(self, path: Path) -> None:
        """Maps the file.

        Raises:
            FormatError: missing, truncated or damaged.
        """
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
            self._data = 8 + int.from_bytes(self._map[:8], "little")
            self._header = json.loads(self._map[8 : self._data])
            self._header.pop("__metadata__", None)
            ends = [entry["data_offsets"][1] for entry in self._header.values()]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise FormatError(f"{path} is damaged or missing ({error}); restore it") from None
        if self._data + max(ends, default=0) > len(self._map):
            raise FormatError(f"{path} is damaged or missing (it is truncated); restore it")

    def dtype(self, name: str) -> str:
        """`F16`, `BF16`, ... of a tensor.

        Raises:
            FormatError: the file has no such tensor.
        """
        if name not in self._header:
            raise FormatError(f"{self.path} is damaged or missing (it has no {name}); restore it")
        return str(self._header[name]["dtype"])

    def array(self, name: str) -> Array:
        """A tensor where the file lies in memory, read-only; bfloat16 as the uint16 of its bits.

        Raises:
            FormatError: no such tensor, or sizes that do not fit together.
        """
        kind, entry = self.dtype(name), self._header[name]
        begin, end = entry["data_offsets"]
        if kind not in _DTYPES or math.prod(entry["shape"]) * np.dtype(_DTYPES[kind]).itemsize != end - begin:
            raise FormatError(f"{self.path} is damaged or missing ({name} is {kind} {entry['shape']}); restore it")
        flat = np.frombuffer(self._map, _DTYPES[kind], math.prod(entry["shape"]), self._data + begin)
        return flat.reshape(entry["shape"])

    def sha256(self, name: str) -> str:
        """Hash of a tensor's bytes, read piece by piece, so that they do not count as this process's memory."""
        self.dtype(name)
        at, end = (self._data + offset for offset in self._header[name]["data_offsets"])
        hashed, piece = hashlib.sha256(), memoryview(bytearray(min(_PIECE, end - at)))
        with self.path.open("rb", buffering=0) as file:
            file.seek(at)
            while at < end and (count := file.readinto(piece[: end - at])):
                hashed.update(piece[:count])
                at += count
        return hashed.hexdigest()

    def release(self) -> None:
        """Give back the memory of all pages that were read; reading them again costs a fault each."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


class Tensors:
    """Reads one shard after another; a tensor keeps its own file mapped for as long as it lives.

    Attributes:
        files: tensor name to shard.
    """

    def __init__(self, directory: Path) -> None:
        """Opens the index.

        Raises:
            FormatError: no index, or a damaged one.
        """
        self._directory = directory
        try:
            self.files: dict[str, str] = json.loads((directory / INDEX).read_text())["weight_map"]
        except (OSError, ValueError, KeyError) as error:
            raise FormatError(f"{directory / INDEX} is missing or damaged ({error}); restore it") from None
        self._open: Shard | None = None

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def get(self, name: str) -> Array:
        """A tensor as it is stored, see `Shard.array`.

        Raises:
            FormatError: it is in no shard, or its shard is damaged.
        """
        return self._shard(name).array(name)

    def dtype(self, name: str) -> str:
        """`F16`, `BF16`, ... of a tensor; errors as `get`."""
        return self._shard(name).dtype(name)

    def floats(self, name: str) -> NDArray[np.float32]:
        """A floating-point tensor as float32, a copy; errors as `get`."""
        stored = self.get(name)
        if self.dtype(name) == BFLOAT16:  # the upper half of a float32
            return (stored.astype(np.uint32) << 16).view(np.float32)
        return stored.astype(np.float32)

    def release(self) -> None:
        """Give back the pages of the shard in use: call it when what was read has been copied."""
        if self._open is not None:
            self._open.release()

    def _shard(self, name: str) -> Shard:
        if name not in self.files:
            raise FormatError(f"{self._directory} lacks {name}; restore its files or quantize again")
        path = self._directory / self.files[name]
        if self._open is None or self._open.path != path:
            self.release()
            self._open = Shard(path)
        return self._open
