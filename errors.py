"""The errors a request can end with, and the HTTP status, code and retry advice of each.

A message is for the caller. It states what is wrong and what to do, and never contains a provider's
error text, a key, or text from the caller's own message.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from pydantic import BaseModel

# fmt: off
Code = Literal[
    "invalid_json", "invalid_api_key", "not_found", "session_not_found", "method_not_allowed",
    "request_timeout", "session_busy", "body_too_large", "unsupported_media_type",
    "invalid_request", "context_too_long", "content_refused", "rate_limited", "too_many_streams",
    "upstream_error", "upstream_incomplete", "upstream_unavailable", "upstream_timeout",
    "internal_error", "overloaded", "shutting_down", "state_unavailable", "idempotency_key_reused",
]
# fmt: on


class ErrorKind(NamedTuple):
    """The properties that all errors with one code share. `caused_by` is who can fix the cause."""

    status: int
    retryable: bool
    caused_by: Literal["caller", "provider", "service"]


KINDS: dict[Code, ErrorKind] = {
    # The caller can fix these. A provider reports context_too_long and content_refused.
    # A session that belongs to another caller is session_not_found too.
    "invalid_json": ErrorKind(400, False, "caller"),
    "invalid_api_key": ErrorKind(401, False, "caller"),
    "not_found": ErrorKind(404, False, "caller"),
    "session_not_found": ErrorKind(404, False, "caller"),
    "method_not_allowed": ErrorKind(405, False, "caller"),
    "request_timeout": ErrorKind(408, True, "caller"),
    "session_busy": ErrorKind(409, True, "caller"),
    "body_too_large": ErrorKind(413, False, "caller"),
    "unsupported_media_type": ErrorKind(415, False, "caller"),
    "invalid_request": ErrorKind(422, False, "caller"),
    "idempotency_key_reused": ErrorKind(422, False, "caller"),
    "context_too_long": ErrorKind(422, False, "caller"),
    "content_refused": ErrorKind(422, False, "caller"),
    "rate_limited": ErrorKind(429, True, "caller"),
    "too_many_streams": ErrorKind(429, True, "caller"),
    # The provider failed, or the connection to it.
    "upstream_error": ErrorKind(502, False, "provider"),
    "upstream_incomplete": ErrorKind(502, True, "provider"),
    "upstream_unavailable": ErrorKind(503, True, "provider"),
    "upstream_timeout": ErrorKind(504, True, "provider"),
    # This service failed, or reached one of its own limits.
    "internal_error": ErrorKind(500, False, "service"),
    "overloaded": ErrorKind(503, True, "service"),
    "shutting_down": ErrorKind(503, True, "service"),
    "state_unavailable": ErrorKind(503, True, "service"),
}


class FieldProblem(BaseModel):
    """An invalid field of a request. The message is a predicate such as "is required"."""

    field: str
    message: str


class ErrorDetail(BaseModel):
    """An error as clients see it. `retry_after` is in seconds."""

    code: Code
    message: str
    retryable: bool
    retry_after: int | None


class InvalidRequestDetail(ErrorDetail):
    """The detail of invalid_request, which also names at most ten invalid fields."""

    fields: list[FieldProblem]


class ErrorBody(BaseModel):
    """The body of every error response. `id` is the request id."""

    error: InvalidRequestDetail | ErrorDetail
    id: str


class ServiceError(Exception):
    """An error that is reported to the caller.

    `retryable` overrides the advice of the code. `retry_after` is in seconds and is rounded up
    when it is sent. `fields` are the invalid fields of an invalid_request. `reason` is for the
    operator: a word that says more than the code, see `provider_errors.classify_error`.
    """

    def __init__(
        self,
        code: Code,
        message: str,
        *,
        retryable: bool | None = None,
        retry_after: float | None = None,
        fields: Sequence[FieldProblem] = (),
        reason: str | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.status, default, self.caused_by = KINDS[code]
        self.retryable = default if retryable is None else retryable
        self.retry_after = retry_after
        self.fields = list(fields)
        self.reason = reason

    @property
    def cause(self) -> str | None:
        """The class name of the first exception in the chain of causes, for the log.

        Its text is left out because it may quote a request or a key.
        """
        error: BaseException = self
        while error.__cause__ is not None:
            error = error.__cause__
        return None if error is self else type(error).__name__

    def detail(self) -> ErrorDetail:
        """Return the error as it is sent to the caller."""
        wait = None if self.retry_after is None else math.ceil(self.retry_after)
        detail = ErrorDetail(
            code=self.code, message=str(self), retryable=self.retryable, retry_after=wait
        )
        if not self.fields:
            return detail
        return InvalidRequestDetail(**detail.model_dump(), fields=self.fields)


def invalid_request(*problems: FieldProblem) -> ServiceError:
    """Return the error for a request with these invalid fields."""
    message = "; ".join(f"{problem.field} {problem.message}" for problem in problems)
    return ServiceError("invalid_request", message, fields=problems)


def to_service_error(error: Exception) -> ServiceError:
    """Return `error` itself if it is a ServiceError, otherwise an internal_error caused by it."""
    if isinstance(error, ServiceError):
        return error
    problem = "The service failed unexpectedly. Report the request id to its operator."
    internal = ServiceError("internal_error", problem)
    internal.__cause__ = error
    return internal
