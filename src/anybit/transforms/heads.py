"""Attention heads of a block, found by shape: where values are made and read. What holds is decided by trial (`trial.py`)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from anybit.models.graph import BlockGraph
from anybit.models.structure import is_norm


@dataclass(frozen=True)
class Values:
    """Rows of `producer` that make the values, and `consumer`, whose columns read them, each key/value head `repeat` times.

    rows: int64 [kv_heads * head_dim], by head.
    """

    producer: str
    consumer: str
    rows: Tensor
    head_dim: int
    repeat: int

    def bias(self, block: nn.Module) -> Tensor | None:
        """The producer's whole bias, if it has one."""
        return block.get_submodule(self.producer)._parameters.get("bias")

    @property
    def columns(self) -> Tensor:
        """int64 [kv_heads, repeat, head_dim]: the consumer's columns."""
        return torch.arange(len(self.rows) * self.repeat).view(-1, self.repeat, self.head_dim)


def head_dim(block: nn.Module) -> int | None:
    """Of the block's attention, as its module says."""
    for module in block.modules():
        for name in ("head_dim", "head_size"):
            if isinstance(found := getattr(module, name, None), int):
                return found
    return None


def value_pairs(block: nn.Module, graph: BlockGraph) -> Iterator[Values]:
    """Candidates (a linear, the linear after it) whose shapes fit attention: values alone, or query, key and value in one."""
    size = head_dim(block)
    groups = [group for group in graph.groups if group.expert is None]
    for index, group in enumerate(groups):
        if size is None or group.norm is not None or len(group.linears) != 1:
            continue
        consumer = group.linears[0]
        columns = block.get_parameter(f"{consumer}.weight").shape[1]
        for producer in (name for earlier in groups[:index] for name in earlier.linears):
            for rows in _value_rows(block.get_parameter(f"{producer}.weight").shape[0], columns, size):
                if columns % len(rows) == 0:
                    yield Values(producer, consumer, rows, size, columns // len(rows))


def _value_rows(rows: int, columns: int, size: int) -> Iterator[Tensor]:
    index = torch.arange(rows)
    if rows % size or columns % size:
        return
    if rows <= columns and columns % rows == 0:
        yield index
    if rows > columns and (rows - columns) % 2 == 0:
        values = (rows - columns) // 2
        if values % size == 0 and columns % values == 0:
            yield index[rows - values :]  # all queries, all keys, all values
    if rows == 3 * columns:
        yield index.view(-1, 3, size)[:, 2].reshape(-1)  # head by head


@dataclass(frozen=True)
class QueryKey:
    """Modules that write queries and keys (linears, or norms of them), and which of their outputs: int64 [heads, head_dim]
    and [kv_heads, head_dim]; norms of one head's width count as one head."""

    query: str
    key: str
    query_rows: Tensor
    key_rows: Tensor

    @property
    def head_dim(self) -> int:
        """Channels a head."""
        return self.key_rows.shape[1]

    def key_width(self, block: nn.Module) -> int:
        """Outputs of the key module."""
        return len(block.get_parameter(f"{self.key}.weight"))


def query_key_pairs(block: nn.Module, graph: BlockGraph) -> Iterator[QueryKey]:
    """Candidates whose shapes fit, in the order they run: two linears, parts of one linear, two norms inside attention."""
    size = head_dim(block)
    if size is None:
        return
    widths = {name: len(block.get_parameter(f"{name}.weight")) for name in graph.linears}
    for group in graph.groups:
        if group.norm is None or group.expert is not None:
            continue
        for query, key in itertools.combinations(group.linears, 2):
            if widths[query] % widths[key] == 0 and widths[key] % size == 0:
                yield QueryKey(query, key, *(torch.arange(widths[n]).view(-1, size) for n in (query, key)))
        for name in group.linears:
            for later in graph.groups[graph.groups.index(group) + 1 :]:
                columns = block.get_parameter(f"{later.linears[0]}.weight").shape[1]
                yield from (QueryKey(name, name, *rows) for rows in _fused_rows(widths[name], columns, size))
    outer = {group.norm for group in graph.groups}
    norms = [n for n, m in block.named_modules() if is_norm(m) and n not in outer]
    rows = {n: torch.arange(len(block.get_parameter(f"{n}.weight"))) for n in norms}
    for query, key in itertools.combinations([n for n in norms if len(rows[n]) % size == 0], 2):
        if len(rows[query]) % len(rows[key]) == 0:
            yield QueryKey(query, key, rows[query].view(-1, size), rows[key].view(-1, size))


def _fused_rows(rows: int, columns: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Query and key rows of one linear that also makes the values; `columns` of what reads them are the query heads'."""
    index, keys = torch.arange(rows), (rows - columns) // 2
    if columns % size or rows % size or keys <= 0 or (rows - columns) % 2 or keys % size or columns % keys:
        return
    yield index[:columns].view(-1, size), index[columns : columns + keys].view(-1, size)
    if rows == 3 * columns:
        by_head = index.view(-1, 3, size)
        yield by_head[:, 0], by_head[:, 1]
