"""What the float model says: greedy texts in batches, kept in the cache directory, and its logits along a text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anybit.cache import cache_root, sampled_sha256
from anybit.calibration.progress import Progress, silent
from anybit.loading import load_any
from anybit.models.source import open_model

BATCH = 16


class FloatModel:
    """The model a checkpoint was made from; its weights are read when they are first needed.

    Attributes:
        name: what it was opened by, anything `load_any` takes.
        dtype: of its arithmetic.
    """

    def __init__(self, name: str, dtype: str = "float32") -> None:
        self.name, self.dtype = name, dtype
        self._loaded: tuple[Any, Any] | None = None

    @property
    def model(self) -> Any:
        """The transformers model."""
        if self._loaded is None:
            self._loaded = load_any(self.name, dtype=self.dtype)
        return self._loaded[0]

    def identity(self) -> str:
        """A short hash of its files and its dtype."""
        digest = hashlib.sha256(self.dtype.encode())
        for path in sorted(Path(open_model(self.name).path).glob("*.safetensors")):
            digest.update(path.name.encode() + sampled_sha256(path).encode())
        return digest.hexdigest()[:16]

    def texts(
        self, prompts: Sequence[Sequence[int]], length: int, end_ids: frozenset[int], progress: Progress = silent
    ) -> list[list[int]]:
        """Greedy continuations, each up to `length` tokens or an end token (included); found again in the cache."""
        folder = cache_root() / "references"
        folder.mkdir(exist_ok=True)
        store = TextStore(folder / f"{self.identity()}-{length}.jsonl")
        # long prompts first and alike together: little padding
        missing = sorted((p for p in prompts if store.get(p) is None), key=len, reverse=True)
        for start in range(0, len(missing), BATCH):
            batch = missing[start : start + BATCH]
            for prompt, text in zip(batch, self._generate(batch, length, end_ids), strict=True):
                store.put(prompt, text)
            progress("float model", start + len(batch), len(missing))
        return [store.get(prompt) or [] for prompt in prompts]

    def logits(self, prompt: Sequence[int], text: Sequence[int]) -> Tensor:
        """Logits float32 [len(text), vocabulary] that predict every token of `text` after `prompt`."""
        ids = torch.tensor([[*prompt, *text[:-1]]])
        with torch.inference_mode():
            out = self.model(input_ids=ids, use_cache=False, logits_to_keep=len(text))
        logits: Tensor = out.logits[0].float()
        return logits

    def vectors(self, text: Sequence[int]) -> Any:
        """The input embeddings of a text, float32 numpy [len(text), hidden]."""
        with torch.inference_mode():
            return self.model.get_input_embeddings()(torch.tensor(list(text), dtype=torch.long)).float().numpy()

    def _generate(self, prompts: Sequence[Sequence[int]], length: int, end_ids: frozenset[int]) -> list[list[int]]:
        width = max(map(len, prompts))
        pad = min(end_ids, default=0)
        ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        ends = sorted(end_ids) or None
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=length, do_sample=False, num_beams=1,
                eos_token_id=ends, pad_token_id=pad, repetition_penalty=1.0,
            )  # fmt: skip
        return [until_end(row[width:].tolist(), end_ids) for row in out]


class TextStore:
    """Texts by prompt in a file with one line each, written at once: an interrupted run goes on where it stopped."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._texts: dict[str, list[int]] = {}
        if path.is_file():
            for line in path.read_text().splitlines():
                try:
                    key, text = json.loads(line)
                except ValueError:  # the last line of a run that was cut off
                    continue
                self._texts[key] = text

    def get(self, prompt: Sequence[int], tag: str = "") -> list[int] | None:
        """The text of a prompt, None when it is not there yet. `tag` tells apart texts made in different ways."""
        return self._texts.get(_key(prompt, tag))

    def put(self, prompt: Sequence[int], text: Sequence[int], tag: str = "") -> None:
        """Keep a text."""
        self._texts[_key(prompt, tag)] = list(text)
        torn = self._torn()
        with self._path.open("a") as file:
            file.write("\n" * torn + json.dumps([_key(prompt, tag), list(text)]) + "\n")

    def _torn(self) -> bool:
        """Whether the file ends inside a line."""
        if not self._path.is_file() or not self._path.stat().st_size:
            return False
        with self._path.open("rb") as file:
            file.seek(-1, 2)
            return file.read() != b"\n"


def until_end(ids: Sequence[int], end_ids: frozenset[int]) -> list[int]:
    """Up to and with the first end token."""
    at = next((i for i, token in enumerate(ids) if token in end_ids), len(ids))
    return list(ids[: at + 1])


def _key(prompt: Sequence[int], tag: str) -> str:
    return hashlib.sha256((tag + json.dumps(list(prompt))).encode()).hexdigest()[:24]
