"""The safetensors reader against the safetensors library."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from anybit.cache import build_once, sampled_sha256
from anybit.errors import InputError
from anybit.models.shards import Shards

TENSORS = {
    "bf16": torch.randn(3, 5).to(torch.bfloat16),
    "f16": torch.randn(7).half(),
    "f32": torch.randn(4, 3, 2),
    "f64": torch.randn(2, 2).double(),
    "i64": torch.tensor([-5, 2**60]),
    "u8": torch.arange(256, dtype=torch.uint8),
    "bool": torch.tensor([True, False, True]),
    "scalar": torch.tensor(-1.5),
    "empty": torch.empty(0, 4),
}


def test_every_dtype_reads_back_exactly(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    shards = Shards(tmp_path)
    assert shards.entries.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        read = shards.read(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor), name


def test_slices_of_the_first_axis(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    shards = Shards(tmp_path)
    for index in range(4):
        assert torch.equal(shards.read("f32", index), TENSORS["f32"][index])


def test_a_read_is_a_copy(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    shards = Shards(tmp_path)
    shards.read("f32").zero_()
    assert torch.equal(shards.read("f32"), TENSORS["f32"])


def test_file_cut_after_opening(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(1000)}, file)
    shards = Shards(tmp_path)
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(InputError, match="ends inside tensor w"):
        shards.read("w")


def test_sampled_hash_sees_size_start_and_end(tmp_path):
    file, data = tmp_path / "data", bytearray(5 << 20)
    file.write_bytes(data)
    before = sampled_sha256(file)
    for change in (0, len(data) // 15, len(data) - 1):
        edited = bytearray(data)
        edited[change] = 1
        file.write_bytes(edited)
        assert sampled_sha256(file) != before, change
    file.write_bytes(data[:-1])
    assert sampled_sha256(file) != before


def test_build_once_is_atomic(tmp_path, monkeypatch):
    monkeypatch.setenv("ANYBIT_CACHE", str(tmp_path))

    def fail(directory):
        (directory / "half").write_text("")
        raise ValueError("on purpose")

    with pytest.raises(ValueError, match="on purpose"):
        build_once("name", fail)
    assert list(tmp_path.iterdir()) == []
    built = build_once("name", lambda directory: (directory / "whole").touch())
    assert [p.name for p in built.iterdir()] == ["whole"]
    assert build_once("name", fail) == built  # not built again


def test_build_once_loses_a_race_quietly(tmp_path, monkeypatch):
    monkeypatch.setenv("ANYBIT_CACHE", str(tmp_path))

    def beaten(directory):
        (tmp_path / "name").mkdir()
        (tmp_path / "name" / "theirs").touch()
        (directory / "ours").touch()

    assert [p.name for p in build_once("name", beaten).iterdir()] == ["theirs"]
    assert [p.name for p in tmp_path.iterdir()] == ["name"]
