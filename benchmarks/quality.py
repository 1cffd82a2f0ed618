"""Quality of recipes on the demo model, paired against its float original: one JSON in benchmarks/results/.

    python benchmarks/quality.py --out benchmarks/results/quality-smollm2.json gptq-w4 rtn-w4 "gptq-w4 weights.bits=3"
    python benchmarks/quality.py --out benchmarks/results/abq-low-smollm2.json --samples 8 --windows 8 \
        abq-w2a8 "abq-w2a8 weights.balanced=false" abq-w4a4 "abq-w4a4 weights.group_size=-1"

Each argument is a recipe name followed by overrides. Resumable: rows already in the file are kept, so one file has one number of
samples and windows.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anybit
from anybit.evaluate.run import evaluate
from anybit.machine import machine

CTX = 512


def measure(spec: str, directory: Path, samples: int, windows: int) -> dict[str, Any]:
    """Quantize `demo` by `spec` into `directory` and compare it with the float model on the held-out text."""
    recipe, *overrides = spec.split()
    made = anybit.quantize("demo", recipe=recipe, out=str(directory), overrides=overrides, samples=samples)
    quality = evaluate(directory, text="wiki-test", baseline="demo", ctx=CTX, max_tokens=windows * CTX)
    kept = ("perplexity", "baseline_perplexity", "perplexity_ratio", "perplexity_ratio_low", "perplexity_ratio_high")
    kept += ("kl_mean", "kl_p99", "kl_noise_floor", "top1_agreement", "tokens", "ctx")
    facts = {key: made[key] for key in ("bits_per_weight", "size_bytes", "seconds", "peak_rss_bytes")}
    return {"recipe": recipe, "overrides": overrides, **facts, **{key: quality[key] for key in kept}}


def main() -> None:
    """Measure what is missing, write after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("specs", nargs="+")
    options = parser.parse_args()
    table = json.loads(options.out.read_text()) if options.out.is_file() else {"rows": []}
    table |= {"what": f"demo on wiki-test, calibration wiki {options.samples} x {CTX}, seed 0", "machine": machine()}
    table |= {"command": "python benchmarks/quality.py", "date": datetime.now(UTC).strftime("%Y-%m-%d")}
    known = {" ".join([row["recipe"], *row["overrides"]]) for row in table["rows"]}
    for spec in options.specs:
        if spec in known:
            continue
        with tempfile.TemporaryDirectory() as directory:
            row = measure(spec, Path(directory) / "checkpoint", options.samples, options.windows)
        table["rows"].append(row)
        options.out.write_text(json.dumps(table, indent=1) + "\n")
        print(
            f"{spec:40} {100 * (row['perplexity_ratio'] - 1):+.2f} %  KL {row['kl_mean']:.4f}  {row['seconds']:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
