"""Perplexity of one nested checkpoint at every precision, paired against float and GPTQ at the same bits.

    python benchmarks/nested_quality.py --work DIR --out benchmarks/results/nested-smollm2.json

Quantizes `demo` by `pmpd` and by `gptq-w4` at 3 and 4 bits into DIR (what is there already is used), and reads the
weights of each into the float model: figures of the weights alone, the same for every kernel.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import anybit
from anybit.calibration.text import read_documents
from anybit.calibration.tokens import evaluation_windows
from anybit.checkpoint.ledger import Ledger
from anybit.evaluate.perplexity import paired_difference, scored_logits, summarize, token_nll
from anybit.formats.terms import dense, load_terms, precisions
from anybit.loading import load_any
from anybit.machine import machine

WINDOWS, CTX = 24, 512
GPTQ_BITS = (3, 4)


def likelihoods(model: Any, windows: Tensor, directory: Path, bits: int | None) -> Tensor:
    """Negative log-likelihoods float64 [W, CTX - 1] of a checkpoint at `bits`; kept beside it and read back next time."""
    kept = directory.with_name(f"{directory.name}-nll{bits or ''}.safetensors")
    if not kept.is_file():
        if directory.is_dir():
            write_weights(model, directory, bits)
        nll = torch.stack([token_nll(scored_logits(model, window[None]), window[1:]) for window in windows])
        save_file({"nll": nll}, kept)
    return load_file(kept)["nll"]


def write_weights(model: Any, directory: Path, bits: int | None) -> None:
    """Put a checkpoint's weights into a float model of the same shape, nested ones at `bits`."""
    layers = json.loads((directory / "config.json").read_text())["quantization_config"]["layers"]
    tensors = {key: t for file in sorted(directory.glob("model-*.safetensors")) for key, t in load_file(file).items()}
    for name, form in layers.items():
        own = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
        width = bits if len(precisions(form)) > 1 else None
        model.get_parameter(f"{name}.weight").data.copy_(dense(load_terms(form, own), width))


def difference(one: Tensor, other: Tensor) -> dict[str, Any]:
    """Perplexity of `one` over that of `other` with its 95 % interval."""
    pair = paired_difference(other, one)
    return {"ratio": pair.ratio, "low": pair.ratio_low, "high": pair.ratio_high}


def measure(nested: Path, gptq: Mapping[int, Path]) -> dict[str, Any]:
    """Everything the result file says of quality and size."""
    model, tokenizer = load_any("demo", dtype="float32")
    windows = evaluation_windows(tokenizer, read_documents("wiki-test"), CTX, WINDOWS * CTX)
    original = likelihoods(model, windows, nested.with_name("float"), None)
    rows, plain = [], {}
    for bits, directory in gptq.items():
        plain[bits] = likelihoods(model, windows, directory, None)
        rows.append(
            _row(f"gptq {bits} bits", plain[bits], original) | {"size_bytes": Ledger.read(directory).size_bytes}
        )
    ledger = Ledger.read(nested)
    for bits in max((row.errors for row in ledger.tensors), key=len):
        found = likelihoods(model, windows, nested, bits)
        rows.append(_row(f"nested at {bits} bits", found, original))
        if bits in plain:
            rows[-1]["over_gptq"] = difference(found, plain[bits])
        print(json.dumps(rows[-1]), flush=True)
    facts = {
        "size_bytes": ledger.size_bytes,
        "bits_per_weight": ledger.bits_per_weight,
        "precisions": ledger.precisions,
    }
    return {"float_perplexity": summarize(original).perplexity, "nested": facts, "rows": rows}


def _row(what: str, found: Tensor, original: Tensor) -> dict[str, Any]:
    value = summarize(found)
    return {
        "what": what,
        "perplexity": value.perplexity,
        "stderr": value.stderr,
        "over_float": difference(found, original),
    }


def main() -> None:
    """Quantize what is missing, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    made = {"pmpd": ("pmpd", [])} | {f"gptq-{b}": ("gptq-w4", [f"weights.bits={b}"]) for b in GPTQ_BITS}
    for name, (recipe, overrides) in made.items():
        if not (options.work / name).is_dir():
            anybit.quantize("demo", recipe=recipe, out=str(options.work / name), overrides=overrides)
    table = {"what": f"demo on wiki-test, {WINDOWS} windows of {CTX}; calibration wiki 32 x 512, seed 0"}
    table |= {"machine": machine(), "command": "python benchmarks/nested_quality.py"}
    table |= {"date": datetime.now(UTC).strftime("%Y-%m-%d")}
    table |= measure(options.work / "pmpd", {bits: options.work / f"gptq-{bits}" for bits in GPTQ_BITS})
    options.out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
