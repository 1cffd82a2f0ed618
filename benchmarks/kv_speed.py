"""Decode at a long context with different caches: `python benchmarks/kv_speed.py DIR [context] [rounds] [threads] [cache ...]`.

Every cache is filled with the same tokens, then whole decode steps of all caches take turns, so a busy neighbour hurts all
alike (with one thread CPU time is measured); per cache the least and the median of the rounds, ratios of medians of each
round. Attention alone is the difference to the same step at a context of 64, in the same rounds.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

from anybit.engine.native import NativeModel
from anybit.formats.kv import KVSpec
from anybit.kernels import native
from anybit.machine import machine

OUT = Path(__file__).parent / "results" / "kv-speed-llama1b.json"
STEPS = 3


def seconds(model: NativeModel, slot: int, length: int) -> float:
    """One decode step, the mean of a few; the slot is as long as before afterwards."""
    clock = time.thread_time if native.loaded().threads() == 1 else time.perf_counter
    start = clock()
    for step in range(STEPS):
        model.top([(5 + step, slot)], [0])
    taken = (clock() - start) / STEPS
    model.truncate(slot, length)
    return taken


def main() -> None:
    """Measure and write."""
    directory = sys.argv[1]
    context, rounds, threads = (int(word) for word in (sys.argv[2:5] or (8128, 7, 1)))
    names = sys.argv[5:] or ["16", "8", "4", "4-channel", "4-channel-sink64", "2-channel"]
    models = {
        n: NativeModel.open(
            directory, kv=KVSpec.parse(n), max_tokens=context + 256, max_sequences=2, verify=False, threads=2
        )
        for n in names
    }
    ids = [(17 * i * i + 31 * i) % 30000 + 3 for i in range(context)]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for name, model in models.items():
        model.forward([(i, 0) for i in ids], [], prompt=True)
        model.forward([(i, 1) for i in ids[:64]], [], prompt=True)
        print(f"{name} filled", flush=True)
    native.set_threads(threads)
    for _ in range(rounds):
        for name, model in models.items():
            times[name].append((seconds(model, 0, context), seconds(model, 1, 64)))
    rows = {name: summary(found, times[names[0]]) for name, found in times.items()}
    for name, row in rows.items():
        print(f"{name:28} {row}")
    about = {
        "what": "decode steps, 1.1B gptq-w4",
        "context": context,
        "rounds": rounds,
        "threads": threads,
        "machine": machine(),
    }
    command = f"python benchmarks/kv_speed.py DIR {context} {rounds} {threads} {' '.join(names)}"
    OUT.write_text(json.dumps(about | {"command": command, "rows": rows}, indent=1) + "\n")


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
