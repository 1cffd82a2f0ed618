"""The routes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response

from anybit.serving import problems
from anybit.serving.chat import chat
from anybit.serving.completions import complete
from anybit.serving.limits import Limits
from anybit.serving.schemas import ChatRequest, CompletionRequest
from anybit.serving.service import Service

PAGE = Path(__file__).parent / "page"
FILES = {"page.js": "text/javascript", "page.css": "text/css", "icon.svg": "image/svg+xml"}
POLICY = "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"


def create_app(service: Service, *, key: str | None = None, hosts: tuple[str, ...] | None = None) -> FastAPI:
    """The server of one checkpoint; see `limits.Limits` for `key` and `hosts`."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        yield
        service.engine.close()

    app = FastAPI(title="anybit", version=version("anybit"), lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Limits, key=key, hosts=hosts, answered=service.metrics.answered)
    problems.install(app)
    _model_routes(app, service)
    _page_routes(app)
    return app


def _model_routes(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [_model(service)]})

    @app.get("/v1/models/{name:path}")
    def model(name: str) -> JSONResponse:
        service.check_model(name)
        return JSONResponse(_model(service))

    @app.post("/v1/completions")
    async def completions(asked: CompletionRequest, http: Request) -> Response:
        return await complete(service, asked, http)

    @app.post("/v1/chat/completions")
    async def chat_completions(asked: ChatRequest, http: Request) -> Response:
        return await chat(service, asked, http)

    @app.get("/health")
    def health() -> JSONResponse:
        about = {"model": service.name, "precisions": list(service.engine.precisions)}
        if not service.engine.accepting:  # balancers send their clients elsewhere
            return JSONResponse({"status": "draining"} | about, 503)
        return JSONResponse({"status": "ok"} | about)

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


def _model(service: Service) -> dict[str, object]:
    about = {"context": service.engine.context, "precisions": list(service.engine.precisions)}
    about["schedules"] = sorted(file.stem for file in (service.directory / "schedules").glob("*.json"))
    return {"id": service.name, "object": "model", "created": service.created, "owned_by": "anybit", "anybit": about}


def _page_routes(app: FastAPI) -> None:
    headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}

    @app.get("/", include_in_schema=False)
    def page() -> FileResponse:
        return FileResponse(PAGE / "page.html", headers=headers)

    for name, kind in FILES.items():
        path = PAGE / name
        app.get(f"/{name}", include_in_schema=False)(
            lambda path=path, kind=kind: FileResponse(path, media_type=kind, headers=headers)
        )
