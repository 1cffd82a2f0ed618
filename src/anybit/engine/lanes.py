"""Several texts side by side through one nested model, all at the same precision in a pass.

For schedules that are tuned, trained and measured: many texts at once, steps taken back, last-layer keys and values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from anybit.engine.native import NativeModel

Array = NDArray[np.float32]
LANES = 16


class Lanes(Protocol):
    """What measuring schedules needs of a model. A lane is one text.

    Attributes:
        precisions: that it can run at, ascending.
        count: lanes.
        context: longest text, in tokens; None for no limit.
        end_ids: tokens that end a text.
    """

    precisions: tuple[int, ...]
    count: int
    context: int | None
    end_ids: frozenset[int]

    def read(self, lane: int, ids: Sequence[int], bits: int) -> Array:
        """Begin a text in a lane; logits float32 [vocabulary] after its last token."""
        ...

    def step(self, tokens: Mapping[int, int], bits: int) -> Array:
        """Append one token to each of some lanes; logits float32 [len(tokens), vocabulary] in that order."""
        ...

    def extend(self, lane: int, ids: Sequence[int], bits: int) -> Array:
        """Append tokens as if one by one; logits float32 [len(ids), vocabulary] after each."""
        ...

    def length(self, lane: int) -> int:
        """Tokens a lane holds."""
        ...

    def keep(self, lane: int, length: int) -> None:
        """Forget a lane's tokens from `length` on, as if they had never been run."""
        ...

    def last_keys_values(self, lane: int) -> tuple[Array, Array]:
        """Keys and values of the last layer, float32 [kv_heads, T, head_dim] each."""
        ...


def open_lanes(directory: str | Path, engine: str = "auto", longest: int = 1024) -> Lanes:
    """Lanes of a checkpoint.

    Args:
        directory: what `anybit quantize` wrote.
        engine: `native`, `torch`, or `auto`: native where it can.
        longest: tokens of the longest text.

    Raises:
        KernelUnavailable: `native` cannot run this model. Others: those of `NativeModel.open` and `anybit.load`.
    """
    from anybit.engine.open import native_refusal

    if engine == "native" or (engine == "auto" and not native_refusal(Path(directory))):
        model = NativeModel.open(directory, max_tokens=LANES * longest, max_sequences=LANES)
        return NativeLanes(model, LANES)
    from anybit.loading import load

    slow = load(directory)
    ends = slow.generation_config.eos_token_id if slow.generation_config is not None else None
    end_ids = frozenset([ends] if isinstance(ends, int) else ends or [])
    return TorchLanes(slow, slow.precision, end_ids)


class LaneFeatures:
    """`engine.schedule.Features` of one lane."""

    def __init__(self, lanes: Lanes, lane: int) -> None:
        self._lanes, self._lane = lanes, lane

    def last_keys_values(self) -> tuple[Array, Array]:
        """See `Features`."""
        return self._lanes.last_keys_values(self._lane)


class NativeLanes:
    """The slots of a native model: a pass over many lanes reads the weights once."""

    def __init__(self, model: NativeModel, count: int) -> None:
        """`count`: slots the model was opened with."""
        self._model, self.count = model, count
        self.precisions: tuple[int, ...] = model.precision.available
        self.context: int | None = model.context
        self.end_ids: frozenset[int] = model.end_ids

    def read(self, lane: int, ids: Sequence[int], bits: int) -> Array:
        """See `Lanes`."""
        self._model.precision.bits = bits
        self._model.reset(lane)
        return np.asarray(self._model.prefill(ids, lane).numpy())

    def step(self, tokens: Mapping[int, int], bits: int) -> Array:
        """See `Lanes`."""
        self._model.precision.bits = bits
        return np.asarray(self._model.step(tokens).numpy())

    def extend(self, lane: int, ids: Sequence[int], bits: int) -> Array:
        """See `Lanes`."""
        self._model.precision.bits = bits
        return np.asarray(self._model.forward([(token, lane) for token in ids], range(len(ids))).numpy())

    def length(self, lane: int) -> int:
        """See `Lanes`."""
        return self._model.length(lane)

    def keep(self, lane: int, length: int) -> None:
        """See `Lanes`."""
        self._model.truncate(lane, length)

    def last_keys_values(self, lane: int) -> tuple[Array, Array]:
        """See `Lanes`."""
        return self._model.last_keys_values(lane)


class TorchLanes:
    """Lanes of a transformers model whose precision `precision.bits` sets; one text after the other, so slow."""

    def __init__(self, model: Any, precision: Any, end_ids: frozenset[int], count: int = 8) -> None:
        """`precision`: `.bits` sets, `.available` lists the widths."""
        self._model, self._precision = model, precision
        self.precisions: tuple[int, ...] = tuple(sorted(precision.available))
        self.count, self.end_ids = count, end_ids
        self.context: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._caches: dict[int, Any] = {}

    def read(self, lane: int, ids: Sequence[int], bits: int) -> Array:
        """See `Lanes`."""
        self._caches.pop(lane, None)
        return self._forward(lane, ids, bits)[-1]

    def step(self, tokens: Mapping[int, int], bits: int) -> Array:
        """See `Lanes`."""
        return np.concatenate([self._forward(lane, [token], bits) for lane, token in tokens.items()])

    def extend(self, lane: int, ids: Sequence[int], bits: int) -> Array:
        """See `Lanes`."""
        return self._forward(lane, ids, bits)

    def length(self, lane: int) -> int:
        """See `Lanes`."""
        return int(self._caches[lane].get_seq_length())

    def keep(self, lane: int, length: int) -> None:
        """See `Lanes`."""
        surplus = self.length(lane) - length
        if surplus:
            self._caches[lane].crop(-surplus)

    def last_keys_values(self, lane: int) -> tuple[Array, Array]:
        """See `Lanes`."""
        last = self._caches[lane].layers[-1]
        return last.keys[0].float().cpu().numpy(), last.values[0].float().cpu().numpy()

    def last_hidden(self, ids: Sequence[int], bits: int) -> Array:
        """The hidden state before the last norm of a text of its own, float32 [T, hidden]."""
        self._precision.bits = bits
        with torch.inference_mode():
            out = self._model(input_ids=self._row(ids), use_cache=False, output_hidden_states=True)
        return np.asarray(out.hidden_states[-1][0].float().cpu().numpy())

    def _forward(self, lane: int, ids: Sequence[int], bits: int) -> Array:
        self._precision.bits = bits
        with torch.inference_mode():
            out = self._model(input_ids=self._row(ids), past_key_values=self._caches.get(lane), use_cache=True)
        self._caches[lane] = out.past_key_values
        return np.asarray(out.logits[0].float().cpu().numpy())

    def _row(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor([list(ids)], device=self._model.device)
