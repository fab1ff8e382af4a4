"""EventStream: the status line, heartbeats, deadlines, backpressure and the end of a stream.

The streams here run on an event loop whose clock jumps to the next timer, so that the default
timeouts of minutes can be tested to the second. test_service.py tests the same on sockets.
"""

import asyncio
import json
import selectors
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import anyio
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from starlette.types import Message

from chat import ChunkEvent
from errors import ServiceError
from openai_stream import Chunks
from providers import Completion, Sink
from server import CONNECTION
from settings import from_env
from stream import FINISH_SECONDS, CompletionResponse, End, EventStream
from telemetry import StreamReport
from tests.conftest import raises


class JumpingSelector(selectors.DefaultSelector):
    """Reaches the loop's next timer at once instead of waiting for it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "every task waits and no timer is set"
            self.now += timeout
        return ready


class JumpingLoop(asyncio.SelectorEventLoop):
    """An event loop on the clock of a JumpingSelector."""

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
# What the provider does, in order: wait some seconds, write chunks, complete, raise.
Step = float | Chunks | Completion | Exception
FOREVER = 10.0**9


def repeat(times: int, *steps: Step) -> list[Step]:
    return list(steps) * times


class FakeConnection:
    """The client's side: the ASGI extension and `send` of a server whose client may not read.

    `read_seconds` yields, for each write, how long the client does not read after it. `sent` has
    what was sent and when. `log` has the order of everything that matters.
    """

    def __init__(self, read_seconds: Iterator[float]) -> None:
        self.on_resume: Callable[[], None] = lambda: None
        self.on_disconnect: Callable[[], None] = lambda: None
        self.disconnected = False
        self.sent: list[tuple[float, Message]] = []
        self.log: list[str] = []
        self._read_seconds = read_seconds
        self._resumes = 0
        self._resumed = asyncio.Event()
        self._resumed.set()

    @property
    def paused(self) -> bool:
        return not self._resumed.is_set()

    def write(self, data: bytes) -> None:
        assert self.sent, "a body before the status line"
        self._take({"type": "http.response.body", "body": data, "more_body": True})

    async def send(self, message: Message) -> None:
        await self._resumed.wait()
        self._take(message)

    def _take(self, message: Message) -> None:
        # uvicorn drops silently what is sent after a disconnect.
        if self.disconnected:
            return
        self.log.append(message["type"].removeprefix("http.response."))
        self.sent.append((now(), message))
        seconds = next(self._read_seconds, 0.0)
        if seconds:
            self.stop_reading(seconds)

    def stop_reading(self, seconds: float = FOREVER) -> None:
        self._resumed.clear()
        self._resumes += 1
        asyncio.get_running_loop().call_later(seconds, self._resume, self._resumes)

    def _resume(self, number: int) -> None:
        if number == self._resumes and not self._resumed.is_set():
            self._resumed.set()
            self.on_resume()

    def disconnect(self) -> None:
        if not self.disconnected:
            self.disconnected = True
            self._resumed.set()
            self.on_disconnect()

    def abort(self) -> None:
        self.log.append("reset")
        self.disconnect()


class Scenario:
    """An EventStream between a scripted provider and a FakeConnection."""

    def __init__(
        self,
        *script: Step,
        pauses: tuple[float, ...] = (),
        response: type[EventStream] = EventStream,
        env: dict[str, str] | None = None,
    ) -> None:
        self.script = script
        self.connection = FakeConnection(iter(pauses))
        self.log = self.connection.log
        self.finished: list[tuple[str, End]] = []
        # Awaited in `on_finish`.
        self.storing: Callable[[], Awaitable[object]] | None = None
        # Whether the provider may end at the idle timeout.
        self.may_finish = False
        self._finish_now = asyncio.Event()
        self.stream = response(self._provide, self._on_finish, "req_1", "s_1", from_env(env or {}))

    async def run(self) -> None:
        scope = {"type": "http", "extensions": {CONNECTION: self.connection}}
        await self.stream(scope, self._receive, self.connection.send)

    @property
    def report(self) -> StreamReport:
        return self.stream.fill_report()

    @property
    def blocks(self) -> list[tuple[float, str]]:
        """Events and comments, and when each was sent."""
        bodies = [(at, m["body"].decode()) for at, m in self.connection.sent if "body" in m]
        return [(at, block) for at, body in bodies for block in body.split("\n\n") if block]

    @property
    def events(self) -> list[Any]:
        texts = [block.removeprefix("data: ") for _, block in self.blocks if block[0] != ":"]
        return [json.loads(text) for text in texts]

    @property
    def heartbeats(self) -> list[float]:
        return [at for at, block in self.blocks if block == ": keep-alive"]

    async def _receive(self) -> Message:
        raise AssertionError("a stream does not read from its client")

    async def _provide(self, sink: Sink) -> Completion:
        resumed = asyncio.Event()
        sink.attach(resumed.set, self._finish_early)
        try:
            for step in self.script:
                if isinstance(step, float):
                    with anyio.move_on_after(step):
                        await self._finish_now.wait()
                        return DONE
                elif isinstance(step, Exception):
                    raise step
                elif isinstance(step, Completion):
                    return step
                else:
                    resumed.clear()
                    if not sink.write(step):
                        await resumed.wait()
            raise AssertionError("the script has no end")
        finally:
            self.log.append("closed")

    def _finish_early(self) -> bool:
        if self.may_finish:
            self._finish_now.set()
        return self.may_finish

    async def _on_finish(self, text: str, end: End) -> None:
        self.log.append("stored")
        self.finished.append((text, end))
        if self.storing:
            await self.storing()


def fail(error: Exception) -> Callable[[], Awaitable[object]]:
    async def raise_error() -> None:
        raise error

    return raise_error


def take(seconds: float) -> Callable[[], Awaitable[object]]:
    return lambda: anyio.sleep(seconds)


async def disconnect_at(seconds: float, scenario: Scenario) -> None:
    """Run the scenario; its client disconnects after some seconds."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(scenario.run)
        await anyio.sleep(seconds)
        scenario.connection.disconnect()


# What is sent


@given(st.lists(st.lists(st.text(), min_size=1), max_size=5))
@example([["a\u0085b\u2028c\u2029d"]])
async def test_chunk_events_equal_pydantic_json_with_line_separators_escaped(
    batches: list[Chunks],
) -> None:
    scenario = Scenario(*batches, DONE)
    await scenario.run()
    body = b"".join(message["body"] for _, message in scenario.connection.sent[1:])
    chunks = [chunk for batch in batches for chunk in batch]
    expected = [ChunkEvent(chunk=chunk, id="req_1").model_dump_json() for chunk in chunks]
    for separator in "\u0085\u2028\u2029":
        expected = [text.replace(separator, f"\\u{ord(separator):04x}") for text in expected]
    assert [f"data: {text}" for text in expected] == body.decode().split("\n\n")[:-2]
    # Any line reader finds the same lines.
    assert body.decode().splitlines() == body.decode().split("\n")[:-1]
    assert scenario.report.chunks == len(chunks)


async def test_chunks_of_one_read_are_written_at_once() -> None:
    scenario = Scenario(["a", "b", "c"], 1.0, ["d"], DONE)
    await scenario.run()
    assert scenario.log == ["start", "body", "body", "closed", "stored", "body"]


async def test_chunks_are_held_until_the_status_line_is_sent() -> None:
    scenario = Scenario(["a"], ["b"], ["c"], DONE)
    await scenario.run()
    assert [event.get("chunk") for event in scenario.events] == ["a", "b", "c", None]
    assert scenario.log == ["closed", "stored", "start", "body", "body"]


async def test_nothing_is_sent_before_the_first_text() -> None:
    scenario = Scenario(7.0, [], 7.0, ["a"], DONE)
    await scenario.run()
    assert [at for at, _ in scenario.connection.sent] == [14.0, 14.0, 14.0]
    assert scenario.report.first_chunk_at == 14.0


async def test_terminal_event_follows_the_end_of_the_provider_and_the_stored_turn() -> None:
    end = Completion("m-2", "length", {"total_tokens": 3})
    scenario = Scenario(["a"], 1.0, ["b"], end)
    scenario.storing = take(1.0)
    await scenario.run()
    assert scenario.log == ["start", "body", "body", "closed", "stored", "body"]
    assert scenario.connection.sent[-1][0] == 2.0
    assert [message["more_body"] for _, message in scenario.connection.sent[1:]] == [
        True,
        True,
        False,
    ]
    assert scenario.finished == [("ab", end)]
    report = scenario.report
    assert (report.model, report.finish_reason, report.usage) == ("m-2", "length", end.usage)


# Heartbeats


async def test_heartbeat_sends_the_status_line_and_repeats_while_nothing_is_sent() -> None:
    scenario = Scenario(40.0, ["a"], 20.0, DONE)
    await scenario.run()
    assert scenario.heartbeats == [15.0, 30.0, 55.0]
    assert scenario.log[:2] == ["start", "body"]
    assert [event.get("chunk", event.get("status")) for event in scenario.events] == ["a", "done"]


async def test_no_heartbeat_is_sent_while_chunks_flow() -> None:
    scenario = Scenario(*repeat(20, 10.0, ["a"]), DONE)
    await scenario.run()
    assert scenario.heartbeats == []
    report = scenario.report
    assert (report.chunks, report.max_chunk_gap, report.wait_seconds) == (20, 10.0, 200.0)


async def test_activity_without_text_is_not_sent_and_prevents_the_idle_timeout() -> None:
    scenario = Scenario(*repeat(8, 25.0, []), DONE)
    await scenario.run()
    assert scenario.report.outcome == "done"
    assert scenario.heartbeats == [15.0 * n for n in range(1, 14)]
    assert [event["status"] for event in scenario.events] == ["done"]


# Deadlines of the provider


@pytest.mark.parametrize(("idle", "heartbeat"), [("30", "15"), ("5", "15"), ("20", "86400")])
async def test_silent_provider_is_aborted_exactly_at_the_idle_timeout(
    idle: str, heartbeat: str
) -> None:
    env = {"IDLE_TIMEOUT_SECONDS": idle, "HEARTBEAT_SECONDS": heartbeat}
    scenario = Scenario(1.0, ["a"], 1000.0, pauses=(), env=env)
    await scenario.run()
    assert now() == 1.0 + float(idle)
    assert scenario.events[-1]["error"]["code"] == scenario.report.outcome == "upstream_timeout"
    assert scenario.log[-3:] == ["closed", "stored", "body"]


async def test_silent_provider_that_may_finish_completes_at_the_idle_timeout() -> None:
    scenario = Scenario(1.0, ["a"], 1000.0, DONE)
    scenario.may_finish = True
    await scenario.run()
    assert now() == 31.0
    assert scenario.events[-1]["status"] == "done"


async def test_provider_that_is_silent_after_activity_without_text_raises_upstream_timeout() -> (
    None
):
    scenario = Scenario(1.0, [], 1000.0, env={"IDLE_TIMEOUT_SECONDS": "10"})
    with raises("upstream_timeout"):
        await scenario.run()
    assert now() == 11.0
    assert scenario.log == ["closed", "stored"]


async def test_idle_timeout_does_not_apply_before_the_first_chunk() -> None:
    scenario = Scenario(500.0, ["a"], DONE)
    await scenario.run()
    assert scenario.report.outcome == "done"


async def test_stream_is_aborted_at_the_total_timeout() -> None:
    scenario = Scenario(*repeat(100, 9.0, ["a"]), DONE)
    await scenario.run()
    assert now() == 600.0
    error = scenario.events[-1]["error"]
    assert (error["code"], error["retryable"]) == ("upstream_timeout", True)
    assert "600 s" in error["message"]
    assert scenario.report.chunks == 66


# Clients that do not read


async def test_time_in_which_the_client_does_not_read_does_not_count_against_the_provider() -> None:
    env = {"TOTAL_TIMEOUT_SECONDS": "110", "IDLE_TIMEOUT_SECONDS": "5"}
    scenario = Scenario(*repeat(25, 4.0, ["a"]), DONE, pauses=(0.0, *[4.0] * 25), env=env)
    await scenario.run()
    assert scenario.report.outcome == "done"
    # The provider does not wait for the first pause: its chunk is still held then.
    assert now() == 196.0
    assert scenario.report.wait_seconds == 196.0


async def test_provider_is_not_asked_for_more_until_the_client_reads() -> None:
    scenario = Scenario(["a"], 1.0, ["b"], 1.0, ["c"], DONE, pauses=(0.0, 0.0, 9.0))
    await scenario.run()
    assert [at for at, block in scenario.blocks if "chunk" in block] == [0.0, 1.0, 11.0]


async def test_slow_client_extends_a_stream_to_twice_the_total_timeout() -> None:
    script = repeat(100, 1.0, ["a"])
    scenario = Scenario(
        *script, DONE, pauses=(0.0, *[20.0] * 100), env={"TOTAL_TIMEOUT_SECONDS": "100"}
    )
    await scenario.run()
    assert 200.0 <= now() <= 221.0
    assert scenario.report.outcome == "client_stalled"
    assert scenario.finished == [("a" * scenario.report.chunks, "client_stalled")]
    assert scenario.log[-1] == "reset"


@pytest.mark.parametrize(("write", "heartbeat"), [("30", "15"), ("5", "15"), ("20", "86400")])
async def test_client_that_does_not_read_is_reset_exactly_at_the_write_timeout(
    write: str, heartbeat: str
) -> None:
    env = {"WRITE_TIMEOUT_SECONDS": write, "HEARTBEAT_SECONDS": heartbeat}
    scenario = Scenario(1.0, ["a"], 1.0, ["b"], ["c"], DONE, pauses=(0.0, 0.0, FOREVER), env=env)
    await scenario.run()
    assert now() == 2.0 + float(write)
    assert scenario.report.outcome == "client_stalled"
    assert scenario.log == ["start", "body", "body", "closed", "stored", "reset"]
    assert scenario.finished == [("ab", "client_stalled")]


async def test_client_that_stops_reading_at_a_heartbeat_is_reset() -> None:
    scenario = Scenario(
        ["a"], 1000.0, pauses=(0.0, 0.0, FOREVER), env={"IDLE_TIMEOUT_SECONDS": "500"}
    )
    await scenario.run()
    assert now() == 15.0 + 30.0
    assert scenario.report.outcome == "client_stalled"
    assert scenario.log == ["start", "body", "body", "closed", "stored", "reset"]


async def test_client_that_does_not_take_the_terminal_event_is_reset() -> None:
    scenario = Scenario(["a"], 1.0, DONE, pauses=(0.0, FOREVER))
    await scenario.run()
    assert now() == 31.0
    assert scenario.report.outcome == "client_stalled"
    assert scenario.finished == [("a", DONE)]
    assert scenario.log == ["start", "body", "closed", "stored", "reset"]


@pytest.mark.parametrize(
    "end", [DONE, ServiceError("upstream_error", "It failed.")], ids=["done", "error"]
)
async def test_client_that_does_not_take_the_status_line_is_reset(
    end: Completion | ServiceError,
) -> None:
    scenario = Scenario(["a"], 100.0, end)
    scenario.connection.stop_reading()
    await scenario.run()
    assert now() == 30.0
    assert scenario.report.outcome == "client_stalled"
    assert scenario.log == ["closed", "stored", "reset"]


async def test_abort_before_the_status_line_was_taken_is_reported_in_the_stream() -> None:
    scenario = Scenario(["a"], 100.0, DONE)
    scenario.connection.stop_reading(5.0)
    error = ServiceError("overloaded", "It ends early.")
    asyncio.get_running_loop().call_later(1.0, scenario.stream.abort, error)
    await scenario.run()
    assert scenario.log == ["closed", "stored", "start", "body", "body"]
    assert [event.get("chunk") for event in scenario.events] == ["a", None]
    assert scenario.events[-1]["error"]["code"] == "overloaded"


async def test_client_that_does_not_read_a_json_response_is_reset() -> None:
    scenario = Scenario(["a"], DONE, response=CompletionResponse, pauses=(FOREVER,))
    await scenario.run()
    assert now() == 30.0
    assert scenario.log[-1] == "reset"


async def test_provider_without_an_early_end_is_aborted_when_it_is_silent() -> None:
    async def provide(sink: Sink) -> Completion:
        sink.write(["a"])
        await asyncio.Event().wait()
        raise AssertionError("it waits until it is cancelled")

    scenario = Scenario()
    scenario.stream = EventStream(provide, scenario._on_finish, "req_1", "s_1", from_env({}))
    await scenario.run()
    assert scenario.report.outcome == "upstream_timeout"


async def test_json_response_that_the_client_does_not_take_is_given_up() -> None:
    scenario = Scenario(["a"], DONE, response=CompletionResponse)
    scenario.connection.stop_reading()
    await scenario.run()
    assert now() == 30.0
    assert scenario.report.outcome == "client_stalled"
    assert scenario.log == ["closed", "stored", "reset"]


# Clients that disconnect


@pytest.mark.parametrize(
    ("script", "text"),
    [((1000.0,), ""), (([], 1000.0), ""), ((["a"], 25.0, ["b"], 1000.0), "ab")],
    ids=["before the first chunk", "after activity without text", "after text"],
)
async def test_disconnect_ends_the_stream_at_once_and_stores_the_text(
    script: tuple[Step, ...], text: str
) -> None:
    scenario = Scenario(*script)
    await disconnect_at(28.0, scenario)
    assert now() == 28.0
    assert scenario.report.outcome == "client_disconnected"
    assert scenario.finished == [(text, "client_disconnected")]
    assert scenario.log[-2:] == ["closed", "stored"]


async def test_disconnect_before_the_stream_starts_is_noticed() -> None:
    scenario = Scenario(1.0, ["a"], DONE)
    scenario.connection.disconnect()
    await scenario.run()
    assert scenario.connection.sent == []
    assert scenario.finished == [("", "client_disconnected")]
    assert scenario.report.outcome == "client_disconnected"


async def test_disconnect_while_the_turn_is_stored_prevents_the_terminal_event() -> None:
    scenario = Scenario(["a"], 1.0, DONE)

    async def disconnect() -> None:
        scenario.connection.disconnect()
        await anyio.sleep(1.0)

    scenario.storing = disconnect
    await scenario.run()
    assert scenario.finished == [("a", DONE)]
    assert scenario.report.outcome == "client_disconnected"
    assert scenario.log == ["start", "body", "closed", "stored"]


async def test_disconnect_while_the_terminal_event_waits_is_not_a_stall() -> None:
    scenario = Scenario(["a"], 1.0, DONE, pauses=(0.0, FOREVER))
    await disconnect_at(5.0, scenario)
    assert now() == 5.0
    assert scenario.report.outcome == "client_disconnected"
    assert scenario.log == ["start", "body", "closed", "stored"]


# Errors


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ServiceError("upstream_error", "It failed."), "upstream_error"),
        (ValueError("secret"), "internal_error"),
    ],
)
@pytest.mark.parametrize("script", [(), ([],), ([], 14.0)])
async def test_error_before_the_first_text_is_raised(
    error: Exception, code: str, script: tuple[Step, ...]
) -> None:
    scenario = Scenario(*script, error)
    with pytest.raises(ServiceError) as caught:
        await scenario.run()
    assert caught.value is error or caught.value.__cause__ is error
    assert caught.value.code == scenario.report.outcome == code
    assert "secret" not in str(caught.value)
    assert scenario.log == ["closed", "stored"]
    assert scenario.finished == [("", caught.value)]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ServiceError("overloaded", "Full.", retry_after=3), "overloaded"),
        (ValueError("secret"), "internal_error"),
    ],
)
@pytest.mark.parametrize("script", [(["a"],), (16.0,)], ids=["text", "heartbeat"])
async def test_error_after_the_status_line_is_the_terminal_event(
    error: Exception, code: str, script: tuple[Step, ...]
) -> None:
    scenario = Scenario(*script, error)
    await scenario.run()
    event = scenario.events[-1]
    assert {**event, "error": event["error"]["code"]} == {
        "status": "error",
        "id": "req_1",
        "session_id": "s_1",
        "error": code,
    }
    assert event["error"]["retry_after"] == getattr(error, "retry_after", None)
    assert "secret" not in event["error"]["message"]
    assert scenario.log.index("stored") < len(scenario.log) - 1
    assert scenario.report.outcome == code


async def test_response_of_more_than_4_mib_is_an_upstream_error() -> None:
    scenario = Scenario(*repeat(5, ["x" * 2**20]), DONE)
    await scenario.run()
    assert scenario.events[-1]["error"]["code"] == "upstream_error"
    assert scenario.report.chunks == 3


async def test_response_of_more_than_16_mib_as_sent_is_an_upstream_error() -> None:
    scenario = Scenario(*repeat(50, ["x"] * 10_000), DONE)
    await scenario.run()
    assert scenario.events[-1]["error"]["code"] == "upstream_error"
    sent = sum(len(m["body"]) for _, m in scenario.connection.sent if "body" in m)
    assert sent < 17 * 2**20


async def test_first_of_two_aborts_counts() -> None:
    scenario = Scenario(["a"], 1000.0)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(scenario.run)
        await anyio.sleep(1.0)
        scenario.stream.abort(ServiceError("overloaded", "The first."))
        scenario.stream.abort(ServiceError("upstream_error", "The second."))
    assert now() == 1.0
    assert scenario.events[-1]["error"]["message"] == "The first."
    assert [event for event in scenario.events if "status" in event] == scenario.events[-1:]


async def test_abort_before_the_stream_starts_calls_no_provider() -> None:
    scenario = Scenario(1000.0)
    scenario.stream.abort(ServiceError("overloaded", "It is over."))
    with raises("overloaded"):
        await scenario.run()
    assert scenario.log == ["stored"]
    assert now() == 0


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ServiceError("state_unavailable", "Not stored."), "state_unavailable"),
        (ValueError("secret"), "internal_error"),
    ],
)
async def test_turn_that_cannot_be_stored_is_reported_in_the_terminal_event(
    error: Exception, code: str
) -> None:
    scenario = Scenario(["a"], 1.0, DONE)
    scenario.storing = fail(error)
    await scenario.run()
    assert [event.get("chunk") for event in scenario.events] == ["a", None]
    assert scenario.events[-1]["error"]["code"] == scenario.report.outcome == code


async def test_turn_without_text_that_cannot_be_stored_raises() -> None:
    scenario = Scenario(DONE)
    error = ServiceError("overloaded", "Not stored.")
    scenario.storing = fail(error)
    with raises("overloaded") as caught:
        await scenario.run()
    assert caught.value is error
    assert scenario.connection.sent == []


async def test_store_that_does_not_respond_is_given_up() -> None:
    scenario = Scenario(["a"], 1.0, DONE)
    scenario.storing = anyio.sleep_forever
    await scenario.run()
    assert now() == 1.0 + FINISH_SECONDS
    # A client that gets `done` relies on the turn.
    assert scenario.events[-1]["error"]["code"] == "state_unavailable"


@pytest.mark.parametrize(
    ("script", "text"), [((1000.0,), ""), ((["a"], 1000.0), "a")], ids=["no text", "text"]
)
async def test_cancelled_request_still_stores_its_text(script: tuple[Step, ...], text: str) -> None:
    scenario = Scenario(*script)
    scenario.storing = take(1.0)
    with anyio.move_on_after(10.0):
        await scenario.run()
    assert now() == 11.0
    [(stored, end)] = scenario.finished
    assert stored == text
    assert isinstance(end, ServiceError)
    assert end.code == "internal_error"


# Every end, at random moments

MOMENTS = st.sampled_from([0.0, 0.001, 1.0, 5.0, 14.9, 15.0, 15.1, 29.9, 30.0, 30.1, 45.0, 100.0])
STEPS = st.lists(MOMENTS | st.sampled_from([(), ("a",), ("b", "c")]).map(list), max_size=8)
LAST = st.sampled_from([DONE, ServiceError("upstream_error", "It failed."), ValueError("secret")])
# How long the client does not read after each write.
PAUSES = st.lists(st.sampled_from([0.0, 0.0, 0.0, 1.0, 14.0, 29.0, 31.0, FOREVER]), max_size=8)
STORING = st.sampled_from(
    [0.0, 0.0, 1.0, 6.0, ServiceError("overloaded", "Not stored."), ValueError("secret")]
)


@settings(deadline=None, max_examples=300)
@given(STEPS, LAST, PAUSES, STORING, st.none() | MOMENTS, st.none() | MOMENTS)
def test_any_stream_stores_one_turn_and_sends_one_terminal_event(
    steps: list[Step],
    last: Step,
    pauses: list[float],
    storing: float | Exception,
    disconnecting: float | None,
    aborting: float | None,
) -> None:
    async def run() -> None:
        scenario = Scenario(
            *steps, last, pauses=tuple(pauses), env={"TOTAL_TIMEOUT_SECONDS": "120"}
        )
        scenario.storing = fail(storing) if isinstance(storing, Exception) else take(storing)
        loop = asyncio.get_running_loop()
        if disconnecting is not None:
            loop.call_later(disconnecting, scenario.connection.disconnect)
        if aborting is not None:
            loop.call_later(aborting, scenario.stream.abort, ServiceError("overloaded", "Ends."))
        raised = None
        try:
            await scenario.run()
        except ServiceError as error:
            raised = error
        check_end(scenario, raised)

    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        runner.run(run())


def check_end(scenario: Scenario, raised: ServiceError | None) -> None:
    """Assert what holds for every stream that has ended."""
    if raised is not None:
        # The application answers with a status of its own, so nothing may have been sent.
        assert scenario.connection.sent == []
        assert scenario.report.outcome in (raised.code, "client_disconnected")
    [(text, end)] = scenario.finished
    assert "closed" not in scenario.log[scenario.log.index("stored") :]
    kinds = [message["type"] for _, message in scenario.connection.sent]
    expected = ["http.response.start", *["http.response.body"] * (len(kinds) - 1)]
    assert kinds == expected[: len(kinds)]
    sent = "".join(event.get("chunk", "") for event in scenario.events)
    assert text.startswith(sent)
    terminal = [event for event in scenario.events if "status" in event]
    assert terminal in ([], scenario.events[-1:])
    if not scenario.connection.sent or scenario.connection.disconnected:
        return
    [event] = terminal
    assert scenario.log[-1] == "body"
    assert scenario.log.index("stored") < len(scenario.log) - 1
    more = [message["more_body"] for _, message in scenario.connection.sent[1:]]
    assert more == [True] * (len(more) - 1) + [False]
    code = event["error"]["code"] if event["status"] == "error" else "done"
    assert (code, "secret" in str(event)) == (scenario.report.outcome, False)
    assert code != "done" or (sent, end) == (text, DONE)
