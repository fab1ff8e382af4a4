"""What an operator sees: the request id on every answer, one log line and the metrics of a request.

`RequestContext` wraps the whole application, Starlette's own error pages included, so nothing is
answered without an id or ends without a line. Neither log nor metrics ever hold a message's text, a
key or a whole session id; addresses are shortened.
"""

import hashlib
import ipaddress
import json
import logging
import re
import secrets
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

REQUEST_ID = re.compile("[A-Za-z0-9._:+/=-]{1,128}")
# W3C Trace Context, 3.2: version, trace id, parent id, flags.
TRACEPARENT = re.compile("[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")
PROBES = ("/healthz", "/readyz", "/metrics")
# In JSON a field that is null, and the quotes around a word; those of a text are escaped, or have
# something else beside them.
UNNEEDED = re.compile(r' "\w+"=null|(?<!\\)"([A-Za-z0-9._:/+@-]+)"')
# Nobody's wish and not the caller's fault: whoever hides the line of each request sees these.
FAILURES = re.compile("upstream_.+|overloaded|state_unavailable")
# From a classify_error to a long answer.
SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.03, 0.1, 0.3, 1, 2, 5, 10, 20, 30, 60, 120, 600)


@dataclass
class Record:
    """What is known of one request; the handler finds it in the request's state and adds to it."""

    request_id: str
    traceparent: str | None
    started: float
    # Headers for the answer, whichever it becomes.
    headers: MutableHeaders = field(default_factory=MutableHeaders)
    status: int | None = None
    # `done`, `client_disconnected`, `client_stalled`, or the error's code.
    outcome: str | None = None
    # A exception of ours, to be logged with its trace.
    exception: BaseException | None = None
    # Seconds in which the provider or the client was waited for; the rest is ours.
    waited: float = 0.0
    # More fields of the log line, in the order in which they became known.
    fields: dict[str, Any] = field(default_factory=dict)


class Metrics:
    """The service's counters and histograms, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counter = partial(Counter, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry, buckets=SECONDS)
        self.requests = counter("chat_requests", "Requests ended", ("route", "status", "outcome"))
        self.duration = histogram(
            "chat_request_duration_seconds", "A request, to its end", ("route",)
        )
        self.overhead = histogram(
            "chat_overhead_seconds", "What of a request was this service", ("route",)
        )
        self.ttft = histogram("chat_time_to_first_token_seconds", "A request, to its first chunk")
        self.max_chunk_gap = histogram(
            "chat_max_chunk_gap_seconds", "The longest wait between two chunks"
        )
        self.retries = counter("chat_upstream_retries", "Retries, failovers", ("kind", "error"))
        self.rate_limited = counter("chat_rate_limited", "Callers out of tokens", ("caller",))
        answered = ("provider", "model")
        self.chunks = counter("chat_chunks", "ChunkStream of text sent", answered)
        self.tokens = counter("chat_tokens", "Tokens, as providers count", (*answered, "kind"))
        self.active_streams = Gauge("chat_active_streams", "Answers open", registry=self.registry)
        ProcessCollector(registry=self.registry)


@dataclass(frozen=True)
class RequestContext:
    """ASGI middleware, the outermost: gives each request its id and its record, and reports it."""

    app: ASGIApp
    log: logging.Logger
    metrics: Metrics
    # The event loop's clock, so that a stream's times and these can be compared.
    clock: Callable[[], float] = time.monotonic

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given, trace = headers.get("x-request-id", ""), headers.get("traceparent", "")
        request_id = given if REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(16)}"
        traceparent = trace if TRACEPARENT.fullmatch(trace) else None
        record = Record(request_id, traceparent, self.clock())
        # No browser may take an answer for something else than it says it is.
        record.headers |= {"X-Request-ID": request_id, "X-Content-Type-Options": "nosniff"}
        scope.setdefault("state", {})["record"] = record

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message["headers"], *record.headers.raw]
            await send(message)

        try:
            await self.app(scope, receive, send_with_headers)
        except Exception as error:
            # Starlette has answered 500 before it passed the error on.
            record.exception = error
        finally:
            self._report(scope, record)

    def _report(self, scope: Scope, record: Record) -> None:
        seconds = self.clock() - record.started
        # Only paths of routes become labels: anybody can ask for any other.
        route = getattr(scope.get("route"), "path", "unmatched")
        # What middleware refused has no code: a foreign Host, a preflight from elsewhere.
        outcome = record.outcome or ("done" if (record.status or 500) < 400 else "refused")
        if record.exception:
            outcome = "internal_error"
        self.metrics.requests.labels(route, record.status or "none", outcome).inc()
        self.metrics.duration.labels(route).observe(seconds)
        own = max(0.0, seconds - record.waited)
        self.metrics.overhead.labels(route).observe(own)
        fields = {
            "method": scope["method"],
            "route": route,
            "status": record.status,
            "outcome": outcome,
            "duration_ms": round(seconds * 1000, 1),
            "overhead_ms": round(own * 1000, 1),
            "caller": short_address(scope["client"][0] if scope["client"] else ""),
            **record.fields,
            "request_id": record.request_id,
        }
        if record.traceparent:
            fields["trace_id"] = record.traceparent[3:35]
        # Probes and scrapes come every second and say nothing while they succeed.
        quiet = logging.DEBUG if outcome == "done" and route in PROBES else logging.INFO
        level = logging.WARNING if FAILURES.fullmatch(outcome) else quiet
        level = logging.ERROR if record.exception else level
        self.log.log(level, "request", extra={"fields": fields}, exc_info=record.exception)


def short_address(host: str) -> str:
    """An address as the log may hold it: its /24 or /48."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "unknown"
    address = getattr(address, "ipv4_mapped", None) or address
    prefix = 24 if address.version == 4 else 48
    return str(ipaddress.ip_network((address.packed, prefix), strict=False))


def short_hash(value: str) -> str:
    """Enough to follow a conversation in the log, nothing to enter it with."""
    return hashlib.sha256(value.encode()).hexdigest()[:12]


def safe_name(value: str | None) -> str | None:
    """A stranger's name for something, as the log may hold it: what looks like a text is none."""
    return value if re.fullmatch("[!-~]{1,128}", value or "") else None


def log_fields(record: logging.LogRecord) -> dict[str, Any]:
    """All that a log record tells, by name."""
    moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
    fields = {"time": moment, "level": record.levelname.lower(), "event": record.getMessage()}
    fields |= getattr(record, "fields", {})
    if record.exc_info and record.exc_info[1] is not None:
        fields["trace"] = _trace(record.exc_info[1])
    return fields


class JSONFormatter(logging.Formatter):
    """One JSON object a line. JSON escapes every control character and, in ASCII, every character
    that could redraw a terminal, so no value can begin a line or hide one."""

    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(log_fields(record), default=str)


class TextFormatter(logging.Formatter):
    """The same for a person at a terminal: the same JSON, less what the eye does not need."""

    def format(self, record: logging.LogRecord) -> str:
        fields = log_fields(record)
        del fields["time"]
        moment = self.formatTime(record, "%H:%M:%S")
        head = f"{moment} {fields.pop('level'):7} {json.dumps(fields.pop('event'))[1:-1]}"
        trace = f"\n{fields.pop('trace', '')}"
        fields = json.dumps(fields, default=str, separators=(" ", "="))[1:-1]
        fields = UNNEEDED.sub(r"\1", fields)
        return f"{head} {fields}".rstrip() + trace.rstrip()


def _trace(error: BaseException) -> str:
    """A traceback, of causes and of a group's members too, without the errors' own texts, which may
    quote what a caller or a provider sent."""
    fields: dict[int, str] = {}
    left: list[BaseException | None] = [error]
    while left:
        # Errors may cause each other.
        if (each := left.pop()) is not None and id(each) not in fields:
            frames = "".join(traceback.format_tb(each.__traceback__))
            fields[id(each)] = f"{type(each).__qualname__}\n{frames}"
            left += [each.__cause__ or each.__context__, *getattr(each, "exceptions", ())]
    return "caused by ".join(fields.values())
