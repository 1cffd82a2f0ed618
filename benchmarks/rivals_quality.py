"""Quality of rivals' formats on the demo model, paired against the same float original as benchmarks/quality.py.

    python benchmarks/rivals_quality.py --out benchmarks/results/rivals-quality-smollm2.json \
        llama.cpp:Q4_0+imatrix llama.cpp:Q8_0 openvino:int4

Each argument is a rival of `anybit bench`. GGUF files are dequantized and run in float32 by our evaluator; OpenVINO scores
the same windows itself, with float32 activations. So only the weights are judged. Resumable: rows already there are kept.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from torch import Tensor

from anybit.calibration.text import read_documents
from anybit.calibration.tokens import evaluation_windows
from anybit.evaluate.divergence import compare, divergence_summary
from anybit.evaluate.perplexity import paired_difference, scored_logits, summarize, token_nll
from anybit.evaluate.rivals.cache import tree_bytes
from anybit.evaluate.rivals.home import environment_python
from anybit.evaluate.rivals.llama_cpp import LlamaCpp
from anybit.evaluate.rivals.process import CONVERT_SECONDS, run_command
from anybit.evaluate.rivals.table import parse_rivals
from anybit.evaluate.rivals.workers import openvino_nll
from anybit.loading import load_any
from anybit.machine import cores, machine
from anybit.models.demo import demo_directory
from anybit.models.gguf import load_gguf

WINDOWS = 24
CTX = 512


def llama_cpp(file: Path, windows: Tensor, baseline: Any) -> dict[str, Any]:
    """Quality and size of a GGUF file."""
    model, _ = load_gguf(file)
    both = compare(model, baseline, windows)
    tensors = GGUFReader(file).tensors
    stored, weights = sum(int(t.n_bytes) for t in tensors), sum(int(t.n_elements) for t in tensors)
    return sizes(stored, weights) | quality(both.nll, both.baseline_nll) | divergence_summary(both.kl, both.same_top1)


def openvino(directory: Path, windows: Tensor, baseline: Any) -> dict[str, Any]:
    """Quality and size of an exported directory."""
    with tempfile.TemporaryDirectory() as folder:
        given, scored = Path(folder) / "windows.npy", Path(folder) / "nll.npy"
        np.save(given, windows.numpy())
        program = [environment_python("openvino"), openvino_nll.__file__, directory, cores(), given, scored]
        run_command(program, seconds=CONVERT_SECONDS)
        nll = torch.from_numpy(np.load(scored))
    reference = torch.stack([token_nll(scored_logits(baseline, one), one[0, 1:]) for one in windows.split(1)])
    weights = sum(parameter.numel() for parameter in baseline.parameters())
    return sizes(tree_bytes(directory, "openvino_model.bin"), weights) | quality(nll, reference)


def sizes(stored: int, weights: int) -> dict[str, float]:
    """Bytes of the tensors alone, without tokenizer."""
    return {"size_bytes": stored, "bits_per_weight": 8 * stored / weights}


def quality(nll: Tensor, reference: Tensor) -> dict[str, float]:
    """Perplexities and their ratio with its 95 % interval; both [W, ctx - 1]."""
    pair = paired_difference(reference, nll)
    bounds = {"perplexity_ratio_low": pair.ratio_low, "perplexity_ratio_high": pair.ratio_high}
    both = {"perplexity": summarize(nll).perplexity, "baseline_perplexity": summarize(reference).perplexity}
    return both | {"perplexity_ratio": pair.ratio} | bounds


def main() -> None:
    """Measure what is missing, write after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("specs", nargs="+")
    options = parser.parse_args()
    table = json.loads(options.out.read_text()) if options.out.is_file() else {"rows": []}
    table |= {"what": "demo on wiki-test", "windows": WINDOWS, "ctx": CTX, "machine": machine()}
    table |= {"command": "python benchmarks/rivals_quality.py", "date": datetime.now(UTC).strftime("%Y-%m-%d")}
    baseline, tokenizer = load_any("demo")
    windows = evaluation_windows(tokenizer, read_documents("wiki-test"), CTX, WINDOWS * CTX)
    known = {row["rival"] for row in table["rows"]}
    for spec in options.specs:
        [rival] = parse_rivals(spec)
        if spec in known:
            continue
        if reason := rival.missing():
            print(f"{spec}: left out, {reason}", flush=True)
            continue
        measure = llama_cpp if isinstance(rival, LlamaCpp) else openvino
        row = {"rival": spec} | measure(rival.prepare(demo_directory()), windows, baseline)
        table["rows"].append(row)
        options.out.write_text(json.dumps(table, indent=1) + "\n")
        print(f"{spec:32} {row['bits_per_weight']:.2f} bits  {100 * (row['perplexity_ratio'] - 1):+.2f} %", flush=True)


if __name__ == "__main__":
    main()
