"""What each step of QoQ and DGQ is worth on the demo model: each without one step, paired window by window with the whole.

    python benchmarks/ablation_qoq.py --out benchmarks/results/ablation-dual-smollm2.json [--windows 24] [SPEC ...]

A SPEC is a recipe, `-NAME` for every transform or learner to leave out, and overrides: "qoq-w4a8kv4 -reorder weights.clip=none".
The default is the table `SPECS`. A row says how much log perplexity the SPEC has over the float model and over its whole
recipe, each with the standard error over windows. Resumable: rows already in the file are kept.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

import anybit
from anybit.calibration.text import read_documents
from anybit.calibration.tokens import evaluation_windows
from anybit.evaluate.perplexity import scored_logits, standard_error, token_nll, window_batches
from anybit.loading import load_any
from anybit.machine import machine
from anybit.recipe import load_recipe

CTX = 512
RTN_ROWS = "weights.name=rtn weights.bits=4 weights.group_size=-1"
RTN_TWO_LEVEL = "weights.name=dgq weights.group_steps=0 weights.channel_steps=0"
STATIC = "activations.static=true activations.granularity=tensor activations.recurring=true"
QOQ, DGQ = "qoq-w4a8kv4", "dgq-w4a8"
SPECS = [
    QOQ,
    f"{QOQ} -rotate",
    f"{QOQ} -reorder",
    f"{QOQ} -smooth-attention",
    f"{QOQ} -smooth",
    f"{QOQ} weights.clip=none",
    f"{QOQ} weights.group_size=-1",
    f"{QOQ} {RTN_TWO_LEVEL}",
    f"{QOQ} -rotate -reorder -smooth-attention -smooth {RTN_ROWS}",
    DGQ,
    f"{DGQ} weights.group_size=128",
    f"{DGQ} {RTN_TWO_LEVEL} weights.group_size=64",
    f"{DGQ} {RTN_ROWS}",
    f"{DGQ} {STATIC}",
]


def quantize(spec: str, directory: Path, samples: int, seq_len: int) -> dict[str, Any]:
    """The demo model by SPEC into `directory` / checkpoint."""
    name, *words = spec.split()
    dropped = {word[1:] for word in words if word.startswith("-")}
    recipe = load_recipe(name, [word for word in words if not word.startswith("-")]).model_dump()
    stages = {stage: recipe["stages"].pop(stage, []) for stage in ("transform", "learn")}
    if unknown := dropped - {step["name"] for steps in stages.values() for step in steps}:
        raise SystemExit(f"{spec}: {name} has no transform or learner {', '.join(sorted(unknown))}")
    for stage, steps in stages.items():
        if kept := [step for step in steps if step["name"] not in dropped]:
            recipe["stages"][stage] = kept
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return anybit.quantize(
        "demo", recipe=str(path), out=str(directory / "checkpoint"), samples=samples, seq_len=seq_len
    )


def window_nll(model: str | Path, count: int) -> Tensor:
    """Mean negative log-likelihood of every window of the held-out text, float64 [count]."""
    loaded, tokenizer = load_any(model, dtype="float32")
    windows = evaluation_windows(tokenizer, read_documents("wiki-test"), CTX, count * CTX)
    parts = window_batches(loaded, windows)
    return torch.cat([token_nll(scored_logits(loaded, w), w[:, 1:].flatten()).view(len(w), -1).mean(1) for w in parts])


def over(nll: list[float], reference: list[float]) -> tuple[float, float]:
    """Log perplexity over that of `reference`, in percent, and its standard error."""
    differences = 100 * (torch.tensor(nll) - torch.tensor(reference))
    return round(float(differences.mean()), 3), round(standard_error(differences) or 0.0, 3)


def measured(spec: str, samples: int, seq_len: int, windows: int) -> dict[str, Any]:
    """One row without its differences."""
    with tempfile.TemporaryDirectory() as directory:
        made = quantize(spec, Path(directory), samples, seq_len)
        nll = window_nll(Path(directory) / "checkpoint", windows).tolist()
    return {"spec": spec, "bits_per_weight": made["bits_per_weight"], "seconds": made["seconds"], "nll": nll}


def main() -> None:
    """Measure what is missing, write after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("specs", nargs="*", default=SPECS)
    options = parser.parse_args()
    table = json.loads(options.out.read_text()) if options.out.is_file() else {"rows": []}
    table |= {
        "what": f"demo on wiki-test, {options.windows} windows of {CTX}; calibration wiki {options.samples} x {options.seq_len}"
    }
    table |= {"machine": machine(), "date": datetime.now(UTC).strftime("%Y-%m-%d")}
    if "float" not in table:
        table["float"] = window_nll("demo", options.windows).tolist()
    for spec in options.specs:
        if spec in {row["spec"] for row in table["rows"]}:
            continue
        row = measured(spec, options.samples, options.seq_len, options.windows)
        whole = next((r for r in table["rows"] if r["spec"] == spec.split()[0]), row)
        row["over_float_percent"], row["over_float_stderr"] = over(row["nll"], table["float"])
        row["over_whole_percent"], row["over_whole_stderr"] = over(row["nll"], whole["nll"])
        table["rows"].append(row)
        options.out.write_text(json.dumps(table, indent=1) + "\n")
        print(
            f"{spec:70} {row['over_float_percent']:+7.2f} +- {row['over_float_stderr']:.2f} over float, "
            f"{row['over_whole_percent']:+6.2f} +- {row['over_whole_stderr']:.2f} over the whole",
            flush=True,
        )


if __name__ == "__main__":
    main()
