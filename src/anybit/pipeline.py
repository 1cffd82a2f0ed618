"""The main job, whole: load -> transform -> statistics -> quantize -> ledger -> save, one block in memory at a time.

Read this first. A *job* is a model matched with a recipe (`job.py`); a *run* is its state on disk (`run.py`, and
`checkpoint/partial.py`, which makes every step atomic); `blocks.py` quantizes the linears of one block.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anybit.blocks import noted, quantize_block
from anybit.calibration.parallel import workers
from anybit.calibration.progress import Progress, silent
from anybit.calibration.statistics import BlockCall, propagate
from anybit.calibration.tokens import data_identity
from anybit.checkpoint.finish import finish_directory
from anybit.checkpoint.ledger import LEDGER, Ledger
from anybit.checkpoint.partial import Partial
from anybit.decide import decided
from anybit.errors import InputError
from anybit.held_out import draw
from anybit.job import Job, open_job, parse_bytes, samples_in_flight
from anybit.memory import peak_rss_bytes
from anybit.models.graph import trace_block
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
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Quantize `model` by `recipe` into directory `out`; returns the summary of `anybit quantize --json`.

    The bytes written depend on model, recipe, data and seed alone: not on threads, memory limit or interruptions.

    Raises:
        AnybitError: InputError for input that does not fit, PromiseError for a limit that would not be kept; `out`
            does not exist then. What an interrupted run had finished stays in `out.partial` for `resume`.
    """
    started, progress = time.monotonic(), progress or silent
    if device != "cpu":
        raise InputError(f"--device {device}: this version quantizes on the CPU; leave --device out")
    job = open_job(model, recipe, overrides)
    in_flight = samples_in_flight(job, parse_bytes(max_ram) if max_ram else None, seq_len)
    tokens, held_out = draw(job, calibration, samples, seq_len, seed)
    asked = {"model": job.source.identity(), "recipe": job.recipe.model_dump()}
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
            for index, name in enumerate(job.structure.blocks):
                progress("quantize blocks", index, len(job.structure.blocks))
                if index >= run.next:
                    step(run, index, name)
            progress("quantize blocks", len(job.structure.blocks), len(job.structure.blocks))
            account |= leave(run) | {"kv": job.cache()}
            forms, account = run.settle(account)
        said = (job.changes(), job.assignment.kv)
        ledger = finish_directory(partial, job.source.path, run.shards, account, forms, run.rows, *said)
    return summary(job, ledger, out, time.monotonic() - started)


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


def step(run: Run, index: int, name: str) -> None:
    """Quantize block `index`, called `name`, and send the hidden states through what it became."""
    (source, canary), (target, canary_target) = run.activations(index), run.activations(index + 1)
    block = run.job.model.get_submodule(name)
    run.job.source.load_into(block, name)
    call = BlockCall(block, run.entry.arguments(run.tokens[0])[index], run.in_flight, prefix=name)
    graph = trace_block(block, source.read(0), call.arguments)
    changes = [note for change in run.job.assignment.transforms for note in change.apply(call, graph, source, run.pool)]
    run.held_out.float_pass(index, block)
    original = run.original(block)
    learned = run.learn(index, call, graph, original)
    done = quantize_block(name, call, graph, source, run.job.assignment, run.pool, run.allow_unseen, run.fisher(index))
    done = noted(done, name, changes, learned)
    done = run.compensate(name, call, source, original, done)
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


def summary(job: Job, ledger: Ledger, out: str, seconds: float) -> dict[str, Any]:
    """What `anybit quantize` tells: sizes in bytes, bits per weight over the model, peak memory."""
    return {
        "model": job.source.name,
        "recipe": job.recipe.name,
        "bits_per_weight": ledger.bits_per_weight,
        "size_bytes": ledger.size_bytes,
        "float_bytes": ledger.float_bytes,
        "seconds": seconds,
        "peak_rss_bytes": peak_rss_bytes(),
        "layers": len(ledger.tensors),
        "ledger": str(Path(out) / LEDGER),
        "out": out,
    }
