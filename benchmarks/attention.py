"""Speed of attention over 16-, 8- and 4-bit caches: checked against the reference first, then timed.

Run: python benchmarks/attention.py [--threads N]. Decode: one token of one sequence, caches rotate through 128 MB; the share is
that of the read bandwidth measured beside it. Prefill: 512 tokens from position 0, 2 D flops per product and visible position;
the share is that of float32 matrix multiplication by PyTorch, measured beside it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from anybit.kernels import native
from anybit.kernels.attention import op
from anybit.kernels.attention.shape import PAGE_TOKENS, KvShape

HEADS = [(9, 3, 64), (32, 4, 64), (32, 8, 128)]
CONTEXTS = (4096, 16384, 32768)
ROTATION = 128 << 20  # bytes
ROUNDS = 7
BITS = (16, 8, 4)
SCALING = 0.125


def seconds(calls: list[Callable[[], object]]) -> list[float]:
    """Median time of each, taken in turns so that a busy neighbour disturbs all alike; CPU time where one thread runs."""
    clock = time.thread_time if native.loaded().threads() == 1 else time.perf_counter
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS + 1):
        for call, taken in zip(calls, times, strict=True):
            start = clock()
            call()
            taken.append(clock() - start)
    return [statistics.median(taken[1:]) for taken in times]


def filled(shape: KvShape, pages: int, tokens: int) -> op.PagedCache:
    """Random keys and values at positions 0..tokens-1 of a sequence with scattered pages."""
    table = torch.randperm(pages)[: -(-tokens // PAGE_TOKENS)].tolist()
    cache = op.PagedCache(shape, torch.zeros(pages, shape.page_bytes, dtype=torch.uint8), [table])
    keys, values = torch.randn(2, tokens, shape.kv_heads, shape.head_dim)
    op.write(cache, [op.Look(0, t, t) for t in range(tokens)], keys, values)
    return cache


def call_of(cache: op.PagedCache, looks: list[op.Look], prompt: bool = False) -> Callable[[], object]:
    """The native call alone, its arguments made beforehand."""
    shape, module = cache.shape, native.loaded()
    q = torch.randn(len(looks), shape.heads, shape.head_dim)
    out, where = torch.empty_like(q), torch.tensor(looks)
    tables, start, result = cache.addresses(), where.data_ptr(), out.data_ptr()

    def call() -> object:
        module.attend(shape.sizes, tables, start, len(looks), q.data_ptr(), SCALING, 0.0, prompt, result)
        return out, where, cache

    return call


def check(cache: op.PagedCache, look: op.Look) -> None:
    """Native equals reference, or the timing means nothing."""
    q = torch.randn(1, cache.shape.heads, cache.shape.head_dim)
    got, want = (op.attend(cache, [look], q, SCALING, impl=impl) for impl in op.IMPLEMENTATIONS)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=8e-3)


def decode_calls(shape: KvShape, context: int) -> tuple[Callable[[], object], int]:
    """One step over each of enough caches to fill the rotation, and how many they are."""
    count = max(1, ROTATION // (context // PAGE_TOKENS * shape.page_bytes))
    first, look = filled(shape, context // PAGE_TOKENS, context), op.Look(0, 0, context - 1)
    check(first, look)
    calls = [call_of(op.PagedCache(shape, first.pages.clone(), first.tables), [look]) for _ in range(count)]
    return lambda: [call() for call in calls], count


def decode(heads: tuple[int, int, int], context: int) -> str:
    """One line: time of a step, GB/s of cache read and share of the read bandwidth, for each width."""
    shapes = [KvShape(*heads, bits) for bits in BITS]
    calls = [decode_calls(shape, context) for shape in shapes]
    buffer = torch.ones(ROTATION // 4)
    *ours, read = seconds([*(call for call, _ in calls), buffer.sum])
    bandwidth = ROTATION / read / 1e9
    cells = ""
    for shape, (_, count), taken in zip(shapes, calls, ours, strict=True):
        rate = context // PAGE_TOKENS * shape.page_bytes * count / taken / 1e9
        cells += f" {taken / count * 1e6:7.0f} {rate:5.1f} {rate / bandwidth:5.0%}"
    return f"{heads!s:>12} {context:6}{cells}   {bandwidth:5.1f} GB/s"


def prefill(heads: tuple[int, int, int], tokens: int = 512) -> str:
    """One line: time, GFLOP/s and share of PyTorch's matrix multiplication, for each width."""
    calls = []
    for bits in BITS:
        cache = filled(KvShape(*heads, bits), tokens // PAGE_TOKENS, tokens)
        check(cache, op.Look(0, 0, tokens - 1))
        calls.append(call_of(cache, [op.Look(0, 0, t) for t in range(tokens)], prompt=True))
    a, b = torch.randn(2, 768, 768)
    *ours, dense = seconds([*calls, lambda: a @ b])
    flops = 4 * heads[0] * heads[2] * tokens * (tokens + 1) / 2
    peak = 2 * 768**3 / dense / 1e9
    cells = "".join(f" {t * 1e6:7.0f} {flops / t / 1e9:5.0f} {flops / t / 1e9 / peak:5.0%}" for t in ours)
    return f"{heads!s:>12} {tokens:6}{cells}   {peak:5.0f} GFLOP/s"


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=native.loaded().threads())
    threads = parser.parse_args().threads
    native.set_threads(threads)
    torch.set_num_threads(threads)
    print(f"{native.isa()}, {threads} threads; columns: us, rate, share; for 16, 8 and 4 bits")
    for heads in HEADS:
        print(prefill(heads))
    for heads in HEADS:
        for context in CONTEXTS:
            print(decode(heads, context))


if __name__ == "__main__":
    main()
