"""The state of one quantization and the small steps of `pipeline.py` that read or write it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from anybit.blocks import Quantized, quantize_table
from anybit.calibration.activations import Activations
from anybit.calibration.entry import Entry
from anybit.calibration.parallel import Workers
from anybit.checkpoint.finish import float_tensors
from anybit.checkpoint.layout import shard_name
from anybit.checkpoint.ledger import Row
from anybit.checkpoint.partial import Partial, write_shard
from anybit.held_out import HeldOut
from anybit.job import Job
from anybit.layers.swap import quantized, tie_head

CANARY_TOKENS = 16


class Run:
    """Which block is next, the hidden states that enter it, the ledger rows so far.

    `tokens` are int64 [samples, T] to calibrate and [S, T'] held out (`held_out.py`); `in_flight` of the former have their
    inputs in memory at once.
    """

    def __init__(
        self,
        job: Job,
        partial: Partial,
        tokens: tuple[Tensor, Tensor],
        pool: Workers,
        in_flight: int,
        allow_unseen: bool,
    ) -> None:
        self.job, self.partial, self.tokens, self.pool = job, partial, tokens[0], pool
        self.in_flight, self.allow_unseen = in_flight, allow_unseen
        self.canary = self.tokens[0, :CANARY_TOKENS]
        self.entry = Entry(job.model, job.structure.blocks)
        self.held_out = HeldOut(job, partial.state, tokens[1], self.entry, pool)
        self.next, self.shards = 0, len(job.structure.blocks) + 2
        self.rows: list[Row] = []

    def table(self, name: str) -> list[Quantized]:
        """Load the embedding or head `name`, quantized if the recipe says so, into the model; its entry for the
        shard."""
        method, module = self.job.assignment.methods[name], self.job.model.get_submodule(name)
        if method is None:
            self.job.source.load_into(module, name)
            if self.job.structure.tied:  # loading gave the embedding a new parameter, the head still has the empty one
                self.job.model.get_submodule(self.job.structure.head).weight = module.weight
            return []
        found = quantize_table(name, self.job.source.tensor(f"{name}.weight"), method)
        layer = quantized(module, found.form)
        layer.fill(found.tensors)
        self.job.model.set_submodule(name, layer)
        if self.job.structure.tied:
            tie_head(self.job.model, name, self.job.structure.head)
        return [found]

    def activations(self, index: int) -> tuple[Activations, Activations]:
        """Hidden states that enter block `index`: of the calibration samples, and of the canary."""
        width, state = self.job.structure.geometry.hidden, self.partial.state
        count, length = self.tokens.shape
        return (
            Activations(state / f"hidden-{index}", count, length, width),
            Activations(state / f"canary-{index}", 1, len(self.canary), width),
        )

    def resume(self, done: dict[str, Any]) -> None:
        """Go on from what `commit` recorded."""
        self.next, self.rows = done["next"], [Row(**row) for row in done["rows"]]

    def store(self, number: int, done: list[Quantized], modules: list[str]) -> None:
        """Shard `number`: the quantized tensors of `done` and what stays float in `modules`."""
        names = {found.name for found in done}
        tensors = {f"{found.name}.{key}": tensor for found in done for key, tensor in found.tensors.items()}
        for name in modules:
            tensors |= float_tensors(self.job.model.get_submodule(name), name, names, self.job.dtype)
        write_shard(self.partial.root / shard_name(number, self.shards), tensors)
        self.rows += [found.row for found in done]

    def commit(self, index: int, done: list[Quantized], modules: list[str]) -> None:
        """Put everything up to the input of block `index` on disk, in the order that survives a kill at any moment."""
        self.store(index + 1, done, modules)
        for activations in (*self.activations(index), *self.held_out.files(index).values()):
            activations.sync()
        self.next = index
        self.partial.commit({"next": index, "rows": [row.model_dump() for row in self.rows]})
        for activations in (*self.activations(index - 1), *self.held_out.files(index - 1).values()):
            activations.path.unlink(missing_ok=True)
