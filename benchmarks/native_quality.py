"""What the native engine's own roundings cost: `python benchmarks/native_quality.py DIR`, DIR a checkpoint of `demo`.

Perplexity over the float model on the windows of benchmarks/quality.py, paired: through torch (float activations), and
through the native decoder as it decodes (int8 activations) and as it reads prompts, with 16-, 8- and 4-bit caches.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from anybit.calibration.text import read_documents
from anybit.calibration.tokens import evaluation_windows
from anybit.engine.native import NativeModel
from anybit.evaluate.perplexity import paired_difference, scored_logits, token_nll
from anybit.loading import load_any
from anybit.machine import machine

WINDOWS, CTX = 24, 512
OUT = Path(__file__).parent / "results" / "native-quality-smollm2.json"


def nll(logits: Callable[[Tensor], Tensor], windows: Tensor) -> Tensor:
    """Negative log-likelihoods [W, ctx - 1]; logits: window [ctx] to [ctx - 1, V]."""
    return torch.stack([token_nll(logits(window), window[1:]) for window in windows])


def through_torch(name: str, windows: Tensor) -> Tensor:
    model, _ = load_any(name)
    with torch.inference_mode():
        return nll(lambda window: scored_logits(model, window[None]), windows)


def main() -> None:
    """Measure and write."""
    directory = sys.argv[1]
    _, tokenizer = load_any("demo")
    windows = evaluation_windows(tokenizer, read_documents("wiki-test"), CTX, WINDOWS * CTX)
    reference = through_torch("demo", windows)
    rows = {"torch": through_torch(directory, windows)}
    for kv_bits in (16, 8, 4):
        model = NativeModel.open(directory, kv=kv_bits, max_sequences=1, verify=False)
        for prompt in (False, True):
            name = f"native {'prompt' if prompt else 'decode'} kv{kv_bits}"
            rows[name] = nll(
                lambda w, m=model, p=prompt: torch.from_numpy(m.logits(w.tolist(), prompt=p)[:-1]), windows
            )  # type: ignore[misc]
    table = {name: asdict(paired_difference(reference, found)) for name, found in rows.items()}
    for name, row in table.items():
        print(f"{name:22} {100 * (row['ratio'] - 1):+.2f} %", flush=True)
    about = {"what": "demo on wiki-test", "windows": WINDOWS, "ctx": CTX, "machine": machine()}
    OUT.write_text(
        json.dumps(about | {"command": "python benchmarks/native_quality.py DIR", "rows": table}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
