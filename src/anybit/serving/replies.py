"""What both kinds of completions share: choices made side by side, as one answer or as a stream of events."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse

from anybit.errors import AnybitError
from anybit.serving.answer import Answer, Part
from anybit.serving.batch.request import Request
from anybit.serving.problems import Problem, as_problem, body
from anybit.serving.service import Service

Item = TypeVar("Item")
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
        found = await _while_there(http, self._collect())
        return Response(status_code=GONE) if found is None else JSONResponse(found)

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

    async def stream(self, http: HttpRequest) -> Response:
        """Server-sent events. The first is awaited before the answer begins, so that what is refused is an ordinary error."""
        events = self._events()
        first = await _while_there(http, anext(events))
        if first is None:
            return Response(status_code=GONE)

        async def all_events() -> AsyncGenerator[str]:
            async with aclosing(events):
                yield first
                async for event in events:
                    yield event

        return StreamingResponse(all_events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    async def _events(self) -> AsyncGenerator[str]:
        frame = self.frame("chat.completion.chunk" if self.kind == "chat.completion" else self.kind)
        queue = asyncio.Queue[tuple[int, Part | Exception]]()

        async def one(index: int) -> None:
            try:
                async with aclosing(self.service.parts(self.requests[index], self.answers[index])) as parts:
                    async for part in parts:
                        queue.put_nowait((index, part))
            except Exception as error:
                queue.put_nowait((index, error))

        tasks = [asyncio.ensure_future(one(index)) for index in range(len(self.requests))]
        left, begun = len(tasks), set[int]()
        try:
            while left:
                index, part = await queue.get()
                if isinstance(part, Exception):
                    raise part
                chunk = self.chunk(index, self.answers[index], part, index not in begun)
                begun.add(index)
                left -= part.finish is not None
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
        prompts, found = (
            dict[int, int](),
            dict[int, int](),
        )  # choices share a prompt: what the first of them found was cached
        for request, answer in zip(self.requests, self.answers, strict=True):
            shared = id(request.prompt_ids)
            prompts[shared] = len(request.prompt_ids)
            found[shared] = min(found.get(shared, answer.cached), answer.cached)
        prompt, made = sum(prompts.values()), sum(answer.tokens for answer in self.answers)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "total_tokens": prompt + made,
            "prompt_tokens_details": {"cached_tokens": sum(found.values())},
        }

    def _account(self) -> dict[str, Any]:
        """Tokens at each precision, and their mean."""
        bits = sum((answer.bits for answer in self.answers), Counter[int]())
        mean = sum(width * count for width, count in bits.items()) / (bits.total() or 1)
        return {"average_bits": mean, "bits": {str(width): bits[width] for width in sorted(bits, reverse=True)}}


async def _while_there(http: HttpRequest, work: Awaitable[Item]) -> Item | None:
    """What `work` brings; None: the client hung up first, and `work` was cancelled."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(http))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.wait((task, gone))


async def _gone(http: HttpRequest) -> None:
    """Returns when the client hangs up; its body has been read, so nothing else can come."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"
