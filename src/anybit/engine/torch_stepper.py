"""One text at a time through a transformers model."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from anybit.engine.drafting.pass_times import PassTimes
from anybit.engine.sampler import require_finite
from anybit.engine.stepper import Floats
from anybit.layers.linear import Terms
from anybit.layers.precision import Precision


class TorchStepper:
    """A text in the cache of a transformers model."""

    inexact = "the torch engine's float sums depend on how many tokens a pass has"

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._cache: Any = None
        self.context: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        ends = model.generation_config.eos_token_id if model.generation_config is not None else None
        self.end_ids = None if ends is None else frozenset([ends] if isinstance(ends, int) else ends)
        self.precision: Precision = getattr(model, "precision", None) or Precision((16,))
        self.times = PassTimes()
        # only the last rows' logits are wanted: [prompt, vocabulary] would be the largest tensor of the whole run
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._quantized = any(isinstance(module, Terms) for module in model.modules())

    @property
    def length(self) -> int:
        """See `Stepper`."""
        return 0 if self._cache is None else int(self._cache.get_seq_length())

    def prefill(self, ids: Sequence[int]) -> Floats:
        """See `Stepper`."""
        self._cache = None
        return self._forward(ids, 1)[0]

    def verify(self, tokens: Sequence[int]) -> Floats:
        """See `Stepper`."""
        # Our own threads do the work that is worth sharing, and torch has only small operations left. On a busy
        # machine, sharing those made attention alone take 100 times as long (kernels/linear_w_a16/NOTES.md).
        with torch_threads(1 if self._quantized else None):
            return self._forward(tokens, len(tokens))

    def best(self, tokens: Sequence[int]) -> list[int]:
        """See `Stepper`."""
        logits = self.verify(tokens)
        require_finite(float(logits.max()))
        return [int(row) for row in logits.argmax(-1)]

    def truncate(self, length: int) -> None:
        """See `Stepper`."""
        if self._cache is not None and length < self.length:
            self._cache.crop(length - self.length)

    def last_keys_values(self) -> tuple[Floats, Floats]:
        """See `Stepper`."""
        layer = self._cache.layers[-1]
        keys, values = layer.read() if hasattr(layer, "read") else (layer.keys, layer.values)
        return keys[0].float().cpu().numpy(), values[0].float().cpu().numpy()

    def _forward(self, ids: Sequence[int], wanted: int) -> Floats:
        step = torch.tensor([list(ids)], device=self._model.device)
        options: dict[str, Any] = {"logits_to_keep": wanted} if self._keeps else {}
        with torch.inference_mode():
            output = self._model(input_ids=step, past_key_values=self._cache, use_cache=True, **options)
            self._cache = output.past_key_values
            logits: Floats = output.logits[0, -wanted:].float().cpu().numpy()
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
