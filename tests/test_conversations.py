"""Sessions over HTTP: what is stored, what a provider gets, and who may use a session."""

import asyncio
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest

from settings import SettingsError, from_env
from tests.client import Response
from tests.conftest import (
    RunningService,
    StartRelay,
    StartService,
    StartUpstream,
    openai_env,
    running_service,
)
from tests.test_sessions import (
    FAILURE_MODES,
    UNKNOWN_ISSUED_ID,
    Clock,
    connect,
    count_stored,
    exclusive_locks,
    failing_writes,
    make_turn,
    open_store,
    store_turns,
)
from tests.upstream import DONE, END, Connection, Script, delta, event, response

Headers = Mapping[str, str]
# Role, text, and whether the text is complete.
StoredMessage = tuple[str, str, bool]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "chat.db"


def file_env(file: Path, **more: str) -> dict[str, str]:
    return {"STATE_URL": f"sqlite:///{file}", "RATE_LIMIT": "off", **more}


# ---- scripts of the provider


async def echo(request: Connection) -> None:
    """Respond with the newest message, in two chunks."""
    await request.complete("You said ", request.body["messages"][-1]["content"])


def first(script: Script) -> Script:
    """Return a script that plays `script` for the first request and echoes the others."""
    scripts = [script]

    async def play(request: Connection) -> None:
        await (scripts.pop() if scripts else echo)(request)

    return play


def end_after(*events: bytes) -> Script:
    async def script(request: Connection) -> None:
        await request.stream(*events)
        await request.send(END)

    return script


async def wait_after_text(request: Connection) -> None:
    await request.stream(delta("You sa"))


async def reset_after_text(request: Connection) -> None:
    await request.stream(delta("You sa"))
    request.reset()


async def send_400(request: Connection) -> None:
    await request.send(response(400, b"{}"))


async def send_nothing(request: Connection) -> None:
    pass


async def finish(request: Connection) -> None:
    """End a stream that has started."""
    await request.send_events(delta(finish_reason="stop"), DONE)
    await request.send(END)


complete_without_text = end_after(delta(finish_reason="length"), DONE)
truncate_after_text = end_after(delta("You sa"))
fail_after_text = end_after(delta("You sa"), event({"error": {"message": "no"}}))


# ---- requests for a session and the expected messages


async def request_session(
    app: RunningService, method: str, session_id: str, headers: Headers | None = None
) -> Response:
    """Send GET or DELETE for a session on a new connection."""
    client = await app.connect()
    return await client.request(method, f"/api/v1/sessions/{session_id}", headers=headers)


async def read_messages(
    app: RunningService, session_id: str, headers: Headers | None = None
) -> list[StoredMessage]:
    reply = await request_session(app, "GET", session_id, headers)
    assert reply.status == 200
    messages = (await reply.json())["messages"]
    return [(each["role"], each["content"], each["complete"]) for each in messages]


def echoed(*messages: str) -> list[StoredMessage]:
    """Return the stored messages of a session in which `echo` responded to `messages`."""
    return [
        line
        for message in messages
        for line in (("user", message, True), ("assistant", f"You said {message}", True))
    ]


def provider_messages(*messages: StoredMessage) -> list[dict[str, str]]:
    """Return the messages as a provider gets them."""
    return [{"role": role, "content": content} for role, content, _ in messages]


# ---- what a session contains


@pytest.mark.parametrize(
    "runs", [[("one", "two", "three")], [("one",), ("two",), ("three",)]], ids=["once", "restarts"]
)
@pytest.mark.parametrize("session_id", [None, "mine"])
async def test_provider_gets_system_prompt_history_and_new_message(
    upstream: StartUpstream, file: Path, runs: list[tuple[str, ...]], session_id: str | None
) -> None:
    provider = await upstream(echo)
    env = openai_env(provider.url, SYSTEM_PROMPT="Be brief.", **file_env(file))
    for run in runs:
        async with running_service(env) as app:
            for message in run:
                reply = await app.chat(message, session_id=session_id)
                done = (await reply.events())[-1]
                assert done["status"] == "done"
                assert done["session_id"] == reply.headers["x-session-id"]
                assert session_id in (None, done["session_id"])
                session_id = done["session_id"]
    system = ("system", "Be brief.", True)
    assert [request.body["messages"] for request in provider.requests] == [
        provider_messages(system, ("user", "one", True)),
        provider_messages(system, *echoed("one"), ("user", "two", True)),
        provider_messages(system, *echoed("one", "two"), ("user", "three", True)),
    ]


async def test_history_over_history_max_chars_is_trimmed_to_half_of_it(relay: StartRelay) -> None:
    app, provider = await relay(echo, RATE_LIMIT="off", HISTORY_MAX_CHARS="120")
    # A turn has 29 characters. The newest turn stays even if it alone is over the limit.
    for message in (*["a" * 10] * 6, "b" * 120, "c"):
        await (await app.chat(message, session_id="mine")).events()
    turns = [len(request.body["messages"]) // 2 for request in provider.requests]
    assert turns == [0, 1, 2, 3, 4, 2, 3, 1]
    assert provider.requests[-1].body["messages"] == provider_messages(
        *echoed("b" * 120), ("user", "c", True)
    )


async def test_get_session_returns_times_and_messages(relay: StartRelay) -> None:
    app, _ = await relay(echo, SESSION_TTL_SECONDS="90")
    before = datetime.now(UTC)
    session_id = (await (await app.chat("Hi")).events())[-1]["session_id"]
    reply = await request_session(app, "GET", session_id)
    after = datetime.now(UTC)
    view = await reply.json()
    assert (reply.status, reply.headers["content-type"]) == (200, "application/json")
    assert reply.headers["cache-control"] == "no-store"
    assert list(view) == ["session_id", "created_at", "expires_at", "messages"]
    assert view["session_id"] == session_id
    message, reply_message = view["messages"]
    times = [view["created_at"], message.pop("created_at"), reply_message.pop("created_at")]
    assert message == {"role": "user", "content": "Hi", "complete": True}
    assert reply_message == {"role": "assistant", "content": "You said Hi", "complete": True}
    times.append(view["expires_at"])
    for text in times:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", text)
    created_at, message_at, response_at, expires_at = map(datetime.fromisoformat, times)
    # Times are truncated to whole milliseconds.
    millisecond = timedelta(milliseconds=1)
    assert before - millisecond <= created_at <= message_at <= response_at <= after
    assert abs(expires_at - response_at - timedelta(seconds=90)) <= millisecond


def test_ttl_beyond_the_last_representable_date_stops_the_start() -> None:
    with pytest.raises(SettingsError, match="SESSION_TTL_SECONDS"):
        from_env({"SESSION_TTL_SECONDS": "1e12"})


async def test_turn_is_stored_and_session_unlocked_when_done_is_sent(
    relay: StartRelay, file: Path
) -> None:
    app, _ = await relay(echo, **file_env(file))
    messages: list[str] = []
    for message in "abcdefghijklmnop":
        reply = await app.chat(message, session_id="mine")
        while "status" not in await reply.event():
            pass
        # Right after the event, before the end of the body.
        messages.append(message)
        assert await read_messages(app, "mine") == echoed(*messages)


@pytest.mark.parametrize(
    "script", [wait_after_text, reset_after_text, fail_after_text, truncate_after_text]
)
async def test_text_of_a_truncated_response_is_stored_as_incomplete(
    relay: StartRelay, file: Path, script: Script
) -> None:
    app, provider = await relay(first(script), **file_env(file))
    client = await app.connect()
    reply = await client.chat("Hi", session_id="mine")
    assert (await reply.event())["chunk"] == "You sa"
    if script is wait_after_text:
        client.disconnect()
    else:
        assert (await reply.event())["status"] == "error"
    await app.log.wait_for_request()
    truncated = [("user", "Hi", True), ("assistant", "You sa", False)]
    assert await read_messages(app, "mine") == truncated
    await (await app.chat("Go on", session_id="mine")).events()
    messages = provider.requests[1].body["messages"]
    assert messages == provider_messages(*truncated, ("user", "Go on", True))
    assert await read_messages(app, "mine") == [*truncated, *echoed("Go on")]
    assert await app.metric("chat_active_streams") == 0


@pytest.mark.parametrize(
    ("script", "status"), [(send_400, 502), (complete_without_text, 200), (send_nothing, None)]
)
async def test_response_without_text_stores_the_session_without_a_turn(
    relay: StartRelay, file: Path, script: Script, status: int | None
) -> None:
    app, provider = await relay(first(script), **file_env(file))
    client = await app.connect()
    chatting = asyncio.create_task(client.chat("Hi", session_id="mine"))
    await provider.wait_for_request()
    if status is None:
        client.disconnect()
        await asyncio.wait([chatting])
        assert chatting.exception() is not None
        assert (await app.log.wait_for_request())["outcome"] == "client_disconnected"
    else:
        reply = await chatting
        assert reply.status == status
        await reply.body()
    assert await read_messages(app, "mine") == []
    await (await app.chat("Hello?", session_id="mine")).events()
    messages = provider.requests[1].body["messages"]
    assert messages == provider_messages(("user", "Hello?", True))
    assert await read_messages(app, "mine") == echoed("Hello?")
    assert await app.metric("chat_active_streams") == 0


# ---- failures of the store


@pytest.mark.parametrize(
    "fail", [*(partial(failing_writes, mode=mode) for mode in FAILURE_MODES), exclusive_locks]
)
async def test_turn_that_cannot_be_stored_ends_in_an_error_and_the_next_is_stored(
    relay: StartRelay,
    file: Path,
    fail: Callable[[Path], AbstractContextManager[None]],
) -> None:
    app, provider = await relay(echo, **file_env(file))
    await (await app.chat("one", session_id="mine")).events()
    with fail(file):
        events = await (await app.chat("two", session_id="mine")).events()
        assert await read_messages(app, "mine") == echoed("one")
    *chunks, last = events
    assert [each["chunk"] for each in chunks] == ["You said ", "two"]
    assert (last["status"], last["session_id"]) == ("error", "mine")
    assert (last["error"]["code"], last["error"]["retryable"]) == ("state_unavailable", True)
    await (await app.chat("three", session_id="mine")).events()
    messages = provider.requests[-1].body["messages"]
    assert messages == provider_messages(*echoed("one"), ("user", "three", True))
    assert await read_messages(app, "mine") == echoed("one", "three")
    assert await app.metric("chat_active_streams") == 0


@pytest.mark.parametrize(("session_id", "requests"), [("mine", 0), (None, 1)])
async def test_session_that_cannot_be_stored_returns_503_if_nothing_was_sent(
    relay: StartRelay,
    file: Path,
    session_id: str | None,
    requests: int,
) -> None:
    app, provider = await relay(first(complete_without_text), **file_env(file))
    with failing_writes(file):
        reply = await app.chat("Hi", session_id=session_id)
    assert reply.headers["retry-after"] == "1"
    assert await reply.status_and_code() == (503, "state_unavailable")
    assert len(provider.requests) == requests
    assert (await (await app.chat("Hi", session_id=session_id)).events())[-1]["status"] == "done"
    assert await app.metric("chat_active_streams") == 0


async def test_session_deleted_during_a_response_passes_nothing_to_its_successor(
    relay: StartRelay, file: Path
) -> None:
    app, provider = await relay(first(wait_after_text), **file_env(file))
    old = await app.chat("old", session_id="mine")
    assert (await old.event())["chunk"] == "You sa"
    with connect(file) as db:
        db.execute("DELETE FROM session")
    await (await app.chat("new", session_id="mine")).events()
    messages = provider.requests[1].body["messages"]
    assert messages == provider_messages(("user", "new", True))
    await finish(provider.requests[0])
    (last,) = await old.events()
    assert (last["status"], last["error"]["code"]) == ("error", "state_unavailable")
    assert await read_messages(app, "mine") == echoed("new")


# ---- one response at a time


@pytest.mark.parametrize("issued", [True, False])
async def test_session_with_a_running_response_can_be_read_but_not_used_or_deleted(
    relay: StartRelay, issued: bool
) -> None:
    app, provider = await relay(echo, RATE_LIMIT="off")
    reply = await app.chat("one", session_id=None if issued else "mine")
    session_id = reply.headers["x-session-id"]
    await reply.events()
    provider.script = wait_after_text
    client = await app.connect()
    await (await client.chat("two", session_id=session_id)).event()
    assert await read_messages(app, session_id) == echoed("one")
    for busy in (
        await app.chat("three", session_id=session_id),
        await request_session(app, "DELETE", session_id),
    ):
        assert busy.headers["retry-after"] == "1"
        assert await busy.status_and_code() == (409, "session_busy")
    client.disconnect()
    await provider.requests[1].closed.wait()
    assert (await app.log.wait_for_request(4))["outcome"] == "client_disconnected"
    deleted = await request_session(app, "DELETE", session_id)
    assert (deleted.status, await deleted.body()) == (204, b"")
    for method in ("GET", "DELETE"):
        reply = await request_session(app, method, session_id)
        assert await reply.status_and_code() == (404, "session_not_found")
    provider.script = echo
    again = await app.chat("three", session_id=session_id)
    if issued:
        assert await again.status_and_code() == (404, "session_not_found")
    else:
        assert (await again.events())[-1]["status"] == "done"
        assert await read_messages(app, session_id) == echoed("three")


# ---- who may use a session

KEYS = {"app": "app-key-0123456789abcdef", "web": "web-key-0123456789abcdef"}
ROTATED = "app-new-0123456789abcdef"


def bearer(key: str) -> Headers:
    return {"authorization": f"Bearer {key}"}


def from_address(address: str) -> Headers:
    return {"x-forwarded-for": address}


CALLERS = {
    "API_KEYS": ",".join([*(f"{name}:{key}" for name, key in KEYS.items()), f"app:{ROTATED}"]),
    "FORWARDED_ALLOW_IPS": "127.0.0.1",
    "RATE_LIMIT": "off",
}
V4 = from_address("192.0.2.1")
V6 = from_address("2001:db8:1:2::1")


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        (V4, V4, True),
        (V4, from_address("192.0.2.2"), False),
        (V4, V6, False),
        (V6, from_address("2001:db8:1:2:ffff::9"), True),
        (V6, from_address("2001:db8:1:3::1"), False),
        (bearer(KEYS["app"]), bearer(ROTATED), True),
        (bearer(KEYS["app"]), bearer(KEYS["web"]), False),
        (bearer(KEYS["app"]), V4, False),
    ],
)
async def test_chosen_id_is_private_to_the_key_or_address(
    relay: StartRelay, one: Headers, other: Headers, shared: bool
) -> None:
    app, provider = await relay(echo, **CALLERS)
    await (await app.chat("mine", headers=one, session_id="demo")).events()
    if not shared:
        for method in ("GET", "DELETE"):
            reply = await request_session(app, method, "demo", other)
            assert await reply.status_and_code() == (404, "session_not_found")
    await (await app.chat("theirs", headers=other, session_id="demo")).events()
    history = echoed("mine") if shared else []
    messages = provider.requests[1].body["messages"]
    assert messages == provider_messages(*history, ("user", "theirs", True))
    assert await read_messages(app, "demo", one) == echoed("mine", *["theirs"] * shared)


@pytest.mark.parametrize(
    ("owner", "user", "allowed"),
    [
        (V4, from_address("198.51.100.7"), True),
        (V4, bearer(KEYS["app"]), True),
        (bearer(KEYS["app"]), bearer(ROTATED), True),
        (bearer(KEYS["app"]), bearer(KEYS["web"]), False),
        (bearer(KEYS["app"]), V4, False),
    ],
)
async def test_issued_id_is_a_credential_and_also_needs_the_key_it_was_issued_to(
    relay: StartRelay, owner: Headers, user: Headers, allowed: bool
) -> None:
    app, provider = await relay(echo, **CALLERS)
    reply = await app.chat("one", headers=owner)
    issued = reply.headers["x-session-id"]
    await reply.events()
    foreign = await app.chat("two", headers=user, session_id=issued)
    if allowed:
        await foreign.events()
        assert await read_messages(app, issued, user) == echoed("one", "two")
        assert (await request_session(app, "DELETE", issued, user)).status == 204
        return
    unknown = await app.chat("two", headers=user, session_id=UNKNOWN_ISSUED_ID)
    assert (foreign.status, unknown.status) == (404, 404)
    assert await foreign.error() == await unknown.error(), "the two must be indistinguishable"
    for method in ("GET", "DELETE"):
        reply = await request_session(app, method, issued, user)
        assert await reply.status_and_code() == (404, "session_not_found")
    assert len(provider.requests) == 1
    assert await read_messages(app, issued, owner) == echoed("one")


@pytest.mark.parametrize("header", ["x-forwarded-for", "forwarded"])
async def test_anonymous_caller_behind_an_unconfigured_proxy_may_not_choose_an_id(
    relay: StartRelay, header: str
) -> None:
    key = bearer(KEYS["app"])
    app, provider = await relay(echo, API_KEYS=f"app:{KEYS['app']}")
    proxied = {header: "for=192.0.2.1"}
    for reply in (
        await app.chat("Hi", headers=proxied, session_id="demo"),
        await request_session(app, "GET", "demo", proxied),
        await request_session(app, "DELETE", "demo", proxied),
    ):
        error = await reply.error()
        assert (reply.status, error["code"]) == (422, "invalid_request")
        (problem,) = error["fields"]
        assert problem["field"] == "session_id"
        assert "FORWARDED_ALLOW_IPS" in problem["message"]
    assert provider.requests == []
    # An issued id works, and so does a chosen id with a key or without the proxy.
    reply = await app.chat("one", headers=proxied)
    issued = reply.headers["x-session-id"]
    await reply.events()
    await (await app.chat("two", headers=proxied, session_id=issued)).events()
    assert await read_messages(app, issued, proxied) == echoed("one", "two")
    callers: list[Headers] = [{**proxied, **key}, {}]
    for headers in callers:
        await (await app.chat("Hi", headers=headers, session_id="demo")).events()
        assert await read_messages(app, "demo", headers) == echoed("Hi")


async def test_caller_without_a_valid_address_may_not_choose_an_id(relay: StartRelay) -> None:
    app, _ = await relay(echo, **CALLERS)
    unknown = from_address("unknown")
    reply = await app.chat("Hi", headers=unknown, session_id="demo")
    assert await reply.status_and_code() == (422, "invalid_request")
    reply = await app.chat("Hi", headers=unknown)
    issued = reply.headers["x-session-id"]
    await reply.events()
    assert (await app.chat("Hi", headers=unknown, session_id=issued)).status == 200


# ---- limits, log and expiry


async def test_reading_and_deleting_a_session_take_tokens(relay: StartRelay) -> None:
    app, _ = await relay(echo, RATE_LIMIT="4/day")
    chat = await app.chat("Hi", session_id="mine")
    await chat.events()
    methods = ("GET", "DELETE", "GET", "GET", "DELETE")
    replies = [chat, *[await request_session(app, method, "mine") for method in methods]]
    assert [reply.status for reply in replies] == [200, 200, 204, 404, 429, 429]
    remaining = [int(reply.headers["ratelimit"].split("r=")[1].split(";")[0]) for reply in replies]
    assert remaining == [3, 2, 1, 0, 0, 0]
    assert all(reply.headers["ratelimit-policy"] for reply in replies)


async def test_log_has_a_hash_instead_of_the_session_id(relay: StartRelay) -> None:
    app, _ = await relay(echo, RATE_LIMIT="off")
    reply = await app.chat("Hi")
    issued, chosen = reply.headers["x-session-id"], "a-chosen-id"
    await reply.events()
    for session_id in (issued, chosen, UNKNOWN_ISSUED_ID):
        await (await app.chat("Hi", session_id=session_id)).body()
        for method in ("GET", "DELETE", "GET"):
            await (await request_session(app, method, session_id)).body()
    await app.log.wait_for_request(12)
    lines = app.log.requests()
    assert len(lines) == 13
    assert len({line["session"] for line in lines if "session" in line}) == 3
    for line in app.log.lines:
        assert not any(session_id in line for session_id in (issued, chosen, UNKNOWN_ISSUED_ID))


async def test_running_service_deletes_expired_sessions(service: StartService, file: Path) -> None:
    async with open_store(file, Clock(0.0)) as store:
        await store_turns(store, "mine", make_turn(at=0.0))
    app = await service(**file_env(file))
    # The first sweep precedes the first request in the store's only thread.
    assert (await app.get("/readyz")).status == 200
    assert (count_stored(file, "session"), count_stored(file, "turn")) == (0, 0)


async def test_sessions_in_memory_end_with_the_service(upstream: StartUpstream) -> None:
    provider = await upstream(echo)
    for _ in range(2):
        async with running_service(openai_env(provider.url, STATE_URL="memory://")) as app:
            assert (await request_session(app, "GET", "mine")).status == 404
            await (await app.chat("Hi", session_id="mine")).events()
            assert await read_messages(app, "mine") == echoed("Hi")
