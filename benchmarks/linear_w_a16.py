"""Speed of linear_w_a16 on the shapes of a 135 M and a 7 B model: checked against the reference first, then timed.

Run: python benchmarks/linear_w_a16.py [--threads N]. Weights rotate through 64 MB, so they are
read from memory as in a real step.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from anybit.kernels import native
from anybit.kernels.linear_w_a16 import op

SHAPES = [(192, 576), (576, 576), (1536, 576), (576, 1536), (4096, 4096)]
GROUP = 32
ROTATION = 64 << 20  # bytes


def weights(bits: int, rows: int, columns: int) -> list[tuple[Tensor, Tensor, Tensor, int, int]]:
    """Enough random weights to fill the rotation."""
    count = max(1, ROTATION // (bits * rows * columns // 8))
    planes = torch.randint(0, 256, (count, bits, rows, columns // 8), dtype=torch.uint8)
    scale = torch.rand(count, rows, columns // GROUP).half() + 0.5
    zero = torch.randint(0, 2**bits, (count, rows, columns // GROUP), dtype=torch.uint8)
    return [(planes[i], scale[i], zero[i], GROUP, columns) for i in range(count)]


def microseconds(call: Callable[[int], object], count: int) -> float:
    """Best of five passes over `count` weights, per call."""
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for i in range(count):
            call(i)
        best = min(best, (time.perf_counter() - start) / count)
    return best * 1e6


def row(bits: int, shape: tuple[int, int], tokens: int) -> str:
    """One checked and timed line."""
    many = weights(bits, *shape)
    x = torch.randn(tokens, shape[1])
    torch.testing.assert_close(op.linear(x, *many[0]), op.linear(x, *many[0], impl="reference"), rtol=1e-4, atol=1e-2)
    ours = microseconds(lambda i: op.linear(x, *many[i]), len(many))
    dense = [torch.randn(shape) for _ in range(max(1, ROTATION // (4 * shape[0] * shape[1])))]
    torch_time = microseconds(lambda i: x @ dense[i].T, len(dense))
    read = bits * shape[0] * shape[1] / 8
    measured = f"{ours:9.1f} {read / ours / 1e3:7.2f} {torch_time:9.1f} {torch_time / ours:6.2f}"
    return f"{bits:4} {shape!s:>14} {tokens:6} {measured}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=native.loaded().threads())
    threads = parser.parse_args().threads
    native.set_threads(threads)
    torch.set_num_threads(threads)
    print(f"{native.isa()}, {threads} threads, group {GROUP}")
    print("bits          shape tokens   ours us    GB/s  torch us  ratio   (torch: float32)")
    for bits in (2, 4, 8):
        for shape in SHAPES:
            print(row(bits, shape, 1))
    for tokens in (4, 16, 64):
        print(row(4, (1536, 576), tokens))


if __name__ == "__main__":
    main()
