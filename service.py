"""The service: its routes, the way of a request through them, and how everything is put together.

`create_app` is the one place where the parts meet; `main` runs it. Read this file first and last.
"""

import ipaddress
import logging
import os
import secrets
import socket
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import anyio
import uvicorn
from dotenv import dotenv_values
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic_core import to_json
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from chat import ABORT, INTERNAL, End, EventStream, parse_request
from errors import (
    BodyTooLarge,
    ErrorBody,
    InternalError,
    InvalidAPIKey,
    MethodNotAllowed,
    NotFound,
    RateLimited,
    RequestTimeout,
    ServiceError,
    UnsupportedMediaType,
)
from providers import Attempt, Completion, Router, answer, make_providers
from ratelimit import Caller, Limiter, Streams, by_address, find_key
from settings import Settings, SettingsError, from_env, unknown_variables
from telemetry import (
    JSONFormatter,
    Metrics,
    Record,
    RequestContext,
    TextFormatter,
    record_of,
    short_address,
    short_hash,
)

EXPOSED_HEADERS = ("X-Request-ID", "X-Session-ID", "RateLimit", "RateLimit-Policy", "Retry-After")
# A refused body is read on for this much, so that a client that writes before it reads gets the
# answer and not a reset connection.
MAX_REFUSED_BYTES = 2**22


@dataclass(frozen=True)
class Service:
    """What the routes need, put together by `create_app`."""

    settings: Settings
    router: Router
    limiters: Mapping[str, Limiter | None]
    streams: Streams
    metrics: Metrics
    log: logging.Logger
    # What was said once and need not be said again.
    warned: list[str] = field(default_factory=list)

    # POST /api/v1/chat, in the order in which a request can be refused

    async def chat(self, request: Request) -> ASGIApp:
        record = record_of(request.scope)
        caller = await self._admit(request, record)
        with ExitStack() as held:
            held.enter_context(self.streams.slot(caller))
            body = await self._body(request)
            chat = parse_request(body, self.settings.max_message_chars)
            target = self.router.resolve(chat.model_id)
            session_id = chat.session_id or f"s_{secrets.token_urlsafe(32)}"
            record.fields |= {"session": short_hash(session_id), "model_asked": target.name}
            messages = [{"role": "user", "content": chat.message}]
            if self.settings.system_prompt:
                messages.insert(0, {"role": "system", "content": self.settings.system_prompt})
            # From here on the answer holds the slot, however it ends.
            slot = held.pop_all()

        async def settle(text: str, end: End) -> None:
            slot.close()
            self._note(record, attempt, end)

        attempt = Attempt(target.provider.name, target.model, record.request_id, record.traceparent)
        stream = EventStream(
            answer(target, messages, attempt, self.settings.first_token_timeout_seconds),
            settle,
            request_id=record.request_id,
            session_id=session_id,
            settings=self.settings,
        )

        async def respond(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                await stream(scope, receive, send)
            finally:
                self._count(record, attempt, stream)

        return respond

    async def _admit(self, request: Request, record: Record) -> Caller:
        """The caller, who had a token left; the answer's RateLimit headers say how many more."""
        address = by_address(request.client.host if request.client else None)
        self._look_for_proxy(request)
        scheme, _, presented = request.headers.get("authorization", "").partition(" ")
        key = find_key(presented.strip(), self.settings.api_keys)
        # A wrong key is charged to its address, or guessing would be free; a right one never is.
        caller = key if scheme.lower() == "bearer" and key else address
        record.fields["caller"] = key.name if caller is key else short_address(address.name)
        limiter = self.limiters[caller.kind]
        if limiter is not None:
            verdict = await limiter.take(caller)
            limit, seconds = limiter.rate
            record.headers += [
                (b"ratelimit-policy", f'"{caller.kind}";q={limit};w={seconds}'.encode()),
                (b"ratelimit", f'"{caller.kind}";r={verdict.remaining};t={verdict.wait}'.encode()),
            ]
            if not verdict.allowed:
                raise RateLimited(
                    f"You may ask {limit} times in {seconds} s. Wait {verdict.wait} s.",
                    retry_after=verdict.wait,
                )
        if caller is address and scheme.lower() == "bearer":
            raise InvalidAPIKey("This API key is unknown. Check it, or leave it out.")
        if caller is address and not self.settings.allow_anonymous:
            raise InvalidAPIKey("An API key is needed: send the header Authorization: Bearer KEY.")
        return caller

    def _look_for_proxy(self, request: Request) -> None:
        """Say once that all users of an unknown proxy are one caller."""
        settings = self.settings
        if settings.forwarded_allow_ips or self.warned or request.client is None:
            return
        if "x-forwarded-for" in request.headers and _is_loopback(request.client.host):
            self.warned.append("proxy")
            self.log.warning(
                "X-Forwarded-For comes from this machine and is not believed: all its users are one"
                " caller. If that is your proxy, set FORWARDED_ALLOW_IPS=127.0.0.1"
            )

    async def _body(self, request: Request) -> bytes:
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":
            raise UnsupportedMediaType(
                "The body must be JSON and say so: curl -H 'Content-Type: application/json'."
            )
        limit = self.settings.max_body_bytes
        body = bytearray()
        received = 0
        with anyio.move_on_after(self.settings.body_timeout_seconds) as waiting:
            async for part in request.stream():
                received += len(part)
                if received <= limit:
                    body += part
                elif received > MAX_REFUSED_BYTES:
                    break
        if waiting.cancelled_caught:
            raise RequestTimeout(
                f"The body did not arrive within {self.settings.body_timeout_seconds:g} s.",
                headers={"Connection": "close"},
            )
        if received > limit:
            raise BodyTooLarge(f"The body may have {limit} bytes.", headers={"Connection": "close"})
        return bytes(body)

    def _note(self, record: Record, attempt: Attempt, end: End) -> None:
        """What the log says of an answer's ending."""
        record.fields |= {"provider": attempt.provider, "model": attempt.model}
        if attempt.request_id:
            record.fields["provider_request_id"] = attempt.request_id
        if attempt.status:
            record.fields["provider_status"] = attempt.status
        if isinstance(end, Completion):
            record.fields |= {"model": end.model, "usage": end.usage}
            for kind in ("prompt_tokens", "completion_tokens"):
                count = (end.usage or {}).get(kind)
                if isinstance(count, int):
                    self.metrics.tokens.labels(attempt.provider, attempt.model, kind).inc(count)
        if isinstance(end, InternalError):
            record.defect = end.__cause__ or end

    def _count(self, record: Record, attempt: Attempt, stream: EventStream) -> None:
        record.outcome = stream.outcome
        record.waited = stream.waited + stream.blocked
        record.fields["pieces"] = stream.pieces
        self.metrics.pieces.labels(attempt.provider, attempt.model).inc(stream.pieces)
        if stream.first_piece_at is not None:
            seconds = max(0.0, stream.first_piece_at - record.started)
            record.fields["first_piece_ms"] = round(seconds * 1000, 1)
            self.metrics.first_piece.observe(seconds)

    # The other routes

    async def models(self, request: Request) -> Response:
        return JSONResponse({"default": self.router.default_model, "models": self.router.models})

    async def healthz(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def readyz(self, request: Request) -> Response:
        return JSONResponse({"status": "ready"})

    async def show_metrics(self, request: Request) -> Response:
        return Response(
            generate_latest(self.metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST}
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


# Errors, as answers


async def on_service_error(request: Request, error: Exception) -> Response:
    return error_response(request, cast(ServiceError, error))  # Starlette's handlers take any


def error_response(request: Request, error: ServiceError) -> Response:
    record = record_of(request.scope)
    record.outcome = error.code
    body = ErrorBody(error=error.detail(), id=record.request_id)
    headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", **error.headers}
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if isinstance(error, InvalidAPIKey):
        headers["WWW-Authenticate"] = "Bearer"
    return Response(to_json(body), error.status, headers, "application/json")


async def on_not_found(request: Request, error: Exception) -> Response:
    return error_response(request, NotFound("No such route. Chat is at POST /api/v1/chat."))


async def on_method_not_allowed(request: Request, error: Exception) -> Response:
    allowed = (cast(HTTPException, error).headers or {})["Allow"]
    refused = MethodNotAllowed(f"This route takes {allowed}.", headers={"Allow": allowed})
    return error_response(request, refused)


async def on_defect(request: Request, error: Exception) -> Response:
    return error_response(request, InternalError(INTERNAL))


async def on_client_gone(request: Request, error: Exception) -> Response:
    """The client left while it sent its request: nobody reads this answer."""
    record_of(request.scope).outcome = "client_gone"
    return Response(status_code=400)


# Putting it together


def create_app(settings: Settings, log: logging.Logger) -> ASGIApp:
    """The whole application. Opens nothing until its lifespan begins. Raises SettingsError."""
    providers = make_providers(settings)
    metrics = Metrics()
    streams = Streams(settings.max_streams, settings.max_streams_per_caller)
    metrics.open_streams.set_function(lambda: streams.open)

    def clock() -> int:
        return time.monotonic_ns() // 1000

    service = Service(
        settings=settings,
        router=Router(settings, providers),
        limiters={
            "anonymous": Limiter(settings.rate_limit, clock) if settings.rate_limit else None,
            "key": Limiter(settings.rate_limit_api_key, clock)
            if settings.rate_limit_api_key
            else None,
        },
        streams=streams,
        metrics=metrics,
        log=log,
    )
    routes = [
        Route("/api/v1/chat", service.chat, methods=["POST"]),
        Route("/api/v1/models", service.models),
        Route("/healthz", service.healthz),
        Route("/readyz", service.readyz),
    ]
    if settings.metrics:
        routes.append(Route("/metrics", service.show_metrics))

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        for provider in providers.values():
            await provider.aclose()

    starlette = Starlette(
        routes=routes,
        exception_handlers={
            ServiceError: on_service_error,
            ClientDisconnect: on_client_gone,
            404: on_not_found,
            405: on_method_not_allowed,
            Exception: on_defect,
        },
        lifespan=lifespan,
    )
    starlette.router.redirect_slashes = False
    app: ASGIApp = TrustedHostMiddleware(
        starlette, allowed_hosts=settings.allowed_hosts, www_redirect=False
    )
    if settings.cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=settings.cors_origins,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=("Authorization", "Content-Type", "X-Request-ID", "traceparent"),
            expose_headers=EXPOSED_HEADERS,
        )
    if settings.forwarded_allow_ips:
        trusted = [str(network) for network in settings.forwarded_allow_ips]
        # uvicorn and Starlette each have types of their own for ASGI.
        app = cast(ASGIApp, ProxyHeadersMiddleware(cast(Any, app), trusted))
    return RequestContext(app, log, metrics)


# Running it


class Protocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1, with a way to cut a client that does not read; `close` would wait."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        # ASGI calls extensions dictionaries; this one is a function, for `EventStream` alone.
        self.scope["extensions"] = {ABORT: cast(Any, self.transport.abort)}


class Server(uvicorn.Server):
    """uvicorn's server, saying where it listens in this service's own log."""

    def __init__(self, config: uvicorn.Config, log: logging.Logger, answers: str) -> None:
        super().__init__(config)
        self._log = log
        self._answers = answers

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self._log.info("Listening on %s; answers come from %s", url, self._answers)


def configure_logging(level: str) -> logging.Logger:
    """This service's log, and other libraries' warnings, on stdout: JSON lines, or text where a
    person watches."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(TextFormatter() if sys.stdout.isatty() else JSONFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    # uvicorn warns of every request that is not HTTP, which anybody can send.
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    log = logging.getLogger("chat_sidecar")
    log.setLevel(level.upper())
    return log


def main() -> None:
    """Serve until told to stop. Exits with 2 where the settings are at fault."""
    file = {name: value or "" for name, value in dotenv_values(".env").items()}
    given = {name: value for name, value in os.environ.items() if value.strip()}
    try:
        settings = from_env({**file, **given})
        log = configure_logging(settings.log_level)
        app = create_app(settings, log)
    except SettingsError as error:
        sys.exit(f"chat-sidecar can't start: {error}")
    for warning in unknown_variables(file, settings):
        log.warning(warning)
    if settings.default_provider_name == "mock":
        log.warning("NO MODEL ANSWERS: set OPENAI_API_KEY in .env. Until then a mock does.")
    make_server(app, settings, log).run()


def make_server(app: ASGIApp, settings: Settings, log: logging.Logger) -> Server:
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        # Longer than the 60 s for which load balancers keep an idle connection.
        timeout_keep_alive=75,
    )
    answers = f"{settings.default_provider_name} ({settings.default_model})"
    return Server(config, log, answers)


if __name__ == "__main__":
    main()
