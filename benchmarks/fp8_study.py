"""INT8 against FP8 by tail: the analytical table, and every linear's input and weight of the demo model; one JSON.

    python benchmarks/fp8_study.py --out benchmarks/results/fp8-study.json

Rows of activations (one token each) and of weights (one output channel each) are scaled to their largest number, rounded to
each format, and sorted into bins by crest factor (largest over root mean square), which is what decides.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anybit.calibration.text import read_documents
from anybit.calibration.tokens import evaluation_windows
from anybit.evaluate.sqnr.expected import FORMATS, crossing, table
from anybit.loading import load_any
from anybit.machine import machine
from anybit.methods.flexq import layer_type
from anybit.methods.float_rtn import rounding

BINS = (0, 3, 5, 8, 10, 12, 14, 18, 26, 60)
CTX = 512
ROWS = 192


def rows_sqnr(rows: Tensor) -> dict[str, Tensor]:
    """dB of each row [R] by format, and the rows' "crest" factors; rows float32 [R, K], none of zeros."""
    reach = rows.abs().amax(1, keepdim=True)
    found = {"crest": (reach / rows.square().mean(1, keepdim=True).sqrt())[:, 0]}
    for name in FORMATS:
        off = rounding(name.lower())(rows, reach.expand_as(rows)) - rows
        found[name] = 10 * torch.log10(rows.square().sum(1) / off.square().sum(1).clamp_min(1e-30))
    return found


def inputs_of(model: nn.Module, names: list[str], windows: Tensor) -> dict[str, Tensor]:
    """The inputs float32 [T, K] of linears on token windows int64 [W, T]."""
    seen: dict[str, list[Tensor]] = defaultdict(list)
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(args[0].detach().reshape(-1, args[0].shape[-1]).float())
        )
        for name in names
    ]
    with torch.inference_mode():
        for window in windows:
            model(input_ids=window[None])
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def summary(parts: dict[str, Tensor]) -> dict[str, Any]:
    """Medians over rows, and the share of rows that INT8 serves better than E4M3."""
    kept = {name: round(float(values.median()), 2) for name, values in parts.items()}
    return kept | {"crest_max": round(float(parts["crest"].max()), 1), "int8_better": share(parts)}


def share(parts: dict[str, Tensor]) -> float:
    """Of rows for which INT8 beats E4M3."""
    return round(float((parts["INT8"] > parts["E4M3"]).float().mean()), 4)


def by_crest(parts: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Rows in bins of their crest factor."""
    found = []
    for low, high in zip(BINS, (*BINS[1:], float("inf")), strict=True):
        inside = (parts["crest"] >= low) & (parts["crest"] < high)
        if inside.any():
            there = {name: values[inside] for name, values in parts.items()}
            means = {name: round(float(there[name].mean()), 2) for name in FORMATS}
            found.append({"crest_from": low, "rows": int(inside.sum()), **means, "int8_better": share(there)})
    return found


def some(rows: Tensor) -> Tensor:
    """`ROWS` of the rows, evenly, the first among them (the first token is unlike all others)."""
    return rows[torch.linspace(0, len(rows) - 1, min(ROWS, len(rows))).long()]


@torch.no_grad()
def measured(model: nn.Module, windows: Tensor) -> dict[str, Any]:
    """Activations and weights of every linear of the blocks: by crest factor, by type of linear, by linear."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".layers." in name]
    inputs = inputs_of(model, names, windows)
    found: dict[str, Any] = {}
    for what in ("activations", "weights"):
        linears = {}
        for name in names:
            rows = inputs[name] if what == "activations" else model.get_parameter(f"{name}.weight").float()
            rows = some(rows)
            linears[name] = rows_sqnr(rows[rows.abs().amax(1) > 0])
        types: dict[str, list[dict[str, Tensor]]] = defaultdict(list)
        for name, parts in linears.items():
            types[layer_type(name)].append(parts)
        joined = {type: _joined(parts) for type, parts in types.items()}
        found[what] = {
            "by_crest": by_crest(_joined(list(linears.values()))),
            "by_type": {type: summary(parts) for type, parts in joined.items()},
            "by_linear": {name: summary(parts) for name, parts in linears.items()},
        }
    return found


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=2)
    options = parser.parse_args()
    analytical = {
        title: {name: {"sqnr_db": round(db, 2), "range": round(c, 3)} for name, (db, c) in row.items()}
        for title, row in table().items()
    }
    model, tokenizer = load_any("demo")
    windows = evaluation_windows(tokenizer, read_documents("wiki-test"), CTX, options.windows * CTX)
    facts = {
        "what": f"demo on wiki-test, {options.windows} x {CTX} tokens; rows scaled to their largest number, SQNR in dB",
        "command": "python benchmarks/fp8_study.py",
        "machine": machine(),
        "crossing_crest_factor": round(crossing(), 2),
        "analytical": analytical,
        **measured(model, windows),
    }
    options.out.write_text(json.dumps(facts, indent=1) + "\n")
    for what in ("activations", "weights"):
        print(what)
        for row in facts[what]["by_crest"]:
            print("  ", row)


if __name__ == "__main__":
    main()
