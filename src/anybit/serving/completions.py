"""`POST /v1/completions`: text goes on."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import Request as HttpRequest
from fastapi.responses import Response

from anybit.engine.prompt import encode_prompt
from anybit.serving.answer import Answer, Part
from anybit.serving.batch.request import Request, TokenLogprobs
from anybit.serving.problems import Problem
from anybit.serving.replies import Reply
from anybit.serving.schemas import MOST_CHOICES, CompletionRequest
from anybit.serving.service import Service


async def complete(service: Service, asked: CompletionRequest, http: HttpRequest) -> Response:
    """The answer to one request."""
    service.check_model(asked.model)
    prompts = await asyncio.to_thread(_prompts, service, asked)
    most = 16 if asked.max_tokens is None else asked.max_tokens
    if asked.echo and asked.stream:
        raise Problem(400, "echo: not in a stream; leave stream out", "echo")
    if most == 0 and not asked.echo:
        raise Problem(400, "max_tokens: must be at least 1, or 0 with echo", "max_tokens")
    read = bool(asked.echo) and (asked.logprobs is not None or most == 0)  # all that can be done without a new token
    requests = list[Request]()
    for ids in prompts:
        one = service.request(asked, ids, most, logprobs=asked.logprobs, echo_logprobs=read)
        requests += service.choices(one, asked.n or 1)
    if len(requests) > MOST_CHOICES * 4:
        raise Problem(400, f"n: {len(requests)} choices in all; at most {MOST_CHOICES * 4}", "n")
    answers = [service.answer(asked.stops) for _ in requests]
    shown = _Shown(service, prompts, asked)
    reply = Reply(service, "text_completion", requests, answers, shown.choice, shown.chunk, asked.usage_wanted)
    return await reply.stream(http) if asked.stream else await reply.whole(http)


def _prompts(service: Service, asked: CompletionRequest) -> list[list[int]]:
    prompt = asked.prompt
    texts: list[Any] = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else list(prompt)
    return [encode_prompt(service.tokenizer, one, chat=False) if isinstance(one, str) else list(one) for one in texts]


class _Shown:
    """Choices as JSON."""

    def __init__(self, service: Service, prompts: list[list[int]], asked: CompletionRequest) -> None:
        self._service, self._prompts, self._asked = service, prompts, asked
        self._offsets: dict[int, int] = {}  # characters streamed, by choice

    def choice(self, index: int, answer: Answer, parts: list[Part]) -> dict[str, Any]:
        """A whole choice."""
        text, tokens = "".join(part.text for part in parts), [token for part in parts for token in part.token_ids]
        entries: list[TokenLogprobs | None] = [entry for part in parts for entry in part.logprobs]
        if self._asked.echo:
            prompt = self._prompts[index // (self._asked.n or 1)]
            text = f"{self._service.tokenizer.decode(prompt, skip_special_tokens=True)}{text}"
            tokens, entries = [*prompt, *tokens], [*answer.prompt_logprobs, *entries]
        logprobs = None if self._asked.logprobs is None else self._logprobs(answer, tokens, entries, 0)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": answer.finish}

    def chunk(self, index: int, answer: Answer, part: Part, first: bool) -> dict[str, Any]:
        """What a part of a choice adds."""
        offset = self._offsets.get(index, 0)
        self._offsets[index] = offset + len(part.text)
        logprobs = None
        if self._asked.logprobs is not None:
            logprobs = self._logprobs(answer, part.token_ids, part.logprobs, offset)
        return {"index": index, "text": part.text, "logprobs": logprobs, "finish_reason": part.finish}

    def _logprobs(self, answer: Answer, tokens: Any, entries: Any, offset: int) -> dict[str, Any]:
        words = [answer.word(token) for token in tokens]
        offsets = []
        for word in words:
            offsets.append(offset)
            offset += len(word)
        return {
            "tokens": words,
            "token_logprobs": [None if entry is None else entry.logprob for entry in entries],
            "top_logprobs": [None if entry is None else _likeliest(answer, entry) for entry in entries],
            "text_offset": offsets,
        }


def _likeliest(answer: Answer, entry: TokenLogprobs) -> dict[str, float]:
    """Log-probabilities by word; of parts of characters, which read alike, the likeliest one's."""
    found = dict[str, float]()
    for token, value in entry.top:  # best first
        found.setdefault(answer.word(token), value)
    return found
