"""Tests for the SSE decoder, the completion parser and the classification of provider errors."""

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
from tests.upstream import DONE, delta, event

BOM = b"\xef\xbb\xbf"


def split(stream: bytes, offsets: Sequence[int]) -> list[bytes]:
    """Split `stream` at these offsets, modulo its length."""
    edges = [0, *sorted(offset % (len(stream) + 1) for offset in offsets), len(stream)]
    return [stream[a:b] for a, b in itertools.pairwise(edges)]


# ---- SSEDecoder


def decode(*reads: bytes) -> list[tuple[bytes, bytes]]:
    decoder = SSEDecoder()
    return [found for data in reads for found in decoder.feed(data)]


def reference_decode(stream: bytes) -> list[tuple[bytes, bytes]]:
    """Decode `stream` as WHATWG HTML 9.2.6 is written, plus the extension for `error` lines."""
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
    # The examples of the standard.
    "lines of one event": (b"data: YHOO\ndata: +2\ndata: 10\n\n", [(b"", b"YHOO\n+2\n10")]),
    "comment and ids": (
        (
            b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\n"
            b"data:  third event\n\n"
        ),
        [(b"", b"first event"), (b"", b"second event"), (b"", b" third event")],
    ),
    "empty data lines": (b"data\n\ndata\ndata\n\ndata:", [(b"", b""), (b"", b"\n")]),
    "optional space after the colon": (
        b"data:test\n\ndata: test\n\n",
        [(b"", b"test"), (b"", b"test")],
    ),
    # Line ends.
    "LF": (b"data: a\n\ndata: b\n\n", [(b"", b"a"), (b"", b"b")]),
    "CR": (b"data: a\r\rdata: b\r\r", [(b"", b"a"), (b"", b"b")]),
    "CRLF": (b"data: a\r\n\r\ndata: b\r\n\r\n", [(b"", b"a"), (b"", b"b")]),
    "CR then LF": (b"data: a\r\ndata: b\n\r\n", [(b"", b"a\nb")]),
    "LF then CR": (b"data: a\n\rdata: b\r\n\n", [(b"", b"a"), (b"", b"b")]),
    # str.splitlines() splits here, the standard does not.
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
    "two BOMs": (BOM + BOM + b"data: a\n\ndata: b\n\n", [(b"", b"b")]),
    "BOM after the first line": (b"\n" + BOM + b"data: a\n\n", []),
    # Fields.
    "comments between data": (b"data: a\n: b\n:\ndata: c\n\n", [(b"", b"a\nc")]),
    "unknown fields": (b"id: 1\nretry: 5\nDATA: a\n data: b\ndata : c\n\n", []),
    "only one space is removed": (b"data:   a \n\n", [(b"", b"  a ")]),
    "colon in the value": (b"data: a: b:c\n\n", [(b"", b"a: b:c")]),
    "event name": (b"event: error\ndata: a\n\n", [(b"error", b"a")]),
    "event name after its data": (b"data: a\nevent: x\n\n", [(b"x", b"a")]),
    "last of two event names": (b"event: x\nevent:y\ndata: a\n\n", [(b"y", b"a")]),
    "event name applies to one event": (
        b"event: x\ndata: a\n\ndata: b\n\n",
        [(b"x", b"a"), (b"", b"b")],
    ),
    "event name without data": (b"event: x\n\ndata: b\n\n", [(b"", b"b")]),
    "error line": (b'error: {"detail":1}\n', [(b"error", b'{"detail":1}')]),
    "error line between events": (
        b"data: a\n\nerror: b\n\ndata: c\n\n",
        [(b"", b"a"), (b"error", b"b"), (b"", b"c")],
    ),
    # The end of the stream does not end an event.
    "no blank line at the end": (b"data: a\n\ndata: b\n", [(b"", b"a")]),
    "no line end at the end": (b"data: a\n\ndata: b", [(b"", b"a")]),
}


@pytest.mark.parametrize(("stream", "events"), STREAMS.values(), ids=STREAMS)
def test_stream_decodes_to_the_same_events_for_every_split(
    stream: bytes, events: list[tuple[bytes, bytes]]
) -> None:
    assert decode(stream) == events
    assert decode(*split(stream, range(len(stream)))) == events
    for offset in range(len(stream)):
        assert decode(stream[:offset], stream[offset:]) == events


# Tokens with a meaning, which random bytes would rarely contain.
TOKENS = (
    *(b"\r", b"\n", b"\r\n", b"\n\n", b":", b" ", b"data", b"data: ", b"event:", b"error:", b"id"),
    *(BOM, BOM[:1], BOM[1:], b"\xe2\x80\xa8", b"\xc2\x85", b"\x0b", b"{}", b"[DONE]", b"x"),
)
any_stream = st.lists(st.sampled_from(TOKENS) | st.binary(max_size=3), max_size=30).map(b"".join)
any_offsets = st.lists(st.integers(0, 200), max_size=20)


@settings(deadline=None)
@given(any_stream, any_offsets)
def test_splitting_any_bytes_does_not_change_the_events(stream: bytes, offsets: list[int]) -> None:
    assert decode(*split(stream, offsets)) == decode(stream)


@settings(deadline=None)
@given(any_stream)
def test_any_bytes_decode_as_the_standard_requires(stream: bytes) -> None:
    assert decode(stream) == reference_decode(stream)


def nearly_full() -> SSEDecoder:
    """Return a decoder in the middle of an event that may grow by 99 bytes."""
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
    ids=["data line", "line without a colon", "comment", "many data lines", "error line"],
)
def test_event_that_exceeds_the_limit_is_too_large(endless: bytes) -> None:
    decoder = nearly_full()
    too_large = []
    for byte in split(endless, range(len(endless))):
        assert decoder.feed(byte) == []
        too_large.append(decoder.too_large)
    assert too_large[:99] == 99 * [False]
    assert too_large[-1]


def test_empty_data_lines_count_towards_the_event_size() -> None:
    decoder = nearly_full()
    assert decoder.feed(99 * b"data:\n") == []
    assert not decoder.too_large
    assert decoder.feed(b"data:\n") == []
    assert decoder.too_large


def test_size_limit_applies_to_each_event_and_not_to_the_stream() -> None:
    decoder = SSEDecoder()
    text = (MAX_EVENT_BYTES * 2 // 3) * b"x"
    for _ in range(10):
        assert decoder.feed(b"data: " + text + b"\n\n") == [(b"", text)]
        assert not decoder.too_large


def test_cost_of_a_long_line_grows_linearly() -> None:
    def seconds(count: int) -> float:
        decoder = SSEDecoder()
        started = time.process_time()
        for _ in range(count):
            decoder.feed(b"x")
        return time.process_time() - started

    short = min(seconds(20_000) for _ in range(3))
    long = min(seconds(200_000) for _ in range(3))
    # Ten times the bytes. Copying the line for each byte would cost a hundred times as much.
    assert long / short < 30


# ---- CompletionParser


def parse(*reads: bytes) -> tuple[list[str], CompletionParser]:
    """Feed these reads to a new parser. Return the chunks and the parser."""
    parser = CompletionParser()
    return [chunk for data in reads for chunk in parser.feed(data) or ()], parser


def sse(*payloads: bytes) -> bytes:
    """Return one event for each payload."""
    return b"".join(b"data: %b\n\n" % payload for payload in payloads)


# An event's JSON and the result of `feed`: chunks, [] for reasoning only, None for no progress.
EVENTS: dict[str, tuple[bytes, list[str] | None]] = {
    "text": (b'{"choices":[{"index":0,"delta":{"content":"Hi"}}]}', ["Hi"]),
    "white space": (b'{"choices":[{"delta":{"content":" \\n"}}]}', [" \n"]),
    "UTF-8": ('{"choices":[{"delta":{"content":"é"}}]}'.encode(), ["é"]),
    "escaped surrogate pair": (b'{"choices":[{"delta":{"content":"\\ud83d\\ude00"}}]}', ["😀"]),
    "no choices": (b'{"model":"m"}', None),
    "choices null": (b'{"choices":null}', None),
    "choices empty": (b'{"choices":[]}', None),
    "choice with an index only": (b'{"choices":[{"index":0}]}', None),
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
    "role only": (b'{"choices":[{"delta":{"role":"assistant"}}]}', None),
    "content null": (b'{"choices":[{"delta":{"role":"assistant","content":null}}]}', None),
    "content empty": (b'{"choices":[{"delta":{"content":""}}]}', None),
    "content is a number": (b'{"choices":[{"delta":{"content":5}}]}', []),
    "content is an empty list": (b'{"choices":[{"delta":{"content":[]}}]}', None),
    "text parts": (
        (
            b'{"choices":[{"delta":{"content":'
            b'[{"type":"text","text":"a"},{"type":"text","text":"b"}]}}]}'
        ),
        ["a", "b"],
    ),
    "thinking part": (
        (
            b'{"choices":[{"delta":{"content":'
            b'[{"type":"thinking","thinking":[{"type":"text","text":"hm"}]}]}}]}'
        ),
        [],
    ),
    "thinking and text parts": (
        (
            b'{"choices":[{"delta":{"content":'
            b'[{"type":"thinking","thinking":[]},{"type":"text","text":""},'
            b'{"type":"text","text":"a"}]}}]}'
        ),
        ["a"],
    ),
    "refusal": (
        b'{"choices":[{"delta":{"content":null,"refusal":"No."}}]}',
        ["No."],
    ),
    "content and refusal": (
        b'{"choices":[{"delta":{"refusal":"b","content":"a"}}]}',
        ["a", "b"],
    ),
    "reasoning_content": (
        b'{"choices":[{"delta":{"content":null,"reasoning_content":"hm"}}]}',
        [],
    ),
    "reasoning": (b'{"choices":[{"delta":{"content":"","reasoning":"hm"}}]}', []),
    "reasoning empty": (b'{"choices":[{"delta":{"reasoning":"","reasoning_content":null}}]}', None),
    "reasoning and content": (
        b'{"choices":[{"delta":{"content":"a","reasoning":"hm"}}]}',
        ["a"],
    ),
    "tool call": (
        b'{"choices":[{"delta":{"tool_calls":[{"index":0,"function":{"arguments":"{}"}}]}}]}',
        None,
    ),
    "message beside the delta": (
        b'{"choices":[{"delta":{"content":"lo"},"message":{"content":"Hello"}}]}',
        ["lo"],
    ),
    "text field beside the delta": (
        b'{"choices":[{"delta":{"content":"lo"},"text":"lo"}]}',
        ["lo"],
    ),
    "message without a delta": (
        b'{"choices":[{"index":0,"message":{"content":"Hello"},"text":"Hello"}]}',
        None,
    ),
    "error null": (b'{"error":null,"choices":[{"delta":{"content":"a"}}]}', ["a"]),
    "content filter results": (
        b'{"choices":[],"prompt_filter_results":[{"prompt_index":0}]}',
        None,
    ),
}


@pytest.mark.parametrize(("payload", "result"), EVENTS.values(), ids=EVENTS)
def test_event_yields_its_text(payload: bytes, result: list[str] | None) -> None:
    parser = CompletionParser()
    assert parser.feed(sse(payload)) == result
    assert parser.error is None
    assert not parser.done
    assert parser.finish_reason is None


@pytest.mark.parametrize(
    "stream",
    [b"", b": OPENROUTER PROCESSING\n\n", b"\n\n\n", b"data:\n\n", b"id: 1\nretry: 5\n\n", b"data"],
)
def test_bytes_without_an_event_are_no_progress(stream: bytes) -> None:
    parser = CompletionParser()
    assert parser.feed(stream) is None
    assert parser.error is None


def test_chunks_of_one_read_are_returned_together() -> None:
    parser = CompletionParser()
    assert parser.feed(delta("a") + delta("b") + b"data: ") == ["a", "b"]
    assert parser.feed(delta("c").removeprefix(b"data: ")) == ["c"]


USAGES: dict[str, tuple[bytes, dict[str, Any] | None]] = {
    "none": (sse(b'{"choices":[]}'), None),
    "null": (sse(b'{"usage":null,"choices":[]}'), None),
    "in an event without choices": (
        sse(b'{"usage":null,"choices":[{"delta":{"content":"a"}}]}')
        + sse(b'{"choices":[],"usage":{"total_tokens":3}}'),
        {"total_tokens": 3},
    ),
    "beside the finish_reason": (
        sse(b'{"choices":[{"delta":{},"finish_reason":"stop"}],"usage":{"total_tokens":3}}'),
        {"total_tokens": 3},
    ),
    "cumulative": (
        sse(b'{"usage":{"total_tokens":1}}', b'{"usage":{"total_tokens":2}}'),
        {"total_tokens": 2},
    ),
    "replaced, not merged": (
        sse(b'{"usage":{"total_tokens":1,"cost":1}}', b'{"usage":{"total_tokens":2}}'),
        {"total_tokens": 2},
    ),
    "null after usage": (
        sse(b'{"usage":{"total_tokens":1}}', b'{"usage":null}'),
        {"total_tokens": 1},
    ),
    "under x_groq": (sse(b'{"x_groq":{"id":"r","usage":{"total_tokens":3}}}'), {"total_tokens": 3}),
    "x_groq without usage": (sse(b'{"x_groq":{"id":"r"}}'), None),
    "x_groq null": (sse(b'{"x_groq":null}'), None),
    "under x_groq and its own": (
        sse(b'{"x_groq":{"usage":{"total_tokens":3}},"usage":{"total_tokens":4}}'),
        {"total_tokens": 4},
    ),
    "with details": (
        sse(b'{"usage":{"total_tokens":3,"prompt_tokens_details":{"cached_tokens":1},"x":[1.5]}}'),
        {"total_tokens": 3, "prompt_tokens_details": {"cached_tokens": 1}, "x": [1.5]},
    ),
}


@pytest.mark.parametrize(("stream", "usage"), USAGES.values(), ids=USAGES)
def test_last_usage_wins(stream: bytes, usage: dict[str, Any] | None) -> None:
    assert parse(stream)[1].usage == usage


def test_last_model_and_finish_reason_win() -> None:
    _, parser = parse(
        sse(
            b'{"model":"","choices":[]}',
            b'{"model":"m-1","choices":[{"delta":{},"finish_reason":null}]}',
            b'{"model":"m-2","choices":[{"delta":{},"finish_reason":"length"}]}',
            b'{"choices":[{"index":1,"delta":{},"finish_reason":"stop"}]}',
            b'{"model":null,"choices":[{"delta":{},"finish_reason":null}]}',
        )
    )
    assert (parser.model, parser.finish_reason) == ("m-2", "length")


def test_model_and_finish_reason_are_empty_if_never_sent() -> None:
    _, parser = parse(sse(b'{"choices":[{"delta":{"content":"a"}}]}'))
    assert (parser.model, parser.finish_reason, parser.done) == ("", None, False)


@pytest.mark.parametrize(
    "end", [b"data: [DONE]\n\n", b"data:[DONE]\n\n", b"data: [DONE] \n\n", b"data: [DONE]\r\n\r\n"]
)
def test_events_after_done_are_ignored(end: bytes) -> None:
    parser = CompletionParser()
    assert parser.feed(delta("a") + end + delta("b") + end) == ["a"]
    assert parser.feed(delta("c") + sse(b'{"error":"late"}', b"nonsense")) is None
    assert parser.done
    assert parser.error is None


# A failure in the stream, and the code and retryable of its error.
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
    "error line": (
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
    # Malformed events. Providers repeat them, so they are not retryable.
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


@pytest.mark.parametrize(("failure", "code", "retryable"), FAILURES.values(), ids=FAILURES)
def test_failure_sets_the_error_and_ends_the_stream(
    failure: bytes, code: str, retryable: bool
) -> None:
    parser = CompletionParser()
    assert parser.feed(delta("a") + failure + delta("b") + DONE) == ["a"]
    assert parser.feed(delta("c")) is None
    assert parser.error
    assert parser.error.code == code
    assert parser.error.retryable is retryable
    assert not parser.done


def test_event_larger_than_1_mib_sets_the_error() -> None:
    parser = CompletionParser()
    assert parser.feed(delta("a") + b"data: ") == ["a"]
    errors = []
    for data in (b"x" * (MAX_EVENT_BYTES - 6), b"x"):
        assert parser.feed(data) is None
        errors.append(parser.error and parser.error.code)
    assert errors == [None, "upstream_error"]


def test_event_size_is_unlimited_after_done() -> None:
    _, parser = parse(DONE + b"x" * (MAX_EVENT_BYTES + 1))
    assert parser.error is None


NAMES = (
    *(
        "choices",
        "delta",
        "content",
        "text",
        "index",
        "refusal",
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
# JSON that has the shape of a chunk down to some depth.
any_choice = st.fixed_dictionaries(
    {},
    optional={
        "index": any_json,
        "delta": st.fixed_dictionaries(
            {}, optional=dict.fromkeys(("content", "refusal", "reasoning"), any_json)
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
def test_any_json_never_raises(events: list[Any]) -> None:
    _, parser = parse(*(event(payload) for payload in events))
    assert parser.error or all(isinstance(payload, dict) for payload in events)
    assert not parser.done


@settings(deadline=None)
@given(any_stream | st.binary(max_size=200), any_offsets)
def test_any_bytes_never_raise_and_splitting_them_changes_nothing(
    stream: bytes, offsets: list[int]
) -> None:
    chunks, parser = parse(stream)
    split_chunks, split_parser = parse(*split(stream, offsets))
    assert split_chunks == chunks
    assert (split_parser.done, type(split_parser.error)) == (parser.done, type(parser.error))


@settings(deadline=None)
@example([{"usage": [1]}])
@example([{"model": 5}])
@example([{"choices": [{"finish_reason": {"x": 1}}]}])
@example([{"choices": [{"delta": {"content": [{"type": "text", "text": 5}]}}]}])
@given(st.lists(any_chunk, max_size=4))
def test_values_parsed_from_any_json_have_the_declared_types(events: list[Any]) -> None:
    chunks, parser = parse(*(event(payload) for payload in events))
    assert all(isinstance(chunk, str) and chunk for chunk in chunks)
    assert isinstance(parser.model, str)
    assert isinstance(parser.finish_reason, str | None)
    assert isinstance(parser.usage, dict | None)


# ---- classify_error, retry_after


def wrapped(**error: object) -> dict[str, object]:
    return {"error": error}


# The status and JSON of an error response, and the code and retryable of our error.
RESPONSES: dict[str, tuple[int, object, str, bool]] = {
    # The operator has to act.
    "400": (400, wrapped(message="bad"), "upstream_error", False),
    "401": (401, wrapped(code="invalid_api_key"), "upstream_error", False),
    "403": (403, wrapped(code="unsupported_country"), "upstream_error", False),
    "404": (404, wrapped(code="model_not_found"), "upstream_error", False),
    "422": (422, {"detail": [{"loc": ["body"]}]}, "upstream_error", False),
    "a redirect": (307, None, "upstream_error", False),
    "a made-up status": (299, None, "upstream_error", False),
    # The provider failed.
    "408": (408, None, "upstream_error", True),
    "409": (409, None, "upstream_error", True),
    "500": (500, wrapped(type="server_error"), "upstream_error", True),
    "502 with HTML": (502, None, "upstream_error", True),
    "504": (504, None, "upstream_error", True),
    "520": (520, None, "upstream_error", True),
    "500 with code 401": (500, wrapped(code=401), "upstream_error", False),
    "502 with code 401": (502, wrapped(code=401), "upstream_error", True),
    # Busy.
    "429": (429, wrapped(code="rate_limit_exceeded"), "upstream_unavailable", True),
    "429 without JSON": (429, None, "upstream_unavailable", True),
    "503": (503, None, "upstream_unavailable", True),
    "529": (529, None, "upstream_unavailable", True),
    "overloaded as 500": (
        500,
        wrapped(message="The engine is Overloaded"),
        "upstream_unavailable",
        True,
    ),
    "500 with code 429": (500, wrapped(code="429"), "upstream_unavailable", True),
    "slow_down as 403": (403, wrapped(code="slow_down"), "upstream_unavailable", True),
    # The account is used up.
    "402": (402, wrapped(message="Insufficient balance"), "upstream_unavailable", False),
    "quota by code": (429, wrapped(code="insufficient_quota"), "upstream_unavailable", False),
    "quota by type": (429, wrapped(type="insufficient_quota"), "upstream_unavailable", False),
    "billing": (429, wrapped(code="billing_hard_limit_reached"), "upstream_unavailable", False),
    "rate limit that mentions billing": (
        429,
        wrapped(
            message="Rate limit reached: 3 requests a minute. Try again in 20s, or add a payment"
            " method at https://provider.example/account/billing.",
            type="requests",
            code="rate_limit_exceeded",
        ),
        "upstream_unavailable",
        True,
    ),
    # Too long for the model.
    "too long by code": (400, wrapped(code="context_length_exceeded"), "context_too_long", False),
    "too long by message": (
        400,
        wrapped(message="Maximum Context Length is 9"),
        "context_too_long",
        False,
    ),
    "too long by type": (400, wrapped(type="too_many_prompt_tokens"), "context_too_long", False),
    "too long as text": (
        400,
        wrapped(message="prompt too long; by 7 tokens"),
        "context_too_long",
        False,
    ),
    "too long with 413": (
        413,
        wrapped(message="exceeds the context window"),
        "context_too_long",
        False,
    ),
    "too long with 422": (422, "context length exceeded", "context_too_long", False),
    "too long with 500": (
        500,
        wrapped(message="prompt is too long: 9 tokens"),
        "context_too_long",
        False,
    ),
    "key too long": (401, wrapped(message="key too long"), "upstream_error", False),
    "response took too long": (
        500,
        wrapped(message="The model took too long to respond.", type="server_error"),
        "upstream_error",
        True,
    ),
    # Against the provider's policy.
    "filtered by code": (400, wrapped(code="content_filter"), "content_refused", False),
    "filtered with 200": (200, wrapped(code="content_filter"), "content_refused", False),
    "policy by code": (400, wrapped(code="content_policy_violation"), "content_refused", False),
    "flagged prompt": (
        400,
        wrapped(
            message="Invalid prompt: it was flagged as violating our usage policy.",
            type="invalid_request_error",
            code="invalid_prompt",
        ),
        "content_refused",
        False,
    ),
    "policy by message": (
        403,
        wrapped(message="Refused by our Content Management Policy"),
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
        wrapped(code=["x"], type={"y": 1}, message=12),
        "upstream_error",
        True,
    ),
}


@pytest.mark.parametrize(("status", "body", "code", "retryable"), RESPONSES.values(), ids=RESPONSES)
def test_error_response_is_classified(
    status: int, body: object, code: str, retryable: bool
) -> None:
    error = classify_error(status, body)
    assert error.code == code
    assert error.retryable is retryable
    assert error.retry_after is None


def test_retry_after_is_set_only_for_retryable_errors() -> None:
    headers = {"retry-after": "2.2"}
    assert classify_error(429, None, headers).retry_after == 2.2
    assert classify_error(503, None, headers).detail().retry_after == 3
    assert classify_error(500, None, headers).retry_after == 2.2
    assert classify_error(400, None, headers).retry_after is None
    assert classify_error(429, wrapped(code="insufficient_quota"), headers).retry_after is None


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
def test_retry_after_reads_seconds_up_to_a_day(
    headers: dict[str, str], seconds: float | None
) -> None:
    assert retry_after(headers, 0.0) == seconds


def test_retry_after_reads_a_date() -> None:
    now = datetime(2026, 11, 22, tzinfo=UTC)
    soon = format_datetime(now + timedelta(seconds=60), usegmt=True)
    assert retry_after({"retry-after": soon}, now.timestamp()) == 60


def test_retry_after_ignores_a_past_date() -> None:
    assert retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 1.5e9) is None
