"""Decode at a long context with different caches:

    python benchmarks/kv_speed.py DIR [context] [rounds] [threads] [cache ...] [--sequences 4] [--out FILE]

A step takes one token of each of `--sequences` texts, each with a cache of its own. Every cache is filled with the same tokens,
then whole decode steps of all caches take turns, so a busy neighbour hurts all alike (with one thread CPU time is measured);
per cache the least and the median of the rounds, ratios of medians of each round. Attention alone is the difference to the same
step at a context of 64, in the same rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

from anybit.engine.native import NativeModel
from anybit.formats.kv import KVSpec
from anybit.kernels import native
from anybit.machine import machine

RESULTS = Path(__file__).parent / "results"
STEPS = 3


def seconds(model: NativeModel, slots: range, length: int) -> float:
    """One decode step of all slots, the mean of a few; they are as long as before afterwards."""
    clock = time.thread_time if native.loaded().threads() == 1 else time.perf_counter
    start = clock()
    for step in range(STEPS):
        model.top([(5 + step, slot) for slot in slots], range(len(slots)))
    taken = (clock() - start) / STEPS
    for slot in slots:
        model.truncate(slot, length)
    return taken


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory")
    for name, default in (("context", 8128), ("rounds", 7), ("threads", 1)):
        parser.add_argument(name, type=int, nargs="?", default=default)
    parser.add_argument(
        "names", nargs="*", default=["16", "8", "4", "4-channel", "4-channel-sink64", "2-channel"], metavar="cache"
    )
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def opened(directory: str, name: str, context: int, sequences: int) -> NativeModel:
    """A model whose first slots are full to `context`, and as many more to 64."""
    tokens = sequences * (context + 256)
    kv = KVSpec.parse(name)
    model = NativeModel.open(directory, kv=kv, max_tokens=tokens, max_sequences=2 * sequences, verify=False, threads=2)
    ids = [(17 * i * i + 31 * i) % 30000 + 3 for i in range(context)]
    for slot in range(sequences):
        model.forward([(i + slot, slot) for i in ids], [], prompt=True)
        model.forward([(i + slot, sequences + slot) for i in ids[:64]], [], prompt=True)
    print(f"{name} filled", flush=True)
    return model


def main() -> None:
    """Measure and write."""
    asked = arguments()
    context, rounds, threads, names, count = asked.context, asked.rounds, asked.threads, asked.names, asked.sequences
    models = {name: opened(asked.directory, name, context, count) for name in names}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    native.set_threads(threads)
    for _ in range(rounds):
        for name, model in models.items():
            long, short = range(count), range(count, 2 * count)
            times[name].append((seconds(model, long, context), seconds(model, short, 64)))
    rows = {name: summary(found, times[names[0]]) for name, found in times.items()}
    for name, row in rows.items():
        print(f"{name:28} {row}")
    about = {
        "what": "decode steps, 1.1B gptq-w4",
        "context": context,
        "sequences": count,
        "rounds": rounds,
        "threads": threads,
        "machine": machine(),
    }
    command = f"python benchmarks/kv_speed.py DIR {context} {rounds} {threads} {' '.join(names)} --sequences {count}"
    out = asked.out or RESULTS / f"kv-speed-llama1b{f'-batch{count}' if count > 1 else ''}.json"
    out.write_text(json.dumps(about | {"command": command, "rows": rows}, indent=1) + "\n")


def summary(found: list[tuple[float, float]], first: list[tuple[float, float]]) -> dict[str, float]:
    """Milliseconds, and how many times as fast as the first cache."""
    return {
        "step_ms_least": round(1e3 * min(long for long, _ in found), 2),
        "step_ms_median": round(1e3 * statistics.median(long for long, _ in found), 2),
        "attention_ms_median": round(1e3 * statistics.median(long - short for long, short in found), 2),
        "step_ratio": round(statistics.median(b[0] / a[0] for a, b in zip(found, first, strict=True)), 3),
        "attention_ratio": round(
            statistics.median(b[0] - b[1] for b in first) / statistics.median(a[0] - a[1] for a in found), 3
        ),
    }


if __name__ == "__main__":
    main()
