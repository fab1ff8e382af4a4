"""A chat request and its answer: what is accepted, how text is cleaned, the events, their stream.

`EventStream` is one state machine for all that a streaming response is asked to do: commit the
status late, keep the line alive, not wait for a client that does not read, notice one that leaves,
and end exactly once. It knows nothing of limits or sessions: it is given the pieces, and whom to
tell how it ended.
"""

import asyncio
import difflib
import math
import re
import unicodedata
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Annotated, Any, Literal

import anyio
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    StringConstraints,
    ValidationError,
    ValidationInfo,
)
from pydantic_core import to_json
from starlette.types import Message, Receive, Scope, Send

from errors import (
    ErrorDetail,
    FieldProblem,
    InternalError,
    InvalidJSON,
    InvalidRequest,
    InvalidRequestDetail,
    ServiceError,
    UpstreamTimeout,
)
from providers import Batch, Completion
from settings import Settings

INTERNAL = "The service failed. Report the request id to its operator."
# The ASGI extension by which a server lends the way to cut a connection.
ABORT = "chat_sidecar.abort"
# Closing the provider's connection and storing the turn are local; what takes longer is stuck.
SETTLE_SECONDS = 5.0
MAX_PROBLEMS = 10

# ---- the request

# What no reader sees and no writer means: control characters but tab and LF, bidirectional
# controls, tag characters (invisible ASCII), zero-width and interlinear marks, noncharacters. ZWJ,
# ZWNJ and variation selectors stay: emoji, Persian and Indic text need them.
UNWANTED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u180e\u200b\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufdd0-\ufdef"
    "\ufeff\ufff9-\ufffb\U000e0000-\U000e007f"
    + "".join(
        f"{chr(plane + 0xFFFE)}{chr(plane + 0xFFFF)}" for plane in range(0, 0x110000, 0x10000)
    )
    + "]"
)
# Letters by category that show nothing: Hangul fillers, the Braille blank, the grapheme joiner.
BLANK = re.compile("[\u034f\u115f\u1160\u2800\u3164\uffa0\ufe00-\ufe0f\U000e0100-\U000e01ef]")


def clean(text: str) -> str:
    """`text` with one kind of line end, in NFC, without what is invisible or breaks displays.

    Hygiene, not a defence against prompt injection. Cleaning twice changes nothing.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return unicodedata.normalize("NFC", UNWANTED.sub("", text)).strip()


def _is_visible(text: str) -> bool:
    return any(
        unicodedata.category(char) not in ("Cc", "Cf", "Zs", "Zl", "Zp")
        for char in BLANK.sub("", text)
    )


def _message(text: str, info: ValidationInfo) -> str:
    text = clean(text)
    if not _is_visible(text):
        raise ValueError("holds nothing to answer")
    limit = info.context["max_message_chars"] if info.context else None
    if limit is not None and len(text) > limit:
        raise ValueError(f"has {len(text)} characters, {limit} are allowed")
    return text


class ChatRequest(BaseModel):
    """The body of POST /api/v1/chat. A field of another name is refused, so that a mistyped
    `sesion_id` does not silently begin a new conversation."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    message: Annotated[str, AfterValidator(_message)]
    model_id: Annotated[str, StringConstraints(max_length=128)] | None = None
    session_id: Annotated[str, StringConstraints(pattern="^[A-Za-z0-9_-]{1,64}$")] | None = None


def parse_request(body: bytes, max_message_chars: int) -> ChatRequest:
    """Raises InvalidJSON or InvalidRequest."""
    try:
        return ChatRequest.model_validate_json(
            body, context={"max_message_chars": max_message_chars}
        )
    except ValidationError as error:
        # The input would bring the caller's message into our answer.
        problems = error.errors(include_url=False, include_context=False, include_input=False)
    if not problems[0]["loc"]:
        raise InvalidJSON('The body must be a JSON object in UTF-8, such as {"message": "Hello"}.')
    raise InvalidRequest([_problem(p["type"], p["loc"], p["msg"]) for p in problems[:MAX_PROBLEMS]])


def _problem(kind: str, loc: tuple[int | str, ...], message: str) -> FieldProblem:
    name = re.sub("[^ -~]", "?", str(loc[0]))[:64]
    known = list(ChatRequest.model_fields)
    if kind == "missing":
        message = "is required"
    elif kind == "extra_forbidden":
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        message = f"is not a field of this request; {hint}"
    elif name == "session_id":
        message = "must be 1 to 64 of A-Z, a-z, 0-9, _ and -"
    elif kind == "string_type":
        message = "must be a string"
    elif kind == "string_too_long":
        message = "must have at most 128 characters"
    return FieldProblem(field=name, message=message.removeprefix("Value error, "))


# ---- the events


class ChunkEvent(BaseModel):
    """One piece of text, as the provider sent it; `id` is the request id."""

    chunk: str
    id: str


class DoneEvent(BaseModel):
    """The end of a whole answer. `usage` is the provider's own, null where it sent none."""

    status: Literal["done"] = "done"
    id: str
    session_id: str
    model: str
    finish_reason: str | None
    usage: dict[str, Any] | None


class ErrorEvent(BaseModel):
    """The end of an answer that broke off."""

    status: Literal["error"] = "error"
    id: str
    session_id: str
    error: InvalidRequestDetail | ErrorDetail


def frame(event: DoneEvent | ErrorEvent) -> bytes:
    """One event on one `data:` line; JSON has no line ends of its own."""
    return b"data: " + to_json(event) + b"\n\n"


# ---- the stream

# A client that closed its connection, and one that keeps it open but takes nothing.
Departure = Literal["client_gone", "client_stalled"]
End = Completion | ServiceError | Departure
Pieces = AsyncGenerator[Batch | Completion, None]
# Told the text that was sent and how it ended, before the client is; raises what to tell it
# instead.
Settle = Callable[[str, End], Awaitable[None]]


class EventStream:
    """Relays `pieces` to the client as an event stream.

    One task reads and writes; one watchdog looks at its clocks, sends heartbeats and listens for
    the client's leaving. Nothing is opened, locked or scheduled for a piece. However it ends,
    `settle` is awaited once, after the provider's connection is closed and before the terminal
    event goes out.

    A failure before the status is committed is raised, for the application to answer with a status
    of its own; a later one becomes the terminal event. Afterwards `outcome` says how it went.
    """

    def __init__(
        self,
        pieces: Pieces,
        settle: Settle,
        *,
        request_id: str,
        session_id: str,
        settings: Settings,
    ) -> None:
        self.outcome = "client_gone"
        self.pieces = 0
        # Seconds on the event loop's clock: when the first text was there, how long the provider
        # and the client were waited for, the longest wait between two pieces.
        self.first_piece_at: float | None = None
        self.waited = 0.0
        self.blocked = 0.0
        self.longest_gap = 0.0
        self._pieces = pieces
        self._settle = settle
        self._request_id = request_id
        self._session_id = session_id
        self._settings = settings
        self._text: list[str] = []
        self._end: End | None = None
        self._gone = False
        self._committed = False
        self._begun = False
        self._relaying = anyio.CancelScope()
        # Set while a heartbeat is being sent: the status line must not be overtaken by a piece.
        self._beat: anyio.Event | None = None
        self._writing_since: float | None = None

    def end_early(self, end: ServiceError | Departure) -> None:
        """Stop relaying now and end like this. The first ending counts."""
        if self._end is None:
            self._end = end
            self._relaying.cancel()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._send = send
        self._now = asyncio.get_running_loop().time
        self._started = self._waiting_since = self._sent_at = self._now()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._watch, receive)
            try:
                with self._relaying:
                    await self._relay()
            finally:
                end = await self._conclude()
                tasks.cancel_scope.cancel()
        if isinstance(end, ServiceError) and not self._committed:
            raise end
        if self.outcome == "client_stalled":
            # A polite close would wait for the client to read what is buffered.
            scope["extensions"][ABORT]()
            await receive()

    # The relay

    async def _relay(self) -> None:
        head, tail = b'data: {"chunk":', b',"id":' + to_json(self._request_id) + b"}\n\n"
        try:
            async for batch in self._pieces:
                now = self._now()
                gap = now - self._waiting_since
                self.waited += gap
                if isinstance(batch, Completion):
                    self._end = self._end or batch
                    return
                if self._begun:
                    self.longest_gap = max(self.longest_gap, gap)
                self._begun = True
                if batch:
                    if self.first_piece_at is None:
                        self.first_piece_at = now
                    self.pieces += len(batch)
                    self._text += batch
                    await self._write(b"".join([head + to_json(piece) + tail for piece in batch]))
                self._waiting_since = self._now()
        except ServiceError as error:
            self._end = self._end or error
        except Exception as error:
            defect = InternalError(INTERNAL)
            defect.__cause__ = error
            self._end = self._end or defect

    async def _write(self, body: bytes, last: bool = False) -> None:
        if self._beat is not None:
            await self._beat.wait()
        await self._transmit(body, last)

    async def _transmit(self, body: bytes, last: bool = False) -> None:
        before = self._writing_since = self._now()
        if not self._committed:
            self._committed = True
            await self._send(self._head())
        await self._send({"type": "http.response.body", "body": body, "more_body": not last})
        self._writing_since = None
        self._sent_at = self._now()
        self.blocked += self._sent_at - before

    def _head(self) -> Message:
        return {
            "type": "http.response.start",
            "status": 200,
            "headers": [
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"cache-control", b"no-store"),
                # nginx would hold pieces back to fill a buffer.
                (b"x-accel-buffering", b"no"),
                (b"x-content-type-options", b"nosniff"),
                (b"x-session-id", self._session_id.encode()),
            ],
        }

    # The watchdog

    async def _watch(self, receive: Receive) -> None:
        while True:
            with anyio.CancelScope(deadline=self._next_look()):
                if (await receive())["type"] == "http.disconnect":
                    self._gone = True
                    self.end_early("client_gone")
                    return
                continue
            await self._look()

    def _limits(self) -> tuple[float, float, float]:
        """When the provider is late, when the whole answer is, when a heartbeat is due. The time in
        which the client did not take what we sent is not the provider's; the client may make an
        answer last twice as long by it, no longer."""
        idle = self._waiting_since + self._settings.idle_timeout_seconds
        total = self._settings.total_timeout_seconds
        return (
            idle if self._begun else math.inf,
            self._started + total + min(self.blocked, total),
            self._sent_at + self._settings.heartbeat_seconds,
        )

    def _next_look(self) -> float:
        if self._end is not None:
            return math.inf
        if self._writing_since is not None:
            return self._writing_since + self._settings.write_timeout_seconds
        return min(self._limits())

    async def _look(self) -> None:
        now = self._now()
        if self._writing_since is not None:
            if now >= self._writing_since + self._settings.write_timeout_seconds:
                self.end_early("client_stalled")
            return
        idle, total, heartbeat = self._limits()
        if now >= idle:
            self.end_early(UpstreamTimeout("The model stopped in the middle of its answer."))
        elif now >= total and self.blocked >= self._settings.total_timeout_seconds:
            self.end_early("client_stalled")
        elif now >= total:
            self.end_early(UpstreamTimeout("The model took too long for its answer."))
        elif now >= heartbeat:
            await self._heartbeat()

    async def _heartbeat(self) -> None:
        self._beat = anyio.Event()
        with anyio.move_on_after(self._settings.write_timeout_seconds) as writing:
            await self._transmit(b": keep-alive\n\n")
        if writing.cancelled_caught:
            self.end_early("client_stalled")
        self._beat.set()
        self._beat = None

    # The ending

    async def _conclude(self) -> End:
        """Close the provider's connection, settle, tell the client; shielded, for a client's
        leaving or a cancelled request must not lose what was said."""
        end = self._end = self._end or InternalError("The service was stopped.")
        with anyio.CancelScope(shield=True):
            try:
                with anyio.move_on_after(SETTLE_SECONDS):
                    await self._pieces.aclose()
                    await self._settle("".join(self._text), end)
            except ServiceError as error:
                end = error
            if isinstance(end, str):
                self.outcome = end
            elif not self._gone:
                await self._tell(end)
        return end

    async def _tell(self, end: Completion | ServiceError) -> None:
        event: DoneEvent | ErrorEvent
        if isinstance(end, Completion):
            self.outcome = "done"
            event = DoneEvent(
                id=self._request_id,
                session_id=self._session_id,
                model=end.model,
                finish_reason=end.finish_reason,
                usage=end.usage,
            )
        else:
            self.outcome = end.code
            if not self._committed:
                return
            event = ErrorEvent(id=self._request_id, session_id=self._session_id, error=end.detail())
        with anyio.move_on_after(self._settings.write_timeout_seconds) as writing:
            await self._write(frame(event), last=True)
        if writing.cancelled_caught:
            self.outcome = "client_stalled"
        elif self._gone:
            self.outcome = "client_gone"
