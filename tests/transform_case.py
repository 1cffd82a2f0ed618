"""The first block of a tiny model with planted outliers, its inputs on disk, and whether a transform left its output alone."""

from __future__ import annotations

from dataclasses import dataclass

from anybit.calibration.activations import Activations
from anybit.calibration.statistics import BlockCall
from anybit.models.graph import BlockGraph, block_inputs, trace_block
from anybit.models.normalize import normalize
from anybit.models.structure import find_structure
from tiny_models import tiny, token_ids

TOKENS, SAMPLES = 32, 3


@dataclass
class Case:
    """A block ready for `Transform.apply(call, graph, source, pool)`; `before` are its float outputs."""

    model: object
    call: BlockCall
    graph: BlockGraph
    source: Activations
    before: list

    def outputs(self):
        return [self.call.run(self.source.read(i)) for i in range(self.source.samples)]

    def error(self, before=None):
        """Largest relative difference to `before`, per token, over what a token's largest channel is."""
        pairs = zip(self.outputs(), self.before if before is None else before, strict=True)
        return max(float(((a - b).abs().amax(-1) / b.abs().amax(-1)).max()) for a, b in pairs)

    def get(self, name):
        return self.call.block.get_parameter(name)


def case(family, where, seed=0, **overrides):
    """Salient channels: a few gains are 8 times the others, a few rows of every linear 4 times."""
    model = tiny(family, seed, **overrides)
    normalize(model)
    blocks = find_structure(model).blocks
    block = model.get_submodule(blocks[0])
    for name, p in block.named_parameters():
        if p.dim() == 1 and name.endswith("weight"):
            p[3::16] *= 8
        elif p.dim() == 2 and p.shape[0] > 8:
            p[5::24] *= 4
    source = Activations(where / "hidden", SAMPLES, TOKENS, 64)
    for sample in range(SAMPLES):
        hidden, kwargs = block_inputs(model, blocks, token_ids(TOKENS, seed=sample))[0]
        source.write(sample, hidden)
    call = BlockCall(block, kwargs)
    made = Case(model, call, trace_block(block, source.read(0), kwargs), source, [])
    made.before = made.outputs()
    return made
