"""safetensors files and indices that lie: always our own error, never a read outside the directory."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from anybit.errors import InputError
from anybit.models.shards import Shards

GOOD = save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(5, dtype=torch.uint8)})


def with_header(header: str) -> bytes:
    return struct.pack("<Q", len(header)) + header.encode() + b"\0" * 64


def row(**changes):
    return with_header(json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}))


FILES = {
    "nothing": b"",
    "header longer than the file": struct.pack("<Q", 2**63) + b"{}",
    "deep header": with_header("[" * 100_000),
    "a list": with_header("[1]"),
    "an infinite size": with_header('{"a": {"dtype": "F32", "shape": [Infinity], "data_offsets": [0, 8]}}'),
    "a fraction of a row": row(shape=[2.5]),
    "rows in text": row(shape=["2"]),
    "offsets that are fractions": row(data_offsets=[0.0, 8.0]),
    "negative offsets": row(data_offsets=[-8, 0]),
    "offsets the wrong way round": row(data_offsets=[8, 0]),
    "offsets beyond the file": row(data_offsets=[2**40, 2**40 + 8]),
    "three offsets": row(data_offsets=[0, 8, 16]),
    "negative rows": row(shape=[-2]),
    "nothing times more than there is": row(shape=[2**49, 2**49, 0], data_offsets=[0, 0]),
    "too large a number": row(shape=[2**70, 0], data_offsets=[0, 0]),
    "lying shape": row(shape=[3]),
    "unknown dtype": row(dtype="F6_E2M3"),
    "dtype of a list": row(dtype=["F32"]),
    "no shape": with_header('{"a": {"dtype": "F32", "data_offsets": [0, 8]}}'),
    "bytes that are no text": struct.pack("<Q", 8) + b"\xff" * 8 + b"\0" * 64,
}


def read_all(directory):
    shards = Shards(directory)
    return {name: shards.read(name) for name in shards.entries}


@pytest.mark.parametrize("how", FILES)
def test_files(how, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(FILES[how])
    with pytest.raises(InputError, match=r"model\.safetensors"):
        read_all(tmp_path)


INDICES = {
    "a parent": "../outside.safetensors",
    "a folder": "sub/model.safetensors",
    "an absolute path": "/etc/hostname",
    "the folder itself": ".",
    "a number": 5,
    "a list": ["model.safetensors"],
    "a name too long for any disk": "x" * 5000,
    "a NUL": "model\0.safetensors",
}


@pytest.mark.parametrize("how", INDICES)
def test_an_index_names_files_beside_it_only(how, tmp_path):
    inside = tmp_path / "model"
    (inside / "sub").mkdir(parents=True)
    for file in (tmp_path / "outside.safetensors", inside / "model.safetensors", inside / "sub/model.safetensors"):
        file.write_bytes(GOOD)
    (inside / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": INDICES[how]}}))
    with pytest.raises(InputError, match="index"):
        read_all(inside)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"weight_map": [1]}', '{"weight_map": {"a": 1, "b": "x"}}', "[" * 100_000]
)
def test_an_index_that_is_none(text, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(GOOD)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InputError, match="index"):
        read_all(tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@settings(max_examples=300, deadline=None, derandomize=True)
@given(cut=st.integers(0, len(GOOD)), flips=st.lists(st.tuples(st.integers(0, 200), st.integers(1, 255)), max_size=4))
def test_a_damaged_file_is_read_as_something_or_refused(folder, cut, flips):
    data = bytearray(GOOD[:cut] if not flips else GOOD)
    for at, flip in flips:
        data[at % len(data)] ^= flip
    (folder / "model.safetensors").write_bytes(data)
    try:
        found = read_all(folder)
    except InputError as error:
        assert "\n" not in str(error)  # noqa: PT017 - any other class fails the test
    else:
        assert all(tensor.nbytes <= len(GOOD) for tensor in found.values())
