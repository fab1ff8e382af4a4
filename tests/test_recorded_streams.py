"""What real providers have sent, replayed from a socket: every recorded stream gives the text, the
usage and the end that it should, however it is cut; every recorded error its code and no word more.

The recordings are not part of this project: without them these tests are skipped."""

import asyncio
import json
import random
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from openai_stream import CompletionParser
from tests.client import Response
from tests.conftest import StartService, StartUpstream
from tests.test_providers import KEY, openai
from tests.upstream import END, Connection, response

FOLDER = Path(__file__).parents[1].parent / "shared" / "streams"
if not FOLDER.is_dir():
    pytest.skip(f"the recorded streams are not at {FOLDER}", allow_module_level=True)

META: dict[str, dict[str, Any]] = json.loads((FOLDER / "meta.json").read_bytes())

# The streams that are no whole answer, and the code with which ours ends.
BROKEN = {
    "groq-gptoss-error-after-text": "upstream_error",
    "llamabox-qwen3-error-line": "upstream_error",
    "openrouter-minimax-error-chunk": "upstream_error",
    "handwritten-openai-error-midstream": "upstream_error",
    # Lines without blank ones between them are one event that never ends.
    "handwritten-content-filter-single-newlines": "upstream_incomplete",
}

# Status, code, retryable, retry_after of our answer to each recorded error.
ERRORS: dict[str, tuple[int, str, bool, int | None]] = {
    "azure-400-content-filter": (422, "content_refused", False, None),
    "azure-404-deployment-not-found": (502, "upstream_error", False, None),
    "azure-429-token-limit-headers": (503, "upstream_unavailable", True, None),
    "azure-foundry-401": (502, "upstream_error", False, None),
    "azure-foundry-429-retry-after": (503, "upstream_unavailable", True, 1),
    "deepseek-400-context-length": (422, "context_too_long", False, None),
    "deepseek-401": (502, "upstream_error", False, None),
    "groq-400-tool-use-failed": (502, "upstream_error", False, None),
    "groq-404-model-not-found": (502, "upstream_error", False, None),
    "handwritten-azure-200-with-error-body": (422, "content_refused", False, None),
    "mistral-401": (502, "upstream_error", False, None),
    "ollamacloud-400-prompt-too-long": (422, "context_too_long", False, None),
    "ollamacloud-401": (502, "upstream_error", False, None),
    "openai-400-context-length-exceeded": (422, "context_too_long", False, None),
    "openai-400-empty-messages": (502, "upstream_error", False, None),
    "openai-400-invalid-image-url": (502, "upstream_error", False, None),
    "openai-400-unsupported-parameter": (502, "upstream_error", False, None),
    "openai-400-unsupported-value-role": (502, "upstream_error", False, None),
    "openai-401-invalid-api-key": (502, "upstream_error", False, None),
    "openai-403-unsupported-country": (502, "upstream_error", False, None),
    "openai-404-model-deprecated": (502, "upstream_error", False, None),
    "openai-404-model-not-found": (502, "upstream_error", False, None),
    "openai-429-insufficient-quota-2024": (503, "upstream_unavailable", False, None),
    "openai-429-insufficient-quota-2025": (503, "upstream_unavailable", False, None),
    "openai-429-insufficient-quota-late": (503, "upstream_unavailable", False, None),
    "openai-429-rate-limit-headers": (503, "upstream_unavailable", True, None),
    "openai-429-rate-limit-tpm-body": (503, "upstream_unavailable", True, None),
    "openai-500-server-error": (502, "upstream_error", True, None),
    "openai-502-cloudflare-html": (502, "upstream_error", True, None),
    "openai-502-cloudflare-json": (502, "upstream_error", True, None),
    "openai-503-overloaded": (503, "upstream_unavailable", True, None),
    "openrouter-400-context-length": (422, "context_too_long", False, None),
    "openrouter-401": (502, "upstream_error", False, None),
    "openrouter-429-upstream": (503, "upstream_unavailable", True, None),
    "perplexity-400-too-long": (422, "context_too_long", False, None),
    "perplexity-401": (502, "upstream_error", False, None),
}


def recorded(name: str) -> bytes:
    return (FOLDER / f"{name}.sse").read_bytes()


def line_ends(stream: bytes) -> list[bytes]:
    """The stream as it is and, if it has none yet, with CRLF."""
    return [stream] if b"\r" in stream else [stream, stream.replace(b"\n", b"\r\n")]


def in_cuts_of(size: int, stream: bytes) -> list[bytes]:
    return [stream[i : i + size] for i in range(0, len(stream), size)]


def cut_at_random(stream: bytes, seed: int) -> list[bytes]:
    """Up to 200 cuts, of which many are near each other: within a line end or a character."""
    chance = random.Random(seed)
    places = {0, len(stream)}
    for _ in range(min(100, len(stream) // 20)):
        place = chance.randrange(1, len(stream) - 1)
        places |= {place, place + chance.choice((1, 1, 2, 7))}
    return [stream[a:b] for a, b in pairwise(sorted(p for p in places if p <= len(stream)))]


def usage_of(name: str) -> Any:
    """The usage that its meta data tell; they leave out those under x_groq."""
    found = META[name]["usage"]
    for line in recorded(name).splitlines():
        if found is None and line.startswith(b'data: {"id"') and b'"x_groq"' in line:
            found = json.loads(line.removeprefix(b"data: "))["x_groq"].get("usage")
    return found


def text_of(name: str) -> str:
    text: str = META[name]["text"].get("0") or META[name]["classify_error"]
    return text


def finish_reason_of(name: str) -> str | None:
    # Those with several choices end them all in the same way.
    reasons: list[str] = META[name]["finish"]
    return reasons[-1] if reasons else None


def test_the_tables_name_every_recording() -> None:
    assert {path.stem for path in FOLDER.glob("*.sse")} == set(META)
    assert {path.stem for path in (FOLDER / "errors").glob("*.json")} == set(ERRORS)
    assert set(META) > set(BROKEN)


# ---- the reader alone, cut byte by byte


def exhaustive(stream: bytes) -> Iterator[list[bytes]]:
    """Byte by byte; where that would take seconds, in two sizes that are prime."""
    if len(stream) < 50_000:
        yield in_cuts_of(1, stream)
    else:
        yield in_cuts_of(13, stream)
        yield in_cuts_of(1009, stream)


def all_that_is_told(cuts: Sequence[bytes]) -> tuple[object, ...]:
    reader = CompletionParser()
    chunks = [chunk for cut in cuts for chunk in reader.feed(cut) or ()]
    error = reader.error and (type(reader.error), reader.error.retryable)
    return chunks, reader.model, reader.finish_reason, reader.usage, reader.done, error


@pytest.mark.parametrize("name", META)
def test_a_recorded_stream_reads_the_same_however_it_is_cut(name: str) -> None:
    whole = all_that_is_told([recorded(name)])
    for stream in line_ends(recorded(name)):
        for cuts in exhaustive(stream):
            assert all_that_is_told(cuts) == whole


# ---- through the service


def head_of(name: str) -> bytes:
    """The recorded head, its framing replaced by ours."""
    kept = {"content-length", "transfer-encoding", "connection"}
    lines = [
        f"{header}: {value}"
        for header, value in META[name]["headers"].items()
        if header.lower() not in kept
    ]
    return "\r\n".join(["HTTP/1.1 200 OK", *lines, "transfer-encoding: chunked", "", ""]).encode()


async def outcome(reply: Response) -> dict[str, Any]:
    """What a client has of an answer, by name."""
    if reply.status != 200:
        return {"status": reply.status, "text": "", "error": (await reply.json())["error"]["code"]}
    *chunks, last = await reply.events()
    text = "".join(chunk["chunk"] for chunk in chunks)
    if last["status"] == "error":
        return {"status": 200, "text": text, "error": last["error"]["code"]}
    kept = {name: last[name] for name in ("model", "finish_reason", "usage")}
    return {"status": 200, "text": text, **kept}


@pytest.mark.parametrize("name", META)
async def test_a_recorded_stream_gives_its_text_its_usage_and_its_end(
    name: str, service: StartService, upstream: StartUpstream
) -> None:
    if name in BROKEN:
        # With text the status is 200 already; without, the failure has one of its own.
        status = 200 if text_of(name) else 502
        expected = {"status": status, "text": text_of(name), "error": BROKEN[name]}
    else:
        expected = {
            "status": 200,
            "text": text_of(name),
            # Some recordings name no model: then it is the one that was asked for.
            "model": META[name]["model"] or "gpt-4o-mini",
            "finish_reason": finish_reason_of(name),
            "usage": usage_of(name),
        }
    cuttings = [
        cuts
        for stream in line_ends(recorded(name))
        for cuts in (
            in_cuts_of(4096, stream),
            cut_at_random(stream, seed=1),
            cut_at_random(stream, seed=2),
        )
    ]

    async def script(request: Connection) -> None:
        await request.send(head_of(name))
        for cut in cuttings[len(provider.requests) - 1]:
            await request.send_events(cut)
            await asyncio.sleep(0)  # the service's turn, so that a cut is often a read of its own
        await request.send(END)

    provider = await upstream(script)
    app = await service(**openai(provider.url))
    for _ in cuttings:
        assert await outcome(await app.chat()) == expected


@pytest.mark.parametrize("name", ERRORS)
async def test_a_recorded_error_gets_its_code_and_nothing_of_it_is_repeated(
    name: str, service: StartService, upstream: StartUpstream
) -> None:
    error = json.loads((FOLDER / "errors" / f"{name}.json").read_bytes())
    kept = (
        f"{header}: {value}"
        for header, value in error["headers"].items()
        if header not in ("content-length", "connection")
    )
    answer = response(error["status"], error["body"].encode(), *kept)

    async def script(request: Connection) -> None:
        await request.send(answer)

    provider = await upstream(script)
    app = await service(**openai(provider.url))
    reply = await app.chat()
    body = (await reply.body()).decode()
    told = json.loads(body)["error"]
    status, code, retryable, retry_after = ERRORS[name]
    assert (reply.status, told["code"], told["retryable"]) == (status, code, retryable)
    assert told["retry_after"] == retry_after
    assert reply.headers.get("retry-after") == (retry_after and str(retry_after))

    await app.log.wait_for_request()
    seen = body + str(reply.headers) + "".join(app.log.lines)
    said = re.findall(r"\w+_\w+|[^\"<>{}\\]{12,}", error["body"])
    assert said
    assert [words for words in said if words in seen] == []
    assert KEY not in seen
