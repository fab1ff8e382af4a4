"""Every way a request can fail: whose fault it is, its status, its code, whether to try again.

    ServiceError
    ├── CallerError                     the request has to change
    │   ├── InvalidJSON            400
    │   ├── InvalidAPIKey          401
    │   ├── NotFound               404
    │   ├── SessionNotFound        404  or not the caller's: the two look alike
    │   ├── MethodNotAllowed       405
    │   ├── RequestTimeout         408
    │   ├── SessionBusy            409
    │   ├── BodyTooLarge           413
    │   ├── UnsupportedMediaType   415
    │   ├── InvalidRequest         422  names the fields
    │   ├── ContextTooLong         422  as the provider says
    │   ├── ContentRefused         422  as the provider says
    │   ├── RateLimited            429
    │   └── TooManyStreams         429
    ├── ProviderError                   the provider, or the way to it
    │   ├── UpstreamError          502
    │   ├── UpstreamIncomplete     502
    │   ├── UpstreamUnavailable    503
    │   └── UpstreamTimeout        504
    └── OurError                        this service
        ├── InternalError          500
        ├── Overloaded             503
        ├── ShuttingDown           503
        └── StateUnavailable       503

An error's message is for the caller and says what to change. It never holds a provider's text, a
key, or the caller's own message.
"""

import math
from typing import ClassVar, Literal

from pydantic import BaseModel

# fmt: off
Code = Literal[
    "invalid_json", "invalid_api_key", "not_found", "session_not_found", "method_not_allowed",
    "request_timeout", "session_busy", "body_too_large", "unsupported_media_type",
    "invalid_request", "context_too_long", "content_refused", "rate_limited", "too_many_streams",
    "upstream_error", "upstream_incomplete", "upstream_unavailable", "upstream_timeout",
    "internal_error", "overloaded", "shutting_down", "state_unavailable",
]
# fmt: on


class FieldProblem(BaseModel):
    """What is wrong with one field of the request."""

    field: str
    message: str


class ErrorDetail(BaseModel):
    """`retry_after` is in seconds."""

    code: Code
    message: str
    retryable: bool
    retry_after: int | None


class InvalidRequestDetail(ErrorDetail):
    """What invalid_request adds: at most ten fields."""

    fields: list[FieldProblem]


class ErrorBody(BaseModel):
    """The body of every answer that is an error; `id` is the request id."""

    error: InvalidRequestDetail | ErrorDetail
    id: str


class ServiceError(Exception):
    """Base of all; only its leaves are raised. `retry_after` is in seconds; told rounded up."""

    status: ClassVar[int]
    code: ClassVar[Code]
    retryable: bool = False

    def __init__(
        self, message: str, *, retryable: bool | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        if retryable is not None:
            self.retryable = retryable

    @property
    def cause(self) -> str | None:
        """For the log: the class of what it came from in the end, such as ConnectionRefusedError.
        Not its text, which may quote anything."""
        error: BaseException = self
        while error.__cause__ is not None:
            error = error.__cause__
        return None if error is self else type(error).__name__

    def detail(self) -> ErrorDetail:
        wait = None if self.retry_after is None else math.ceil(self.retry_after)
        return ErrorDetail(
            code=self.code, message=str(self), retryable=self.retryable, retry_after=wait
        )


class CallerError(ServiceError):
    """The request has to change."""


class InvalidJSON(CallerError):
    status, code = 400, "invalid_json"


class InvalidAPIKey(CallerError):
    status, code = 401, "invalid_api_key"


class NotFound(CallerError):
    status, code = 404, "not_found"


class SessionNotFound(CallerError):
    status, code = 404, "session_not_found"


class MethodNotAllowed(CallerError):
    status, code = 405, "method_not_allowed"


class RequestTimeout(CallerError):
    status, code, retryable = 408, "request_timeout", True


class SessionBusy(CallerError):
    status, code, retryable = 409, "session_busy", True


class BodyTooLarge(CallerError):
    status, code = 413, "body_too_large"


class UnsupportedMediaType(CallerError):
    status, code = 415, "unsupported_media_type"


class InvalidRequest(CallerError):
    status, code = 422, "invalid_request"

    def __init__(self, *problems: FieldProblem) -> None:
        super().__init__("; ".join(f"{problem.field} {problem.message}" for problem in problems))
        self.problems = list(problems)

    def detail(self) -> InvalidRequestDetail:
        return InvalidRequestDetail(**super().detail().model_dump(), fields=self.problems)


class ContextTooLong(CallerError):
    status, code = 422, "context_too_long"


class ContentRefused(CallerError):
    status, code = 422, "content_refused"


class RateLimited(CallerError):
    status, code, retryable = 429, "rate_limited", True


class TooManyStreams(CallerError):
    status, code, retryable = 429, "too_many_streams", True


class ProviderError(ServiceError):
    """The provider failed, or the way to it."""


class UpstreamError(ProviderError):
    status, code = 502, "upstream_error"


class UpstreamIncomplete(ProviderError):
    status, code, retryable = 502, "upstream_incomplete", True


class UpstreamUnavailable(ProviderError):
    status, code, retryable = 503, "upstream_unavailable", True


class UpstreamTimeout(ProviderError):
    status, code, retryable = 504, "upstream_timeout", True


class OurError(ServiceError):
    """This service failed, or takes no more now."""


class InternalError(OurError):
    status, code = 500, "internal_error"


class Overloaded(OurError):
    status, code, retryable = 503, "overloaded", True


class ShuttingDown(OurError):
    status, code, retryable = 503, "shutting_down", True


class StateUnavailable(OurError):
    status, code, retryable = 503, "state_unavailable", True


def as_told(error: Exception) -> ServiceError:
    """`error` as a caller may be told of it: as it is if it is one of these, else as a defect."""
    if isinstance(error, ServiceError):
        return error
    defect = InternalError("The service failed. Report the request id to its operator.")
    defect.__cause__ = error
    return defect
