"""The nested GPU kernels: correct at every width, then GB/s and the ratio to cuBLAS bfloat16, interleaved. Needs an NVIDIA GPU.

make gpu                                       all shapes of PMPD's models, 1 and 8 tokens and 512
python benchmarks/gpu_linear.py --json FILE    keep the figures (benchmarks/results/)
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from anybit.formats.binary_coded import BinaryCoded
from anybit.formats.codebook import Codebook
from anybit.formats.decoder import Decoder
from anybit.formats.nested_affine import NestedAffine
from anybit.formats.planes import pack
from anybit.kernels.linear_w_a16.gpu_weight import GpuWeight, gpu_weight

WIDTHS = (2, 3, 4, 8)
# Linears of Vicuna-7B, StableLM-Zephyr-3B and MobileLLaMA-1.4B, [N, K].
SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (6912, 2560), (2560, 6912), (5632, 2048), (2048, 5632))
FLUSH_BYTES = 256 << 20  # more than any second-level cache: every product reads its weight from memory
ROUNDS = 30


def decoders(rows: int, columns: int) -> dict[str, Decoder]:
    """One of each kind with random tables, eight stored bits."""
    table = (rows, columns // 128)
    zeros = {p: torch.randint(0, 256, table, dtype=torch.uint8) for p in WIDTHS}
    ratios = {p: torch.randint(60, 200, table, dtype=torch.uint8) for p in WIDTHS[:-1]}
    alphas = {p: (torch.rand(*table, p) + 0.1).half() for p in WIDTHS}
    return {
        "affine": NestedAffine(8, 128, WIDTHS, (torch.rand(table) + 0.1).half(), zeros, ratios),
        "binary_coded": BinaryCoded(8, 128, alphas, {p: torch.randn(table).half() for p in WIDTHS}),
        "codebook": Codebook(8, {p: torch.randn(rows, 2**p).half() for p in WIDTHS}),
    }


def milliseconds(call: Any, flush: torch.Tensor) -> float:
    """One call on a cold cache, by the GPU's clock."""
    flush.zero_()
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    stop.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(stop))


def check(weight: GpuWeight, dense: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
    """Against float64, with the bound of bfloat16 factors beyond eight tokens."""
    bound = (2**-7 if len(x) > 8 else 1e-4) * (x.double().abs() @ dense.double().abs().T) + 1e-6
    if not bool(((y.double() - x.double() @ dense.double().T).abs() <= bound).all()):
        sys.exit(f"WRONG: {weight.kind} {tuple(dense.shape)} with {len(x)} tokens")


def measure(rows: int, columns: int, tokens: int, flush: torch.Tensor) -> list[dict[str, Any]]:
    """Rows of the table for one shape."""
    from anybit.kernels.linear_w_a16 import triton as kernels

    codes = torch.randint(0, 256, (rows, columns), dtype=torch.uint8)
    x = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
    cell = torch.zeros(1, dtype=torch.int32, device="cuda")
    found = []
    for kind, decoder in decoders(rows, columns).items():
        weight = gpu_weight(pack(codes, 8), decoder, columns).to("cuda")
        for bits in WIDTHS:
            cell.fill_(bits)
            dense = decoder.decode(codes, bits).to("cuda")
            check(weight, dense, x, kernels.linear(x, weight, cell))
            half = dense.bfloat16()
            times: dict[str, list[float]] = {"ours": [], "cublas": []}
            for _ in range(ROUNDS):
                times["ours"].append(milliseconds(lambda: kernels.linear(x, weight, cell), flush))  # noqa: B023
                times["cublas"].append(milliseconds(lambda: torch.nn.functional.linear(x, half), flush))  # noqa: B023
            ours, rival = (statistics.median(times[name]) for name in ("ours", "cublas"))
            facts = {"kind": kind, "rows": rows, "columns": columns, "tokens": tokens, "bits": bits}
            speed = weight.step_bytes(bits) / ours / 1e6
            found.append({**facts, "milliseconds": ours, "gigabytes_per_second": speed, "of_cublas": rival / ours})
            print(
                f"{kind:13} {rows:6}x{columns:<6} T={tokens:<4} {bits} bit  {speed:7.0f} GB/s  {rival / ours:5.2f}x cuBLAS"
            )
    return found


def main() -> None:
    """Measure and print; with --json also keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no NVIDIA GPU here; the kernels' correctness is tested without one by `make test`")
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    found = [row for n, k in SHAPES for tokens in (1, 8, 512) for row in measure(n, k, tokens, flush)]
    if options.json:
        facts = {"machine": torch.cuda.get_device_name(), "rounds": ROUNDS, "torch": torch.__version__, "rows": found}
        options.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
