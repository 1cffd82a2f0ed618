"""AWQ's scale search on a block: which tensors may be scaled, what the inspected module makes of a candidate."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from torch import Tensor, nn

from anybit.calibration.activations import Activations
from anybit.calibration.parallel import Workers
from anybit.calibration.statistics import BlockCall, collect
from anybit.methods.awq import AWQScale
from anybit.models.graph import BlockGraph
from anybit.transforms.scale import ScalePair, apply_scale, scale_pairs


def scale_block(call: BlockCall, graph: BlockGraph, source: Activations, method: AWQScale, pool: Workers) -> list[str]:
    """Rescale the block in place where a search says it helps; returns one note per scaled linear."""
    block = call.block
    pairs = [p for p in scale_pairs(block, source.read(0), call.arguments, graph) if _eligible(block, p)]
    firsts = [group.linears[0] for group in graph.groups]
    wanted = [first for first in firsts if any(first in pair.consumers for pair in pairs)]
    statistics = collect(call, source, wanted, frozenset({"mean_abs"}), pool)
    notes = []
    for pair in pairs:
        mean_abs = next(statistics[name].mean_abs for name in pair.consumers if name in statistics)
        assert mean_abs is not None
        inspected = _inspected(pair)
        probe = _Probe(call, source, inspected, pair, min(method.samples, source.samples), pool)
        scales = method.search(mean_abs, [_weight(block, name) for name in pair.consumers], probe.loss)
        apply_scale(block, pair, scales)
        notes += [
            f"{name}: input scaled by AWQ, {float(scales.min()):.2f} to {float(scales.max()):.2f}"
            for name in pair.consumers
        ]
    return notes


def _eligible(block: nn.Module, pair: ScalePair) -> bool:
    """Not across grouped-query heads (as the reference), and not where a router or experts read the same norm."""
    linear = all(isinstance(block.get_submodule(name), nn.Linear) for name in pair.consumers)
    return (
        pair.repeat == 1 and pair.expert is None and linear and not any(".experts." in name for name in pair.consumers)
    )


def _inspected(pair: ScalePair) -> str:
    """The module whose output a candidate is judged by, "" for the whole block."""
    if pair.producer_kind == "linear":
        return pair.consumers[0]
    modules = zip(*(name.split(".")[:-1] for name in pair.consumers), strict=False)
    return ".".join(parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, modules))


class _Probe:
    """The inspected module with its recorded float inputs and outputs on a few calibration samples."""

    def __init__(
        self, call: BlockCall, source: Activations, inspected: str, pair: ScalePair, samples: int, pool: Workers
    ) -> None:
        self._block, self._pair, self._pool = call.block, pair, pool
        self._module = call.block.get_submodule(inspected) if inspected else call.block
        self._calls = [self._record(call, source.read(sample)) for sample in range(samples)]
        self._outputs = pool.map(lambda inputs: _run(self._module, inputs), self._calls)

    def _record(self, call: BlockCall, hidden: Tensor) -> tuple[Any, Any]:
        seen: list[tuple[Any, Any]] = []
        hook = self._module.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
        )
        try:
            call.run(hidden)
        finally:
            hook.remove()
        return seen[0]

    def loss(self, replacements: Sequence[Tensor]) -> float:
        """Mean squared change of the output with these weights in place of the consumers'."""
        weights = [_weight(self._block, name) for name in self._pair.consumers]
        saved = [weight.clone() for weight in weights]
        try:
            for weight, new in zip(weights, replacements, strict=True):
                weight.copy_(new)
            pairs = list(zip(self._calls, self._outputs, strict=True))
            losses = self._pool.map(lambda pair: float((_run(self._module, pair[0]) - pair[1]).square().mean()), pairs)
        finally:
            for weight, old in zip(weights, saved, strict=True):
                weight.copy_(old)
        return sum(losses) / len(losses)


def _run(module: nn.Module, inputs: tuple[Any, Any]) -> Tensor:
    out = module(*inputs[0], **inputs[1])
    return out if isinstance(out, Tensor) else out[0]


def _weight(block: nn.Module, name: str) -> Tensor:
    weight = block.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight
