"""Tests for the classification of provider errors."""

import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

import provider_errors
from provider_errors import classify_error, is_error, retry_after


def wrapped(**error: object) -> dict[str, object]:
    return {"error": error}


def message(text: str) -> dict[str, object]:
    return {"error": {"message": text, "type": "invalid_request_error", "code": None}}


# The status and JSON of an error response, and the code and retryable of our error.
RESPONSES: dict[str, tuple[int, object, str, bool]] = {
    # The operator has to act.
    "400": (400, wrapped(message="bad"), "upstream_error", False),
    "401": (401, wrapped(code="invalid_api_key"), "upstream_error", False),
    "403": (403, wrapped(code="unsupported_country"), "upstream_error", False),
    "404": (404, wrapped(code="model_not_found"), "upstream_error", False),
    "422": (422, {"detail": [{"loc": ["body"]}]}, "upstream_error", False),
    "a redirect": (307, None, "upstream_error", False),
    "a made-up status": (299, None, "upstream_error", False),
    # The provider failed.
    "408": (408, None, "upstream_error", True),
    "409": (409, None, "upstream_error", True),
    "500": (500, wrapped(type="server_error"), "upstream_error", True),
    "502 with HTML": (502, None, "upstream_error", True),
    "504": (504, None, "upstream_error", True),
    "520": (520, None, "upstream_error", True),
    "500 with code 401": (500, wrapped(code=401), "upstream_error", False),
    "500 with code 400 and a number in the message": (
        500,
        wrapped(code=400, message="Expected at most 512 items"),
        "upstream_error",
        False,
    ),
    "500 with a number in the message": (
        500,
        wrapped(message="Worker 404 exited"),
        "upstream_error",
        True,
    ),
    "502 with code 401": (502, wrapped(code=401), "upstream_error", True),
    # Busy.
    "429": (429, wrapped(code="rate_limit_exceeded"), "upstream_unavailable", True),
    "429 without JSON": (429, None, "upstream_unavailable", True),
    "503": (503, None, "upstream_unavailable", True),
    "529": (529, None, "upstream_unavailable", True),
    "overloaded as 500": (
        500,
        wrapped(message="The engine is Overloaded"),
        "upstream_unavailable",
        True,
    ),
    "500 with code 429": (500, wrapped(code="429"), "upstream_unavailable", True),
    "slow_down as 403": (403, wrapped(code="slow_down"), "upstream_unavailable", True),
    "throttling as 400": (400, wrapped(code="Throttling.Rate"), "upstream_unavailable", True),
    "rate limit that mentions billing": (
        429,
        wrapped(
            message="Rate limit reached: 3 requests a minute. Try again in 20s, or add a payment"
            " method at https://provider.example/account/billing.",
            type="requests",
            code="rate_limit_exceeded",
        ),
        "upstream_unavailable",
        True,
    ),
    "rate limit that mentions the prompt": (
        429,
        message("You would exceed 30,000 input tokens per minute. Reduce the prompt length."),
        "upstream_unavailable",
        True,
    ),
    "quota that is free again soon": (
        429,
        message("You exceeded your current quota. Please retry in 12.5s."),
        "upstream_unavailable",
        True,
    ),
    # JSON of other shapes.
    "error null": (500, {"error": None}, "upstream_error", True),
    "error a list": (500, {"error": [1]}, "upstream_error", True),
    "a list": (500, [1, 2], "upstream_error", True),
    "a number": (500, 7, "upstream_error", True),
    "fields of other types": (
        500,
        wrapped(code=["x"], type={"y": 1}, message=12),
        "upstream_error",
        True,
    ),
    # Similar texts that mean something else.
    "key too long": (401, wrapped(message="key too long"), "upstream_error", False),
    "response took too long": (
        500,
        wrapped(message="The model took too long to respond.", type="server_error"),
        "upstream_error",
        True,
    ),
    "prompt took too long": (500, message("The prompt took too long"), "upstream_error", True),
    "deadline exceeded": (504, message("context deadline exceeded"), "upstream_error", True),
    "deadline would be exceeded": (
        500,
        message("Wait(n=1) would exceed context deadline"),
        "upstream_error",
        True,
    ),
    "out of memory": (
        500,
        message("failed to decode, try to increase the context size"),
        "upstream_error",
        True,
    ),
    "output limit too large": (
        400,
        message("max_tokens is too large: 90000. The model supports at most 8192 output tokens."),
        "upstream_error",
        False,
    ),
    "range of the output limit": (
        400,
        message("Range of max_tokens should be [1, 8192]"),
        "upstream_error",
        False,
    ),
    "caller's text in another member": (
        422,
        {"detail": [{"msg": "Field required", "input": "my prompt is too long"}]},
        "upstream_error",
        False,
    ),
    "exhausted pool": (500, message("All load balancers exhausted"), "upstream_error", True),
    "401 that mentions a rate limit": (
        401,
        message("Unknown key. Unknown keys have a rate limit of 0."),
        "upstream_error",
        False,
    ),
    "401 that mentions a policy": (
        401,
        message("Unknown key. See our content policy."),
        "upstream_error",
        False,
    ),
    "429 that mentions tokens": (
        429,
        message("Too many tokens, wait before you try again."),
        "upstream_unavailable",
        True,
    ),
    "403 that mentions the context": (
        403,
        message("Your plan does not include the maximum context length."),
        "upstream_error",
        False,
    ),
    "data policy": (404, message("No endpoints match your data policy"), "upstream_error", False),
    "closed account": (
        403,
        message("Your account was suspended for violating our usage policies"),
        "upstream_unavailable",
        False,
    ),
}


@pytest.mark.parametrize(("status", "body", "code", "retryable"), RESPONSES.values(), ids=RESPONSES)
def test_error_response_is_classified(
    status: int, body: object, code: str, retryable: bool
) -> None:
    error = classify_error(status, body)
    assert error.code == code
    assert error.retryable is retryable
    assert error.retry_after is None


# Errors of a conversation that is too long, in the words of many providers.
TOO_LONG: list[tuple[int, object]] = [
    # By code or type.
    (400, wrapped(message="x", code="context_length_exceeded")),
    (400, wrapped(message="x", type="exceed_context_size_error", code=400)),
    (400, wrapped(type="too_many_prompt_tokens")),
    (400, wrapped(code="model_max_prompt_tokens_exceeded")),
    (400, wrapped(code="tokens_limit_reached")),
    (400, wrapped(type="request_too_large")),
    (500, wrapped(code="CONTEXT_WINDOW_EXCEEDED")),
    (413, None),
    (413, message("Request Entity Too Large")),
    # By message.
    (400, message("This model's maximum context length is 9 tokens. You requested 12.")),
    (400, message("Your input exceeds the context window of this model.")),
    (400, message("Input tokens exceed the configured limit of 9 tokens.")),
    (400, message("prompt is too long: 12 tokens > 9 maximum")),
    (400, message("input length and `max_tokens` exceed context limit: 8 + 4 > 9")),
    (400, message("Input is too long for requested model.")),
    (400, message("This model's maximum prompt length is 9 but the request contains 12 tokens.")),
    (400, message("Please reduce the length of the messages or completion.")),
    (400, message("prompt token count of 12 exceeds the limit of 9")),
    (400, message("the tokens to keep are greater than the context length")),
    (400, message("The model is loaded with context length of only 9 tokens.")),
    (400, message("Context size has been exceeded.")),
    (400, message("invalid params, context window exceeds limit")),
    (400, message("Prompt contains 12 tokens, too large for model with 9 maximum context length")),
    (400, message("The input (12 tokens) is longer than the model's context length (9 tokens).")),
    (400, message("Input length (12) exceeds maximum allowed input length of 9 tokens")),
    (400, message("Range of input length should be [1, 9]")),
    (400, message("too many tokens: the tokens in the prompt cannot exceed 9")),
    (400, message("Invalid request: Your request exceeded model token limit: 9 (requested: 12)")),
    (400, message("Input token length too long")),
    (400, message("max_tokens must be at least 1, got -3")),
    (400, message("Invalid 'messages[1].content': string too long. Expected at most 9.")),
    (400, message("The total length of all messages is too long.")),
    (400, message("Conversation length exceeded")),
    (400, message("prompt too long; exceeded max context length by 3 tokens")),
    (400, message("Prompt 超长")),
    (
        422,
        {"error": "`inputs` must have less than 9 tokens. Given: 12", "error_type": "validation"},
    ),
    (422, {"error": "`inputs` tokens + `max_new_tokens` must be <= 9. Given: 12"}),
    (500, wrapped(message="the request exceeds the available context size", code=500)),
    (500, message("input is too large to process")),
    (500, message("Your input context is too long")),
    (503, message("The prompt is too long: 12, model maximum context length: 9")),
    # In bodies of other shapes.
    (400, "context length exceeded"),
    (400, {"error": "context_length_exceeded"}),
    (400, {"message": "prompt too long"}),
    (400, {"object": "error", "message": "The prompt (length 12) exceeds the maximum of 9"}),
    (400, {"detail": "maximum context length is 9"}),
    (400, {"detail": [{"msg": "maximum context length is 9", "type": "value_error"}]}),
    (400, {"errors": [{"message": "exceeded this model context window limit (9)", "code": 5021}]}),
    (400, [{"error": {"message": "The input token count (12) exceeds the maximum (9)."}}]),
    (400, {"error_code": 336103, "error_msg": "Prompt tokens too long"}),
    (
        400,
        wrapped(message="failed", metadata={"raw": '{"error":{"code":"context_window_exceeded"}}'}),
    ),
    (400, wrapped(message="failed", metadata={"raw": {"message": "prompt is too long"}})),
    (400, wrapped(message="failed", metadata={"raw": "prompt is too long"})),
    (400, wrapped(metadata={"error_type": "context_length_exceeded"})),
]


@pytest.mark.parametrize(("status", "body"), TOO_LONG)
def test_conversation_that_is_too_long_is_recognised(status: int, body: object) -> None:
    error = classify_error(status, body)
    assert (error.code, error.retryable) == ("context_too_long", False)


REFUSED: list[tuple[int, object]] = [
    (400, wrapped(code="content_filter")),
    (200, wrapped(code="content_filter")),
    (400, wrapped(code="content_policy_violation")),
    (400, wrapped(code="data_inspection_failed")),
    (400, {"code": "DataInspectionFailed", "message": "x"}),
    (400, wrapped(code="x", innererror={"code": "ResponsibleAIPolicyViolation"})),
    (400, wrapped(message="x", type="invalid_request_error", code="invalid_prompt")),
    (400, wrapped(code="cyber_policy")),
    (403, wrapped(metadata={"error_type": "content_policy_violation"})),
    (403, message("Refused by our Content Management Policy")),
    (400, message("Content Exists Risk")),
    (403, message('This model requires moderation and your input was flagged for "violence".')),
    (400, message("Output blocked by content filtering policy")),
    (400, message("Input data may contain inappropriate content.")),
    (400, message("Rejected, because it was considered high risk")),
    (400, message("Content violates usage guidelines. Failed check: SAFETY_CHECK_TYPE_X")),
    (400, message("Your request was rejected as a result of our safety system.")),
    (400, message("Invalid prompt: it was flagged as violating our usage policy.")),
    (400, message("The prompt contains sensitive words")),
    (400, message("The response was blocked for safety reasons")),
    (400, message("PROHIBITED_CONTENT")),
    (500, message("内容包含敏感信息")),
]


@pytest.mark.parametrize(("status", "body"), REFUSED)
def test_policy_refusal_is_recognised(status: int, body: object) -> None:
    error = classify_error(status, body)
    assert (error.code, error.retryable) == ("content_refused", False)


QUOTA: list[tuple[int, object]] = [
    (402, message("Insufficient Balance")),
    (402, None),
    (429, wrapped(code="insufficient_quota")),
    (429, wrapped(type="insufficient_quota")),
    (429, wrapped(code="billing_hard_limit_reached")),
    (429, wrapped(code="project_spend_limit_exceeded")),
    (429, wrapped(type="exceeded_current_quota_error")),
    (429, wrapped(type="rate_limit_error", details={"error_code": "spend_limit_reached"})),
    (400, {"code": "Arrearage", "message": "Make sure your account is in good standing."}),
    (403, {"code": "AllocationQuota.FreeTierOnly"}),
    (403, {"reason": "NOT_ENOUGH_BALANCE"}),
    (500, {"base_resp": {"status_code": 1008, "status_msg": "insufficient balance"}}),
    (400, message("Your credit balance is too low to access the API.")),
    (403, message("Your team has used all available credits.")),
    (403, message("You reached your monthly spending limit.")),
    (403, message("Key limit exceeded (monthly limit)")),
    (403, message("You've run out of funds.")),
    (400, message("You have reached your specified API usage limits.")),
    (429, message("You exceeded your current quota, check your plan and billing details.")),
    (429, message("You exceeded your monthly included credits.")),
    (403, message("Sorry, your account balance is insufficient")),
    (403, message("Prepay credits exhausted")),
    (400, message("This request requires more credits")),
    (429, message("Your account is not active")),
    (429, message("账户余额不足")),
]


@pytest.mark.parametrize(("status", "body"), QUOTA)
def test_used_up_account_is_recognised(status: int, body: object) -> None:
    error = classify_error(status, body)
    assert (error.code, error.retryable) == ("upstream_unavailable", False)
    assert error.reason == "quota"


NO_MODEL: list[tuple[int, object]] = [
    (404, wrapped(code="model_not_found")),
    (403, wrapped(code="model_not_found")),
    (500, wrapped(code="model_not_found")),
    (404, wrapped(code="DeploymentNotFound", message="The deployment does not exist.")),
    (400, {"object": "error", "type": "invalid_model", "message": "Invalid model: m-2"}),
    (400, message("Model Not Exist")),
    (400, message("m-2 is not a valid model ID")),
    (404, message("model 'm-2' not found")),
    (404, message("model: m-2")),
    (404, message("No endpoints found for m-2.")),
    (400, message("The model `m-2` has been decommissioned.")),
]


@pytest.mark.parametrize(("status", "body"), NO_MODEL)
def test_missing_model_is_recognised(status: int, body: object) -> None:
    error = classify_error(status, body, model="m-2")
    assert (error.code, error.retryable) == ("upstream_error", False)
    assert error.reason == "model_not_found"
    assert str(error) == "The provider does not have this model."


REASONS: dict[str, tuple[int, object, str]] = {
    "too long by code": (500, wrapped(code="context_length_exceeded"), "context_length"),
    "too long by message and 400": (400, message("prompt is too long"), "context_length"),
    "too long by 413": (413, None, "context_length"),
    "too long by message and 500": (500, message("prompt is too long"), "too_long"),
    "refused": (400, wrapped(code="content_filter"), "refused"),
    "401": (401, None, "credentials"),
    "403": (403, None, "credentials"),
    "404": (404, None, "not_found"),
    "404 that names another model": (404, message("model: m-22"), "not_found"),
    "404 that names part of the model": (404, message("path /v1/m"), "not_found"),
    "output limit": (
        400,
        message("Unsupported parameter: 'max_tokens' is not supported with this model."),
        "output_limit",
    ),
    "output limit by parameter": (400, wrapped(param="max_completion_tokens"), "output_limit"),
    "busy": (429, None, "busy"),
    "failed": (500, None, "failed"),
    "another 400": (400, message("bad"), "rejected"),
}


@pytest.mark.parametrize(("status", "body", "reason"), REASONS.values(), ids=REASONS)
def test_reason_names_the_cause_for_the_operator(status: int, body: object, reason: str) -> None:
    assert classify_error(status, body, model="m-2").reason == reason


@pytest.mark.parametrize(
    ("status", "body", "header", "retryable"),
    [
        (500, None, "false", False),
        (429, None, "false", False),
        (400, None, "true", True),
        (500, None, "maybe", True),
        (400, wrapped(code="context_length_exceeded"), "true", False),
        (429, wrapped(code="insufficient_quota"), "true", False),
    ],
)
def test_x_should_retry_overrides_the_status_but_not_a_final_error(
    status: int, body: object, header: str, retryable: bool
) -> None:
    assert classify_error(status, body, {"x-should-retry": header}).retryable is retryable


@pytest.mark.parametrize("repeated", ["prompt ", "quota ", "exceed ", "account ", "model "])
def test_cost_of_a_long_message_is_bounded(repeated: str) -> None:
    def seconds(length: int) -> float:
        body = wrapped(message=repeated * length)
        started = time.process_time()
        for _ in range(5):
            classify_error(500, body)
        return time.process_time() - started

    short = min(seconds(1_000) for _ in range(3))
    long = min(seconds(50_000) for _ in range(3))
    # 50 times the text. Only its beginning is matched.
    assert long / short < 10


def test_patterns_have_no_unbounded_repetition() -> None:
    patterns = [pattern.pattern for _, pattern, _ in provider_errors.RULES]
    assert patterns
    assert [pattern for pattern in patterns if {"*", "+"} & set(pattern)] == []


@pytest.mark.parametrize("depth", [10, 150])
def test_nested_errors_are_read(depth: int) -> None:
    body: object = {"code": "context_length_exceeded"}
    for _ in range(depth):
        body = {"error": [body]}
    assert classify_error(400, body).code == "context_too_long"


@pytest.mark.parametrize(
    "event",
    [
        *({"object": "error"}, {"type": "server_error"}, {"status": "ERROR"}, {"detail": "x"}),
        *({"errors": [{}]}, {"error": "x"}, {"error_code": 3}, {"error_message": "x"}),
        {"code": "Busy", "message": "x"},
    ],
)
def test_error_without_its_wrapper_is_recognised(event: object) -> None:
    assert is_error(event)


@pytest.mark.parametrize(
    "event",
    [
        *(
            {},
            {"object": "chat.completion.chunk"},
            {"type": "ping"},
            {"errors": []},
            {"detail": None},
        ),
        *({"code": 0, "message": "success"}, {"code": 200, "message": "OK"}, {"message": "queued"}),
        *([], "error", None, {"usage": {}, "code": None}),
    ],
)
def test_event_without_an_error_is_not_one(event: object) -> None:
    assert not is_error(event)


def test_retry_after_is_set_only_for_retryable_errors() -> None:
    headers = {"retry-after": "2.2"}
    assert classify_error(429, None, headers).retry_after == 2.2
    assert classify_error(503, None, headers).detail().retry_after == 3
    assert classify_error(500, None, headers).retry_after == 2.2
    assert classify_error(400, None, headers).retry_after is None
    assert classify_error(429, wrapped(code="insufficient_quota"), headers).retry_after is None


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "3"}, 3.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": " 3 "}, 3.0),
        ({"retry-after-ms": "1500"}, 1.5),
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
        ({"retry-after-ms": "0", "retry-after": "1"}, 1.0),
        ({"retry-after-ms": "soon", "retry-after": "1"}, 1.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": ""}, None),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "86400"}, 86400.0),
        ({"retry-after": "86401"}, None),
    ],
)
def test_retry_after_reads_seconds_up_to_a_day(
    headers: dict[str, str], seconds: float | None
) -> None:
    assert retry_after(headers, 0.0) == seconds


def test_retry_after_reads_a_date() -> None:
    now = datetime(2026, 11, 22, tzinfo=UTC)
    soon = format_datetime(now + timedelta(seconds=60), usegmt=True)
    assert retry_after({"retry-after": soon}, now.timestamp()) == 60


def test_retry_after_ignores_a_past_date() -> None:
    assert retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 1.5e9) is None
