"""The errors of providers: their codes and messages, classified for the caller.

JSON in, a ServiceError out. There is no I/O and no clock here.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime
from itertools import islice
from typing import Any

from pydantic_core import from_json

from errors import Code, ServiceError
from telemetry import Attempt

# A longer wait can only come from a wrong clock, and is ignored.
MAX_WAIT_SECONDS = 86400

# Errors are short. The limits bound the time for matching.
MAX_ERROR_STRINGS = 100
MAX_ERROR_CHARS = 2000


def _pattern(*alternatives: str) -> re.Pattern[str]:
    return re.compile("|".join(alternatives), re.I)


# How providers word a failure, in codes and in messages, collected from documentation and bug
# reports. Every repetition is bounded, so that matching takes linear time.
QUOTA = _pattern(
    "(insufficient|not.?enough|out.of|used (up|all)).{0,30}(quota|balance|credit|fund|allocation)",
    r"(quota|balance\b|credit|tier).{0,40}(exhaust|deplet|insufficient|too low|not enough)",
    r"exceeded.{0,40}(credits|current.quota)|(requires? (more|additional)|\bno( more)?) credits?\b",
    "(spend|spending|usage|budget|billing|monthly|credit).(hard.)?limits?.{0,30}(reach|exceed|hit)",
    "(reach|exceed|hit).{0,60}(spend|spending|usage|budget|monthly) limit|(usage|spend)_limit",
    "billing_|(billing|account) (is )?not (active|enabled)|payment.?(is.)?required|good standing",
    "(account|access).{0,60}(suspend|deactivat|terminat)|arrear|overdue|free.?tier.?only|credit_balance",
    "欠费|余额不足|额度|充值",
)
BUSY = _pattern(
    "rate.?limit|too.?many.?requests|throttl|overload|slow.?down|at capacity|(server|engine)_busy",
    r"\b(is|are) busy|\bper.(second|min|minute|hour|day)\b|(retry|try again) (in|after) [\d.]",
)
TOO_LONG = _pattern(
    "(max(imum)?|model'?s?|available|configured) context.?(length|window|size|limit)|n_ctx|超长",
    "context.?(length|window|size|limit)s?.{0,30}(exceed|overflow|only|reached)|context.?overflow",
    "(exceed|(long|great|larg)er than|not fit).{0,50}context(?! (deadline|cancel))|上下文",
    r"\b(prompt|inputs?|messages?|conversation|context|tokens)\b(?!.{0,40} took).{0,40} too "
    r"(long|large)|_too_(long|large)|\brequest (\w{1,20} )?too large|max_?prompt_?tokens",
    r"\b(prompt|inputs?|messages?|request\b.{0,60} tokens?)\b.{0,60} exceed|shorter (input|prompt)",
    "max(imum)? (allowed )?(prompt|input|model) length|too.?many.?(input.?|prompt.?)?tokens",
    "exceed.{0,20} token limit|(token|conversation) (length|limit).{0,9} exceed|total text bytes",
    "reduce the length of|(reduce|shorten) (your|the) (prompt|input|messages?|conversation)",
    "inputs?[` ].{0,60}must (be|have) (<=|less than|at most)|range of input length",
    "max_tokens must be at least 1, got -|tokens_limit_reached",
)
REFUSED = _pattern(
    "content.?(exists )?(filter|polic|moderat|management|safety|risk|violat|blocked)|敏感|违规",
    "polic(y|ies).?violation|cyber.?policy|responsible.?ai|invalid_prompt|data.?inspection",
    "requires? moderation|moderation.?(block|fail|flag|polic)|considered high risk|new_sensitive",
    "(inappropriate|sensitive|unsafe|harmful|prohibited).(content|words?|information|use)",
    r"\b(input|prompt|content|request|message|text|it) (was|is|were|has been) (flagged|filtered)",
    "safety.?(system|filter|check|setting|reason|polic|guideline|violat)|blocked.{0,40}safety",
    "violat.{0,60}(polic|guideline)",
)
NO_MODEL = _pattern(
    "(model|deployment)_?(not_?(found|exist|available|supported)|decommissioned)",
    r"\bmodels?\b.{0,100} (not exist|not found|no longer|deprecated|decommissioned)",
    "(not a valid|unknown|invalid|no such|not found the).model|no endpoints found for",
)
# In order, and the statuses with which a phrase (not a code) means something else.
RULES = (
    ("busy", BUSY, (401, 404)),
    ("quota", QUOTA, ()),
    ("context_length", TOO_LONG, (401, 403, 404, 429)),
    ("refused", REFUSED, (401, 404)),
    ("model_not_found", NO_MODEL, (401,)),
)

# The error for the caller, by kind.
PROBLEMS: dict[str, tuple[Code, str]] = {
    "busy": ("upstream_unavailable", "The provider is busy. Retry later."),
    "failed": ("upstream_error", "The provider failed. Retry."),
    "quota": ("upstream_unavailable", "The provider account is used up. The operator has to act."),
    "context_length": ("context_too_long", "The conversation is too long for this model."),
    "too_long": ("context_too_long", "The conversation is too long for this model."),
    "refused": ("content_refused", "The provider's policy rejects this message. Change it."),
    "model_not_found": ("upstream_error", "The provider does not have this model."),
    "rejected": ("upstream_error", "The provider rejected the request. The operator has to act."),
}

# The members of an error that are read; others may repeat the caller's message. `metadata.raw` is
# the error of the provider behind an aggregator, often as JSON in a string.
# fmt: off
CODE_KEYS = (
    "code", "type", "status", "reason", "error_code", "error_type", "http_code", "status_code",
)
TEXT_KEYS = (
    "message", "msg", "detail", "details", "param", "error_message", "error_msg", "status_msg",
    "error", "errors", "innererror", "metadata", "raw", "base_resp",
)
# fmt: on


def classify_error(
    status: int, body: Any, headers: Mapping[str, str] = {}, now: float = 0.0, model: str = ""
) -> ServiceError:
    """Return the error for the caller that corresponds to a provider's error.

    `body` is the JSON of an error response, or None. An error inside a stream has `status` 500.
    `now` is in seconds since 1970 and is needed for dates in `headers`. `model` is the id that was
    requested. The provider's error text is only matched and never passed on.

    The result's `reason` is "context_length", "too_long" (the same, but less certain), "refused",
    "quota", "model_not_found", "output_limit" (the provider rejects the parameter that limits the
    output), "credentials" (401, 403), "not_found" (404), "busy", "failed" or "rejected".
    """
    strings = list(islice(_error_strings(body, "message"), MAX_ERROR_STRINGS))
    codes = " ".join(text for key, text in strings if key in CODE_KEYS)[:MAX_ERROR_CHARS]
    text = " ".join(text for _, text in strings)[:MAX_ERROR_CHARS]
    # Aggregators send the status of the provider behind them as the code.
    if status == 500 and (inner := re.search(r"(?<!\S)[45]\d\d(?!\S)", codes)):
        status = int(inner[0])
    kind = _error_kind(status, codes, text, model)
    retryable = kind in ("busy", "failed")
    if kind not in ("context_length", "too_long", "refused", "quota"):
        retryable = {"true": True, "false": False}.get(headers.get("x-should-retry", ""), retryable)
    wait = retry_after(headers, now) if retryable else None
    code, problem = PROBLEMS.get(kind, PROBLEMS["rejected"])
    return ServiceError(code, problem, retryable=retryable, retry_after=wait, reason=kind)


def _error_kind(status: int, codes: str, text: str, model: str) -> str:
    if status == 402 or QUOTA.search(codes):
        return "quota"
    if status == 413:
        return "context_length"
    for kind, pattern, _ in RULES:
        if pattern.search(codes):
            return kind
    for kind, pattern, other_statuses in RULES:
        if status not in other_statuses and pattern.search(text):
            return "too_long" if kind == "context_length" and status != 400 else kind
    if status == 404 and model and re.search(rf"(?<!\w){re.escape(model)}(?!\w)", text):
        return "model_not_found"
    if status >= 500 or status in (408, 409, 429):
        return "busy" if status in (429, 503, 529) else "failed"
    if re.search("max_(completion_|output_)?tokens", text):
        return "output_limit"
    return {401: "credentials", 403: "credentials", 404: "not_found"}.get(status, "rejected")


def _error_strings(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Yield the strings and numbers of an error, each with its key."""
    if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
        with suppress(ValueError):
            value = from_json(value)
    if isinstance(value, dict):
        for name in (*CODE_KEYS, *TEXT_KEYS):
            yield from _error_strings(value.get(name), name)
    elif isinstance(value, list):
        for item in value:
            yield from _error_strings(item, key)
    elif value is not None:
        yield key, str(value)


def is_error(event: Any) -> bool:
    """Return whether JSON without choices is an error, possibly without the usual wrapper."""
    if not isinstance(event, dict):
        return False
    kind = " ".join(str(event.get(key)) for key in ("object", "type", "status"))
    failed = str(event.get("code") or 0) not in ("0", "200") and event.get("message")
    fields = map(event.get, ("error", "errors", "error_code", "error_message", "detail"))
    return "error" in kind.lower() or bool(failed) or any(fields)


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Return the seconds that a provider requests to wait, or None.

    Reads `retry-after-ms`, then `retry-after` as seconds or as a date. Ignores more than a day.
    """
    for name, parse in (
        ("retry-after-ms", lambda text: float(text) / 1000),
        ("retry-after", float),
        ("retry-after", lambda text: parsedate_to_datetime(text).timestamp() - now),
    ):
        with suppress(ValueError, OverflowError):
            if 0 < (seconds := parse(headers.get(name, ""))) <= MAX_WAIT_SECONDS:
                return seconds
    return None


# What the operator should look at, by the reason or the cause of a failed attempt.
HINTS = {
    "credentials": "provider {name} rejected the API key ({status}): check {prefix}API_KEY",
    "quota": "provider {name} reports that the quota or credit is used up: check the account",
    "busy": "provider {name} is overloaded or limits our rate ({status}): check its limits",
    "model_not_found": "provider {name} does not have the model {model}: check DEFAULT_MODEL,"
    " MODELS and FALLBACK_MODELS",
    "not_found": "404 from {url}: does {prefix}BASE_URL need /v1?",
    "output_limit": "provider {name} rejects the parameter that MAX_OUTPUT_TOKENS sends: rename it"
    ' with {prefix}EXTRA_BODY, such as {{"max_tokens": null, "max_completion_tokens": 1000}}',
    "gaierror": "cannot resolve the host of {url}: check {prefix}BASE_URL and DNS",
    "ConnectionRefusedError": "nothing listens at {url}: is the server running?",
    "SSLCertVerificationError": "the certificate of {url} is not trusted: set SSL_CERT_FILE to its"
    " authorities",
}


def operator_hint(attempt: Attempt, base_url: str) -> tuple[str, str] | None:
    """Return the kind of a failed attempt and a sentence for the log, or None if there is none."""
    name, _, model = attempt.model.partition("/")
    kind = next(filter(HINTS.get, (attempt.reason or "", attempt.cause or "")), None)
    if kind is None:
        return None
    prefix = name.upper().replace("-", "_") + "_"
    values = {"name": name, "model": model, "prefix": prefix, "url": base_url}
    return kind, HINTS[kind].format(**values, status=attempt.status)
