"""The service: its routes, and the composition of all parts.

`create_app` is the one place where the parts meet; `main` runs it. Read this file first and last.
The path of a request through its route is in endpoints.py.
"""

import signal

if __name__ == "__main__":
    # Ctrl-C while the modules below are loaded ends the process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import gc
import logging
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

import telemetry
from endpoints import Service, on_client_disconnect, on_error
from errors import ServiceError
from providers import (
    LLMProvider,
    Router,
    create_providers,
)
from ratelimit import (
    MemoryRateLimiter,
    RateLimiter,
    StreamLimiter,
)
from resumable import ResumableStreams
from server import (
    Drain,
    Server,
    listen,
    probe,
    raise_descriptor_limit,
)
from sessions import SessionStore, SQLiteStore
from settings import Settings, SettingsError, from_env, read_env_file, startup_warnings

VERSION = "0.1.0"
EXPOSED_HEADERS = (
    *("X-Request-ID", "X-Session-ID", "RateLimit", "RateLimit-Policy", "Retry-After"),
    "Idempotent-Replayed",
)
ALLOWED_HEADERS = (
    *("Authorization", "Content-Type", "X-Request-ID", "traceparent"),
    *("Idempotency-Key", "Last-Event-ID"),
)
STATIC = Path(__file__).with_name("static")
# Only the playground's own files may run or load, so nothing in a model's response can. Trusted
# Types forbid its own script to create HTML from text (CSP 3 and Trusted Types, W3C).
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:;"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none';"
    " require-trusted-types-for 'script'; trusted-types 'none'"
)
# Expired sessions stay in the file for at most this long.
SWEEP_SECONDS = 60.0


@dataclass(frozen=True)
class ASGIEndpoint:
    """A function as an ASGI application, for a route without Starlette's request and response."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)


async def sweep_periodically(store: SessionStore) -> None:
    """Remove expired sessions, also while there are no requests."""
    while True:
        # What cannot be removed now is removed the next time.
        with suppress(ServiceError):
            await store.sweep()
        await anyio.sleep(SWEEP_SECONDS)


def create_state(
    settings: Settings,
    log: logging.Logger | None = None,
    on_evict: Callable[[], None] = lambda: None,
) -> tuple[Mapping[str, RateLimiter], SessionStore]:
    """Return the rate limiters and the session store that STATE_URL names.

    Raise SettingsError if they cannot be opened.
    """
    url, ttl, chars = settings.state_url, settings.session_ttl_seconds, settings.history_max_chars
    rates = {"anonymous": settings.rate_limit, "key": settings.rate_limit_api_key}
    limited = {kind: rate for kind, rate in rates.items() if rate}
    if url.startswith("redis"):
        # Loaded only where it is used: the client takes 8 MB.
        from redis_state import open_redis_state

        return open_redis_state(url, limited, ttl=ttl, max_chars=chars)
    path = ":memory:" if url == "memory://" else url.removeprefix("sqlite:///")
    store = SQLiteStore(
        path,
        ttl=ttl,
        max_chars=chars,
        clock=time.time,
        log=log or logging.getLogger("chat_sidecar"),
        max_bytes=settings.state_max_bytes,
        max_sessions=settings.max_sessions_per_caller,
        on_evict=on_evict,
    )
    limiters = {kind: MemoryRateLimiter(rate, time.monotonic_ns) for kind, rate in limited.items()}
    return limiters, store


def static_route(path: str, file: str, media_type: str) -> Route:
    """Return a route that serves `file` from static/, read now."""
    body = (STATIC / file).read_bytes()
    headers = {
        "Cache-Control": "no-cache",
        "Content-Security-Policy": CONTENT_SECURITY_POLICY,
        "Referrer-Policy": "no-referrer",
    }
    return Route(path, Response(body, headers=headers, media_type=media_type), methods=["GET"])


def create_routes(settings: Settings, router: Router, service: Service) -> list[Route]:
    """Return all routes. METRICS and PLAYGROUND switch some of them off."""
    models = {"default": router.default_model, "models": router.models}
    routes = [
        Route("/api/v1/chat", ASGIEndpoint(service.chat), methods=["POST"]),
        Route("/api/v1/models", JSONResponse(models), methods=["GET"]),
        Route("/api/v1/sessions/{session_id}", service.session, methods=["GET", "DELETE"]),
        Route(
            "/api/v1/sessions/{session_id}/stream",
            ASGIEndpoint(service.stream),
            methods=["GET", "DELETE"],
        ),
        Route("/healthz", JSONResponse({"status": "ok"}), methods=["GET"]),
        Route("/readyz", service.readyz),
        static_route("/openapi.json", "openapi.json", "application/json"),
    ]
    if settings.metrics:
        routes.append(Route("/metrics", service.show_metrics))
    if settings.playground:
        scripts = sorted(file.name for file in STATIC.glob("*.js"))
        routes += [
            static_route("/", "playground.html", "text/html"),
            static_route("/playground.css", "playground.css", "text/css"),
            *(static_route(f"/{name}", name, "text/javascript") for name in scripts),
        ]
    return routes


def create_app(
    settings: Settings, log: logging.Logger, drain: Drain, *more: LLMProvider
) -> telemetry.RequestContext:
    """Return the application.

    `drain` shuts it down. `more` are providers besides those of the settings. Raise SettingsError.
    """
    providers = create_providers(settings) | {provider.name: provider for provider in more}
    router = Router(settings, providers)
    metrics = telemetry.Metrics(VERSION)
    limiters, store = create_state(settings, log, metrics.sessions_evicted.inc)
    streams = StreamLimiter(settings.max_streams, settings.max_streams_per_caller)
    metrics.active_streams.set_function(lambda: streams.active)
    resumable = ResumableStreams(settings)
    service = Service(settings, router, limiters, streams, drain, store, metrics, log, resumable)
    routes = create_routes(settings, router, service)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with aclosing(store), anyio.create_task_group() as tasks:
            tasks.start_soon(sweep_periodically, store)
            yield
            await resumable.aclose()
            tasks.cancel_scope.cancel()
        for provider in providers.values():
            await provider.aclose()

    on_errors = dict.fromkeys((ServiceError, HTTPException, Exception), on_error)
    handlers = {**on_errors, ClientDisconnect: on_client_disconnect}
    starlette = Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)
    starlette.router.redirect_slashes = False
    # From the inside out: each wraps the one before, RequestContext all of them.
    app: ASGIApp = starlette
    if settings.allowed_hosts != ("*",):
        app = TrustedHostMiddleware(app, settings.allowed_hosts, www_redirect=False)
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
    """Return the service's log. It goes to stdout, as text at a terminal, otherwise as JSON lines.

    Warnings of libraries go there too.
    """
    handler = logging.StreamHandler(sys.stdout)
    readable = sys.stdout.isatty()
    handler.setFormatter(telemetry.TextFormatter() if readable else telemetry.JSONFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    # uvicorn warns of every malformed request; telemetry logs them.
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    # What logging would look up for each line, though none contains it (Logging HOWTO,
    # "Optimization").
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None
    log = logging.getLogger("chat_sidecar")
    log.setLevel(level.upper())
    return log


def log_start(log: logging.Logger, settings: Settings, url: str) -> None:
    """Log where the service listens and how it is configured, without secrets."""
    limit = str(settings.rate_limit or "unlimited")
    fields = {
        "version": VERSION,
        "url": url,
        "provider": settings.default_provider_name,
        "model": settings.default_model,
        "sessions": settings.public_state_url,
        "anonymous": limit if settings.allow_anonymous else "rejected",
    }
    summary = ", ".join(f"{name} {fields[name]}" for name in list(fields)[2:])
    log.info(f"chat-sidecar {VERSION} on {url}, {summary}", extra={"fields": fields})


def main() -> None:
    """Run the service until it is stopped. End with status 2 if it cannot start."""
    parser = argparse.ArgumentParser(
        prog="python -m service",
        description="A chat backend: POST /api/v1/chat, answered as server-sent events.",
        epilog="Configured by environment variables or .env; .env.example explains each.",
    )
    parser.add_argument("--version", action="version", version=f"chat-sidecar {VERSION}")
    parser.add_argument(
        "--probe",
        action="store_true",
        help="exit with status 0 if the service with these settings is running and ready",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="show the effective settings, and test the providers, their models and STATE_URL",
    )
    arguments = parser.parse_args()
    environment = {name: value for name, value in os.environ.items() if value.strip()}
    drain = Drain()
    try:
        file = read_env_file(Path(".env"))
        settings = from_env({**file, **environment})
        if arguments.probe:
            sys.exit(probe(settings))
        if arguments.check:
            # Loaded only here.
            from check import check

            run = partial(check, settings, startup_warnings(settings, file), create_state)
            sys.exit(anyio.run(run, sys.stdout.write))
        log = configure_logging(settings.log_level)
        listeners = listen(settings)
        app = create_app(settings, log, drain)
    except SettingsError as error:
        sys.stderr.write(f"Invalid configuration: {error}\n")
        sys.exit(2)
    # The objects made so far stay. With Python's own thresholds (700, 10, 10), the collector took a
    # tenth of the time with 1,000 open streams, and 0.4 s at once.
    gc.freeze()
    gc.set_threshold(10_000, 5, 20)
    warnings = [*startup_warnings(settings, file), raise_descriptor_limit(settings)]
    for warning in filter(None, warnings):
        log.warning(warning)
    on_started = partial(log_start, log, settings)
    server = Server(
        app, settings, log, drain, on_started=on_started, on_malformed=app.report_malformed
    )
    server.run(listeners)


if __name__ == "__main__":
    main()
