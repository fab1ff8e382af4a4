"""The error tree beside the contract: each way to fail has its status, its code and its advice."""

import re
from collections.abc import Iterator
from typing import get_args

import pytest
from pydantic_core import from_json, to_json

import errors
from errors import Code, ErrorBody, FieldProblem, ServiceError

# The table of api.md: status, code, and whether it says to try again.
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


def descendants(kind: type[ServiceError]) -> Iterator[type[ServiceError]]:
    for child in kind.__subclasses__():
        yield child
        yield from descendants(child)


def leaves() -> list[type[ServiceError]]:
    return [kind for kind in descendants(ServiceError) if not kind.__subclasses__()]


def test_each_error_has_the_status_code_and_advice_of_the_contract() -> None:
    assert {(kind.status, kind.code, kind.retryable) for kind in leaves()} == CONTRACT


def test_each_code_belongs_to_one_error_and_each_error_to_a_declared_code() -> None:
    assert sorted(kind.code for kind in leaves()) == sorted(get_args(Code))


def test_the_drawn_tree_is_the_tree() -> None:
    drawn = re.findall(r"── (\w+) *([0-9]{3})?", errors.__doc__ or "")
    assert drawn == [
        (kind.__name__, "" if kind.__subclasses__() else str(kind.status))
        for kind in descendants(ServiceError)
    ]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            ServiceError("rate_limited", "Wait 6 s.", retry_after=6),
            {"code": "rate_limited", "message": "Wait 6 s.", "retryable": True, "retry_after": 6},
        ),
        (
            ServiceError("upstream_error", "Failed."),
            {
                "code": "upstream_error",
                "message": "Failed.",
                "retryable": False,
                "retry_after": None,
            },
        ),
        (
            ServiceError(
                "invalid_request",
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
def test_a_body_holds_the_error_and_the_request_id_and_only_bad_fields_add_theirs(
    error: ServiceError, told: object
) -> None:
    body = to_json(ErrorBody(error=error.detail(), id="req_1"))
    assert from_json(body) == {"error": told, "id": "req_1"}


@pytest.mark.parametrize(
    ("kind", "advice"), [("upstream_error", True), ("upstream_unavailable", False)]
)
def test_one_failure_may_advise_otherwise_than_its_kind(
    kind: type[ServiceError], advice: bool
) -> None:
    assert kind("So it is.", retryable=advice).detail().retryable is advice
    assert kind("As ever.").detail().retryable is not advice


def test_an_error_prints_as_its_message() -> None:
    assert str(ServiceError("upstream_error", "It failed.")) == "It failed."
