"""What a rival is: an engine of somebody else that runs the same model in its own process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


class RivalFailed(Exception):
    """A rival could not be prepared or measured; `str` is one line. The others go on."""


@dataclass(frozen=True)
class Speed:
    """One measurement, in tokens a second; None where that part was not asked for.

    Attributes:
        prefill: a prompt of random tokens, in one piece, into an empty cache.
        decode: one token after the other, batch 1, from a (nearly) empty cache.
    """

    prefill: float | None
    decode: float | None


class Contestant(Protocol):
    """A model loaded and ready to be measured, again and again."""

    @property
    def label(self) -> str:
        """What runs, such as `llama.cpp Q4_0`."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of the model as this engine stores it."""

    def measure(self, prompt_tokens: int, new_tokens: int) -> Speed:
        """Measure once: `prompt_tokens` of prefill (0: none), then `new_tokens` of decode (0: none)."""

    def close(self) -> None:
        """End its processes."""


class Rival(Protocol):
    """One engine. None of its packages is imported here: it runs in its own environment."""

    name: str

    def missing(self) -> str:
        """Why it cannot run on this machine, with how to get it; empty when it can."""

    def prepare(self, model: Path) -> Path:
        """The float Hugging Face directory `model` in this engine's form: converted once, cached by content.

        Raises:
            RivalFailed: its converter refused the model.
        """

    def start(self, prepared: Path, threads: int) -> Contestant:
        """Load what `prepare` returned.

        Raises:
            RivalFailed: it did not start.
        """
