"""`POST /v1/chat/completions`: a conversation goes on."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import Request as HttpRequest
from fastapi.responses import Response

from anybit.engine.prompt import encode_prompt
from anybit.serving import tools
from anybit.serving.answer import Answer, Part
from anybit.serving.problems import Problem
from anybit.serving.replies import Reply
from anybit.serving.schemas import ChatRequest
from anybit.serving.service import Service


async def chat(service: Service, asked: ChatRequest, http: HttpRequest) -> Response:
    """The answer to one request."""
    service.check_model(asked.model)
    used = asked.tools if asked.tools and asked.tool_choice != "none" else None
    if used and not tools.known(service.tokenizer.chat_template):
        raise Problem(400, "tools: this model's chat template does not take any; leave them out", "tools")
    if asked.top_logprobs and not asked.logprobs:
        raise Problem(400, "top_logprobs: needs logprobs: true", "top_logprobs")
    messages: list[Any] = [message.as_template() for message in asked.messages]
    ids = await asyncio.to_thread(encode_prompt, service.tokenizer, messages, chat=True, tools=used)
    room = service.engine.context - len(ids)
    most = asked.max_completion_tokens or asked.max_tokens or room
    if room < 1:
        raise Problem(400, f"messages: {len(ids)} tokens, and the context is {service.engine.context}; shorten them",
                      "messages", "context_length_exceeded")  # fmt: skip
    logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
    requests = service.choices(service.request(asked, ids, most, logprobs=logprobs), asked.n or 1)
    answers = [service.answer(asked.stops) for _ in requests]
    shown = _Shown(bool(used))
    reply = Reply(service, "chat.completion", requests, answers, shown.choice, shown.chunk, asked.usage_wanted)
    return await reply.stream(http) if asked.stream else await reply.whole(http)


class _Shown:
    """Choices as JSON."""

    def __init__(self, calls: bool) -> None:
        self._calls = calls
        self._held: dict[int, str] = {}  # text of choices that may turn out to be a tool call

    def choice(self, index: int, answer: Answer, parts: list[Part]) -> dict[str, Any]:
        """A whole choice."""
        text, calls = "".join(part.text for part in parts), list[dict[str, Any]]()
        if self._calls:
            text, calls = tools.parse(text)
        message = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
        entries = [entry for part in parts for entry in _logprobs(answer, part)]
        return {
            "index": index,
            "message": message | ({"tool_calls": calls} if calls else {}),
            "logprobs": {"content": entries} if entries else None,
            "finish_reason": "tool_calls" if calls else answer.finish,
        }

    def chunk(self, index: int, answer: Answer, part: Part, first: bool) -> dict[str, Any]:
        """What a part of a choice adds; with tools the text comes in one piece at the end."""
        text, calls, finish = part.text, list[dict[str, Any]](), part.finish
        if self._calls:
            held = self._held[index] = self._held.get(index, "") + text
            text, calls = tools.parse(held) if finish else ("", [])
        delta: dict[str, Any] = ({"role": "assistant"} if first else {}) | {"content": text}
        if calls:
            delta["tool_calls"] = [{"index": at} | call for at, call in enumerate(calls)]
        entries = _logprobs(answer, part)
        return {
            "index": index,
            "delta": delta,
            "logprobs": {"content": entries} if entries else None,
            "finish_reason": "tool_calls" if calls else finish,
        }


def _logprobs(answer: Answer, part: Part) -> list[dict[str, Any]]:
    def entry(token: int, value: float) -> dict[str, Any]:
        word = answer.word(token)
        whole = "\ufffd" not in word  # else part of a character, whose bytes the word does not tell
        return {"token": word, "logprob": value, "bytes": list(word.encode()) if whole else None}

    return [
        entry(token, found.logprob) | {"top_logprobs": [entry(*other) for other in found.top]}
        for token, found in zip(part.token_ids, part.logprobs, strict=False)
    ]
