"""A Hugging Face model in plain torch, in its own process: `torch_llm.py DIRECTORY THREADS [int4|int8]`.

Imports nothing of ours, because torchao's environment runs it too.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM

DECODE_PROMPT, WARM_UP = 8, 64


def main(directory: str, threads: int, bits: str) -> None:
    """Answer `{"prompt": P, "new": N}` lines with the tokens per second of both."""
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, local_files_only=True).eval()
    if bits:
        quantize(model, bits)
    measure(model, 64, 4)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        wanted = json.loads(line)
        print(json.dumps(measure(model, wanted["prompt"], wanted["new"])), flush=True)


def quantize(model: Any, bits: str) -> None:
    """torchao's CPU configurations: int4 weights in groups of 32, or int8 weights with dynamic int8 activations."""
    api: Any = importlib.import_module("torchao.quantization")
    if bits == "int4":  # the one int4 form of torchao 0.18 with a CPU kernel
        int4: Any = importlib.import_module("torchao.prototype.quantization.int4.inference_workflow")
        config = int4.PrototypeInt4WeightOnlyConfig(group_size=32)
    else:
        config = api.Int8DynamicActivationInt8WeightConfig()
    api.quantize_(model, config)


@torch.inference_mode()
def measure(model: Any, prompt: int, new: int) -> dict[str, float]:
    """Tokens per second of a prompt read at once, and of `new` greedy tokens after a short prompt."""
    answer = {}
    timed(model, random_ids(model, WARM_UP), None)
    if prompt:
        seconds, _ = timed(model, random_ids(model, prompt), None)
        answer["prefill"] = prompt / seconds
    if new:
        _, out = timed(model, random_ids(model, DECODE_PROMPT), None)
        started = time.perf_counter()
        for _ in range(new):
            _, out = timed(model, out.logits[:, -1:].argmax(-1), out.past_key_values)
        answer["decode"] = new / (time.perf_counter() - started)
    return answer


def timed(model: Any, ids: torch.Tensor, cache: Any) -> tuple[float, Any]:
    """Seconds of one forward pass, and what it returned."""
    started = time.perf_counter()
    out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - started, out


def random_ids(model: Any, count: int) -> torch.Tensor:
    """Token ids int64 [1, count]."""
    return torch.randint(3, model.config.vocab_size, (1, count))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else "")
