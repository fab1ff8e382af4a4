"""What is accepted, how text is cleaned, the events, and the stream's clocks.

The streams here run on a loop whose time jumps to the next timer, so that the defaults of minutes
can be kept to the second. How it all looks on a socket is in test_service.py.
"""

import asyncio
import itertools
import json
import selectors
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.types import Message

from chat import ChunkEvent, parse_request
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
