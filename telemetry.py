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
from typing import Any, cast

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

REQUEST_ID = re.compile("[A-Za-z0-9._:+/=-]{1,128}")
# W3C Trace Context, 3.2: version, trace id, parent id, flags.
TRACEPARENT = re.compile("[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")
PROBES = ("/healthz", "/readyz", "/metrics")
# From a cached refusal to a long answer.
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


@dataclass
class Record:
    """What is known of one request; the handler adds to it while it runs."""

    request_id: str
    traceparent: str | None
    started: float
    # Headers for the answer, whichever it becomes.
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    status: int | None = None
    # `done`, `client_gone`, `client_stalled`, or the error's code.
    outcome: str | None = None
    # A defect of ours, to be logged with its trace.
    defect: BaseException | None = None
    # Seconds in which the provider or the client was waited for; the rest is ours.
    waited: float = 0.0
    # More fields of the log line, in the order in which they became known.
    fields: dict[str, Any] = field(default_factory=dict)


def record_of(scope: Scope) -> Record:
    """The record of the request that `scope` belongs to."""
    return cast(Record, scope["chat_sidecar.record"])  # ASGI scopes are untyped


class Metrics:
    """The service's counters and histograms, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "chat_requests",
            "Requests, by how they ended",
            ("route", "status", "outcome"),
            registry=self.registry,
        )
        self.duration = Histogram(
            "chat_request_seconds",
            "From a request's first byte to its answer's last",
            ("route",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self.open_streams = Gauge(
            "chat_open_streams", "Answers being written", registry=self.registry
        )
        self.first_piece = Histogram(
            "chat_first_piece_seconds",
            "From a request's first byte to its answer's first piece",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.pieces = Counter(
            "chat_pieces", "Pieces of text sent", ("provider", "model"), registry=self.registry
        )
        self.tokens = Counter(
            "chat_tokens",
            "Tokens, as the providers count them",
            ("provider", "model", "kind"),
            registry=self.registry,
        )


class RequestContext:
    """ASGI middleware, the outermost: gives each request its id and its record, and reports it."""

    def __init__(
        self,
        app: ASGIApp,
        log: logging.Logger,
        metrics: Metrics,
        clock: Callable[[], float] = time.perf_counter,
        new_id: Callable[[], str] = lambda: f"req_{secrets.token_hex(16)}",
    ) -> None:
        self._app = app
        self._log = log
        self._metrics = metrics
        self._clock = clock
        self._new_id = new_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        trace = headers.get("traceparent", "")
        record = Record(
            request_id=given if REQUEST_ID.fullmatch(given) else self._new_id(),
            traceparent=trace if TRACEPARENT.fullmatch(trace) else None,
            started=self._clock(),
        )
        record.headers.append((b"x-request-id", record.request_id.encode()))
        scope["chat_sidecar.record"] = record

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message["headers"], *record.headers]
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception as error:
            # Starlette has answered 500 before it passed the error on.
            record.defect = error
        finally:
            self._report(scope, record)

    def _report(self, scope: Scope, record: Record) -> None:
        seconds = self._clock() - record.started
        # Only paths of routes become labels: anybody can ask for any other.
        route = getattr(scope.get("route"), "path", "unmatched")
        # What middleware refused has no code: a foreign Host, a preflight from elsewhere.
        outcome = record.outcome or ("done" if (record.status or 500) < 400 else "refused")
        self._metrics.requests.labels(route, record.status, outcome).inc()
        self._metrics.duration.labels(route).observe(seconds)
        fields = {
            "request_id": record.request_id,
            "method": scope["method"],
            "route": route,
            "status": record.status,
            "outcome": outcome,
            "ms": round(seconds * 1000, 1),
            "own_ms": round((seconds - record.waited) * 1000, 1),
            **record.fields,
        }
        if record.traceparent:
            fields["trace_id"] = record.traceparent[3:35]
        defect = record.defect
        # Probes and scrapes come every second and say nothing while they succeed.
        quiet = logging.DEBUG if outcome == "done" and route in PROBES else logging.INFO
        level = logging.ERROR if defect else quiet
        self._log.log(level, "request", extra={"fields": fields}, exc_info=defect)


def short_address(host: str) -> str:
    """An address, or a network, as the log may hold it: its /24 or /48."""
    try:
        address = ipaddress.ip_address(host.partition("/")[0])
    except ValueError:
        return "unknown"
    prefix = 24 if address.version == 4 else 48
    return str(ipaddress.ip_network(f"{address}/{prefix}", strict=False))


def short_hash(value: str) -> str:
    """Enough to follow a conversation in the log, nothing to enter it with."""
    return hashlib.sha256(value.encode()).hexdigest()[:12]


class JSONFormatter(logging.Formatter):
    """One JSON object a line. JSON escapes every control character and, in ASCII, every character
    that could redraw a terminal, so no value can begin a line or hide one."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[1] is not None:
            entry["trace"] = _trace(record.exc_info[1])
        return json.dumps(entry, default=str)


class TextFormatter(logging.Formatter):
    """The same for a person at a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        clock = datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S")
        fields = getattr(record, "fields", {})
        told = " ".join(f"{k}={json.dumps(v, default=str)}" for k, v in fields.items())
        text = f"{clock} {record.levelname.lower():7} {record.getMessage()} {told}".rstrip()
        if record.exc_info and record.exc_info[1] is not None:
            text += "\n" + _trace(record.exc_info[1])
        return text


def _trace(error: BaseException) -> str:
    """A traceback without the errors' own texts, which may quote what a caller or provider sent."""
    lines = []
    seen: BaseException | None = error
    while seen is not None:
        frames = "".join(traceback.format_tb(seen.__traceback__))
        lines.append(f"{type(seen).__qualname__}\n{frames}")
        seen = seen.__cause__ or seen.__context__
    return "caused by ".join(lines)
