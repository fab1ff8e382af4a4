"""The service: its routes, the way of a request through them, and how everything is put together.

`create_app` is the one place where the parts meet; `main` runs it. Read this file first and last.
"""

import argparse
import gc
import logging
import os
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import ExitStack, aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import anyio
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

import telemetry
from chat import parse_request
from errors import ErrorBody, FieldProblem, ServiceError, invalid_request, to_service_error
from providers import Call, Completion, LLMProvider, Message, Router, complete, create_providers
from ratelimit import (
    Caller,
    MemoryRateLimiter,
    RateLimiter,
    StreamLimiter,
    anonymous_caller,
    authenticate,
)
from server import Drain, Server, listen, probe
from sessions import ISSUED_ID, Session, SessionStore, SQLiteStore, Turn
from settings import Settings, SettingsError, from_env, read_env_file, unknown_variable_warnings
from stream import End, EventStream

EXPOSED_HEADERS = ("X-Request-ID", "X-Session-ID", "RateLimit", "RateLimit-Policy", "Retry-After")
ALLOWED_HEADERS = ("Authorization", "Content-Type", "X-Request-ID", "traceparent")
UNKNOWN_PROXY = (
    "X-Forwarded-For comes from this machine and is not believed: all its users are one caller. If"
    " that is your proxy, set FORWARDED_ALLOW_IPS=127.0.0.1"
)
STATIC = Path(__file__).with_name("static")
# Only the playground's own files may run or load, so nothing in a model's response can. Trusted
# Types forbid its own script to create HTML from text (CSP 3 and Trusted Types, W3C).
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:;"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none';"
    " require-trusted-types-for 'script'; trusted-types 'none'"
)
SCRIPTS = ("playground.js", "client.js", "conversations.js", "dom.js", "markdown.js")
ABOUT = "A chat backend: POST /api/v1/chat in, one event stream out."
SEE = "Everything is set in the environment or in .env; .env.example names and explains it."
PROBE = "ask the service that runs with these settings whether it is ready, and end with 0 if it is"
# More than any model's context; a provider's number beyond it is nonsense.
MAX_TOKENS = 2**31
SWEEP_SECONDS = 60.0
# What is still to come of a body is not read; the next request had better go to another replica.
CLOSING = ("body_too_large", "request_timeout", "shutting_down")
# A refused body is read on for this much, so that a client that writes before it reads gets the
# answer and not a reset connection.
MAX_REFUSED_BYTES = 2**22


@dataclass
class Service:
    """What the routes need, put together by `create_app`."""

    settings: Settings
    router: Router
    limiters: Mapping[str, RateLimiter]
    streams: StreamLimiter
    drain: Drain
    store: SessionStore
    metrics: telemetry.Metrics
    log: logging.Logger
    # Whether it was said that the users of an unknown proxy are one caller.
    warned_of_proxy: bool = False

    # POST /api/v1/chat, in the order in which a request can be refused

    async def chat(self, request: Request) -> ASGIApp:
        self.drain.check()
        record: telemetry.Record = request.state.record
        caller = await self._admit(request, record)
        with ExitStack() as held:
            held.enter_context(self.streams.acquire(caller))
            body = await self._body(request)
            chat = parse_request(body, self.settings.max_message_chars)
            targets = self.router.resolve(chat.model_id)
            record.fields["requested_model"] = targets[0].name
            if chat.session_id is not None:
                self._reject_shared_session_id(request, caller, chat.session_id)
            session = await self.store.open(caller.owner, chat.session_id)
            record.fields["session"] = telemetry.short_hash(session.id)
            # From here on the answer holds slot and session, however it ends.
            slot = held.pop_all()
        message_at = time.time()

        async def on_finish(text: str, end: End) -> None:
            whole = isinstance(end, Completion)
            # Without text there is nothing to remember, and some providers refuse an empty answer.
            turn = Turn(chat.message, text, whole, message_at, time.time()) if text else None
            with slot:
                await self.store.end(session, turn)

        call = Call(record.request_id, record.traceparent)
        chunks = complete(targets, self._messages(session, chat.message), call, self.settings)
        stream = EventStream(chunks, on_finish, record.request_id, session.id, self.settings)

        async def respond(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                with self.drain.track(stream.abort):
                    await stream(scope, receive, send)
            finally:
                self._report(record, call, stream)

        return respond

    async def _admit(self, request: Request, record: telemetry.Record) -> Caller:
        """The caller, who had a token left; the answer's RateLimit headers say how many more."""
        self._warn_about_untrusted_proxy(request)
        scheme, _, presented = request.headers.get("authorization", "").partition(" ")
        bearer = scheme.lower() == "bearer"
        key = authenticate(presented.strip(), self.settings.api_keys) if bearer else None
        # A wrong key is charged to its address, or guessing would be free; a right one never is.
        caller = key or anonymous_caller(request.client.host if request.client else None)
        record.fields |= {"caller": key.name} if key else {}
        limiter = self.limiters.get(caller.kind)
        if limiter is not None:
            decision = await limiter.take(caller)
            limit, seconds = limiter.rate
            record.headers["RateLimit-Policy"] = f'"{caller.kind}";q={limit};w={seconds}'
            record.headers["RateLimit"] = (
                f'"{caller.kind}";r={decision.remaining};t={decision.retry_after}'
            )
            if not decision.allowed:
                self.metrics.rate_limited.labels(caller.kind).inc()
                problem = (
                    f"You may ask {limit} times in {seconds} s. Wait {decision.retry_after} s."
                )
                raise ServiceError("rate_limited", problem, retry_after=decision.retry_after)
        if bearer and key is None:
            raise ServiceError(
                "invalid_api_key", "This API key is unknown. Check it with the operator."
            )
        if key is None and not self.settings.allow_anonymous:
            raise ServiceError(
                "invalid_api_key", "A key is needed: send Authorization: Bearer KEY."
            )
        return caller

    def _warn_about_untrusted_proxy(self, request: Request) -> None:
        """Say once that all users of an unknown proxy are one caller."""
        local = request.client is not None and request.client.host in ("127.0.0.1", "::1")
        unknown = not (self.settings.forwarded_allow_ips or self.warned_of_proxy)
        if local and unknown and "x-forwarded-for" in request.headers:
            self.warned_of_proxy = True
            self.log.warning(UNKNOWN_PROXY)

    async def _body(self, request: Request) -> bytes:
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":
            problem = "The body must be JSON and say so: curl -H 'Content-Type: application/json'."
            raise ServiceError("unsupported_media_type", problem)
        limit, seconds = self.settings.max_body_bytes, self.settings.body_timeout_seconds
        body = bytearray()
        received, began = 0, time.monotonic()
        waiting = anyio.move_on_after(seconds)
        with waiting, self.drain.track(lambda error: waiting.cancel()):
            async for part in request.stream():
                received += len(part)
                if received <= limit:
                    body += part
                elif received > MAX_REFUSED_BYTES:
                    break
        request.state.record.waited = time.monotonic() - began
        if received > limit:
            raise ServiceError("body_too_large", f"The body may have {limit} bytes.")
        if waiting.cancelled_caught:
            self.drain.check()
            raise ServiceError("request_timeout", f"The body did not arrive within {seconds:g} s.")
        return bytes(body)

    def _reject_shared_session_id(self, request: Request, caller: Caller, session_id: str) -> None:
        """An id of one's own choice is private to the caller. Behind an unknown proxy all users
        have one address, and would read each other's `demo`."""
        proxied = "x-forwarded-for" in request.headers or "forwarded" in request.headers
        shared = proxied and not self.settings.forwarded_allow_ips
        shared = caller.kind == "anonymous" and (shared or caller.name == "unknown")
        if shared and not ISSUED_ID.fullmatch(session_id):
            problem = (
                "can't be chosen here, where one address may be many users: leave it out and keep"
                " the one you are given, or have FORWARDED_ALLOW_IPS set"
            )
            raise invalid_request(FieldProblem(field="session_id", message=problem))

    def _messages(self, session: Session, message: str) -> list[Message]:
        messages = [{"role": role, "content": text} for role, text, *_ in iter_messages(session)]
        if self.settings.system_prompt:
            messages.insert(0, {"role": "system", "content": self.settings.system_prompt})
        return [*messages, {"role": "user", "content": message}]

    def _report(self, record: telemetry.Record, call: Call, stream: EventStream) -> None:
        """What log and metrics say of an answer, once it has ended."""
        end = stream.end
        record.outcome = stream.outcome
        record.waited += stream.waited + stream.blocked
        gap = round(stream.max_chunk_gap * 1000, 1)
        record.fields |= {"chunks": len(stream.chunks), "max_chunk_gap_ms": gap}
        if isinstance(end, ServiceError) and end.code == "internal_error":
            record.exception = end.__cause__ or end
        # The stream asks a provider before it waits for anything, so there is one.
        last = call.attempts[-1]
        if isinstance(end, ServiceError) and end.caused_by != "service":
            last.error, last.cause = end.code, end.cause
        elif isinstance(end, ServiceError) and end.cause:
            record.fields["cause"] = end.cause
        provider, _, model = last.model.partition("/")
        # A glob lets callers make up names, which must not become labels.
        model = model if last.model in self.router.known else "other"
        for failed, following in pairwise(call.attempts):
            kind = "retry" if failed.model == following.model else "failover"
            self.metrics.retries.labels(kind, failed.error).inc()
        record.fields |= {"provider": provider, "attempts": list(map(vars, call.attempts))}
        self.metrics.chunks.labels(provider, model).inc(len(stream.chunks))
        if stream.first_chunk_at is not None:
            seconds = max(0.0, stream.first_chunk_at - record.started)
            record.fields["ttft_ms"] = round(seconds * 1000, 1)
            self.metrics.ttft.observe(seconds)
            self.metrics.max_chunk_gap.observe(stream.max_chunk_gap)
        if isinstance(end, Completion):
            record.fields["model"] = telemetry.safe_name(end.model)
            record.fields["finish_reason"] = telemetry.safe_name(end.finish_reason)
            for kind in ("prompt_tokens", "completion_tokens"):
                count = (end.usage or {}).get(kind)
                if isinstance(count, int) and 0 <= count < MAX_TOKENS:
                    record.fields[kind] = count
                    self.metrics.tokens.labels(provider, model, kind).inc(count)

    # What a session remembers, and its end

    async def session(self, request: Request) -> Response:
        record: telemetry.Record = request.state.record
        caller = await self._admit(request, record)
        session_id: str = request.path_params["session_id"]
        record.fields["session"] = telemetry.short_hash(session_id)
        self._reject_shared_session_id(request, caller, session_id)
        if request.method == "DELETE":
            await self.store.delete(caller.owner, session_id)
            return Response(status_code=204)
        session = await self.store.read(caller.owner, session_id)
        messages = [
            {"role": role, "content": text, "created_at": _rfc3339(at), "complete": complete}
            for role, text, at, complete in iter_messages(session)
        ]
        view = {
            "session_id": session.id,
            "created_at": _rfc3339(session.created_at),
            "expires_at": _rfc3339(session.expires_at),
            "messages": messages,
        }
        return JSONResponse(view, headers={"Cache-Control": "no-store"})

    # The other routes

    async def readyz(self, request: Request) -> Response:
        self.drain.check()
        await self.store.check()
        return JSONResponse({"status": "ready"})

    async def show_metrics(self, request: Request) -> Response:
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def iter_messages(session: Session) -> Iterator[tuple[str, str, float, bool]]:
    """Who said what in a session, when, and whether that is all of it."""
    for turn in session.turns:
        yield "user", turn.message, turn.message_at, True
        yield "assistant", turn.response, turn.response_at, turn.complete


def _rfc3339(seconds: float) -> str:
    text = datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")


async def on_error(request: Request, error: Exception) -> Response:
    """Any error, ours or Starlette's, as an answer."""
    record: telemetry.Record = request.state.record
    service_error = to_service_error(error)
    record.headers["Cache-Control"] = "no-store"
    if isinstance(error, HTTPException) and error.headers:
        service_error = ServiceError(
            "method_not_allowed", f"This route takes {error.headers['Allow']}."
        )
        record.headers |= error.headers
    elif isinstance(error, HTTPException):
        service_error = ServiceError("not_found", "No such route. Chat is at POST /api/v1/chat.")
    record.outcome = record.outcome or service_error.code
    if service_error.caused_by == "service" and service_error.cause:
        record.fields["cause"] = service_error.cause
    detail = service_error.detail()
    if detail.retry_after is not None:
        record.headers["Retry-After"] = str(detail.retry_after)
    if service_error.code == "invalid_api_key":
        record.headers["WWW-Authenticate"] = "Bearer"
    if service_error.code in CLOSING:
        record.headers["Connection"] = "close"
    body = ErrorBody(error=detail, id=record.request_id)
    return JSONResponse(body.model_dump(), service_error.status)


async def on_client_disconnect(request: Request, error: Exception) -> Response:
    """The client left while it sent its request: nobody reads this answer."""
    record: telemetry.Record = request.state.record
    record.outcome, record.waited = "client_disconnected", time.monotonic() - record.started
    return Response(status_code=400)


async def sweep_periodically(store: SessionStore) -> None:
    """Expired sessions go away by themselves, also where nobody asks any more."""
    while True:
        # What can't be removed now is removed next time.
        with suppress(ServiceError):
            await store.sweep()
        await anyio.sleep(SWEEP_SECONDS)


def create_state(settings: Settings) -> tuple[Mapping[str, RateLimiter], SessionStore]:
    """The limiters, and the sessions, where STATE_URL says. Raises SettingsError."""
    url, ttl, chars = settings.state_url, settings.session_ttl_seconds, settings.history_max_chars
    rates = {"anonymous": settings.rate_limit, "key": settings.rate_limit_api_key}
    limited = {kind: rate for kind, rate in rates.items() if rate}
    if url.startswith("redis"):
        # Whoever keeps nothing there need not load the client.
        from redis_state import open_redis_state

        return open_redis_state(url, limited, ttl=ttl, max_chars=chars)
    path = ":memory:" if url == "memory://" else url.removeprefix("sqlite:///")
    store = SQLiteStore(path, ttl=ttl, max_chars=chars, clock=time.time)
    return {
        kind: MemoryRateLimiter(rate, time.monotonic_ns) for kind, rate in limited.items()
    }, store


def static_route(path: str, file: str, media_type: str) -> Route:
    """Return a route that serves `file` from static/, read now."""
    body = (STATIC / file).read_bytes()
    headers = {
        "Cache-Control": "no-cache",
        "Content-Security-Policy": CONTENT_SECURITY_POLICY,
        "Referrer-Policy": "no-referrer",
    }
    return Route(path, Response(body, headers=headers, media_type=media_type), methods=["GET"])


def create_app(
    settings: Settings, log: logging.Logger, drain: Drain, *more: LLMProvider
) -> ASGIApp:
    """The whole application, which ends when `drain` says so; `more` are providers beside those of
    the settings. Raises SettingsError."""
    providers = create_providers(settings) | {provider.name: provider for provider in more}
    router = Router(settings, providers)
    limiters, store = create_state(settings)
    streams = StreamLimiter(settings.max_streams, settings.max_streams_per_caller)
    metrics = telemetry.Metrics()
    metrics.active_streams.set_function(streams.active.total)
    service = Service(settings, router, limiters, streams, drain, store, metrics, log)
    models = {"default": router.default_model, "models": router.models}
    routes = [
        Route("/api/v1/chat", service.chat, methods=["POST"]),
        Route("/api/v1/models", JSONResponse(models), methods=["GET"]),
        Route("/api/v1/sessions/{session_id}", service.session, methods=["GET", "DELETE"]),
        Route("/healthz", JSONResponse({"status": "ok"}), methods=["GET"]),
        Route("/readyz", service.readyz),
        static_route("/openapi.json", "openapi.json", "application/json"),
    ]
    if settings.metrics:
        routes.append(Route("/metrics", service.show_metrics))
    if settings.playground:
        routes += [
            static_route("/", "playground.html", "text/html"),
            static_route("/playground.css", "playground.css", "text/css"),
            *(static_route(f"/{file}", file, "text/javascript") for file in SCRIPTS),
        ]

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with aclosing(store), anyio.create_task_group() as tasks:
            tasks.start_soon(sweep_periodically, store)
            yield
            tasks.cancel_scope.cancel()
        for provider in providers.values():
            await provider.aclose()

    on_errors = dict.fromkeys((ServiceError, HTTPException, Exception), on_error)
    handlers = {**on_errors, ClientDisconnect: on_client_disconnect}
    starlette = Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)
    starlette.router.redirect_slashes = False
    # From the inside out: each wraps the one before, RequestContext all of them.
    app: ASGIApp = TrustedHostMiddleware(starlette, settings.allowed_hosts, www_redirect=False)
    if settings.cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=settings.cors_origins,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=ALLOWED_HEADERS,
            expose_headers=EXPOSED_HEADERS,
        )
    return telemetry.RequestContext(app, log, metrics)


def configure_logging(level: str) -> logging.Logger:
    """This service's log, and other libraries' warnings, on stdout: JSON lines, or text where a
    person watches."""
    handler = logging.StreamHandler(sys.stdout)
    readable = sys.stdout.isatty()
    handler.setFormatter(telemetry.TextFormatter() if readable else telemetry.JSONFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    # uvicorn warns of every request that is not HTTP, which anybody can send.
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    log = logging.getLogger("chat_sidecar")
    log.setLevel(level.upper())
    return log


def main() -> None:
    """Serve until service_error to stop. Ends with 2 where the settings, or the port, are at fault."""
    parser = argparse.ArgumentParser(prog="python -m service", description=ABOUT, epilog=SEE)
    parser.add_argument("--probe", action="store_true", help=PROBE)
    asked = parser.parse_args()
    given = {name: value for name, value in os.environ.items() if value.strip()}
    drain = Drain()
    try:
        file = read_env_file(Path(".env"))
        settings = from_env({**file, **given})
        if asked.probe:
            sys.exit(probe(settings))
        log = configure_logging(settings.log_level)
        listeners = listen(settings)
        app = create_app(settings, log, drain)
    except SettingsError as error:
        sys.stderr.write(f"chat-sidecar can't start: {error}\n")
        sys.exit(2)
    # What the start made stays; a thousand open streams are a million objects more. By Python's own
    # thresholds (700, 10, 10) to look through them took a tenth of the time, 0.4 s of it at once.
    gc.freeze()
    gc.set_threshold(10_000, 5, 20)
    for warning in unknown_variable_warnings(file, settings):
        log.warning(warning)
    if settings.default_provider_name == "mock":
        log.warning("NO MODEL ANSWERS: set OPENAI_API_KEY in .env. Until then a mock does.")
    Server(app, settings, log, drain).run(listeners)


if __name__ == "__main__":
    main()
