"""Tiny models of all families, saved once per test run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tiny_models import save_tiny

Saved = Callable[[str], tuple[Any, Path]]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """`saved(family)` -> (the original transformers model, the directory it was saved to, in several shards)."""
    done: dict[str, tuple[Any, Path]] = {}

    def get(family: str) -> tuple[Any, Path]:
        if family not in done:
            directory = tmp_path_factory.mktemp(family)
            done[family] = (save_tiny(family, directory, max_shard_size="100KB"), directory)
        return done[family]

    return get
