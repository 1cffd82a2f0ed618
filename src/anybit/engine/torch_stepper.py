"""One text at a time through a transformers model."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from anybit.layers.linear import Terms


class TorchStepper:
    """A text in the cache of a transformers model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, self._cache = model, None
        self.context: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        ends = model.generation_config.eos_token_id if model.generation_config is not None else None
        self.end_ids = None if ends is None else frozenset([ends] if isinstance(ends, int) else ends)
        # only the last position's logits are wanted: [prompt, vocabulary] would be the largest tensor of the whole run
        accepts = inspect.signature(model.forward).parameters
        self._options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in accepts else {}
        self._quantized = any(isinstance(module, Terms) for module in model.modules())

    def prefill(self, ids: Sequence[int]) -> NDArray[Any]:
        """See `Stepper`."""
        self._cache = None
        return self._forward(ids)

    def step(self, token: int) -> NDArray[Any]:
        """See `Stepper`."""
        # Our own threads do the work that is worth sharing, and torch has only small operations left. On a busy
        # machine, sharing those made attention alone take 100 times as long (kernels/linear_w_a16/NOTES.md).
        with torch_threads(1 if self._quantized else None):
            return self._forward([token])

    def _forward(self, ids: Sequence[int]) -> NDArray[Any]:
        step = torch.tensor([list(ids)], device=self._model.device)
        with torch.inference_mode():
            output = self._model(input_ids=step, past_key_values=self._cache, use_cache=True, **self._options)
        self._cache = output.past_key_values
        logits: NDArray[Any] = output.logits[0, -1].float().cpu().numpy()
        return logits


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Run the body with this many torch threads, None: all it has."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
