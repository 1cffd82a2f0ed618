"""One accepted request: how far its text is in the model's cache, and what it says next."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from anybit.engine.drafting.lookup import LookupDrafter
from anybit.engine.drafting.ngram import NgramDrafter
from anybit.engine.drafting.pace import Pace
from anybit.engine.drafting.pass_times import PassTimes
from anybit.engine.schedule import Features, FixedSchedule
from anybit.engine.steps import Drafting, Steps
from anybit.formats.kv import PAGE
from anybit.serving.batch.choice import Choice, logprobs
from anybit.serving.batch.request import Piece, Request, TokenLogprobs

log = logging.getLogger("anybit")
Floats = NDArray[np.float32]
Deliver = Callable[[Piece], None]
DRAFTERS = {"ngram": NgramDrafter, "lookup": LookupDrafter}
_LONGEST = 15  # tokens of a guess: 16 rows are what a matrix unit takes at once


@dataclass(frozen=True)
class Span:
    """Tokens to read next: the prompt's, or those that a text which lost its place had generated at `bits`."""

    bits: int
    prompt: bool
    ids: list[int]


@dataclass(eq=False)
class Text:
    """The state of a request.

    Attributes:
        prefill: bits of the prompt.
        slot: in the model's cache; None while it waits.
        read: tokens of it that the cache holds.
        cached: tokens of the prompt that others had read.
        cancelled: nobody waits for more of it.
        over: its last piece was delivered.
    """

    request: Request
    deliver: Deliver
    prefill: int
    steps: Steps
    choice: Choice
    slot: int | None = None
    read: int = 0
    cached: int = 0
    cancelled: bool = False
    over: bool = False
    _prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=lambda: [None])

    @classmethod
    def of(
        cls, request: Request, deliver: Deliver, precisions: tuple[int, ...], ends: frozenset[int], times: PassTimes
    ) -> Text:
        """`precisions`: of the checkpoint; `ends`: of the model; `times`: of its passes."""
        choice, most = Choice(request), precisions[-1]
        drafter = DRAFTERS.get(request.draft)
        drafting = Drafting(drafter(longest=_LONGEST), Pace(times=times)) if drafter else None
        schedule = request.schedule or FixedSchedule(((0, most),))
        steps = Steps(
            choice, schedule, drafting, request.max_new_tokens, ends if request.ends is None else request.ends
        )
        return cls(request, deliver, request.prefill_precision or most, steps, choice)

    @property
    def known(self) -> int:
        """Tokens that must be in the cache before the next pass: the prompt, and what was generated but for the last."""
        return len(self.request.prompt_ids) + max(len(self.steps.tokens) - 1, 0)

    @property
    def begun(self) -> bool:
        """Whether it was read before."""
        return bool(self.steps.tokens)

    @property
    def reading(self) -> bool:
        """Whether some of them are not."""
        return self.read < self.known

    def span(self, most: int) -> Span:
        """The next tokens to read, at most `most`, all of one kind."""
        prompt = self.request.prompt_ids
        if self.read < len(prompt):
            return Span(self.prefill, True, list(prompt[self.read : self.read + most]))
        first = self.read - len(prompt)
        bits = self.steps.bits[first]
        same = next((at for at, other in enumerate(self.steps.bits[first:]) if other != bits), len(self.steps.bits))
        last = min(first + most, first + same, len(self.steps.tokens) - 1)
        return Span(bits, False, self.steps.tokens[first:last])

    def pages(self, more: int) -> int:
        """Pages that `more` tokens begin."""
        return math.ceil((self.read + more) / PAGE) - math.ceil(self.read / PAGE)

    def note_prompt(self, logits: Floats) -> None:
        """Log-probabilities of the tokens after those of a span [rows, vocabulary], which `read` does not count yet."""
        following = self.request.prompt_ids[self.read + 1 :]
        for row, token in zip(logits, following, strict=False):
            self._prompt_logprobs.append(logprobs(row, token, self.request.logprobs or 0))

    def begin(self, logits: Floats | None, features: Features) -> None:
        """The prompt is read: choose the first token from the logits [vocabulary] after it, where one is wanted, and say so."""
        if logits is not None:
            self.steps.begin(self.request.prompt_ids, logits, features)
        found = tuple(self._prompt_logprobs) if self.request.echo_logprobs else ()
        tokens = tuple(self.steps.tokens)
        said = (tokens, (self.prefill,) * len(tokens), tuple(self.choice.logprobs))
        self.give(Piece(*said, found, self._finish, cached_tokens=self.cached))

    def go_on(self, news: list[int], bits: int) -> None:
        """Say what a pass at `bits` brought."""
        said = tuple(self.choice.logprobs[-len(news) :]) if self.request.logprobs is not None else ()
        self.give(Piece(tuple(news), (bits,) * len(news), said, finish=self._finish))

    def lose_place(self) -> None:
        """What the cache held of it is gone."""
        self.slot, self.read = None, 0
        if not self.begun:
            self._prompt_logprobs = [None]

    def give(self, piece: Piece) -> None:
        """Deliver a piece; one with `finish` is the last. A text whose receiver fails is over, and nobody else's."""
        if self.over:
            return
        self.over = piece.finish is not None
        try:
            self.deliver(piece)
        except Exception:
            self.over = True
            log.exception("a request's receiver failed; the request is dropped")

    @property
    def _finish(self) -> str | None:
        if self.request.max_new_tokens and not self.steps.done:
            return None
        return "stop" if self.steps.ended else "length"
