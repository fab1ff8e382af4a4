"""Tests for the SSE decoder and the completion parser."""

import itertools
import json
import re
import time
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from openai_stream import (
    MAX_EVENT_BYTES,
    MAX_PREFIX_BYTES,
    Chunks,
    CompletionParser,
    Reasoning,
    SSEDecoder,
)
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
    """Decode `stream` as WHATWG HTML 9.2.6 is written, plus the decoder's extensions."""
    events: list[tuple[bytes, bytes]] = []
    block: list[bytes] = []
    for line in re.split(b"\r\n|\n|\r", stream.removeprefix(BOM))[:-1]:
        if line != b"":
            block.append(line)
            continue
        name, data = b"", []
        if block and block[0].startswith(b"{"):
            name, data, block = b"json", block, []
        for each in block:
            if each.startswith(b":"):
                continue
            field, value = each.split(b":", 1) if b":" in each else (each, b"")
            value = value[1:] if value.startswith(b" ") else value
            if field == b"event":
                name = value
            elif field == b"data":
                data.append(value)
            elif field == b"error":
                events.append((b"error", value))
            elif each.startswith(b"{"):
                events.append((b"json", each))
        separate = all(re.fullmatch(rb"(\{|\[DONE\]).*[\]}]|\[DONE\]", each) for each in data)
        values = data if separate else [b"\n".join(data)]
        events += [(name, value) for value in values]
        block = []
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
    "error line": (b'error: {"detail":1}\n\n', [(b"error", b'{"detail":1}')]),
    "JSON line": (b'{"a": 1}\n\ndata: b\n\n', [(b"json", b'{"a": 1}'), (b"", b"b")]),
    "JSON line after data": (b'data: b\n{"a": 1}\n\n', [(b"json", b'{"a": 1}'), (b"", b"b")]),
    "JSON lines": (b'{"a":1}\n{"b":2}\n\n', [(b"json", b'{"a":1}'), (b"json", b'{"b":2}')]),
    "JSON in several lines": (b'{\n"a": 1\n}\n\n', [(b"json", b'{\n"a": 1\n}')]),
    "no blank lines between data": (
        b'event: x\ndata: {"a":1}\ndata: {"b":2}\ndata: [DONE]\n\n',
        [(b"x", b'{"a":1}'), (b"x", b'{"b":2}'), (b"x", b"[DONE]")],
    ),
    "JSON in several data lines": (b'data: {\ndata: "a":1}\n\n', [(b"", b'{\n"a":1}')]),
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
    *(b"data: {}\n\n", b"data: x\n\n", b"data: x\r\n\r\n", b"data: {}\n", b"{}\n", b"{\n}\n\n"),
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
    """Return a decoder in the middle of an event that may grow by 100 bytes."""
    decoder = SSEDecoder()
    assert decoder.feed(b"data:" + (MAX_EVENT_BYTES - 106) * b"x" + b"\n") == []
    return decoder


@pytest.mark.parametrize(
    "endless",
    [
        b"data: " + 200 * b"x",
        200 * b"x",
        b": " + 200 * b"x",
        100 * b"data: x\n",
        100 * b"data:\n",
        b"error:" + 200 * b"x",
    ],
    ids=["data line", "line without a colon", "comment", "data lines", "empty lines", "error line"],
)
def test_event_that_exceeds_the_limit_is_too_large(endless: bytes) -> None:
    decoder = nearly_full()
    too_large = []
    for byte in split(endless, range(1, len(endless))):
        assert decoder.feed(byte) == []
        too_large.append(decoder.too_large)
    assert too_large[:100] == 100 * [False]
    assert too_large[100:] == (len(endless) - 100) * [True]


def test_size_limit_applies_to_each_event_and_not_to_the_stream() -> None:
    decoder = SSEDecoder()
    text = (MAX_EVENT_BYTES * 2 // 3) * b"x"
    for _ in range(10):
        assert decoder.feed(b"data: " + text + b"\n\n") == [(b"", text)]
        assert not decoder.too_large


@pytest.mark.parametrize("byte", [b"x", b"\n"])
def test_cost_of_single_bytes_grows_linearly(byte: bytes) -> None:
    def seconds(count: int) -> float:
        decoder = SSEDecoder()
        decoder.feed(b"data: " + b"x" * 1000)
        started = time.process_time()
        for _ in range(count):
            decoder.feed(byte)
        return time.process_time() - started

    short = min(seconds(5_000) for _ in range(3))
    long = min(seconds(50_000) for _ in range(3))
    # Ten times the bytes. Copying the buffer for each byte would cost a hundred times as much.
    assert long / short < 30


# ---- CompletionParser


def parse(*reads: bytes) -> tuple[Chunks, CompletionParser]:
    """Feed these reads to a new parser. Return the chunks and the parser."""
    parser = CompletionParser()
    return [chunk for data in reads for chunk in parser.feed(data) or ()], parser


def complete(*reads: bytes) -> tuple[str, CompletionParser]:
    """Feed these reads to a new parser and close it. Return the text and the parser."""
    chunks, parser = parse(*reads)
    chunks += parser.close() or []
    return "".join(chunk for chunk in chunks if type(chunk) is str), parser


def error_code(parser: CompletionParser) -> str | None:
    return parser.error.code if parser.error else None


def sse(*payloads: bytes | str) -> bytes:
    """Return one event for each payload."""
    lines = (payload.encode() if isinstance(payload, str) else payload for payload in payloads)
    return b"".join(b"data: %b\n\n" % line for line in lines)


def typed(chunks: Chunks | None) -> list[tuple[type, str]] | None:
    return None if chunks is None else [(type(chunk), chunk) for chunk in chunks]


def choice(**fields: object) -> dict[str, object]:
    return {"choices": [fields]}


hm = Reasoning("hm")

# An event's JSON and the result of `feed`: chunks, [] for activity without text, None for none.
EVENTS: dict[str, tuple[object, Chunks | None]] = {
    "text": (choice(index=0, delta={"content": "Hi"}), ["Hi"]),
    "white space": (choice(delta={"content": " \n"}), [" \n"]),
    "UTF-8": ('{"choices":[{"delta":{"content":"é"}}]}', ["é"]),
    "escaped surrogate pair": (choice(delta={"content": "😀"}), ["😀"]),
    "no choices": ({"model": "m"}, None),
    "choices null": ({"choices": None}, None),
    "choices empty": ({"choices": []}, None),
    "choice with an index only": (choice(index=0), None),
    "index null": (choice(index=None, delta={"content": "Hi"}), ["Hi"]),
    "index 1": (choice(index=1, delta={"content": "Hi"}), ["Hi"]),
    "no delta": (choice(index=0, content_filter_results={}), None),
    "delta null": (choice(index=0, delta=None), None),
    "delta empty": (choice(index=0, delta={}), None),
    "role only": (choice(delta={"role": "assistant"}), None),
    "role and content": (choice(delta={"role": "assistant", "content": "a"}), ["a"]),
    "content null": (choice(delta={"role": "assistant", "content": None}), None),
    "content empty": (choice(delta={"content": ""}), None),
    "content is an empty list": (choice(delta={"content": []}), None),
    "text parts": (
        choice(delta={"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}),
        ["a", "b"],
    ),
    "one text part without a list": (choice(delta={"content": {"text": "a"}}), ["a"]),
    "empty text part": (choice(delta={"content": [{"type": "text", "text": ""}]}), []),
    "part without text": (choice(delta={"content": [{"type": "reference", "ids": [1]}]}), []),
    "thinking part": (
        choice(
            delta={"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}]}
        ),
        [hm],
    ),
    "thinking and text parts": (
        choice(
            delta={
                "content": [
                    {"type": "thinking", "thinking": [{"text": "h"}]},
                    {"type": "thinking", "thinking": "m"},
                    {"type": "text", "text": "a"},
                ]
            }
        ),
        [hm, "a"],
    ),
    "empty thinking part": (choice(delta={"content": [{"type": "thinking", "thinking": []}]}), []),
    "refusal": (choice(delta={"content": None, "refusal": "No."}), ["No."]),
    "content and refusal": (choice(delta={"refusal": "b", "content": "a"}), ["a", "b"]),
    "reasoning_content": (choice(delta={"content": None, "reasoning_content": "hm"}), [hm]),
    "reasoning_content as an object": (choice(delta={"reasoning_content": {"text": "hm"}}), [hm]),
    "reasoning": (choice(delta={"content": "", "reasoning": "hm"}), [hm]),
    "reasoning_text": (choice(delta={"reasoning_text": "hm"}), [hm]),
    "reasoning_details": (
        choice(
            delta={
                "reasoning_details": [
                    {"type": "reasoning.text", "text": "h"},
                    {"type": "reasoning.summary", "summary": "m"},
                ]
            }
        ),
        [hm],
    ),
    "encrypted reasoning_details": (
        choice(delta={"reasoning_details": [{"type": "reasoning.encrypted", "data": "eA=="}]}),
        [],
    ),
    "thinking_blocks": (
        choice(delta={"thinking_blocks": [{"type": "thinking", "thinking": "hm"}]}),
        [hm],
    ),
    "the same reasoning in two fields": (
        choice(delta={"reasoning": "hm", "reasoning_details": [{"text": "hm"}]}),
        [hm],
    ),
    "the same reasoning in a field and a part": (
        choice(delta={"reasoning": "hm", "content": [{"type": "thinking", "thinking": "h.m"}]}),
        [hm],
    ),
    "text in the second reasoning field": (
        choice(delta={"reasoning_content": {"signature": "x"}, "reasoning": "hm"}),
        [hm],
    ),
    "reasoning empty": (choice(delta={"reasoning": "", "reasoning_content": None}), None),
    "reasoning and content": (choice(delta={"content": "a", "reasoning": "hm"}), [hm, "a"]),
    "<think> in the content": (choice(delta={"content": "<think>hm"}), ["<think>hm"]),
    "tool call": (choice(delta={"tool_calls": [{"function": {"arguments": "{}"}}]}), []),
    "function call": (choice(delta={"function_call": {"arguments": "{}"}}), []),
    "message beside the delta": (
        choice(delta={"content": "lo"}, message={"content": "Hello"}),
        ["lo"],
    ),
    "text beside the delta": (choice(delta={"content": "lo"}, text="lo"), ["lo"]),
    "message without a delta": (choice(index=0, message={"content": "Hello"}), ["Hello"]),
    "message with reasoning": (
        choice(message={"content": "Hello", "reasoning_content": "hm"}),
        [hm, "Hello"],
    ),
    "text without a delta": (choice(text="Hello"), ["Hello"]),
    "message and text without a delta": (
        choice(message={"content": "Hello"}, text="Hello"),
        ["Hello"],
    ),
    "error null": ({"error": None, **choice(delta={"content": "a"})}, ["a"]),
    "content filter results": ({"choices": [], "prompt_filter_results": [{}]}, None),
}


@pytest.mark.parametrize(("payload", "result"), EVENTS.values(), ids=EVENTS)
def test_event_yields_its_chunks(payload: object, result: Chunks | None) -> None:
    parser = CompletionParser()
    stream = sse(payload) if isinstance(payload, str) else event(payload)
    assert typed(parser.feed(stream)) == typed(result)
    assert parser.error is None
    assert not parser.done
    assert parser.finish_reason is None


@pytest.mark.parametrize(
    "stream",
    [
        *(b"", b": OPENROUTER PROCESSING\n\n", b"\n\n\n", b"data:\n\n", b"id: 1\nretry: 5\n\n"),
        *(b"data\n\n", b"data: null\n\n", b"event: ping\ndata: ping\n\n", b"data: keep-alive\n\n"),
        *(b'event: ping\ndata: {"type": "ping"}\n\n', b"event: queue\ndata: place 3\n\n"),
        *(b"{not JSON\n\n", b'data: ""\n\n', b"<html>\n\n"),
    ],
)
def test_bytes_without_a_chunk_are_no_activity(stream: bytes) -> None:
    chunks, parser = parse(delta("a") + stream, stream, delta("b"))
    assert chunks == ["a", "b"]
    parser = CompletionParser()
    assert parser.feed(stream) is None
    assert parser.error is None


def test_chunks_of_one_read_are_returned_together() -> None:
    parser = CompletionParser()
    assert parser.feed(delta("a") + delta("b") + b"data: ") == ["a", "b"]
    assert parser.feed(delta("c").removeprefix(b"data: ")) == ["c"]


def test_messages_without_deltas_are_all_used() -> None:
    messages = [event(choice(message={"content": text})) for text in ("Good ", "morning")]
    assert complete(*messages, DONE)[0] == "Good morning"


def test_message_that_repeats_the_deltas_is_ignored() -> None:
    whole = choice(index=0, message={"content": "Good morning"}, finish_reason="stop")
    text, parser = complete(delta("Good "), delta("morning"), event(whole), DONE)
    assert text == "Good morning"
    assert parser.finish_reason == "stop"


USAGES: dict[str, tuple[bytes, dict[str, Any] | None]] = {
    "none": (sse('{"choices":[]}'), None),
    "null": (sse('{"usage":null,"choices":[]}'), None),
    "of another type": (sse('{"usage":[1],"choices":[]}'), None),
    "in an event without choices": (
        sse('{"usage":null,"choices":[{"delta":{"content":"a"}}]}')
        + sse('{"choices":[],"usage":{"total_tokens":3}}'),
        {"total_tokens": 3},
    ),
    "beside the finish_reason": (
        sse('{"choices":[{"delta":{},"finish_reason":"stop"}],"usage":{"total_tokens":3}}'),
        {"total_tokens": 3},
    ),
    "after the finish_reason": (
        delta(finish_reason="stop") + sse("pong", '{"choices":[],"usage":{"total_tokens":3}}'),
        {"total_tokens": 3},
    ),
    "cumulative": (
        sse('{"usage":{"total_tokens":1}}', '{"usage":{"total_tokens":2}}'),
        {"total_tokens": 2},
    ),
    "replaced, not merged": (
        sse('{"usage":{"total_tokens":1,"cost":1}}', '{"usage":{"total_tokens":2}}'),
        {"total_tokens": 2},
    ),
    "null after usage": (
        sse('{"usage":{"total_tokens":1}}', '{"usage":null}'),
        {"total_tokens": 1},
    ),
    "under x_groq": (sse('{"x_groq":{"id":"r","usage":{"total_tokens":3}}}'), {"total_tokens": 3}),
    "x_groq without usage": (sse('{"x_groq":{"id":"r"}}'), None),
    "x_groq null": (sse('{"x_groq":null}'), None),
    "under x_groq and its own": (
        sse('{"x_groq":{"usage":{"total_tokens":3}},"usage":{"total_tokens":4}}'),
        {"total_tokens": 4},
    ),
    "with details": (
        sse('{"usage":{"total_tokens":3,"prompt_tokens_details":{"cached_tokens":1},"x":[1.5]}}'),
        {"total_tokens": 3, "prompt_tokens_details": {"cached_tokens": 1}, "x": [1.5]},
    ),
    "with NaN": (sse('{"usage":{"total_tokens":3,"cost":NaN}}'), {"total_tokens": 3, "cost": None}),
    "with a number out of range": (sse('{"usage":{"x":1e999,"y":-1e999}}'), {"x": None, "y": None}),
    "with half a surrogate pair": (sse('{"usage":{"x":"\\ud83d"}}'), {"x": "?"}),
}


@pytest.mark.parametrize(("stream", "usage"), USAGES.values(), ids=USAGES)
def test_last_usage_wins(stream: bytes, usage: dict[str, Any] | None) -> None:
    assert parse(stream)[1].usage == usage


def test_last_model_and_finish_reason_win() -> None:
    _, parser = parse(
        sse(
            '{"model":"","choices":[]}',
            '{"model":"m-1","choices":[{"delta":{},"finish_reason":null}]}',
            '{"model":"m-2","choices":[{"delta":{},"finish_reason":"stop"}]}',
            '{"model":7,"choices":[{"delta":{},"finish_reason":"length"}]}',
            '{"model":null,"choices":[{"delta":{},"finish_reason":null}]}',
        )
    )
    assert (parser.model, parser.finish_reason) == ("m-2", "length")


def test_model_and_finish_reason_are_empty_if_never_sent() -> None:
    _, parser = parse(sse('{"choices":[{"delta":{"content":"a"}}]}'))
    assert (parser.model, parser.finish_reason, parser.done) == ("", None, False)


@pytest.mark.parametrize(
    "end",
    [
        *(b"data: [DONE]\n\n", b"data:[DONE]\n\n", b"data: [DONE] \n\n", b"data: [DONE]\r\n\r\n"),
        *(
            b"data: DONE\n\n",
            b'data: "[DONE]"\n\n',
            b"data: [done]\n\n",
            b"event: x\ndata: DONE\n\n",
        ),
    ],
)
def test_events_after_done_are_ignored(end: bytes) -> None:
    parser = CompletionParser()
    assert parser.feed(delta("a") + end + delta("b") + end) == ["a"]
    assert parser.feed(delta("c") + sse('{"error":"late"}', "nonsense")) is None
    assert parser.done
    assert parser.close() is None
    assert parser.error is None


# ---- The end of a completion


def finish(reason: object, **fields: object) -> bytes:
    """Return an event with a finish_reason and a delta of these fields."""
    return event(choice(index=0, delta=fields, finish_reason=reason))


STOP = finish("stop")

# A stream that ends with these bytes, and the text and error code it ends with.
ENDS: dict[str, tuple[bytes, str, str | None]] = {
    "finish_reason and DONE": (delta("Yes.") + STOP + DONE, "Yes.", None),
    "finish_reason only": (delta("Yes.") + STOP, "Yes.", None),
    "DONE only": (delta("Yes.") + DONE, "Yes.", None),
    "neither": (delta("Yes."), "Yes.", "upstream_incomplete"),
    "finish_reason without text": (STOP, "", None),
    "DONE without text": (finish(None, role="assistant") + DONE, "", None),
    "a choice and nothing else": (finish(None, role="assistant"), "", "upstream_incomplete"),
    "nothing": (b"", "", "upstream_incomplete"),
    "comments and DONE": (b": working\n\n" + DONE, "", "upstream_incomplete"),
    "DONE after an event without choices": (
        event({"choices": [], "usage": {"total_tokens": 1}}) + DONE,
        "",
        "upstream_incomplete",
    ),
    # Reasons. Unknown ones are normal.
    "length": (delta("Yes.") + finish("length") + DONE, "Yes.", None),
    "content_filter": (delta("Yes.") + finish("content_filter") + DONE, "Yes.", None),
    "tool_calls": (delta("Yes.") + finish("tool_calls") + DONE, "Yes.", None),
    "unknown reason": (delta("Yes.") + finish("eos") + DONE, "Yes.", None),
    "error": (delta("Yes") + finish("error") + DONE, "Yes", "upstream_incomplete"),
    "network_error": (delta("Yes") + finish("network_error") + DONE, "Yes", "upstream_incomplete"),
    "abort": (delta("Yes") + finish("abort") + DONE, "Yes", "upstream_incomplete"),
    "resources": (
        delta("Yes") + finish("insufficient_system_resource") + DONE,
        "Yes",
        "upstream_incomplete",
    ),
    "failure beside text": (finish("ERROR", content="Yes") + DONE, "Yes", "upstream_incomplete"),
    "failure without text": (finish("abort") + DONE, "", "upstream_incomplete"),
    "null as text": (delta("Yes") + finish("null"), "Yes", "upstream_incomplete"),
    "empty": (delta("Yes") + finish(""), "Yes", "upstream_incomplete"),
    "a number": (delta("Yes") + finish(3), "Yes", "upstream_incomplete"),
    # Early reasons.
    "in the last text": (delta("Yes") + finish("stop", content="."), "Yes.", None),
    "in every text": (finish("stop", content="Yes") + finish("stop", content="."), "Yes.", None),
    "in every event": (
        finish("stop", role="assistant") + finish("stop", content="Yes.") + finish("stop") + DONE,
        "Yes.",
        None,
    ),
    "in reasoning, then nothing": (
        finish("stop", reasoning="hm"),
        "",
        "upstream_incomplete",
    ),
    "in reasoning, then DONE": (finish("length", reasoning="hm") + DONE, "", None),
    "before the text": (STOP + delta("Yes."), "Yes.", None),
    # What follows a complete response.
    "named event with words": (delta("a") + STOP + b"event: close\ndata: bye\n\n", "a", None),
    "words": (delta("a") + STOP + sse("stream closed", "[1]", "7") + DONE, "a", None),
    "null": (delta("a") + STOP + sse("null") + DONE, "a", None),
    "broken JSON": (delta("a") + STOP + sse('{"usage":{') + DONE, "a", None),
    "JSON of another shape": (delta("a") + STOP + sse('{"choices":[7]}') + DONE, "a", None),
    "unwrapped words": (delta("a") + STOP + event({"detail": "closed"}), "a", None),
    "empty choices": (delta("a") + STOP + 3 * event(choice(delta={"content": ""})), "a", None),
    "words after a finish_reason in text": (
        finish("stop", content="a") + sse("stream closed"),
        "a",
        None,
    ),
    "broken chunk after a finish_reason in text": (
        finish("stop", content="a") + sse('{"choices":[{') + finish("stop", content="c"),
        "a",
        "upstream_error",
    ),
    "error beside text": (
        delta("a") + event(choice(index=0, delta={"content": "b"}, error={"code": 500})) + DONE,
        "ab",
        "upstream_error",
    ),
    "error after a finish_reason": (
        delta("a") + STOP + event({"error": {"message": "too late"}}),
        "a",
        "upstream_error",
    ),
    # The last event without its blank line.
    "no blank line": (delta("a") + delta("b", finish_reason="stop")[:-1], "ab", None),
    "no line end": (delta("a") + delta("b", finish_reason="stop")[:-2], "ab", None),
    "DONE without a line end": (delta("a") + DONE[:-2], "a", None),
    "DONE without a blank line before it": (delta("a")[:-1] + DONE, "a", None),
    "no blank lines at all": ((delta("a") + delta("b") + STOP).replace(b"\n\n", b"\n"), "ab", None),
    "JSON instead of a stream": (
        json.dumps(choice(message={"content": "ab"}, finish_reason="stop"), indent=2).encode(),
        "ab",
        None,
    ),
    "truncated event": (delta("a") + delta("b")[:-9], "a", "upstream_incomplete"),
    "truncated event after a finish_reason": (
        finish("stop", content="a") + event({"usage": {}})[:-4],
        "a",
        None,
    ),
    # Choices. `n` is never sent.
    "index counts tokens": (
        b"".join(event(choice(index=i, delta={"content": c})) for i, c in enumerate("abc"))
        + event(choice(index=0, delta={}, finish_reason="stop")),
        "abc",
        None,
    ),
    "two choices in turn": (
        b"".join(event(choice(index=i % 2, delta={"content": "a"})) for i in range(4)) + DONE,
        "aa",
        "upstream_error",
    ),
    "two choices one after the other": (
        delta("a") + STOP + event(choice(index=1, delta={"content": "b"})) + DONE,
        "a",
        "upstream_error",
    ),
    "two choices that end separately": (
        delta("a")
        + event(choice(index=1, delta={"content": "b"}))
        + STOP
        + event(choice(index=1, delta={}, finish_reason="stop"))
        + DONE,
        "ab",
        "upstream_error",
    ),
    "two messages in one event": (
        event(
            {
                "choices": [
                    {"index": 0, "message": {"content": "a"}, "finish_reason": "stop"},
                    {"index": 1, "message": {"content": "b"}, "finish_reason": "stop"},
                ]
            }
        ),
        "a",
        "upstream_error",
    ),
}


@pytest.mark.parametrize(("stream", "text", "code"), ENDS.values(), ids=ENDS)
def test_completion_ends_with_its_text_and_error(
    stream: bytes, text: str, code: str | None
) -> None:
    for size in (len(stream) + 1, 1, 5):
        reads = [stream[i : i + size] for i in range(0, len(stream), size)]
        found, parser = complete(*reads)
        assert (found, error_code(parser)) == (text, code)
        assert parser.complete is (code is None)
        if code == "upstream_incomplete":
            assert parser.error
            assert parser.error.retryable


def test_finish_reason_is_final_only_without_text_and_until_text_follows() -> None:
    parser = CompletionParser()
    states = []
    for data in (
        finish("stop", reasoning="hm"),
        STOP,
        delta("a"),
        finish("stop", content="b"),
        finish("stop", reasoning="hm"),
        STOP,
        finish(None, reasoning="hm"),
        b": working\n\n",
        event({"usage": {"total_tokens": 1}}),
        delta("c"),
    ):
        parser.feed(data)
        states.append((parser.finished, parser.complete))
    assert states == [
        *((False, False), (True, True), (False, True), (False, True), (False, True)),
        *(4 * [(True, True)]),
        (False, True),
    ]


def test_finish_reason_beside_a_tool_call_is_final() -> None:
    _, parser = parse(finish("tool_calls", tool_calls=[{"index": 0}]))
    assert parser.finished


# ---- Failures

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
    "in a choice": (
        event(choice(delta={"content": ""}, error={"code": 503, "message": "gone"})),
        "upstream_unavailable",
        True,
    ),
    "in a choice with a finish_reason": (
        event(choice(delta={}, finish_reason="error", error={"code": 400, "message": "bad"})),
        "upstream_error",
        False,
    ),
    "in a delta": (event(choice(delta={"error": "overloaded"})), "upstream_unavailable", True),
    "event: error": (b'event: error\ndata: {"error":{"message":"x"}}\n\n', "upstream_error", True),
    "event: error without a member of that name": (
        b'event: error\ndata: {"message":"overloaded"}\n\n',
        "upstream_unavailable",
        True,
    ),
    "event: error with a string": (b'event: error\ndata: "broken"\n\n', "upstream_error", True),
    "event: error with words": (
        b"event: server_error\ndata: rate limit reached\n\n",
        "upstream_unavailable",
        True,
    ),
    "a bare error line": (
        b'error: {"detail":"x","error":{"message":"x"}}\n\n',
        "upstream_error",
        True,
    ),
    "an error line with words": (b"error: overloaded\n\n", "upstream_unavailable", True),
    "a bare JSON line": (b'{"error":{"code":"slow_down"}}\n\n', "upstream_unavailable", True),
    "bare JSON in several lines": (
        b'{\n  "error": {\n    "code": 429\n  }\n}\n\n',
        "upstream_unavailable",
        True,
    ),
    # Without the usual wrapper.
    "object: error": (
        event({"object": "error", "message": "no memory", "type": "InternalError", "code": 500}),
        "upstream_error",
        True,
    ),
    "type: error": (event({"type": "error", "message": "x"}), "upstream_error", True),
    "a type that names an error": (
        event({"type": "overloaded_error", "message": "x"}),
        "upstream_unavailable",
        True,
    ),
    "status: error": (event({"status": "error", "message": "x"}), "upstream_error", True),
    "error_code": (event({"error_code": 336100, "error_msg": "x"}), "upstream_error", True),
    "detail": (event({"detail": "Not authenticated"}), "upstream_error", True),
    "errors": (event({"errors": [{"message": "too many requests"}]}), "upstream_unavailable", True),
    "code and message": (
        event({"code": "InvalidApiKey", "message": "Wrong key", "request_id": "r"}),
        "upstream_error",
        True,
    ),
    "a list": (event([{"error": {"code": 400, "message": "x"}}]), "upstream_error", False),
    # Codes.
    "code 429": (b'data: {"error":{"code":429,"message":"x"}}\n\n', "upstream_unavailable", True),
    "code '429'": (b'data: {"error":{"code":"429"}}\n\n', "upstream_unavailable", True),
    "code 400": (b'data: {"error":{"code":400,"message":"x"}}\n\n', "upstream_error", False),
    "code 402": (b'data: {"error":{"code":402,"message":"x"}}\n\n', "upstream_unavailable", False),
    "code 502": (b'data: {"error":{"code":502,"message":"x"}}\n\n', "upstream_error", True),
    "a code that is no status": (b'data: {"error":{"code":1301}}\n\n', "upstream_error", True),
    "the filter": (b'data: {"error":{"code":"content_filter"}}\n\n', "content_refused", False),
    "too long": (
        b'data: {"error":{"code":"context_length_exceeded"}}\n\n',
        "context_too_long",
        False,
    ),
    # Malformed events. Providers repeat them, so they are not retryable.
    "no JSON": (b"data: {oops\n\n", "upstream_error", False),
    "two values": (b"data: {} {}\n\n", "upstream_error", False),
    "a list without errors": (b"data: [{}]\n\n", "upstream_error", False),
    "a number": (b"data: 1\n\n", "upstream_error", False),
    "a JSON string": (b'data: "a"\n\n', "upstream_error", False),
    "words": (b"data: Service Unavailable\n\n", "upstream_error", False),
    "nested too deep": (b"data: " + 1000 * b"[" + 1000 * b"]" + b"\n\n", "upstream_error", False),
    "choices a number": (b'data: {"choices":1}\n\n', "upstream_error", False),
    "a choice null": (b'data: {"choices":[null]}\n\n', "upstream_error", False),
    "a delta of text": (b'data: {"choices":[{"delta":"Hi"}]}\n\n', "upstream_error", False),
    "content is a number": (event(choice(delta={"content": 5})), "upstream_error", False),
    "content is a list of numbers": (
        event(choice(delta={"content": [1]})),
        "upstream_error",
        False,
    ),
    "text of a part is a number": (
        event(choice(delta={"content": [{"type": "text", "text": 5}]})),
        "upstream_error",
        False,
    ),
    "deep reasoning": (
        b'data: {"choices":[{"delta":{"reasoning":' + 900 * b"[" + 900 * b"]" + b"}}]}\n\n",
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
    assert parser.close() is None
    assert parser.error
    assert parser.error.code == code
    assert parser.error.retryable is retryable
    assert not parser.done
    assert not parser.complete


# ---- Limits


def test_event_larger_than_1_mib_sets_the_error() -> None:
    parser = CompletionParser()
    assert parser.feed(delta("a") + b"data: ") == ["a"]
    errors = []
    for data in (b"x" * (MAX_EVENT_BYTES - 6), b"x"):
        assert parser.feed(data) is None
        errors.append(error_code(parser))
    assert errors == [None, "upstream_error"]


def test_event_larger_than_1_mib_after_the_finish_reason_ends_the_stream() -> None:
    _, parser = parse(delta("a"), STOP, b"x" * (MAX_EVENT_BYTES + 1))
    assert (parser.done, parser.complete) == (True, True)


def test_bytes_after_done_are_not_stored() -> None:
    _, parser = parse(delta("a") + DONE, b"x" * (MAX_EVENT_BYTES + 1))
    assert parser.complete


PREFIXES = {
    "comments": b": working\n\n",
    "comment lines": b": working\n",
    "blank lines": b"\n",
    "ignored fields": b"id: 1\nretry: 9\n\n",
    "empty data": b"data:\n\n",
    "pings": b"event: ping\ndata: ping\n\n",
    "events without choices": event({"choices": []}),
    "empty deltas": event(choice(delta={"role": "assistant", "content": ""})),
}


@pytest.mark.parametrize("unit", PREFIXES.values(), ids=PREFIXES)
def test_more_than_1_mib_before_the_first_activity_sets_the_error(unit: bytes) -> None:
    parser = CompletionParser()
    read = unit * (2**14 // len(unit))
    fed = 0
    while fed + len(read) <= MAX_PREFIX_BYTES:
        assert parser.feed(read) is None
        assert parser.error is None
        fed += len(read)
    parser.feed(read)
    assert error_code(parser) == "upstream_error"


@pytest.mark.parametrize(
    "activity",
    [
        delta("a"),
        event(choice(delta={"reasoning": "hm"})),
        event(choice(delta={"tool_calls": [1]})),
    ],
    ids=["text", "reasoning", "tool call"],
)
def test_bytes_after_the_first_activity_are_unlimited(activity: bytes) -> None:
    _, parser = parse(activity, *(130 * [b": working\n\n" * 1000]))
    assert parser.error is None


# ---- Unicode


def split_text(*texts: str) -> bytes:
    """Return a stream of these deltas as escapes, which may be halves of surrogate pairs."""
    deltas = (json.dumps({"choices": [{"delta": {"content": text}}]}) for text in texts)
    return sse(*deltas) + DONE


SURROGATES = {
    "pair in two deltas": (("Hi \ud83d", "\ude00!"), ["Hi ", "😀!"]),
    "pair with an empty delta between": (("\ud83d", "", "\ude00"), ["😀"]),
    "two pairs": (("\ud83d", "\ude00\ud83d", "\ude00"), ["😀", "😀"]),
    "high half, then text": (("a\ud83d", "b"), ["a", "\ufffdb"]),
    "high half at the end": (("a\ud83d",), ["a", "\ufffd"]),
    "low half": (("a\ude00b", "c"), ["a\ufffdb", "c"]),
    "halves in the wrong order": (("\ude00", "\ud83d"), ["\ufffd", "\ufffd"]),
}


@pytest.mark.parametrize(("texts", "chunks"), SURROGATES.values(), ids=SURROGATES)
def test_halves_of_a_surrogate_pair_are_joined_or_replaced(
    texts: tuple[str, ...], chunks: Chunks
) -> None:
    assert parse(split_text(*texts))[0] == chunks
    assert parse(*split_text(*texts).splitlines(keepends=True))[0] == chunks


@pytest.mark.parametrize("end", [b"", STOP, event({"error": "x"}), b"data: {oops\n\n"])
def test_half_of_a_surrogate_pair_is_replaced_at_the_end(end: bytes) -> None:
    chunks, parser = parse(split_text("a\ud83d").removesuffix(DONE), end)
    assert [*chunks, *(parser.close() or ())] == ["a", "\ufffd"]


def test_half_of_a_surrogate_pair_in_reasoning_is_joined() -> None:
    halves = (json.dumps(choice(delta={"reasoning": half})) for half in ("\ud83d", "\ude00"))
    assert typed(parse(sse(*halves))[0]) == [(Reasoning, "😀")]


@settings(deadline=None)
@given(st.lists(st.text(st.sampled_from("a\ud83d\ude00é"), min_size=1), min_size=1, max_size=8))
def test_text_is_the_same_for_every_split_of_surrogate_pairs(texts: list[str]) -> None:
    whole = "".join(texts).encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    # Strict JSON comes first in some streams.
    for first in ("", "x"):
        chunks, parser = parse(delta(first) + split_text(*texts))
        assert "".join(chunks) == first + whole
        assert parser.complete


@pytest.mark.parametrize("data", ["caf\xe9 au lait", "\xff", "a\xf0\x9f\x98"])
def test_bytes_that_are_not_utf_8_become_replacement_characters(data: str) -> None:
    raw = data.encode("latin-1")
    stream = b'data: {"choices":[{"delta":{"content":"%b"}}]}\n\n' % raw
    assert parse(delta("a"), stream, delta("b"))[0] == ["a", raw.decode(errors="replace"), "b"]


def test_model_and_finish_reason_with_half_a_surrogate_pair_can_be_encoded() -> None:
    payload = {"model": "m\ud83d", **choice(delta={"content": "a"}, finish_reason="s\ud83d")}
    _, parser = parse(event(payload))
    assert (parser.model, parser.finish_reason) == ("m?", "s?")


# ---- Any input


NAMES = (
    *("choices", "delta", "content", "text", "index", "refusal", "reasoning", "reasoning_content"),
    *("reasoning_details", "thinking", "tool_calls", "usage", "x_groq", "model", "finish_reason"),
    *("error", "code", "type", "message", "detail", "x"),
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5)
    | st.sampled_from(["stop", "error", "429", "text", "thinking", "\ud83d", "\ude00"])
)
any_json = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=5)
    ),
    max_leaves=15,
)
# JSON that has the shape of a chunk down to some depth.
any_delta = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("content", "refusal", "reasoning", "tool_calls"), any_json)
)
any_choice = st.fixed_dictionaries(
    {},
    optional={
        "index": st.sampled_from([0, 0, 1, None]) | any_json,
        "delta": any_delta | any_json,
        "message": any_delta | any_json,
        "finish_reason": any_json,
    },
)
any_event = (
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
@example([{"usage": [1]}])
@example([{"model": 5}])
@example([choice(finish_reason={"x": 1})])
@given(st.lists(any_event, max_size=4))
def test_any_json_yields_the_declared_types_and_never_raises(events: list[Any]) -> None:
    chunks, parser = parse(*(event(payload) for payload in events))
    chunks += parser.close() or []
    assert all(isinstance(chunk, str) and chunk for chunk in chunks)
    assert isinstance(parser.finish_reason, str | None)
    assert isinstance(parser.usage, dict | None)
    assert parser.complete is (parser.error is None)
    values = [*chunks, parser.model, parser.finish_reason, parser.usage]
    assert json.dumps(values, ensure_ascii=False).encode()


@settings(deadline=None)
@given(st.lists(any_event, max_size=4), any_offsets)
def test_splitting_any_json_changes_nothing(events: list[Any], offsets: list[int]) -> None:
    stream = b"".join(map(event, events))
    assert outcome(stream) == outcome(*split(stream, offsets))


@settings(deadline=None)
@given(any_stream | st.binary(max_size=200), any_offsets)
def test_any_bytes_never_raise_and_splitting_them_changes_nothing(
    stream: bytes, offsets: list[int]
) -> None:
    assert outcome(stream) == outcome(*split(stream, offsets))


def outcome(*reads: bytes) -> tuple[object, ...]:
    chunks, parser = parse(*reads)
    chunks += parser.close() or []
    error = parser.error and (parser.error.code, parser.error.retryable)
    values = (parser.model, parser.finish_reason, parser.usage, parser.done, parser.finished)
    return typed(chunks), error, values


@settings(deadline=None)
@given(st.lists(any_choice | st.just({"index": 0, "delta": {"content": "a"}}), max_size=8))
def test_short_cut_for_plain_text_changes_nothing(choices: list[Any]) -> None:
    class SlowParser(CompletionParser):
        """A parser that never finds the index of plain text."""

        _plain_index = property(lambda self: self, lambda self, value: None)

    parsers = (CompletionParser(), SlowParser())
    for each in choices:
        fast, slow = (typed(parser.feed(event({"choices": [each]}))) for parser in parsers)
        assert fast == slow
    fast_error, slow_error = (parser.error and str(parser.error) for parser in parsers)
    assert fast_error == slow_error
    assert parsers[0].complete is parsers[1].complete
