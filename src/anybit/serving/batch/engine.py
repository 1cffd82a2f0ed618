"""Continuous batching on the native model: one thread runs passes, each over all requests that can share it."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TypeVar

from anybit.engine.guard import Guard
from anybit.engine.native import NativeModel
from anybit.engine.schedule import check_available
from anybit.errors import AnybitError, Busy, Draining, InputError
from anybit.formats.kv import PAGE
from anybit.serving.batch.passes import CHUNK, Passes
from anybit.serving.batch.prefixes import Prefixes
from anybit.serving.batch.request import MOST_LOGPROBS, Piece, Request, Stats
from anybit.serving.batch.text import DRAFTERS, Span, Text

Item = TypeVar("Item")
log = logging.getLogger("anybit")
MAX_WAITING = 256


@dataclass(eq=False)
class Ticket:
    """Stands for an accepted request."""

    text: Text


class BatchEngine:
    """Requests in, pieces of text out. The same tokens as `engine.generate` gives alone, bit for bit.

    A turn of the worker: requests that wait get a slot, oldest first, while there are slots and pages for their prompts; then one
    pass reads at most `CHUNK` tokens of prompts, oldest first; then every text that is read makes a token (or several,
    when a guess was right), texts of one precision in one pass. So a stream waits for at most one chunk of others' prompts, and
    no precision waits for another.

    A text takes pages as it grows. When none is left, kept prompts are forgotten, then the youngest text gives its pages away and
    waits again, first in line; later it reads its prompt and its own tokens again, each at the precision it had, which gives the
    same cache bit for bit. The oldest text always goes on, and one text alone always fits.

    Guesses are checked while a text has a pass to itself; in company they would only cost.

    Attributes:
        context: longest text, prompt included, in tokens.
        precisions: that requests may ask for, ascending.
    """

    def __init__(
        self,
        model: NativeModel,
        *,
        ends: frozenset[int] | None = None,
        max_waiting: int = MAX_WAITING,
        keep_prefixes: bool = True,
    ) -> None:
        """`model` is used by nobody else from now on.

        Args:
            ends: ids that end a text; default: the model's.
            max_waiting: accepted requests without a slot.
            keep_prefixes: keep the pages of prompts.
        """
        self._ends = model.end_ids if ends is None else ends
        self.context, self.precisions = model.context, tuple(model.precision.available)
        self._model, self._max_waiting = model, max_waiting
        self._prefixes = Prefixes(model, keep_prefixes)
        self._passes = Passes(model, self._prefixes)
        self._free_slots = list(reversed(range(model.slots)))
        self._waiting: deque[Text] = deque()
        self._running: list[Text] = []  # in the order of their slots' being given
        self._change = threading.Condition()
        self._accepting, self._open, self._finished = True, True, 0
        self._preempted = 0
        self._pages_total = self._pages_free = model.free_pages
        self._thread = threading.Thread(target=self._work, name="anybit-batch", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def submit(self, request: Request, deliver: Callable[[Piece], None]) -> Ticket:
        """Accept a request; `deliver` is called on the worker's thread with each piece, and must neither block nor raise.

        Raises:
            InputError: it can never be answered. Busy: too many wait. Draining: no more are accepted.
        """
        self._check(request)
        text = Text.of(request, deliver, self.precisions, self._ends, self._model.times)
        with self._change:
            if not self._accepting:
                raise Draining("the server is shutting down; ask another one")
            if len(self._waiting) >= self._max_waiting:
                raise Busy(f"{len(self._waiting)} requests are waiting already; try again in a moment")
            self._waiting.append(text)
            self._change.notify_all()
        return Ticket(text)

    def cancel(self, ticket: Ticket) -> None:
        """Stop a request, from any thread; its last piece says so, unless it was finished."""
        with self._change:
            ticket.text.cancelled = True
            self._change.notify_all()

    @property
    def accepting(self) -> bool:
        """Whether new requests are taken: not after `drain` or `close`."""
        return self._accepting

    def drain(self, seconds: float | None = None) -> bool:
        """Accept nothing new and wait until everything accepted is finished, at most so long; whether it is."""
        with self._change:
            self._accepting = False
            return self._change.wait_for(lambda: not (self._waiting or self._running), seconds)

    def close(self) -> None:
        """Stop the thread; what is unfinished is cancelled."""
        with self._change:
            self._accepting = self._open = False
            for text in (*self._waiting, *self._running):
                text.cancelled = True
            self._change.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def stats(self) -> Stats:
        """Counts so far, from any thread; pages as the last turn left them."""
        with self._change:
            return Stats(
                waiting=len(self._waiting),
                running=len(self._running),
                pages_free=self._pages_free,
                pages_total=self._pages_total,
                preempted=self._preempted,
                finished=self._finished,
                **asdict(self._passes.counts),
            )

    def _check(self, request: Request) -> None:
        tokens, most = len(request.prompt_ids), request.max_new_tokens
        if not tokens or most < (0 if request.echo_logprobs else 1):
            raise InputError("a request needs at least one token of prompt and one to generate")
        if tokens + most > self.context:
            raise InputError(f"prompt ({tokens} tokens) and {most} new tokens exceed the context of {self.context}; "
                             "shorten the prompt or ask for fewer tokens")  # fmt: skip
        vocabulary = self._model.facts.vocab
        ids = (*request.prompt_ids, *request.logit_bias)
        if bad := next((token for token in ids if not 0 <= token < vocabulary), None):
            raise InputError(f"token id {bad} is not one of this model's {vocabulary}")
        if request.temperature < 0 or not 0 < request.top_p <= 1 or not 0 <= request.seed < 2**64:
            raise InputError("need temperature >= 0, 0 < top_p <= 1 and 0 <= seed < 2^64")
        if request.logprobs is not None and not 0 <= request.logprobs <= MOST_LOGPROBS:
            raise InputError(f"logprobs: 0 to {MOST_LOGPROBS} alternatives, not {request.logprobs}")
        if request.draft not in ("none", *DRAFTERS):
            raise InputError(f"draft '{request.draft}': known: none, {', '.join(DRAFTERS)}")
        if request.prefill_precision not in (None, *self.precisions):
            raise InputError(
                f"precision {request.prefill_precision}: this checkpoint holds {list(self.precisions)} bits"
            )
        if isinstance(request.schedule, Guard):
            raise InputError(
                "schedule: a guard reads tokens again between passes, which a batch does not; leave it out"
            )
        if request.schedule is not None:
            check_available(request.schedule, self.precisions)

    def _work(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._waiting or self._running or not self._open)
                self._drop_cancelled()
                if not self._open:
                    return
            try:
                self._admit()
                self._turn()
            except Exception as error:  # a bug or a damaged model: nobody may wait forever
                log.exception("a pass failed")
                known = isinstance(error, AnybitError)
                self._fail(str(error) if known else "a pass of the model failed; see the server's log")
            self._retire()

    def _turn(self) -> None:
        """One pass over prompts, then one at each precision over the texts that were read before."""
        ready = [text for text in self._running if not text.reading]
        groups: dict[int, list[Text]] = {}  # before any pass: it may be a text's last, or change its next precision
        for text in ready:
            groups.setdefault(text.steps.next_bits, []).append(text)
        if spans := self._fitting(self._spans(), lambda span: len(span.ids)):
            self._passes.read(spans)
        for _, group in sorted(groups.items(), reverse=True):
            plans = [(text, text.steps.plan(guess=len(ready) == 1)) for text in group if text.slot is not None]
            if plans := self._fitting(plans, lambda plan: len(plan.rows)):
                self._passes.decode(plans)

    def _spans(self) -> list[tuple[Text, Span]]:
        """What to read next: as the oldest text needs it, and others that need the same."""
        spans, left, begun = list[tuple[Text, Span]](), CHUNK, set[tuple[int, tuple[int, ...]]]()
        for text in self._running:
            if not text.reading or not left:
                continue
            beginning = text.prefill, text.request.prompt_ids[:PAGE]
            if text.read == 0 and beginning in begun and self._prefixes.enabled and len(text.request.prompt_ids) > PAGE:
                continue  # an older text reads the same pages: they will be there
            begun.add(beginning)
            if text.read == 0:
                self._attach(text)
            span = text.span(left)
            if not spans or (span.bits, span.prompt) == (spans[0][1].bits, spans[0][1].prompt):
                spans.append((text, span))
                left -= len(span.ids)
        return spans

    def _fitting(self, items: list[tuple[Text, Item]], rows: Callable[[Item], int]) -> list[tuple[Text, Item]]:
        """Those that can have the pages they need, after prompts are forgotten and the youngest texts sent back."""
        while True:
            needed = sum(text.pages(rows(item)) for text, item in items)
            self._prefixes.make_room(needed)
            if needed <= self._model.free_pages:
                return items
            self._send_back()
            items = [(text, item) for text, item in items if text.slot is not None]

    def _send_back(self) -> None:
        with self._change:
            text = self._running.pop()
            self._release(text)
            self._waiting.appendleft(text)
            self._preempted += 1

    def _admit(self) -> None:
        with self._change:
            while self._waiting and self._free_slots:
                if not self._admit_next(self._waiting[0]):
                    return

    def _admit_next(self, text: Text) -> bool:
        """Whether the head of the queue found room."""
        text.slot = self._free_slots.pop()
        self._attach(text)
        needed = text.pages(text.known + 1 - text.read)
        reserve = len(self._running)  # a page for each to grow into, lest it is sent back at once
        self._prefixes.make_room(needed + reserve)
        if self._running and self._model.free_pages < needed + reserve:
            self._release(text)
            return False
        self._running.append(self._waiting.popleft())
        return True

    def _attach(self, text: Text) -> None:
        """Let a text that has read nothing begin with what others read before it."""
        if text.slot is None or (text.request.echo_logprobs and not text.begun):  # that wants logits of every token
            return
        text.read = self._prefixes.attach(text.slot, text.request.prompt_ids, text.prefill)
        if not text.begun:
            self._passes.counts.prefix_tokens += text.read - text.cached
            text.cached = text.read

    def _drop_cancelled(self) -> None:
        for text in (*self._waiting, *self._running):
            if text.cancelled:
                text.give(Piece(finish="cancelled"))
        self._waiting = deque(text for text in self._waiting if not text.over)
        self._retire()

    def _fail(self, reason: str) -> None:
        with self._change:
            if self._waiting and self._waiting[0].slot is not None:  # it was being admitted
                self._running.append(self._waiting.popleft())
        for text in self._running:
            text.give(Piece(finish="error", error=reason))

    def _retire(self) -> None:
        """Free what texts that are over had."""
        with self._change:
            over = [text for text in self._running if text.over]
            for text in over:
                self._release(text)
            self._running = [text for text in self._running if not text.over]
            self._finished += len(over)
            self._pages_free = self._model.free_pages  # for `stats`: other threads may not ask the model
            if over or not self._running:
                self._change.notify_all()

    def _release(self, text: Text) -> None:
        assert text.slot is not None
        self._model.reset(text.slot)
        self._prefixes.leave(text.slot)
        self._free_slots.append(text.slot)
        text.lose_place()
