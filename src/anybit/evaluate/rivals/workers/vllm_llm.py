"""Runs inside vLLM's environment, so it imports nothing of ours: `vllm_llm.py DIRECTORY OPTIONS`.

One JSON line for each request:

    {"texts": [[id, ...], ...], "new": N}       {"tokens": [[id, ...], ...]}           greedy, all of them in one batch
    {"score": [[id, ...], ...]}                 {"nll": [[float, ...], ...]}           of every token but the first
    {"prompt": P, "new": N, "batch": B}         {"prefill": f, "decode": f}            tokens per second, of B random texts
"""

from __future__ import annotations

import importlib
import json
import random
import sys
import time
from typing import Any

DECODE_PROMPT = 8


class Engine:
    """One `vllm.LLM` and the three requests."""

    def __init__(self, directory: str, options: dict[str, Any]) -> None:
        self._vllm: Any = importlib.import_module("vllm")
        self._llm = self._vllm.LLM(model=directory, seed=0, **options)
        self._vocabulary = self._llm.get_tokenizer().vocab_size

    def answer(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """See above."""
        if "texts" in wanted:
            done = self._run(wanted["texts"], max_tokens=wanted["new"])
            return {"tokens": [list(each.outputs[0].token_ids) for each in done]}
        if "score" in wanted:
            done = self._run(wanted["score"], max_tokens=1, prompt_logprobs=1)
            return {"nll": [self._nll(each) for each in done]}
        return self._speed(wanted["prompt"], wanted["new"], wanted.get("batch", 1))

    def _run(self, texts: list[list[int]], **options: Any) -> Any:
        sampling = self._vllm.SamplingParams(temperature=0, **options)
        return self._llm.generate([{"prompt_token_ids": ids} for ids in texts], sampling, use_tqdm=False)

    def _nll(self, done: Any) -> list[float]:
        pairs = zip(done.prompt_token_ids[1:], done.prompt_logprobs[1:], strict=True)
        return [-entry[token].logprob for token, entry in pairs]

    def _speed(self, prompt: int, new: int, batch: int) -> dict[str, float]:
        answer = {}
        if prompt:
            answer["prefill"] = batch * prompt / self._seconds(prompt, 1, batch)
        if new:
            # What N more tokens cost: the prompt and everything that a request costs once cancel out.
            more = self._seconds(DECODE_PROMPT, new + 1, batch) - self._seconds(DECODE_PROMPT, 1, batch)
            answer["decode"] = batch * new / more
        return answer

    def _seconds(self, prompt: int, new: int, batch: int) -> float:
        texts = [[random.randrange(3, self._vocabulary) for _ in range(prompt)] for _ in range(batch)]
        start = time.perf_counter()
        self._run(texts, max_tokens=new, ignore_eos=True)
        return time.perf_counter() - start


def main(directory: str, options: str) -> None:
    """Answer until the input ends."""
    engine = Engine(directory, json.loads(options))
    print("\n" + json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print("\n" + json.dumps(engine.answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
