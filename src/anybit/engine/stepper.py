"""One text at a time through a model, whatever runs it: a prompt in one piece, then token by token."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from anybit.engine.native import NativeModel
from anybit.layers.linear import Terms


class Stepper(Protocol):
    """What the generation loop needs of a model.

    Attributes:
        context: most tokens a text can have, None for no limit.
        end_ids: tokens that end a text; None: ask the tokenizer.
        device: of the logits.
    """

    context: int | None
    end_ids: frozenset[int] | None
    device: torch.device

    def prefill(self, ids: Sequence[int]) -> Tensor:
        """Begin a text; logits [vocabulary] after its last token."""
        ...

    def step(self, token: int) -> Tensor:
        """Append a token; logits [vocabulary] after it."""
        ...


class NativeStepper:
    """A text in slot 0 of a native model."""

    def __init__(self, model: NativeModel) -> None:
        self._model = model
        self.context: int | None = model.context
        self.end_ids: frozenset[int] | None = model.end_ids or None
        self.device = torch.device("cpu")

    def prefill(self, ids: Sequence[int]) -> Tensor:
        """See `Stepper`."""
        self._model.reset()
        return self._model.prefill(ids)

    def step(self, token: int) -> Tensor:
        """See `Stepper`."""
        return self._model.step({0: token})[0]


class TorchStepper:
    """A text in the cache of a transformers model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, self._cache = model, None
        self.context: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        ends = model.generation_config.eos_token_id if model.generation_config is not None else None
        self.end_ids = None if ends is None else frozenset([ends] if isinstance(ends, int) else ends)
        self.device = model.device
        # only the last position's logits are wanted: [prompt, vocabulary] would be the largest tensor of the whole run
        accepts = inspect.signature(model.forward).parameters
        self._options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in accepts else {}
        self._quantized = any(isinstance(module, Terms) for module in model.modules())

    def prefill(self, ids: Sequence[int]) -> Tensor:
        """See `Stepper`."""
        self._cache = None
        return self._forward(ids)

    def step(self, token: int) -> Tensor:
        """See `Stepper`."""
        # Our own threads do the work that is worth sharing, and torch has only small operations left. On a busy
        # machine, sharing those made attention alone take 100 times as long (kernels/linear_w_a16/NOTES.md).
        with torch_threads(1 if self._quantized else None):
            return self._forward([token])

    def _forward(self, ids: Sequence[int]) -> Tensor:
        step = torch.tensor([list(ids)], device=self.device)
        with torch.inference_mode():
            output = self._model(input_ids=step, past_key_values=self._cache, use_cache=True, **self._options)
        self._cache = output.past_key_values
        logits: Tensor = output.logits[0, -1]
        return logits


def stepper(model: PreTrainedModel | NativeModel) -> Stepper:
    """The stepper of either kind of model."""
    return NativeStepper(model) if isinstance(model, NativeModel) else TorchStepper(model)


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
