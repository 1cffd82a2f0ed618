"""Statistics of the inputs of a block's linears: Hessians and row samples, streamed a few samples at a time.

Deterministic for any number of threads: each calibration sample runs as one task, each Hessian is added up in strips of
`STRIP` columns, each strip by one task and in sample order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from anybit.calibration.activations import Activations
from anybit.calibration.parallel import Workers
from anybit.methods.base import InputStats
from anybit.models.graph import run_block

STRIP = 256
SAMPLED_ROWS = 512  # rows of X kept for methods that search on inputs (AWQ's clip search uses as many)


@dataclass(frozen=True)
class BlockCall:
    """One block with what it is called with: `block(hidden, **arguments)`; `in_flight` samples run at once."""

    block: nn.Module
    arguments: dict[str, Any]
    in_flight: int = 4
    hooks: list[RemovableHandle] = field(default_factory=list)
    prefix: str = ""

    def full_name(self, name: str) -> str:
        """Of a module of the block, from the root of the model; `prefix` is the block's own name."""
        return f"{self.prefix}.{name}" if self.prefix else name

    def attach(self, name: str, function: Callable[[Tensor], Tensor]) -> None:
        """From now on the linear `name` of the block reads `function` of its input; statistics taken later see that too."""
        linear = self.block.get_submodule(name)
        self.hooks.append(linear.register_forward_pre_hook(lambda _, args: (function(args[0]), *args[1:])))

    def detach(self) -> None:
        """Take back every `attach`."""
        while self.hooks:
            self.hooks.pop().remove()

    def run(self, hidden: Tensor) -> Tensor:
        """Hidden states [1, T, H] to hidden states [1, T, H]."""
        return run_block(self.block, hidden, self.arguments)


class _Stop(Exception):
    """Every wanted input has been seen: the rest of the block need not run."""


def collect(
    call: BlockCall,
    source: Activations,
    linears: Sequence[str],
    needs: frozenset[str],
    pool: Workers,
    first_token: Mapping[str, float] | None = None,
) -> dict[str, InputStats]:
    """Statistics of the input of each named linear over every sample of `source`.

    `linears` holds one name per distinct input, in execution order; `needs` is a subset of {"hessian", "inputs",
    "mean_abs", "max_abs", "range"}.
    `first_token` says, by linear, as how many tokens the first of each sample counts in the Hessian (default 1); 0 leaves it out
    of all statistics.
    A linear that no token reached gets `tokens == 0`.
    """
    weights = first_token or {}
    widths = {name: call.block.get_parameter(f"{name}.weight").shape[1] for name in linears}
    sums = {name: _Sum(widths[name], needs, source.samples, weights.get(name, 1.0)) for name in linears}
    with _capturing(call.block, linears) as captured:

        def task(sample: int) -> dict[str, Tensor]:
            captured.inputs = {}
            with suppress(_Stop):
                call.run(source.read(sample))
            return captured.inputs

        for start in range(0, source.samples, call.in_flight):
            inputs = pool.map(task, range(start, min(start + call.in_flight, source.samples)))
            for name, total in sums.items():
                total.add([x[name] for x in inputs if name in x], pool)
    return {name: total.result() for name, total in sums.items()}


class _Sum:
    """Running statistics of one input."""

    def __init__(self, columns: int, needs: frozenset[str], samples: int, first_token: float) -> None:
        self.tokens, self.first_token, self.counted = 0, first_token, 0.0
        self.hessian = torch.zeros(columns, columns) if "hessian" in needs else None
        self.absolute = torch.zeros(columns) if "mean_abs" in needs else None
        self.largest: list[Tensor] | None = [] if "max_abs" in needs else None
        self.ranges: list[Tensor] | None = [] if "range" in needs else None
        self.rows: list[Tensor] = []
        self._keep = -(-SAMPLED_ROWS // samples) if "inputs" in needs else 0

    def add(self, inputs: list[Tensor], pool: Workers) -> None:
        """Add the inputs [T_i, K] of a few samples, in order."""
        if self.first_token == 0:
            inputs = [x[1:] for x in inputs]
        self.tokens += sum(len(x) for x in inputs)
        self.counted += sum(len(x) + max(self.first_token - 1, 0) for x in inputs)
        if self.hessian is not None:
            total, weighted = self.hessian, inputs
            if self.first_token > 1:
                weighted = [torch.cat([x[:1] * self.first_token**0.5, x[1:]]) for x in inputs]

            def strip(start: int) -> None:
                for x in weighted:
                    total[start : start + STRIP].addmm_(x[:, start : start + STRIP].t(), x)

            pool.map(strip, range(0, total.shape[0], STRIP))
        if self.absolute is not None:
            for x in inputs:
                self.absolute += x.abs().sum(0)
        if self.largest is not None:
            self.largest += [x.abs().amax(0) for x in inputs if len(x)]
        if self.ranges is not None:
            self.ranges += [torch.stack([x.amin(0), x.amax(0)]) for x in inputs if len(x)]
        if self._keep:
            self.rows += [x[torch.linspace(0, len(x) - 1, min(self._keep, len(x))).long()] for x in inputs if len(x)]

    def result(self) -> InputStats:
        """The statistics over everything added."""
        hessian = None if self.hessian is None else self.hessian.mul_(2 / max(self.counted, 1))
        absolute = None if self.absolute is None else self.absolute / max(self.tokens, 1)
        rows, largest = (
            (torch.cat(self.rows) if self.rows else None),
            (torch.stack(self.largest) if self.largest else None),
        )
        ranges = torch.stack(self.ranges) if self.ranges else None
        return InputStats(self.tokens, hessian, rows, absolute, sample_max=largest, sample_range=ranges)


@contextmanager
def _capturing(block: nn.Module, linears: Sequence[str]) -> Iterator[Any]:
    """Within it, the inputs [T, K] of the named linears land in `.inputs`, a dict of the calling thread's own."""
    captured = threading.local()
    # A mixture of experts runs its experts in any order and not all of them, so there only the block's end is the end.
    stop_at = linears[-1] if not any("experts" in name.split(".") for name in linears) else None

    def hook(name: str) -> Any:
        def before(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach().reshape(-1, args[0].shape[-1])
            seen = captured.inputs.get(name)
            captured.inputs[name] = x if seen is None else torch.cat([seen, x])
            if name == stop_at:
                raise _Stop

        return before

    handles = [block.get_submodule(name).register_forward_pre_hook(hook(name)) for name in linears]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def propagate(call: BlockCall, source: Activations, target: Activations, pool: Workers) -> None:
    """Run every sample of `source` through the block into `target`."""
    pool.map(lambda sample: target.write(sample, call.run(source.read(sample))), range(source.samples))
