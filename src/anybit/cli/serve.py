"""`anybit serve`: a checkpoint behind an OpenAI-compatible HTTP server."""

from __future__ import annotations

import importlib.util
import os
from typing import Annotated

import typer

from anybit.cli.generate import cache_spec
from anybit.cli.ledger import read_ledger
from anybit.cli.options import Directory
from anybit.cli.output import say
from anybit.errors import InputError

KEY = "ANYBIT_API_KEY"


def serve(
    directory: Directory,
    host: Annotated[str, typer.Option(metavar="HOST", help="Address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="PORT", min=0, max=65535, help="0: any that is free")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(metavar="K", help=f"Ask clients for this key; also read from {KEY}, which others cannot see"),
    ] = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="What clients call the model; default: DIR's")
    ] = None,
    kv: Annotated[str | None, typer.Option(metavar="SPEC", help="Key-value cache, as for `generate`")] = None,
    max_running: Annotated[int, typer.Option(metavar="N", min=1, max=1024, help="Requests that run at once")] = 64,
    max_waiting: Annotated[int, typer.Option(metavar="N", min=1, help="Requests that may wait beyond those")] = 256,
    cache_tokens: Annotated[int, typer.Option(metavar="N", min=64, help="Tokens the cache holds in all")] = 32768,
    threads: Annotated[int | None, typer.Option(metavar="N", min=1, help="Of the kernels; default: all cores")] = None,
) -> None:
    """Serve a checkpoint: models, completions and chat completions as OpenAI has them, streamed or not.

    Also /health, /metrics and a page to chat on at /. Stops on SIGTERM or Ctrl-C after what was accepted is answered.
    """
    read_ledger(directory)
    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"serving needs {', '.join(missing)}; run: pip install 'anybit[serve]'")
    key = os.environ.get(KEY) if api_key is None else api_key
    if key == "":
        raise InputError(f"--api-key (or {KEY}) is empty, which would let everybody in; give a key, or leave it out")
    cache = cache_spec(kv)
    from anybit.serving.run import listen, open_service
    from anybit.serving.run import serve as run

    listener = listen(host, port)
    service = open_service(
        directory,
        name or directory.resolve().name,
        kv=cache,
        slots=max_running,
        cache_tokens=cache_tokens,
        max_waiting=max_waiting,
        threads=threads,
    )
    shown = f"[{host}]" if ":" in host else host
    say(f"serving {service.name} on http://{shown}:{listener.getsockname()[1]} (Ctrl-C stops)")
    run(service, listener, host, key)
