"""Sessions through the service, over real sockets: what is remembered, whose it is, and what is
left when an answer is cut or can't be stored."""

import asyncio
import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from settings import SettingsError, from_env
from tests.client import Response
from tests.conftest import RunningService, StartService, StartUpstream, running_service
from tests.test_service import openai
from tests.test_sessions import FAILURE_MODES as FAILURES
from tests.test_sessions import UNKNOWN_ISSUED_ID as NOBODYS_GUESS
from tests.test_sessions import Clock
from tests.test_sessions import connect as other_connection
from tests.test_sessions import count_stored as count
from tests.test_sessions import exclusive_locks as held
from tests.test_sessions import failing_writes as storing_fails
from tests.test_sessions import make_turn as said
from tests.test_sessions import open_store as opened
from tests.test_sessions import store_turns as talk
from tests.upstream import DONE, END, Connection, Script, Upstream, delta, event, response

Headers = Mapping[str, str]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "chat.db"


async def repeat(request: Connection) -> None:
    """Answers with the newest message, in two chunks."""
    await request.complete("You said ", request.body["messages"][-1]["content"])


def first(script: Script) -> Script:
    """`script` for the first request, and a plain answer to those after it."""
    scripts = [script]

    async def play(request: Connection) -> None:
        await (scripts.pop() if scripts else repeat)(request)

    return play


def ending(*events: bytes) -> Script:
    """A provider that sends these events and ends its stream."""

    async def script(request: Connection) -> None:
        await request.stream(*events)
        await request.send(END)

    return script


async def say_and_hold(request: Connection) -> None:
    await request.stream(delta("You sa"))


async def say_and_reset(request: Connection) -> None:
    await request.stream(delta("You sa"))
    request.reset()


async def refuse(request: Connection) -> None:
    await request.send(response(400, b"{}"))


say_nothing = ending(delta(finish_reason="length"), DONE)
say_and_stop = ending(delta("You sa"))
say_and_fail = ending(delta("You sa"), event({"error": {"message": "no"}}))


def stored_in(file: Path, **more: str) -> dict[str, str]:
    return {"STATE_URL": f"sqlite:///{file}", "RATE_LIMIT": "off", **more}


async def on_session(
    app: RunningService, method: str, session_id: str, headers: Headers | None = None
) -> Response:
    """GET or DELETE, on a connection of its own."""
    client = await app.connect()
    return await client.request(method, f"/api/v1/sessions/{session_id}", headers=headers)


async def remembered(
    app: RunningService, session_id: str, headers: Headers | None = None
) -> list[tuple[str, str, bool]]:
    reply = await on_session(app, "GET", session_id, headers)
    assert reply.status == 200
    messages = (await reply.json())["messages"]
    return [(each["role"], each["content"], each["complete"]) for each in messages]


def answered(*messages: str) -> list[tuple[str, str, bool]]:
    """What is remembered of these, said to `repeat`."""
    return [
        line
        for message in messages
        for line in (("user", message, True), ("assistant", f"You said {message}", True))
    ]


def sent(*lines: tuple[str, str, bool]) -> list[dict[str, str]]:
    """The same as a provider gets it."""
    return [{"role": role, "content": content} for role, content, _ in lines]


async def classify_error(reply: Response) -> tuple[int, str]:
    return reply.status, (await reply.json())["error"]["code"]


@pytest.mark.parametrize(
    "runs", [[("one", "two", "three")], [("one",), ("two",), ("three",)]], ids=["once", "restarts"]
)
@pytest.mark.parametrize("session_id", [None, "mine"])
async def test_each_turn_sends_the_system_prompt_all_that_was_said_and_the_new_message(
    upstream: StartUpstream, file: Path, runs: list[tuple[str, ...]], session_id: str | None
) -> None:
    provider = await upstream(repeat)
    env = openai(provider.url, SYSTEM_PROMPT="Be brief.", **stored_in(file))
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
        sent(system, ("user", "one", True)),
        sent(system, *answered("one"), ("user", "two", True)),
        sent(system, *answered("one", "two"), ("user", "three", True)),
    ]


async def test_a_provider_gets_no_more_than_the_history_that_fits(
    service: StartService, upstream: StartUpstream
) -> None:
    provider = await upstream(repeat)
    app = await service(**openai(provider.url, RATE_LIMIT="off", HISTORY_MAX_CHARS="60"))
    for message in ("a" * 10, "b" * 10, "c" * 11, "d" * 60, "e"):
        await (await app.chat(message, session_id="mine")).events()
    sizes = [
        [len(each["content"]) for each in request.body["messages"]] for request in provider.requests
    ]
    assert sizes == [
        [10],
        [10, 19, 10],
        [10, 19, 10, 19, 11],
        [11, 20, 60],
        [60, 69, 1],
    ]


async def test_a_session_is_shown_as_the_contract_says(
    service: StartService, upstream: StartUpstream
) -> None:
    provider = await upstream(repeat)
    app = await service(**openai(provider.url, SESSION_TTL_SECONDS="90"))
    before = datetime.now(UTC)
    session_id = (await (await app.chat("Hi")).events())[-1]["session_id"]
    reply = await on_session(app, "GET", session_id)
    after = datetime.now(UTC)
    view = await reply.json()
    assert (reply.status, reply.headers["content-type"]) == (200, "application/json")
    assert reply.headers["cache-control"] == "no-store"
    assert list(view) == ["session_id", "created_at", "expires_at", "messages"]
    assert view["session_id"] == session_id
    asked, told = view["messages"]
    times = [view["created_at"], asked.pop("created_at"), told.pop("created_at")]
    assert asked == {"role": "user", "content": "Hi", "complete": True}
    assert told == {"role": "assistant", "content": "You said Hi", "complete": True}
    times.append(view["expires_at"])
    for text in times:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", text)
    created_at, message_at, told_at, expires_at = map(datetime.fromisoformat, times)
    # Shown are whole milliseconds, what is less cut off.
    assert before - timedelta(milliseconds=1) <= created_at <= message_at <= told_at <= after
    assert abs(expires_at - told_at - timedelta(seconds=90)) <= timedelta(milliseconds=1)


def test_a_life_that_ends_after_the_calendar_does_stops_the_start() -> None:
    with pytest.raises(SettingsError, match="SESSION_TTL_SECONDS"):
        from_env({"SESSION_TTL_SECONDS": "1e12"})


async def test_a_turn_is_stored_and_the_lock_free_before_done_arrives(
    service: StartService, upstream: StartUpstream, file: Path
) -> None:
    provider = await upstream(repeat)
    app = await service(**openai(provider.url, **stored_in(file)))
    told: list[str] = []
    for message in "abcdefghijklmnop":
        reply = await app.chat(message, session_id="mine")
        while "status" not in await reply.event():
            pass
        # Not at the end of the body but at once, and on another connection.
        told.append(message)
        assert await remembered(app, "mine") == answered(*told)


@pytest.mark.parametrize("script", [say_and_hold, say_and_reset, say_and_fail, say_and_stop])
async def test_what_was_said_of_an_answer_that_was_cut_is_kept_as_it_stands(
    service: StartService, upstream: StartUpstream, file: Path, script: Script
) -> None:
    provider = await upstream(first(script))
    app = await service(**openai(provider.url, **stored_in(file)))
    client = await app.connect()
    reply = await client.chat("Hi", session_id="mine")
    assert (await reply.event())["chunk"] == "You sa"
    if script is say_and_hold:
        client.disconnect()
    else:
        assert (await reply.event())["status"] == "error"
    await app.log.wait_for_request()
    cut = [("user", "Hi", True), ("assistant", "You sa", False)]
    assert await remembered(app, "mine") == cut
    await (await app.chat("Go on", session_id="mine")).events()
    assert provider.requests[1].body["messages"] == sent(*cut, ("user", "Go on", True))
    assert await remembered(app, "mine") == [*cut, *answered("Go on")]
    assert await app.metric("chat_active_streams") == 0


async def test_a_client_that_leaves_before_the_first_piece_leaves_a_session_without_turns(
    service: StartService, upstream: StartUpstream, file: Path
) -> None:
    async def hold(request: Connection) -> None:
        """Not a byte."""

    provider = await upstream(first(hold))
    app = await service(**openai(provider.url, **stored_in(file)))
    client = await app.connect()
    asking = asyncio.create_task(client.chat("Hi", session_id="mine"))
    await provider.wait_for_request()
    assert await remembered(app, "mine") == []
    client.disconnect()
    await asyncio.wait([asking])
    assert asking.exception() is not None
    assert (await app.log.wait_for_request(1))["outcome"] == "client_disconnected"
    assert await remembered(app, "mine") == []
    await (await app.chat("Hello?", session_id="mine")).events()
    assert provider.requests[1].body["messages"] == sent(("user", "Hello?", True))
    assert await app.metric("chat_active_streams") == 0


@pytest.mark.parametrize(("script", "status"), [(refuse, 502), (say_nothing, 200)])
async def test_an_answer_without_text_leaves_no_turn_but_the_session(
    service: StartService, upstream: StartUpstream, script: Script, status: int
) -> None:
    provider = await upstream(first(script))
    app = await service(**openai(provider.url))
    reply = await app.chat("Hi", session_id="mine")
    assert reply.status == status
    await reply.body()
    assert await remembered(app, "mine") == []
    await (await app.chat("Hello?", session_id="mine")).events()
    assert await remembered(app, "mine") == answered("Hello?")


def with_usage(usage: object) -> Script:
    return ending(
        delta("Hello"), delta(finish_reason="stop"), event({"choices": [], "usage": usage}), DONE
    )


@pytest.mark.parametrize(
    "script",
    [
        with_usage({"prompt_tokens": -1}),
        with_usage({"prompt_tokens": 10**400}),
        with_usage("many"),
        with_usage([1]),
        ending(delta([{"type": "text", "text": 5}]), delta(finish_reason="stop"), DONE),
        ending(delta("Hello"), delta(finish_reason=5), DONE),
        ending(event({"model": 5, "choices": [{"delta": {"content": "Hello"}}]}), DONE),
    ],
    ids=["negative", "huge", "text", "list", "part", "finish", "model"],
)
async def test_whatever_a_provider_sends_an_answer_ends_once_and_its_session_is_free(
    service: StartService, upstream: StartUpstream, script: Script
) -> None:
    provider = await upstream(first(script))
    app = await service(**openai(provider.url))
    client = await app.connect()
    reply = await client.chat("Hi", session_id="mine")
    await app.log.wait_for_request()
    assert await app.metric("chat_active_streams") == 0
    assert (await app.chat("Hello?", session_id="mine")).status == 200
    if reply.status == 200:
        assert "status" in (await reply.events())[-1]


@pytest.mark.parametrize("how", FAILURES)
async def test_an_answer_that_cannot_be_stored_ends_in_an_error_and_the_next_one_in_done(
    service: StartService, upstream: StartUpstream, file: Path, how: str
) -> None:
    provider = await upstream(repeat)
    app = await service(**openai(provider.url, **stored_in(file)))
    await (await app.chat("one", session_id="mine")).events()
    with storing_fails(file, how):
        events = await (await app.chat("two", session_id="mine")).events()
    assert [each.get("chunk") for each in events] == ["You said ", "two", None]
    assert (events[-1]["status"], events[-1]["session_id"]) == ("error", "mine")
    assert events[-1]["error"]["code"] == "state_unavailable"
    assert events[-1]["error"]["retryable"] is True
    assert await remembered(app, "mine") == answered("one")
    await (await app.chat("three", session_id="mine")).events()
    assert await remembered(app, "mine") == answered("one", "three")
    assert await app.metric("chat_active_streams") == 0


@pytest.mark.parametrize(("session_id", "asked"), [("mine", 0), (None, 1)])
async def test_where_nothing_was_sent_a_session_that_cannot_be_stored_is_a_503(
    service: StartService,
    upstream: StartUpstream,
    file: Path,
    session_id: str | None,
    asked: int,
) -> None:
    provider = await upstream(first(say_nothing))
    app = await service(**openai(provider.url, **stored_in(file)))
    with storing_fails(file):
        reply = await app.chat("Hi", session_id=session_id)
    assert reply.headers["retry-after"] == "1"
    assert await classify_error(reply) == (503, "state_unavailable")
    assert len(provider.requests) == asked
    assert (await (await app.chat("Hi", session_id=session_id)).events())[-1]["status"] == "done"
    assert await app.metric("chat_active_streams") == 0


async def test_while_another_process_holds_the_file_answers_end_in_errors_and_nothing_is_lost(
    service: StartService, upstream: StartUpstream, file: Path
) -> None:
    provider = await upstream(repeat)
    app = await service(**openai(provider.url, **stored_in(file)))
    await (await app.chat("one", session_id="mine")).events()
    with held(file):
        events = await (await app.chat("two", session_id="mine")).events()
        assert events[-1]["error"]["code"] == "state_unavailable"
        assert await remembered(app, "mine") == answered("one")
        assert (await app.get("/readyz")).status == 200
    assert (await (await app.chat("three", session_id="mine")).events())[-1]["status"] == "done"
    assert provider.requests[-1].body["messages"] == sent(*answered("one"), ("user", "three", True))
    assert await remembered(app, "mine") == answered("one", "three")


async def test_a_session_that_ends_under_its_answer_gives_nothing_to_the_next_of_its_name(
    service: StartService, upstream: StartUpstream, file: Path
) -> None:
    provider = await upstream(first(say_and_hold))
    app = await service(**openai(provider.url, **stored_in(file)))
    old = await app.chat("old", session_id="mine")
    assert (await old.event())["chunk"] == "You sa"
    with other_connection(file) as db:
        db.execute("DELETE FROM session")
    await (await app.chat("new", session_id="mine")).events()
    assert provider.requests[1].body["messages"] == sent(("user", "new", True))
    await provider.requests[0].send_events(delta(finish_reason="stop"), DONE)
    await provider.requests[0].send(END)
    (end,) = await old.events()
    assert (end["status"], end["error"]["code"]) == ("error", "state_unavailable")
    assert await remembered(app, "mine") == answered("new")


async def test_of_fifty_requests_at_once_in_one_session_one_is_answered_and_then_the_next(
    service: StartService, upstream: StartUpstream, file: Path
) -> None:
    provider = await upstream(first(say_and_hold))
    app = await service(**openai(provider.url, **stored_in(file, MAX_STREAMS_PER_CALLER="50")))
    replies = await asyncio.gather(*(app.chat("Hi", session_id="mine") for _ in range(50)))
    (streaming,) = [reply for reply in replies if reply.status == 200]
    for reply in replies:
        if reply is not streaming:
            assert reply.headers["retry-after"] == "1"
            assert await classify_error(reply) == (409, "session_busy")
    assert (await streaming.event())["chunk"] == "You sa"
    assert len(provider.requests) == 1
    await provider.requests[0].send_events(delta(finish_reason="stop"), DONE)
    await provider.requests[0].send(END)
    assert (await streaming.event())["status"] == "done"
    assert (await (await app.chat("next", session_id="mine")).events())[-1]["status"] == "done"
    assert len(await remembered(app, "mine")) == 4


@pytest.mark.parametrize("issued", [True, False])
async def test_a_session_can_be_read_while_it_answers_and_deleted_afterwards(
    service: StartService, upstream: StartUpstream, issued: bool
) -> None:
    provider = await upstream(repeat)
    app = await service(**openai(provider.url, RATE_LIMIT="off"))
    reply = await app.chat("one", session_id=None if issued else "mine")
    session_id = reply.headers["x-session-id"]
    await reply.events()
    provider.script = say_and_hold
    client = await app.connect()
    await (await client.chat("two", session_id=session_id)).event()
    assert await remembered(app, session_id) == answered("one")
    busy = await on_session(app, "DELETE", session_id)
    assert busy.headers["retry-after"] == "1"
    assert await classify_error(busy) == (409, "session_busy")
    client.disconnect()
    await provider.requests[1].closed.wait()
    assert (await app.log.wait_for_request(3))["outcome"] == "client_disconnected"
    deleted = await on_session(app, "DELETE", session_id)
    assert (deleted.status, await deleted.body()) == (204, b"")
    for method in ("GET", "DELETE"):
        gone = await on_session(app, method, session_id)
        assert await classify_error(gone) == (404, "session_not_found")
    provider.script = repeat
    again = await app.chat("three", session_id=session_id)
    if issued:
        assert await classify_error(again) == (404, "session_not_found")
    else:
        assert (await again.events())[-1]["status"] == "done"
        assert await remembered(app, session_id) == answered("three")


async def test_the_route_of_a_session_names_all_its_methods(service: StartService) -> None:
    reply = await on_session(await service(), "PUT", "mine")
    assert set(reply.headers["allow"].split(", ")) == {"GET", "HEAD", "DELETE"}
    assert await classify_error(reply) == (405, "method_not_allowed")


KEYS = {"app": "app-key-0123456789abcdef", "web": "web-key-0123456789abcdef"}
ROTATED = "app-new-0123456789abcdef"


def bearer(key: str) -> Headers:
    return {"authorization": f"Bearer {key}"}


def from_address(address: str) -> Headers:
    return {"x-forwarded-for": address}


async def callers_service(service: StartService, provider: Upstream) -> RunningService:
    """One that knows keys and believes this machine's proxy."""
    keys = ",".join([*(f"{name}:{key}" for name, key in KEYS.items()), f"app:{ROTATED}"])
    return await service(
        **openai(provider.url, API_KEYS=keys, RATE_LIMIT="off", FORWARDED_ALLOW_IPS="127.0.0.1")
    )


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
async def test_an_id_of_ones_own_choice_is_private_to_the_key_or_the_address(
    service: StartService, upstream: StartUpstream, one: Headers, other: Headers, shared: bool
) -> None:
    provider = await upstream(repeat)
    app = await callers_service(service, provider)
    await (await app.chat("mine", headers=one, session_id="demo")).events()
    if not shared:
        for method in ("GET", "DELETE"):
            unknown = await on_session(app, method, "demo", other)
            assert await classify_error(unknown) == (404, "session_not_found")
    await (await app.chat("theirs", headers=other, session_id="demo")).events()
    before = answered("mine") if shared else []
    assert provider.requests[1].body["messages"] == sent(*before, ("user", "theirs", True))
    assert await remembered(app, "demo", one) == answered("mine", *["theirs"] * shared)


@pytest.mark.parametrize(
    ("holder", "user", "allowed"),
    [
        (V4, from_address("198.51.100.7"), True),
        (V4, bearer(KEYS["app"]), True),
        (bearer(KEYS["app"]), bearer(ROTATED), True),
        (bearer(KEYS["app"]), bearer(KEYS["web"]), False),
        (bearer(KEYS["app"]), V4, False),
    ],
)
async def test_an_issued_id_is_its_holders_and_one_issued_to_a_key_that_keys(
    service: StartService, upstream: StartUpstream, holder: Headers, user: Headers, allowed: bool
) -> None:
    provider = await upstream(repeat)
    app = await callers_service(service, provider)
    reply = await app.chat("one", headers=holder)
    issued = reply.headers["x-session-id"]
    await reply.events()
    foreign = await app.chat("two", headers=user, session_id=issued)
    if allowed:
        await foreign.events()
        assert await remembered(app, issued, user) == answered("one", "two")
        assert (await on_session(app, "DELETE", issued, user)).status == 204
        return
    guessed = await app.chat("two", headers=user, session_id=NOBODYS_GUESS)
    errors = [(await each.json())["error"] for each in (foreign, guessed)]
    assert (foreign.status, guessed.status) == (404, 404)
    assert errors[0] == errors[1], "whose it is and whether it is must look alike"
    for method in ("GET", "DELETE"):
        unknown = await on_session(app, method, issued, user)
        assert await classify_error(unknown) == (404, "session_not_found")
    assert len(provider.requests) == 1
    assert await remembered(app, issued, holder) == answered("one")


@pytest.mark.parametrize("header", ["x-forwarded-for", "forwarded"])
async def test_behind_a_proxy_that_is_not_configured_an_anonymous_caller_may_not_choose_an_id(
    service: StartService, upstream: StartUpstream, header: str
) -> None:
    provider = await upstream(repeat)
    app = await service(**openai(provider.url, API_KEYS=f"app:{KEYS['app']}"))
    proxied = {header: "for=192.0.2.1"}
    for reply in (
        await app.chat("Hi", headers=proxied, session_id="demo"),
        await on_session(app, "GET", "demo", proxied),
        await on_session(app, "DELETE", "demo", proxied),
    ):
        error = (await reply.json())["error"]
        assert (reply.status, error["code"]) == (422, "invalid_request")
        (problem,) = error["fields"]
        assert problem["field"] == "session_id"
        assert "FORWARDED_ALLOW_IPS" in problem["message"]
    assert provider.requests == []
    by_key = {**proxied, **bearer(KEYS["app"])}
    await (await app.chat("Hi", headers=by_key, session_id="demo")).events()
    assert await remembered(app, "demo", by_key) == answered("Hi")
    await (await app.chat("Hi", session_id="demo")).events()
    assert await remembered(app, "demo") == answered("Hi")


@pytest.mark.parametrize("header", ["x-forwarded-for", "forwarded"])
async def test_behind_a_proxy_that_is_not_configured_an_issued_id_goes_on(
    service: StartService, upstream: StartUpstream, header: str
) -> None:
    provider = await upstream(repeat)
    app = await service(**openai(provider.url))
    proxied = {header: "for=192.0.2.1"}
    reply = await app.chat("one", headers=proxied)
    issued = reply.headers["x-session-id"]
    await reply.events()
    assert await remembered(app, issued, proxied) == answered("one")
    reply = await app.chat("two", headers=proxied, session_id=issued)
    assert reply.status == 200
    await reply.events()
    assert await remembered(app, issued, proxied) == answered("one", "two")


async def test_a_caller_without_a_readable_address_may_not_choose_an_id(
    service: StartService, upstream: StartUpstream
) -> None:
    provider = await upstream(repeat)
    app = await callers_service(service, provider)
    nowhere = from_address("unknown")
    reply = await app.chat("Hi", headers=nowhere, session_id="demo")
    assert await classify_error(reply) == (422, "invalid_request")
    reply = await app.chat("Hi", headers=nowhere)
    issued = reply.headers["x-session-id"]
    await reply.events()
    assert (await app.chat("Hi", headers=nowhere, session_id=issued)).status == 200


async def test_reading_and_deleting_a_session_count_against_the_rate_limit(
    service: StartService, upstream: StartUpstream
) -> None:
    provider = await upstream(repeat)
    app = await service(**openai(provider.url, RATE_LIMIT="4/day"))
    chat = await app.chat("Hi", session_id="mine")
    await chat.events()
    methods = ("GET", "DELETE", "GET", "GET", "DELETE")
    replies = [chat, *[await on_session(app, method, "mine") for method in methods]]
    assert [reply.status for reply in replies] == [200, 200, 204, 404, 429, 429]
    left = [int(reply.headers["ratelimit"].split("r=")[1].split(";")[0]) for reply in replies]
    assert left == [3, 2, 1, 0, 0, 0]
    assert all(reply.headers["ratelimit-policy"] for reply in replies)


async def test_no_session_id_is_in_the_log(service: StartService, upstream: StartUpstream) -> None:
    provider = await upstream(repeat)
    app = await service(**openai(provider.url, RATE_LIMIT="off"))
    reply = await app.chat("Hi")
    issued, chosen = reply.headers["x-session-id"], "a-name-of-my-own"
    await reply.events()
    for session_id in (issued, chosen, NOBODYS_GUESS):
        await (await app.chat("Hi", session_id=session_id)).body()
        for method in ("GET", "DELETE", "GET"):
            await (await on_session(app, method, session_id)).body()
    lines = app.log.requests()
    assert len(lines) == 13
    # A session has the same mark in each of its lines, and another has another.
    assert len({line["session"] for line in lines if "session" in line}) == 3
    for line in app.log.lines:
        assert not any(session_id in line for session_id in (issued, chosen, NOBODYS_GUESS))


async def test_a_running_service_removes_what_has_expired_by_itself(
    service: StartService, file: Path
) -> None:
    async with opened(file, Clock(0.0)) as store:
        await talk(store, "mine", said(at=0.0))
    app = await service(**stored_in(file))
    # The first sweep comes before the first request in the store's one thread.
    assert (await app.get("/readyz")).status == 200
    assert (count(file, "session"), count(file, "turn")) == (0, 0)


async def test_in_memory_the_service_forgets_at_its_end(upstream: StartUpstream) -> None:
    provider = await upstream(repeat)
    for _ in range(2):
        async with running_service(openai(provider.url, STATE_URL="memory://")) as app:
            assert (await on_session(app, "GET", "mine")).status == 404
            await (await app.chat("Hi", session_id="mine")).events()
            assert await remembered(app, "mine") == answered("Hi")
