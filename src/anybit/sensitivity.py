"""How much quantizing the input of one type of linears costs the whole model: text carried once per probe through the blocks.

The base is the model with its weights rounded as the recipe says (methods that need calibration: float) and float activations;
a probe quantizes the inputs of some linears in every block. One block is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from anybit.calibration.entry import Entry
from anybit.calibration.parallel import Workers
from anybit.calibration.statistics import BlockCall
from anybit.formats.activation import ActivationSpec
from anybit.formats.terms import dense
from anybit.layers.integer import dequantized
from anybit.methods.base import InputStats, Method
from anybit.models.source import ModelSource, release
from anybit.models.structure import Structure

Probe = Mapping[str, ActivationSpec]
"""By linear, how its input is quantized; dynamic schemes only."""


def losses(
    source: ModelSource,
    structure: Structure,
    methods: Mapping[str, Method | None],
    tokens: Tensor,
    probes: Sequence[Probe],
    pool: Workers,
) -> list[float]:
    """Mean negative log-likelihood in nats per token of tokens int64 [S, T], of the base and then of each probe."""
    model = source.skeleton()
    ends = [structure.embedding, *structure.pre, *([structure.final_norm] if structure.final_norm else [])]
    for name in [*ends, structure.head]:
        source.load_into(model.get_submodule(name), name)
    entry = Entry(model, structure.blocks)
    first = [entry.hidden(ids) for ids in tokens]
    streams = [list(first) for _ in range(1 + len(probes))]
    for index, name in enumerate(structure.blocks):
        block = model.get_submodule(name)
        source.load_into(block, name)
        _round_weights(block, name, methods)
        call = BlockCall(block, entry.arguments(tokens[0])[index])
        for stream, probe in zip(streams, [{}, *probes], strict=True):
            _attach(call, name, probe)
            stream[:] = pool.map(call.run, stream)
            call.detach()
        release(block)
    return [_loss(entry, tokens, stream) for stream in streams]


def _round_weights(block: nn.Module, prefix: str, methods: Mapping[str, Method | None]) -> None:
    for name, module in block.named_modules():
        method = methods.get(f"{prefix}.{name}")
        if isinstance(module, nn.Linear) and method is not None and not method.needs and not method.gradients:
            module.weight.data.copy_(dense(method.quantize(module.weight.data, InputStats(name=name))))


def _attach(call: BlockCall, prefix: str, probe: Probe) -> None:
    for name, spec in probe.items():
        if name.startswith(f"{prefix}."):
            call.attach(name.removeprefix(f"{prefix}."), _reader(spec))


def _reader(spec: ActivationSpec) -> Callable[[Tensor], Tensor]:
    def read(x: Tensor) -> Tensor:
        return dequantized(x.reshape(-1, x.shape[-1]), lambda rows: spec.encode(rows, {}), None).view(x.shape)

    return read


def _loss(entry: Entry, tokens: Tensor, hidden: Sequence[Tensor]) -> float:
    found = [
        cross_entropy(entry.logits(ids, states)[:-1].float(), ids[1:], reduction="none").double()
        for ids, states in zip(tokens, hidden, strict=True)
    ]
    return float(torch.cat(found).mean())
