"""`anybit bench 4096x11008`: single matrices, ours beside torch bfloat16 and beside the machine's limits."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from anybit.engine.memory import Memory
from anybit.errors import PromiseError
from anybit.evaluate.bench import Say, beside, limits_of, require_native, row, summary, warn_when_busy
from anybit.evaluate.cold import free_memory, last_level_cache, read_buffer
from anybit.evaluate.rounds import take_turns
from anybit.kernels import native
from anybit.kernels.linear_w_a8 import op as linear_w_a8
from anybit.kernels.linear_w_a16 import op as linear_w_a16
from anybit.kernels.linear_w_a16.weight import Weight
from anybit.kernels.machine.op import measure_peaks

Shape = tuple[int, int]
Call = Callable[[int], object]
"""Multiplies with copy i of a weight."""
GEMV_BITS = (8, 4, 3, 2)
GEMM_BITS = (8, 4)
GEMM_TOKENS = 512
GROUP = 32
"""Columns per scale; matrix-matrix products are also timed with one scale a row, as in W8A8."""


def kernel_rows(shapes: Sequence[Shape], threads: int, *, rounds: int = 7, say: Say = lambda _: None) -> dict[str, Any]:
    """Time matrix-vector and matrix-matrix products; results as of `anybit.evaluate.bench.bench`.

    Args:
        shapes: (N, K) of weights.
        threads: of everybody.
    """
    require_native()
    torch.set_num_threads(threads)
    native.set_threads(threads)
    busy = warn_when_busy(say)
    rows, peaks = [], []
    for shape in shapes:
        for tokens, widths in ((1, GEMV_BITS), (GEMM_TOKENS, GEMM_BITS)):
            groups = (GROUP,) if tokens == 1 else (GROUP, shape[1])
            for bits, group in product(widths, groups):
                made, measured = one_row(shape, tokens, bits, group, rounds)
                say(f"{made['what']}: done")
                rows.append(made)
                peaks += measured
    return {"peaks": summary(peaks, threads), "busy_cores": busy, "skipped": {}, "rows": rows}


def one_row(shape: Shape, tokens: int, bits: int, group: int, rounds: int) -> tuple[dict[str, Any], list[Any]]:
    """One shape, token count and width: the row, and the peaks of each round."""
    copies, read, ours = our_calls(shape, tokens, bits, group)
    dense = [torch.randn(shape).bfloat16() for _ in range(copies_of(2 * shape[0] * shape[1], tokens))]
    x = torch.randn(tokens, shape[1]).bfloat16()
    buffer = read_buffer()
    measures: dict[str, Callable[[], Any]] = {
        "peaks": lambda: measure_peaks(buffer),
        "ours": lambda: per_second(ours, copies),
        "torch bf16": lambda: per_second(lambda i: x @ dense[i].T, len(dense)),
    }
    results = take_turns(measures, rounds, lambda *_: None, ())  # type: ignore[arg-type]  # nothing may fail here
    peaks, mine = results["peaks"], results["ours"]
    operations = 2 * tokens * shape[0] * shape[1]
    limits = limits_of(mine, peaks, bytes_read=read if tokens == 1 else 0, operations=operations if tokens > 1 else 0)
    kind = "gemv" if tokens == 1 else f"gemm M={tokens}"
    what = {
        "what": f"{kind} {shape[0]}x{shape[1]} {bits} bit, group {group}",
        "unit": "calls/s",
        "engine": "linear_w_a8",
    }
    about = {"bytes": read, "operations": operations, "rival_name": "torch bf16"}
    return row(what, mine, limits) | about | beside(mine, results["torch bf16"]), peaks


def our_calls(shape: Shape, tokens: int, bits: int, group: int = GROUP) -> tuple[int, int, Call]:
    """Our kernel on random weights: how many copies, bytes that one call reads, and the call.

    Integers times integers (`linear_w_a8`), the activations quantized beforehand: in a model that is part of the norm
    before them. The native function is called with addresses, as the native decoder calls it: taking them from tensors
    is 4 to 5 % of a call. The one place to change when another kernel is to be timed. Checked against decoded weights
    first.
    """
    rows, columns = shape
    groups = -(-columns // group)
    planes = torch.randint(0, 256, (bits, rows, -(-columns // 8)), dtype=torch.uint8)
    scale = (torch.rand(rows, groups) + 0.5).half()
    zero = torch.randint(0, 2**bits, (rows, groups), dtype=torch.uint8)
    first, memory = linear_w_a8.tile(planes, scale, zero, group, columns), Memory()
    read = sum(part.nbytes for part in (first.planes, first.scale, first.zero) if part is not None)
    count = copies_of(read, tokens)
    copies = [first] + [_copy(first, memory) for _ in range(count - 1)]
    x = linear_w_a8.quantize(torch.randn(tokens, columns), group)
    dense = linear_w_a16.decode(Weight(planes, scale, zero, group, columns))
    expected = dequantized(x, columns, group)[:4] @ dense.T
    check(linear_w_a8.linear_quantized(x, first)[:4], expected, f"{rows}x{columns} {bits} bit")
    y = torch.empty(tokens, rows)
    calls = [linear_w_a8.prepared(x, copy, y) for copy in copies]

    def call(i: int) -> object:
        calls[i]()
        return x, copies, y  # keeps them alive: calls hold addresses only

    return count, read, call


def dequantized(x: linear_w_a8.Quantized, columns: int, group: int) -> Tensor:
    """The float32 [T, K] that quantized activations stand for."""
    return x.codes[:, :columns] * x.scale.repeat_interleave(group, 1)[:, :columns]


def _copy(weight: linear_w_a8.Tiled, memory: Memory) -> linear_w_a8.Tiled:
    parts = {"planes": weight.planes, "scale": weight.scale, "zero": weight.zero}
    taken = {
        name: torch.from_numpy(memory.take(tuple(part.shape), part.numpy().dtype)).copy_(part)
        for name, part in parts.items()
        if part is not None
    }
    return replace(weight, **taken)  # type: ignore[arg-type]  # every name goes to its own tensor


def check(measured: Tensor, expected: Tensor, what: str) -> None:
    """Raise PromiseError when a product is wrong."""
    error = float((measured - expected).norm() / expected.norm())
    if not error < 1e-3:
        raise PromiseError(f"{what}: the kernel is off by {error:.2g} (relative); its speed means nothing")


def copies_of(size: int, tokens: int) -> int:
    """How many weights of `size` bytes to rotate through.

    Beyond the cache for one token (twice the last level, at most an eighth of free memory), since in a model no weight
    is in the cache when its turn comes; two are enough where arithmetic decides.
    """
    wanted = min(2 * last_level_cache(), free_memory() // 8) if tokens == 1 else 2 * size
    return max(1, -(-wanted // size))


def per_second(call: Call, copies: int, seconds: float = 0.2) -> float:
    """Calls a second, over whole passes through the copies that take at least `seconds` together."""
    call(0)
    done, started = 0, time.perf_counter()
    while (spent := time.perf_counter() - started) < seconds:
        for i in range(copies):
            call(i)
        done += copies
    return done / spent
