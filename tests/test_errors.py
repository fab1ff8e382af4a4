"""Errors: the status, code and retry advice of each, and the body that clients receive."""

from typing import get_args

import pytest
from pydantic_core import from_json, to_json

from errors import (
    KINDS,
    Code,
    ErrorBody,
    FieldProblem,
    ServiceError,
    invalid_request,
    to_service_error,
)

# The table in docs/api.md: status, code, retryable.
CONTRACT = {
    (400, "invalid_json", False),
    (401, "invalid_api_key", False),
    (404, "not_found", False),
    (404, "session_not_found", False),
    (405, "method_not_allowed", False),
    (408, "request_timeout", True),
    (409, "session_busy", True),
    (413, "body_too_large", False),
    (415, "unsupported_media_type", False),
    (422, "invalid_request", False),
    (422, "context_too_long", False),
    (422, "content_refused", False),
    (422, "idempotency_key_reused", False),
    (429, "rate_limited", True),
    (429, "too_many_streams", True),
    (500, "internal_error", False),
    (502, "upstream_error", False),
    (502, "upstream_incomplete", True),
    (503, "upstream_unavailable", True),
    (503, "overloaded", True),
    (503, "shutting_down", True),
    (503, "state_unavailable", True),
    (504, "upstream_timeout", True),
}


def test_kinds_match_the_contract() -> None:
    assert {(kind.status, code, kind.retryable) for code, kind in KINDS.items()} == CONTRACT
    assert sorted(KINDS) == sorted(get_args(Code))


@pytest.mark.parametrize("code", KINDS)
def test_cause_agrees_with_code_and_status(code: Code) -> None:
    kind = KINDS[code]
    assert (kind.caused_by == "caller") == (kind.status < 500)
    assert (kind.caused_by == "provider") == code.startswith("upstream_")


@pytest.mark.parametrize(
    ("error", "detail"),
    [
        (
            ServiceError("rate_limited", "Retry in 6 s.", retry_after=5.2),
            {
                "code": "rate_limited",
                "message": "Retry in 6 s.",
                "retryable": True,
                "retry_after": 6,
            },
        ),
        (
            ServiceError("upstream_error", "It failed."),
            {
                "code": "upstream_error",
                "message": "It failed.",
                "retryable": False,
                "retry_after": None,
            },
        ),
        (
            invalid_request(
                FieldProblem(field="message", message="is required"),
                FieldProblem(field="model_id", message="must be a string"),
            ),
            {
                "code": "invalid_request",
                "message": "message is required; model_id must be a string",
                "retryable": False,
                "retry_after": None,
                "fields": [
                    {"field": "message", "message": "is required"},
                    {"field": "model_id", "message": "must be a string"},
                ],
            },
        ),
    ],
)
def test_body_contains_error_detail_and_request_id(error: ServiceError, detail: object) -> None:
    body = to_json(ErrorBody(error=error.detail(), id="req_1"))
    assert from_json(body) == {"error": detail, "id": "req_1"}


def test_retryable_argument_overrides_the_advice_of_the_code() -> None:
    codes: list[tuple[Code, bool]] = [("upstream_error", True), ("upstream_unavailable", False)]
    for code, retryable in codes:
        assert KINDS[code].retryable is not retryable
        assert ServiceError(code, "It failed.", retryable=retryable).detail().retryable is retryable


def test_cause_is_the_class_name_of_the_first_exception() -> None:
    assert ServiceError("upstream_error", "It failed.").cause is None
    error = ServiceError("upstream_error", "It failed.")
    error.__cause__ = ConnectionError("has a secret")
    error.__cause__.__cause__ = TimeoutError("has a secret")
    assert error.cause == "TimeoutError"


def test_other_exceptions_become_internal_errors_without_their_text() -> None:
    error = to_service_error(ValueError("has a secret"))
    assert (error.code, error.status, error.cause) == ("internal_error", 500, "ValueError")
    assert "secret" not in str(error)


def test_service_errors_are_not_converted() -> None:
    error = ServiceError("session_busy", "Another response is running.")
    assert to_service_error(error) is error
    assert str(error) == "Another response is running."
