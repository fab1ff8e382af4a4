"""What models do today: reasoning, JSON responses, limited contexts, prompt caches, retirement."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.client import CANARY
from tests.conftest import RunningService, StartRelay, StartService, StartUpstream
from tests.redis_server import RedisServer
from tests.upstream import (
    DONE,
    END,
    Connection,
    Script,
    Upstream,
    delta,
    event,
    response,
)

KEY = {"idempotency-key": "0123456789abcdef"}


# ---- scripts of the provider


def fields(**delta_fields: object) -> bytes:
    """Return an event with these fields in its delta."""
    return event({"model": "m-1", "choices": [{"index": 0, "delta": delta_fields}]})


def play(*events: bytes) -> Script:
    """Return a script that sends these events and a successful end."""

    async def script(request: Connection) -> None:
        await request.stream(*events, delta(finish_reason="stop"), DONE)
        await request.send(END)

    return script


async def echo(request: Connection) -> None:
    """Respond with the newest message, in two chunks."""
    await request.complete("You said ", request.body["messages"][-1]["content"])


async def send_text_only(request: Connection) -> None:
    await request.stream(delta("You sa"))


async def truncate(request: Connection) -> None:
    await request.stream(delta("You sa"))
    await request.send(END)


async def reset(request: Connection) -> None:
    await request.stream(delta("You sa"))
    request.reset()


async def send_nothing(request: Connection) -> None:
    pass


def fail_with(status: int, body: object = None, *headers: str) -> Script:
    async def script(request: Connection) -> None:
        await request.send(response(status, json.dumps(body).encode(), *headers))

    return script


complete_without_text = play()


# ---- requests and what is stored


@pytest.fixture(params=["memory", "file", pytest.param("redis", marks=pytest.mark.slow)])
def state(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """The setting of a session store, of each kind."""
    if request.param == "redis":
        server: RedisServer = request.getfixturevalue("redis_server")
        with closing(server.shell()) as shell:
            shell.flushall()
        return {"STATE_URL": server.url}
    return {
        "STATE_URL": {"memory": "memory://", "file": f"sqlite:///{tmp_path}/a.db"}[request.param]
    }


async def chat(app: RunningService, message: str = "Hello", **more: Any) -> Any:
    """Send a message in the session `demo`. Return the terminal event."""
    reply = await app.chat(message, session_id="demo", **more)
    assert reply.status == 200
    return (await reply.events())[-1]


async def stored(app: RunningService) -> list[str]:
    """Return the texts in the session `demo`. Those of incomplete responses end in `…`."""
    reply = await app.get("/api/v1/sessions/demo")
    assert reply.status == 200
    messages = (await reply.json())["messages"]
    return [each["content"] + ("" if each["complete"] else "…") for each in messages]


def prompts(provider: Upstream) -> list[list[str]]:
    """Return the texts that each request had."""
    return [[each["content"] for each in it.body["messages"]] for it in provider.requests]


def hints(app: RunningService) -> list[str]:
    """Return the warnings about providers."""
    return [each["event"] for each in app.log.entries if each["event"].startswith("provider ")]


# ---- reasoning


async def test_reasoning_is_sent_in_order_with_the_chunks(relay: StartRelay) -> None:
    events = [fields(reasoning_content="Let "), fields(reasoning_content="me see."), delta("Hi")]
    app, _ = await relay(play(*events, fields(reasoning_content="Hm."), delta(" there")))
    *sent, last = await (await app.chat(include_reasoning=True)).events()
    ids = {each.pop("id") for each in sent}
    assert ids == {last["id"]}
    expected = [("reasoning", "Let "), ("reasoning", "me see."), ("chunk", "Hi")]
    expected += [("reasoning", "Hm."), ("chunk", " there")]
    assert [next(iter(each.items())) for each in sent] == expected
    assert last["status"] == "done"
    assert (await app.log.wait_for_request())["chunks"] == 2


async def test_reasoning_is_not_sent_unless_it_is_requested(relay: StartRelay) -> None:
    app, _ = await relay(play(fields(reasoning_content="Let me see."), delta("Hi")))
    for reply in (await app.chat(), await app.chat(include_reasoning=False)):
        chunk, last = await reply.events()
        assert (chunk["chunk"], last["status"]) == ("Hi", "done")
    assert "reasoning" not in await (await app.chat(stream=False)).json()


async def test_reasoning_ends_retries_even_if_it_is_not_sent(relay: StartRelay) -> None:
    async def script(request: Connection) -> None:
        await request.stream(fields(reasoning_content="Let me see."))
        await request.send(END)

    app, provider = await relay(script, MAX_RETRIES="2", FALLBACK_MODELS="backup")
    reply = await app.chat()
    assert await reply.status_and_code() == (502, "upstream_incomplete")
    assert len(provider.requests) == 1


PARTS = [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}]
FORMS: dict[str, dict[str, object]] = {
    "reasoning_content": {"reasoning_content": "Hm."},
    "reasoning": {"reasoning": "Hm."},
    "reasoning_text": {"reasoning_text": "Hm."},
    "reasoning_details": {"reasoning_details": [{"type": "reasoning.text", "text": "Hm."}]},
    "summary": {"reasoning_details": [{"type": "reasoning.summary", "summary": "Hm."}]},
    "thinking_blocks": {"thinking_blocks": [{"type": "thinking", "thinking": "Hm."}]},
    "parts of Mistral": {"content": PARTS},
    "two fields": {"reasoning": "Hm.", "reasoning_details": [{"text": "Hm."}]},
    "three fields": {"reasoning_content": "Hm.", "reasoning": "Hm.", "thinking_blocks": PARTS},
    "first field empty": {"reasoning_content": "", "reasoning": "Hm."},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
async def test_reasoning_in_any_form_is_sent_once(
    relay: StartRelay, form: dict[str, object]
) -> None:
    app, _ = await relay(play(fields(**form), delta("Hi")))
    body = await (await app.chat(stream=False, include_reasoning=True)).json()
    assert (body["reasoning"], body["content"]) == ("Hm.", "Hi")


async def test_think_tags_in_the_content_are_text(relay: StartRelay) -> None:
    app, _ = await relay(play(delta("<think>Hm.</think>"), delta("Hi")))
    body = await (await app.chat(stream=False, include_reasoning=True)).json()
    assert (body["reasoning"], body["content"]) == ("", "<think>Hm.</think>Hi")


async def test_reasoning_is_neither_stored_nor_sent_back(relay: StartRelay) -> None:
    app, provider = await relay(play(fields(reasoning_content="Hm."), delta("Hi")))
    await chat(app, include_reasoning=True)
    assert await stored(app) == ["Hello", "Hi"]
    await chat(app, "Again", include_reasoning=True)
    assert prompts(provider)[1] == ["Hello", "Hi", "Again"]
    assert "reasoning" not in json.dumps(provider.requests[1].body)


async def test_requested_reasoning_counts_towards_the_longest_response(relay: StartRelay) -> None:
    thoughts = [fields(reasoning_content="x" * 900_000)] * 5
    app, _ = await relay(play(*thoughts, delta("Hi")))
    assert (await chat(app))["status"] == "done"
    last = await chat(app, include_reasoning=True)
    assert last["error"]["message"] == "The response is longer than 4 MiB."


async def test_mock_reasoning_sends_reasoning_before_its_text(service: StartService) -> None:
    app = await service()
    reply = await app.chat(model_id="mock/reasoning", include_reasoning=True)
    *sent, last = await reply.events()
    kinds = [next(iter(each)) for each in sent]
    assert kinds == ["reasoning"] * 6 + ["chunk"] * 3
    assert "".join(each.get("chunk", "") for each in sent) == "This is mock/reasoning."
    assert last["status"] == "done"
    chunks = await (await app.chat(model_id="mock/reasoning")).events()
    assert [each.get("chunk") for each in chunks] == ["This ", "is ", "mock/reasoning.", None]


# ---- JSON responses


async def test_json_response_has_the_whole_completion(relay: StartRelay) -> None:
    app, provider = await relay(echo)
    reply = await app.chat(session_id="demo", stream=False)
    body = await reply.json()
    assert body == {
        "status": "done",
        "id": reply.headers["x-request-id"],
        "session_id": "demo",
        "model": "m-1",
        "content": "You said Hello",
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
    }
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["cache-control"] == "no-store"
    assert reply.headers["x-session-id"] == "demo"
    assert provider.requests[0].body["stream"] is True
    assert (await (await app.chat("Again", session_id="demo", stream=False)).json())["content"]
    assert prompts(provider)[1] == ["Hello", "You said Hello", "Again"]
    line = await app.log.wait_for_request()
    assert (line["outcome"], line["chunks"]) == ("done", 2)


FAILURES: dict[str, tuple[Script, int, str, list[str]]] = {
    "500": (fail_with(500), 502, "upstream_error", []),
    "429": (fail_with(429), 503, "upstream_unavailable", []),
    "reset after text": (reset, 502, "upstream_error", ["Hello", "You sa…"]),
    "truncated after text": (truncate, 502, "upstream_incomplete", ["Hello", "You sa…"]),
    "idle after text": (send_text_only, 504, "upstream_timeout", ["Hello", "You sa…"]),
}


@pytest.mark.parametrize(
    ("script", "status", "code", "messages"), FAILURES.values(), ids=FAILURES.keys()
)
async def test_failure_of_a_json_response_has_its_own_status(
    relay: StartRelay, script: Script, status: int, code: str, messages: list[str]
) -> None:
    app, _ = await relay(script, IDLE_TIMEOUT_SECONDS="0.5", HEARTBEAT_SECONDS="0.1")
    reply = await app.chat(session_id="demo", stream=False)
    assert await reply.status_and_code() == (status, code)
    assert await stored(app) == messages
    line = await app.log.wait_for_request()
    assert (line["status"], line["outcome"]) == (status, code)


async def test_disconnect_from_a_json_response_cancels_the_provider(relay: StartRelay) -> None:
    app, provider = await relay(send_nothing)
    client = await app.connect()
    sending = asyncio.create_task(client.chat(session_id="demo", stream=False))
    request = await provider.wait_for_request()
    client.disconnect()
    await request.closed.wait()
    assert (await app.log.wait_for_request())["outcome"] == "client_disconnected"
    await asyncio.gather(sending, return_exceptions=True)
    provider.script = echo
    assert (await chat(app))["status"] == "done"


async def test_json_response_sends_no_heartbeats(relay: StartRelay) -> None:
    finish = asyncio.Event()

    async def wait_to_finish(request: Connection) -> None:
        if request.body["messages"][-1]["content"] == "whole":
            await finish.wait()
            await echo(request)

    app, provider = await relay(wait_to_finish, HEARTBEAT_SECONDS="0.1")
    sending = asyncio.create_task(app.chat("whole", stream=False))
    await provider.wait_for_request()
    # The heartbeats of a stream that started later show how much time has passed.
    streaming = await app.chat("stream")
    for _ in range(3):
        assert await streaming.block() == ": keep-alive"
    assert not sending.done()
    finish.set()
    reply = await sending
    assert (await reply.json())["content"] == "You said whole"
    assert reply.headers["content-length"]


async def test_stopped_json_response_has_status_200(relay: StartRelay) -> None:
    app, provider = await relay(send_nothing)
    sending = asyncio.create_task(app.chat(session_id="demo", stream=False))
    await provider.wait_for_request()
    client = await app.connect()
    reply = await client.request("DELETE", "/api/v1/sessions/demo/stream")
    assert reply.status == 204
    stopped = await sending
    body = await stopped.json()
    assert (stopped.status, body["status"], body["content"]) == (200, "stopped", "")


async def test_stopped_json_response_with_a_key_has_the_text_so_far(relay: StartRelay) -> None:
    app, provider = await relay(send_text_only)
    client = await app.connect()
    sending = asyncio.create_task(client.chat(headers=KEY, session_id="demo", stream=False))
    await provider.wait_for_request()
    reader = await app.get("/api/v1/sessions/demo/stream")
    assert '"chunk":"You sa"' in (await reader.block() or "")
    stopping = await app.connect()
    assert (await stopping.request("DELETE", "/api/v1/sessions/demo/stream")).status == 204
    body = await (await sending).json()
    assert (body["status"], body["content"]) == ("stopped", "You sa")
    assert await stored(app) == ["Hello", "You sa…"]


async def test_retry_of_a_json_response_returns_the_same_object(relay: StartRelay) -> None:
    app, provider = await relay(play(fields(reasoning="Hm."), delta("Hi")))
    replies = []
    for _ in range(2):
        client = await app.connect()
        replies.append(await client.chat(headers=KEY, stream=False, include_reasoning=True))
    assert [each.headers.get("idempotent-replayed") for each in replies] == [None, "true"]
    first, second = [await each.json() for each in replies]
    assert first == second
    assert (first["content"], first["reasoning"]) == ("Hi", "Hm.")
    assert first["id"] == replies[0].headers["x-request-id"]
    assert len(provider.requests) == 1
    client = await app.connect()
    reply = await client.chat(headers=KEY, stream=True, include_reasoning=True)
    assert await reply.status_and_code() == (422, "idempotency_key_reused")


async def test_failure_of_a_keyed_json_response_has_its_own_status(relay: StartRelay) -> None:
    app, provider = await relay(truncate)
    for _ in range(2):
        client = await app.connect()
        reply = await client.chat(headers=KEY, session_id="demo", stream=False)
        assert await reply.status_and_code() == (502, "upstream_incomplete")
    assert len(provider.requests) == 1
    assert await stored(app) == ["Hello", "You sa…"]


# ---- extra fields and headers of requests to a provider


async def test_extra_body_is_merged_into_the_request(relay: StartRelay) -> None:
    extra = {"temperature": 0.3, "stream_options": None, "service_tier": "flex", "a": {"b": [1]}}
    app, provider = await relay(
        echo, OPENAI_EXTRA_BODY=json.dumps(extra | {"max_completion_tokens": 7}),
        MAX_OUTPUT_TOKENS="5",
    )  # fmt: skip
    await chat(app)
    body = provider.requests[0].body
    expected = extra | {"model": "gpt-4o-mini", "stream": True, "max_completion_tokens": 7}
    del expected["stream_options"]
    assert {name: body[name] for name in body if name != "messages"} == expected


async def test_extra_headers_are_sent_and_never_shown(
    service: StartService, upstream: StartUpstream
) -> None:
    async def quote(request: Connection) -> None:
        error = {"error": {"message": json.dumps(request.headers), "code": request.headers["x-a"]}}
        await fail_with(401, error, f"x-request-id: {'x' * 9}")(request)

    provider = await upstream(quote)
    secrets = {"X-A": CANARY, "Authorization": f"Basic {CANARY}"}
    env = {"LOCAL_API_KEY": "unused-key", "LOCAL_EXTRA_HEADERS": json.dumps(secrets)}
    # The fixtures search every response and log line for CANARY.
    app = await service(PROVIDERS="local", LOCAL_BASE_URL=provider.url, LOG_LEVEL="debug", **env)
    assert (await app.chat()).status == 502
    headers = provider.requests[0].headers
    assert (headers["x-a"], headers["authorization"]) == (CANARY, f"Basic {CANARY}")
    assert hints(app) == ["provider local rejected the API key (401): check LOCAL_API_KEY"]


# ---- conversations that outgrow the model


def limit_messages(count: int, reject: Script, model: str = "") -> Script:
    """Return a script that rejects requests with more messages than `count`.

    If `model` is given, other models have no limit.
    """

    async def script(request: Connection) -> None:
        limited = model in ("", request.body["model"])
        too_long = limited and len(request.body["messages"]) > count
        await (reject if too_long else echo)(request)

    return script


CODE = {"error": {"message": "no", "code": "context_length_exceeded"}}
PHRASE = {"error": {"message": "This model's maximum context length is 8 tokens."}}
REJECTIONS = {
    "code": fail_with(400, CODE),
    "phrase": fail_with(400, PHRASE),
    "413": fail_with(413),
}


@pytest.mark.parametrize("reject", REJECTIONS.values(), ids=REJECTIONS.keys())
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_outgrown_conversation_goes_on_without_its_older_turns(
    relay: StartRelay, state: dict[str, str], reject: Script, *, stream: bool
) -> None:
    # The system prompt, two turns and the message.
    script = limit_messages(6, reject)
    app, provider = await relay(script, SYSTEM_PROMPT="Be brief.", RATE_LIMIT="off", **state)
    for message in "abc":
        assert "history_trimmed" not in await chat(app, message)
    reply = await app.chat("d", session_id="demo", stream=stream)
    last = (await reply.events())[-1] if stream else await reply.json()
    assert (last["status"], last["history_trimmed"]) == ("done", True)
    longest = ["Be brief.", "a", "You said a", "b", "You said b", "c", "You said c", "d"]
    assert prompts(provider)[3:] == [longest, ["Be brief.", "c", "You said c", "d"]]
    assert await stored(app) == ["c", "You said c", "d", "You said d"]
    line = await app.log.wait_for_request(3)
    assert line["history_trimmed"] is True
    assert [attempt["error"] for attempt in line["attempts"]] == ["context_too_long", None]
    assert "history_trimmed" not in await app.log.wait_for_request(2)
    assert await app.metric("chat_upstream_retries_total") == 0
    assert "history_trimmed" not in await chat(app, "e")


async def test_message_that_alone_is_too_long_returns_422(
    relay: StartRelay, state: dict[str, str]
) -> None:
    app, provider = await relay(echo, RATE_LIMIT="off", **state)
    for message in "abc":
        await chat(app, message)
    before = await stored(app)
    provider.script = REJECTIONS["code"]
    reply = await app.chat("d", session_id="demo")
    assert await reply.status_and_code() == (422, "context_too_long")
    assert [len(texts) for texts in prompts(provider)[3:]] == [7, 3, 1]
    assert await stored(app) == before


@pytest.mark.parametrize(("limit", "calls"), [(3, "mm"), (0, "mmb")])
async def test_outgrown_conversation_is_trimmed_before_failover(
    relay: StartRelay, limit: int, calls: str
) -> None:
    script = limit_messages(limit, REJECTIONS["code"], "m")
    app, provider = await relay(echo, DEFAULT_MODEL="m", FALLBACK_MODELS="b")
    await chat(app, "a")
    provider.script = script
    if limit:
        await chat(app, "b")
    last = await chat(app, "c")
    assert (last["status"], last["history_trimmed"]) == ("done", True)
    models = [request.body["model"] for request in provider.requests]
    assert "".join(models[-len(calls) :]) == calls
    assert await app.metric("chat_upstream_retries_total") == calls.count("b")
    messages = await stored(app)
    assert messages[-2:] == ["c", "You said c"]
    assert messages[0] != "a"


# ---- regenerate and edit

Unfinished = Callable[[RunningService], Awaitable[None]]


async def test_replaced_turn_is_neither_sent_nor_kept(
    relay: StartRelay, state: dict[str, str]
) -> None:
    app, provider = await relay(echo, RATE_LIMIT="off", **state)
    for message in "ab":
        await chat(app, message)
    assert (await chat(app, "B", replace_last_turn=True))["status"] == "done"
    assert prompts(provider)[2] == ["a", "You said a", "B"]
    assert await stored(app) == ["a", "You said a", "B", "You said B"]
    await chat(app, "c")
    assert prompts(provider)[3] == ["a", "You said a", "B", "You said B", "c"]


STAYS = {
    "rejected": fail_with(400),
    "truncated": truncate,
    "reset": reset,
    "without text": complete_without_text,
    "blank": play(delta(" \n")),
}


@pytest.mark.parametrize("script", STAYS.values(), ids=STAYS.keys())
async def test_last_turn_stays_unless_its_replacement_is_complete(
    relay: StartRelay, state: dict[str, str], script: Script
) -> None:
    app, provider = await relay(echo, RATE_LIMIT="off", **state)
    await chat(app, "a")
    await chat(app, "b")
    provider.script = script
    await (await app.chat("B", session_id="demo", replace_last_turn=True)).body()
    assert await stored(app) == ["a", "You said a", "b", "You said b"]


async def test_last_turn_stays_if_the_client_disconnects(
    relay: StartRelay, state: dict[str, str]
) -> None:
    app, provider = await relay(echo, **state)
    await chat(app, "a")
    provider.script = send_text_only
    client = await app.connect()
    reply = await client.chat("A", session_id="demo", replace_last_turn=True)
    assert (await reply.event())["chunk"] == "You sa"
    client.disconnect()
    await app.log.wait_for_request(1)
    assert await stored(app) == ["a", "You said a"]


async def test_stopped_response_replaces_the_last_turn(
    relay: StartRelay, state: dict[str, str]
) -> None:
    app, provider = await relay(echo, **state)
    await chat(app, "a")
    provider.script = send_text_only
    reply = await app.chat("A", session_id="demo", replace_last_turn=True)
    assert (await reply.event())["chunk"] == "You sa"
    client = await app.connect()
    assert (await client.request("DELETE", "/api/v1/sessions/demo/stream")).status == 204
    assert (await reply.event())["status"] == "stopped"
    assert await stored(app) == ["A", "You sa…"]


async def test_replacing_has_no_effect_in_a_session_without_turns(
    relay: StartRelay, state: dict[str, str]
) -> None:
    app, provider = await relay(echo, **state)
    await chat(app, "a", replace_last_turn=True)
    assert prompts(provider) == [["a"]]
    assert await stored(app) == ["a", "You said a"]


async def test_replacing_in_an_outgrown_conversation_drops_older_turns_too(
    relay: StartRelay, state: dict[str, str]
) -> None:
    app, provider = await relay(echo, RATE_LIMIT="off", **state)
    for message in "abc":
        await chat(app, message)
    provider.script = limit_messages(3, REJECTIONS["code"])
    assert (await chat(app, "C", replace_last_turn=True))["history_trimmed"] is True
    assert prompts(provider)[-1] == ["b", "You said b", "C"]
    assert await stored(app) == ["b", "You said b", "C", "You said C"]


async def test_replacing_without_a_session_id_returns_422(relay: StartRelay) -> None:
    app, provider = await relay(echo)
    reply = await app.chat(replace_last_turn=True)
    assert reply.status == 422
    error = await reply.error()
    assert [each["field"] for each in error["fields"]] == ["replace_last_turn"]
    assert provider.requests == []


# ---- the prompt cache and the tokens that come from it


async def test_start_of_the_prompt_stays_the_same_between_trims(
    relay: StartRelay, state: dict[str, str]
) -> None:
    app, provider = await relay(echo, HISTORY_MAX_CHARS="400", RATE_LIMIT="off", **state)
    for number in range(60):
        await chat(app, f"message {number:02}")
    sent = prompts(provider)
    pairs = pairwise(sent)
    misses = sum(following[: len(earlier)] != earlier for earlier, following in pairs)
    # A turn has 29 characters: 13 turns fit, a trim leaves 6. One at a time, 46 would miss.
    assert misses == 6
    assert max(map(len, sent)) == 2 * 13 + 1


async def test_details_of_usage_are_logged_and_counted(relay: StartRelay) -> None:
    usage = {
        "prompt_tokens": 100,
        "completion_tokens": 20,
        "prompt_tokens_details": {"cached_tokens": 64, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 9},
    }
    app, provider = await relay(play(delta("Hi"), event({"choices": [], "usage": usage})))
    assert (await chat(app))["usage"] == usage
    line = await app.log.wait_for_request()
    counts = {"prompt_tokens": 100, "completion_tokens": 20}
    counts |= {"cached_tokens": 64, "reasoning_tokens": 9}
    assert {name: line[name] for name in counts} == counts
    series = 'chat_tokens_total{{kind="{}",model="gpt-4o-mini",provider="openai"}}'
    for kind, count in counts.items():
        assert await app.metric(series.format(kind)) == count
    malformed = {
        "prompt_tokens_details": [1],
        "completion_tokens_details": {"reasoning_tokens": -1},
    }
    provider.script = play(delta("Hi"), event({"choices": [], "usage": malformed}))
    assert (await chat(app))["usage"] == malformed
    line = next(each for each in reversed(app.log.requests()) if "finish_reason" in each)
    assert not {"cached_tokens", "reasoning_tokens"} & line.keys()


# ---- models that end, and hints for the operator


def missing(**error: object) -> Script:
    return fail_with(404, {"error": error})


MISSING = {
    "code": missing(code="model_not_found", message="no"),
    "model id": missing(message="The model `gpt-4o-mini` has been shut down."),
}


@pytest.mark.parametrize("script", MISSING.values(), ids=MISSING.keys())
async def test_model_that_the_provider_no_longer_has_is_reported(
    relay: StartRelay, script: Script
) -> None:
    app, _ = await relay(script)
    for _ in range(2):
        reply = await app.chat()
        assert reply.status == 502
        error = await reply.error()
        assert error["message"] == "The provider does not have this model."
        assert (error["code"], error["retryable"]) == ("upstream_error", False)
    await app.log.wait_for_request(1)
    settings = "DEFAULT_MODEL, MODELS and FALLBACK_MODELS"
    assert hints(app) == [f"provider openai does not have the model gpt-4o-mini: check {settings}"]


async def test_hints_are_logged_once_per_provider_and_cause(
    relay: StartRelay, upstream: StartUpstream
) -> None:
    other = await upstream(fail_with(401))
    env = {"PROVIDERS": "local", "LOCAL_BASE_URL": other.url, "MODELS": "openai/*,local/*"}
    app, provider = await relay(fail_with(401), RATE_LIMIT="off", DEFAULT_MODEL="m", **env)
    for script in (fail_with(401), fail_with(404), fail_with(401), fail_with(404)):
        provider.script = script
        for model in ("m", "local/m"):
            assert (await app.chat(model_id=model)).status == 502
    await app.log.wait_for_request(7)
    warnings = [each["event"] for each in app.log.entries if each["level"] == "warning"]
    assert [each for each in warnings if each != "request"] == [
        "provider openai rejected the API key (401): check OPENAI_API_KEY",
        "provider local rejected the API key (401): check LOCAL_API_KEY",
        f"404 from {provider.url}: does OPENAI_BASE_URL need /v1?",
    ]


async def test_hint_is_logged_for_a_model_that_failed_over(relay: StartRelay) -> None:
    async def script(request: Connection) -> None:
        await (MISSING["code"] if request.body["model"] == "old" else echo)(request)

    app, _ = await relay(script, DEFAULT_MODEL="old", FALLBACK_MODELS="new")
    assert (await chat(app))["status"] == "done"
    await app.log.wait_for_request()
    assert [each.split(":")[0] for each in hints(app)] == [
        "provider openai does not have the model old"
    ]
