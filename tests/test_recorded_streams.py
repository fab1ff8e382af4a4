"""Tests that replay recorded streams and error responses of real providers.

The recordings are not part of this project. Without them these tests are skipped.
"""

import asyncio
import json
import random
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from openai_stream import CompletionParser, Reasoning
from tests.client import CANARY, Response
from tests.conftest import StartService, StartUpstream, openai_env
from tests.upstream import END, Connection, response

FOLDER = Path(__file__).parents[1].parent / "shared" / "streams"
if not FOLDER.is_dir():
    pytest.skip(f"the recorded streams are not at {FOLDER}", allow_module_level=True)

META: dict[str, dict[str, Any]] = json.loads((FOLDER / "meta.json").read_bytes())

# The recordings that end in an error, and its code.
FAILED = {
    "groq-gptoss-error-after-text": "upstream_error",
    "llamabox-qwen3-error-line": "upstream_error",
    "openrouter-minimax-error-chunk": "upstream_error",
    "handwritten-openai-error-midstream": "upstream_error",
    # Several choices, which the service never requests: it cannot know which text is meant.
    "openai-gpt35-n2-usage": "upstream_error",
    "openai-gpt4o-n3": "upstream_error",
    "openai-gpt4omini-n2-long": "upstream_error",
}

# Recordings whose events have no blank lines between them, so that their metadata has no events.
UNSEPARATED = {
    "handwritten-content-filter-single-newlines": {
        "text": "foobar",
        "finish_reason": "content_filter",
    },
}

# The status, code, retryable and retry_after that the caller gets for each recorded error.
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


# Words of the service's own log lines that providers use too.
LOG_WORDS = {"max_completion_tokens", "max_tokens", "model_not_found"}


def recorded(name: str) -> bytes:
    return (FOLDER / f"{name}.sse").read_bytes()


def line_end_variants(stream: bytes) -> list[bytes]:
    """Return the stream as recorded and, unless it contains CR, with CRLF line ends."""
    return [stream] if b"\r" in stream else [stream, stream.replace(b"\n", b"\r\n")]


def split_evenly(size: int, stream: bytes) -> list[bytes]:
    return [stream[i : i + size] for i in range(0, len(stream), size)]


def split_randomly(stream: bytes, seed: int) -> list[bytes]:
    """Split at up to 200 offsets, many of them close together, within line ends and characters."""
    random_source = random.Random(seed)
    offsets = {0, len(stream)}
    for _ in range(min(100, len(stream) // 20)):
        offset = random_source.randrange(1, len(stream) - 1)
        offsets |= {offset, offset + random_source.choice((1, 1, 2, 7))}
    return [stream[a:b] for a, b in pairwise(sorted(o for o in offsets if o <= len(stream)))]


def usage_of(name: str) -> Any:
    """Return the usage in the recording's metadata, or the usage under x_groq in the stream."""
    usage = META[name]["usage"]
    for line in recorded(name).splitlines():
        if usage is None and line.startswith(b'data: {"id"') and b'"x_groq"' in line:
            usage = json.loads(line.removeprefix(b"data: "))["x_groq"].get("usage")
    return usage


def text_of(name: str) -> str:
    text: str = META[name]["text"].get("0") or META[name]["refusal"]
    return text


def finish_reason_of(name: str) -> str | None:
    reasons: list[str] = META[name]["finish"]
    return reasons[-1] if reasons else None


def test_tables_name_every_recording() -> None:
    assert {path.stem for path in FOLDER.glob("*.sse")} == set(META)
    assert {path.stem for path in (FOLDER / "errors").glob("*.json")} == set(ERRORS)
    assert set(META) > set(FAILED)


# ---- The parser alone


def splits(stream: bytes) -> Iterator[list[bytes]]:
    """Split into single bytes or, where that would take seconds, into two prime sizes."""
    if len(stream) < 50_000:
        yield split_evenly(1, stream)
    else:
        yield split_evenly(13, stream)
        yield split_evenly(1009, stream)


def parse(reads: Sequence[bytes]) -> tuple[object, ...]:
    """Return everything that the parser reports for these reads."""
    parser = CompletionParser()
    chunks = [chunk for data in reads for chunk in parser.feed(data) or ()]
    chunks += parser.close() or []
    error = parser.error and (parser.error.code, parser.error.retryable)
    return chunks, parser.model, parser.finish_reason, parser.usage, parser.done, error


@pytest.mark.parametrize("name", META)
def test_recorded_reasoning_is_complete(name: str) -> None:
    chunks = CompletionParser().feed(recorded(name)) or []
    reasoning = "".join(chunk for chunk in chunks if isinstance(chunk, Reasoning))
    assert len(reasoning) == META[name]["reasoning_chars"]


@pytest.mark.parametrize("name", META)
def test_recorded_stream_parses_the_same_for_every_split(name: str) -> None:
    expected = parse([recorded(name)])
    for stream in line_end_variants(recorded(name)):
        for reads in splits(stream):
            assert parse(reads) == expected


# ---- Through the service


def head_of(name: str) -> bytes:
    """Return the recorded response head, with chunked framing."""
    framing = {"content-length", "transfer-encoding", "connection"}
    lines = [
        f"{header}: {value}"
        for header, value in META[name]["headers"].items()
        if header.lower() not in framing
    ]
    return "\r\n".join(["HTTP/1.1 200 OK", *lines, "transfer-encoding: chunked", "", ""]).encode()


async def result_of(reply: Response) -> dict[str, Any]:
    """Return the text and the terminal state of a response."""
    if reply.status != 200:
        return {"status": reply.status, "text": "", "error": (await reply.json())["error"]["code"]}
    *chunks, last = await reply.events()
    text = "".join(chunk["chunk"] for chunk in chunks)
    if last["status"] == "error":
        return {"status": 200, "text": text, "error": last["error"]["code"]}
    fields = {name: last[name] for name in ("model", "finish_reason", "usage")}
    return {"status": 200, "text": text, **fields}


@pytest.mark.parametrize("name", META)
async def test_recorded_stream_reaches_the_client(
    name: str, service: StartService, upstream: StartUpstream
) -> None:
    if name in FAILED:
        # After text the status is already 200. Before it, the error has its own status.
        status = 200 if text_of(name) else 502
        expected = {"status": status, "text": text_of(name), "error": FAILED[name]}
    else:
        expected = {
            "status": 200,
            "text": text_of(name),
            # Some recordings contain no model. Then the requested one is reported.
            "model": META[name]["model"] or "gpt-4o-mini",
            "finish_reason": finish_reason_of(name),
            "usage": usage_of(name),
            **UNSEPARATED.get(name, {}),
        }
    variants = [
        reads
        for stream in line_end_variants(recorded(name))
        for reads in (
            split_evenly(4096, stream),
            split_randomly(stream, seed=1),
            split_randomly(stream, seed=2),
        )
    ]

    async def script(request: Connection) -> None:
        await request.send(head_of(name))
        for data in variants[len(provider.requests) - 1]:
            await request.send_events(data)
            # Let the service run, so that the writes often arrive as separate reads.
            await asyncio.sleep(0)
        await request.send(END)

    provider = await upstream(script)
    app = await service(**openai_env(provider.url, RATE_LIMIT="off"))
    for _ in variants:
        result = await result_of(await app.chat())
        if len(META[name]["text"]) > 1:
            # Of several choices, the text before the error depends on their order.
            result["text"] = expected["text"]
        assert result == expected


@pytest.mark.parametrize("name", ERRORS)
async def test_recorded_error_is_classified_and_none_of_its_text_is_passed_on(
    name: str, service: StartService, upstream: StartUpstream
) -> None:
    recording = json.loads((FOLDER / "errors" / f"{name}.json").read_bytes())
    headers = (
        f"{header}: {value}"
        for header, value in recording["headers"].items()
        if header not in ("content-length", "connection")
    )
    error_response = response(recording["status"], recording["body"].encode(), *headers)

    async def script(request: Connection) -> None:
        await request.send(error_response)

    provider = await upstream(script)
    app = await service(**openai_env(provider.url, RATE_LIMIT="off"))
    reply = await app.chat()
    body = (await reply.body()).decode()
    error = json.loads(body)["error"]
    status, code, retryable, retry_after = ERRORS[name]
    assert (reply.status, error["code"], error["retryable"]) == (status, code, retryable)
    assert error["retry_after"] == retry_after
    assert reply.headers.get("retry-after") == (retry_after and str(retry_after))

    await app.log.wait_for_request()
    output = body + str(reply.headers) + "".join(app.log.lines)
    phrases = set(re.findall(r"\w+_\w+|[^\"<>{}\\]{12,}", recording["body"]))
    assert phrases
    assert {phrase for phrase in phrases if phrase in output} <= LOG_WORDS
    assert CANARY not in output
