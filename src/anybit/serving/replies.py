"""What both kinds of completions share: choices made side by side, as one answer or as a stream of events."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse

from anybit.errors import AnybitError
from anybit.serving.answer import Answer, Part
from anybit.serving.batch.request import Request
from anybit.serving.problems import Problem, as_problem, body
from anybit.serving.service import Service

GONE = 499
"""What is logged for a client that went away; nobody reads it."""


@dataclass(frozen=True)
class Reply:
    """An answer to one HTTP request.

    Attributes:
        kind: the `object` of the JSON; a stream's adds `.chunk` for chats.
        requests: one for each choice.
        answers: theirs.
        choice: (index, answer, parts) -> its JSON.
        chunk: (index, answer, part, first) -> its JSON in a stream.
        usage: whether a stream ends with the count of tokens.
    """

    service: Service
    kind: str
    requests: Sequence[Request]
    answers: Sequence[Answer]
    choice: Callable[[int, Answer, list[Part]], dict[str, Any]]
    chunk: Callable[[int, Answer, Part, bool], dict[str, Any]]
    usage: bool

    async def whole(self, http: HttpRequest) -> Response:
        """Everything at once; requests of a client that goes away are cancelled."""
        work = asyncio.ensure_future(self._collect())
        gone = asyncio.ensure_future(_gone(http))
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        if not work.done():
            work.cancel()
            await asyncio.wait((work,))
            return Response(status_code=GONE)
        return JSONResponse(work.result())

    async def _collect(self) -> dict[str, Any]:
        async def one(index: int) -> list[Part]:
            async with aclosing(self.service.parts(self.requests[index], self.answers[index])) as parts:
                return [part async for part in parts]

        tasks = [asyncio.ensure_future(one(index)) for index in range(len(self.requests))]
        try:
            found = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        choices = [self.choice(at, self.answers[at], parts) for at, parts in enumerate(found)]
        return self.frame(self.kind) | {"choices": choices, "usage": self.used(), "anybit": self._account()}

    async def stream(self) -> Response:
        """Server-sent events. The first is awaited before the answer begins, so that what is refused is an ordinary error."""
        events = self._events()
        first = await anext(events)

        async def all_events() -> AsyncGenerator[str]:
            async with aclosing(events):
                yield first
                async for event in events:
                    yield event

        return StreamingResponse(all_events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    async def _events(self) -> AsyncGenerator[str]:
        frame = self.frame("chat.completion.chunk" if self.kind == "chat.completion" else self.kind)
        queue: asyncio.Queue[tuple[int, Part | None]] = asyncio.Queue()

        async def one(index: int) -> None:
            async with aclosing(self.service.parts(self.requests[index], self.answers[index])) as parts:
                async for part in parts:
                    await queue.put((index, part))
            await queue.put((index, None))

        tasks = [asyncio.ensure_future(one(index)) for index in range(len(self.requests))]
        left, begun = len(tasks), set[int]()
        try:
            while left:
                index, part = await _next(queue, tasks)
                if part is None:
                    left -= 1
                    continue
                chunk = self.chunk(index, self.answers[index], part, index not in begun)
                begun.add(index)
                yield _event(frame | {"choices": [chunk], "anybit": {"bits": list(part.bits)}})
            if self.usage:
                yield _event(frame | {"choices": [], "usage": self.used(), "anybit": self._account()})
            yield "data: [DONE]\n\n"
        except (AnybitError, Problem) as error:
            if not begun:
                raise
            problem = error if isinstance(error, Problem) else as_problem(error)
            yield _event(body(problem.status, str(problem), problem.param, problem.code))
        finally:
            for task in tasks:
                task.cancel()

    def frame(self, kind: str) -> dict[str, Any]:
        """What every JSON of an answer begins with."""
        word = "chatcmpl" if kind.startswith("chat") else "cmpl"
        return {
            "id": f"{word}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": self.service.name,
        }

    def used(self) -> dict[str, Any]:
        """Tokens of the prompts, each counted once, and of the answers."""
        prompts = {id(request.prompt_ids): len(request.prompt_ids) for request in self.requests}  # choices share theirs
        prompt, made = sum(prompts.values()), sum(answer.tokens for answer in self.answers)
        cached = sum(answer.cached for answer in self.answers)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "total_tokens": prompt + made,
            "prompt_tokens_details": {"cached_tokens": min(cached, prompt)},
        }

    def _account(self) -> dict[str, Any]:
        """Tokens at each precision, and their mean."""
        bits: dict[int, int] = {}
        for answer in self.answers:
            for width, count in answer.bits.items():
                bits[width] = bits.get(width, 0) + count
        total = sum(bits.values())
        mean = sum(width * count for width, count in bits.items()) / total if total else 0.0
        return {
            "average_bits": mean,
            "bits": {str(width): count for width, count in sorted(bits.items(), reverse=True)},
        }


async def _next(queue: asyncio.Queue[tuple[int, Part | None]], tasks: Sequence[asyncio.Future[None]]) -> Any:
    """The next part of any choice; the error of one that failed."""
    getting = asyncio.create_task(queue.get())
    while not getting.done():
        for task in tasks:
            if task.done() and task.exception():
                getting.cancel()
                task.result()
        running: list[asyncio.Future[Any]] = [getting, *(task for task in tasks if not task.done())]
        await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    return getting.result()


async def _gone(http: HttpRequest) -> None:
    """Returns when the client hangs up; its body has been read, so nothing else can come."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"
