"""Scale pairs: places where a block can be rescaled channel by channel without changing what it computes.

A producer's output channel j is divided by s_j and the matching columns of everything that reads it are multiplied by
s_j. Candidates are proposed by shape; each is then tried on the block itself with random powers of two, for which the
arithmetic is exact, and kept only when the output stays and when half of the change alone would have moved it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from anybit.models.graph import BlockGraph, InputGroup, Kwargs, run_block

_TOLERANCE = (
    1e-3  # of the change that one half of the rescale makes in a token; a true pair gives ~1e-6, a false one ~1
)
_ROUNDING = 1e-6  # of a token's largest value: below this a change is float32 rounding of the residual sum

Kind = Literal["norm", "norm1p", "linear"]


@dataclass(frozen=True)
class ScalePair:
    """`producer` channels `rows` (start, stop) feed the columns of every consumer; names are relative to the block.

    producer_kind: "norm" (gain w), "norm1p" (gain 1 + w, Gemma) or "linear" (rows of its weight).
    repeat, run: each run of `run` channels appears `repeat` times in a row among the columns (grouped-query attention:
    run = head_dim, repeat = query heads per key/value head); 1, 1 otherwise.
    expert: index when producer and consumers are one expert.
    """

    producer: str
    producer_kind: Kind
    rows: tuple[int, int]
    consumers: tuple[str, ...]
    repeat: int = 1
    run: int = 1
    expert: int | None = None

    @property
    def size(self) -> int:
        """Number of free scales."""
        return self.rows[1] - self.rows[0]

    def columns(self, s: Tensor) -> Tensor:
        """The factor of each consumer column: [size] -> [size * repeat]."""
        return s.reshape(-1, self.run).repeat_interleave(self.repeat, 0).reshape(-1)


def apply_scale(block: nn.Module, pair: ScalePair, s: Tensor) -> None:
    """Divides the producer's channels (weight and bias) by `s` and multiplies the consumers' columns by it, in place.

    `s`: float [pair.size], positive and finite; ValueError otherwise.
    """
    if s.shape != (pair.size,) or not bool(torch.isfinite(s).all() and (s > 0).all()):
        raise ValueError(f"{pair.producer}: scales must be {pair.size} positive finite numbers, got {tuple(s.shape)}")
    _divide_producer(block, pair, s)
    _multiply_consumers(block, pair, s)


def scale_pairs(block: nn.Module, hidden: Tensor, kwargs: Kwargs, graph: BlockGraph) -> list[ScalePair]:
    """All pairs of `block` (real, float32) verified on `hidden` [1, T, H], in the order of the consumers.

    T of 8 or more is enough; each candidate costs two runs of the block. The block is left bit for bit as it was.
    """
    reference = run_block(block, hidden, kwargs)
    pairs: list[ScalePair] = []
    for candidate in _candidates(block, graph):
        if any(replace(pair, producer_kind=candidate.producer_kind) == candidate for pair in pairs):
            continue  # a plain gain already holds: no need to try 1 + gain
        if candidate.expert is None:
            holds = _holds(block, candidate, lambda: run_block(block, hidden, kwargs), reference)
        else:
            holds = _holds_in_expert(block, candidate)
        if holds:
            pairs.append(candidate)
    return pairs


def _candidates(block: nn.Module, graph: BlockGraph) -> Iterator[ScalePair]:
    seen: set[str] = set()
    for group in graph.groups:
        if group.norm is None:
            yield from _linear_candidates(block, graph, group)
        elif group.norm not in seen:
            seen.add(group.norm)
            linears = (name for g in graph.groups if g.norm == group.norm for name in g.linears)
            readers = (name for norm, name in graph.readers if norm == group.norm)
            size = _weight(block, group.norm).numel()
            pair = ScalePair(group.norm, "norm", (0, size), (*linears, *readers))
            if all(_weight(block, name).shape[1] == size for name in pair.consumers):
                yield pair
                yield replace(pair, producer_kind="norm1p")


def _linear_candidates(block: nn.Module, graph: BlockGraph, group: InputGroup) -> Iterator[ScalePair]:
    columns = _weight(block, group.linears[0]).shape[1]
    head_dim = next((d for m in block.modules() if isinstance(d := getattr(m, "head_dim", None), int)), 1)
    for earlier in graph.groups[: graph.groups.index(group)]:
        if (earlier.experts, earlier.expert) != (group.experts, group.expert):
            continue
        for name in earlier.linears:
            for rows, repeat in _row_choices(_weight(block, name).shape[0], columns):
                run = head_dim if repeat > 1 else 1
                if (rows[1] - rows[0]) % run == 0:
                    yield ScalePair(name, "linear", rows, group.linears, repeat, run, group.expert)


def _row_choices(rows: int, columns: int) -> Iterator[tuple[tuple[int, int], int]]:
    """(row range, repeat) by which a producer of `rows` channels could feed `columns` columns."""
    if rows == columns:  # up -> down, v -> o, fc1 -> fc2
        yield (0, rows), 1
    if rows == 2 * columns:  # gate and up in one linear, either order
        yield (columns, rows), 1
        yield (0, columns), 1
    if rows < columns and columns % rows == 0:  # v -> o with grouped queries
        yield (0, rows), columns // rows
    values = (rows - columns) // 2  # q, k, v in one linear, one after the other
    if values > 0 and rows == columns + 2 * values and columns % values == 0:
        yield (rows - values, rows), columns // values


def _holds(block: nn.Module, pair: ScalePair, run: Callable[[], Tensor], reference: Tensor) -> bool:
    """Whether the rescale leaves `run()` at `reference` although the producer's half alone moves it.

    Every token has to agree on its own: a token with massive activations (1e4 in real models) saturates gates, where a
    wrong pair looks right, and would outvote all others in a common maximum.
    """
    draw = torch.Generator().manual_seed(0)
    s = 2.0 ** torch.randint(-2, 3, (pair.size,), generator=draw)
    parameters = [p for name in (pair.producer, *pair.consumers) for p in block.get_submodule(name).parameters()]
    saved = [parameter.detach().clone() for parameter in parameters]
    try:
        _divide_producer(block, pair, s)
        moved = (run() - reference).abs().amax(-1)
        _multiply_consumers(block, pair, s)
        error = (run() - reference).abs().amax(-1)
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, saved, strict=True):
                parameter.copy_(value)
    noise = _ROUNDING * reference.abs().amax(-1)
    return bool((moved > noise).any()) and bool((error <= _TOLERANCE * moved + noise).all())


def _holds_in_expert(block: nn.Module, pair: ScalePair) -> bool:
    """The same inside one expert, run on its own: in the block, a token may never reach it."""
    expert = block.get_submodule(pair.producer.rpartition(".")[0])
    weight = _weight(block, pair.producer)
    probe = torch.randn(8, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)

    def run() -> Tensor:
        with torch.no_grad():
            out = expert(probe)
            assert isinstance(out, Tensor)
            return out

    return _holds(block, pair, run, run())


def _divide_producer(block: nn.Module, pair: ScalePair, s: Tensor) -> None:
    module = block.get_submodule(pair.producer)
    weight, bias = _weight(block, pair.producer), getattr(module, "bias", None)
    s = s.to(weight)
    with torch.no_grad():
        rows = slice(*pair.rows)
        if pair.producer_kind == "norm1p":
            weight[rows] = (1 + weight[rows]) / s - 1
        else:
            weight[rows] /= s if weight.dim() == 1 else s[:, None]
        if bias is not None:
            bias[rows] /= s


def _multiply_consumers(block: nn.Module, pair: ScalePair, s: Tensor) -> None:
    with torch.no_grad():
        for name in pair.consumers:
            weight = _weight(block, name)
            weight *= pair.columns(s).to(weight)


def _weight(block: nn.Module, name: str) -> Tensor:
    weight = block.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight
