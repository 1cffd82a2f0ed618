"""The main job, whole: load -> transform -> statistics -> quantize -> ledger -> save, one block in memory at a time.

Read this first. A *job* is a model matched with a recipe (`job.py`); a *run* is its state on disk (`run.py`, and
`checkpoint/partial.py`, which makes every step atomic); `blocks.py` quantizes the linears of one block. Blocks that need not
wait for each other, on one machine or many, are in `independent.py`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from anybit.blocks import noted, quantize_block
from anybit.calibration.parallel import workers
from anybit.calibration.progress import Progress, silent
from anybit.calibration.statistics import BlockCall, propagate
from anybit.calibration.tokens import data_identity
from anybit.checkpoint.finish import finish_directory
from anybit.checkpoint.partial import Partial, check_apart
from anybit.decide import decided
from anybit.errors import InputError
from anybit.held_out import draw
from anybit.independent import Spread, checked, independent_blocks
from anybit.job import open_job, parse_bytes, samples_in_flight
from anybit.models.source import release
from anybit.run import Run


def quantize(
    model: str,
    *,
    recipe: str,
    out: str,
    calibration: str = "wiki",
    samples: int = 32,
    seq_len: int = 512,
    seed: int = 0,
    max_ram: str | None = None,
    device: str = "cpu",
    overrides: Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
    allow_unseen_experts: bool = False,
    threads: int | None = None,
    block_inputs: str = "quantized",
    spread: Spread | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Quantize `model` by `recipe` into directory `out`; returns the summary of `anybit quantize --json`.

    The bytes written depend on model, recipe, data, seed and `block_inputs` alone: not on threads, `spread` (other processes that
    do the blocks), memory limit or interruptions. `block_inputs`: what a block is fitted to, the output of the blocks before
    it as they were "quantized", or as they are in "float".

    Raises:
        AnybitError: InputError for input that does not fit, PromiseError for a limit that would not be kept; `out`
            does not exist then. What an interrupted run had finished stays in `out.partial` for `resume`.
    """
    started, progress = time.monotonic(), progress or silent
    if device != "cpu":
        raise InputError(f"--device {device}: this version quantizes on the CPU; leave --device out")
    job = open_job(model, recipe, overrides)
    check_apart(Path(out), job.source.path)
    float_inputs = checked(job, block_inputs, spread)
    in_flight = samples_in_flight(job, parse_bytes(max_ram) if max_ram else None, seq_len)
    tokens, held_out = draw(job, calibration, samples, seq_len, seed)
    asked = {"model": job.source.identity(), "recipe": job.recipe.model_dump()} | float_inputs
    identity = {**asked, "data": data_identity(tokens, calibration)}
    partial = Partial(Path(out))
    ledger = partial.finished(identity) if resume else None
    if ledger is None:
        account = {"model": model, "recipe": job.recipe.name, "identity": identity, **job.sizes()}
        done = partial.begin(identity, resume, overwrite)
        with workers(threads) as pool:
            job = decided(job, tokens, pool)
            run = Run(job, partial, (tokens, held_out), pool, in_flight, allow_unseen_experts)
            enter(run, done)
            run.gradients()
            steps = independent_blocks(run, spread) if float_inputs else blocks_in_order(run)
            for finished in steps:
                progress("quantize blocks", finished, len(job.structure.blocks))
            account |= leave(run) | {"kv": job.cache()}
            forms, account = run.settle(account)
        said = (job.changes(), job.assignment.kv)
        ledger = finish_directory(partial, job.source.path, run.shards, account, forms, run.rows, *said)
    return job.summary(ledger, out, time.monotonic() - started)


def enter(run: Run, done: dict[str, Any]) -> None:
    """Quantize the embedding, put its output on disk as the first hidden states; or pick up where `done` says."""
    structure, source = run.job.structure, run.job.source
    for name in structure.pre:
        source.load_into(run.job.model.get_submodule(name), name)
    run.rotate_entry()
    table = run.table(structure.embedding)
    if done:
        run.resume(done)
        return
    run.start()
    run.commit(0, table, [structure.embedding, *structure.pre])


def blocks_in_order(run: Run) -> Iterator[int]:
    """Quantize the blocks that are left, each on what the ones before it became; says how many are done."""
    for index, name in enumerate(run.job.structure.blocks):
        yield index
        if index >= run.next:
            step(run, index, name)
    yield len(run.job.structure.blocks)


def step(run: Run, index: int, name: str) -> None:
    """Quantize block `index`, called `name`, and send the hidden states through what it became."""
    (source, canary), (target, canary_target) = run.activations(index), run.activations(index + 1)
    call, graph = run.open_block(index, run.entry.arguments(run.tokens[0])[index])
    changes = run.transform(index, call, graph)
    block, original = call.block, run.original(call.block)
    run.held_out.float_pass(index, block)
    learned = run.learn(index, call, graph, original)
    assignment, fisher = run.job.assignment, run.fisher(index)
    done = quantize_block(name, call, graph, source, assignment, run.pool, run.allow_unseen, fisher)
    done = run.compensate(name, call, source, original, noted(done, name, changes, learned))
    propagate(call, source, target, run.pool)
    run.held_out.quantized_passes(index, block, name, done)
    propagate(BlockCall(block, run.entry.arguments(run.canary)[index]), canary, canary_target, run.pool)
    run.commit(index + 1, done, [name])
    call.detach()
    release(block)


def leave(run: Run) -> dict[str, Any]:
    """Quantize the head, write the last shard and the canary's logits; what the ledger says of precisions."""
    structure, model = run.job.structure, run.job.model
    ends = [structure.final_norm] if structure.final_norm else []
    for name in ends:
        run.job.source.load_into(model.get_submodule(name), name)
    head = [] if structure.tied else run.table(structure.head)
    run.store(run.shards, head, ends if structure.tied else [*ends, structure.head])
    run.finish_canary()
    return run.held_out.report(len(structure.blocks))
