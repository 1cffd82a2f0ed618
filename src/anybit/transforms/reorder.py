"""Channel reorder by salience (QoQ, arXiv 2405.04532, section on activation-aware reordering): channels of similar reach
come to share a group.

Salience of an input channel is max |x_j|; channels are sorted by it, ascending, only where the permutation folds into what
writes them: hidden units of the feed-forward part (rows of gate and up), and values within each key/value head (its rows
of the value projection; columns of every query head that reads it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from anybit.calibration.activations import Activations
from anybit.calibration.parallel import Workers
from anybit.calibration.statistics import BlockCall, collect
from anybit.models.graph import BlockGraph, InputGroup
from anybit.transforms.base import Transform
from anybit.transforms.heads import value_pairs
from anybit.transforms.trial import Trial


@dataclass(frozen=True)
class _Move:
    """Sort columns of `consumer` by salience, within each row of `slots` int64 [blocks, repeat, size], one order for all
    repeats; rows of each producer, int64 [blocks, size], follow."""

    consumer: str
    slots: Tensor
    producers: tuple[tuple[str, Tensor], ...]
    expert: str = ""


class Reorder(Transform):
    """No options: everything that folds is sorted."""

    name: ClassVar[str] = "reorder"

    def apply(self, call: BlockCall, graph: BlockGraph, source: Activations, pool: Workers) -> list[str]:
        """Permute the block; one note per linear whose input is sorted."""
        moves = [*_feed_forward(call.block, graph), *_values(call.block, graph)]
        firsts = [g.linears[0] for g in graph.groups if any(move.consumer == g.linears[0] for move in moves)]
        statistics = collect(call, source, firsts, frozenset({"max_abs"}), pool) if moves else {}
        done: set[str] = set()
        for move in moves:
            salience = statistics[move.consumer].max_abs
            if salience is None or move.consumer in done:
                continue
            order = salience[move.slots].amax(1).argsort(dim=-1, stable=True)
            modules = (move.consumer, *(name for name, _ in move.producers))
            if Trial(call, source).keeps(modules, permutation(call.block, move, order), move.expert):
                done.add(move.consumer)
        return [
            f"{name}: input channels sorted by salience"
            for name in dict.fromkeys(m.consumer for m in moves)
            if name in done
        ]


def permutation(block: nn.Module, move: _Move, order: Tensor) -> Callable[[], None]:
    """The change that puts channel `order[b, i]` of block b in place i; order int64 [blocks, size]."""

    def change() -> None:
        slots = move.slots
        sorted_slots = slots.gather(-1, order[:, None].expand_as(slots))
        weight = block.get_parameter(f"{move.consumer}.weight")
        weight[:, slots.reshape(-1)] = weight[:, sorted_slots.reshape(-1)]
        for name, rows in move.producers:
            sorted_rows = rows.gather(-1, order)
            for parameter in block.get_submodule(name).parameters():
                parameter[rows.reshape(-1)] = parameter[sorted_rows.reshape(-1)]

    return change


def _values(block: nn.Module, graph: BlockGraph) -> Iterator[_Move]:
    for values in value_pairs(block, graph):
        rows = values.rows.view(-1, values.head_dim)
        yield _Move(values.consumer, values.columns, ((values.producer, rows),))


def _feed_forward(block: nn.Module, graph: BlockGraph) -> Iterator[_Move]:
    """Candidates: the linears of one group write all channels (twice, gate and up, where they are one linear) of the next."""
    for index, group in enumerate(graph.groups):
        if group.norm is not None or len(group.linears) != 1:
            continue
        columns = block.get_parameter(f"{group.linears[0]}.weight").shape[1]
        for earlier in _same_expert(graph, index):
            producers = [(n, r) for n in earlier.linears for r in _rows(block, n, columns)]
            if {name for name, _ in producers} == set(earlier.linears):
                expert = f"{group.experts}.{group.expert}" if group.experts is not None else ""
                slots = torch.arange(columns).view(1, 1, -1)
                yield _Move(group.linears[0], slots, tuple(producers), expert)


def _same_expert(graph: BlockGraph, index: int) -> Iterator[InputGroup]:
    group = graph.groups[index]
    for earlier in graph.groups[:index]:
        if (earlier.experts, earlier.expert) == (group.experts, group.expert):
            yield earlier


def _rows(block: nn.Module, name: str, columns: int) -> list[Tensor]:
    rows = block.get_parameter(f"{name}.weight").shape[0]
    return [part.view(1, -1) for part in torch.arange(rows).split(columns)] if rows in (columns, 2 * columns) else []
