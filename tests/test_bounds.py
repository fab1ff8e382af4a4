"""Bounds on clients, providers and the process that the other tests do not reach, on real sockets.

Clients whose body never ends, HTTP/1.0, many requests at once, proxies that name no client,
providers whose stream never starts or never ends, and the limit of open files.
"""

import asyncio
import gzip
import json
import resource
import shutil
import sys
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import anyio
import pytest
from anyio.lowlevel import checkpoint

from server import MAX_BODY_CHUNKS, MAX_DROPPED_BYTES, StartQueue, raise_descriptor_limit
from settings import from_env
from stream import MAX_SENT_BYTES
from tests.client import Client, Response
from tests.conftest import TIMEOUT_SECONDS, RunningService, StartRelay, StartService
from tests.faults import connect_slow_client, get_outcome, read_to_end, run_scenario
from tests.test_process import ROOT, ServiceProcess
from tests.test_service import CHAT, HELLO, NEVER, encode_request, exchange
from tests.upstream import DONE, END, HEAD, Connection, delta, event, http_chunk, response

FINISH = delta(finish_reason="stop")
KEY = "0123456789abcdef0123456789abcdef"
# Without these limits, only what a test is about can end a stream.
ENDLESS = {
    "FIRST_TOKEN_TIMEOUT_SECONDS": NEVER,
    "IDLE_TIMEOUT_SECONDS": NEVER,
    "TOTAL_TIMEOUT_SECONDS": NEVER,
}


async def say_hel(request: Connection) -> None:
    """Start a stream with the chunk "Hel"."""
    await request.stream(delta("Hel"))


async def say_hello(request: Connection) -> None:
    await request.complete("Hello")


# ---- request bodies


async def send_forever(client: Client, data: bytes) -> None:
    """Send `data` again and again. Raise ConnectionError when the service resets the connection."""
    while True:
        client.writer.write(data)
        await client.writer.drain()


async def start_stream(app: RunningService) -> Response:
    reply = await app.chat()
    assert (await reply.event())["chunk"] == "Hel"
    return reply


async def assert_undisturbed(reply: Response, request: Connection) -> None:
    """Check that a stream that began with "Hel" still gets its rest."""
    await request.send_events(delta("lo"), FINISH, DONE)
    await request.send(END)
    chunk, done = await reply.events()
    assert (chunk["chunk"], done["status"]) == ("lo", "done")


@pytest.mark.parametrize("framing", ["Content-Length: 1000000000000", "Transfer-Encoding: chunked"])
@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("POST", "/nowhere", 404), ("POST", CHAT, 429), ("GET", "/healthz", 200)],
)
async def test_body_that_goes_on_after_the_response_is_reset_and_disturbs_no_stream(
    relay: StartRelay, method: str, path: str, status: int, framing: str
) -> None:
    app, provider = await relay(say_hel, RATE_LIMIT="1/day", **ENDLESS)
    stream = await start_stream(app)
    client = await app.connect()
    client.writer.write(encode_request(method, path, "Content-Type: application/json", framing))
    reply = await client.head()
    assert reply.status == status
    await reply.body()
    data = b"x" * 65536
    with anyio.fail_after(TIMEOUT_SECONDS), pytest.raises(ConnectionError):
        await send_forever(client, http_chunk(data) if "chunked" in framing else data)
    await assert_undisturbed(stream, provider.requests[0])


async def test_body_of_max_dropped_bytes_after_the_response_keeps_the_connection(
    service: StartService,
) -> None:
    app = await service()
    client = await app.connect()
    length = f"Content-Length: {MAX_DROPPED_BYTES}"
    client.writer.write(encode_request("GET", "/healthz", length))
    await (await client.head()).body()
    client.writer.write(b"x" * MAX_DROPPED_BYTES)
    client.writer.write(encode_request("GET", "/nowhere", "Connection: close"))
    assert (await client.reader.read()).startswith(b"HTTP/1.1 404")


async def test_body_in_fewer_than_max_body_chunks_http_chunks_is_accepted(
    relay: StartRelay,
) -> None:
    app, _ = await relay(say_hello)
    client = await app.connect()
    headers = ("Content-Type: application/json", "Transfer-Encoding: chunked")
    # The last HTTP chunk counts as well.
    spaces = http_chunk(b" ") * (MAX_BODY_CHUNKS - 3)
    client.writer.write(encode_request("POST", CHAT, *headers) + spaces + http_chunk(HELLO) + END)
    reply = await client.head()
    assert reply.status == 200
    assert (await reply.events())[-1]["status"] == "done"


async def test_body_in_max_body_chunks_http_chunks_is_reset_and_disturbs_no_stream(
    relay: StartRelay,
) -> None:
    app, provider = await relay(say_hel, BODY_TIMEOUT_SECONDS=NEVER, **ENDLESS)
    stream = await start_stream(app)
    client = await app.connect()
    headers = ("Content-Type: application/json", "Transfer-Encoding: chunked")
    spaces = http_chunk(b" ") * MAX_BODY_CHUNKS
    client.writer.write(encode_request("POST", CHAT, *headers) + spaces)
    with anyio.fail_after(TIMEOUT_SECONDS):
        await client.wait_closed()
    assert len(provider.requests) == 1
    await assert_undisturbed(stream, provider.requests[0])


# ---- many requests at once


async def test_50_requests_at_once_are_all_answered_while_a_stream_runs(relay: StartRelay) -> None:
    env = {"RATE_LIMIT": "off", "MAX_STREAMS_PER_CALLER": "100", **ENDLESS}
    app, provider = await relay(say_hel, **env)
    stream = await start_stream(app)
    clients = [await app.connect() for _ in range(50)]
    provider.script = say_hello
    with anyio.fail_after(TIMEOUT_SECONDS):
        replies = await asyncio.gather(*(client.chat() for client in clients))
        for reply in replies:
            text, last = await read_to_end(reply)
            assert (text, get_outcome(last)) == ("Hello", "done")
    await assert_undisturbed(stream, provider.requests[0])


async def test_start_queue_starts_one_request_per_turn_of_the_event_loop_in_order() -> None:
    queue = StartQueue()
    started: list[int] = []
    for number in range(3):
        queue.add(partial(started.append, number))
    for count in (1, 2, 3):
        assert started == list(range(count))
        await checkpoint()
    queue.add(partial(started.append, 3))
    assert started == [0, 1, 2, 3]


# ---- HTTP/1.0


def encode_http_1_0(method: str, path: str, body: bytes = b"") -> bytes:
    return encode_request(method, path, body=body).replace(b"HTTP/1.1", b"HTTP/1.0", 1)


async def test_http_1_0_client_gets_each_event_at_once_and_then_the_end(relay: StartRelay) -> None:
    app, provider = await relay(say_hel, **ENDLESS)
    client = await app.connect()
    client.writer.write(encode_http_1_0("POST", CHAT, HELLO))
    head = (await client.reader.readuntil(b"\r\n\r\n")).lower()
    assert b"\r\nconnection: close\r\n" in head
    assert b"content-length" not in head
    assert b"transfer-encoding" not in head
    for text, following in (("Hel", delta("lo")), ("lo", FINISH + DONE)):
        block = await client.reader.readuntil(b"\n\n")
        assert json.loads(block.removeprefix(b"data: "))["chunk"] == text
        await provider.requests[0].send_events(following)
    last = await client.reader.read()
    assert last.endswith(b"}\n\n")
    assert json.loads(last.removeprefix(b"data: "))["status"] == "done"


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/healthz", b"", b"200 OK"),
        ("GET", "/nowhere", b"", b"404 Not Found"),
        ("POST", CHAT, b"{}", b"422 "),
        ("POST", CHAT, b'{"message":"Hi","stream":false}', b"200 OK"),
    ],
)
async def test_http_1_0_client_gets_json_with_its_length_and_then_the_end(
    relay: StartRelay, method: str, path: str, body: bytes, status: bytes
) -> None:
    app, _ = await relay(say_hello)
    reply = await exchange(app, encode_http_1_0(method, path, body))
    head, _, content = reply.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 " + status)
    head = head.lower()
    assert b"\r\ncontent-length: %d" % len(content) in head
    assert b"\r\nconnection: close" in head
    assert b"transfer-encoding" not in head
    assert isinstance(json.loads(content), dict)


# ---- the process


async def start_with_open_files(directory: Path, limit: str, streams: int) -> ServiceProcess:
    """Start the service from a shell that sets `ulimit` to `limit`."""
    command = f'ulimit {limit}; exec "{sys.executable}" -m service'
    process = await asyncio.create_subprocess_exec(
        *("sh", "-c", command),
        cwd=directory,
        env={"PYTHONPATH": str(ROOT), "PORT": "0", "MAX_STREAMS": str(streams)},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    return ServiceProcess(process)


@pytest.mark.skipif(sys.platform != "linux", reason="resource.prlimit exists on Linux only")
@pytest.mark.parametrize(
    ("limit", "streams", "warnings"),
    [
        ("-Sn 256", 200, []),
        ("-n 464", 200, []),
        ("-n 463", 200, ["MAX_STREAMS=200 needs 464 open files, but the limit is 463"]),
        ("-n 256", 1000, ["MAX_STREAMS=1000 needs 2064 open files, but the limit is 256"]),
    ],
    ids=["raised", "enough", "one_too_few", "too_few"],
)
async def test_limit_of_open_files_is_raised_and_a_warning_names_max_streams_if_it_is_too_low(
    tmp_path: Path, limit: str, streams: int, warnings: list[str]
) -> None:
    started = await start_with_open_files(tmp_path, limit, streams)
    try:
        await started.wait_for_url()
        soft, hard = resource.prlimit(started.process.pid, resource.RLIMIT_NOFILE)
        assert soft == hard
        found = [line["event"] for line in started.lines if line["level"] == "warning"]
        found = [each.partition(".")[0] for each in found if "MAX_STREAMS" in each]
        assert found == warnings
    finally:
        started.process.terminate()
        await started.process.communicate()


# Prints the addresses that HOST=twofold listens on.
LISTEN = """
from server import listen
from settings import from_env
print(*(each.getsockname()[0] for each in listen(from_env({"HOST": "twofold", "PORT": "0"}))))
"""


@pytest.mark.skipif(not shutil.which("unshare"), reason="needs unshare(1)")
async def test_host_with_an_address_that_this_machine_lacks_listens_on_the_other(
    tmp_path: Path,
) -> None:
    # As `localhost` does where ::1 cannot be bound. 192.0.2.1 is for documentation (RFC 5737).
    hosts = tmp_path / "hosts"
    hosts.write_text("192.0.2.1 twofold\n127.0.0.1 twofold\n")
    command = f'mount --bind "{hosts}" /etc/hosts || exit 77; exec "{sys.executable}" -c "$LISTEN"'
    process = await asyncio.create_subprocess_exec(
        *("unshare", "-rm", "sh", "-c", command),
        env={"PYTHONPATH": str(ROOT), "LISTEN": LISTEN, "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    if process.returncode == 77 or b"unshare" in err:
        pytest.skip("this machine has no user namespaces")
    assert (process.returncode, out, err) == (0, b"127.0.0.1\n", b"")


# ---- proxies that name no client

UNNAMED: dict[str, dict[str, str]] = {
    "forwarded_only": {"forwarded": "for=192.0.2.1"},
    "empty_x_forwarded_for": {"x-forwarded-for": ""},
    "own_address": {"x-forwarded-for": "127.0.0.1"},
}


async def request_chosen_id(
    app: RunningService, headers: dict[str, str], session_id: str = "demo"
) -> list[Response]:
    """Send every kind of request that names a session."""
    path = f"/api/v1/sessions/{session_id}"
    chat = await app.chat(headers=headers, session_id=session_id)
    if chat.status == 200:
        await chat.body()
    replies = [chat]
    for method, each in (("GET", path), ("GET", f"{path}/stream"), ("DELETE", path)):
        replies.append(await (await app.connect()).request(method, each, headers=headers))
    return replies


def count_proxy_warnings(app: RunningService) -> int:
    warnings = [each["event"] for each in app.log.entries if each["level"] == "warning"]
    return sum("127.0.0.1 forwards requests without X-Forwarded-For" in each for each in warnings)


@pytest.mark.parametrize("headers", UNNAMED.values(), ids=UNNAMED)
async def test_chosen_id_behind_a_trusted_proxy_that_names_no_client_returns_422_and_warns_once(
    relay: StartRelay, headers: dict[str, str]
) -> None:
    app, provider = await relay(say_hello, FORWARDED_ALLOW_IPS="127.0.0.1", RATE_LIMIT="off")
    for reply in await request_chosen_id(app, headers):
        error = await reply.error()
        assert (reply.status, error["code"]) == (422, "invalid_request")
        [problem] = error["fields"]
        assert problem["field"] == "session_id"
        assert "FORWARDED_ALLOW_IPS" in problem["message"]
    assert provider.requests == []
    assert count_proxy_warnings(app) == 1


@pytest.mark.parametrize(
    "headers",
    [
        {"x-forwarded-for": "192.0.2.1"},
        {"x-forwarded-for": "192.0.2.1", "forwarded": "for=192.0.2.1"},
        {},
        *({**each, "authorization": f"Bearer {KEY}"} for each in UNNAMED.values()),
    ],
    ids=["named", "named_twice", "direct", *(f"key_and_{each}" for each in UNNAMED)],
)
async def test_chosen_id_is_accepted_if_the_client_is_named_or_has_a_key(
    relay: StartRelay, headers: dict[str, str]
) -> None:
    settings = {"FORWARDED_ALLOW_IPS": "127.0.0.1", "API_KEYS": f"app:{KEY}", "RATE_LIMIT": "off"}
    app, _ = await relay(say_hello, **settings)
    statuses = [reply.status for reply in await request_chosen_id(app, headers)]
    assert statuses == [200, 200, 204, 204]
    assert count_proxy_warnings(app) == 0


@pytest.mark.parametrize("headers", UNNAMED.values(), ids=UNNAMED)
async def test_issued_id_is_accepted_behind_a_trusted_proxy_that_names_no_client(
    relay: StartRelay, headers: dict[str, str]
) -> None:
    app, _ = await relay(say_hello, FORWARDED_ALLOW_IPS="127.0.0.1", RATE_LIMIT="off")
    reply = await app.chat(headers=headers)
    await reply.body()
    replies = await request_chosen_id(app, headers, reply.headers["x-session-id"])
    assert [reply.status for reply in replies] == [200, 200, 204, 204]


# ---- wrong keys


async def test_anonymous_caller_without_tokens_does_not_limit_wrong_keys_at_its_address(
    service: StartService,
) -> None:
    app = await service(RATE_LIMIT="1/day", API_KEYS=f"app:{KEY}")
    wrong = {"authorization": "Bearer wrong"}
    statuses = [(await app.chat(headers=each)).status for each in ({}, {}, wrong, wrong, {})]
    assert statuses == [200, 429, 401, 429, 429]


# ---- streams that do not start, and responses that cost too much to send


@pytest.mark.parametrize(
    "line",
    [b": wait\n", b": wait\n\n", b"\n", b"\r\n", b"id: 1\n", b"retry: 1\n\n", b'data: {"a":1}\n\n'],
    ids=["comments", "comment_blocks", "lf", "crlf", "ids", "retries", "other_events"],
)
async def test_endless_data_before_the_first_chunk_is_an_error_after_1_mib(
    relay: StartRelay, line: bytes
) -> None:
    data = http_chunk(line * (65536 // len(line)))
    sent = 0

    async def flood(request: Connection) -> None:
        nonlocal sent
        await request.send(HEAD)
        while not request.closed.is_set():
            await request.send(data)
            sent += len(data)

    app, provider = await relay(flood, **ENDLESS)
    reply = await app.chat()
    error = await reply.error()
    assert (reply.status, error["code"]) == (502, "upstream_error")
    assert "1 MiB" in error["message"]
    await provider.requests[0].closed.wait()
    # The kernel's buffers contain the rest.
    assert 2**20 < sent < 2**24


async def test_endless_one_character_chunks_end_at_max_sent_bytes(relay: StartRelay) -> None:
    data = http_chunk(delta("x") * 1000)

    async def flood(request: Connection) -> None:
        await request.send(HEAD)
        while not request.closed.is_set():
            await request.send(data)

    app, provider = await relay(flood, **ENDLESS)
    reply = await exchange(app, encode_http_1_0("POST", CHAT, HELLO))
    _, _, body = reply.partition(b"\r\n\r\n")
    chunks, last = body.removesuffix(b"\n\n").rsplit(b"\n\n", 1)
    end = json.loads(last.removeprefix(b"data: "))
    assert (end["status"], end["error"]["code"]) == ("error", "upstream_error")
    assert MAX_SENT_BYTES // 2 < len(chunks) <= MAX_SENT_BYTES
    await provider.requests[0].closed.wait()


# ---- content encodings


@pytest.mark.parametrize("encoding", [b"none", b"", b"identity", b"NONE"], ids=repr)
async def test_stream_with_a_content_encoding_that_changes_nothing_is_read(
    relay: StartRelay, encoding: bytes
) -> None:
    async def script(request: Connection) -> None:
        head = HEAD.replace(b"\r\n\r\n", b"\r\ncontent-encoding: %b\r\n\r\n" % encoding)
        await request.send(head + http_chunk(delta("Hi") + FINISH + DONE) + END)

    app, _ = await relay(script)
    text, last = await read_to_end(await app.chat())
    assert (text, get_outcome(last)) == ("Hi", "done")


@pytest.mark.parametrize(
    ("encoding", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress)]
)
async def test_compressed_error_body_is_classified(
    relay: StartRelay, encoding: str, compress: Callable[[bytes], bytes]
) -> None:
    error = {"error": {"message": "no", "code": "context_length_exceeded"}}
    body = compress(json.dumps(error).encode())

    async def script(request: Connection) -> None:
        await request.send(response(400, body, f"content-encoding: {encoding}"))

    app, _ = await relay(script)
    assert await (await app.chat()).status_and_code() == (422, "context_too_long")


async def test_compressed_error_body_that_is_damaged_is_classified_by_its_status(
    relay: StartRelay,
) -> None:
    async def script(request: Connection) -> None:
        await request.send(response(400, b"no gzip", "content-encoding: gzip"))

    app, _ = await relay(script)
    assert await (await app.chat()).status_and_code() == (502, "upstream_error")


async def test_error_body_without_end_is_read_up_to_a_limit(relay: StartRelay) -> None:
    async def script(request: Connection) -> None:
        await request.send(response(400, b"x" * 2**20)[:-1])

    app, _ = await relay(script)
    assert await (await app.chat()).status_and_code() == (502, "upstream_error")


async def test_web_page_with_status_200_is_an_upstream_error(relay: StartRelay) -> None:
    async def script(request: Connection) -> None:
        await request.send(response(200, b"<html>", "content-type: text/html"))

    app, _ = await relay(script)
    assert await (await app.chat()).status_and_code() == (502, "upstream_error")


async def test_mock_waits_for_a_client_that_does_not_read(service: StartService) -> None:
    env = {"MODELS": "mock/*", "WRITE_TIMEOUT_SECONDS": "0.3", "MAX_MESSAGE_CHARS": "1000000"}
    app = await service(**env, MAX_BODY_BYTES="8000000")
    client = await connect_slow_client(app.url)
    app.clients.append(client)
    # The mock echoes one chunk per word.
    message = " ".join(["x" * 5000] * 190)
    await client.chat(message, model_id="mock/echo")
    line = await app.log.wait_for_request()
    assert line["outcome"] == "client_stalled"
    assert line["chunks"] < 190


# ---- the end of a stream


async def test_text_after_a_final_finish_reason_cancels_the_end(relay: StartRelay) -> None:
    more = asyncio.Event()

    async def script(request: Connection) -> None:
        await request.stream(delta("Hel"), FINISH)
        await more.wait()
        await request.send_events(delta("lo"))
        await request.send_events(FINISH, DONE)
        await request.send(END)

    app, _ = await relay(script)
    reply = await app.chat()
    assert (await reply.event())["chunk"] == "Hel"
    more.set()
    text, last = await read_to_end(reply)
    assert (text, get_outcome(last)) == ("lo", "done")


async def test_connection_that_is_reset_after_a_final_finish_reason_does_not_spoil_the_response(
    relay: StartRelay,
) -> None:
    async def script(request: Connection) -> None:
        await request.stream(delta("Hello"), FINISH)
        request.reset()

    app, _ = await relay(script)
    text, last = await read_to_end(await app.chat())
    assert (text, get_outcome(last)) == ("Hello", "done")


FAILURES = ("error", "network_error", "abort", "insufficient_system_resource")


@pytest.mark.parametrize("word", FAILURES)
@pytest.mark.parametrize("advice", ["retry", "failover"])
async def test_failure_as_finish_reason_before_the_first_chunk_is_tried_again(
    word: str, advice: str
) -> None:
    async def fail(request: Connection) -> None:
        await request.stream(delta(finish_reason=word), DONE)
        await request.send(END)

    async def fail_once(request: Connection) -> None:
        await (fail if len(play.upstream.requests) == 1 else say_hello)(request)

    retrying = advice == "retry"
    scripts = [fail_once] if retrying else [fail, say_hello]
    env = {"MAX_RETRIES": "1"} if retrying else {"FALLBACK_MODELS": "b/m"}
    async with run_scenario(*scripts, **env) as play:
        text, last = await read_to_end(await play.chat())
        assert (text, get_outcome(last)) == ("Hello", "done")
        attempts = (await play.wait_for_log_line())["attempts"]
        assert [each["error"] for each in attempts] == ["upstream_incomplete", None]
        assert await play.read_responses() == [("Hello", True)]


@pytest.mark.parametrize("word", FAILURES)
async def test_failure_as_finish_reason_after_text_is_an_error_and_stored_as_incomplete(
    word: str,
) -> None:
    async def script(request: Connection) -> None:
        await request.stream(delta("Hel"), delta(finish_reason=word), DONE)
        await request.send(END)

    # Neither a retry nor a failover: the client has read text.
    async with run_scenario(script, say_hello, FALLBACK_MODELS="b/m", MAX_RETRIES="1") as play:
        text, last = await read_to_end(await play.chat())
        assert (text, get_outcome(last)) == ("Hel", "upstream_incomplete")
        assert await play.read_responses() == [("Hel", False)]
        assert play.upstreams[1].requests == []


async def test_final_finish_reason_ends_the_stream_though_comments_follow_for_ever(
    relay: StartRelay,
) -> None:
    usage = {"total_tokens": 2}

    async def script(request: Connection) -> None:
        await request.stream(delta("Hi"), FINISH, event({"choices": [], "usage": usage}))
        while not request.closed.is_set():
            await request.send_events(b": still here\n\n")
            # Not to be idle for as long as FINISH_SECONDS.
            with anyio.move_on_after(0.5):
                await request.closed.wait()

    app, provider = await relay(script, **ENDLESS)
    reply = await app.chat()
    assert (await reply.event())["chunk"] == "Hi"
    with anyio.fail_after(TIMEOUT_SECONDS):
        [done] = await reply.events()
    assert (done["status"], done["finish_reason"], done["usage"]) == ("done", "stop", usage)
    await provider.requests[0].closed.wait()


def test_limit_of_open_files_that_is_too_low_for_max_streams_is_reported() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    warning = raise_descriptor_limit(from_env({"MAX_STREAMS": "1000000000"}))
    assert (warning is None) == (hard == resource.RLIM_INFINITY or hard > 2 * 10**9)


async def test_flood_behind_a_request_that_is_not_answered_is_reset(relay: StartRelay) -> None:
    app, _ = await relay(say_hel)
    client = await app.connect()
    await client.chat()
    with anyio.fail_after(TIMEOUT_SECONDS), pytest.raises(ConnectionError):
        await send_forever(client, b"x" * 2**16)
