"""A model that drafts for itself: the same planes, read at fewer bits, as `generate(assistant_model=...)`."""

from __future__ import annotations

import copy
from typing import cast

from transformers import PreTrainedModel

from anybit.errors import InputError
from anybit.layers.linear import Terms
from anybit.layers.precision import Precision


def at_precision(model: PreTrainedModel, bits: int) -> PreTrainedModel:
    """A second model over the tensors of `model`, none of them copied, that runs at its own precision.

    Raises:
        InputError: not an anybit model, or a precision that it does not hold.
    """
    precision = getattr(model, "precision", None)
    if not isinstance(precision, Precision):
        raise InputError(f"{type(model).__name__} holds no precisions; load it from an anybit checkpoint")
    for module in model.modules():
        if isinstance(module, Terms):
            module.forget()
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, memo=shared)
    cast(Precision, twin.precision).bits = bits
    return twin
