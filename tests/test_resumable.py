"""Resumable streams, on real sockets: retry, resume, stop, and their limits."""

import asyncio
import json
import random
import sqlite3
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import anyio
import pytest

from tests.client import Client, Response
from tests.conftest import RunningService, StartRelay, StartService
from tests.faults import connect_slow_client
from tests.upstream import DONE, END, Connection, delta, response

KEY = "key-0123456789ab"
# An event and its id.
Event = tuple[str, dict[str, Any]]
CALLERS = "one:0123456789abcdefghij,two:abcdefghij0123456789"
ONE = {"authorization": "Bearer 0123456789abcdefghij"}
TWO = {"authorization": "Bearer abcdefghij0123456789"}


class Gate:
    """A provider's script that sends the first chunk at once, the others and the end when opened.

    With `held`, the first chunk waits too. `calls` is the number of requests so far.
    """

    def __init__(self, *texts: str, held: bool = False) -> None:
        self.texts = texts
        self.held = held
        self.calls = 0
        self._permits = asyncio.Semaphore(0)

    def open(self, times: int = 1) -> None:
        for _ in range(times):
            self._permits.release()

    async def __call__(self, request: Connection) -> None:
        self.calls += 1
        sending = asyncio.ensure_future(self._send(request))
        closing = asyncio.ensure_future(request.closed.wait())
        await asyncio.wait([sending, closing], return_when=asyncio.FIRST_COMPLETED)
        sending.cancel()
        closing.cancel()

    async def _send(self, request: Connection) -> None:
        await request.stream()
        for number, text in enumerate(self.texts):
            if self.held or number > 0:
                await self._permits.acquire()
            await request.send_events(delta(text))
        await self._permits.acquire()
        await request.send_events(delta(finish_reason="stop"), DONE)
        await request.send(END)


async def post(
    app: RunningService,
    message: str = "Hello",
    key: str | None = KEY,
    last: str | None = None,
    host: str | None = None,
    headers: dict[str, str] | None = None,
    **fields: Any,
) -> Response:
    """Send a chat request on a new connection, with an Idempotency-Key unless `key` is None."""
    client = await app.connect(host)
    more = {"idempotency-key": key} if key is not None else {}
    more |= {"last-event-id": last} if last is not None else {}
    return await client.chat(message, {**more, **(headers or {})}, **fields)


async def resume(
    app: RunningService,
    session_id: str,
    last: str | None = None,
    method: str = "GET",
    host: str | None = None,
    headers: dict[str, str] | None = None,
) -> Response:
    """Send a request to the stream of a session on a new connection."""
    client = await app.connect(host)
    more = {"last-event-id": last} if last is not None else {}
    path = f"/api/v1/sessions/{session_id}/stream"
    return await client.request(method, path, headers={**more, **(headers or {})})


async def stop(app: RunningService, session_id: str, **options: Any) -> Response:
    return await resume(app, session_id, method="DELETE", **options)


async def next_event(reply: Response) -> Event | None:
    """Return the next event with its id, or None at the end. Skip comments."""
    while (block := await reply.block()) is not None:
        if not block.startswith(":"):
            number, data = block.split("\n")
            assert number.startswith("id: ")
            assert data.startswith("data: ")
            return number.removeprefix("id: "), json.loads(data.removeprefix("data: "))
    return None


async def read(reply: Response, count: int | None = None) -> list[Event]:
    """Return the next `count` events, or all that remain."""
    assert reply.status == 200, await reply.body()
    events: list[Event] = []
    while count is None or len(events) < count:
        if (event := await next_event(reply)) is None:
            break
        events.append(event)
    return events


def text_of(events: list[Event]) -> str:
    return "".join(event.get("chunk", "") for _, event in events)


def stream_lines(app: RunningService) -> list[dict[str, Any]]:
    return [entry for entry in app.log.entries if entry["event"] == "stream"]


async def wait_for(condition: Callable[[], Any] | Callable[[], Awaitable[Any]]) -> None:
    """Wait until the condition holds."""
    while True:
        result = condition()
        if isinstance(result, Awaitable):
            result = await result
        if result:
            return
        await anyio.sleep(0.005)


async def session_of(app: RunningService, session_id: str, **options: Any) -> Any:
    client = await app.connect(**options)
    reply = await client.request("GET", f"/api/v1/sessions/{session_id}")
    return await reply.json()


# Events


async def test_each_event_of_a_keyed_stream_has_an_id_and_comments_have_none(
    relay: StartRelay,
) -> None:
    gate = Gate("a", "b\u2028c", held=True)
    app, _ = await relay(gate, HEARTBEAT_SECONDS="0.1")
    reply = await post(app)
    assert await reply.block() == ": keep-alive"
    gate.open(3)
    events = await read(reply)
    stream_id = events[0][0].rpartition(":")[0]
    assert [number for number, _ in events] == [f"{stream_id}:{n}" for n in (1, 2, 3)]
    assert len(stream_id) >= 16
    request_id = reply.headers["x-request-id"]
    assert [event for _, event in events[:2]] == [
        {"chunk": "a", "id": request_id},
        {"chunk": "b\u2028c", "id": request_id},
    ]
    assert events[2][1]["status"] == "done"
    assert events[2][1]["session_id"] == reply.headers["x-session-id"]
    assert "idempotent-replayed" not in reply.headers
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"


async def test_streams_have_different_ids(relay: StartRelay) -> None:
    gate = Gate("a")
    gate.open(2)
    app, _ = await relay(gate)
    ids = [(await read(await post(app, key=KEY + str(n))))[0][0] for n in (1, 2)]
    assert ids[0] != ids[1]


@pytest.mark.parametrize("key", ["short", "x" * 256, "with a space in it", ""])
async def test_malformed_key_returns_422(service: StartService, key: str) -> None:
    app = await service()
    reply = await post(app, key=key)
    assert reply.status == 422
    [field] = (await reply.error())["fields"]
    assert field["field"] == "Idempotency-Key"
    # The fields of the body are checked first.
    reply = await post(app, key=key, message="")
    [field] = (await reply.error())["fields"]
    assert field["field"] == "message"


@pytest.mark.parametrize("key", [KEY, "x" * 255, "short"])
async def test_header_is_ignored_if_the_feature_is_off(service: StartService, key: str) -> None:
    app = await service(RESUME_SECONDS="0")
    reply = await post(app, key=key)
    assert (await reply.events())[-1]["status"] == "done"
    reply = await post(app, key=key)
    assert "idempotent-replayed" not in reply.headers
    assert (await resume(app, reply.headers["x-session-id"])).status in (204, 404)


# Retry


async def test_retry_gets_all_events_and_sends_no_second_request(relay: StartRelay) -> None:
    gate = Gate("a", "b", "c")
    app, _ = await relay(gate)
    gate.open()
    first = await post(app, session_id="chosen")
    begun = await read(first, 2)
    retry = await post(app, session_id="chosen", headers={"x-request-id": "retry-1"})
    assert await read(retry, 2) == begun
    gate.open(2)
    rest = await read(retry)
    assert rest == await read(first)
    assert text_of(begun + rest) == "abc"
    assert retry.headers["idempotent-replayed"] == "true"
    assert retry.headers["x-session-id"] == "chosen"
    assert retry.headers["x-request-id"] == "retry-1"
    assert {event["id"] for _, event in begun + rest} == {first.headers["x-request-id"]}
    assert gate.calls == 1
    messages = (await session_of(app, "chosen"))["messages"]
    assert [message["content"] for message in messages] == ["Hello", "abc"]


async def test_retry_after_the_end_is_replayed(relay: StartRelay) -> None:
    gate = Gate("a", "b")
    gate.open(2)
    app, _ = await relay(gate)
    first = await post(app)
    events = await read(first)
    retry = await post(app)
    assert await read(retry) == events
    assert retry.headers["x-session-id"] == first.headers["x-session-id"]
    assert gate.calls == 1


@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize(
    ("last", "first"),
    [
        (None, 1),
        ("", 1),
        ("{}", 1),
        ("{}:", 1),
        ("{}:0", 1),
        ("{}:01", 1),
        ("{}:1", 2),
        ("{}:2", 3),
        ("{}:9", 1),
        ("{}:-1", 1),
        ("{}:1.0", 1),
        ("{}:99999999999999999999", 1),
        ("x{}:1", 1),
        ("other:1", 1),
    ],
)
async def test_retry_continues_after_last_event_id_unless_it_is_invalid(
    relay: StartRelay, last: str | None, first: int, ended: bool
) -> None:
    gate = Gate("a", "b", "c")
    app, _ = await relay(gate)
    gate.open()
    original = await post(app)
    events = await read(original, 2)
    if ended:
        gate.open(2)
        events += await read(original)
    stream_id = events[0][0].rpartition(":")[0]
    retry = await post(app, last=last and last.format(stream_id))
    if not ended:
        if first < 3:
            await read(retry, 3 - first)
        gate.open(2)
        events += await read(original)
        first = max(first, 3)
    assert await read(retry) == events[first - 1 :]


async def test_key_with_another_request_returns_422(relay: StartRelay) -> None:
    gate = Gate("a")
    app, _ = await relay(gate, MODELS="gpt-*")
    gate.open()
    first = await post(app)
    await read(first)
    others: list[dict[str, Any]] = [
        {"message": "Bye"},
        {"model_id": "gpt-5"},
        {"session_id": "chosen"},
    ]
    for fields in others:
        reply = await post(app, **fields)
        assert await reply.status_and_code() == (422, "idempotency_key_reused")
    # Defaults are part of the comparison, and so is cleaning.
    same: dict[str, Any] = {"message": " Hello\r\n", "model_id": "gpt-4o-mini", "session_id": None}
    assert (await post(app, **same)).status == 200
    assert gate.calls == 1


async def test_simultaneous_requests_with_one_key_are_one_request(relay: StartRelay) -> None:
    gate = Gate("a", held=True)
    app, _ = await relay(gate)
    gate.open(2)
    results: list[list[Event]] = []

    async def send() -> None:
        results.append(await read(await post(app)))

    async with anyio.create_task_group() as tasks:
        for _ in range(8):
            tasks.start_soon(send)
    assert gate.calls == 1
    assert len(results) == 8
    assert all(result == results[0] for result in results)
    assert len(stream_lines(app)) == 1


async def test_keys_belong_to_the_caller(relay: StartRelay) -> None:
    gate = Gate("a")
    app, _ = await relay(gate, API_KEYS=CALLERS)
    gate.open(4)
    replies = [
        await post(app),
        await post(app, host="127.0.0.2"),
        await post(app, headers=ONE),
        await post(app, headers=TWO),
    ]
    ids = {(await read(reply))[0][0] for reply in replies}
    assert len(ids) == gate.calls == 4
    assert not any("idempotent-replayed" in reply.headers for reply in replies)


async def test_retry_takes_a_token_but_no_slot_and_never_returns_409(relay: StartRelay) -> None:
    gate = Gate("a")
    app, _ = await relay(gate, MAX_STREAMS="1", RATE_LIMIT="5/day")
    first = await post(app, session_id="chosen")
    assert first.headers["ratelimit"].startswith('"anonymous";r=4;')
    app.clients[-1].disconnect()
    # The generation goes on and has the slot.
    reply = await post(app, key=KEY + "2")
    assert await reply.status_and_code() == (503, "overloaded")
    retry = await post(app, session_id="chosen")
    assert retry.headers["ratelimit"].startswith('"anonymous";r=2;')
    gate.open()
    assert text_of(await read(retry)) == "a"
    assert (await read(await post(app, session_id="chosen")))[-1][1]["status"] == "done"
    assert (await post(app, key=KEY + "2")).status == 200
    assert (await post(app)).status == 429


async def test_ninth_reader_returns_429(relay: StartRelay) -> None:
    gate = Gate("a")
    app, _ = await relay(gate, RATE_LIMIT="off", MAX_STREAMS_PER_CALLER="1")
    replies = [await post(app)]
    await read(replies[0], 1)
    session_id = replies[0].headers["x-session-id"]
    replies += [await post(app) for _ in range(7)]
    for reply in (await post(app), await resume(app, session_id)):
        assert await reply.status_and_code() == (429, "too_many_streams")
    app.clients[1].disconnect()
    await app.log.wait_for_request(2)
    replies[1] = await post(app)
    gate.open()
    for reply in replies:
        assert (await read(reply))[-1][1]["status"] == "done"


# Failures


@pytest.mark.parametrize("heartbeat", ["10", "0.05"])
async def test_request_that_failed_before_its_first_chunk_is_forgotten(
    relay: StartRelay, heartbeat: str
) -> None:
    failing = asyncio.Event()
    calls = 0

    async def fail_first(request: Connection) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            await failing.wait()
            await request.send(response(500, b"{}"))
        else:
            await request.complete("a")

    app, provider = await relay(fail_first, HEARTBEAT_SECONDS=heartbeat)
    early = heartbeat == "10"
    async with anyio.create_task_group() as tasks:
        replies: list[Response] = []

        async def send() -> None:
            replies.append(await post(app, session_id="chosen"))

        for _ in range(2):
            tasks.start_soon(send)
        await provider.wait_for_request()
        if not early:
            await wait_for(lambda: len(replies) == 2)
        failing.set()
    for reply in replies:
        if early:
            assert await reply.status_and_code() == (502, "upstream_error")
        else:
            [(number, event)] = await read(reply)
            assert number.endswith(":1")
            assert event["error"]["code"] == "upstream_error"
            assert event["session_id"] == "chosen"
    retry = await post(app, session_id="chosen", last="x:1")
    assert "idempotent-replayed" not in retry.headers
    assert text_of(await read(retry)) == "a"
    assert calls == 2
    assert len((await session_of(app, "chosen"))["messages"]) == 2


async def test_unknown_session_returns_404_and_leaves_the_key_free(relay: StartRelay) -> None:
    gate = Gate("a")
    gate.open()
    app, _ = await relay(gate, MAX_STREAMS="1")
    reply = await post(app, session_id="s_" + "x" * 43)
    assert await reply.status_and_code() == (404, "session_not_found")
    assert text_of(await read(await post(app))) == "a"
    assert len(stream_lines(app)) == 1


async def test_request_that_failed_after_its_first_chunk_is_replayed(relay: StartRelay) -> None:
    async def truncate(request: Connection) -> None:
        await request.stream(delta("a"))
        request.reset()

    app, provider = await relay(truncate)
    events = await read(await post(app))
    assert [event.get("status") for _, event in events] == [None, "error"]
    assert await read(await post(app)) == events
    # Also if the client already has all chunks.
    assert await read(await post(app, last=events[0][0])) == events[1:]
    assert len(provider.requests) == 1


async def test_response_without_text_is_replayed(relay: StartRelay) -> None:
    gate = Gate()
    gate.open()
    app, _ = await relay(gate)
    events = await read(await post(app))
    assert [event["status"] for _, event in events] == ["done"]
    assert await read(await post(app)) == events
    assert gate.calls == 1


# Lost connections


async def test_connection_lost_at_any_byte_costs_nothing(relay: StartRelay) -> None:
    texts = ["Hel", "lo \u20ac", " wor", "ld"]
    gate = Gate(*texts, held=True)
    app, _ = await relay(gate, RATE_LIMIT="off")
    # The head, and the events that are sent before the connection is lost.
    received = await receive_two_events(app, KEY, gate)
    head_bytes = received.index(b"\r\n\r\n")
    cuts = [*range(0, head_bytes, 50), *range(head_bytes, len(received) + 1)]
    for cut in cuts:
        key = f"{KEY}-{cut}"
        last, text = parse_received(await receive_two_events(app, key, gate, cut))
        gate.open(3)
        rest = await read(await post(app, key=key, last=last))
        assert text + text_of(rest) == "".join(texts), cut
        assert rest[-1][1]["status"] == "done"
    assert gate.calls == len(cuts) + 1


async def receive_two_events(
    app: RunningService, key: str, gate: Gate, count: int | None = None
) -> bytes:
    """Send a request, and return what arrives until its second event, or the first `count` bytes.

    The connection is then lost.
    """
    client = await app.connect()
    begin(client, key)
    calls = gate.calls
    gate.open(2)
    if count is None:
        received = b""
        while received.count(b"\n\n\r\n") < 2:
            received += await client.reader.readuntil(b"\n")
        gate.open(3)
    else:
        received = await client.reader.readexactly(count)
        # A request that is lost before it was read would be no retry.
        await wait_for(lambda: gate.calls > calls)
    client.disconnect()
    return received


def begin(
    client: Client,
    key: str = KEY,
    headers: Mapping[str, str] | None = None,
    body: bytes = b'{"message":"Hello"}',
) -> None:
    """Send a chat request without waiting for its response."""
    head = f"POST /api/v1/chat HTTP/1.1\r\nhost: x\r\nidempotency-key: {key}\r\n"
    more = {"content-type": "application/json", "content-length": len(body), **(headers or {})}
    head += "".join(f"{name}: {value}\r\n" for name, value in more.items()) + "\r\n"
    client.writer.write(head.encode() + body)


def parse_received(data: bytes) -> tuple[str | None, str]:
    """Return the id of the last whole event in a truncated response, and the text so far."""
    _, _, body = data.partition(b"\r\n\r\n")
    unframed = b""
    while b"\r\n" in body:
        size, _, body = body.partition(b"\r\n")
        unframed += body[: int(size, 16)]
        body = body[int(size, 16) + 2 :]
    last, text = None, ""
    for block in unframed.split(b"\n\n")[:-1]:
        number, _, event = block.partition(b"\n")
        last = number.decode().removeprefix("id: ")
        text += json.loads(event.removeprefix(b"data: ")).get("chunk", "")
    return last, text


async def test_clients_that_lose_their_connection_at_random_get_the_whole_text(
    relay: StartRelay,
) -> None:
    texts = [f"{n} " for n in range(20)]
    calls: dict[str, int] = {}

    async def send_slowly(request: Connection) -> None:
        message = request.body["messages"][-1]["content"]
        calls[message] = calls.get(message, 0) + 1
        await request.stream()
        for text in texts:
            await anyio.sleep(0.01)
            await request.send_events(delta(text))
        await request.send_events(delta(finish_reason="stop"), DONE)
        await request.send(END)

    app, _ = await relay(send_slowly, RATE_LIMIT="off", MAX_STREAMS_PER_CALLER="200")

    async def chat(number: int) -> None:
        rng = random.Random(number)
        text, last, lost = "", None, 0
        while True:
            reply = await post(app, f"m{number}", f"{KEY}-{number}", last, session_id=f"s{number}")
            remaining = rng.randrange(12) if lost < 4 else None
            events = await read(reply, remaining)
            text += text_of(events)
            last = events[-1][0] if events else last
            if events and "status" in events[-1][1]:
                break
            reply.disconnect()
            lost += 1
        assert text == "".join(texts)
        messages = (await session_of(app, f"s{number}"))["messages"]
        assert [message["content"] for message in messages] == [f"m{number}", text]

    async with anyio.create_task_group() as tasks:
        for number in range(200):
            tasks.start_soon(chat, number)
    assert set(calls.values()) == {1}
    assert len(calls) == 200
    assert [line["outcome"] for line in stream_lines(app)] == ["done"] * 200


async def test_slow_reader_is_disconnected_and_delays_no_other(relay: StartRelay) -> None:
    gate = Gate("a", *["x" * 200_000] * 15)
    app, _ = await relay(gate, WRITE_TIMEOUT_SECONDS="0.5", TOTAL_TIMEOUT_SECONDS="50")
    first = await post(app)
    await read(first, 1)
    slow = await connect_slow_client(app.url)
    app.clients.append(slow)
    begin(slow)
    gate.open(16)
    events = await read(first)
    assert len(text_of(events)) == 15 * 200_000
    assert events[-1][1]["status"] == "done"
    await app.log.wait_for_request(1)
    outcomes = {line["outcome"] for line in app.log.requests()}
    assert outcomes == {"done", "client_stalled"}
    assert [line["outcome"] for line in stream_lines(app)] == ["done"]
    # The events are still there.
    assert await read(await post(app, last=events[-2][0])) == events[-1:]


async def test_reader_that_pauses_gets_all_events_when_it_reads_again(relay: StartRelay) -> None:
    gate = Gate("a", *["x" * 200_000] * 5)
    app, _ = await relay(gate)
    first = await post(app)
    await read(first, 1)
    slow = await connect_slow_client(app.url)
    app.clients.append(slow)
    begin(slow)
    gate.open(6)
    # The stream has ended, and the slow client has not read yet.
    assert (await read(first))[-1][1]["status"] == "done"
    events = await read(await slow.head())
    assert len(text_of(events)) == 1_000_001
    assert events[-1][1]["status"] == "done"


async def test_reader_that_lags_behind_a_stream_that_is_not_retained_is_disconnected(
    relay: StartRelay,
) -> None:
    gate = Gate("a", *["x" * 200_000] * 5)
    app, _ = await relay(gate, RESUME_MAX_BYTES="300000")
    first = await post(app)
    await read(first, 1)
    slow = await connect_slow_client(app.url)
    app.clients.append(slow)
    begin(slow)
    gate.open(6)
    assert (await read(first))[-1][1]["status"] == "done"
    await app.log.wait_for_request(1)
    outcomes = {line["outcome"] for line in app.log.requests()}
    assert outcomes == {"done", "client_stalled"}


async def test_deleted_session_drops_all_its_streams(relay: StartRelay) -> None:
    gate = Gate("a")
    gate.open(100)
    app, _ = await relay(gate, RATE_LIMIT="off")
    for number in range(2):
        await read(await post(app, key=f"{KEY}-{number}", session_id="chosen"))
    client = await app.connect()
    assert (await client.request("DELETE", "/api/v1/sessions/chosen")).status == 204
    for number in range(2):
        reply = await post(app, key=f"{KEY}-{number}", session_id="chosen")
        assert "idempotent-replayed" not in reply.headers
        await read(reply)


async def test_each_reader_gets_heartbeats(relay: StartRelay) -> None:
    gate = Gate("a")
    app, _ = await relay(gate, HEARTBEAT_SECONDS="0.1")
    first = await post(app)
    [event] = await read(first, 1)
    retry = await post(app, last=event[0])
    for reply in (first, retry):
        assert await reply.block() == ": keep-alive"
    gate.open()
    assert (await read(retry))[-1][1]["status"] == "done"


async def test_stream_without_a_reader_is_cancelled_after_resume_seconds(relay: StartRelay) -> None:
    gate = Gate("a", "b")
    app, provider = await relay(gate, RESUME_SECONDS="0.3")
    first = await post(app, session_id="chosen")
    [event] = await read(first, 1)
    app.clients[-1].disconnect()
    await (await provider.wait_for_request()).closed.wait()
    await wait_for(lambda: stream_lines(app))
    [line] = stream_lines(app)
    assert (line["outcome"], line["chunks"]) == ("client_disconnected", 1)
    messages = (await session_of(app, "chosen"))["messages"]
    assert [(m["content"], m["complete"]) for m in messages] == [("Hello", True), ("a", False)]
    # A retry learns how it ended, without a second turn.
    _, last = await read(await post(app, session_id="chosen"))
    assert last[0] == event[0].replace(":1", ":2")
    request_id = first.headers["x-request-id"]
    assert last[1] == {"status": "stopped", "id": request_id, "session_id": "chosen"}


async def test_stream_without_reader_or_text_is_forgotten_after_resume_seconds(
    relay: StartRelay,
) -> None:
    gate = Gate("a", held=True)
    app, provider = await relay(gate, RESUME_SECONDS="0.2", HEARTBEAT_SECONDS="0.05")
    await post(app)
    app.clients[-1].disconnect()
    await (await provider.wait_for_request()).closed.wait()
    await wait_for(lambda: stream_lines(app))
    gate.open(4)
    assert text_of(await read(await post(app))) == "a"
    assert gate.calls == 2


async def test_events_are_dropped_resume_seconds_after_the_end(relay: StartRelay) -> None:
    gate = Gate("a")
    gate.open(2)
    app, _ = await relay(gate, RESUME_SECONDS="0.2", RATE_LIMIT="off")
    first = await post(app, session_id="chosen")
    await read(first)

    async def is_dropped() -> bool:
        return (await resume(app, "chosen", method="HEAD")).status == 204

    await wait_for(is_dropped)
    assert text_of(await read(await post(app, session_id="chosen"))) == "a"
    assert gate.calls == 2


# Resume by session


async def test_get_attaches_to_the_latest_keyed_stream_of_the_session(relay: StartRelay) -> None:
    gate = Gate("a", "b")
    app, _ = await relay(gate)
    gate.open(2)
    older = await read(await post(app, session_id="chosen"))
    first = await post(app, session_id="chosen", key=KEY + "2")
    begun = await read(first, 1)
    whole = await resume(app, "chosen")
    rest = await resume(app, "chosen", begun[0][0])
    foreign = await resume(app, "chosen", older[0][0])
    gate.open(2)
    events = begun + await read(first)
    assert await read(whole) == events
    assert await read(rest) == events[1:]
    assert await read(foreign) == events
    assert whole.headers["x-session-id"] == "chosen"
    assert whole.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert "idempotent-replayed" not in whole.headers
    assert "ratelimit" in whole.headers
    # After the end as well.
    assert await read(await resume(app, "chosen", events[1][0])) == events[2:]
    reply = await resume(app, "chosen", events[-1][0])
    assert (reply.status, await reply.body()) == (204, b"")


async def test_issued_session_can_be_resumed_before_its_first_response_has_ended(
    relay: StartRelay,
) -> None:
    gate = Gate("a")
    app, _ = await relay(gate)
    first = await post(app)
    await read(first, 1)
    app.clients[-1].disconnect()
    # The address may have changed meanwhile: the id is the credential.
    reply = await resume(app, first.headers["x-session-id"], host="127.0.0.2")
    gate.open()
    assert text_of(await read(reply)) == "a"


async def test_session_without_a_keyed_stream_returns_204(relay: StartRelay) -> None:
    gate = Gate("a")
    app, _ = await relay(gate)
    running = await post(app, key=None, session_id="chosen")
    assert "chunk" in await running.event()
    for method in ("GET", "HEAD"):
        assert (await resume(app, "chosen", method=method)).status == 204
    gate.open()
    await running.events()
    assert (await resume(app, "chosen")).status == 204


@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE"])
async def test_unknown_session_or_that_of_another_caller_returns_404(
    relay: StartRelay, method: str
) -> None:
    gate = Gate("a")
    app, provider = await relay(gate, API_KEYS=CALLERS)
    issued = await post(app, headers=ONE)
    chosen = await post(app, headers=ONE, key=KEY + "2", session_id="chosen")
    for reply in (issued, chosen):
        await read(reply, 1)
    foreign = [issued.headers["x-session-id"], "chosen", "unknown", "s_" + "x" * 43]
    for session_id in foreign:
        for headers in (TWO, {}):
            reply = await resume(app, session_id, method=method, headers=headers)
            assert reply.status == 404
            if method != "HEAD":
                assert (await reply.error())["code"] == "session_not_found"
    assert not any(request.closed.is_set() for request in provider.requests)
    gate.open(2)
    for reply in (issued, chosen):
        assert (await read(reply))[-1][1]["status"] == "done"


async def test_head_attaches_nothing(relay: StartRelay) -> None:
    gate = Gate("a")
    app, _ = await relay(gate, RATE_LIMIT="off")
    first = await post(app, session_id="chosen")
    await read(first, 1)
    for _ in range(9):
        reply = await resume(app, "chosen", method="HEAD")
        assert (reply.status, await reply.body()) == (200, b"")
        assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert (await resume(app, "chosen")).status == 200
    gate.open()


async def test_resuming_takes_a_token(relay: StartRelay) -> None:
    gate = Gate("a")
    gate.open()
    app, _ = await relay(gate, RATE_LIMIT="2/day")
    await read(await post(app, session_id="chosen"))
    assert (await resume(app, "chosen")).status == 200
    assert await (await resume(app, "chosen")).status_and_code() == (429, "rate_limited")


# Stop


@pytest.mark.parametrize("key", [KEY, None])
@pytest.mark.parametrize("chosen", ["chosen", None])
async def test_stop_stores_the_text_so_far(
    relay: StartRelay, key: str | None, chosen: str | None
) -> None:
    gate = Gate("a", "b")
    app, provider = await relay(gate, MAX_STREAMS="1")
    fields: dict[str, Any] = {"session_id": chosen} if chosen else {}
    first = await post(app, key=key, **fields)
    assert "chunk" in (await first.block() or "")
    session_id = first.headers["x-session-id"]
    reply = await stop(app, session_id)
    assert (reply.status, await reply.body()) == (204, b"")
    messages = (await session_of(app, session_id))["messages"]
    assert [(m["content"], m["complete"]) for m in messages] == [("Hello", True), ("a", False)]
    stopped = {"status": "stopped", "id": first.headers["x-request-id"], "session_id": session_id}
    block = await first.block() or ""
    assert json.loads(block.partition("data: ")[2]) == stopped
    assert await first.block() is None
    await provider.requests[0].closed.wait()
    line = (stream_lines(app) if key else app.log.requests())[0]
    assert (line["outcome"], line["chunks"], line["request_id"]) == ("stopped", 1, stopped["id"])
    if key:
        assert [event for _, event in await read(await post(app, key=key, **fields))] == [
            {"chunk": "a", "id": stopped["id"]},
            stopped,
        ]
    # The session and the slot are free; stopping again is no error.
    assert (await stop(app, session_id)).status == 204
    gate.open(3)
    assert (await post(app, key=KEY + "2", session_id=session_id)).status == 200


@pytest.mark.parametrize("key", [KEY, None])
@pytest.mark.parametrize("heartbeat", ["10", "0.05"])
async def test_stop_before_the_first_chunk_stores_no_turn(
    relay: StartRelay, key: str | None, heartbeat: str
) -> None:
    gate = Gate("a", held=True)
    app, provider = await relay(gate, HEARTBEAT_SECONDS=heartbeat)
    replies: list[Response] = []

    async def send() -> None:
        replies.append(await post(app, key=key, session_id="chosen"))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(send)
        await provider.wait_for_request()
        if heartbeat != "10":
            await wait_for(lambda: replies)
        assert (await stop(app, "chosen")).status == 204
    block = await replies[0].block() or ""
    while block.startswith(":"):
        block = await replies[0].block() or ""
    assert json.loads(block.partition("data: ")[2])["status"] == "stopped"
    assert (await session_of(app, "chosen"))["messages"] == []


async def test_stop_is_never_rate_limited_and_takes_no_token(relay: StartRelay) -> None:
    gate = Gate("a")
    app, _ = await relay(gate, RATE_LIMIT="1/day")
    first = await post(app, session_id="chosen")
    await read(first, 1)
    for _ in range(3):
        assert (await stop(app, "chosen")).status == 204
    assert [event["status"] for _, event in await read(first)] == ["stopped"]
    assert await (await resume(app, "chosen")).status_and_code() == (429, "rate_limited")


async def test_stop_that_cannot_store_the_turn_returns_503(
    relay: StartRelay, tmp_path: Path
) -> None:
    gate = Gate("a")
    app, _ = await relay(gate, STATE_URL=f"sqlite:///{tmp_path / 'chat.db'}")
    first = await post(app)
    await read(first, 1)
    blocker = sqlite3.connect(tmp_path / "chat.db", isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    reply = await stop(app, first.headers["x-session-id"])
    assert await reply.status_and_code() == (503, "state_unavailable")
    [(_, event)] = await read(first)
    assert event["error"]["code"] == "state_unavailable"
    blocker.close()


async def test_busy_session_names_the_remedy(relay: StartRelay) -> None:
    gate = Gate("a")
    app, _ = await relay(gate)
    first = await post(app, session_id="chosen")
    await read(first, 1)
    for key in (None, KEY + "2"):
        error = await (await post(app, key=key, session_id="chosen")).error()
        assert error["code"] == "session_busy"
        assert "resume or stop it" in error["message"]
    gate.open()
    await read(first)


async def test_deleted_session_drops_its_keys(relay: StartRelay) -> None:
    gate = Gate("a")
    gate.open(2)
    app, _ = await relay(gate)
    first = await post(app)
    await read(first)
    session_id = first.headers["x-session-id"]
    path = f"/api/v1/sessions/{session_id}"
    assert (await (await app.connect()).request("DELETE", path)).status == 204
    assert (await resume(app, session_id)).status == 404
    again = await post(app)
    assert "idempotent-replayed" not in again.headers
    assert text_of(await read(again)) == "a"
    assert gate.calls == 2


# Limits


async def test_oldest_finished_stream_is_dropped_at_resume_max_bytes(relay: StartRelay) -> None:
    gate = Gate("x" * 30_000)
    gate.open(100)
    app, _ = await relay(gate, RESUME_MAX_BYTES="65536", RATE_LIMIT="off")
    for number in range(3):
        await read(await post(app, key=f"{KEY}-{number}"))
    replayed = [
        "idempotent-replayed" in (await post(app, key=f"{KEY}-{number}")).headers
        for number in (2, 1, 0)
    ]
    assert replayed == [True, True, False]


async def test_largest_running_stream_stops_retaining_and_its_readers_go_on(
    relay: StartRelay,
) -> None:
    gate = Gate("a", *["x" * 20_000] * 5)
    app, provider = await relay(gate, RESUME_MAX_BYTES="65536", RATE_LIMIT="off")
    first = await post(app, session_id="chosen")
    await read(first, 1)
    gate.open(4)
    await read(first, 4)
    assert (await resume(app, "chosen")).status == 204
    reply = await post(app, session_id="chosen")
    assert await reply.status_and_code() == (409, "session_busy")
    gate.open(2)
    rest = await read(first)
    assert [event.get("status") for _, event in rest] == [None, "done"]
    messages = (await session_of(app, "chosen"))["messages"]
    assert len(messages[1]["content"]) == 100_001
    # Without a reader, a stream that is not retained is cancelled at once.
    lost = await post(app, key=KEY + "2")
    for _ in range(4):
        await read(lost, 1)
        gate.open()
    await read(lost, 1)
    app.clients[-1].disconnect()
    await provider.requests[1].closed.wait()


async def test_slot_is_taken_by_a_stream_without_readers(relay: StartRelay) -> None:
    gate = Gate("a")
    app, _ = await relay(gate, MAX_STREAMS_PER_CALLER="1")
    first = await post(app, session_id="chosen", key=KEY)
    await read(first, 1)
    app.clients[-1].disconnect()
    await app.log.wait_for_request()
    assert await app.metric("chat_active_streams") == 1
    reply = await post(app, key=KEY + "2")
    assert await reply.status_and_code() == (429, "too_many_streams")
    assert (await stop(app, "chosen")).status == 204
    assert await app.metric("chat_active_streams") == 0


# Shutdown


async def test_retry_resume_and_stop_work_while_draining(relay: StartRelay) -> None:
    gate = Gate("a", "b")
    app, _ = await relay(gate)
    first = await post(app, session_id="chosen")
    begun = await read(first, 1)
    draining = asyncio.create_task(app.drain.drain(50))
    await asyncio.sleep(0)
    app.clients[-1].disconnect()
    retry = await post(app, session_id="chosen", last=begun[0][0])
    resumed = await resume(app, "chosen", begun[0][0])
    for key in (KEY + "2", None):
        reply = await post(app, key=key)
        assert await reply.status_and_code() == (503, "shutting_down")
    gate.open()
    await read(retry, 1)
    assert (await stop(app, "chosen")).status == 204
    for reply in (retry, resumed):
        assert (await read(reply))[-1][1]["status"] == "stopped"
    await draining


async def test_shutdown_ends_streams_with_and_without_readers(relay: StartRelay) -> None:
    gate = Gate("a")
    app, _ = await relay(gate)
    first = await post(app)
    await read(first, 1)
    await read(await post(app, key=KEY + "2"), 1)
    app.clients[-1].disconnect()
    await app.log.wait_for_request()
    await app.drain.drain(0)
    [(_, event)] = await read(first)
    assert event["error"]["code"] == "shutting_down"
    await wait_for(lambda: len(stream_lines(app)) == 2)
    assert [line["outcome"] for line in stream_lines(app)] == ["shutting_down"] * 2


# Log and metrics


async def test_stream_is_logged_and_counted_once_with_the_original_request_id(
    relay: StartRelay,
) -> None:
    async def complete(request: Connection) -> None:
        await gate.wait()
        await request.complete("a", "b")

    gate = asyncio.Event()
    app, provider = await relay(complete, API_KEYS=CALLERS)
    trace = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"
    headers = {**ONE, "x-request-id": "original", "traceparent": trace}
    async with anyio.create_task_group() as tasks:
        replies: list[Response] = []

        async def send(headers: dict[str, str]) -> None:
            replies.append(await post(app, headers=headers))

        tasks.start_soon(send, headers)
        request = await provider.wait_for_request()
        tasks.start_soon(send, {**ONE, "x-request-id": "retry"})
        lost = await app.connect()
        begin(lost, headers=ONE)
        lost.disconnect()
        gate.set()
    assert request.headers["x-client-request-id"] == "original"
    for reply in replies:
        await read(reply)
    await app.log.wait_for_request(2)
    [line] = stream_lines(app)
    assert (line["request_id"], line["outcome"], line["chunks"]) == ("original", "done", 2)
    assert (line["caller"], line["provider"], line["completion_tokens"]) == ("one", "openai", 2)
    assert line["trace_id"] == trace[3:35]
    assert "ttft_ms" in line
    by_id = {line["request_id"]: line for line in app.log.requests()}
    assert by_id["retry"]["outcome"] == by_id["original"]["outcome"] == "done"
    assert by_id["retry"]["original_request_id"] == "original"
    assert not any("chunks" in line for line in app.log.requests())
    assert not any(KEY in line for line in app.log.lines)
    assert await app.metric("chat_chunks_total") == 2
    assert await app.metric('chat_tokens_total{kind="completion_tokens"') == 2
    assert await app.metric("chat_time_to_first_token_seconds_count") == 1


# Browsers


async def test_preflight_allows_the_headers_of_resumable_streams(service: StartService) -> None:
    app = await service(CORS_ORIGINS="https://app.example")
    client = await app.connect()
    headers = {
        "origin": "https://app.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "content-type,idempotency-key,last-event-id",
    }
    reply = await client.request("OPTIONS", "/api/v1/chat", headers=headers)
    assert reply.status == 200


# JSON responses


async def test_retry_of_a_json_response_waits_for_the_same_completion(relay: StartRelay) -> None:
    gate = Gate("a", "b")
    app, provider = await relay(gate, HEARTBEAT_SECONDS="0.05", API_KEYS=CALLERS)
    lost = await app.connect()
    begin(lost, body=b'{"message":"Hello","stream":false}')
    await provider.wait_for_request()
    lost.disconnect()
    gate.open(2)
    body = {}
    for _ in range(2):
        reply = await post(app, stream=False)
        assert reply.headers["content-type"] == "application/json"
        body = await reply.json()
        assert (body["status"], body["content"]) == ("done", "ab")
        assert reply.headers["idempotent-replayed"] == "true"
        assert body["session_id"] == reply.headers["x-session-id"]
    # The session's stream can be read as events, too.
    assert text_of(await read(await resume(app, body["session_id"]))) == "ab"
    assert await (await post(app)).status_and_code() == (422, "idempotency_key_reused")
    assert gate.calls == 1


async def test_json_response_that_is_stopped_has_the_content_so_far(relay: StartRelay) -> None:
    gate = Gate("a", "b")
    app, _ = await relay(gate, RATE_LIMIT="off")
    replies: list[Response] = []

    async def send() -> None:
        replies.append(await post(app, session_id="chosen", stream=False))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(send)
        await wait_for(lambda: gate.calls)
        await read(await resume_when_begun(app, "chosen"), 1)
        assert (await stop(app, "chosen")).status == 204
    body = await replies[0].json()
    assert (body["status"], body["content"]) == ("stopped", "a")


async def test_json_response_that_failed_late_has_a_status_of_its_own(relay: StartRelay) -> None:
    async def truncate(request: Connection) -> None:
        await request.stream(delta("a"))
        request.reset()

    app, provider = await relay(truncate)
    for _ in range(2):
        reply = await post(app, stream=False)
        assert reply.status == 502
        await reply.error()
    assert len(provider.requests) == 1


async def resume_when_begun(app: RunningService, session_id: str) -> Response:
    while (reply := await resume(app, session_id)).status != 200:
        await reply.body()
    return reply
