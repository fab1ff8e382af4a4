"""What is accepted, how text is cleaned, the events, and the stream's clocks.

The streams here run on a loop whose time jumps to the next timer, so that the defaults of minutes
can be kept to the second. How it all looks on a socket is in test_service.py.
"""

import asyncio
import itertools
import json
import selectors
import sys
import unicodedata
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.types import Message

from chat import ChatRequest, ChunkEvent, clean, parse_request
from errors import ServiceError
from openai_stream import Chunks
from providers import ChunkStream, Completion
from server import ABORT
from settings import from_env
from stream import FINISH_SECONDS_LIMIT, End, EventStream
from tests.conftest import raises

LIMIT = 10


def asked(**fields: object) -> bytes:
    """A request's body; the message is "Hi" unless another is given."""
    return json.dumps({"message": "Hi", **fields}).encode()


def refused(body: bytes) -> dict[str, str]:
    """The fields that a 422 names, and what it says of each."""
    with raises("invalid_request") as caught:
        parse_request(body, LIMIT)
    return {problem.field: problem.message for problem in caught.value.fields}


# ---- cleaning


def unwanted(char: str) -> bool:
    """What the contract says is removed, carriage returns aside."""
    code = ord(char)
    return (
        (unicodedata.category(char) == "Cc" and char not in "\t\n\r")
        or 0x202A <= code <= 0x202E
        or 0x2066 <= code <= 0x2069
        or 0xE0000 <= code <= 0xE007F
        or 0x2060 <= code <= 0x2064
        or 0xFFF9 <= code <= 0xFFFB
        or code in (0x200B, 0xFEFF, 0x180E)
        # Noncharacters: the last two of each plane, and 32 among the Arabic forms.
        or code & 0xFFFE == 0xFFFE
        or 0xFDD0 <= code <= 0xFDEF
    )


def test_of_all_characters_exactly_those_of_the_contract_are_removed() -> None:
    # Nothing in Unicode composes with a solidus that precedes it.
    chars = [chr(c) for c in range(sys.maxunicode + 1) if not 0xD800 <= c <= 0xDFFF]
    chars = [char for char in chars if char not in "\r/"]
    kept = clean("x/" + "/".join(chars) + "/x").split("/")[1:-1]
    expected = ["" if unwanted(c) else unicodedata.normalize("NFC", c) for c in chars]
    assert [(hex(ord(c)), k) for c, k, e in zip(chars, kept, expected, strict=True) if k != e] == []


@pytest.mark.parametrize(
    "text",
    [
        "👩‍👩‍👧 and 🏳️‍🌈",
        "👍🏽",
        "می‌خواهم",
        "क्‍ष and क्‌ष",
        "❤️ or ❤︎",
        "葛\U000e0100城",
        "two\nlines\tand a tab",
        "left\u200eto right, soft\u00adhyphen",
        "\ufb01 \u2460 \uff21",
        "line\u2028separator",
    ],
)
def test_what_languages_and_emoji_need_stays_as_it_is(text: str) -> None:
    assert clean(text) == text


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("a\r\nb", "a\nb"),
        ("a\rb", "a\nb"),
        ("a\r\r\nb\n\rc", "a\n\nb\n\nc"),
        ("e\u0301 \u212b \u1112\u1161\u11ab", "é Å 한"),
        # Excluded from composition: NFC takes it apart.
        ("\u0958", "\u0915\u093c"),
        # Removed first, composed then.
        ("e\u200b\u0301", "é"),
        (" \t\r\n hi \u3000\u2029\u00a0", "hi"),
        ("\ufeff hi \u200b ", "hi"),
        # An instruction in tag characters, which a model reads and nobody sees.
        ("hi" + "".join(chr(0xE0000 + ord(c)) for c in "obey"), "hi"),
        ("\x1b[31mred\x07", "[31mred"),
    ],
)
def test_text_is_cleaned(text: str, cleaned: str) -> None:
    assert clean(text) == cleaned


MARKS = [char for char in map(chr, range(0x300, 0x20000)) if unicodedata.combining(char)]


@given(
    st.text(
        st.sampled_from([*MARKS, "a", "\u1f82", "\u1112", "\u1161", "\u11ab", "漢"]), max_size=99
    )
)
def test_marks_are_ordered_as_unicode_orders_them(text: str) -> None:
    assert clean(f"x{text}x") == unicodedata.normalize("NFC", f"x{text}x")


def test_half_a_million_marks_on_one_letter_are_ordered_all_the_same() -> None:
    # In the square of their number this would take minutes, and end in this test's timeout.
    marks = 250_000
    assert clean("x" + "\u0300\u0316" * marks) == "x" + "\u0316" * marks + "\u0300" * marks


@given(st.text())
def test_cleaning_twice_changes_nothing(text: str) -> None:
    once = clean(text)
    assert clean(once) == once
    assert once == once.strip()
    assert unicodedata.is_normalized("NFC", once)


# ---- the request


def test_a_request_needs_only_a_message() -> None:
    assert parse_request(asked(), LIMIT) == ChatRequest(message="Hi")
    assert parse_request(asked(model_id=None, session_id=None), LIMIT) == ChatRequest(message="Hi")


def test_a_request_may_name_model_and_session() -> None:
    request = parse_request(asked(model_id="groq/x:y z", session_id="aZ0_-"), LIMIT)
    assert (request.message, request.model_id, request.session_id) == ("Hi", "groq/x:y z", "aZ0_-")


@pytest.mark.parametrize(
    "message",
    [
        "",
        " \t\r\n",
        "\u00a0\u3000\u2028\u2029",
        "\x00\x1b",
        "\u200b\u2060\ufeff",
        "\u200d",
        "\u200c \u200d",
        "\ufe0f\U000e0100",
        "\u00ad\u200e\u061c",
        "\u3164",
        "\u115f\u1160",
        "\uffa0",
        "\u2800",
        "\u034f",
        "\U000e0041",
        # Mongolian variation selectors, Khmer inherent vowels, reserved default-ignorables.
        "\u180b\u180c\u180d",
        "\u180f",
        "\u17b4\u17b5",
        "\u2065\ufff0\ufff8",
        "\U000e0080\U000e0fff",
    ],
    ids=ascii,
)
def test_a_message_that_shows_nothing_is_refused(message: str) -> None:
    assert refused(asked(message=message)) == {"message": "holds nothing to answer"}


@pytest.mark.parametrize(
    "message", ["0", ".", "🙂", "\u3164a", "\u0301", "\ufffd", "\ue000"], ids=ascii
)
def test_a_message_that_shows_anything_is_accepted(message: str) -> None:
    assert parse_request(asked(message=message), LIMIT).message == message


@pytest.mark.parametrize(
    ("message", "length"),
    [
        ("x" * 11, 11),
        ("👍" * 11, 11),
        ("\u0958" * 6, 12),
        ("x" * 10_000, 10_000),
        ("x\r\n" * 5 + "x", 11),
    ],
    ids=["letters", "emoji", "grown by NFC", "far too long", "line ends"],
)
def test_a_message_that_is_too_long_is_refused(message: str, length: int) -> None:
    said = f"has {length} characters, {LIMIT} are allowed"
    assert refused(asked(message=message)) == {"message": said}


@pytest.mark.parametrize(
    ("message", "cleaned"),
    [
        ("x" * 10, "x" * 10),
        ("👍" * 10, "👍" * 10),
        ("e\u0301" * 10, "é" * 10),
        ("  " + "x" * 10 + "\u200b\r\n", "x" * 10),
    ],
    ids=["letters", "emoji", "shrunk by NFC", "shrunk by cleaning"],
)
def test_a_message_of_just_the_limit_is_accepted_whole(message: str, cleaned: str) -> None:
    assert parse_request(asked(message=message), LIMIT).message == cleaned


NAME = "must be 1 to 64 of A-Z, a-z, 0-9, _ and -"
STRING = "must be a string"


@pytest.mark.parametrize(
    ("body", "problems"),
    [
        (b"{}", {"message": "is required"}),
        (b'{"model_id": "m"}', {"message": "is required"}),
        (asked(message=None), {"message": STRING}),
        (asked(message=5), {"message": STRING}),
        (asked(message=["Hi"]), {"message": STRING}),
        (asked(model_id=5), {"model_id": STRING}),
        (asked(model_id="m" * 129), {"model_id": "must have at most 128 characters"}),
        (asked(session_id=5), {"session_id": STRING}),
        (asked(session_id=""), {"session_id": NAME}),
        (asked(session_id="a" * 65), {"session_id": NAME}),
        (asked(session_id="a\n"), {"session_id": NAME}),
        (asked(session_id="ä"), {"session_id": NAME}),
        (asked(session_id="a b"), {"session_id": NAME}),
        (
            b'{"message": 1, "model_id": 2, "session_id": 3}',
            {"message": STRING, "model_id": STRING, "session_id": STRING},
        ),
    ],
)
def test_each_field_that_breaks_its_rule_is_named(body: bytes, problems: dict[str, str]) -> None:
    assert refused(body) == problems


def test_the_longest_names_of_model_and_session_are_accepted() -> None:
    request = parse_request(asked(model_id="m" * 128, session_id="s" * 64), LIMIT)
    assert (request.model_id, request.session_id) == ("m" * 128, "s" * 64)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("sesion_id", "did you mean session_id?"),
        ("model", "did you mean model_id?"),
        ("Message", "did you mean message?"),
        ("temperature", "there are message, model_id, session_id"),
    ],
)
def test_an_unknown_field_is_refused_by_name_with_a_hint(name: str, hint: str) -> None:
    assert refused(asked(**{name: 1})) == {name: f"is not a field of this request; {hint}"}


def test_a_field_is_named_in_at_most_64_printable_ascii_characters() -> None:
    names = ["\x1b[31m\u202eé🙂~ ", "n" * 65, "n" * 10_000]
    named = [next(iter(refused(asked(**{name: 1})))) for name in names]
    assert named == ["?[31m???~ ", "n" * 64, "n" * 64]


def test_at_most_ten_fields_are_named() -> None:
    problems = refused(asked(message=1, **{f"x{i}": i for i in range(20)}))
    assert list(problems) == ["message", *(f"x{i}" for i in range(9))]


def test_of_a_field_given_twice_the_last_counts() -> None:
    request = parse_request(b'{"message": 1, "message": "a", "message": "b"}', LIMIT)
    assert request.message == "b"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"null",
        b"[]",
        b'"Hi"',
        b'[{"message": "Hi"}]',
        b"{'message': 'Hi'}",
        b'{"message": "Hi"',
        b'{"message": "Hi",}',
        b'{"message": "Hi"} {}',
        b'{"message": "a\nb"}',
        b'{message: "Hi"}',
        b'{"message": "Hi", "x": \x00}',
        b'{"message": "\xff"}',
        b'{"message": "\\ud83d"}',
        b'{"message": "Hi", "\\udc00": 1}',
        b'{"message": "\xed\xa0\xbd"}',
        b'\xef\xbb\xbf{"message": "Hi"}',
        '{"message": "Hi"}'.encode("utf-16"),
        b"[" * 60_000,
        b'{"message":' + b"[" * 60_000,
        b'{"x":' * 10_000 + b"1" + b"}" * 10_000,
    ],
    ids=lambda body: ascii(body[:24]),
)
def test_what_is_not_a_json_object_in_unicode_is_invalid_json(body: bytes) -> None:
    with raises("invalid_json"):
        parse_request(body, LIMIT)


@pytest.mark.parametrize(
    "body",
    [b'{"message": NaN}', b'{"message": -Infinity}', b'{"message": 1e999}', b'{"message": 1, "x":'],
)
def test_a_number_that_json_does_not_know_is_refused(body: bytes) -> None:
    with pytest.raises(ServiceError):
        parse_request(body, LIMIT)


SECRET = "my secret 5512"


@pytest.mark.parametrize(
    "body",
    [
        asked(message=SECRET),
        asked(message=[SECRET]),
        asked(message={SECRET: SECRET}),
        asked(message=SECRET, session_id=SECRET, model_id=SECRET * 20, more=SECRET),
        asked(message=SECRET)[:-1],
        json.dumps([SECRET]).encode(),
        b'{"message": "%s\xff"}' % SECRET.encode(),
    ],
)
def test_the_callers_message_does_not_stand_in_the_error(body: bytes) -> None:
    with pytest.raises(ServiceError) as caught:
        parse_request(body, LIMIT)
    assert SECRET not in caught.value.detail().model_dump_json()
    assert SECRET not in str(caught.value)


def parsed_or_refused(body: bytes) -> None:
    """Raises whatever is neither a request nor one of the two refusals."""
    try:
        request = parse_request(body, LIMIT)
    except ServiceError as error:
        detail = error.detail().model_dump_json().encode()
        assert len(detail) < 4000, detail
    else:
        assert 1 <= len(request.message) <= LIMIT
        assert clean(request.message) == request.message


@given(st.binary())
def test_any_bytes_are_a_request_or_refused(body: bytes) -> None:
    parsed_or_refused(body)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)
FIELDS = st.sampled_from(["message", "model_id", "session_id", "mesage"]) | st.text()


@given(JSON_VALUES | st.dictionaries(FIELDS, JSON_VALUES, max_size=20), st.booleans())
def test_any_json_is_a_request_or_refused(value: object, escaped: bool) -> None:
    text = json.dumps(value, ensure_ascii=escaped)
    parsed_or_refused(text.encode("utf-8", "surrogatepass"))


# ---- the stream


class JumpingSelector(selectors.DefaultSelector):
    """Where a loop would wait for its next timer, that time is there at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "everything waits and no timer is set"
            self.now += timeout
        return ready


class JumpingLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumping = JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Callable[[], asyncio.AbstractEventLoop]]]:
    return "asyncio", {"loop_factory": JumpingLoop}


def now() -> float:
    return asyncio.get_running_loop().time()


DONE = Completion("m-1", "stop", None)
# What a provider does, one after the other: seconds to wait, a batch, an end, an error to raise.
Step = float | Chunks | Completion | Exception


def repeated(times: int, *steps: Step) -> list[Step]:
    return list(steps) * times


class Stage:
    """An EventStream with both its sides in the test's hands: `script` is what the provider does,
    `sent` what the client was sent and when. `happened` has the order of all that matters."""

    def __init__(self, *script: Step, **env: str) -> None:
        self.script = script
        self.sent: list[tuple[float, Message]] = []
        self.happened: list[str] = []
        self.settled: list[tuple[str, End]] = []
        # Messages from the client that come before it leaves.
        self.received: list[Message] = []
        # Awaited before a message is taken, in `settle`, and when the provider is closed.
        self.on_send: Callable[[], Awaitable[object]] | None = None
        self.on_settle: Callable[[], Awaitable[object]] | None = None
        self.on_close: Callable[[], Awaitable[object]] | None = None
        self._left = asyncio.Event()
        self.stream = EventStream(
            self._pieces(),
            self._settle,
            request_id="req_1",
            session_id="s_1",
            settings=from_env(env),
        )

    async def play(self) -> None:
        """The stream from its start to its end."""
        scope = {"type": "http", "extensions": {ABORT: self._abort}}
        await self.stream(scope, self._receive, self._send)

    def disconnect(self) -> None:
        self._left.set()

    @property
    def has_left(self) -> bool:
        return self._left.is_set()

    async def stall(self) -> None:
        """As `on_send`: nothing is taken any more."""
        await self._left.wait()

    @property
    def blocks(self) -> list[tuple[float, str]]:
        """Events and comments, and when each was sent."""
        bodies = [(at, m["body"].decode()) for at, m in self.sent if "body" in m]
        return [(at, block) for at, body in bodies for block in body.split("\n\n") if block]

    @property
    def events(self) -> list[Any]:
        """The events that were sent, as JSON."""
        told = [block.removeprefix("data: ") for _, block in self.blocks if block[0] != ":"]
        return [json.loads(text) for text in told]

    @property
    def heartbeats(self) -> list[float]:
        return [at for at, block in self.blocks if block == ": keep-alive"]

    async def _pieces(self) -> ChunkStream:
        try:
            for step in self.script:
                if isinstance(step, float):
                    await anyio.sleep(step)
                elif isinstance(step, Exception):
                    raise step
                else:
                    yield step
        finally:
            self.happened.append("closed")
            if self.on_close:
                await self.on_close()

    async def _settle(self, text: str, end: End) -> None:
        self.happened.append("settled")
        self.settled.append((text, end))
        if self.on_settle:
            await self.on_settle()

    def _abort(self) -> None:
        self.happened.append("aborted")
        self.disconnect()

    async def _receive(self) -> Message:
        if self.received:
            return self.received.pop()
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if self.on_send and not self._left.is_set():
            await self.on_send()
        # As uvicorn does: what is sent to nobody is dropped without a word.
        if not self._left.is_set():
            self.happened.append(message["type"].removeprefix("http.response."))
            self.sent.append((now(), message))


def raising(error: Exception) -> Callable[[], Awaitable[object]]:
    async def fail() -> None:
        raise error

    return fail


def taking(seconds: float) -> Callable[[], Awaitable[object]]:
    return lambda: anyio.sleep(seconds)


def after(number: int, then: Callable[[], Awaitable[object]]) -> Callable[[], Awaitable[object]]:
    """For `on_send`: `then`, once that many messages were taken."""
    calls = itertools.count()

    async def act() -> None:
        if next(calls) >= number:
            await then()

    return act


def first(then: Callable[[], Awaitable[object]]) -> Callable[[], Awaitable[object]]:
    """For `on_send`: `then`, and nothing from the second message on."""
    calls = itertools.count()

    async def act() -> None:
        if next(calls) == 0:
            await then()

    return act


@given(st.lists(st.lists(st.text()), max_size=5))
async def test_chunk_events_are_written_as_pydantic_would(batches: list[Chunks]) -> None:
    stage = Stage(*batches, DONE)
    await stage.play()
    body = b"".join(message["body"] for _, message in stage.sent[1:])
    chunks = [chunk for batch in batches for chunk in batch]
    lines = body.split(b"\n\n")[:-2]
    assert lines == [
        b"data: " + ChunkEvent(chunk=chunk, id="req_1").model_dump_json().encode()
        for chunk in chunks
    ]
    # One line each: a reader that ends lines at CR, too, finds no more.
    assert not any(b"\n" in line or b"\r" in line for line in lines)
    assert len(stage.stream.chunks) == len(chunks)


async def test_a_batch_is_one_message() -> None:
    stage = Stage(["a", "b", "c"], ["d"], DONE)
    await stage.play()
    assert stage.happened == ["start", "body", "body", "closed", "settled", "body"]


async def test_nothing_is_sent_before_the_first_text() -> None:
    stage = Stage(7.0, [], 7.0, ["a"], DONE)
    await stage.play()
    assert [at for at, _ in stage.sent] == [14.0, 14.0, 14.0]
    assert stage.stream.first_chunk_at == 14.0


async def test_a_heartbeat_commits_and_comes_again_while_nothing_is_sent() -> None:
    stage = Stage(40.0, ["a"], 20.0, DONE)
    await stage.play()
    assert stage.heartbeats == [15.0, 30.0, 55.0]
    assert stage.happened[:2] == ["start", "body"]
    assert [event.get("chunk", event.get("status")) for event in stage.events] == ["a", "done"]


async def test_no_heartbeat_is_sent_while_pieces_flow() -> None:
    stage = Stage(*repeated(20, 10.0, ["a"]), DONE)
    await stage.play()
    assert stage.heartbeats == []
    assert len(stage.stream.chunks) == 20
    assert stage.stream.max_chunk_gap == 10.0
    assert stage.stream.waited == 200.0


async def test_reasoning_keeps_the_answer_alive_but_is_not_sent() -> None:
    stage = Stage(*repeated(8, 25.0, []), DONE)
    await stage.play()
    assert stage.stream.outcome == "done"
    assert stage.heartbeats == [15.0 * n for n in range(1, 14)]
    assert [event["status"] for event in stage.events] == ["done"]


@pytest.mark.parametrize(("idle", "heartbeat"), [("30", "15"), ("5", "15"), ("20", "86400")])
async def test_a_provider_that_stops_is_waited_for_just_the_idle_timeout(
    idle: str, heartbeat: str
) -> None:
    stage = Stage(1.0, ["a"], 1000.0, IDLE_TIMEOUT_SECONDS=idle, HEARTBEAT_SECONDS=heartbeat)
    await stage.play()
    assert now() == 1.0 + float(idle)
    assert stage.events[-1]["error"]["code"] == stage.stream.outcome == "upstream_timeout"
    assert stage.happened[-3:] == ["closed", "settled", "body"]


async def test_a_provider_that_stops_after_its_reasoning_is_waited_for_no_longer() -> None:
    stage = Stage(1.0, [], 1000.0, IDLE_TIMEOUT_SECONDS="10")
    with raises("upstream_timeout"):
        await stage.play()
    assert now() == 11.0
    assert stage.happened == ["closed", "settled"]


async def test_a_provider_that_has_not_begun_is_not_called_idle() -> None:
    stage = Stage(500.0, ["a"], DONE)
    await stage.play()
    assert stage.stream.outcome == "done"


async def test_a_whole_answer_may_last_the_total_timeout() -> None:
    stage = Stage(*repeated(100, 9.0, ["a"]), DONE)
    await stage.play()
    assert now() == 600.0
    assert stage.events[-1]["error"] == {
        "code": "upstream_timeout",
        "message": "The model took too long for its answer.",
        "retryable": True,
        "retry_after": None,
    }
    assert len(stage.stream.chunks) == 66


async def test_time_in_which_the_client_takes_nothing_is_not_the_providers() -> None:
    stage = Stage(
        *repeated(25, 4.0, ["a"]), DONE, TOTAL_TIMEOUT_SECONDS="110", IDLE_TIMEOUT_SECONDS="5"
    )
    stage.on_send = after(1, taking(4.0))
    await stage.play()
    assert stage.stream.outcome == "done"
    assert stage.stream.waited == 100.0
    # Each of the 25 and the end of them.
    assert stage.stream.blocked == 104.0
    assert now() == 204.0


async def test_a_slow_client_makes_an_answer_last_twice_as_long_at_most() -> None:
    stage = Stage(*repeated(100, 1.0, ["a"]), DONE, TOTAL_TIMEOUT_SECONDS="100")
    stage.on_send = after(1, taking(20.0))
    await stage.play()
    # Looked at when a message has been taken, for that is progress.
    assert 200.0 <= now() <= 221.0
    assert stage.stream.outcome == "client_stalled"
    assert stage.settled == [("a" * len(stage.stream.chunks), "client_stalled")]
    assert stage.happened[-1] == "aborted"


@pytest.mark.parametrize(("write", "heartbeat"), [("30", "15"), ("5", "15"), ("20", "86400")])
async def test_a_client_that_takes_nothing_is_cut_after_just_the_write_timeout(
    write: str, heartbeat: str
) -> None:
    stage = Stage(1.0, ["a"], ["b"], DONE, WRITE_TIMEOUT_SECONDS=write, HEARTBEAT_SECONDS=heartbeat)
    stage.on_send = after(2, stage.stall)
    await stage.play()
    assert now() == 1.0 + float(write)
    assert stage.stream.outcome == "client_stalled"
    assert stage.happened == ["start", "body", "closed", "settled", "aborted"]
    assert stage.settled == [("ab", "client_stalled")]


async def test_a_client_that_does_not_take_a_heartbeat_is_cut() -> None:
    stage = Stage(["a"], 1000.0, IDLE_TIMEOUT_SECONDS="500")
    stage.on_send = after(2, stage.stall)
    await stage.play()
    assert now() == 15.0 + 30.0
    assert stage.stream.outcome == "client_stalled"
    assert stage.happened == ["start", "body", "closed", "settled", "aborted"]


async def test_a_client_that_does_not_take_the_terminal_event_is_cut() -> None:
    stage = Stage(["a"], DONE)
    stage.on_send = after(2, stage.stall)
    await stage.play()
    assert now() == 30.0
    assert stage.stream.outcome == "client_stalled"
    assert stage.settled == [("a", DONE)]
    assert stage.happened == ["start", "body", "closed", "settled", "aborted"]


@pytest.mark.parametrize(
    "end", [DONE, ServiceError("upstream_error", "It failed.")], ids=["done", "error"]
)
async def test_no_end_is_written_where_not_even_the_head_was_taken(
    end: Completion | ServiceError,
) -> None:
    stage = Stage(20.0, end)
    # The heartbeat at 15 s is not taken and given up at 45 s; what would follow it is taken.
    stage.on_send = first(stage.stall)
    await stage.play()
    assert stage.stream.outcome == "client_stalled"
    assert stage.happened == ["closed", "settled", "aborted"]


async def test_an_end_that_comes_before_the_head_was_taken_brings_the_head() -> None:
    stage = Stage(["a"], DONE)
    # A client that has not yet read the answer before this one.
    stage.on_send = first(stage.stall)
    ending = ServiceError("overloaded", "It ends early.")
    asyncio.get_running_loop().call_later(1.0, stage.stream.abort, ending)
    await stage.play()
    assert stage.happened == ["closed", "settled", "start", "body"]
    assert [event["error"]["code"] for event in stage.events] == ["overloaded"]
    assert stage.settled == [("a", ending)]


async def test_a_piece_that_comes_while_a_heartbeat_is_sent_waits_for_it() -> None:
    stage = Stage(20.0, ["a"], DONE)
    stage.on_send = taking(10.0)
    await stage.play()
    assert stage.happened[:3] == ["start", "body", "body"]
    assert stage.heartbeats == [35.0]
    assert [event.get("chunk", event.get("status")) for event in stage.events] == ["a", "done"]


@pytest.mark.parametrize(
    ("script", "said"),
    [((1000.0,), ""), (([], 1000.0), ""), ((["a"], 25.0, ["b"], 1000.0), "ab")],
    ids=["before anything", "in its reasoning", "in its text"],
)
async def test_a_client_that_leaves_ends_the_answer_at_once(
    script: tuple[Step, ...], said: str
) -> None:
    stage = Stage(*script)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stage.play)
        await anyio.sleep(28.0)
        stage.disconnect()
    assert now() == 28.0
    assert stage.stream.outcome == "client_disconnected"
    assert stage.settled == [(said, "client_disconnected")]
    assert stage.happened[-2:] == ["closed", "settled"]


async def test_what_else_a_client_sends_does_not_end_the_answer() -> None:
    stage = Stage(1.0, ["a"], DONE)
    stage.received = [{"type": "http.request", "body": b"", "more_body": False}]
    await stage.play()
    assert stage.stream.outcome == "done"


async def test_a_client_that_left_before_its_turn_still_settles() -> None:
    stage = Stage(0.0, ["a"], DONE)
    stage.disconnect()
    await stage.play()
    assert stage.sent == []
    assert stage.settled == [("", "client_disconnected")]
    assert stage.stream.outcome == "client_disconnected"


async def test_a_client_that_leaves_while_the_turn_is_stored_is_told_nothing() -> None:
    stage = Stage(["a"], DONE)

    async def leave() -> None:
        stage.disconnect()
        await anyio.sleep(1.0)

    stage.on_settle = leave
    await stage.play()
    assert stage.settled == [("a", DONE)]
    assert stage.stream.outcome == "client_disconnected"
    assert stage.happened == ["start", "body", "closed", "settled"]


async def test_a_client_that_leaves_instead_of_taking_the_terminal_event_is_gone() -> None:
    stage = Stage(["a"], 1.0, DONE)
    stage.on_send = after(2, stage.stall)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stage.play)
        await anyio.sleep(5.0)
        stage.disconnect()
    assert now() == 5.0
    assert stage.stream.outcome == "client_disconnected"
    assert stage.happened == ["start", "body", "closed", "settled"]


@pytest.mark.parametrize(
    "script",
    [(["a"], ["b"], 1000.0), (["a"], 1000.0), (["a"], DONE)],
    ids=["a chunk", "a heartbeat", "the end"],
)
async def test_a_client_to_which_nothing_can_be_sent_is_gone(script: tuple[Step, ...]) -> None:
    stage = Stage(*script)
    # As ASGI says a server may tell that nobody is there.
    stage.on_send = after(2, raising(OSError()))
    await stage.play()
    assert now() <= 15.0
    assert stage.stream.outcome == "client_disconnected"
    assert stage.happened == ["start", "body", "closed", "settled"]


async def test_the_end_is_told_after_the_provider_is_closed_and_the_turn_stored() -> None:
    stage = Stage(["a"], ["b"], Completion("m-2", "length", {"total_tokens": 3}))
    stage.on_close = stage.on_settle = taking(1.0)
    await stage.play()
    assert stage.happened == ["start", "body", "body", "closed", "settled", "body"]
    assert stage.sent[-1][0] == 2.0
    assert [message["more_body"] for _, message in stage.sent[1:]] == [True, True, False]
    assert stage.settled == [("ab", Completion("m-2", "length", {"total_tokens": 3}))]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ServiceError("upstream_error", "It failed."), "upstream_error"),
        (ValueError("secret"), "internal_error"),
    ],
)
@pytest.mark.parametrize("script", [(), ([],), ([], 14.0)])
async def test_what_fails_before_the_first_text_is_raised_for_a_status_of_its_own(
    error: Exception, code: str, script: tuple[Step, ...]
) -> None:
    stage = Stage(*script, error)
    with pytest.raises(ServiceError) as caught:
        await stage.play()
    assert caught.value is error or caught.value.__cause__ is error
    assert caught.value.code == stage.stream.outcome == code
    assert "secret" not in str(caught.value)
    assert stage.happened == ["closed", "settled"]
    assert stage.settled == [("", caught.value)]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ServiceError("overloaded", "Full.", retry_after=3), "overloaded"),
        (ValueError("secret"), "internal_error"),
    ],
)
@pytest.mark.parametrize("script", [(["a"],), (16.0,)], ids=["text", "heartbeat"])
async def test_what_fails_after_the_commit_is_the_terminal_event(
    error: Exception, code: str, script: tuple[Step, ...]
) -> None:
    stage = Stage(*script, error)
    await stage.play()
    end = stage.events[-1]
    assert {**end, "error": end["error"]["code"]} == {
        "status": "error",
        "id": "req_1",
        "session_id": "s_1",
        "error": code,
    }
    assert end["error"]["retry_after"] == getattr(error, "retry_after", None)
    assert "secret" not in end["error"]["message"]
    assert stage.happened[-3:] == ["closed", "settled", "body"]
    assert stage.stream.outcome == code


async def test_a_provider_that_ends_without_saying_how_is_a_defect() -> None:
    stage = Stage(["a"])
    await stage.play()
    assert stage.events[-1]["error"]["code"] == "internal_error"


async def test_the_first_ending_counts() -> None:
    stage = Stage(["a"], 1000.0)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stage.play)
        await anyio.sleep(1.0)
        stage.stream.abort(ServiceError("overloaded", "The first."))
        stage.stream.abort(ServiceError("upstream_error", "The second."))
    assert now() == 1.0
    assert stage.events[-1]["error"]["message"] == "The first."
    assert [event for event in stage.events if "status" in event] == stage.events[-1:]


async def test_a_client_that_is_cut_has_stalled_even_if_it_leaves_then() -> None:
    stream = Stage(1000.0).stream
    stream.abort("client_stalled")
    stream.abort("client_disconnected")
    assert (stream.end, stream.outcome) == ("client_stalled", "client_stalled")


async def test_an_ending_that_comes_before_the_stream_finds_the_provider_asked() -> None:
    stage = Stage(1000.0)
    stage.stream.abort(ServiceError("overloaded", "It is over."))
    with raises("overloaded"):
        await stage.play()
    # What was never begun would have nothing to close.
    assert stage.happened == ["closed", "settled"]
    assert now() == 0


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ServiceError("overloaded", "Not stored."), "overloaded"),
        (ValueError("secret"), "internal_error"),
    ],
)
async def test_a_turn_that_could_not_be_stored_is_the_terminal_event(
    error: Exception, code: str
) -> None:
    stage = Stage(["a"], DONE)
    stage.on_settle = raising(error)
    await stage.play()
    assert [event.get("chunk") for event in stage.events] == ["a", None]
    assert stage.events[-1]["error"]["code"] == code
    assert stage.stream.outcome == code


async def test_a_turn_that_could_not_be_stored_and_has_no_text_gets_a_status_of_its_own() -> None:
    stage = Stage(DONE)
    error = ServiceError("overloaded", "Not stored.")
    stage.on_settle = raising(error)
    with raises("overloaded") as caught:
        await stage.play()
    assert caught.value is error
    assert stage.sent == []


@pytest.mark.parametrize(
    "close", [raising(ValueError("secret")), anyio.sleep_forever], ids=["fails", "hangs"]
)
async def test_a_provider_that_does_not_close_does_not_keep_the_turn_from_being_stored(
    close: Callable[[], Awaitable[object]],
) -> None:
    stage = Stage(["a"], ["b"], DONE)
    stage.on_close = close
    # The client is waited for, so the provider is closed and not cancelled.
    stage.on_send = after(2, stage.stall)
    await stage.play()
    assert now() <= 30.0 + 2 * FINISH_SECONDS_LIMIT
    assert stage.happened == ["start", "body", "closed", "settled", "aborted"]


async def test_a_store_that_does_not_answer_does_not_hold_the_stream() -> None:
    stage = Stage(["a"], DONE)
    stage.on_settle = anyio.sleep_forever
    await stage.play()
    assert now() <= 2 * FINISH_SECONDS_LIMIT
    # A client that is told `done` relies on the turn.
    assert stage.events[-1]["status"] == "error"


@pytest.mark.parametrize(
    ("script", "said"), [((1000.0,), ""), ((["a"], 1000.0), "a")], ids=["silent", "begun"]
)
async def test_a_request_that_is_cancelled_settles_all_the_same(
    script: tuple[Step, ...], said: str
) -> None:
    stage = Stage(*script)
    stage.on_settle = taking(1.0)
    with anyio.move_on_after(10.0):
        await stage.play()
    assert now() == 11.0
    [(text, end)] = stage.settled
    assert text == said
    assert end.code == "internal_error"


# ---- every ending, at moments drawn at random

MOMENTS = st.sampled_from([0.0, 0.001, 1.0, 5.0, 14.9, 15.0, 15.1, 29.9, 30.0, 30.1, 45.0, 100.0])
STEPS = st.lists(MOMENTS | st.sampled_from([(), ("a",), ("b", "c")]).map(list), max_size=8)
LAST = st.sampled_from(
    [[], [DONE], [ServiceError("upstream_error", "It failed.")], [ValueError("secret")]]
)
# How long the client takes for each message; forever, until it leaves.
TAKING = st.lists(st.sampled_from([0.0, 0.0, 0.0, 1.0, 14.0, 29.0, 31.0, 10.0**9]), max_size=8)
SETTLING = st.sampled_from(
    [0.0, 0.0, 1.0, 6.0, ServiceError("overloaded", "Not stored."), ValueError("secret")]
)


@settings(deadline=None, max_examples=300)
@given(STEPS, LAST, TAKING, SETTLING, SETTLING, st.none() | MOMENTS, st.none() | MOMENTS)
def test_one_turn_is_stored_and_one_ending_told_whatever_meets_at_one_moment(
    steps: list[Step],
    last: list[Step],
    taking_each: list[float],
    closing: float | Exception,
    storing: float | Exception,
    leaving: float | None,
    ending: float | None,
) -> None:
    def acting(how: float | Exception) -> Callable[[], Awaitable[object]]:
        return raising(how) if isinstance(how, Exception) else taking(how)

    async def play() -> None:
        stage = Stage(*steps, *last, TOTAL_TIMEOUT_SECONDS="120")
        times = iter(taking_each)

        async def take() -> None:
            with anyio.move_on_after(next(times, 0.0)):
                await stage.stall()

        stage.on_send, stage.on_close, stage.on_settle = take, acting(closing), acting(storing)
        loop = asyncio.get_running_loop()
        if leaving is not None:
            loop.call_later(leaving, stage.disconnect)
        if ending is not None:
            loop.call_later(ending, stage.stream.abort, ServiceError("overloaded", "It ends."))
        raised = None
        try:
            await stage.play()
        except ServiceError as error:
            raised = error
        check(stage, raised)

    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        runner.run(play())


def check(stage: Stage, raised: ServiceError | None) -> None:
    """What every stream is like when it has ended, however it did."""
    if raised is not None:
        # The application answers it, so nothing may have been begun.
        assert stage.sent == []
        assert stage.stream.outcome in (raised.code, "client_disconnected")
    [(text, end)] = stage.settled
    assert "closed" not in stage.happened[stage.happened.index("settled") :]
    kinds = [message["type"] for _, message in stage.sent]
    assert (
        kinds == ["http.response.start", *["http.response.body"] * (len(kinds) - 1)][: len(kinds)]
    )
    said = "".join(event.get("chunk", "") for event in stage.events)
    assert text.startswith(said)
    ends = [event for event in stage.events if "status" in event]
    assert ends in ([], stage.events[-1:])
    if not stage.sent or stage.has_left:
        return
    [told] = ends
    assert stage.happened[-1] == "body"
    assert stage.happened.index("settled") < len(stage.happened) - 1
    assert [message["more_body"] for _, message in stage.sent[1:]].count(False) == 1
    assert stage.sent[-1][1]["more_body"] is False
    code = told["error"]["code"] if told["status"] == "error" else "done"
    assert (code, "secret" in str(told)) == (stage.stream.outcome, False)
    assert code != "done" or (said, end) == (text, DONE)
