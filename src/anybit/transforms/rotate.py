"""Rotation of the residual stream, folded into weights (QuaRot, arXiv 2404.00456; SpinQuant's R1 and R2, arXiv 2405.16406).

Gains of norms go into what reads them; then everything that reads the stream is turned by Q, everything that writes it by
Q^T, with embedding and head (untied, since only the head takes the final gain). Nothing remains to be done at run time.
`values` adds the head-local rotation: rows of the value projection and columns of the output projection, head by head
(QuaRot instead mixes heads, with an operation at run time).

Every block is checked on its first input: turned, it must give what it gave before, turned.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from anybit.calibration.activations import Activations
from anybit.calibration.parallel import Workers
from anybit.calibration.statistics import BlockCall
from anybit.errors import StructureError
from anybit.kernels.hadamard.orders import sizes_for
from anybit.kernels.hadamard.reference import factored
from anybit.models.graph import BlockGraph
from anybit.models.structure import is_norm
from anybit.transforms.base import Transform
from anybit.transforms.heads import Values, value_pairs
from anybit.transforms.stream import Stream, fold_norm
from anybit.transforms.trial import Trial, agrees


class Rotate(Transform):
    """Options: `signs` random ones drawn from `seed` (QuaRot; without them QoQ's plain Hadamard), `values` as above."""

    name: ClassVar[str] = "rotate"
    signs: bool = True
    seed: int = 0
    values: bool = False

    def stream(self, width: int, centred: bool) -> Stream:
        """The rotation of a model whose stream is so wide; `centred`: it has layer norms."""
        return Stream.of(width, centred, self.signs, self.seed)

    def apply(self, call: BlockCall, graph: BlockGraph, source: Activations, pool: Workers) -> list[str]:
        """Turn the block; `source` is in the new basis already.

        Raises:
            StructureError: the block cannot be turned, such as one that norms what it writes (Gemma 2 and 3, OLMo 2).
        """
        block, hidden = call.block, source.read(0)
        stream = self.stream(hidden.shape[-1], is_centred(block, hidden.shape[-1]))
        old = stream.back(hidden).float()
        before = call.run(old)
        with torch.no_grad():
            notes = _turn(block, graph, stream)
        expected = stream.turn(before).float()
        if not agrees(call.run(hidden), expected, hidden):
            raise StructureError(f"{type(block).__name__}: its output changes under rotation{_reason(block, graph)}")
        return notes + (rotate_values(call, graph, source) if self.values else [])


def rotate_values(call: BlockCall, graph: BlockGraph, source: Activations) -> list[str]:
    """Head-local rotation of values where the block allows it; one note per output projection."""
    done: dict[str, str] = {}
    for values in value_pairs(call.block, graph):
        change = partial(_turn_values, call.block, values)
        if values.consumer not in done and Trial(call, source).keeps((values.producer, values.consumer), change):
            done[values.consumer] = values.producer
    return [f"{name}: input rotated head by head, folded into {producer}" for name, producer in done.items()]


def _turn_values(block: nn.Module, values: Values) -> None:
    def turn(x: Tensor) -> Tensor:
        heads = x.double().unflatten(-1, (-1, values.head_dim))
        return factored(heads, sizes_for(values.head_dim)).flatten(-2).to(x)

    weight, bias = block.get_parameter(f"{values.producer}.weight"), values.bias(block)
    weight[values.rows] = turn(weight[values.rows].T).T
    if bias is not None:
        bias[values.rows] = turn(bias[values.rows])
    columns = block.get_parameter(f"{values.consumer}.weight")
    columns.copy_(turn(columns))


def _turn(block: nn.Module, graph: BlockGraph, stream: Stream) -> list[str]:
    read: dict[str, dict[str, nn.Module]] = {}
    for norm, name in [*((g.norm, n) for g in graph.groups for n in g.linears if g.norm), *graph.readers]:
        read.setdefault(norm, {})[name] = block.get_submodule(name)
    for norm, readers in read.items():
        fold_norm(block.get_submodule(norm), readers, stream)
    readers_of_any = {name for readers in read.values() for name in readers}
    writers = [n for n in graph.linears if n not in readers_of_any]
    writers = [n for n in writers if block.get_parameter(f"{n}.weight").shape[0] == len(stream.signs)]
    for name in writers:
        stream.write(block.get_submodule(name))
    return [f"{name}: reads the rotated stream" for name in readers_of_any] + [
        f"{name}: writes the rotated stream" for name in writers
    ]


def is_centred(module: nn.Module, width: int) -> bool:
    """Whether norms of the stream inside `module` subtract the mean."""
    return any(isinstance(m, nn.LayerNorm) and m.weight.numel() == width for m in module.modules())


def _reason(block: nn.Module, graph: BlockGraph) -> str:
    """Norms of the stream's width that no linear reads norm what is added to the stream."""
    read = {group.norm for group in graph.groups}
    size = next((block.get_parameter(f"{n}.weight").numel() for n in read if n is not None), 0)
    post = [
        n
        for n, m in block.named_modules()
        if is_norm(m) and n not in read and m.get_parameter("weight").numel() == size
    ]
    why = f": {', '.join(post)} norms what it writes" if post else ""
    return f"{why}; leave `rotate` out for this model"


@dataclass(frozen=True)
class Ends:
    """The rotation of what lies outside the blocks."""

    stream: Stream

    def enter(self, name: str, module: nn.Module) -> None:
        """Turn the rows of an embedding (of tokens or positions) that makes the stream; nothing to do for what has no weights.

        Raises:
            StructureError: another module with weights in front of the blocks.
        """
        if isinstance(module, nn.Embedding) and module.weight.shape[1] == len(self.stream.signs):
            with torch.no_grad():
                self.stream.turn_rows(module.weight)
        elif any(True for _ in module.parameters()):
            raise StructureError(
                f"{name} stands before the blocks and cannot be rotated; leave `rotate` out for this model"
            )

    def leave(self, norm: nn.Module | None, head: nn.Module) -> None:
        """Fold the final norm into the head and turn its columns; the final norm keeps gain 1."""
        with torch.no_grad():
            if norm is None:
                self.stream.turn_rows(head.get_parameter("weight"))
            else:
                fold_norm(norm, {"head": head}, self.stream)
