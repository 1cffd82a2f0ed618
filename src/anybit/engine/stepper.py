"""One text at a time through a model, whatever runs it: a prompt in one piece, then token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray

from anybit.engine.native import NativeModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Stepper(Protocol):
    """What the generation loop needs of a model.

    Attributes:
        context: most tokens a text can have, None for no limit.
        end_ids: tokens that end a text; None: ask the tokenizer.
    """

    context: int | None
    end_ids: frozenset[int] | None

    def prefill(self, ids: Sequence[int]) -> NDArray[Any]:
        """Begin a text; logits float32 [vocabulary] after its last token."""
        ...

    def step(self, token: int) -> NDArray[Any]:
        """Append a token; logits float32 [vocabulary] after it."""
        ...


class NativeStepper:
    """A text in slot 0 of a native model."""

    def __init__(self, model: NativeModel) -> None:
        self._model = model
        self.context: int | None = model.context
        self.end_ids: frozenset[int] | None = model.end_ids or None

    def prefill(self, ids: Sequence[int]) -> NDArray[Any]:
        """See `Stepper`."""
        self._model.reset()
        return self._model.prefill(ids)

    def step(self, token: int) -> NDArray[Any]:
        """See `Stepper`."""
        return self._model.step({0: token})[0]


def stepper(model: PreTrainedModel | NativeModel) -> Stepper:
    """The stepper of either kind of model."""
    if isinstance(model, NativeModel):
        return NativeStepper(model)
    from anybit.engine.torch_stepper import TorchStepper  # the native engine runs without PyTorch

    return TorchStepper(model)
