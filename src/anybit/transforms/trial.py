"""Changes of a block that are kept only where its output stays: what a block allows is found by trying, not by its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from anybit.calibration.activations import Activations
from anybit.calibration.statistics import BlockCall

TOLERANCE = 1e-3  # of what the block adds to a token; a change that holds gives ~1e-6, one that does not ~1
ROUNDING = 3e-6  # of a token's largest value: below this a difference is float32 rounding of the residual sum
AGREEING = 0.98  # of the tokens: rounding may turn a router's choice at a tie, nothing else


@dataclass(frozen=True)
class Trial:
    """Tries changes on `call.block` with the first of its inputs, or on one of its experts with noise.

    Args:
        call: the block, with what runs at its linears' inputs.
        source: its inputs.
    """

    call: BlockCall
    source: Activations

    def keeps(self, modules: Sequence[str], change: Callable[[], None], expert: str = "") -> bool:
        """Make `change`, which touches parameters of `modules` in place; undo it and return False where the output of the
        block (or of the submodule `expert`, which a token may never reach) moves."""
        hidden, run = self._runner(expert)
        before = run()
        parameters = [p for name in modules for p in self.call.block.get_submodule(name).parameters()]
        saved = [parameter.detach().clone() for parameter in parameters]
        with torch.no_grad():
            change()
        if agrees(run(), before, hidden):
            return True
        with torch.no_grad():
            for parameter, value in zip(parameters, saved, strict=True):
                parameter.copy_(value)
        return False

    def _runner(self, expert: str) -> tuple[Tensor, Callable[[], Tensor]]:
        if not expert:
            hidden = self.source.read(0)
            return hidden, lambda: self.call.run(hidden)
        module = self.call.block.get_submodule(expert)
        linear = next(m for m in module.modules() if isinstance(m, nn.Linear))
        probe = torch.randn(8, linear.in_features, generator=torch.Generator().manual_seed(0))
        return torch.zeros(1), lambda: module(probe)


def agrees(after: Tensor, before: Tensor, hidden: Tensor) -> bool:
    """Whether outputs [..., T, H] are equal but for rounding, token by token; `hidden` is what went in.

    Every token counts alone: one with massive activations (1e4 in real models) would outvote all others in a maximum.
    """
    error = (after - before).abs().amax(-1)
    allowed = TOLERANCE * (before - hidden).abs().amax(-1) + ROUNDING * before.abs().amax(-1)
    return bool((error <= allowed).float().mean() >= AGREEING)
