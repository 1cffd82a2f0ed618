"""Buffers beyond the cache."""

from __future__ import annotations

import pytest
import torch

from anybit.evaluate import cold


def test_the_buffer_is_bounded_by_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cold, "free_memory", lambda: 41 << 20)
    monkeypatch.setattr(cold, "last_level_cache", lambda: 8 << 20)
    buffer = cold.read_buffer()
    assert buffer.dtype == torch.uint8
    assert len(buffer) == 10 << 20
    assert bool((buffer == 1).all())
    assert not cold.beyond_cache(len(buffer))
    assert cold.beyond_cache(16 << 20)


def test_sizes_of_this_machine() -> None:
    assert 1 << 18 <= cold.last_level_cache() < 1 << 36
    assert cold.free_memory() > 1 << 26
