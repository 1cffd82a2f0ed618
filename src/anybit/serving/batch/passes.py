"""Passes of the model over many texts."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anybit.engine.native import NativeModel
from anybit.engine.sampler import require_finite
from anybit.engine.steps import Pass
from anybit.errors import PromiseError
from anybit.serving.batch.prefixes import Prefixes
from anybit.serving.batch.request import Piece
from anybit.serving.batch.text import Span, Text

Floats = NDArray[np.float32]
CHUNK = 256
"""Tokens of prompts in one pass: what others wait for, some 50 ms of a 135 M model on two cores."""


@dataclass
class Counts:
    """What passes did; see `request.Stats`."""

    passes: int = 0
    prompt_tokens: int = 0
    prefix_tokens: int = 0
    generated_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    tokens_by_bits: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Slot:
    """What schedules may look at (`schedule.Features`)."""

    model: NativeModel
    slot: int

    def last_keys_values(self) -> tuple[Floats, Floats]:
        """See `NativeModel`."""
        return self.model.last_keys_values(self.slot)


class Passes:
    """Runs what the scheduler chose and hands out what came of it. A text whose logits are not finite fails alone."""

    def __init__(self, model: NativeModel, prefixes: Prefixes) -> None:
        self._model, self._prefixes = model, prefixes
        self.counts = Counts(tokens_by_bits=dict.fromkeys(model.precision.available, 0))  # a copy would mind a new key

    def read(self, spans: Sequence[tuple[Text, Span]]) -> None:
        """One pass over spans of one kind."""
        rows, wanted = list[tuple[int, int]](), list[int]()
        parts = []
        for text, span in spans:
            assert text.slot is not None
            first = len(rows)
            rows += [(token, text.slot) for token in span.ids]
            mine = self._wanted(text, span)
            parts.append((text, span, slice(len(wanted), len(wanted) + len(mine))))
            wanted += [first + row for row in mine]
        self._model.precision.bits = spans[0][1].bits
        logits = self._model.forward(rows, wanted, prompt=spans[0][1].prompt)
        self.counts.passes += 1
        for text, span, part in parts:
            self._was_read(text, span, logits[part])

    def _wanted(self, text: Text, span: Span) -> list[int]:
        """Rows of a span whose logits are needed."""
        asked, count = text.request, len(span.ids)
        if text.begun or not span.prompt:
            return []
        if asked.echo_logprobs:
            return list(range(count))
        return [count - 1] if text.read + count == len(asked.prompt_ids) else []

    def _was_read(self, text: Text, span: Span, logits: Floats) -> None:
        asked = text.request
        if asked.echo_logprobs and len(logits):
            text.note_prompt(logits)
        text.read += len(span.ids)
        if not span.prompt:
            return
        self.counts.prompt_tokens += 0 if text.begun else len(span.ids)
        if text.read == len(asked.prompt_ids):
            assert text.slot is not None
            self._prefixes.keep(text.slot, asked.prompt_ids, text.prefill)
            if not text.begun:
                with _failing(text):
                    text.begin(logits[-1] if asked.max_new_tokens else None, _Slot(self._model, text.slot))
                self._made(text.steps.tokens, text.prefill)

    def decode(self, plans: Sequence[tuple[Text, Pass]]) -> None:
        """One pass over the plans of texts, all of one precision."""
        rows = [(token, text.slot or 0) for text, plan in plans for token in plan.rows]
        self._model.precision.bits, began = plans[0][1].bits, time.perf_counter()
        alike = not any(text.steps.wants_logits for text, _ in plans)
        if alike:
            values, ids = self._model.top(rows, range(len(rows)))
            outputs: Any = ids[:, 0].tolist()
        else:
            values = outputs = self._model.forward(rows, range(len(rows)))
        self.counts.passes += 1
        seconds = time.perf_counter() - began if len(plans) == 1 else 0.0  # the drafters' own clock: passes of one text
        first = 0
        for text, plan in plans:
            mine = slice(first, first + len(plan.rows))
            first = mine.stop
            with _failing(text):
                require_finite(float(values[mine].max()))
                self._settle(text, plan, outputs[mine], seconds)

    def _settle(self, text: Text, plan: Pass, outputs: Any, seconds: float) -> None:
        assert text.slot is not None
        if not text.steps.wants_logits and not isinstance(outputs, list):
            outputs = outputs.argmax(1).tolist()
        news = text.steps.settle(plan, outputs, seconds)
        text.read += len(news)
        if len(news) < len(plan.rows):
            self._model.truncate(text.slot, text.read)
        self.counts.drafted += len(plan.rows) - 1
        self.counts.accepted += len(news) - 1
        self._made(news, plan.bits)
        text.go_on(news, plan.bits)

    def _made(self, tokens: Sequence[int], bits: int) -> None:
        self.counts.generated_tokens += len(tokens)
        self.counts.tokens_by_bits[bits] += len(tokens)


@contextlib.contextmanager
def _failing(text: Text) -> Iterator[None]:
    """Ends a text whose model gives no numbers, and nobody else's."""
    try:
        yield
    except PromiseError as error:
        text.give(Piece(finish="error", error=str(error)))
