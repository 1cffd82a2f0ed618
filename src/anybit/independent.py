"""Blocks quantized each on its own, from inputs of the float model: in any order, by any number of processes.

A pass through the float model puts the inputs of every block on disk; a block is quantized from its own inputs alone and becomes
one shard and one file of ledger rows. Both appear whole or not at all, and doing a block twice writes the same bytes, so that
whoever dies in the middle is simply replaced. At the end canary and held-out text go through the shards as they are.
What it costs: a block no longer makes up for the errors of those before it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from anybit.blocks import noted, quantize_block
from anybit.calibration.parallel import workers
from anybit.calibration.statistics import BlockCall, propagate
from anybit.checkpoint.layout import shard_name
from anybit.checkpoint.ledger import Row
from anybit.checkpoint.partial import Partial, write_json
from anybit.errors import InputError
from anybit.formats.decoder import Form
from anybit.job import Job, match_job
from anybit.layers.linear import Terms
from anybit.layers.precision import Precision, available_precisions
from anybit.layers.swap import quantized
from anybit.models.source import ModelSource, release
from anybit.recipe import Assignment, Recipe
from anybit.run import Run
from anybit.transforms.rotate import Rotate

Arguments = dict[str, Any]
"""What a block is called with beside its hidden states."""


@dataclass(frozen=True)
class Parcel:
    """What another process needs to do blocks of a run: the job as it was decided, and paths that both of them see."""

    model: Path
    recipe: Recipe
    assignment: Assignment
    forms: Mapping[str, Form]
    notes: Mapping[str, list[str]]
    out: Path
    tokens: tuple[Tensor, Tensor]
    in_flight: int
    allow_unseen: bool

    @classmethod
    def of(cls, run: Run) -> Parcel:
        """Of a run whose directory exists."""
        job, out = run.job, run.partial.out.resolve()
        decided = (job.recipe, job.assignment, job.forms, job.notes)
        tokens = (run.tokens, run.held_out.tokens)
        return cls(job.source.path.resolve(), *decided, out, tokens, run.in_flight, run.allow_unseen)

    def quantize(self, index: int, arguments: Arguments, threads: int) -> None:
        """Do block `index`; nothing if that was done already."""
        forms, notes = dict(self.forms), dict(self.notes)
        job = replace(
            match_job(ModelSource(self.model), self.recipe), assignment=self.assignment, forms=forms, notes=notes
        )
        with workers(threads) as pool:
            run = Run(job, Partial(self.out), self.tokens, pool, self.in_flight, self.allow_unseen)
            quantize_alone(run, index, arguments)


Spread = Callable[[Parcel, Iterator[tuple[int, Arguments]]], Iterator[int]]
"""Does the blocks it is given, by `Parcel.quantize`, and names each one that is done. The next block is asked for when there is
room: its inputs are made then, and lie on disk until it is done."""


def checked(job: Job, block_inputs: str, spread: Spread | None) -> dict[str, str]:
    """What the identity of the run says of block inputs: nothing where they are the usual ones.

    Raises:
        InputError: neither "quantized" nor "float", or what cannot be done so.
    """
    if block_inputs not in ("quantized", "float"):
        raise InputError(f"block inputs '{block_inputs}': write quantized or float")
    if block_inputs == "quantized" and spread:
        raise InputError(
            "with quantized block inputs every block waits for the one before it, so that workers have nothing to share; "
            "add --block-inputs float (docs/integrations.md has what that costs)"
        )
    if block_inputs == "float" and job.assignment.learners:
        name = job.assignment.learners[0].name
        raise InputError(f"'{name}' learns from quantized block inputs; leave --block-inputs float out")
    return {} if block_inputs == "quantized" else {"block_inputs": block_inputs}


def independent_blocks(run: Run, spread: Spread | None) -> Iterator[int]:
    """Quantize the blocks that are left, here or by `spread`; says how many are done."""
    total = len(run.job.structure.blocks)
    left = [index for index in range(total) if not rows_file(run, index).is_file()]
    yield total - len(left)
    done = _here(run, left) if spread is None else spread(Parcel.of(run), _due(run, left))
    for count, _ in enumerate(done, start=total - len(left) + 1):
        yield count
    for index in range(total):
        run.rows += [Row(**row) for row in json.loads(rows_file(run, index).read_text())]
    _ask(run)


def _here(run: Run, left: list[int]) -> Iterator[int]:
    for index, arguments in _due(run, left):
        quantize_alone(run, index, arguments)
        yield index


def _due(run: Run, left: list[int]) -> Iterator[tuple[int, Arguments]]:
    """The blocks that are left with their arguments, each once its inputs, and those of the next, are on disk."""
    for index in range(len(run.job.structure.blocks)):
        if index >= run.next:
            _float_step(run, index)
        if index in left:
            yield index, run.entry.arguments(run.tokens[0])[index]


def _float_step(run: Run, index: int) -> None:
    """Send the hidden states through float block `index`; a recipe that rotates the stream has it rotated."""
    call, graph = run.open_block(index, run.entry.arguments(run.tokens[0])[index])
    run.transform(index, call, graph, Rotate)
    run.held_out.float_pass(index, call.block)
    files = list(run.held_out.files(index + 1).values())[:1]
    if index + 1 < len(run.job.structure.blocks):
        source, target = (run.activations(at)[0] for at in (index, index + 1))
        propagate(call, source, target, run.pool)
        files.append(target)
    for file in files:
        file.sync()
    run.next = index + 1
    run.partial.commit({"next": run.next, "rows": [row.model_dump() for row in run.rows]})
    call.detach()
    release(call.block)


def quantize_alone(run: Run, index: int, arguments: Arguments) -> None:
    """Block `index` from its inputs on disk to its shard and its ledger rows; then its inputs are dropped."""
    if rows_file(run, index).is_file():
        return
    name, source = run.job.structure.blocks[index], run.activations(index)[0]
    call, graph = run.open_block(index, arguments)
    changes = run.transform(index, call, graph)
    original, before = run.original(call.block), len(run.rows)
    assignment, fisher = run.job.assignment, run.fisher(index)
    done = quantize_block(name, call, graph, source, assignment, run.pool, run.allow_unseen, fisher)
    done = run.compensate(name, call, source, original, noted(done, name, changes, []))
    run.store(index + 2, done, [name])
    run.rows, rows = run.rows[:before], run.rows[before:]
    write_json(rows_file(run, index), [row.model_dump() for row in rows])
    call.detach()
    release(call.block)
    source.path.unlink(missing_ok=True)
    run.fisher_file(index).unlink(missing_ok=True)


def rows_file(run: Run, index: int) -> Path:
    """Where the ledger rows of block `index` are once it is done."""
    return run.partial.state / f"rows-{index}.json"


def _ask(run: Run) -> None:
    """Canary and held-out text through all blocks as they were saved."""
    for index, name in enumerate(run.job.structure.blocks):
        forms = {
            row.name: row.settled or run.job.forms[row.name] for row in run.rows if row.name.startswith(f"{name}.")
        }
        block = _saved_block(run, index, forms)
        precision = Precision(available_precisions(forms.values()))
        for module in block.modules():
            if isinstance(module, Terms):
                module.precision = precision
        run.held_out.stored_passes(index, block, precision)
        precision.bits = precision.available[-1]
        source, target = (run.activations(at)[1] for at in (index, index + 1))
        propagate(BlockCall(block, run.entry.arguments(run.canary)[index]), source, target, run.pool)


def _saved_block(run: Run, index: int, forms: Mapping[str, Form]) -> nn.Module:
    """Block `index` as its shard has it: quantized layers, the rest in float32."""
    name = run.job.structure.blocks[index]
    shard = load_file(run.partial.root / shard_name(index + 2, run.shards))
    tensors = {key.removeprefix(f"{name}."): tensor for key, tensor in shard.items()}
    block = copy.deepcopy(run.job.model.get_submodule(name))
    for full, form in forms.items():
        linear = full.removeprefix(f"{name}.")
        layer = quantized(block.get_submodule(linear), form)
        layer.fill({key.rpartition(".")[2]: t for key, t in tensors.items() if key.rpartition(".")[0] == linear})
        block.set_submodule(linear, layer)
    for key, parameter in list(block.named_parameters()):
        if parameter.is_meta:
            owner, _, leaf = key.rpartition(".")
            value = nn.Parameter(tensors[key].float(), requires_grad=False)
            block.get_submodule(owner).register_parameter(leaf, value)
    return block
