"""What the blocks of a model are called with, found without their weights.

The model runs with its embedding loaded and every block replaced by a stand-in, so position embeddings, masks and
per-layer arguments are the model's own and no architecture needs code here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from anybit.models.graph import bind_call

Call = tuple[Tensor, dict[str, Any]]


class _Enough(Exception):
    """The last recorder has been reached: the head need not run."""


class _StandIn(nn.Module):
    """In place of a block: notes its arguments and hands on the hidden states, or `replay` where given."""

    def __init__(self, block: nn.Module, calls: list[Call], tuples: bool) -> None:
        super().__init__()
        self.block, self._calls, self._tuples = block, calls, tuples
        self.replay: Tensor | None = None
        self.last = False

    def __getattr__(self, name: str) -> Any:
        """Models read attributes of their blocks (`attention_type`), so unknown names are the block's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Record, then pass through, replay or stop."""
        hidden, rest = bind_call(self.block, args, kwargs)
        self._calls.append((hidden, rest))
        if self.last and self.replay is None:
            raise _Enough
        out = hidden if self.replay is None else self.replay
        return (out, None) if self._tuples else out


class Entry:
    """The way into and out of the blocks of `model`, whose embedding and other `pre` modules are loaded."""

    def __init__(self, model: nn.Module, blocks: Sequence[str]) -> None:
        self._model, self._blocks = model, blocks
        self._arguments: dict[int, list[dict[str, Any]]] = {}

    def hidden(self, ids: Tensor) -> Tensor:
        """Hidden states float32 [1, T, H] that token ids int64 [T] send into the first block."""
        return self._run(ids, self._blocks[:1], tuples=False)[0][0][0]

    def arguments(self, ids: Tensor) -> list[dict[str, Any]]:
        """The keyword arguments of every block for token ids [T]; they depend on T alone and are computed once for
        each."""
        if len(ids) not in self._arguments:
            self._arguments[len(ids)] = [rest for _, rest in self._run(ids, self._blocks, self._tuples(ids))[0]]
        return self._arguments[len(ids)]

    def logits(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Logits [T, V] that follow each of token ids [T] when `hidden` [1, T, H] leaves the last block."""
        return self._run(ids, self._blocks, self._tuples(ids), hidden)[1][0]

    def _tuples(self, ids: Tensor) -> bool:
        """Whether this model wants tuples from its blocks: one that does takes a bare tensor apart and loses its
        first axis."""
        calls = self._run(ids, self._blocks[:2], tuples=False)[0]
        return calls[-1][0].dim() != calls[0][0].dim()

    def _run(
        self, ids: Tensor, blocks: Sequence[str], tuples: bool, replay: Tensor | None = None
    ) -> tuple[list[Call], Tensor]:
        calls: list[Call] = []
        originals = {name: self._model.get_submodule(name) for name in blocks}
        stand_ins = {name: _StandIn(block, calls, tuples) for name, block in originals.items()}
        stand_ins[blocks[-1]].last, stand_ins[blocks[-1]].replay = True, replay
        logits = torch.empty(0)
        try:
            for name, stand_in in stand_ins.items():
                self._model.set_submodule(name, stand_in)
            with torch.no_grad():
                logits = self._model(input_ids=ids[None], use_cache=False).logits
        except _Enough:
            pass
        finally:
            for name, block in originals.items():
                self._model.set_submodule(name, block)
        return calls, logits
