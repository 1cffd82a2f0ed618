"""Our side of `anybit bench`: a checkpoint as a contestant, and the check that it computes the right thing."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from anybit.checkpoint.ledger import Ledger
from anybit.engine.native import NativeModel
from anybit.errors import KernelUnavailable, PromiseError
from anybit.evaluate.rivals.contract import Contestant, Speed
from anybit.kernels import native

DECODE_PROMPT = 8
WARM_UP = 64  # tokens before the clock starts, for everybody: caches hold what the contestant before left
_CHECK_TOKENS = 32
_KL_LIMIT = 0.05
"""Nats between the native engine and torch, mean over tokens: int8 activations and cache cost about a hundredth of it."""


class Runner(Protocol):
    """What a measurement needs of an engine."""

    def prefill(self, ids: list[int]) -> int:
        """Forget everything, read a prompt, return the likeliest next token."""

    def step(self, token: int) -> int:
        """Append a token, return the likeliest next one."""


class Ours:
    """A checkpoint loaded in this process."""

    def __init__(self, directory: Path, runner: Runner, label: str, vocabulary: int) -> None:
        self.label, self._runner, self._vocabulary = label, runner, vocabulary
        self.weight_bytes = Ledger.read(directory).size_bytes
        self.measure(64, 4)  # first calls allocate and repack

    def measure(self, prompt_tokens: int, new_tokens: int) -> Speed:
        """See `Contestant`; the same work as the rivals' workers do."""
        prefill = decode = None
        self._runner.prefill(self._random(WARM_UP))
        if prompt_tokens:
            ids = self._random(prompt_tokens)
            started = time.perf_counter()
            self._runner.prefill(ids)
            prefill = prompt_tokens / (time.perf_counter() - started)
        if new_tokens:
            token = self._runner.prefill(self._random(DECODE_PROMPT))
            started = time.perf_counter()
            for _ in range(new_tokens):
                token = self._runner.step(token)
            decode = new_tokens / (time.perf_counter() - started)
        return Speed(prefill, decode)

    def close(self) -> None:
        """Nothing to end."""

    def _random(self, count: int) -> list[int]:
        ids: list[int] = torch.randint(3, self._vocabulary, (count,)).tolist()
        return ids


class TorchRunner:
    """The torch path: transformers' model with our layers."""

    def __init__(self, model: Any) -> None:
        self.model, self._cache = model, None

    def prefill(self, ids: list[int]) -> int:
        """See `Runner`."""
        self._cache = None
        return self._forward(ids)

    def step(self, token: int) -> int:
        """See `Runner`."""
        return self._forward([token])

    @torch.inference_mode()
    def _forward(self, ids: list[int]) -> int:
        out = self.model(torch.tensor([ids]), past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = out.past_key_values
        return int(out.logits[0, -1].argmax())


class NativeRunner:
    """The native decoder."""

    def __init__(self, model: NativeModel) -> None:
        self.model = model

    def prefill(self, ids: list[int]) -> int:
        """See `Runner`."""
        self.model.reset()
        return self._best([(token, 0) for token in ids], prompt=True)

    def step(self, token: int) -> int:
        """See `Runner`."""
        return self._best([(token, 0)])

    def _best(self, rows: list[tuple[int, int]], *, prompt: bool = False) -> int:
        return int(self.model.top(rows, [len(rows) - 1], prompt=prompt)[1][0, 0])


def open_ours(directory: Path, threads: int) -> Contestant:
    """The checkpoint on the fastest engine that can run it. Sets the threads of torch and of the native kernels."""
    from anybit.loading import load

    torch.set_num_threads(threads)
    native.set_threads(threads)
    model = open_native(directory)
    if model is not None:
        return Ours(directory, NativeRunner(model), "anybit native", int(model.facts.vocab))
    slow = load(str(directory)).eval()
    return Ours(directory, TorchRunner(slow), "anybit torch", int(slow.config.vocab_size))


def open_native(directory: Path) -> NativeModel | None:
    """The checkpoint in the native decoder; None when it cannot run there."""
    try:
        return NativeModel.open(directory, max_sequences=1)
    except KernelUnavailable:
        return None


def check_loading(directory: Path) -> str:
    """Load in torch: hashes, the ledger's promises and the canary are compared on the way. Says what was checked."""
    from anybit.loading import load

    load(str(directory))
    return "hashes, ledger and canary agree"


def check_native(directory: Path) -> str:
    """Compare the native decoder's distributions with torch's on random tokens.

    Raises:
        PromiseError: they differ by more than int8 activations explain.
    """
    model = open_native(directory)
    if model is None:
        return "no native engine for this model, the torch one is measured"
    from anybit.loading import load

    ids = torch.randint(3, int(model.facts.vocab), (_CHECK_TOKENS,), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        reference = load(str(directory)).eval()(ids[None]).logits[0].float().log_softmax(-1)
    measured = torch.from_numpy(model.logits(ids.tolist())).log_softmax(-1)
    kl = float((reference.exp() * (reference - measured)).sum(-1).mean())
    if not math.isfinite(kl) or kl > _KL_LIMIT:
        raise PromiseError(
            f"{directory}: the native engine is {kl:.3g} nats away from torch (at most {_KL_LIMIT}); "
            "speeds of wrong results mean nothing, please report it"
        )
    return f"native and torch {kl:.2g} nats apart on {_CHECK_TOKENS} random tokens"


CHECKS: tuple[tuple[str, Callable[[Path], str]], ...] = (("loading", check_loading), ("engine", check_native))
"""What is checked before anything is timed: name, and a function that returns a detail or raises."""
