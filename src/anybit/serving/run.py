"""A checkpoint behind a socket, until it is told to stop."""

from __future__ import annotations

import logging
import socket
import time
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from anybit.engine.generate import end_tokens
from anybit.engine.native import NativeModel
from anybit.engine.stepper import NativeStepper
from anybit.engine.tokenizer import open_tokenizer
from anybit.errors import InputError
from anybit.formats.kv import KVSpec
from anybit.serving.app import create_app
from anybit.serving.batch.engine import BatchEngine
from anybit.serving.connection import Connection
from anybit.serving.drain import Server
from anybit.serving.limits import LOCAL
from anybit.serving.metrics import Metrics
from anybit.serving.service import Service

log = logging.getLogger("anybit")
CONNECTIONS = 1024
READ_SECONDS = 30
"""That clients have, once every text is complete, to read theirs before the server ends."""


def open_service(
    directory: Path,
    name: str,
    *,
    kv: KVSpec | None = None,
    slots: int = 64,
    cache_tokens: int = 32768,
    max_waiting: int = 256,
    threads: int | None = None,
) -> Service:
    """Open a checkpoint for many requests.

    Args:
        directory: what `anybit quantize` wrote.
        name: that clients call it by.
        kv: cache of keys and values.
        slots: requests that run at once.
        cache_tokens: that the cache holds, all requests together.
        max_waiting: requests accepted beyond `slots`.
        threads: of the kernels.

    Raises:
        KernelUnavailable: the native decoder cannot run this model.
    """
    model = NativeModel.open(directory, kv=kv, max_tokens=cache_tokens, max_sequences=slots, threads=threads)
    tokenizer = open_tokenizer(directory)
    ends = end_tokens(NativeStepper(model), tokenizer)
    engine = BatchEngine(model, ends=ends, max_waiting=max_waiting)
    return Service(name, directory, engine, tokenizer, ends, Metrics(engine.stats), int(time.time()))


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; taken before a model is opened, which may take long.

    Raises:
        InputError: the address is not free, or not one of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()  # who is told the address may connect at once, and waits until the model is open
    except OSError as error:
        listener.close()
        raise InputError(
            f"--host {host} --port {port}: {error.strerror or error}; choose another, or --port 0"
        ) from None
    return listener


def serve(service: Service, listener: socket.socket, host: str, key: str | None) -> None:
    """Answer until SIGTERM or Ctrl-C; then nothing new is accepted and what was accepted is answered.

    Raises:
        KeyboardInterrupt: a second signal came, and answers were cut short.
    """
    hosts = LOCAL if host in ("127.0.0.1", "localhost", "::1") else None
    if hosts is None and key is None:
        log.warning("--host %s without --api-key: whoever reaches this machine may use the model", host)
    app = create_app(service, key=key, hosts=hosts)
    server = Server(settings(app), service.engine)
    server.run([listener])
    if server.force_exit:
        service.engine.close()
        raise KeyboardInterrupt


def settings(app: FastAPI) -> uvicorn.Config:
    """How an application is served."""
    return uvicorn.Config(
        app,
        http=Connection,
        log_level="warning",
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=READ_SECONDS,
        server_header=False,
    )
