"""One text at a time through a model, whatever runs it: a prompt in one piece, then token by token, or several at once."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from anybit.engine.native import NativeModel
from anybit.engine.sampler import require_finite
from anybit.layers.linear import Terms
from anybit.layers.precision import Precision

Floats = NDArray[np.float32]


class Stepper(Protocol):
    """What the generation loop needs of a model.

    Attributes:
        context: most tokens a text can have, None for no limit.
        end_ids: tokens that end a text; None: ask the tokenizer.
        precision: bits in use from the next pass on.
        inexact: why the rows of a pass differ from the same tokens one by one; empty when they are the same bits.
    """

    context: int | None
    end_ids: frozenset[int] | None
    precision: Precision
    inexact: str

    @property
    def length(self) -> int:
        """Tokens of the text so far."""
        ...

    def prefill(self, ids: Sequence[int]) -> Floats:
        """Begin a text; logits float32 [vocabulary] after its last token."""
        ...

    def verify(self, tokens: Sequence[int]) -> Floats:
        """Append tokens that the model generated, or may have; logits float32 [len(tokens), vocabulary] after each."""
        ...

    def best(self, tokens: Sequence[int]) -> list[int]:
        """As `verify`, but only the likeliest token after each, the lowest id of equals. PromiseError: logits not finite."""
        ...

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on."""
        ...

    def last_keys_values(self) -> tuple[Floats, Floats]:
        """Keys and values of the last layer as cached, each float32 [kv_heads, T, head_dim]."""
        ...


class NativeStepper:
    """A text in slot 0 of a native model."""

    inexact = ""

    def __init__(self, model: NativeModel) -> None:
        self._model = model
        self.context: int | None = model.context
        self.end_ids: frozenset[int] | None = model.end_ids or None
        self.precision = model.precision

    @property
    def length(self) -> int:
        """See `Stepper`."""
        return self._model.length()

    def prefill(self, ids: Sequence[int]) -> Floats:
        """See `Stepper`."""
        self._model.reset()
        return np.asarray(self._model.prefill(ids))

    def verify(self, tokens: Sequence[int]) -> Floats:
        """See `Stepper`."""
        return np.asarray(self._model.forward([(token, 0) for token in tokens], range(len(tokens))))

    def best(self, tokens: Sequence[int]) -> list[int]:
        """See `Stepper`."""
        values, ids = self._model.top([(token, 0) for token in tokens], range(len(tokens)))
        require_finite(float(np.asarray(values).max()))
        return [int(row) for row in np.asarray(ids)[:, 0]]

    def truncate(self, length: int) -> None:
        """See `Stepper`."""
        self._model.truncate(0, length)

    def last_keys_values(self) -> tuple[Floats, Floats]:
        """See `Stepper`."""
        return self._model.last_keys_values(0)


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
        return layer.keys[0].float().cpu().numpy(), layer.values[0].float().cpu().numpy()

    def _forward(self, ids: Sequence[int], wanted: int) -> Floats:
        step = torch.tensor([list(ids)], device=self._model.device)
        options: dict[str, Any] = {"logits_to_keep": wanted} if self._keeps else {}
        with torch.inference_mode():
            output = self._model(input_ids=step, past_key_values=self._cache, use_cache=True, **options)
            self._cache = output.past_key_values
            logits: Floats = output.logits[0, -wanted:].float().cpu().numpy()
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
