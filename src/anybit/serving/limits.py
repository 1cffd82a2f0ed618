"""Bounds on what a client may send, below the framework: size and time of a body, the key, the names a browser may use; and what
a client is told when everything above fails."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from anybit.serving.problems import response

log = logging.getLogger("anybit")
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
BODY_BYTES = 4 << 20
BODY_SECONDS = 20.0
LOCAL = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True)
class Limits:
    """ASGI middleware.

    Attributes:
        key: that `/v1` and `/metrics` ask for; None: nobody has to have one.
        hosts: names of this server in the `Host` header; None: any. A page of a stranger that points its own name at this machine
            (DNS rebinding) sends another.
        body_bytes, body_seconds: of a request's body.
        answered: called with the route and status of every answer.
    """

    app: App
    key: str | None
    hosts: tuple[str, ...] | None
    answered: Callable[[str, int], None]
    body_bytes: int = BODY_BYTES
    body_seconds: float = BODY_SECONDS

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        begun = False

        async def counted(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun, route = True, scope.get("route")
                self.answered(getattr(route, "path", "other"), message["status"])
            await send(message)

        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        if refusal := self._refusal(scope["path"], headers):
            return await response(*refusal)(scope, receive, counted)
        try:
            body = await self._body(receive, headers)
        except TimeoutError:
            return await response(408, f"the body took more than {self.body_seconds:g} seconds")(
                scope, receive, counted
            )
        if body is None:
            too_large = response(413, f"the body is larger than {self.body_bytes} bytes; send less")
            return await too_large(scope, receive, counted)
        try:
            await self.app(scope, _Again(body, receive), counted)
        except Exception:
            if begun:  # too late to say anything: the connection is closed
                raise
            log.exception("a request failed")
            await response(500, "the server failed; see its log")(scope, receive, counted)

    def _refusal(self, path: str, headers: dict[str, str]) -> tuple[int, str, str | None, str | None] | None:
        host = re.sub(r":\d+$", "", headers.get("host", ""))
        if self.hosts is not None and host not in self.hosts:
            return 403, f"host '{host}' is not one of {', '.join(self.hosts)}; start the server with --host", None, None
        if self.key is None or not path.startswith(("/v1", "/metrics")):
            return None
        given = headers.get("authorization", "").removeprefix("Bearer ")
        if hmac.compare_digest(given.encode("latin-1"), self.key.encode()):
            return None
        return 401, "the API key is missing or wrong; send 'Authorization: Bearer KEY'", None, "invalid_api_key"

    async def _body(self, receive: Receive, headers: dict[str, str]) -> bytes | None:
        """The whole body; None: too large."""
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > self.body_bytes:
            return None
        parts, size = list[bytes](), 0
        async with asyncio.timeout(self.body_seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return b"".join(parts)
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > self.body_bytes:
                    return None
                if not message.get("more_body"):
                    return b"".join(parts)


class _Again:
    """`receive` for a body that was read already; after it only the client's going away can come."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}
