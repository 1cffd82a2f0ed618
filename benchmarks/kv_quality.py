"""What cached keys and values cost: `python benchmarks/kv_quality.py DIR [ctx windows]`, DIR a checkpoint of `demo`.

Perplexity of the native decoder on held-out text, token by token as it generates: every token reads from the cache what a
generated one reads, so also codes of earlier tokens of its own window (a prompt read in full precision would hide them). Each
cache is paired, token by token, with the 16-bit cache of the same checkpoint; standard errors are over windows.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

from anybit.calibration.text import read_documents
from anybit.calibration.tokens import evaluation_windows
from anybit.engine.native import NativeModel
from anybit.evaluate.perplexity import paired_difference, token_nll
from anybit.formats.kv import KVSpec
from anybit.machine import machine

HEAD_DIM = 64
OUT = Path(__file__).parent / "results" / "kv-quality-smollm2.json"
CACHES = [
    "8",
    "4",
    "4-channel",
    "4-rotated",
    "4-channel-sink64",
    "4-rotated-sink64",
    "4-sink64",
    "k8v4",
    "k4v8",
    "k4v8-channel",
    "2-channel-sink64",
    "k4v2-channel-sink64",
    "k2v4-channel-sink64",
    "4-window64",
    "4-channel-sink64-window64",
    "4-channel-rotated",
    "2",
    "2-rotated",
    "2-channel",
    "2-channel-sink64-window64",
    "k8v8-channel",
]


def nll(directory: str, cache: str, windows: Tensor) -> Tensor:
    """Negative log-likelihoods [W, ctx - 1]."""
    model = NativeModel.open(directory, kv=KVSpec.parse(cache), max_sequences=1, verify=False)
    return torch.stack([token_nll(torch.from_numpy(model.logits(w.tolist())[:-1]), w[1:]) for w in windows])


def main() -> None:
    """Measure and write."""
    directory, ctx, count = sys.argv[1], *(int(word) for word in (sys.argv[2:4] or (1024, 11)))
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    windows = evaluation_windows(tokenizer, read_documents("wiki-test"), ctx, count * ctx)
    saved = json.loads(OUT.read_text())["runs"] if OUT.is_file() else {}
    reference, rows = nll(directory, "16", windows), {}
    for cache in CACHES:
        spec, found = KVSpec.parse(cache), paired_difference(reference, nll(directory, cache, windows))
        rows[spec.word] = asdict(found) | {"bits_per_element": spec.bits_per_element(HEAD_DIM)}
        print(f"{spec.word:36} {100 * (found.ratio - 1):+.2f} % +- {100 * (found.stderr or 0):.2f}", flush=True)
        about = {"what": "demo (gptq-w4), decoded token by token, against its 16-bit cache", "machine": machine()}
        command = f"python benchmarks/kv_quality.py DIR {ctx} {len(windows)}"
        run = {"command": command, "windows": len(windows), "ctx": ctx, "rows": rows}
        OUT.write_text(json.dumps(about | {"runs": saved | {str(ctx): run}}, indent=1) + "\n")


if __name__ == "__main__":
    main()
