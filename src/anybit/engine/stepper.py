"""One text at a time through a model, whatever runs it: a prompt in one piece, then token by token, or several at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from anybit.engine.drafting.pass_times import PassTimes
from anybit.engine.native import NativeModel
from anybit.engine.sampler import require_finite
from anybit.layers.precision import Precision

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Floats = NDArray[np.float32]


class Stepper(Protocol):
    """What the generation loop needs of a model.

    Attributes:
        context: most tokens a text can have, None for no limit.
        end_ids: tokens that end a text; None: ask the tokenizer.
        precision: bits in use from the next pass on.
        times: of the passes of this model so far, of all texts.
        inexact: why the rows of a pass differ from the same tokens one by one; empty when they are the same bits.
    """

    context: int | None
    end_ids: frozenset[int] | None
    precision: Precision
    times: PassTimes
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
        self.precision, self.times = model.precision, model.times

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


def stepper(model: PreTrainedModel | NativeModel) -> Stepper:
    """The stepper of either kind of model."""
    if isinstance(model, NativeModel):
        return NativeStepper(model)
    from anybit.engine.torch_stepper import TorchStepper

    return TorchStepper(model)
