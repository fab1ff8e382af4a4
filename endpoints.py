"""The endpoints: the path of a request from its headers to its response.

`Service` has a method for each route that needs more than a constant response. `create_app` in
service.py puts it together.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import NoReturn

import anyio
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

import telemetry
from chat import ChatRequest, parse_request
from errors import ErrorBody, FieldProblem, ServiceError, invalid_request, to_service_error
from provider_errors import operator_hint
from providers import (
    Call,
    Completion,
    Message,
    Router,
    Target,
    complete,
)
from ratelimit import (
    Caller,
    RateLimiter,
    StreamLimiter,
    anonymous_caller,
    authenticate,
    failed_key_caller,
)
from resumable import Generation, Reader, ResumableStreams, SessionKey
from server import (
    CONNECTION,
    MAX_DROPPED_BYTES,
    ClientConnection,
    Drain,
)
from sessions import ISSUED_ID, Session, SessionStore, Turn, allowed_owners, find_owner
from settings import Settings
from stream import STREAM_HEADERS, CompletionResponse, End, EventStream, Stopped

# One line a minute shows that a provider keeps failing.
HINT_SECONDS = 60.0
# After these errors the connection is closed: the rest of the body is not read, or the client
# should send its next request to another replica.
CLOSING_ERRORS = ("body_too_large", "request_timeout", "shutting_down")
HIDDEN_CLIENTS = (
    "Ignoring X-Forwarded-For from %s: the proxy is not listed in FORWARDED_ALLOW_IPS, so all its"
    " clients share one rate limit. Set FORWARDED_ALLOW_IPS=%s if it is your proxy"
)
SHARED_SESSION_ID = (
    "must be left out: the proxy does not name its clients, so they would share this session. Use"
    " the id that the response returns, or set FORWARDED_ALLOW_IPS and X-Forwarded-For"
)


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
    resumable: ResumableStreams
    # The streams that are running, with or without an Idempotency-Key.
    _running: dict[SessionKey, EventStream] = field(default_factory=dict)
    _warned: set[str] = field(default_factory=set)
    _hinted_until: dict[tuple[str, str], float] = field(default_factory=dict)

    # POST /api/v1/chat

    async def chat(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer POST /api/v1/chat. The order of the checks is part of the API."""
        request = Request(scope, receive)
        if self.settings.resume_seconds and "idempotency-key" in request.headers:
            await self._chat_resumably(request, send)
            return
        self.drain.check()
        caller = await self._admit(request)
        with ExitStack() as held:
            held.enter_context(self.streams.acquire(caller))
            chat, targets = await self._read_chat(request, caller)
            session = await self.store.open(caller.owner, chat.session_id)
            # From here on the stream frees slot and session, however it ends.
            slot = held.pop_all()
        record: telemetry.RequestRecord = request.state.record
        key = (find_owner(caller.owner, session), session.id)
        stream, call = self._create_stream(key, record, chat, targets, session, slot)
        await self._run_stream(stream, call, record, scope, receive, send)

    async def _read_chat(
        self, request: Request, caller: Caller
    ) -> tuple[ChatRequest, Sequence[Target]]:
        """Return the request in the body, and the models that may complete it."""
        body = await self._read_body(request)
        chat = parse_request(body, self.settings.max_message_chars)
        targets = self.router.resolve(chat.model_id)
        request.state.record.fields["requested_model"] = targets[0].name
        if chat.replace_last_turn and chat.session_id is None:
            problem = "needs the session_id of the turn to replace"
            raise invalid_request(FieldProblem(field="replace_last_turn", message=problem))
        if chat.session_id is not None:
            self._reject_shared_session_id(request, caller, chat.session_id)
        return chat, targets

    def _create_stream(
        self,
        key: SessionKey,
        record: telemetry.RequestRecord,
        chat: ChatRequest,
        targets: Sequence[Target],
        session: Session,
        slot: ExitStack,
        settings: Settings | None = None,
    ) -> tuple[EventStream, Call]:
        """Return the stream of a turn in an open session. It frees slot and session."""
        record.fields["session"] = telemetry.short_hash(session.id)
        message_at = time.time()
        history = session.turns[:-1] if chat.replace_last_turn else session.turns
        call = Call(record.request_id, record.traceparent)

        async def on_finish(text: str, end: End) -> None:
            complete = isinstance(end, Completion)
            # Providers reject conversations with a blank message.
            turn = Turn(chat.message, text, complete, message_at, time.time()) if text else None
            if chat.replace_last_turn and not (complete or isinstance(end, Stopped)):
                # The turn that was to be replaced stays.
                turn = None
            kept = session._replace(turns=history[call.dropped_turns :]) if turn else session
            try:
                with slot:
                    await self.store.end(kept, turn)
            finally:
                # The next stream of this session may have begun.
                if self._running.get(key) is stream:  # pragma: no branch - a race
                    del self._running[key]

        messages = self._messages(history, chat.message)
        run = partial(complete, targets, messages, call, settings=self.settings)
        # A generation retains events, also if its reader sends one JSON object.
        whole = not chat.stream and settings is None
        response = CompletionResponse if whole else EventStream
        stream = response(
            run,
            on_finish,
            record.request_id,
            session.id,
            settings or self.settings,
            include_reasoning=chat.include_reasoning,
        )
        self._running[key] = stream
        return stream, call

    async def _run_stream(
        self,
        stream: EventStream,
        call: Call,
        record: telemetry.RequestRecord,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        """Run a stream, then report it."""
        try:
            with self.drain.track(stream.abort):
                await stream(scope, receive, send)
        finally:
            self.metrics.finish_stream(
                record, stream.fill_report(), call.attempts, self.router.known
            )
            self._log_hints(call.attempts)

    def _log_hints(self, attempts: Sequence[telemetry.Attempt]) -> None:
        """Log what the operator should look at, at most once a minute per provider and cause."""
        for attempt in filter(lambda attempt: attempt.error, attempts):
            name = attempt.model.partition("/")[0]
            urls = [str(each.base_url) for each in self.settings.providers if each.name == name]
            hint = operator_hint(attempt, *urls) if urls else None
            if hint is not None and time.monotonic() >= self._hinted_until.get((name, hint[0]), 0):
                self._hinted_until[name, hint[0]] = time.monotonic() + HINT_SECONDS
                self.log.warning(hint[1])

    # Resumable streams

    async def _chat_resumably(self, request: Request, send: Send) -> None:
        """Answer a request with an Idempotency-Key: attach to its stream, or start it."""
        caller = await self._admit(request)
        chat, targets = await self._read_chat(request, caller)
        key, event_id = request.headers["idempotency-key"], _last_event_id(request)
        # A model that is named is the same as the default model.
        hashed = chat.model_copy(update={"model_id": targets[0].name})
        reader = self.resumable.attach(caller.owner, key, hashed, event_id)
        if reader is None:
            self.drain.check()
            slot = ExitStack()
            slot.enter_context(self.streams.acquire(caller))
            original: telemetry.RequestRecord = request.state.record
            record = replace(original, headers={}, fields=dict(original.fields), wait_seconds=0.0)
            host = request.client.host if request.client else ""
            record.fields.setdefault("caller", telemetry.short_address(host))
            # Until here nothing has waited since `attach`, so no other request has taken the key.
            generation = self.resumable.start(caller.owner, key, hashed, record.request_id)
            self.resumable.run(self._generate(generation, record, caller, chat, targets, slot))
            reader = self.resumable.read(generation, "", whole=not chat.stream)
        else:
            request.state.record.headers["Idempotent-Replayed"] = "true"
        await self._read_stream(reader, request, send)

    async def _generate(
        self,
        generation: Generation,
        record: telemetry.RequestRecord,
        caller: Caller,
        chat: ChatRequest,
        targets: Sequence[Target],
        slot: ExitStack,
    ) -> None:
        """Run a generation and log it."""
        error = None
        try:
            with slot:
                session = await self.store.open(caller.owner, chat.session_id)
                # From here on the stream frees the slot.
                slot = slot.pop_all()
            key = (find_owner(caller.owner, session), session.id)
            settings = self.resumable.stream_settings
            stream, call = self._create_stream(key, record, chat, targets, session, slot, settings)
            generation.stream = stream
            generation.open(key)
            scope = {"extensions": {CONNECTION: generation}}
            try:
                await self._run_stream(
                    stream, call, record, scope, _receive_nothing, generation.send
                )
            finally:
                telemetry.log_stream(self.log, record, time.monotonic() - record.started)
        except Exception as exception:
            error = to_service_error(exception)
        finally:
            generation.finish(error)

    async def _read_stream(self, reader: Reader, request: Request, send: Send) -> None:
        """Send the events of a generation to a client."""
        record: telemetry.RequestRecord = request.state.record
        began = time.monotonic()
        if reader.generation.request_id != record.request_id:
            record.fields["original_request_id"] = reader.generation.request_id
        try:
            await reader(request.scope, request.receive, send)
        finally:
            record.outcome = reader.outcome
            record.wait_seconds += time.monotonic() - began
            if session_id := reader.generation.session[1]:
                record.fields["session"] = telemetry.short_hash(session_id)

    async def stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer GET (resume) and DELETE (stop) of /api/v1/sessions/{session_id}/stream."""
        request = Request(scope, receive)
        stopping = request.method == "DELETE"
        # A user must be able to stop what costs money.
        caller = await self._admit(request, limited=not stopping)
        session_id: str = request.path_params["session_id"]
        request.state.record.fields["session"] = telemetry.short_hash(session_id)
        self._reject_shared_session_id(request, caller, session_id)
        sessions = [(owner, session_id) for owner in allowed_owners(caller.owner, session_id)]
        running = next(filter(None, map(self._running.get, sessions)), None)
        generation = self.resumable.latest(sessions)
        if running is None and generation is None:
            # A session is not stored before its first response has ended.
            await self.store.read(caller.owner, session_id)
        response = Response(status_code=204, headers={"Cache-Control": "no-store"})
        if stopping:
            if running is not None:
                await running.stop()
        elif generation is not None and not generation.is_terminal(_last_event_id(request)):
            if request.method == "GET":
                reader = self.resumable.read(generation, _last_event_id(request))
                await self._read_stream(reader, request, send)
                return
            response = Response(status_code=200)
            response.raw_headers = list(STREAM_HEADERS)
        await response(scope, receive, send)

    async def _read_body(self, request: Request) -> bytes:
        """Return the request's body.

        Raise unsupported_media_type, body_too_large, request_timeout, or shutting_down if the
        service is stopped meanwhile.
        """
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":
            problem = "Send the body as JSON: curl -H 'Content-Type: application/json'."
            raise ServiceError("unsupported_media_type", problem)
        connection: ClientConnection = request.scope["extensions"][CONNECTION]
        limit, seconds = self.settings.max_body_bytes, self.settings.body_timeout_seconds
        body, began, late = bytearray(), time.monotonic(), False
        if connection.body_arrived:
            await self._receive_body(request, body)
        else:
            waiting = anyio.move_on_after(seconds)
            try:
                with waiting, self.drain.track(lambda error: waiting.cancel()):
                    await self._receive_body(request, body)
            finally:
                request.state.record.wait_seconds = time.monotonic() - began
            late = waiting.cancelled_caught
        if len(body) > limit:
            raise ServiceError("body_too_large", f"The body may have at most {limit} bytes.")
        if late:
            self.drain.check()
            raise ServiceError("request_timeout", f"The body took over {seconds:g} s. Retry.")
        return bytes(body)

    async def _receive_body(self, request: Request, body: bytearray) -> None:
        """Append the request's body to `body`, but at most one byte more than the limit."""
        received, limit = 0, self.settings.max_body_bytes
        async for part in request.stream():
            received += len(part)
            body += part[: limit + 1 - len(body)]
            if received > max(limit, MAX_DROPPED_BYTES):
                break

    def _messages(self, history: Sequence[Turn], message: str) -> list[Message]:
        """Return what the provider gets: the system prompt, the history and the new message."""
        messages = [{"role": role, "content": text} for role, text, *_ in iter_messages(history)]
        if self.settings.system_prompt:
            messages.insert(0, {"role": "system", "content": self.settings.system_prompt})
        return [*messages, {"role": "user", "content": message}]

    # Who sends a request, and whether it may

    async def _admit(self, request: Request, *, limited: bool = True) -> Caller:
        """Return the caller and, unless `limited` is false, take a token from its bucket.

        Raise rate_limited or invalid_api_key. The response gets the RateLimit headers. An unknown
        key takes a token in any case.
        """
        record: telemetry.RequestRecord = request.state.record
        self._warn_about_hidden_clients(request)
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        bearer = scheme.lower() == "bearer"
        key = authenticate(token.strip(), self.settings.api_keys) if bearer else None
        host = request.client.host if request.client else None
        caller = key or anonymous_caller(host)
        record.fields |= {"caller": key.name} if key else {}
        if limited or (bearer and key is None):
            limited_caller = failed_key_caller(host) if bearer and key is None else caller
            await self._take_token(limited_caller, record)
        if bearer and key is None:
            raise ServiceError("invalid_api_key", "This API key is unknown. Check the key.")
        if key is None and not self.settings.allow_anonymous:
            problem = "An API key is required. Send the header Authorization: Bearer KEY."
            raise ServiceError("invalid_api_key", problem)
        return caller

    async def _take_token(self, caller: Caller, record: telemetry.RequestRecord) -> None:
        limiter = self.limiters.get(caller.kind)
        if limiter is None:
            return
        decision = await limiter.take(caller)
        limit, seconds = limiter.rate
        remaining, retry_after = decision.remaining, decision.retry_after
        record.headers["RateLimit-Policy"] = f'"{caller.kind}";q={limit};w={seconds}'
        record.headers["RateLimit"] = f'"{caller.kind}";r={remaining};t={retry_after}'
        if not decision.allowed:
            self.metrics.rate_limited.labels(caller.kind).inc()
            problem = f"Rate limit exceeded: {limit} requests per {seconds} s."
            retry = f"Retry in {retry_after} s."
            raise ServiceError("rate_limited", f"{problem} {retry}", retry_after=retry_after)

    def _warn_about_hidden_clients(self, request: Request) -> None:
        """Warn once about a proxy on this machine that is not trusted."""
        host = request.client.host if request.client else ""
        trusts_none = not self.settings.forwarded_allow_ips
        if trusts_none and host in ("127.0.0.1", "::1") and "x-forwarded-for" in request.headers:
            self._warn_once(HIDDEN_CLIENTS % (host, host))

    def _warn_once(self, warning: str) -> None:
        if warning not in self._warned:
            self._warned.add(warning)
            self.log.warning(warning)

    def _reject_shared_session_id(self, request: Request, caller: Caller, session_id: str) -> None:
        """Raise invalid_request if several users could choose the same session id.

        An id that the caller chooses is private to its address. Users of a proxy that forwards
        requests without naming its clients have one address.
        """
        if caller.kind == "key" or ISSUED_ID.fullmatch(session_id):
            return
        forwarded = "x-forwarded-for" in request.headers or "forwarded" in request.headers
        connection: ClientConnection = request.scope["extensions"][CONNECTION]
        named = request.client is not None and request.client.host != connection.peer
        if caller.name != "unknown" and (named or not forwarded):
            return
        if self.settings.forwarded_allow_ips:
            self._warn_once(
                f"The proxy at {connection.peer} forwards requests without X-Forwarded-For: all its"
                " clients share one rate limit and may not choose session ids"
            )
        raise invalid_request(FieldProblem(field="session_id", message=SHARED_SESSION_ID))

    # The other routes

    async def session(self, request: Request) -> Response:
        caller = await self._admit(request)
        session_id: str = request.path_params["session_id"]
        request.state.record.fields["session"] = telemetry.short_hash(session_id)
        self._reject_shared_session_id(request, caller, session_id)
        if request.method == "DELETE":
            await self.store.delete(caller.owner, session_id)
            owners = allowed_owners(caller.owner, session_id)
            self.resumable.drop_session((owner, session_id) for owner in owners)
            return Response(status_code=204)
        session = await self.store.read(caller.owner, session_id)
        messages = [
            {"role": role, "content": text, "created_at": _rfc3339(at), "complete": complete}
            for role, text, at, complete in iter_messages(session.turns)
        ]
        view = {
            "session_id": session.id,
            "created_at": _rfc3339(session.created_at),
            "expires_at": _rfc3339(session.expires_at),
            "messages": messages,
        }
        return JSONResponse(view, headers={"Cache-Control": "no-store"})

    async def readyz(self, request: Request) -> Response:
        self.drain.check()
        await self.store.check()
        return JSONResponse({"status": "ready"})

    async def show_metrics(self, request: Request) -> Response:
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _last_event_id(request: Request) -> str:
    return request.headers.get("last-event-id", "")


async def _receive_nothing() -> NoReturn:  # pragma: no cover - a stream never calls it
    raise AssertionError("a stream does not receive")


def iter_messages(turns: Sequence[Turn]) -> Iterator[tuple[str, str, float, bool]]:
    """Yield the role, text, time and completeness of each message of a session."""
    for turn in turns:
        yield "user", turn.message, turn.message_at, True
        yield "assistant", turn.response, turn.response_at, turn.complete


def _rfc3339(seconds: float) -> str:
    text = datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")


async def on_error(request: Request, error: Exception) -> Response:
    """Return the response for an error, ours or Starlette's."""
    record: telemetry.RequestRecord = request.state.record
    record.headers["Cache-Control"] = "no-store"
    if isinstance(error, HTTPException):
        record.headers |= error.headers or {}
        error = routing_error(error, request.url.path)
    service_error = to_service_error(error)
    record.outcome = record.outcome or service_error.code
    if service_error.caused_by == "service" and service_error.cause:
        record.fields["cause"] = service_error.cause
    detail = service_error.detail()
    if detail.retry_after is not None:
        record.headers["Retry-After"] = str(detail.retry_after)
    if service_error.code == "invalid_api_key":
        record.headers["WWW-Authenticate"] = "Bearer"
    if service_error.code in CLOSING_ERRORS:
        record.headers["Connection"] = "close"
    body = ErrorBody(error=detail, id=record.request_id)
    return JSONResponse(body.model_dump(), service_error.status)


def routing_error(error: HTTPException, path: str) -> ServiceError:
    """Return Starlette's 404 or 405 as an error of this API."""
    if error.headers:
        allowed = error.headers["Allow"]
        return ServiceError("method_not_allowed", f"This path allows the methods {allowed}.")
    if path.endswith("/chat/completions"):
        problem = (
            "This service has its own API, not OpenAI's: POST /api/v1/chat, see /openapi.json."
        )
        return ServiceError("not_found", problem)
    return ServiceError("not_found", "No such path. Chat is at POST /api/v1/chat.")


async def on_client_disconnect(request: Request, error: Exception) -> Response:
    """Note that the client disconnected while it sent its request. The response is dropped."""
    record: telemetry.RequestRecord = request.state.record
    record.outcome = "client_disconnected"
    record.wait_seconds = time.monotonic() - record.started
    return Response(status_code=400)
