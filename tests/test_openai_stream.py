"""Bytes from a provider to chunks of text, and what is sent to get them. Pure functions where there
is no I/O; everything else over real sockets, through the service."""

import itertools
import re
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from openai_stream import MAX_EVENT_BYTES, CompletionParser, SSEDecoder, classify_error, retry_after
from tests.client import CANARY
from tests.upstream import (
    DONE,
    delta,
    event,
)

KEY = CANARY
BOM = b"\xef\xbb\xbf"
# One failure is to be one request: what a retry does is not tested here.
QUIET = {"RATE_LIMIT": "off", "MAX_RETRIES": "0"}


def openai(url: str, **more: str) -> dict[str, str]:
    """The settings of a service that has one provider, at `url`."""
    return {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": url, **QUIET, **more}


def cut(stream: bytes, places: Sequence[int]) -> list[bytes]:
    """`stream` in chunks, cut at these places."""
    edges = [0, *sorted(place % (len(stream) + 1) for place in places), len(stream)]
    return [stream[a:b] for a, b in itertools.pairwise(edges)]


# ---- SSEDecoder


def decode(*cuts: bytes) -> list[tuple[bytes, bytes]]:
    decoder = SSEDecoder()
    return [found for data in cuts for found in decoder.feed(data)]


def by_the_standard(stream: bytes) -> list[tuple[bytes, bytes]]:
    """WHATWG HTML 9.2.6, sentence by sentence, and the one addition: lines of the field error."""
    events = []
    data = name = b""
    for line in re.split(b"\r\n|\n|\r", stream.removeprefix(BOM))[:-1]:
        if line == b"":
            if data != b"":
                events.append((name, data.removesuffix(b"\n")))
            data = name = b""
        elif line.startswith(b":"):
            continue
        else:
            field, value = line.split(b":", 1) if b":" in line else (line, b"")
            value = value[1:] if value.startswith(b" ") else value
            if field == b"event":
                name = value
            elif field == b"data":
                data += value + b"\n"
            elif field == b"error":
                events.append((b"error", value))
    return events


STREAMS = {
    # The standard's own examples.
    "lines of one event": (b"data: YHOO\ndata: +2\ndata: 10\n\n", [(b"", b"YHOO\n+2\n10")]),
    "comment, ids": (
        (
            b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\n"
            b"data:  third event\n\n"
        ),
        [(b"", b"first event"), (b"", b"second event"), (b"", b" third event")],
    ),
    "empty data": (b"data\n\ndata\ndata\n\ndata:", [(b"", b""), (b"", b"\n")]),
    "space or none": (b"data:test\n\ndata: test\n\n", [(b"", b"test"), (b"", b"test")]),
    # Line ends.
    "LF": (b"data: a\n\ndata: b\n\n", [(b"", b"a"), (b"", b"b")]),
    "CR": (b"data: a\r\rdata: b\r\r", [(b"", b"a"), (b"", b"b")]),
    "CRLF": (b"data: a\r\n\r\ndata: b\r\n\r\n", [(b"", b"a"), (b"", b"b")]),
    "CR then LF": (b"data: a\r\ndata: b\n\r\n", [(b"", b"a\nb")]),
    "LF then CR": (b"data: a\n\rdata: b\r\n\n", [(b"", b"a"), (b"", b"b")]),
    # Line ends to str.splitlines(), text to the standard.
    "U+2028": ("data: a\u2028b\u2029c\n\n".encode(), [(b"", "a\u2028b\u2029c".encode())]),
    "NEL": ("data: a\u0085b\n\n".encode(), [(b"", "a\u0085b".encode())]),
    "VT, FF, FS": (b"data: a\x0bb\x0cc\x1cd\n\n", [(b"", b"a\x0bb\x0cc\x1cd")]),
    "characters of 2 to 4 bytes": (
        "data: é日👋\n\n".encode(),
        [(b"", "é日👋".encode())],
    ),
    # The byte order mark.
    "BOM": (BOM + b"data: a\n\n", [(b"", b"a")]),
    "BOM before an empty line": (BOM + b"\ndata: a\n\n", [(b"", b"a")]),
    "only one BOM": (BOM + BOM + b"data: a\n\ndata: b\n\n", [(b"", b"b")]),
    "only at the beginning": (b"\n" + BOM + b"data: a\n\n", []),
    # Fields.
    "comments between data": (b"data: a\n: b\n:\ndata: c\n\n", [(b"", b"a\nc")]),
    "unknown fields": (b"id: 1\nretry: 5\nDATA: a\n data: b\ndata : c\n\n", []),
    "one space stripped": (b"data:   a \n\n", [(b"", b"  a ")]),
    "a colon in the value": (b"data: a: b:c\n\n", [(b"", b"a: b:c")]),
    "a name": (b"event: error\ndata: a\n\n", [(b"error", b"a")]),
    "a name after its data": (b"data: a\nevent: x\n\n", [(b"x", b"a")]),
    "the last name": (b"event: x\nevent:y\ndata: a\n\n", [(b"y", b"a")]),
    "a name is for one event": (
        b"event: x\ndata: a\n\ndata: b\n\n",
        [(b"x", b"a"), (b"", b"b")],
    ),
    "a name without data": (b"event: x\n\ndata: b\n\n", [(b"", b"b")]),
    "a bare error line": (b'error: {"detail":1}\n', [(b"error", b'{"detail":1}')]),
    "an error line between events": (
        b"data: a\n\nerror: b\n\ndata: c\n\n",
        [(b"", b"a"), (b"error", b"b"), (b"", b"c")],
    ),
    # The end of the stream is not the end of an event.
    "no blank line": (b"data: a\n\ndata: b\n", [(b"", b"a")]),
    "no line end": (b"data: a\n\ndata: b", [(b"", b"a")]),
}


@pytest.mark.parametrize(("stream", "events"), STREAMS.values(), ids=STREAMS)
def test_an_event_stream_is_read_as_the_standard_says(
    stream: bytes, events: list[tuple[bytes, bytes]]
) -> None:
    assert decode(stream) == events
    assert decode(*cut(stream, range(len(stream)))) == events
    for place in range(len(stream)):
        assert decode(stream[:place], stream[place:]) == events


# What has a meaning to a decoder, more often than chance would bring it.
TOKENS = (
    *(b"\r", b"\n", b"\r\n", b"\n\n", b":", b" ", b"data", b"data: ", b"event:", b"error:", b"id"),
    *(BOM, BOM[:1], BOM[1:], b"\xe2\x80\xa8", b"\xc2\x85", b"\x0b", b"{}", b"[DONE]", b"x"),
)
any_stream = st.lists(st.sampled_from(TOKENS) | st.binary(max_size=3), max_size=30).map(b"".join)
any_places = st.lists(st.integers(0, 200), max_size=20)


@settings(deadline=None)
@given(any_stream, any_places)
def test_where_a_stream_is_cut_changes_nothing(stream: bytes, places: list[int]) -> None:
    assert decode(*cut(stream, places)) == decode(stream)


@settings(deadline=None)
@given(any_stream)
def test_any_bytes_are_read_as_the_standard_says(stream: bytes) -> None:
    assert decode(stream) == by_the_standard(stream)


def nearly_full() -> SSEDecoder:
    """A decoder in the middle of an event that may have 99 bytes more."""
    decoder = SSEDecoder()
    assert decoder.feed(b"data:" + (MAX_EVENT_BYTES - 100) * b"x" + b"\n") == []
    return decoder


@pytest.mark.parametrize(
    "endless",
    [
        b"data: " + 200 * b"x",
        200 * b"x",
        b": " + 200 * b"x",
        100 * b"data: x\n",
        BOM + b"error:" + 200 * b"x",
    ],
    ids=["a line", "no field", "a comment", "lines of one event", "an error line"],
)
def test_what_does_not_end_within_the_limit_is_reported_as_too_large(endless: bytes) -> None:
    decoder = nearly_full()
    seen = []
    for byte in cut(endless, range(len(endless))):
        assert decoder.feed(byte) == []
        seen.append(decoder.too_large)
    assert seen[:99] == 99 * [False]
    assert seen[-1]


def test_an_event_without_end_is_too_large_even_if_its_lines_are_empty() -> None:
    decoder = nearly_full()
    assert decoder.feed(99 * b"data:\n") == []
    assert not decoder.too_large
    assert decoder.feed(b"data:\n") == []
    assert decoder.too_large


def test_the_limit_is_for_one_event_and_not_for_their_sum() -> None:
    decoder = SSEDecoder()
    text = (MAX_EVENT_BYTES * 2 // 3) * b"x"
    for _ in range(10):
        assert decoder.feed(b"data: " + text + b"\n\n") == [(b"", text)]
        assert not decoder.too_large


def test_a_line_that_comes_byte_by_byte_costs_no_more_for_each_than_a_short_one() -> None:
    def seconds(count: int) -> float:
        decoder = SSEDecoder()
        started = time.process_time()
        for _ in range(count):
            decoder.feed(b"x")
        return time.process_time() - started

    short = min(seconds(20_000) for _ in range(3))
    long = min(seconds(200_000) for _ in range(3))
    # Ten times as many bytes; a hundred times the work if each were to copy those before it.
    assert long / short < 30


# ---- CompletionParser


def read(*cuts: bytes) -> tuple[list[str], CompletionParser]:
    """The chunks of these bytes, and their reader."""
    reader = CompletionParser()
    return [chunk for data in cuts for chunk in reader.feed(data) or ()], reader


def sse(*chunks: bytes) -> bytes:
    """An event for each of these chunks."""
    return b"".join(b"data: %b\n\n" % chunk for chunk in chunks)


# What one chunk is: chunks; [] for reasoning alone; None for nothing that shows progress.
CHUNKS: dict[str, tuple[bytes, list[str] | None]] = {
    "text": (b'{"choices":[{"index":0,"delta":{"content":"Hi"}}]}', ["Hi"]),
    "text that is white space": (b'{"choices":[{"delta":{"content":" \\n"}}]}', [" \n"]),
    "text of two bytes a character": ('{"choices":[{"delta":{"content":"é"}}]}'.encode(), ["é"]),
    "text in escapes": (b'{"choices":[{"delta":{"content":"\\ud83d\\ude00"}}]}', ["😀"]),
    "no choices": (b'{"model":"m"}', None),
    "choices null": (b'{"choices":null}', None),
    "choices empty": (b'{"choices":[]}', None),
    "index only": (b'{"choices":[{"index":0}]}', None),
    "index null": (b'{"choices":[{"index":null,"delta":{"content":"Hi"}}]}', ["Hi"]),
    "no index": (b'{"choices":[{"delta":{"content":"Hi"}}]}', ["Hi"]),
    "index 1": (
        b'{"choices":[{"index":1,"delta":{"content":"No"},"finish_reason":"stop"}]}',
        None,
    ),
    "indexes 1 and 0": (
        b'{"choices":[{"index":1,"delta":{"content":"No"}},{"index":0,"delta":{"content":"Yes"}}]}',
        ["Yes"],
    ),
    "no delta": (b'{"choices":[{"index":0,"content_filter_results":{}}]}', None),
    "delta null": (b'{"choices":[{"index":0,"delta":null}]}', None),
    "delta empty": (b'{"choices":[{"index":0,"delta":{}}]}', None),
    "a role": (b'{"choices":[{"delta":{"role":"assistant"}}]}', None),
    "content null": (b'{"choices":[{"delta":{"role":"assistant","content":null}}]}', None),
    "content empty": (b'{"choices":[{"delta":{"content":""}}]}', None),
    "content neither text nor parts": (b'{"choices":[{"delta":{"content":5}}]}', []),
    "content an empty list": (b'{"choices":[{"delta":{"content":[]}}]}', None),
    "content that is no text": (b'{"choices":[{"delta":{"content":5}}]}', []),
    "parts of text": (
        (
            b'{"choices":[{"delta":{"content":'
            b'[{"type":"text","text":"a"},{"type":"text","text":"b"}]}}]}'
        ),
        ["a", "b"],
    ),
    "a part of thinking": (
        (
            b'{"choices":[{"delta":{"content":'
            b'[{"type":"thinking","thinking":[{"type":"text","text":"hm"}]}]}}]}'
        ),
        [],
    ),
    "parts of both": (
        (
            b'{"choices":[{"delta":{"content":'
            b'[{"type":"thinking","thinking":[]},{"type":"text","text":""},'
            b'{"type":"text","text":"a"}]}}]}'
        ),
        ["a"],
    ),
    "a classify_error": (
        b'{"choices":[{"delta":{"content":null,"classify_error":"No."}}]}',
        ["No."],
    ),
    "content and classify_error": (
        b'{"choices":[{"delta":{"classify_error":"b","content":"a"}}]}',
        ["a", "b"],
    ),
    "reasoning_content": (
        b'{"choices":[{"delta":{"content":null,"reasoning_content":"hm"}}]}',
        [],
    ),
    "reasoning": (b'{"choices":[{"delta":{"content":"","reasoning":"hm"}}]}', []),
    "reasoning empty": (b'{"choices":[{"delta":{"reasoning":"","reasoning_content":null}}]}', None),
    "reasoning beside text": (
        b'{"choices":[{"delta":{"content":"a","reasoning":"hm"}}]}',
        ["a"],
    ),
    "a tool call": (
        b'{"choices":[{"delta":{"tool_calls":[{"index":0,"function":{"arguments":"{}"}}]}}]}',
        None,
    ),
    "the whole message beside the delta": (
        b'{"choices":[{"delta":{"content":"lo"},"message":{"content":"Hello"}}]}',
        ["lo"],
    ),
    "the text beside the delta": (b'{"choices":[{"delta":{"content":"lo"},"text":"lo"}]}', ["lo"]),
    "the whole message and no delta": (
        b'{"choices":[{"index":0,"message":{"content":"Hello"},"text":"Hello"}]}',
        None,
    ),
    "error null": (b'{"error":null,"choices":[{"delta":{"content":"a"}}]}', ["a"]),
    "a filter's results": (b'{"choices":[],"prompt_filter_results":[{"prompt_index":0}]}', None),
}


@pytest.mark.parametrize(("chunk", "batch"), CHUNKS.values(), ids=CHUNKS)
def test_a_chunk_is_pieces_or_a_sign_of_life_or_nothing(
    chunk: bytes, batch: list[str] | None
) -> None:
    reader = CompletionParser()
    assert reader.feed(sse(chunk)) == batch
    assert reader.error is None
    assert not reader.done
    assert reader.finish_reason is None


@pytest.mark.parametrize(
    "stream",
    [b"", b": OPENROUTER PROCESSING\n\n", b"\n\n\n", b"data:\n\n", b"id: 1\nretry: 5\n\n", b"data"],
)
def test_what_holds_no_chunk_is_no_sign_of_life(stream: bytes) -> None:
    reader = CompletionParser()
    assert reader.feed(stream) is None
    assert reader.error is None


def test_the_pieces_of_one_read_are_one_batch() -> None:
    reader = CompletionParser()
    assert reader.feed(delta("a") + delta("b") + b"data: ") == ["a", "b"]
    assert reader.feed(delta("c").removeprefix(b"data: ")) == ["c"]


USAGES: dict[str, tuple[bytes, dict[str, Any] | None]] = {
    "none": (sse(b'{"choices":[]}'), None),
    "null on every chunk": (sse(b'{"usage":null,"choices":[]}'), None),
    "a chunk without choices": (
        sse(b'{"usage":null,"choices":[{"delta":{"content":"a"}}]}')
        + sse(b'{"choices":[],"usage":{"total_tokens":3}}'),
        {"total_tokens": 3},
    ),
    "beside the finish": (
        sse(b'{"choices":[{"delta":{},"finish_reason":"stop"}],"usage":{"total_tokens":3}}'),
        {"total_tokens": 3},
    ),
    "cumulative: the last one": (
        sse(b'{"usage":{"total_tokens":1}}', b'{"usage":{"total_tokens":2}}'),
        {"total_tokens": 2},
    ),
    "overwritten, not merged": (
        sse(b'{"usage":{"total_tokens":1,"cost":1}}', b'{"usage":{"total_tokens":2}}'),
        {"total_tokens": 2},
    ),
    "kept when null follows": (
        sse(b'{"usage":{"total_tokens":1}}', b'{"usage":null}'),
        {"total_tokens": 1},
    ),
    "under x_groq": (sse(b'{"x_groq":{"id":"r","usage":{"total_tokens":3}}}'), {"total_tokens": 3}),
    "x_groq without usage": (sse(b'{"x_groq":{"id":"r"}}'), None),
    "x_groq null": (sse(b'{"x_groq":null}'), None),
    "both: the chunk's own": (
        sse(b'{"x_groq":{"usage":{"total_tokens":3}},"usage":{"total_tokens":4}}'),
        {"total_tokens": 4},
    ),
    "with what else it holds": (
        sse(b'{"usage":{"total_tokens":3,"prompt_tokens_details":{"cached_tokens":1},"x":[1.5]}}'),
        {"total_tokens": 3, "prompt_tokens_details": {"cached_tokens": 1}, "x": [1.5]},
    ),
}


@pytest.mark.parametrize(("stream", "usage"), USAGES.values(), ids=USAGES)
def test_usage_is_the_last_that_the_provider_sent(
    stream: bytes, usage: dict[str, Any] | None
) -> None:
    assert read(stream)[1].usage == usage


def test_model_and_finish_reason_are_the_last_that_are_named() -> None:
    _, reader = read(
        sse(
            b'{"model":"","choices":[]}',
            b'{"model":"m-1","choices":[{"delta":{},"finish_reason":null}]}',
            b'{"model":"m-2","choices":[{"delta":{},"finish_reason":"length"}]}',
            b'{"choices":[{"index":1,"delta":{},"finish_reason":"stop"}]}',
            b'{"model":null,"choices":[{"delta":{},"finish_reason":null}]}',
        )
    )
    assert (reader.model, reader.finish_reason) == ("m-2", "length")


def test_a_stream_that_names_no_model_and_no_finish_reason_has_none() -> None:
    _, reader = read(sse(b'{"choices":[{"delta":{"content":"a"}}]}'))
    assert (reader.model, reader.finish_reason, reader.done) == ("", None, False)


@pytest.mark.parametrize(
    "end", [b"data: [DONE]\n\n", b"data:[DONE]\n\n", b"data: [DONE] \n\n", b"data: [DONE]\r\n\r\n"]
)
def test_done_ends_the_stream_and_what_follows_is_not_read(end: bytes) -> None:
    reader = CompletionParser()
    assert reader.feed(delta("a") + end + delta("b") + end) == ["a"]
    assert reader.feed(delta("c") + sse(b'{"error":"late"}', b"nonsense")) is None
    assert reader.done
    assert reader.error is None


# What one event reports as its failure: the error's class, and whether trying again may help.
FAILURES: dict[str, tuple[bytes, str, bool]] = {
    "an object": (
        b'data: {"error":{"message":"x","type":"server_error","code":null}}\n\n',
        "upstream_error",
        True,
    ),
    "a string": (b'data: {"error":"something broke"}\n\n', "upstream_error", True),
    "beside choices": (
        b'data: {"choices":[{"delta":{"content":"no"}}],"error":{"message":"x"}}\n\n',
        "upstream_error",
        True,
    ),
    "event: error": (b'event: error\ndata: {"error":{"message":"x"}}\n\n', "upstream_error", True),
    "event: error without a member of that name": (
        b'event: error\ndata: {"message":"overloaded"}\n\n',
        "upstream_unavailable",
        True,
    ),
    "event: error with a string": (b'event: error\ndata: "broken"\n\n', "upstream_error", True),
    "a bare error line": (
        b'error: {"detail":"x","error":{"message":"x"}}\n',
        "upstream_error",
        True,
    ),
    "code 429": (b'data: {"error":{"code":429,"message":"x"}}\n\n', "upstream_unavailable", True),
    "code '429'": (b'data: {"error":{"code":"429"}}\n\n', "upstream_unavailable", True),
    "code 400": (b'data: {"error":{"code":400,"message":"x"}}\n\n', "upstream_error", False),
    "code 401": (b'data: {"error":{"code":401,"message":"x"}}\n\n', "upstream_error", False),
    "code 402": (b'data: {"error":{"code":402,"message":"x"}}\n\n', "upstream_unavailable", False),
    "code 502": (b'data: {"error":{"code":502,"message":"x"}}\n\n', "upstream_error", True),
    "a code that is no status": (b'data: {"error":{"code":1301}}\n\n', "upstream_error", True),
    "overloaded": (
        b'data: {"error":{"type":"overloaded_error","message":"x"}}\n\n',
        "upstream_unavailable",
        True,
    ),
    "the filter": (b'data: {"error":{"code":"content_filter"}}\n\n', "content_refused", False),
    "too long": (
        b'data: {"error":{"code":"context_length_exceeded"}}\n\n',
        "context_too_long",
        False,
    ),
    # What makes no sense will hardly make more the next time.
    "no JSON": (b"data: {oops\n\n", "upstream_error", False),
    "two values": (b"data: {} {}\n\n", "upstream_error", False),
    "a list": (b"data: [{}]\n\n", "upstream_error", False),
    "a number": (b"data: 1\n\n", "upstream_error", False),
    "a string and no event of that name": (b'data: "a"\n\n', "upstream_error", False),
    "null": (b"data: null\n\n", "upstream_error", False),
    "NaN": (b'data: {"usage":{"cost":NaN}}\n\n', "upstream_error", False),
    "bad UTF-8": (b'data: {"choices":[{"delta":{"content":"\xff"}}]}\n\n', "upstream_error", False),
    "half a surrogate pair": (
        b'data: {"choices":[{"delta":{"content":"\\ud83d"}}]}\n\n',
        "upstream_error",
        False,
    ),
    "nested too deep": (b"data: " + 1000 * b"[" + 1000 * b"]" + b"\n\n", "upstream_error", False),
    "choices a number": (b'data: {"choices":1}\n\n', "upstream_error", False),
    "a choice null": (b'data: {"choices":[null]}\n\n', "upstream_error", False),
    "a delta of text": (b'data: {"choices":[{"delta":"Hi"}]}\n\n', "upstream_error", False),
    "a content of numbers": (
        b'data: {"choices":[{"delta":{"content":[1]}}]}\n\n',
        "upstream_error",
        False,
    ),
}


@pytest.mark.parametrize(("failure", "kind", "retryable"), FAILURES.values(), ids=FAILURES)
def test_a_failure_in_the_stream_ends_it_and_the_pieces_before_it_are_kept(
    failure: bytes, kind: str, retryable: bool
) -> None:
    reader = CompletionParser()
    assert reader.feed(delta("a") + failure + delta("b") + DONE) == ["a"]
    assert reader.feed(delta("c")) is None
    assert reader.error
    assert reader.error.code == kind
    assert reader.error.retryable is retryable
    assert not reader.done


def test_an_event_of_more_than_1_mib_ends_the_stream() -> None:
    reader = CompletionParser()
    assert reader.feed(delta("a") + b"data: ") == ["a"]
    assert reader.feed(b"x" * (MAX_EVENT_BYTES - 6)) is None
    assert reader.error is None
    assert reader.feed(b"x") is None
    assert reader.error
    assert reader.error.code == "upstream_error"


def test_what_follows_done_may_be_as_long_as_it_likes() -> None:
    _, reader = read(DONE + b"x" * (MAX_EVENT_BYTES + 1))
    assert reader.error is None


NAMES = (
    *(
        "choices",
        "delta",
        "content",
        "text",
        "index",
        "classify_error",
        "reasoning",
        "reasoning_content",
    ),
    *("usage", "x_groq", "model", "finish_reason", "error", "code", "type", "message", "x"),
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5)
    | st.sampled_from(["stop", "429", "text"])
)
any_json = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=5)
    ),
    max_leaves=15,
)
# JSON of a chunk's shape down to some depth, where a stranger is most likely to be strange.
any_choice = st.fixed_dictionaries(
    {},
    optional={
        "index": any_json,
        "delta": st.fixed_dictionaries(
            {}, optional=dict.fromkeys(("content", "classify_error", "reasoning"), any_json)
        )
        | any_json,
        "finish_reason": any_json,
    },
)
any_chunk = (
    st.fixed_dictionaries(
        {},
        optional={
            "choices": st.lists(any_choice, max_size=3),
            "usage": any_json,
            "model": any_json,
            "x_groq": any_json,
        },
    )
    | any_json
)


@settings(deadline=None)
@given(st.lists(any_chunk, max_size=4))
def test_no_json_whatever_makes_the_reader_raise(chunks: list[Any]) -> None:
    _, reader = read(*(event(chunk) for chunk in chunks))
    assert reader.error or all(isinstance(chunk, dict) for chunk in chunks)
    assert not reader.done


@settings(deadline=None)
@given(any_stream | st.binary(max_size=200), any_places)
def test_no_bytes_whatever_make_the_reader_raise(stream: bytes, places: list[int]) -> None:
    whole, reader = read(stream)
    chunks, again = read(*cut(stream, places))
    assert chunks == whole
    assert (again.done, type(again.error)) == (reader.done, type(reader.error))


@settings(deadline=None)
@example([{"usage": [1]}])
@example([{"model": 5}])
@example([{"choices": [{"finish_reason": {"x": 1}}]}])
@example([{"choices": [{"delta": {"content": [{"type": "text", "text": 5}]}}]}])
@given(st.lists(any_chunk, max_size=4))
def test_what_is_kept_of_any_json_has_the_type_that_an_answer_promises(chunks: list[Any]) -> None:
    chunks, reader = read(*(event(chunk) for chunk in chunks))
    assert all(isinstance(chunk, str) and chunk for chunk in chunks)
    assert isinstance(reader.model, str)
    assert isinstance(reader.finish_reason, str | None)
    assert isinstance(reader.usage, dict | None)


# ---- classify_error, retry_after


def told(**error: object) -> dict[str, object]:
    return {"error": error}


# A response's status and JSON; the error that it is, and whether trying again may help.
REFUSALS: dict[str, tuple[int, object, str, bool]] = {
    # Not the caller's to mend.
    "400": (400, told(message="bad"), "upstream_error", False),
    "401": (401, told(code="invalid_api_key"), "upstream_error", False),
    "403": (403, told(code="unsupported_country"), "upstream_error", False),
    "404": (404, told(code="model_not_found"), "upstream_error", False),
    "422": (422, {"detail": [{"loc": ["body"]}]}, "upstream_error", False),
    "a redirect": (307, None, "upstream_error", False),
    "a status of one's own": (299, None, "upstream_error", False),
    # The provider's own trouble.
    "408": (408, None, "upstream_error", True),
    "409": (409, None, "upstream_error", True),
    "500": (500, told(type="server_error"), "upstream_error", True),
    "502 with HTML": (502, None, "upstream_error", True),
    "504": (504, None, "upstream_error", True),
    "520": (520, None, "upstream_error", True),
    "500 that carries another's 401": (500, told(code=401), "upstream_error", False),
    "502 that carries another's 401": (502, told(code=401), "upstream_error", True),
    # Busy.
    "429": (429, told(code="rate_limit_exceeded"), "upstream_unavailable", True),
    "429 without JSON": (429, None, "upstream_unavailable", True),
    "503": (503, None, "upstream_unavailable", True),
    "529": (529, None, "upstream_unavailable", True),
    "overloaded as 500": (
        500,
        told(message="The engine is Overloaded"),
        "upstream_unavailable",
        True,
    ),
    "500 that carries another's 429": (500, told(code="429"), "upstream_unavailable", True),
    "slow_down as 403": (403, told(code="slow_down"), "upstream_unavailable", True),
    # Somebody has to pay.
    "402": (402, told(message="Insufficient balance"), "upstream_unavailable", False),
    "quota by code": (429, told(code="insufficient_quota"), "upstream_unavailable", False),
    "quota by type": (429, told(type="insufficient_quota"), "upstream_unavailable", False),
    "billing": (429, told(code="billing_hard_limit_reached"), "upstream_unavailable", False),
    "a limit that is raised on the billing page": (
        429,
        told(
            message="Rate limit reached: 3 requests a minute. Try again in 20s, or add a payment"
            " method at https://provider.example/account/billing.",
            type="requests",
            code="rate_limit_exceeded",
        ),
        "upstream_unavailable",
        True,
    ),
    # Too long for the model.
    "too long by code": (400, told(code="context_length_exceeded"), "context_too_long", False),
    "too long by message": (
        400,
        told(message="Maximum Context Length is 9"),
        "context_too_long",
        False,
    ),
    "too long by type": (400, told(type="too_many_prompt_tokens"), "context_too_long", False),
    "too long as text": (
        400,
        told(message="prompt too long; by 7 tokens"),
        "context_too_long",
        False,
    ),
    "too long with 413": (
        413,
        told(message="exceeds the context window"),
        "context_too_long",
        False,
    ),
    "too long with 422": (422, "context length exceeded", "context_too_long", False),
    "too long with 500": (
        500,
        told(message="prompt is too long: 9 tokens"),
        "context_too_long",
        False,
    ),
    "a key that is too long": (401, told(message="key too long"), "upstream_error", False),
    "an answer that took too long": (
        500,
        told(message="The model took too long to answer.", type="server_error"),
        "upstream_error",
        True,
    ),
    # Against the provider's policy.
    "filtered by code": (400, told(code="content_filter"), "content_refused", False),
    "filtered with 200": (200, told(code="content_filter"), "content_refused", False),
    "policy by code": (400, told(code="content_policy_violation"), "content_refused", False),
    "a prompt that is flagged": (
        400,
        told(
            message="Invalid prompt: it was flagged as violating our usage policy.",
            type="invalid_request_error",
            code="invalid_prompt",
        ),
        "content_refused",
        False,
    ),
    "policy by message": (
        403,
        told(message="Refused by our Content Management Policy"),
        "content_refused",
        False,
    ),
    # JSON of other shapes.
    "error a string": (400, {"error": "context length exceeded"}, "context_too_long", False),
    "error null": (500, {"error": None}, "upstream_error", True),
    "error a list": (500, {"error": [1]}, "upstream_error", True),
    "no error member": (400, {"message": "prompt too long"}, "context_too_long", False),
    "a list": (500, [1, 2], "upstream_error", True),
    "a number": (500, 7, "upstream_error", True),
    "fields of other types": (
        500,
        told(code=["x"], type={"y": 1}, message=12),
        "upstream_error",
        True,
    ),
}


@pytest.mark.parametrize(("status", "body", "kind", "retryable"), REFUSALS.values(), ids=REFUSALS)
def test_a_refusal_is_told_by_its_code_its_words_and_its_status(
    status: int, body: object, kind: str, retryable: bool
) -> None:
    error = classify_error(status, body)
    assert error.code == kind
    assert error.retryable is retryable
    assert error.retry_after is None


def test_how_long_to_wait_is_passed_on_where_waiting_helps() -> None:
    headers = {"retry-after": "2.2"}
    assert classify_error(429, None, headers).retry_after == 2.2
    assert classify_error(503, None, headers).detail().retry_after == 3
    assert classify_error(500, None, headers).retry_after == 2.2
    assert classify_error(400, None, headers).retry_after is None
    assert classify_error(429, told(code="insufficient_quota"), headers).retry_after is None


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "3"}, 3.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": " 3 "}, 3.0),
        ({"retry-after-ms": "1500"}, 1.5),
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
        ({"retry-after-ms": "0", "retry-after": "1"}, 1.0),
        ({"retry-after-ms": "soon", "retry-after": "1"}, 1.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": ""}, None),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "86400"}, 86400.0),
        ({"retry-after": "86401"}, None),
    ],
)
def test_the_wait_is_that_of_the_headers_within_a_day(
    headers: dict[str, str], seconds: float | None
) -> None:
    assert retry_after(headers, 0.0) == seconds


def test_the_wait_may_be_given_as_a_date() -> None:
    now = datetime(2026, 11, 22, tzinfo=UTC)
    soon = format_datetime(now + timedelta(seconds=60), usegmt=True)
    assert retry_after({"retry-after": soon}, now.timestamp()) == 60


def test_a_date_that_is_past_is_no_wait() -> None:
    assert retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 1.5e9) is None
