"""What is in a batch: vLLM tells its logits processors before every pass, and this one sets the model's precision by it.

Found through the entry point `vllm.logits_processors`; it touches no logits, and does nothing for models that are not ours.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from anybit.checkpoint.layout import METHOD


class Steps(LogitsProcessor):
    """Keeps, for every row of the batch, vLLM's own list of the tokens emitted so far."""

    def __init__(self, vllm_config: VllmConfig, device: Any, is_pin_memory: bool) -> None:
        config: Any = vllm_config.quant_config
        self._config = config if config is not None and config.get_name() == METHOD else None
        self._emitted: dict[int, list[int]] = {}
        if self._config is not None:
            self._config.followed = True

    def apply(self, logits: Tensor) -> Tensor:
        """Unchanged."""
        return logits

    def is_argmax_invariant(self) -> bool:
        """True."""
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the batch, then set the precision of the pass that comes."""
        if self._config is None:
            return
        if batch_update is not None:
            self._follow(batch_update)
        if self._config.widths is not None:
            self._config.widths.set(self._config.policy.bits(len(tokens) for tokens in self._emitted.values()))

    def _follow(self, update: BatchUpdate) -> None:
        for index in update.removed:
            self._emitted.pop(index, None)
        for index, _, _, emitted in update.added:
            self._emitted[index] = emitted
        for one, other, direction in update.moved:
            moved, replaced = self._emitted.pop(one, None), self._emitted.pop(other, None)
            if moved is not None:
                self._emitted[other] = moved
            if replaced is not None and direction == MoveDirectionality.SWAP:
                self._emitted[one] = replaced
