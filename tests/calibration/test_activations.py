"""Hidden states on disk: exact, in any order, from any thread; a short file is an error."""

from __future__ import annotations

import struct

import pytest
import torch

from anybit.calibration.activations import Activations
from anybit.calibration.parallel import workers


@pytest.fixture
def records():
    x = torch.randn(6, 1, 3, 5, generator=torch.Generator().manual_seed(0))
    x[0, 0, 0, :4] = torch.tensor([float("nan"), -0.0, float("inf"), 1e-45])
    return x


@pytest.mark.parametrize("order", [range(6), [5, 0, 3, 1, 4, 2]])
def test_records_come_back_bit_for_bit(tmp_path, records, order):
    store = Activations(tmp_path / "h", 6, 3, 5)
    with workers(3) as pool:
        pool.map(lambda sample: store.write(sample, records[sample]), order)
    store.sync()
    for sample in range(6):
        found = Activations(tmp_path / "h", 6, 3, 5).read(sample)
        assert found.shape == (1, 3, 5)
        assert torch.equal(found.view(torch.int32), records[sample].view(torch.int32))
    assert (tmp_path / "h").stat().st_size == 6 * 3 * 5 * 4


def test_layout_is_plain_little_endian_numbers_in_row_major_order(tmp_path):
    store = Activations(tmp_path / "h", 2, 3, 2)
    store.write(1, torch.arange(6.0).view(1, 2, 3).transpose(1, 2))  # not contiguous
    store.write(0, torch.full((1, 3, 2), -1.5))
    assert (tmp_path / "h").read_bytes() == struct.pack("<12f", *[-1.5] * 6, 0, 3, 1, 4, 2, 5)


def test_a_record_may_be_written_again_and_read_ones_are_copies(tmp_path):
    store = Activations(tmp_path / "h", 1, 1, 2)
    store.write(0, torch.ones(1, 1, 2))
    first = store.read(0)
    first += 1
    assert torch.equal(store.read(0), torch.ones(1, 1, 2))
    store.write(0, torch.zeros(1, 1, 2))
    assert torch.equal(store.read(0), torch.zeros(1, 1, 2))
    assert torch.equal(first, torch.full((1, 1, 2), 2.0))


def test_a_short_file_is_an_error(tmp_path, records):
    store = Activations(tmp_path / "h", 6, 3, 5)
    store.write(0, records[0])
    with pytest.raises(OSError, match="shorter than its 6 records"):
        store.read(1)
    with (tmp_path / "h").open("rb+") as file:
        file.truncate(59)
    with pytest.raises(OSError, match="shorter"):
        store.read(0)
    with pytest.raises(FileNotFoundError):
        Activations(tmp_path / "none", 1, 3, 5).read(0)
