"""Connections that may not wait for ever: one that sends no request, or does not read its answer, is closed."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

PATIENCE = 20.0
"""Seconds between two looks at a connection; at the second without progress it is closed."""


class Connection(H11Protocol):
    """HTTP/1.1 as uvicorn speaks it, which has no limit of time for a request's head or for a client that stops reading."""

    _watch: asyncio.TimerHandle
    _seen: tuple[object, int] | None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is here and owes a request."""
        super().connection_made(transport)
        self._seen = (None, 0)
        self._watch = self.loop.call_later(PATIENCE, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        self._watch.cancel()
        super().connection_lost(exc)

    def _look(self) -> None:
        cycle, unread = self.cycle, self.transport.get_write_buffer_size()
        between = cycle is None or cycle.response_complete
        seen = (cycle, unread) if between or unread else None  # None: the model is at work, which may take its time
        if seen is not None and seen == self._seen:
            self.transport.abort()
            return
        self._seen = seen
        self._watch = self.loop.call_later(PATIENCE, self._look)
