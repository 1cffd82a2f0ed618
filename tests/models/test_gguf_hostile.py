"""GGUF headers that lie: counts and lengths are checked before anything loops over them."""

from __future__ import annotations

import struct
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anybit.errors import InputError
from anybit.models.gguf import check_gguf

UINT8, UINT32, STRING, ARRAY, FLOAT64 = 0, 4, 8, 9, 12


def text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


def array(kind: int, count: int, data: bytes = b"") -> bytes:
    return struct.pack("<IIQ", ARRAY, kind, count) + data


def header(*values: bytes, keys: int | None = None, tensors: int = 0) -> bytes:
    pairs = b"".join(text(f"key.{i}".encode()) + value for i, value in enumerate(values))
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, len(values) if keys is None else keys) + pairs


GOOD = header(
    struct.pack("<IB", UINT8, 7),
    struct.pack("<I", STRING) + text(b"llama"),
    array(STRING, 2, text(b"a") + text(b"")),
    array(FLOAT64, 3, b"\0" * 24),
    array(UINT32, 0),
)
HUGE = 1 << 60

LIES = {
    "bytes without end": header(array(UINT8, HUGE)),
    "numbers without end": header(array(FLOAT64, HUGE)),
    "empty texts without end": header(array(STRING, HUGE, b"\0" * 8)),
    "one number too many": header(array(UINT32, 3, b"\0" * 8)),
    "a text without end": header(struct.pack("<I", STRING) + text(b"x", HUGE)),
    "a key without end": b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text(b"x", 2**64 - 1),
    "keys without end": header(struct.pack("<IB", UINT8, 7), keys=HUGE),
    "an array of arrays": header(array(ARRAY, 1, array(UINT8, 1, b"\0")[4:])),
    "an unknown type": header(struct.pack("<I", 13)),
    "an array of an unknown type": header(array(99, 1, b"\0" * 64)),
    "tensors without end": header(struct.pack("<IB", UINT8, 7), tensors=HUGE),
    "no counts": b"GGUF" + struct.pack("<I", 3),
}


@pytest.mark.parametrize("how", LIES)
def test_lies_are_refused_at_once(how, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(LIES[how])
    before = time.monotonic()
    with pytest.raises(InputError, match=r"model\.gguf"):
        check_gguf(path)
    assert time.monotonic() - before < 2


def test_every_kind_of_value_passes(tmp_path):
    (tmp_path / "model.gguf").write_bytes(GOOD)
    check_gguf(tmp_path / "model.gguf")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "model.gguf"


@settings(max_examples=500, deadline=2000, derandomize=True)
@given(cut=st.integers(0, len(GOOD)), flips=st.lists(st.tuples(st.integers(0, 400), st.integers(1, 255)), max_size=6))
def test_damage_passes_or_is_refused(path, cut, flips):
    data = bytearray(GOOD[:cut] if not flips else GOOD)
    for at, flip in flips:
        data[at % len(data)] ^= flip
    path.write_bytes(data)
    try:
        check_gguf(path)
    except InputError as error:
        assert "\n" not in str(error)  # noqa: PT017 - any other class fails the test
    else:
        assert flips or len(data) == len(GOOD)
