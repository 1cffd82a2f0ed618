"""Runs inside OpenVINO's environment, so it imports nothing of ours: `openvino_llm.py DIRECTORY THREADS`."""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

import numpy as np

DECODE_PROMPT, WARM_UP = 8, 64


def main(directory: str, threads: int) -> None:
    """Answer `{"prompt": P, "new": N}` lines with the tokens per second of both."""
    genai: Any = importlib.import_module("openvino_genai")
    openvino: Any = importlib.import_module("openvino")
    with open(f"{directory}/config.json", encoding="utf-8") as file:  # noqa: PTH123
        vocabulary = json.load(file)["vocab_size"]
    pipeline = genai.LLMPipeline(directory, "CPU", INFERENCE_NUM_THREADS=threads)
    draw = np.random.default_rng()  # unseeded: its prefix cache outlives a request, and a known prompt looks 4x faster

    def generate(prompt: int, new: int) -> Any:
        ids = draw.integers(3, vocabulary, size=(1, prompt), dtype=np.int64)
        config = genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new, True, False
        return pipeline.generate(openvino.Tensor(ids), config).perf_metrics

    generate(DECODE_PROMPT, 4)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        wanted = json.loads(line)
        answer = {}
        generate(WARM_UP, 1)
        if wanted["prompt"]:
            answer["prefill"] = 1000 * wanted["prompt"] / generate(wanted["prompt"], 1).get_ttft().mean
        if wanted["new"]:
            answer["decode"] = 1000 / generate(DECODE_PROMPT, wanted["new"] + 1).get_tpot().mean
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
