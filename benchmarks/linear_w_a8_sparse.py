"""2:4-sparse tiles beside dense tiles of the same weight and torch bfloat16, in turns; ratios within a turn.

Run: python benchmarks/linear_w_a8_sparse.py [5632x2048 ...] [--bits 4 8] [--tokens 1 8 512] [--rounds N] [--json FILE]
Every call reads another copy of its weight, all copies together `--megabytes`, so that one token finds none in a cache near it.
Results of both layouts are compared bit by bit before anything is timed. Rows of earlier runs stay in FILE unless measured again:
a short run disturbs a shared machine less than a long one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from anybit.engine.memory import Memory
from anybit.evaluate.bench_kernels import per_second
from anybit.evaluate.rounds import ratios, spread, take_turns
from anybit.formats.planes import pack
from anybit.kernels import native
from anybit.kernels.linear_w_a8 import op, sparse
from anybit.machine import machine

Call = Callable[[int], object]


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", nargs="*", default=["5632x2048", "2048x5632"], help="N x K")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 512])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    native.set_threads(options.threads)
    rows = json.loads(options.json.read_text())["rows"] if options.json and options.json.exists() else []
    for shape, bits, tokens in product(options.shapes, options.bits, options.tokens):
        n, k = (int(side) for side in shape.split("x"))
        made = one_row((n, k), bits, tokens, options.rounds, options.megabytes << 20)
        made["what"] += f", {native.isa()}, {options.threads} threads"
        print(made["what"], made["ratios"], flush=True)
        rows = [row for row in rows if row["what"] != made["what"]] + [made]
    report = {"machine": machine(), "rows": rows}
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def one_row(shape: tuple[int, int], bits: int, tokens: int, rounds: int, total: int) -> dict[str, Any]:
    """Calls a second of the three, and ratios."""
    dense, compressed = weights(shape, bits)
    x = op.quantize(torch.randn(tokens, shape[1]), shape[1])
    if not torch.equal(op.linear_quantized(x, dense), op.linear_quantized(x, compressed)):
        raise SystemExit(f"{shape} {bits} bit: the two layouts differ")
    calls = {name: ours(w, x, total) for name, w in (("sparse", compressed), ("dense", dense))}
    calls["torch bf16"] = torch_bf16(shape, tokens, total)
    measures = {name: lambda made=made: per_second(*made) for name, made in calls.items()}
    found = take_turns(measures, rounds, lambda *_: None, ())  # type: ignore[arg-type]  # nothing may fail here
    return {
        "what": f"{shape[0]}x{shape[1]} {bits} bit, {tokens} tokens",
        "bytes": {"sparse": size(compressed), "dense": size(dense), "torch bf16": 2 * shape[0] * shape[1]},
        "calls_per_second": {name: asdict(spread(values)) for name, values in found.items()},
        "ratios": {
            f"sparse / {name}": asdict(ratios(found["sparse"], found[name])) for name in ("dense", "torch bf16")
        },
    }


def weights(shape: tuple[int, int], bits: int) -> tuple[op.Tiled, op.Tiled]:
    """One random 2:4 weight, one scale a row, in both layouts."""
    n, k = shape
    codes = torch.randint(0, 2**bits, (n, k // 4, 4), dtype=torch.uint8)
    codes = codes.scatter(2, torch.rand(codes.shape).argsort(2)[:, :, :2], 2 ** (bits - 1)).view(n, k)
    planes, scale = pack(codes, bits), (torch.rand(n, 1) + 0.5).half()
    return op.tile(planes, scale, None, k, k), op.of_numpy(sparse.tile_sparse([(planes.numpy(), scale.numpy())], k, k))


def size(w: op.Tiled) -> int:
    """Bytes that a call reads of it."""
    return sum(part.nbytes for part in (w.planes, w.scale, w.mask) if part is not None)


def ours(w: op.Tiled, x: op.Quantized, total: int) -> tuple[Call, int]:
    """A call with copy i, and how many copies; the native function with addresses, as the native decoder calls it."""
    memory, count = Memory(), max(2, total // size(w))
    y = torch.empty(len(x.codes), w.rows)

    def taken(part: torch.Tensor | None) -> torch.Tensor | None:
        return (
            part if part is None else torch.from_numpy(memory.take(tuple(part.shape), part.numpy().dtype)).copy_(part)
        )

    copies = [replace(w, planes=taken(w.planes), scale=taken(w.scale), mask=taken(w.mask)) for _ in range(count)]
    prepared = [op.prepared(x, copy, y) for copy in copies]

    def call(i: int) -> object:
        prepared[i]()
        return x, copies, y  # keeps them alive: calls hold addresses only

    return call, count


def torch_bf16(shape: tuple[int, int], tokens: int, total: int) -> tuple[Call, int]:
    """The same of x @ W^T in bfloat16."""
    weight, count = torch.randn(shape).bfloat16(), max(2, total // (2 * shape[0] * shape[1]))
    copies, x = [weight.clone() for _ in range(count)], torch.randn(tokens, shape[1]).bfloat16()
    return lambda i: x @ copies[i].T, count


if __name__ == "__main__":
    main()
