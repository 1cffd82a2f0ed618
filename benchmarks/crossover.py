"""Where bit-serial and table look-up beat int8 multiply-add, and where they lose: one interleaved run, checked first.

    python benchmarks/crossover.py [--shape 576x576] [--threads 1] [--isa avx512] [--out FILE]

Per shape [N, K], M tokens and widths (p weight bits, q activation bits): the time of linear_bits, linear_lut and
linear_w_a8 on the same integer codes, one scale per row. Packing activations into planes and building tables is counted;
quantizing floats to codes, common to all, and checks of arguments are not. With one thread the CPU time of that thread
counts, so that a busy neighbour does not; with more, wall time. Weights rotate through 8 MB. Rows are merged into the
JSON, so a run can be done in parts.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anybit.formats.planes import pack
from anybit.kernels import native
from anybit.kernels.linear_bits import op as bits
from anybit.kernels.linear_bits.encoding import twos_complement, unsigned
from anybit.kernels.linear_bits.weight import CodedWeight
from anybit.kernels.linear_lut import op as lut
from anybit.kernels.linear_w_a8 import op as w_a8
from anybit.machine import machine

SHAPES = ((576, 576), (1536, 576), (2048, 2048), (5632, 2048), (4096, 11008))
TOKENS = (1, 8, 64)
WIDTHS = ((1, 1), (2, 2), (4, 4), (1, 8), (2, 8), (4, 8))
ROUNDS = 7
ROTATION = 8 << 20  # bytes of planes
SLICE = 0.004  # seconds of each kernel per round

Call = Callable[[int], Tensor]


class Operands:
    """One random weight in the three layouts, several copies of each."""

    def __init__(self, shape: tuple[int, int], p: int) -> None:
        rows, columns = shape
        self.codes = torch.randint(0, 1 << p, shape, dtype=torch.uint8)
        self.zero = torch.full((rows, 1), 1 << (p - 1), dtype=torch.uint8)
        scale = (torch.rand(rows, 1) + 0.5).half()
        planes = pack(self.codes, p)
        coded = CodedWeight.of(planes, columns, unsigned(p), columns, scale.float(), -self.zero.int())
        count = min(max(1, ROTATION // planes.numel()), 64)
        self.bits = copies(bits.prepare(coded), count)
        self.lut = copies(lut.prepare(coded), count)
        self.tiled = copies(w_a8.tile(planes, scale, self.zero, columns, columns), count)

    def calls(self, tokens: int, q: int) -> dict[str, Call]:
        """The three kernels on the same q-bit codes, after a check that their integers are equal."""
        columns, e = self.codes.shape[1], twos_complement(q)
        x = torch.randint(-(1 << (q - 1)), 1 << (q - 1), (tokens, columns)).clamp(-127).to(torch.int8)
        x_scale = torch.rand(tokens) + 0.5
        padded = torch.zeros(tokens, (-(-columns // 64) | 1) * 64, dtype=torch.int8)
        padded[:, :columns] = x
        sums = x.sum(1, dtype=torch.int32)[:, None]
        wide = w_a8.Quantized(padded, x_scale[:, None].contiguous(), sums.float())
        exact = (w_a8.sums(wide, self.tiled[0])[:, 0] - sums * self.zero.T.int())[..., None]
        if not torch.equal(bits.integers(x, self.bits[0], e), exact) or not torch.equal(
            lut.integers(x, self.lut[0]), exact
        ):
            raise SystemExit(f"kernels disagree at {self.codes.shape}, q={q}, {tokens} tokens")
        return {
            "linear_bits": lambda i: bits.linear_unchecked(x, x_scale, self.bits[i % len(self.bits)], e),
            "linear_lut": lambda i: lut.linear_unchecked(x, x_scale, self.lut[i % len(self.lut)]),
            "linear_w_a8": lambda i: w_a8.linear_quantized(wide, self.tiled[i % len(self.tiled)]),
        }


def copies(weight: Any, count: int) -> list[Any]:
    """`count` prepared weights with memory of their own."""
    tensors = [f.name for f in fields(weight) if isinstance(getattr(weight, f.name), Tensor)]
    return [replace(weight, **{name: getattr(weight, name).clone() for name in tensors}) for _ in range(count)]


def microseconds(calls: dict[str, Call]) -> dict[str, list[float]]:
    """Per kernel one time per call for each round; the kernels take turns."""
    clock = time.thread_time if native.loaded().threads() == 1 else time.perf_counter
    repeats, start = {}, 0
    for name, call in calls.items():
        call(0)
        begin = clock()
        call(1)
        repeats[name] = max(1, int(SLICE / max(clock() - begin, 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            begin = clock()
            for i in range(start, start + repeats[name]):
                call(i)
            times[name].append((clock() - begin) / repeats[name] * 1e6)
        start += max(repeats.values())
    return times


def measure(operands: Operands, p: int, q: int, tokens: int) -> dict[str, Any]:
    """One row: median times, and time over that of linear_w_a8 as [least, median, greatest] of the rounds."""
    times = microseconds(operands.calls(tokens, q))
    ratios = {
        name: sorted(a / b for a, b in zip(times[name], times["linear_w_a8"], strict=True))
        for name in ("linear_bits", "linear_lut")
    }
    return {
        "shape": list(operands.codes.shape),
        "tokens": tokens,
        "weight_bits": p,
        "activation_bits": q,
        "isa": native.isa(),
        "threads": native.loaded().threads(),
        "microseconds": {name: round(statistics.median(each), 2) for name, each in times.items()},
        "ratio": {n: [round(r[0], 3), round(statistics.median(r), 3), round(r[-1], 3)] for n, r in ratios.items()},
    }


def identity(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a row measures; a new one replaces an old one."""
    return tuple(str(row[key]) for key in ("isa", "threads", "shape", "weight_bits", "activation_bits", "tokens"))


def save(path: Path, rows: list[dict[str, Any]]) -> None:
    """Merge into the file."""
    old = json.loads(path.read_text())["rows"] if path.is_file() else []
    merged = {identity(row): row for row in (*old, *rows)}
    lines = ",\n  ".join(json.dumps(merged[key]) for key in sorted(merged))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{"machine": {json.dumps(machine())},\n "rows": [\n  {lines}\n ]}}\n')


def default_path() -> Path:
    """benchmarks/results/crossover-<cpu>.json."""
    cpu = re.sub(r"[^a-z0-9]+", "-", str(machine()["processor"]).lower()).strip("-")
    return Path(__file__).parent / "results" / f"crossover-{cpu}.json"


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", help="NxK; default: all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--isa", default=native.isa())
    parser.add_argument("--out", type=Path, default=default_path())
    args = parser.parse_args()
    native.loaded().set_isa(args.isa)
    native.set_threads(args.threads)
    shapes = [tuple(map(int, text.split("x"))) for text in args.shape or []] or SHAPES
    print(
        f"{args.isa}, {args.threads} threads; time over that of linear_w_a8, below 1 is faster: median (least-greatest)"
    )
    for rows, columns in shapes:
        made = []
        for p, q in WIDTHS:
            operands = Operands((rows, columns), p)
            for tokens in TOKENS:
                made.append(row := measure(operands, p, q, tokens))
                cells = [f"{n} {r[1]:6.2f} ({r[0]:.2f}-{r[2]:.2f})" for n, r in row["ratio"].items()]
                us = row["microseconds"]["linear_w_a8"]
                print(f"{rows}x{columns} w{p}a{q} M={tokens:2}  {'  '.join(cells)}  w_a8 {us:.1f} us", flush=True)
        save(args.out, made)


if __name__ == "__main__":
    main()
