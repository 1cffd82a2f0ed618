"""The keys and values of a GGUF file, walked before a parser trusts their counts: the gguf package loops as often as a count
says, even where no bytes are left.

    "GGUF", uint32 version, uint64 tensors, uint64 keys; of every key: text, uint32 type, value; then the tensors
    text: uint64 length, bytes       array: uint32 type, uint64 count, values

Little-endian. Source: ggml, docs/gguf.md.
"""

from __future__ import annotations

import struct
from mmap import ACCESS_READ, mmap
from pathlib import Path

from anybit.errors import InputError

# Bytes of the scalar types by number; texts and arrays say their length.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_TEXT, _ARRAY = 8, 9
_COUNTS, _KEYS = 8, 24
_TENSOR = 24  # name's length, number of dimensions, type, offset: less no tensor takes


def check_header(path: Path) -> None:
    """Raises InputError unless every count and length of the header fits into the file, which must begin as GGUF does."""
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
        try:
            tensors, keys = struct.unpack_from("<QQ", data, _COUNTS)
            at = _KEYS
            for _ in range(keys):  # each takes bytes: the file ends before a lying count does
                at = _after_text(data, at)
                (kind,) = struct.unpack_from("<I", data, at)
                at = _after_value(data, at + 4, kind)
            _within(data, at, tensors * _TENSOR)
        except (struct.error, ValueError) as error:
            raise InputError(f"{path}: a damaged GGUF header ({error}); download it again") from None


def _within(data: mmap, at: int, size: int) -> int:
    """Where `size` bytes from `at` end. Raises ValueError when the file does not have them."""
    if at + size > len(data):
        raise ValueError(f"{size} bytes at {at} of {len(data)}")
    return at + size


def _after_text(data: mmap, at: int) -> int:
    (length,) = struct.unpack_from("<Q", data, at)
    return _within(data, at + 8, length)


def _after_value(data: mmap, at: int, kind: int) -> int:
    if kind == _TEXT:
        return _after_text(data, at)
    if kind != _ARRAY:
        return _within(data, at, _size(kind))
    inner, count = struct.unpack_from("<IQ", data, at)
    at += 12
    if inner != _TEXT:
        return _within(data, at, count * _size(inner))
    for _ in range(count):  # as for keys
        at = _after_text(data, at)
    return at


def _size(kind: int) -> int:
    if kind not in _SIZES:
        raise ValueError(f"a value of type {kind} where a number or text must be")
    return _SIZES[kind]
