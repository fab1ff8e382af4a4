"""A chat request and its answer: what is accepted, how text is cleaned, the events, their stream.

`EventStream` is one state machine for all that a streaming response is asked to do: commit the
status late, keep the line alive, not wait for a client that does not read, notice one that leaves,
and end exactly once. It knows nothing of limits or sessions: it is given the pieces, and whom to
tell how it ended.
"""

import asyncio
import difflib
import re
import unicodedata
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from itertools import chain, groupby
from typing import Annotated, Any, Literal

import anyio
from pydantic import AfterValidator, BaseModel, StringConstraints, ValidationError, ValidationInfo
from pydantic_core import ErrorDetails, to_json
from starlette.types import Receive, Scope, Send

import errors
from errors import ErrorDetail, FieldProblem, InvalidRequestDetail, ServiceError
from providers import Completion, Pieces
from server import ABORT
from settings import Settings

NOT_STORED = "The answer came, but could not be stored: the assistant will not remember it."
# Ten times the longest answer of a model of today; what never ends must not fill the memory.
MAX_ANSWER_BYTES = 2**22
# `no` keeps nginx from holding pieces back to fill a buffer.
STREAM_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
)
# Closing the provider's connection and storing the turn are local; what takes longer is stuck.
SETTLE_SECONDS = 5.0
MAX_PROBLEMS = 10

# ---- the request

# What no reader sees and no writer means: control characters but tab and LF, bidirectional
# controls, tag characters (invisible ASCII), zero-width and interlinear marks, noncharacters. ZWJ,
# ZWNJ and variation selectors stay: emoji, Persian and Indic text need them.
NONCHARACTERS = "".join(chr(p + 0xFFFE) + chr(p + 0xFFFF) for p in range(0, 0x110000, 0x10000))
UNWANTED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u180e\u200b\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufdd0-\ufdef"
    f"\ufeff\ufff9-\ufffb\U000e0000-\U000e007f{NONCHARACTERS}]"
)
# Unicode's Default_Ignorable_Code_Point, which shows nothing whatever its category, and Braille's
# blank.
BLANK = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f"
    "\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    "\U000e0000-\U000e0fff]"
)
# Where more combining marks may stand in a row than the 30 that any script needs (UAX 15, 13.1).
# CPython orders them in the square of their number: 60 KB of them held every stream for a second.
MANY_MARKS = re.compile("[\u0300-\U0010ffff]{31,}")


def clean(text: str) -> str:
    """`text` with one kind of line end, in NFC, without what is invisible or breaks displays.

    Hygiene, not a defence against prompt injection. Cleaning twice changes nothing.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = MANY_MARKS.sub(_in_order, UNWANTED.sub("", text))
    return unicodedata.normalize("NFC", text).strip()


def _in_order(found: re.Match[str]) -> str:
    """Each row of combining marks in canonical order (Unicode 17, D109), by a stable sort."""
    rows = groupby(found[0], lambda char: unicodedata.combining(char) > 0)
    parts = (sorted(row, key=unicodedata.combining) if marks else row for marks, row in rows)
    return "".join(chain.from_iterable(parts))


def _is_visible(text: str) -> bool:
    # Controls, formats, separators; what Unicode has not assigned yet may well be an emoji.
    blank = ("Cc", "Cf", "Zs", "Zl", "Zp")
    return any(unicodedata.category(char) not in blank for char in BLANK.sub("", text))


def _message(text: str, info: ValidationInfo) -> str:
    text = clean(text)
    if not _is_visible(text):
        raise ValueError("holds nothing to answer")
    # Whoever validates says how long a message may be, if at all.
    limit: int | None = info.context
    if limit is not None and len(text) > limit:
        raise ValueError(f"has {len(text)} characters, {limit} are allowed")
    return text


class ChatRequest(BaseModel, extra="forbid", frozen=True, strict=True):
    """The body of POST /api/v1/chat. A field of another name is refused, so that a mistyped
    `sesion_id` does not silently begin a new conversation."""

    message: Annotated[str, AfterValidator(_message)]
    model_id: Annotated[str, StringConstraints(max_length=128)] | None = None
    session_id: Annotated[str, StringConstraints(pattern="^[A-Za-z0-9_-]{1,64}$")] | None = None


def parse_request(body: bytes, max_message_chars: int) -> ChatRequest:
    """Raises InvalidJSON or InvalidRequest."""
    try:
        return ChatRequest.model_validate_json(body, context=max_message_chars)
    except ValidationError as error:
        # The input would bring the caller's message into our answer.
        found = error.errors(include_url=False, include_context=False, include_input=False)
    if not found[0]["loc"]:
        raise errors.InvalidJSON('The body must be a JSON object in UTF-8: {"message": "Hello"}.')
    raise errors.InvalidRequest(*map(_problem, found[:MAX_PROBLEMS]))


def _problem(found: ErrorDetails) -> FieldProblem:
    """A problem in our words; pydantic's where it has them from us."""
    field = str(found["loc"][0])
    known = list(ChatRequest.model_fields)
    near = difflib.get_close_matches(field, known, 1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
    words = {
        "missing": "is required",
        "extra_forbidden": f"is not a field of this request; {hint}",
        "string_type": "must be a string",
        "string_too_long": "must have at most 128 characters",
        "string_pattern_mismatch": "must be 1 to 64 of A-Z, a-z, 0-9, _ and -",
    }
    message = words.get(found["type"], found["msg"].removeprefix("Value error, "))
    return FieldProblem(field=re.sub("[^ -~]", "?", field)[:64], message=message)


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


# ---- the stream

# A client that closed its connection, and one that keeps it open but takes nothing.
Departure = Literal["client_gone", "client_stalled"]
End = Completion | ServiceError | Departure


@dataclass
class EventStream:
    """Relays `source` to the client as an event stream.

    The request's own task reads and writes, a second one listens for the client's leaving, a timer
    looks at the clocks and sends heartbeats. Nothing is opened, locked or scheduled for a piece.
    However it ends, `settle` is awaited once, after the provider's connection is closed and before
    the terminal event goes out.

    A failure before the status is committed is raised, for the application to answer with a status
    of its own; a later one becomes the terminal event. Afterwards the other fields say how it went,
    times in seconds on the event loop's clock.
    """

    source: Pieces
    # Told the text that was sent and how it ended, before the client is; raises what to tell
    # instead.
    settle: Callable[[str, End], Awaitable[None]]
    request_id: str
    session_id: str
    settings: Settings
    end: End | None = None
    # What was sent, or was being sent when it ended; nobody's log is to show it.
    pieces: list[str] = field(default_factory=list, repr=False)
    first_piece_at: float | None = None
    # How long the provider was waited for, how long the client, and at most between two pieces.
    waited: float = 0.0
    blocked: float = 0.0
    longest_gap: float = 0.0

    def __post_init__(self) -> None:
        self._size = 0
        self._departed: Departure | None = None
        self._committed = self._headed = self._begun = False
        self._relaying = anyio.CancelScope()
        # The latest heartbeat: a piece must not overtake the status line that it may have to send.
        self._beat: asyncio.Task[None] | None = None
        self._writing_since: float | None = None

    @property
    def outcome(self) -> str:
        """`done` or the error's code, unless the client departed, whatever was left to tell it."""
        code = self.end.code if isinstance(self.end, ServiceError) else "done"
        return self._departed or code

    def end_early(self, end: ServiceError | Departure) -> None:
        """Stop relaying now and end like this. The first ending counts; of a departure that comes
        after it, only that nobody is there any more."""
        if isinstance(end, str):
            self._departed = self._departed or end
        if self.end is None:
            self.end = end
            self._relaying.cancel()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._send = send
        self._loop = asyncio.get_running_loop()
        self._now = self._loop.time
        self._started = self._waiting_since = self._sent_at = self._now()
        # Two bare tasks and a timer: a task group costs 75 us, as much as a piece.
        listening = self._loop.create_task(self._listen(receive))
        self._timer: asyncio.Handle = self._loop.call_soon(self._watch)
        try:
            with self._relaying:
                await self._relay()
        finally:
            await self._conclude()
            self._timer.cancel()
            listening.cancel()
            if self._beat is not None:
                self._beat.cancel()
        if isinstance(self.end, ServiceError) and not self._committed:
            raise self.end
        if self._departed == "client_stalled":
            # A polite close would wait for the client to read what is buffered.
            scope["extensions"][ABORT]()
            await receive()

    # The relay

    async def _relay(self) -> None:
        # An event is one `data:` line: JSON has no line ends of its own.
        head, tail = b'data: {"chunk":', b',"id":' + to_json(self.request_id) + b"}\n\n"
        try:
            async for batch in self.source:
                now = self._now()
                gap = now - self._waiting_since
                self.waited += gap
                if isinstance(batch, Completion):
                    self.end = self.end or batch
                    return
                if self._begun:
                    self.longest_gap = max(self.longest_gap, gap)
                self._begun = True
                if batch:
                    if self.first_piece_at is None:
                        self.first_piece_at = now
                    events = b"".join([head + to_json(piece) + tail for piece in batch])
                    self._size += len(events) - len(batch) * (len(head) + len(tail))
                    if self._size > MAX_ANSWER_BYTES:
                        raise errors.UpstreamError("The model's answer is longer than 4 MiB.")
                    self.pieces += batch
                    await self._write(events)
                self._waiting_since = self._now()
        except Exception as error:
            self.end = self.end or errors.as_told(error)

    async def _write(self, body: bytes, *, last: bool = False) -> None:
        if self._beat is not None and not self._beat.done():
            await asyncio.wait((self._beat,))
        if self._departed is None:
            await self._transmit(body, last=last)

    async def _transmit(self, body: bytes, *, last: bool = False) -> None:
        before = self._writing_since = self._now()
        try:
            if not self._headed:
                self._committed = True
                headers = [*STREAM_HEADERS, (b"x-session-id", self.session_id.encode())]
                await self._send({"type": "http.response.start", "status": 200, "headers": headers})
                # Not before: an early end may have come while nothing was taken.
                self._headed = True
            await self._send({"type": "http.response.body", "body": body, "more_body": not last})
        except OSError:
            # ASGI's way, from its version 2.4 on, to say that nobody is there.
            self.end_early("client_gone")
        self._writing_since = None
        self._sent_at = self._now()
        self.blocked += self._sent_at - before

    # The watchdog

    async def _listen(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.end_early("client_gone")

    def _watch(self) -> None:
        """Do what is due, if anything is, and look again, at once or when more may be: until the
        end, from which on `_conclude` keeps its own deadlines."""
        if self.end is not None:
            return
        due, end = self._next()
        now = self._now()
        if now >= due:
            if end is None:
                self._sent_at = now
                self._beat = self._loop.create_task(self._transmit(b": keep-alive\n\n"))
            else:
                self.end_early(end)
        limits = self.settings
        # What begins while nobody looks must not be seen later than it is due.
        nap = min(
            limits.idle_timeout_seconds, limits.write_timeout_seconds, limits.heartbeat_seconds
        )
        self._timer = self._loop.call_at(min(due, now + nap), self._watch)

    def _next(self) -> tuple[float, ServiceError | Departure | None]:
        """When something is due, and what: an early end, or a heartbeat (None). The time in which
        the client did not take what we sent is not the provider's; the client may make an answer
        last twice as long by it, no longer."""
        limits, blocked = self.settings, self.blocked
        due: list[tuple[float, ServiceError | Departure | None]] = []
        if self._writing_since is not None:
            blocked += self._now() - self._writing_since
            due.append((self._writing_since + limits.write_timeout_seconds, "client_stalled"))
        else:
            due.append((self._sent_at + limits.heartbeat_seconds, None))
            if self._begun:
                quiet = errors.UpstreamTimeout("The model stopped in the middle of its answer.")
                due.append((self._waiting_since + limits.idle_timeout_seconds, quiet))
        total = limits.total_timeout_seconds
        late = errors.UpstreamTimeout("The model took too long for its answer.")
        end = self._started + total + min(blocked, total)
        due.append((end, "client_stalled" if blocked >= total else late))
        return min(due, key=lambda pair: pair[0])

    # The ending

    async def _conclude(self) -> None:
        """Close the provider's connection, settle, tell the client; shielded, for a client's
        leaving or a cancelled request must not lose what was said."""
        self.end = self.end or errors.InternalError("The service was stopped.")
        if self._writing_since is not None:
            self.blocked += self._now() - self._writing_since
        elif not isinstance(self.end, Completion):
            self.waited += self._now() - self._waiting_since
        try:
            with anyio.move_on_after(SETTLE_SECONDS, shield=True):
                await self.source.aclose()
        except Exception as error:
            self.end = errors.as_told(error)
        try:
            with anyio.fail_after(SETTLE_SECONDS, shield=True):
                await self.settle("".join(self.pieces), self.end)
        except TimeoutError:
            self.end = errors.StateUnavailable(NOT_STORED)
        except Exception as error:
            self.end = errors.as_told(error)
        if self._departed is None:
            await self._tell()

    async def _tell(self) -> None:
        ids: dict[str, Any] = {"id": self.request_id, "session_id": self.session_id}
        if isinstance(self.end, Completion):
            event: DoneEvent | ErrorEvent = DoneEvent(**ids, **vars(self.end))
        elif isinstance(self.end, ServiceError) and self._committed:
            event = ErrorEvent(**ids, error=self.end.detail())
        else:
            # It is raised, and gets a status of its own.
            return
        with anyio.move_on_after(self.settings.write_timeout_seconds, shield=True) as writing:
            await self._write(b"data: " + to_json(event) + b"\n\n", last=True)
        if writing.cancelled_caught:
            self.end_early("client_stalled")
