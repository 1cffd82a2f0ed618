"""The state of one quantization and the small steps of `pipeline.py` that read or write it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from anybit.blocks import Quantized, quantize_table
from anybit.calibration.activations import Activations
from anybit.calibration.entry import Entry
from anybit.calibration.fisher import write_fisher
from anybit.calibration.parallel import Workers
from anybit.calibration.statistics import BlockCall, propagate
from anybit.checkpoint.canary import CANARY, echoes, write_canary
from anybit.checkpoint.finish import float_tensors
from anybit.checkpoint.layout import shard_name
from anybit.checkpoint.ledger import Row, form_word
from anybit.checkpoint.partial import Partial, write_shard
from anybit.formats.decoder import Form
from anybit.formats.terms import stored_bits
from anybit.held_out import HeldOut
from anybit.job import Job
from anybit.layers.swap import quantized, tie_head
from anybit.learn_block import Lesson, learn_block
from anybit.methods.grid import AffineGrid
from anybit.models.graph import BlockGraph, trace_block
from anybit.models.source import release
from anybit.transforms.base import Transform
from anybit.tune_block import tune_block

CANARY_TOKENS = 16
ECHOES = 8


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
        if method is None or self.job.rotation:
            self.job.source.load_into(module, name)
            self._rotate(name, module)
        if method is None:
            if self.job.structure.tied:  # loading gave the embedding a new parameter, the head still has the empty one
                self.job.model.get_submodule(self.job.structure.head).weight = module.weight
            return []
        weight = module.get_parameter("weight").data if self.job.rotation else self.job.source.tensor(f"{name}.weight")
        found = quantize_table(name, weight, method)
        layer = quantized(module, found.form)
        layer.fill(found.tensors)
        self.job.model.set_submodule(name, layer)
        if self.job.structure.tied:
            tie_head(self.job.model, name, self.job.structure.head)
        return [found]

    def rotate_entry(self) -> None:
        """Turn what stands beside the token embedding before the blocks, if the recipe rotates the stream."""
        if self.job.rotation:
            for name in self.job.structure.pre:
                self.job.rotation.enter(name, self.job.model.get_submodule(name))

    def _rotate(self, name: str, module: nn.Module) -> None:
        structure, rotation = self.job.structure, self.job.rotation
        if rotation and name == structure.embedding:
            rotation.enter(name, module)
        elif rotation:
            norm = structure.final_norm
            rotation.leave(None if norm is None else self.job.model.get_submodule(norm), module)

    def activations(self, index: int) -> tuple[Activations, Activations]:
        """Hidden states that enter block `index`: of the calibration samples, and of the canary (with its echoes)."""
        width, state = self.job.structure.geometry.hidden, self.partial.state
        count, length = self.tokens.shape
        echoed = ECHOES if self.job.assignment.activations else 0
        return (
            Activations(state / f"hidden-{index}", count, length, width),
            Activations(state / f"canary-{index}", 1 + echoed, len(self.canary), width),
        )

    def open_block(self, index: int, arguments: dict[str, Any]) -> tuple[BlockCall, BlockGraph]:
        """Load block `index` and say what is in it; `arguments` are those it is called with."""
        name = self.job.structure.blocks[index]
        block = self.job.model.get_submodule(name)
        self.job.source.load_into(block, name)
        call = BlockCall(block, arguments, self.in_flight, prefix=name)
        return call, trace_block(block, self.activations(index)[0].read(0), call.arguments)

    def transform(self, index: int, call: BlockCall, graph: BlockGraph, kinds: type = Transform) -> list[str]:
        """Rewrite block `index` by the recipe's transforms (those of one kind); what each did, "linear: what"."""
        source = self.activations(index)[0]
        chosen = [change for change in self.job.assignment.transforms if isinstance(change, kinds)]
        return [note for change in chosen for note in change.apply(call, graph, source, self.pool)]

    def start(self) -> None:
        """Put on disk what enters the first block: of the calibration and held-out tokens, of the canary and its echoes."""
        hidden, canary = self.activations(0)
        for sample, ids in enumerate(self.tokens):
            states = self.entry.hidden(ids)
            for file in (hidden, *self.float_stream(0).values()):
                file.write(sample, states)
        self.held_out.enter()
        first = self.entry.hidden(self.canary)
        for number, states in enumerate([first, *echoes(first, canary.samples - 1)]):
            canary.write(number, states)

    def finish_canary(self) -> None:
        """Ask the canary after the last block and store what it says."""
        _, canary = self.activations(len(self.job.structure.blocks))
        answer, *echoed = [self.entry.logits(self.canary, canary.read(i))[-1] for i in range(canary.samples)]
        write_canary(self.partial.root / CANARY, self.canary, answer, echoed)

    def gradients(self) -> None:
        """Put the squared gradients of the float model on disk, one file a block, if a method wants them and they are not
        there."""
        job, wanting = self.job, self.job.gradients()
        files = {name: self.fisher_file(i) for i, name in enumerate(job.structure.blocks) if i >= self.next}
        missing = {name: path for name, path in files.items() if name in wanting and not path.is_file()}
        if missing:
            write_fisher(job.source, wanting, missing, self.tokens, self.pool, self.in_flight)

    def fisher(self, index: int) -> dict[str, Tensor]:
        """Squared gradients float32 [N, K] of the linears of block `index` that want them, by full name."""
        path = self.fisher_file(index)
        return load_file(path) if path.is_file() else {}

    def fisher_file(self, index: int) -> Path:
        """Where the squared gradients of block `index` are until it is done."""
        return self.partial.state / f"fisher-{index}.safetensors"

    def original(self, block: nn.Module) -> nn.Module | None:
        """A copy of a block as it is before it is quantized, if the recipe's learners or compensations will want one."""
        wanted = self.job.assignment.compensations or self.job.assignment.learners
        return copy.deepcopy(block) if wanted else None

    def learn(self, index: int, call: BlockCall, graph: BlockGraph, original: nn.Module | None) -> list[str]:
        """What the recipe's learners make of block `index`, judged by the float block and the float model's own stream; a note
        from each."""
        assignment, structure = self.job.assignment, self.job.structure
        if not assignment.learners or original is None:
            return []
        prefix, source = structure.blocks[index], self.activations(index)[0]
        stream, target = self.float_stream(index)["float"], self.float_stream(index + 1)["float"]
        propagate(BlockCall(original, call.arguments, call.in_flight), stream, target, self.pool)
        own = Activations(self.partial.state / "targets", source.samples, *source.shape)
        maps = Activations(self.partial.state / "maps", source.samples, source.shape[0], source.shape[0])
        named = [(name, f"{prefix}.{name}") for name in graph.linears]
        grids = {n: method for n, full in named if isinstance(method := assignment.methods.get(full), AffineGrid)}
        inputs = {name: assignment.activations[full] for name, full in named if full in assignment.activations}
        notes = []
        for learner in assignment.learners:
            corrected = learner.corrects(index, len(structure.blocks))
            lesson = Lesson(original, source, target, own, maps, grids, inputs, corrected)
            notes.append(learn_block(call, graph, learner, lesson, self.pool))
        for file in (own, maps):
            file.path.unlink(missing_ok=True)
        return notes

    def float_stream(self, index: int) -> dict[str, Activations]:
        """Hidden states of the float model that enter block `index`, where a learner wants them."""
        if not self.job.assignment.learners:
            return {}
        count, length = self.tokens.shape
        path = self.partial.state / f"float-{index}"
        return {"float": Activations(path, count, length, self.job.structure.geometry.hidden)}

    def compensate(
        self, name: str, call: BlockCall, source: Activations, original: nn.Module | None, done: list[Quantized]
    ) -> list[Quantized]:
        """`done` after the recipe's compensations of block `name`, judged by the float block on the same inputs."""
        if original is None or not done or not self.job.assignment.compensations:
            return done
        targets = Activations(self.partial.state / f"targets-{name}", source.samples, *source.shape)
        propagate(BlockCall(original, call.arguments, call.in_flight), source, targets, self.pool)
        release(original)
        for method in self.job.assignment.compensations:
            done = tune_block(name, call, source, targets, method, done, self.pool)
        targets.path.unlink()
        return done

    def _files(self, index: int) -> list[Activations]:
        """All hidden states that enter block `index`."""
        streams = (self.held_out.files(index), self.float_stream(index))
        return [*self.activations(index), *(file for stream in streams for file in stream.values())]

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
        for found in done:
            settled = form_word(found.form) != form_word(self.job.forms[found.name])
            notes = [*found.row.notes, *self.job.notes.get(found.name, [])]
            self.rows.append(found.row.model_copy(update={"notes": notes, "settled": found.form if settled else {}}))

    def settle(self, account: dict[str, Any]) -> tuple[dict[str, Form], dict[str, Any]]:
        """Every form as it was written, and `account` with the sizes that follow."""
        settled = {row.name: row.settled for row in self.rows if row.settled}
        if not settled:
            return dict(self.job.forms), account
        saved = sum(stored_bits(self.job.forms[name]) - stored_bits(form) for name, form in settled.items()) // 8
        size = account["size_bytes"] - saved
        bits = account["bits_per_weight"] * size / account["size_bytes"]
        return self.job.forms | settled, account | {"size_bytes": size, "bits_per_weight": bits}

    def commit(self, index: int, done: list[Quantized], modules: list[str]) -> None:
        """Put everything up to the input of block `index` on disk, in the order that survives a kill at any moment."""
        self.store(index + 1, done, modules)
        for activations in self._files(index):
            activations.sync()
        self.next = index
        self.partial.commit({"next": index, "rows": [row.model_dump() for row in self.rows]})
        for activations in self._files(index - 1):
            activations.path.unlink(missing_ok=True)
        if index:
            self.fisher_file(index - 1).unlink(missing_ok=True)
