"""The end of a server: what was accepted is answered, what is new is told to go elsewhere."""

from __future__ import annotations

import asyncio
import socket
import threading
from types import FrameType

import uvicorn

from anybit.serving.batch.engine import BatchEngine


class Server(uvicorn.Server):
    """uvicorn, which at a signal would close its socket at once; here what is new is answered with 503 until the engine is done.

    A second signal stops without waiting for anybody.
    """

    def __init__(self, config: uvicorn.Config, engine: BatchEngine) -> None:
        super().__init__(config)
        self._engine = engine
        self._drainer: threading.Thread | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """SIGTERM or Ctrl-C; a signal handler, so the waiting is another thread's."""
        if self._drainer is not None:
            self.should_exit = self.force_exit = True
            return
        self._drainer = threading.Thread(target=self._drain, name="anybit-drain", daemon=True)
        self._drainer.start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, which leaves the connections of those who have not read their answer in time."""
        await super().shutdown(sockets)
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        await asyncio.sleep(0)  # for the loop to close them

    def _drain(self) -> None:
        self._engine.drain()
        self.should_exit = True
