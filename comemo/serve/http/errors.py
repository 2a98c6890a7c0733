"""Errors as clients of OpenAI expect them: a status, and what was wrong in words."""

from typing import Any

from comemo.serve.work import Refused

# Status and type of what an engine refuses.
KINDS = {
    "too_large": (422, "invalid_request_error"),
    "busy": (429, "rate_limit_error"),
    "closing": (503, "server_error"),
    "timeout": (504, "timeout_error"),
    "failed": (500, "server_error"),
    "internal": (500, "server_error"),
}


class HttpError(Exception):
    """What a client is told instead of an answer.

    Args:
        status: of HTTP.
        message: for people; never the contents of a request.
        kind: the `type` of the error.
        param: name of the field that is wrong.
        code: a short name, for programs.
        headers: in addition.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind
        self.param, self.code, self.headers = param, code, headers or {}

    def body(self) -> dict[str, Any]:
        """The body of the response."""
        fields = {"message": self.message, "type": self.kind, "param": self.param}
        return {"error": fields | {"code": self.code}}


def bad(message: str, param: str | None = None, code: str | None = None) -> HttpError:
    """A 400: a request that this server does not understand or support."""
    return HttpError(400, message, param=param, code=code)


def over_limit(status: int, name: str, most: object, got: object) -> HttpError:
    """A request beyond a limit, which is named."""
    kind = "rate_limit_error" if status == 429 else "invalid_request_error"
    headers = {"Retry-After": "1"} if status == 429 else None
    message = f"limit of {name}: at most {most}, got {got}"
    return HttpError(status, message, kind, code="limit_exceeded", headers=headers)


def refused(error: Refused) -> HttpError:
    """What a client is told when an engine refuses."""
    status, kind = KINDS[error.kind]
    message = error.text if error.limit is None else f"limit of {error.limit}: {error.text}"
    headers = {"Retry-After": "1"} if status in (429, 503) else None
    code = "limit_exceeded" if error.limit else error.kind
    return HttpError(status, message, kind, code=code, headers=headers)
