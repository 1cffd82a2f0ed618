"""Channel shift: take the middle of its range from every input channel of a linear, and let the bias give it back.

W x + b = W (x - c) + (b + W c), c_j = (max x_j + min x_j) / 2: a range that lay to one side of 0 comes to lie around it, as
symmetric quantizers want it. c goes into the bias of what writes x (a layer norm, or the value projection: attention
weights sum to 1). Only biases that the model has are used, since its layers have no place for others; models without
any (Llama) are left as they are.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

from torch import Tensor, nn

from anybit.calibration.activations import Activations
from anybit.calibration.parallel import Workers
from anybit.calibration.statistics import BlockCall, collect
from anybit.methods.base import InputStats
from anybit.models.graph import BlockGraph
from anybit.models.pairs import ScalePair, scale_pairs
from anybit.transforms.base import Transform
from anybit.transforms.smooth import per_scale
from anybit.transforms.trial import Trial


class Shift(Transform):
    """No options: everything that folds is shifted."""

    name: ClassVar[str] = "shift"

    def apply(self, call: BlockCall, graph: BlockGraph, source: Activations, pool: Workers) -> list[str]:
        """Shift the block; a note per reader of a shifted or, for want of a bias, unshifted input."""
        block = call.block
        pairs = [p for p in scale_pairs(block, source.read(0), call.arguments, graph) if p.expert is None]
        usable = [
            pair for pair in pairs if all(_bias(block, name) is not None for name in (pair.producer, *pair.consumers))
        ]
        firsts = [g.linears[0] for g in graph.groups if any(g.linears[0] in p.consumers for p in usable)]
        statistics = collect(call, source, firsts, frozenset({"range"}), pool) if usable else {}
        notes = [
            f"{name}: not shifted, a bias is missing" for pair in pairs if pair not in usable for name in pair.consumers
        ]
        for pair in usable:
            middle = _middle(pair, next(statistics[name] for name in pair.consumers if name in statistics))
            if Trial(call, source).keeps((pair.producer, *pair.consumers), partial(_shift, block, pair, middle)):
                reach = float(middle.abs().max())
                notes += [f"{name}: input shifted by up to {reach:.3g}" for name in pair.consumers]
        return notes


def _middle(pair: ScalePair, stats: InputStats) -> Tensor:
    """c float32 [pair.size]."""
    assert stats.low is not None
    assert stats.high is not None
    return (per_scale(pair, stats.high) - per_scale(pair, -stats.low)) / 2


def _shift(block: nn.Module, pair: ScalePair, middle: Tensor) -> None:
    producer = _bias(block, pair.producer)
    assert producer is not None
    producer[slice(*pair.rows)] -= middle
    for name in pair.consumers:
        bias = _bias(block, name)
        assert bias is not None
        bias += (block.get_parameter(f"{name}.weight").double() @ pair.columns(middle).double()).to(bias)


def _bias(block: nn.Module, name: str) -> Tensor | None:
    return block.get_submodule(name)._parameters.get("bias")
