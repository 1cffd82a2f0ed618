"""A nested checkpoint and its float model on prompts of a task: texts by schedule, made once, and what they are worth."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anybit.cache import cache_root
from anybit.calibration.progress import Progress, silent
from anybit.engine.lanes import Lanes, open_lanes
from anybit.engine.schedule import BitsAccount, FixedSchedule
from anybit.engine.schedulers.artefact import fingerprint
from anybit.errors import InputError
from anybit.evaluate.agreement import rouge_l, token_agreement
from anybit.evaluate.references import FloatModel, TextStore
from anybit.evaluate.schedules.batch import bits_of, chunks, run_fixed
from anybit.evaluate.tasks.task import Example, Task, encode, take


@dataclass(frozen=True)
class Prompts:
    """Prompts of a task with the float model's answers.

    Attributes:
        ids: token ids of each prompt.
        references, reference_ids: the float model's text for each.
        length: most new tokens.
    """

    ids: list[list[int]]
    references: list[str]
    reference_ids: list[list[int]]
    length: int


@dataclass(frozen=True)
class Runs:
    """Texts of one schedule on all prompts.

    Attributes:
        texts: new tokens of each.
        rouge, tokens: agreement of each with the float model's text, 0..1.
        bits: of every decode step of each.
    """

    texts: list[list[int]]
    rouge: list[float]
    tokens: list[float]
    bits: list[BitsAccount]

    @property
    def mean_bits(self) -> float:
        """Honest: all decode steps of all texts count alike."""
        steps = [bits for account in self.bits for bits in account.steps]
        return sum(steps) / len(steps) if steps else 0.0

    @property
    def mean_bits_paper(self) -> float:
        """As the paper counts: without the first decode step, averaged over texts (methods/pmpd.md 2.2)."""
        return sum(account.average_paper for account in self.bits) / len(self.bits)


class Subject:
    """A checkpoint under measurement."""

    def __init__(self, directory: str | Path, baseline: str | None = None, engine: str = "auto") -> None:
        """`baseline`: the float model, default: the one the ledger names.

        Raises:
            InputError: a checkpoint that is not nested, or a ledger that names no model.
        """
        self.directory = Path(directory)
        self.fingerprint = fingerprint(self.directory)
        self.ledger: dict[str, Any] = json.loads((self.directory / "ledger.json").read_text(encoding="utf-8"))
        self.lanes: Lanes = open_lanes(self.directory, engine)
        if len(self.lanes.precisions) < 2:
            raise InputError(
                f"{directory} is not nested: it holds {self.lanes.precisions[0]} bits only; quantize with a nested recipe "
                "(pmpd, any-precision, anybcq)"
            )
        self.float_model = FloatModel(baseline or self.ledger["model"])
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(self.directory, local_files_only=True)
        folder = cache_root() / "schedule-texts"
        folder.mkdir(exist_ok=True)
        kind = type(self.lanes).__name__
        self._store = TextStore(folder / f"{self.fingerprint[:24]}-{kind}.jsonl")

    def check(self, precisions: Sequence[int]) -> None:
        """Raises InputError when the checkpoint lacks one of some precisions."""
        if missing := [bits for bits in precisions if bits not in self.lanes.precisions]:
            raise InputError(
                f"precision {missing[0]} is not in {self.directory}; it holds {list(self.lanes.precisions)}"
            )

    def examples(self, task: Task, split: str, count: int) -> list[Example]:
        """Examples of a task that the checkpoint was not calibrated on."""
        return take(task, split, count, (self.ledger.get("calibration") or {}).get("source"))

    def prompts(
        self,
        task: Task,
        split: str,
        count: int,
        length: int | None = None,
        style: str = "auto",
        progress: Progress = silent,
    ) -> Prompts:
        """The first prompts of a split with the float model's texts."""
        ids = [encode(self.tokenizer, task, example, style) for example in self.examples(task, split, count)]
        limit = length or task.length
        texts = self.float_model.texts(ids, limit, self.lanes.end_ids, progress)
        return Prompts(ids, [self.decode(text) for text in texts], texts, limit)

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def run(
        self, prompts: Prompts, schedule: FixedSchedule, prefill: int, progress: Progress = silent, stage: str = ""
    ) -> Runs:
        """Texts under switch points; those made before, in this process or another, are not made again."""
        tag = f"{prefill};{schedule.switches};{prompts.length}"
        missing = [ids for ids in prompts.ids if self._store.get(ids, tag) is None]
        done = len(prompts.ids) - len(missing)
        for group in chunks(missing, self.lanes.count):
            batch = [missing[at] for at in group]
            for ids, text in zip(batch, run_fixed(self.lanes, batch, schedule, prefill, prompts.length), strict=True):
                self._store.put(ids, text, tag)
            done += len(batch)
            progress(stage or "texts", done, len(prompts.ids))
        texts = [self._store.get(ids, tag) or [] for ids in prompts.ids]
        state = schedule.start(None, prompts.length)  # type: ignore[arg-type]  # looks at nothing
        return self.judge(prompts, texts, [BitsAccount(bits_of(text, state)) for text in texts])

    def judge(self, prompts: Prompts, texts: list[list[int]], bits: list[BitsAccount]) -> Runs:
        """Agreement of texts with the float model's."""
        rouge = [rouge_l(self.decode(t), reference) for t, reference in zip(texts, prompts.references, strict=True)]
        tokens = [token_agreement(t, reference) for t, reference in zip(texts, prompts.reference_ids, strict=True)]
        return Runs(texts, rouge, tokens, bits)
