"""What each part of QUIK W4A4 is worth on the demo model: paired perplexities of variants of the recipe `quik-w4a4`.

    python benchmarks/quik_ablation.py --out benchmarks/results/quik-ablation-smollm2.json [--samples 8] [--windows 8] [NAME ...]

Resumable: rows already in the file are kept. Baselines without outlier columns (`rtn-w4a4`, `gptq-w4a4`, `smoothquant-w4a4`) have
the same grids, one a row and one a token.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

import anybit
from anybit.evaluate.run import evaluate
from anybit.machine import machine
from anybit.recipe import show_recipe

CTX = 512
NAMES = [
    *(
        "quik-w4a4",
        "outliers-0",
        "outliers-16",
        "outliers-32",
        "outliers-64",
        "outliers-144",
        "down-w4a4",
        "no-clip",
        "sparse",
    ),
    *("rtn-w4a4", "gptq-w4a4", "smoothquant-w4a4"),
]


def variant(name: str) -> dict[str, Any]:
    """The recipe called `name`, as YAML holds it."""
    recipe = copy.deepcopy(show_recipe("quik-w4a4-24" if name == "sparse" else "quik-w4a4"))
    (down, others), (down_inputs, inputs) = recipe["stages"]["weights"], recipe["stages"]["activations"]
    if name.startswith("outliers-"):
        others["options"] |= {"outliers": int(name.rpartition("-")[2]), "fraction": 0.0}
    elif name == "down-w4a4":
        down["options"]["bits"] = down_inputs["options"]["bits"] = 4
    elif name == "no-clip":
        inputs["options"].pop("clip", None)
    elif name.endswith("-w4a4") and name != "quik-w4a4":
        method = "gptq" if name.startswith("gptq") else "rtn"
        grid = {"bits": 4, "group_size": -1, "symmetric": True, "clip": "hessian" if method == "gptq" else "none"}
        recipe["stages"]["weights"] = [{"name": method, "options": grid}]
        recipe["stages"]["activations"] = [{"name": "int", "options": {"bits": 4, "symmetric": False}}]
        if name.startswith("smooth"):
            recipe["stages"]["transform"] = show_recipe("smoothquant-w8a8")["stages"]["transform"]
    return recipe


def measure(name: str, samples: int, windows: int) -> dict[str, Any]:
    """One row: quantize, and compare with the float model on the held-out text."""
    with tempfile.TemporaryDirectory() as directory:
        path, out = Path(directory) / "recipe.yaml", Path(directory) / "checkpoint"
        path.write_text(yaml.safe_dump(variant(name)))
        made = anybit.quantize("demo", recipe=str(path), out=str(out), samples=samples)
        found = evaluate(out, text="wiki-test", baseline="demo", ctx=CTX, max_tokens=windows * CTX)
    kept = ("perplexity_ratio", "perplexity_ratio_low", "perplexity_ratio_high", "kl_mean", "top1_agreement", "tokens")
    facts = {"name": name, "samples": samples, "bits_per_weight": made["bits_per_weight"], "seconds": made["seconds"]}
    return facts | {key: found[key] for key in kept}


def main() -> None:
    """Measure what is missing, write after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("names", nargs="*", default=NAMES)
    options = parser.parse_args()
    table = json.loads(options.out.read_text()) if options.out.is_file() else {"rows": []}
    table |= {"what": "demo on wiki-test, calibration wiki, seed 0, paired with float", "machine": machine()}
    table |= {"command": "python benchmarks/quik_ablation.py", "date": datetime.now(UTC).strftime("%Y-%m-%d")}
    known = {row["name"] for row in table["rows"]}
    for name in options.names:
        if name in known:
            continue
        row = measure(name, options.samples, options.windows)
        table["rows"].append(row)
        options.out.write_text(json.dumps(table, indent=1) + "\n")
        print(f"{name:20} {100 * (row['perplexity_ratio'] - 1):+.2f} %  KL {row['kl_mean']:.4f}", flush=True)


if __name__ == "__main__":
    main()
