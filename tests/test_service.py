"""The HTTP contract, over real sockets."""

from tests.conftest import StartService, StartUpstream
from tests.upstream import DONE, END, Connection, delta


def openai(url: str, **more: str) -> dict[str, str]:
    """The settings of a service that has one provider, at `url`."""
    return {"OPENAI_API_KEY": "sk-test-0123456789abcdef", "OPENAI_BASE_URL": url, **more}


async def test_a_chat_streams_each_piece_and_one_done(
    service: StartService, upstream: StartUpstream
) -> None:
    async def script(request: Connection) -> None:
        await request.answer("Hel", "lo")

    provider = await upstream(script)
    app = await service(**openai(provider.url))
    reply = await app.chat("Hi", session_id="mine")
    assert reply.status == 200
    first, second, done = await reply.events()
    request_id = reply.headers["x-request-id"]
    assert first == {"chunk": "Hel", "id": request_id}
    assert second == {"chunk": "lo", "id": request_id}
    assert done == {
        "status": "done",
        "id": request_id,
        "session_id": "mine",
        "model": "m-1",
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
    }


async def test_a_piece_arrives_while_the_provider_still_holds_the_next(
    service: StartService, upstream: StartUpstream
) -> None:
    async def script(request: Connection) -> None:
        await request.stream(delta("first"))

    provider = await upstream(script)
    app = await service(**openai(provider.url))
    reply = await app.chat()
    assert (await reply.event())["chunk"] == "first"
    request = await provider.request()
    await request.more(delta("second"), delta(finish_reason="stop"), DONE)
    await request.send(END)
    assert [event.get("chunk") for event in await reply.events()] == ["second", None]


async def test_leaving_after_the_first_piece_closes_the_provider(
    service: StartService, upstream: StartUpstream
) -> None:
    async def script(request: Connection) -> None:
        await request.stream(delta("first"))
        await request.closed.wait()

    provider = await upstream(script)
    app = await service(**openai(provider.url))
    client = await app.connect()
    reply = await client.chat()
    await reply.event()
    assert await app.metric("chat_open_streams") == 1
    client.leave()
    await (await provider.request()).closed.wait()
    line = await app.log.request(1)
    assert line["outcome"] == "client_gone"
    assert await app.metric("chat_open_streams") == 0
