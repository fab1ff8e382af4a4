"""The request id, one log line per request, and the metrics.

`RequestContext` wraps the whole application, Starlette's own error responses included: every
response has an id, and every request ends with a log line. Neither log nor metrics contain the text
of a message, a key or a whole session id. IP addresses are shortened.
"""

import asyncio
import hashlib
import ipaddress
import json
import logging
import platform
import re
import secrets
import time
import traceback
from collections.abc import Callable, Container
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector
from prometheus_client.metrics import MetricWrapperBase
from pydantic_core import to_json
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from errors import ServiceError

REQUEST_ID = re.compile("[A-Za-z0-9._:+/=-]{1,128}")
# W3C Trace Context, section 3.2: version, trace id, parent id, flags.
TRACEPARENT = re.compile("[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")
PROBES = ("/healthz", "/readyz", "/metrics")
# Failures that are not the caller's are warnings: they show even where LOG_LEVEL hides requests.
FAILURES = re.compile("upstream_.+|overloaded|state_unavailable")
# Histogram buckets, from a rejected request to a long response.
SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.03, 0.1, 0.3, 1, 2, 5, 10, 20, 30, 60, 120, 600)
# Larger than any model's context window. Higher token counts from a provider are ignored.
MAX_TOKENS = 2**31
# The token counts of `usage`, each with the object in `usage` that contains it, if any.
TOKEN_KINDS = {
    "prompt_tokens": None,
    "completion_tokens": None,
    "cached_tokens": "prompt_tokens_details",
    "reasoning_tokens": "completion_tokens_details",
}
# Callers choose some of the labels, so the cache of their metrics is bounded.
MAX_CACHED_LABELS = 1024


@dataclass
class RequestRecord:
    """What is known of one request. It is in the request's state as `record`."""

    request_id: str
    traceparent: str | None
    started: float
    # Headers to add to the response.
    headers: dict[str, str] = field(default_factory=dict)
    status: int | None = None
    # `done`, `stopped`, `client_disconnected`, `client_stalled`, or an error code.
    outcome: str | None = None
    # The exception behind an internal_error, logged with its traceback.
    exception: BaseException | None = None
    # Seconds of waiting for the provider or the client. The rest is overhead of this service.
    wait_seconds: float = 0.0
    # Further fields of the log line.
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass
class Attempt:
    """One request to a provider and its result, as the log shows it.

    `provider_request_id` is the provider's own; `error` is our error code.
    """

    model: str
    status: int | None = None
    provider_request_id: str | None = None
    error: str | None = None
    cause: str | None = None
    reason: str | None = None


@dataclass
class StreamReport:
    """What one stream reports to log and metrics. The stream fills it in.

    Times are in seconds; `first_chunk_at` is on the event loop's clock.
    """

    chunks: int = 0
    first_chunk_at: float | None = None
    max_chunk_gap: float = 0.0
    wait_seconds: float = 0.0
    outcome: str = "internal_error"
    error: ServiceError | None = None
    # Of a completion that ended; the provider's own values.
    model: str | None = None
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    history_trimmed: bool = False


class Metrics:
    """The service's counters and histograms, in a registry of their own."""

    def __init__(self, version: str) -> None:
        self.registry = CollectorRegistry()
        counter = partial(Counter, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry, buckets=SECONDS)
        self.requests = counter(
            "chat_requests", "Finished requests", ("route", "status", "outcome")
        )
        self.duration = histogram(
            "chat_request_duration_seconds", "Time from a request to its end", ("route",)
        )
        self.overhead = histogram(
            "chat_overhead_seconds", "Time spent in this service itself", ("route",)
        )
        self.ttft = histogram(
            "chat_time_to_first_token_seconds", "Time from a request to its first chunk"
        )
        self.max_chunk_gap = histogram(
            "chat_max_chunk_gap_seconds", "The longest gap between two chunks of a stream"
        )
        self.retries = counter(
            "chat_upstream_retries",
            "Retries and failovers, by the provider and the error that caused them",
            ("kind", "provider", "error"),
        )
        self.sessions_evicted = counter(
            "chat_sessions_evicted", "Sessions dropped because their caller had too many"
        )
        self.rate_limited = counter("chat_rate_limited", "Rate-limited requests", ("caller",))
        model = ("provider", "model")
        self.chunks = counter("chat_chunks", "Chunks sent to clients", model)
        self.tokens = counter("chat_tokens", "Tokens as counted by providers", (*model, "kind"))
        self.active_streams = Gauge(
            "chat_active_streams", "Streams in flight", registry=self.registry
        )
        build = Info("chat_build", "Version of this service and of Python", registry=self.registry)
        build.info({"version": version, "python": platform.python_version()})
        ProcessCollector(registry=self.registry)
        self.child: Callable[..., Any] = lru_cache(maxsize=MAX_CACHED_LABELS)(_child)

    def finish_stream(
        self,
        record: RequestRecord,
        report: StreamReport,
        attempts: list[Attempt],
        known_models: Container[str],
    ) -> None:
        """Add a stream that has ended to its request's record and to the metrics."""
        record.outcome = report.outcome
        record.wait_seconds += report.wait_seconds
        error = report.error
        # A client that disconnects early leaves no attempt.
        last = attempts[-1] if attempts else Attempt("none/none")
        if error is not None and error.code == "internal_error":
            record.exception = error.__cause__ or error
        if error is not None and error.caused_by != "service":
            last.error, last.cause = error.code, error.cause
        elif error is not None and error.cause:
            record.fields["cause"] = error.cause
        for failed, following in pairwise(attempts):
            kind = "retry" if failed.model == following.model else "failover"
            if kind == "retry" and failed.error == "context_too_long":
                # The same model got a shorter conversation.
                continue
            self.retries.labels(kind, failed.model.partition("/")[0], failed.error).inc()
        provider, _, model = last.model.partition("/")
        # A glob in MODELS lets callers invent names, which must not become labels.
        model = model if last.model in known_models else "other"
        record.fields |= {"provider": provider, "attempts": [vars(each) for each in attempts]}
        record.fields |= {"chunks": report.chunks, "max_chunk_gap_ms": _ms(report.max_chunk_gap)}
        self.child(self.chunks, provider, model).inc(report.chunks)
        if report.first_chunk_at is not None:
            ttft = max(0.0, report.first_chunk_at - record.started)
            record.fields["ttft_ms"] = _ms(ttft)
            self.ttft.observe(ttft)
            self.max_chunk_gap.observe(report.max_chunk_gap)
        if report.outcome == "done":
            record.fields["model"] = safe_name(report.model)
            record.fields["finish_reason"] = safe_name(report.finish_reason)
            record.fields |= {"history_trimmed": True} if report.history_trimmed else {}
        usage = report.usage or {}
        for kind, container in TOKEN_KINDS.items():
            counts = usage.get(container) if container else usage
            count = counts.get(kind) if isinstance(counts, dict) else None
            if isinstance(count, int) and 0 <= count < MAX_TOKENS:
                record.fields[kind] = count
                self.child(self.tokens, provider, model, kind).inc(count)


def _child(metric: MetricWrapperBase, *labels: str) -> MetricWrapperBase:
    return metric.labels(*labels)


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 1)


@dataclass(frozen=True)
class RequestContext:
    """ASGI middleware, the outermost: gives each request its id and its record, then reports it."""

    app: ASGIApp
    log: logging.Logger
    metrics: Metrics
    # The event loop's clock, so that times of streams can be compared with these.
    clock: Callable[[], float] = time.monotonic

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given, trace = headers.get("x-request-id", ""), headers.get("traceparent", "")
        request_id = given if REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(16)}"
        traceparent = trace if TRACEPARENT.fullmatch(trace) else None
        record = RequestRecord(request_id, traceparent, self.clock())
        # Browsers must not guess another content type than the one that is sent.
        record.headers |= {"X-Request-ID": request_id, "X-Content-Type-Options": "nosniff"}
        scope.setdefault("state", {})["record"] = record

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                added = [
                    (name.lower().encode(), value.encode())
                    for name, value in record.headers.items()
                ]
                message["headers"] = [*message["headers"], *added]
            await send(message)

        try:
            await self.app(scope, receive, send_with_headers)
        except Exception as error:
            # Starlette has sent its 500 before it passes the exception on.
            record.exception = error
        finally:
            # uvloop flushes at the end of a turn of the loop. Reporting now would delay the end of
            # the response by about 0.2 ms.
            seconds = self.clock() - record.started
            asyncio.get_running_loop().call_soon(self._report, scope, record, seconds)

    def report_malformed(self, reason: str) -> None:
        """Report a request that the server rejected before the application saw it."""
        self.metrics.requests.labels("unmatched", 400, "malformed_request").inc()
        fields = {"route": "unmatched", "status": 400, "outcome": "malformed_request"}
        self.log.info("malformed request: %s", reason, extra={"fields": fields})

    def _report(self, scope: Scope, record: RequestRecord, seconds: float) -> None:
        # Only the paths of routes become labels, since clients can request any other path.
        route = getattr(scope.get("route"), "path", "unmatched")
        # Middleware responses have no error code: a rejected Host, a rejected CORS preflight.
        outcome = record.outcome or ("done" if (record.status or 500) < 400 else "rejected")
        if record.exception:
            outcome = "internal_error"
        overhead = max(0.0, seconds - record.wait_seconds)
        metrics = self.metrics
        metrics.child(metrics.requests, route, record.status or "none", outcome).inc()
        metrics.child(metrics.duration, route).observe(seconds)
        metrics.child(metrics.overhead, route).observe(overhead)
        fields = {
            "method": scope["method"],
            "route": route,
            "status": record.status,
            "outcome": outcome,
            "duration_ms": _ms(seconds),
            "overhead_ms": _ms(overhead),
            "caller": short_address(scope["client"][0] if scope["client"] else ""),
            **record.fields,
            "request_id": record.request_id,
        }
        # Successful probes and scrapes come every second.
        quiet = logging.DEBUG if outcome == "done" and route in PROBES else logging.INFO
        _log_record(self.log, "request", record, fields, quiet)


def log_stream(log: logging.Logger, record: RequestRecord, seconds: float) -> None:
    """Log the end of a resumable stream. Its readers' requests have lines of their own."""
    fields = {
        "outcome": record.outcome,
        "duration_ms": _ms(seconds),
        **record.fields,
        "request_id": record.request_id,
    }
    _log_record(log, "stream", record, fields, logging.INFO)


def _log_record(
    log: logging.Logger, event: str, record: RequestRecord, fields: dict[str, Any], quiet: int
) -> None:
    """Log a line, at level `quiet` unless it is a failure."""
    if record.traceparent:
        fields["trace_id"] = record.traceparent[3:35]
    level = logging.WARNING if FAILURES.fullmatch(fields["outcome"]) else quiet
    level = logging.ERROR if record.exception else level
    log.log(level, event, extra={"fields": fields}, exc_info=record.exception)


@lru_cache(maxsize=1024)
def short_address(host: str) -> str:
    """Return the /24 or /48 network of an address, which is what the log may contain."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "unknown"
    address = getattr(address, "ipv4_mapped", None) or address
    prefix = 24 if address.version == 4 else 48
    return str(ipaddress.ip_network((address.packed, prefix), strict=False))


def short_hash(value: str) -> str:
    """Return 48 bits of a hash: enough to follow a session in the log, not enough to use it."""
    return hashlib.sha256(value.encode()).hexdigest()[:12]


def safe_name(value: str | None) -> str | None:
    """Return an untrusted name if it is safe to log: short, visible ASCII. Otherwise None."""
    return value if re.fullmatch("[!-~]{1,128}", value or "") else None


def log_fields(record: logging.LogRecord) -> dict[str, Any]:
    """Return everything a log record contains, by field name."""
    moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
    fields = {"time": moment, "level": record.levelname.lower(), "event": record.getMessage()}
    fields |= getattr(record, "fields", {})
    if record.exc_info and record.exc_info[1] is not None:
        fields["trace"] = _traceback(record.exc_info[1])
    return fields


class JSONFormatter(logging.Formatter):
    """Formats a record as one line of JSON in ASCII.

    JSON escapes control characters and line ends, so no value can forge a line. Characters beyond
    ASCII, some of which control terminals, are escaped as well.
    """

    def format(self, record: logging.LogRecord) -> str:
        fields = log_fields(record)
        # pydantic-core takes a quarter of the time, but leaves U+009B and U+202E as they are and
        # raises ValueError for a lone surrogate.
        with suppress(ValueError):
            line = to_json(fields, fallback=str)
            if line.isascii():
                return line.decode()
        return json.dumps(fields, default=str, separators=(",", ":"))


class TextFormatter(logging.Formatter):
    """Formats a record as a short line for a terminal. Only printable ASCII is left as it is."""

    def format(self, record: logging.LogRecord) -> str:
        fields = log_fields(record)
        text = fields["event"]
        if text in ("request", "stream"):
            text = _request_text(fields)
        level = "" if record.levelno == logging.INFO else f"{fields['level']}: "
        line = f"{self.formatTime(record, '%H:%M:%S')} {level}{text}"
        line = re.sub("[^ -~]", lambda match: ascii(match[0])[1:-1], line)
        return f"{line}\n{fields['trace']}".rstrip() if "trace" in fields else line


def _request_text(fields: dict[str, Any]) -> str:
    """Return the log line of a request or a stream for a terminal.

    It contains what happened, how fast, and with which model.
    """
    words = [fields.get("method", "stream"), fields.get("route"), fields.get("status")]
    words.append(fields["outcome"])
    words.append(f"{fields['duration_ms']:.0f} ms")
    words.append(fields.get("model") or fields.get("requested_model"))
    if "ttft_ms" in fields:
        words.append(f"ttft {fields['ttft_ms']:.0f} ms")
    if "prompt_tokens" in fields and "completion_tokens" in fields:
        words.append(f"{fields['prompt_tokens']}+{fields['completion_tokens']} tokens")
    words += [fields.get("cause"), fields["request_id"]]
    return " ".join(str(word) for word in words if word is not None)


def _traceback(error: BaseException) -> str:
    """Return the tracebacks of an exception, its causes and the members of groups.

    The messages of the exceptions are left out, since they may quote a caller or a provider.
    """
    found: dict[int, str] = {}
    remaining: list[BaseException | None] = [error]
    while remaining:
        # Exceptions can form a cycle.
        if (each := remaining.pop()) is not None and id(each) not in found:
            frames = "".join(traceback.format_tb(each.__traceback__))
            found[id(each)] = f"{type(each).__qualname__}\n{frames}"
            remaining += [each.__cause__ or each.__context__, *getattr(each, "exceptions", ())]
    return "caused by ".join(found.values())
