"""The engine for coroutines: a request's pieces as an asynchronous stream, cancelled when nobody listens any more."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anybit.engine.schedule import Scheduler, parse_schedule
from anybit.engine.schedulers.resolve import prefill_bits, resolve
from anybit.errors import InputError
from anybit.serving.answer import Answer, Part, Stops
from anybit.serving.batch.engine import BatchEngine
from anybit.serving.batch.request import Piece, Request
from anybit.serving.problems import Problem
from anybit.serving.schemas import Common

if TYPE_CHECKING:
    from anybit.serving.answer import AnyTokenizer
    from anybit.serving.metrics import Metrics


@dataclass(frozen=True)
class Service:
    """A checkpoint being served.

    Attributes:
        name: that clients call the model by.
        directory: where schedules lie.
        ends: ids that end a text.
        created: Unix time.
    """

    name: str
    directory: Path
    engine: BatchEngine
    tokenizer: AnyTokenizer
    ends: frozenset[int]
    metrics: Metrics
    created: int

    def check_model(self, name: str | None) -> None:
        """Refuse another model's name; none is this one."""
        if name not in (None, self.name):
            raise Problem(404, f"model '{name}' is not served here; this is '{self.name}'", "model", "model_not_found")

    def request(self, asked: Common, prompt_ids: list[int], most: int, **more: Any) -> Request:
        """One choice of what a client asked, `most` new tokens of it.

        Raises:
            InputError: a schedule or precision that the checkpoint does not hold.
        """
        precision, schedule = self._precisions(asked)
        seed = secrets.randbelow(2**31) if asked.seed is None else asked.seed
        return Request(
            tuple(prompt_ids),
            most,
            temperature=1.0 if asked.temperature is None else asked.temperature,
            top_p=1.0 if asked.top_p is None else asked.top_p,
            seed=seed,
            ends=self.ends,
            prefill_precision=precision,
            schedule=schedule,
            draft=asked.draft,
            logit_bias=_bias(asked.logit_bias or {}),
            presence_penalty=asked.presence_penalty or 0.0,
            frequency_penalty=asked.frequency_penalty or 0.0,
            **more,
        )

    def _precisions(self, asked: Common) -> tuple[int | None, Scheduler | None]:
        if asked.schedule is None:
            return asked.precision, None if asked.precision is None else parse_schedule(str(asked.precision))
        if asked.schedule.endswith((".json", ".safetensors")):
            raise InputError("schedule: a server opens no files; write bits@step pairs, auto or task:NAME")
        schedule = resolve(asked.schedule, self.directory, self.engine.precisions)
        return asked.precision or prefill_bits(schedule), schedule

    async def pieces(self, request: Request) -> AsyncGenerator[Piece]:
        """What the engine makes of a request, up to the piece with `finish`.

        Raises:
            InputError, Busy: it is refused. Problem: it failed.
        """
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Piece]()

        def deliver(piece: Piece) -> None:
            if not loop.is_closed():  # as after a second signal: nobody is left to tell
                loop.call_soon_threadsafe(queue.put_nowait, piece)

        ticket = self.engine.submit(request, deliver)
        try:
            while True:
                piece = await queue.get()
                if piece.finish in ("error", "cancelled"):
                    raise Problem(500, piece.error or "the server stopped before the text was complete")
                yield piece
                if piece.finish:
                    return
        finally:
            self.engine.cancel(ticket)

    async def parts(self, request: Request, answer: Answer) -> AsyncGenerator[Part]:
        """`answer` as it grows; times go to the metrics."""
        began = last = time.monotonic()
        async with aclosing(self.pieces(request)) as pieces:
            async for piece in pieces:
                part, now = answer.push(piece), time.monotonic()
                self.metrics.piece(now - began if last == began else None, now - last, len(part.token_ids))
                last = now
                yield part
                if answer.finish:
                    return

    def answer(self, stops: tuple[str, ...]) -> Answer:
        """An empty one."""
        return Answer(self.tokenizer, self.ends, Stops(stops))

    def choices(self, request: Request, count: int) -> list[Request]:
        """`count` requests that differ in their seeds."""
        return [replace(request, seed=(request.seed + at) % 2**63) for at in range(count)]


def _bias(bias: dict[str, float]) -> dict[int, float]:
    try:
        return {int(token): value for token, value in bias.items()}
    except ValueError:
        raise Problem(400, "logit_bias: keys are token ids", "logit_bias") from None
