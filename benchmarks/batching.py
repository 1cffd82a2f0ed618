"""Throughput of many requests at once against one after the other, on one checkpoint in one process.

    python benchmarks/batching.py CHECKPOINT [--prompt 64] [--tokens 64] [--rounds 3] [--out FILE]

Every round serves the same 64 requests with at most 1, 8, 32 and 64 in flight, in turn; prompts differ in their first token, so
nothing is found in the cache. Greedy; prompts are given and read in the run.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

from anybit.engine.native import NativeModel
from anybit.machine import machine
from anybit.serving.batch.engine import BatchEngine
from anybit.serving.batch.request import Piece, Request

LOADS = (1, 8, 32, 64)
REQUESTS = 64


def serve(engine: BatchEngine, requests: list[Request], load: int) -> float:
    """Seconds to answer all, with `load` in flight."""
    room, done = threading.Semaphore(load), threading.Semaphore(0)

    def deliver(piece: Piece) -> None:
        if piece.finish:
            assert piece.finish == "length", piece
            room.release()
            done.release()

    began = time.perf_counter()
    for request in requests:
        room.acquire()
        engine.submit(request, deliver)
    for _ in requests:
        done.acquire()
    return time.perf_counter() - began


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    room = (asked.prompt + asked.tokens) * max(LOADS)
    model = NativeModel.open(asked.checkpoint, max_tokens=room, max_sequences=max(LOADS))
    engine, draw = BatchEngine(model, ends=frozenset(), keep_prefixes=False), random.Random(0)
    engine.start()
    ids = [draw.randrange(model.facts.vocab) for _ in range(asked.prompt)]
    requests = [Request((first, *ids[1:]), asked.tokens) for first in draw.sample(range(model.facts.vocab), REQUESTS)]
    seconds: dict[int, list[float]] = {load: [] for load in LOADS}
    for _ in range(asked.rounds):
        for load in LOADS:
            seconds[load].append(serve(engine, requests, load))
    engine.close()
    total = REQUESTS * asked.tokens
    rows = [
        {
            "in_flight": load,
            "tokens_per_second": round(total / statistics.median(found), 1),
            "lowest": round(total / max(found), 1),
            "highest": round(total / min(found), 1),
            "over_one": round(statistics.median(seconds[1]) / statistics.median(found), 2),
        }
        for load, found in seconds.items()
    ]
    result = {
        "what": f"{REQUESTS} requests, {asked.prompt} tokens of prompt, {asked.tokens} new",
        "rounds": asked.rounds,
    }
    result |= {"rows": rows, "machine": machine(), "date": datetime.now(UTC).strftime("%Y-%m-%d")}
    print(json.dumps(result, indent=1))
    if asked.out:
        asked.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
