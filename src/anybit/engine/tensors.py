"""Tensors of a checkpoint by name, memory-mapped: nothing is read before it is used, nothing stays after it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from anybit.checkpoint.layout import INDEX
from anybit.errors import FormatError


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
        self._open: tuple[str, Any] | None = None

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def get(self, name: str) -> Tensor:
        """A tensor as it is stored.

        Raises:
            FormatError: it is in no shard, or its shard is damaged.
        """
        if name not in self.files:
            raise FormatError(f"{self._directory} lacks {name}; restore its files or quantize again")
        file = self.files[name]
        try:
            if self._open is None or self._open[0] != file:
                self._open = (file, safe_open(self._directory / file, framework="pt"))
            tensor: Tensor = self._open[1].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise FormatError(f"{self._directory / file} is damaged or missing ({error}); restore it") from None
        return tensor

    def close(self) -> None:
        """Let go of the last shard."""
        self._open = None
