"""Errors as OpenAI's clients expect them: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from anybit.errors import AnybitError, Busy, Draining, InputError

RETRY_SECONDS = "1"


class Problem(Exception):
    """An answer other than 200: one line that says what to change, and which field."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


def body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The JSON of an error."""
    kind = "server_error" if status >= 500 else "requests" if status == 429 else "invalid_request_error"
    return {"error": {"message": _sane(message), "type": kind, "param": param and _sane(param), "code": code}}


def _sane(text: str) -> str:
    """`text`, which may quote half a surrogate pair of the client's, as UTF-8 can say it."""
    return text.encode(errors="replace").decode()


def response(status: int, message: str, param: str | None = None, code: str | None = None) -> JSONResponse:
    """The answer of an error; when another try may help it says when."""
    headers = {"Retry-After": RETRY_SECONDS} if status in (429, 503) else {}
    return JSONResponse(body(status, message, param, code), status, headers)


def as_problem(error: AnybitError) -> Problem:
    """What the engine refused."""
    if isinstance(error, Draining):
        return Problem(503, str(error), code="unavailable")
    if isinstance(error, Busy):
        return Problem(429, str(error), code="rate_limit_exceeded")
    return Problem(400 if isinstance(error, InputError) else 500, str(error))


def install(app: FastAPI) -> None:
    """Answer every failure in this shape."""

    @app.exception_handler(Problem)
    def _(_: Request, error: Problem) -> JSONResponse:
        return response(error.status, str(error), error.param, error.code)

    @app.exception_handler(AnybitError)
    def _(_: Request, error: AnybitError) -> JSONResponse:
        problem = as_problem(error)
        return response(problem.status, str(problem), problem.param, problem.code)

    @app.exception_handler(RequestValidationError)
    def _(_: Request, error: RequestValidationError) -> JSONResponse:
        found = _furthest(error.errors())
        where = ".".join(_path(found, error.body))
        extra = "; remove it" if found["type"] == "extra_forbidden" else ""
        return response(400, f"{where or 'body'}: {found['msg']}{extra}", where or None)

    @app.exception_handler(HTTPException)
    def _(_: Request, error: HTTPException) -> JSONResponse:
        found = response(error.status_code, str(error.detail))
        found.headers.update(error.headers or {})
        return found


def _furthest(errors: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of what is wrong with the first field that is, the most telling: of a union's members the one that fitted furthest."""
    field = errors[0]["loc"][:2]
    same = [error for error in errors if error["loc"][:2] == field]
    return max(same, key=lambda error: (len(error["loc"]), not error["type"].endswith("_type")))


def _path(error: dict[str, Any], body: Any) -> list[str]:
    """Where in `body`; pydantic also names members of unions on the way, which are not in it."""
    path = list[str]()
    for part in error["loc"][1:]:
        if isinstance(part, int) if isinstance(body, list) else isinstance(body, dict) and part in body:
            body = body[part]
            path.append(str(part))
    return [*path, str(error["loc"][-1])] if error["type"] == "missing" else path
