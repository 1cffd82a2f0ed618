"""Learns scales, clips and corrections of one block (`methods/abq.py`), before its linears are quantized.

Deterministic for any number of threads: every sample's gradient is one task, gradients are added in sample order.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from anybit.calibration.activations import Activations
from anybit.calibration.parallel import Workers
from anybit.calibration.statistics import BlockCall, collect
from anybit.errors import RecipeError
from anybit.formats.activation import ActivationSpec
from anybit.methods.abq import ABQ, Learned, attention_loss, block_loss, first_scales, through
from anybit.methods.activations import ActivationMethod
from anybit.methods.grid import AffineGrid
from anybit.models.graph import BlockGraph
from anybit.models.pairs import ScalePair, scale_pairs


@dataclass(frozen=True)
class Lesson:
    """What a block is taught with.

    Attributes:
        original: the float block.
        source: what enters the block in the quantized model.
        stream: the float model's hidden states after this block.
        own: room for the float block's outputs on `source`.
        maps: room for its attention maps there, float32 [T, T] a sample.
        grids, inputs: how weights and inputs of its linears, by name in the block, will be rounded.
        corrected: whether it gets the rank-1 correction.
    """

    original: nn.Module
    source: Activations
    stream: Activations
    own: Activations
    maps: Activations
    grids: Mapping[str, AffineGrid]
    inputs: Mapping[str, ActivationMethod]
    corrected: bool


def learn_block(call: BlockCall, graph: BlockGraph, method: ABQ, lesson: Lesson, pool: Workers) -> str:
    """Leaves in the block the learned float weights, clamped so that min-max rounding gives the learned codes; says what it did.

    Raises:
        RecipeError: a linear's input has static scales, which do not exist yet.
    """
    for name, inputs in lesson.inputs.items():
        if inputs.needs:
            raise RecipeError(f"learn: '{method.name}' learns with dynamic activations, {name} has static ones")
    corrected = [name for name in graph.groups[-1].linears if name in lesson.grids] if lesson.corrected else []
    parameters = {name: p for name, p in call.block.named_parameters() if p.is_floating_point()}
    pairs = _first_scales(call, graph, lesson.source, method, pool) if method.transform else []
    learned = Learned(method, parameters, pairs, lesson.grids, corrected)
    if not learned.groups:
        return f"nothing to learn here for {method.name}"
    training = _Training(call, method, lesson, learned, pool)
    before, after = training.run()
    with torch.no_grad():
        for name, value in learned.float_parameters().items():
            parameters[name].copy_(value)
        for name in lesson.grids:
            weight = parameters[f"{name}.weight"]
            weight.copy_(learned.clipped(name, weight))
    return f"learned by {method.name}: {len(pairs)} pairs scaled, {len(corrected)} corrected, loss {before:.4g} -> {after:.4g}"


def _first_scales(
    call: BlockCall, graph: BlockGraph, source: Activations, method: ABQ, pool: Workers
) -> list[tuple[ScalePair, Tensor]]:
    pairs = [p for p in scale_pairs(call.block, source.read(0), call.arguments, graph) if p.expert is None]
    firsts = [group.linears[0] for group in graph.groups if group.experts is None]
    counted = None if method.first_token else dict.fromkeys(firsts, 0.0)
    statistics = collect(call, source, firsts, frozenset({"max_abs"}), pool, counted)
    largest = {name: statistics[g.linears[0]].max_abs for g in graph.groups if g.experts is None for name in g.linears}
    found = []
    for pair in pairs:
        seen = next((largest[name] for name in pair.consumers if largest.get(name) is not None), None)
        if seen is not None:
            weights = [call.block.get_parameter(f"{name}.weight") for name in pair.consumers]
            found.append((pair, first_scales(pair, seen, weights, method.alpha)))
    return found


class _Training:
    """Steps of AdamW over the samples; every step writes rounded weights into the block and reads gradients off them."""

    def __init__(self, call: BlockCall, method: ABQ, lesson: Lesson, learned: Learned, pool: Workers) -> None:
        self.call, self.method, self.lesson, self.learned, self.pool = call, method, lesson, learned, pool
        mask = causal(call.arguments.get("attention_mask"), lesson.source.shape[0]) if method.attention else {}
        self.arguments = {**call.arguments, **mask}

    def run(self) -> tuple[float, float]:
        """Mean loss of a sample in the first and in the last epoch."""
        samples, lesson = self.lesson.source.samples, self.lesson
        blocks = (lesson.original, self.call.block)
        with (
            _eager(blocks, self.method.attention),
            _watched(blocks) as seen,
            _rounded_inputs(self.call.block, lesson.inputs),
        ):
            self.seen = seen
            for start in range(0, samples, self.call.in_flight):
                self.pool.map(self._write_targets, range(start, min(start + self.call.in_flight, samples)))
            optimizer = torch.optim.AdamW(self.learned.groups, weight_decay=0.0)
            losses = [
                self._step(optimizer, range(start, min(start + self.method.batch, samples)))
                for _ in range(self.method.epochs)
                for start in range(0, samples, self.method.batch)
            ]
        steps = math.ceil(samples / self.method.batch)
        return sum(losses[:steps]) / steps, sum(losses[-steps:]) / steps

    def _write_targets(self, sample: int) -> None:
        with torch.no_grad():
            out, attention = self._run(self.lesson.original, sample)
        self.lesson.own.write(sample, out)
        if attention is not None:
            self.lesson.maps.write(sample, attention)

    def _run(self, block: nn.Module, sample: int) -> tuple[Tensor, Tensor | None]:
        """The block's output [1, T, H] and its attention map [T, T], mean over heads; None where its attention returns none."""
        self.seen.maps = []
        out = block(self.lesson.source.read(sample), **self.arguments)
        maps = self.seen.maps
        return (out if isinstance(out, Tensor) else out[0]), (torch.stack(maps).mean(0) if maps else None)

    def _step(self, optimizer: torch.optim.Optimizer, samples: range) -> float:
        with torch.enable_grad():
            made = self.learned.rounded()
        moving = {name: value for name, value in made.items() if value.requires_grad}
        parameters = [self.call.block.get_parameter(name) for name in moving]
        for parameter, value in zip(parameters, moving.values(), strict=True):
            parameter.data.copy_(value.detach())
            parameter.requires_grad_(True)
        found = []
        for start in range(samples.start, samples.stop, self.call.in_flight):
            some = range(start, min(start + self.call.in_flight, samples.stop))
            found += self.pool.map(lambda sample: self._gradients(sample, parameters), some)
        for parameter in parameters:
            parameter.requires_grad_(False)
        totals = [_total([gradients[at] for _, gradients in found], p) / len(found) for at, p in enumerate(parameters)]
        optimizer.zero_grad()
        torch.autograd.backward(list(moving.values()), totals)
        optimizer.step()
        return sum(loss for loss, _ in found) / len(found)

    def _gradients(self, sample: int, parameters: Sequence[Tensor]) -> tuple[float, tuple[Tensor | None, ...]]:
        with torch.enable_grad():
            out, attention = self._run(self.call.block, sample)
            targets = [self.lesson.stream.read(sample), self.lesson.own.read(sample)]
            loss = block_loss(out, targets, self.method.relative)
            if attention is not None:
                loss = loss + attention_loss(attention, self.lesson.maps.read(sample)[0])
            return float(loss.detach()), torch.autograd.grad(loss, parameters, allow_unused=True)


def causal(mask: Tensor | None, tokens: int) -> dict[str, Tensor]:
    """The mask as eager attention adds it to scores [1, 1, T, T]: fused attention is causal by itself and often gets none."""
    if mask is None:
        mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool).tril()
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    return {"attention_mask": mask}


def _total(gradients: Sequence[Tensor | None], like: Tensor) -> Tensor:
    total = torch.zeros_like(like)
    for gradient in gradients:
        if gradient is not None:  # an expert that no token of a sample reached
            total += gradient
    return total


@contextmanager
def _eager(blocks: Sequence[nn.Module], on: bool) -> Iterator[None]:
    """Within it, attention is computed in the open, so that modules return its probabilities."""
    configs = {id(c): c for block in blocks for m in block.modules() if (c := getattr(m, "config", None)) is not None}
    before = {key: config._attn_implementation for key, config in configs.items()} if on else {}
    for key in before:
        configs[key]._attn_implementation = "eager"
    try:
        yield
    finally:
        for key, value in before.items():
            configs[key]._attn_implementation = value


@contextmanager
def _watched(blocks: Sequence[nn.Module]) -> Iterator[Any]:
    """Within it, attention probabilities [1, heads, T, T] that a module returns are kept in `.maps`, a list of the calling
    thread's own, as means over heads [T, T]."""
    seen = threading.local()

    def keep(_: nn.Module, __: object, out: object) -> None:
        if isinstance(out, tuple) and len(out) > 1 and isinstance(out[1], Tensor) and out[1].dim() == 4:
            seen.maps.append(out[1][0].mean(0))

    handles = [module.register_forward_hook(keep) for block in blocks for module in block.modules()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _rounded_inputs(block: nn.Module, inputs: Mapping[str, ActivationMethod]) -> Iterator[None]:
    """Within it, linears read their inputs rounded by their schemes; gradients pass straight through."""

    def rounding(spec: ActivationSpec) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        def values(x: Tensor) -> Tensor:
            return spec.encode(x.detach().reshape(-1, x.shape[-1]), {}).values().view(x.shape)

        return lambda _, args: (through(args[0], values), *args[1:])

    handles = [block.get_submodule(n).register_forward_pre_hook(rounding(m.spec())) for n, m in inputs.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
