"""What each precision of a nested checkpoint is worth: held-out text carried once per precision through the blocks.

The samples come from the same text as the calibration samples and are none of them. "float" goes through the blocks as
they were; embedding and head are those of the checkpoint for all. Like the calibration samples, hidden states lie on disk
between blocks, so memory holds one sample at a time and an interrupted run goes on from them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from anybit.blocks import Quantized
from anybit.calibration.activations import Activations
from anybit.calibration.entry import Entry
from anybit.calibration.parallel import Workers
from anybit.calibration.statistics import BlockCall, propagate
from anybit.calibration.text import read_documents
from anybit.calibration.tokens import calibration_tokens
from anybit.formats.terms import dense, load_terms, precisions
from anybit.job import Job
from anybit.layers.precision import Precision

SAMPLES = 8
TOKENS = 256
FLOAT = "float"


def draw(job: Job, calibration: str, samples: int, seq_len: int, seed: int) -> tuple[Tensor, Tensor]:
    """Calibration tokens int64 [samples, seq_len], and held-out tokens [S, T], S = 0 for a job without nested weights.

    Raises:
        CalibrationError: the text is too short for both.
    """
    extra = SAMPLES if readings(job) else 0
    tokens = calibration_tokens(
        job.source.tokenizer(), read_documents(calibration), samples=samples + extra, seq_len=seq_len, seed=seed
    )
    return tokens[:samples], tokens[samples:, :TOKENS]


def readings(job: Job) -> list[str]:
    """What held-out text is carried through: "float" and every precision of the nested weights, ascending; or nothing."""
    nested = {width for form in job.forms.values() if len(found := precisions(form)) > 1 for width in found}
    return [FLOAT, *map(str, sorted(nested))] if nested else []


def write_weights(block: nn.Module, prefix: str, done: Sequence[Quantized], bits: int | None) -> None:
    """Put the values of quantized linears into the block at `prefix`: at `bits` where a form can be read so, else whole."""
    for found in done:
        width = bits if bits in precisions(found.form) else None
        weight = block.get_parameter(f"{found.name.removeprefix(prefix + '.')}.weight")
        weight.data.copy_(dense(load_terms(found.form, found.tensors), width))


class HeldOut:
    """Held-out tokens int64 [S, T] on their way; `state` is the directory of the files."""

    def __init__(self, job: Job, state: Path, tokens: Tensor, entry: Entry, pool: Workers) -> None:
        self._state, self.tokens, self._entry, self._pool = state, tokens, entry, pool
        self._readings = readings(job)
        self._width = job.structure.geometry.hidden

    def files(self, index: int) -> dict[str, Activations]:
        """Hidden states that enter block `index`, by reading."""
        count, length = self.tokens.shape
        names = {reading: self._state / f"held-{reading}-{index}" for reading in self._readings}
        return {reading: Activations(path, count, length, self._width) for reading, path in names.items()}

    def enter(self) -> None:
        """Write what enters the first block, the same for every reading."""
        for sample, ids in enumerate(self.tokens if self._readings else ()):
            hidden = self._entry.hidden(ids)
            for file in self.files(0).values():
                file.write(sample, hidden)

    def float_pass(self, index: int, block: nn.Module) -> None:
        """Through block `index` as it was loaded."""
        self._pass(index, block, self._readings[:1])

    def quantized_passes(self, index: int, block: nn.Module, prefix: str, done: Sequence[Quantized]) -> None:
        """Through block `index` at every precision; afterwards the block holds its nested weights in full."""
        if not self._readings:
            return
        for reading in self._readings[1:]:
            write_weights(block, prefix, done, int(reading))
            self._pass(index, block, [reading])
        write_weights(block, prefix, done, None)

    def stored_passes(self, index: int, block: nn.Module, precision: Precision) -> None:
        """Through block `index` with its layers as they are saved, at every width that `precision` can be set to."""
        for reading in self._readings[1:]:
            precision.bits = int(reading)
            self._pass(index, block, [reading])

    def report(self, blocks: int) -> dict[str, Any]:
        """`precisions`: perplexity by reading after the last block; `warnings`: where more bits are not better."""
        found = {reading: self._perplexity(file) for reading, file in self.files(blocks).items()}
        widths = self._readings[1:]
        warnings = [
            f"held-out perplexity is not monotone in bits: {found[low]:.4g} at {low}, {found[high]:.4g} at {high}"
            for low, high in itertools.pairwise(widths)
            if not found[high] <= found[low]
        ]
        return {"precisions": found, "warnings": warnings}

    def _pass(self, index: int, block: nn.Module, which: Sequence[str]) -> None:
        for reading in which:
            arguments = self._entry.arguments(self.tokens[0])[index]
            propagate(
                BlockCall(block, arguments), self.files(index)[reading], self.files(index + 1)[reading], self._pool
            )

    def _perplexity(self, last: Activations) -> float:
        losses = [
            cross_entropy(self._entry.logits(ids, last.read(sample))[:-1].float(), ids[1:], reduction="none").double()
            for sample, ids in enumerate(self.tokens)
        ]
        return math.exp(min(float(torch.cat(losses).mean()), 700.0))
