"""Errors as OpenAI's clients expect them: `{"error": {"message", "type", "param", "code"}}` with the right status."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

__all__ = ["NOT_OFFERED", "ApiError", "install", "response", "shutting_down"]

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
}
NOT_OFFERED = "not_offered"  # kind of the error of a field that is known, and not to be had here
_LONGEST = 1000  # characters of a message; what a caller sent is never echoed at length


class ApiError(Exception):
    """A request that is refused, or that failed.

    Args:
        status: HTTP status, 4xx or 5xx.
        message: one sentence for the caller: what is wrong and what is allowed.
        param: the field of the body that is wrong; default None.
        code: a stable word for programs, e.g. "context_length_exceeded"; default None.
        retry_after: seconds after which to try again, sent as a header; default None.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The error object, safe to encode whatever the caller sent."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        param = None if self.param is None else _encodable(self.param)[:100]
        return {"error": {"message": _encodable(str(self))[:_LONGEST], "type": kind, "param": param, "code": self.code}}


def shutting_down() -> ApiError:
    """The refusal of requests while the server ends."""
    return ApiError(503, "the server is shutting down", code="shutting_down", retry_after=5)


def response(error: ApiError) -> JSONResponse:
    """The HTTP response that says `error`."""
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body, error.status, headers)


def install(app: FastAPI) -> None:
    """Give every error of `app` this shape, FastAPI's own 404, 405 and 422 (a 400 here) and a bug's 500 included."""

    async def refused(request: Request, error: Any) -> JSONResponse:
        return response(error)

    async def invalid(request: Request, error: Any) -> JSONResponse:
        if isinstance(error.body, dict) and isinstance(error.body.get("model"), str):
            request.state.model = error.body["model"]  # counted there
        return response(_invalid(error))

    async def http(request: Request, error: Any) -> JSONResponse:
        shaped = response(ApiError(error.status_code, str(error.detail)))
        shaped.headers.update(error.headers or {})
        return shaped

    async def failed(request: Request, error: Exception) -> JSONResponse:
        return response(ApiError(500, "internal error; the server's log has the details"))

    app.add_exception_handler(ApiError, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, failed)


def _invalid(error: RequestValidationError) -> ApiError:
    """The first problem of a body, with the field's name. The value itself is not repeated."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return ApiError(400, "the body is not valid JSON")
    if first["type"] == NOT_OFFERED:
        return ApiError(400, first["msg"], param=first["ctx"]["field"])
    if not place:
        return ApiError(400, f"the body must be a JSON object, sent as application/json: {first['msg']}")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{place[-1][:100]}: no such field", param=".".join(place))
    return ApiError(400, f"{'.'.join(place)[:100]}: {first['msg'].removeprefix('Value error, ')}", param=".".join(place))


def _encodable(text: str) -> str:
    """JSON may hold half a surrogate pair, which no UTF-8 can."""
    return text.encode("utf-8", "replace").decode()
