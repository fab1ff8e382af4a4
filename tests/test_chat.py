"""Validation of the request body and cleaning of the message."""

import json
import sys
import time
import unicodedata
from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chat import LONG_SYMBOL_RUN, ChatRequest, clean_text, parse_request
from errors import ServiceError
from tests.conftest import raises

LIMIT = 10


def request_body(**fields: object) -> bytes:
    """Return a JSON body whose message is "Hi" unless `fields` has another."""
    return json.dumps({"message": "Hi", **fields}).encode()


def field_problems(body: bytes) -> dict[str, str]:
    """Return the invalid fields of a rejected body, with their messages."""
    with raises("invalid_request") as caught:
        parse_request(body, LIMIT)
    return {problem.field: problem.message for problem in caught.value.fields}


# ---- cleaning

CODE_POINTS = [chr(c) for c in range(sys.maxunicode + 1) if not 0xD800 <= c <= 0xDFFF]


# The code points that the API contract removes. The last line has the noncharacters of each plane.
REMOVED_RANGES = [
    *((0x00, 0x1F), (0x7F, 0x9F), (0x180E, 0x180E), (0x200B, 0x200B), (0x202A, 0x202E)),
    *((0x2060, 0x2064), (0x2066, 0x2069), (0xFDD0, 0xFDEF), (0xFEFF, 0xFEFF), (0xFFF9, 0xFFFB)),
    (0xE0000, 0xE007F),
    *((plane + 0xFFFE, plane + 0xFFFF) for plane in range(0, 0x110000, 0x10000)),
]


def test_cleaning_removes_exactly_the_code_points_of_the_contract() -> None:
    removed = {chr(c) for first, last in REMOVED_RANGES for c in range(first, last + 1)}
    removed -= {"\t", "\n", "\r"}
    # Nothing in Unicode composes with a preceding solidus.
    chars = [char for char in CODE_POINTS if char not in "\r/"]
    text = "/".join(chars)
    cleaned = clean_text(f"x/{text}/x").split("/")[1:-1]
    normalized = unicodedata.normalize("NFC", text).split("/")
    expected = ["" if c in removed else n for c, n in zip(chars, normalized, strict=True)]
    assert [ascii(c) for c, got, e in zip(chars, cleaned, expected, strict=True) if got != e] == []


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("a\r\nb", "a\nb"),
        ("a\rb", "a\nb"),
        ("a\r\r\nb\n\rc", "a\n\nb\n\nc"),
        ("e\u0301 \u212b \u1112\u1161\u11ab", "é Å 한"),
        # Excluded from composition: NFC decomposes it.
        ("\u0958", "\u0915\u093c"),
        # Composed after the zero-width space is removed.
        ("e\u200b\u0301", "é"),
        (" \t\r\n hi \u3000\u2029\u00a0", "hi"),
        ("\ufeff hi \u200b ", "hi"),
        # Tag characters: a model reads them as an instruction that the user does not see.
        ("hi" + "".join(chr(0xE0000 + ord(c)) for c in "obey"), "hi"),
        ("\x1b[31mred\x07", "[31mred"),
    ],
    ids=ascii,
)
def test_text_is_cleaned(text: str, cleaned: str) -> None:
    assert clean_text(text) == cleaned


@pytest.mark.parametrize(
    "text",
    [
        "👩‍👩‍👧 and 🏳️‍🌈",
        "👍🏽",
        "می‌خواهم",
        "क्‍ष and क्‌ष",
        "❤️ or ❤︎",
        "葛\U000e0100城",
        "two\nlines\tand a tab",
        "left\u200eto right, soft\u00adhyphen",
        "\ufb01 \u2460 \uff21",
        "line\u2028separator",
    ],
    ids=ascii,
)
def test_characters_that_languages_and_emoji_need_are_unchanged(text: str) -> None:
    assert clean_text(text) == text


# Characters that decompose into combining marks, or are one; some base characters; Hangul jamo.
MARKS = [c for c in CODE_POINTS if unicodedata.combining(unicodedata.normalize("NFD", c)[0])]
OTHERS = ["a", "\u1f82", "\u1e69", "\U0001d160", "\u2600", "\u1112", "\u1161", "\u11ab", "漢"]


@given(st.lists(st.text(st.sampled_from(MARKS), max_size=99) | st.sampled_from(OTHERS)))
def test_cleaning_normalizes_runs_of_marks_as_unicodedata_does(parts: list[str]) -> None:
    text = "".join(["x", *parts, "x"])
    assert clean_text(text) == unicodedata.normalize("NFC", text)


@given(st.text())
def test_cleaning_is_idempotent(text: str) -> None:
    once = clean_text(text)
    assert clean_text(once) == once
    assert once == once.strip()
    assert unicodedata.is_normalized("NFC", once)


def test_every_run_of_characters_that_become_marks_is_sorted_in_linear_time() -> None:
    assert [ascii(mark) for mark in MARKS if not LONG_SYMBOL_RUN.fullmatch(mark * 31)] == []


def message_of(unit: str) -> Callable[[int], str]:
    """Return a function that makes a body whose message repeats `unit` over n characters."""
    return lambda n: json.dumps({"message": "x" + (unit * n)[:n]}, ensure_ascii=False)


# The dearest requests that a search over all code points and the shapes of JSON found.
EXPENSIVE: dict[str, Callable[[int], str]] = {
    "marks in reverse order": message_of("\u0301\u0316"),
    "class 0 that decomposes into marks": message_of("\u0f73"),
    "all three of class 0": message_of("\u0f81\u0f75\u0f73"),
    "short runs of marks": message_of("x" + "\u0301\u0316" * 15),
    "symbols that decompose": message_of("\U0001d160"),
    "emoji": message_of("🙂"),
    "Hangul jamo": message_of("\u1112\u1161\u11ab"),
    "removed characters": message_of("x\x7f"),
    "invisible characters": message_of("\u200d"),
    "escapes": lambda n: json.dumps({"message": "\u0301\u0316" * n}),
    "unknown fields": lambda n: "{" + ",".join(f'"{i:06}":1' for i in range(n)) + "}",
    "one field many times": lambda n: "{" + ",".join(['"message":1'] * n) + "}",
    "long field name": lambda n: '{"' + "session_id" * n + '":1}',
    "long field names": lambda n: "{" + ",".join(f'"{i}{"e" * n}":1' for i in range(9)) + "}",
    "lists": lambda n: '{"message":[' + "[]," * n + "1]}",
    "nested lists": lambda n: '{"message":[' + ("[" * 99 + "]" * 99 + ",") * (n // 50) + "1]}",
    "objects nested too deeply": lambda n: '{"x":' * n + "1" + "}" * n,
    "digits": lambda n: '{"message":' + "9" * n + "}",
    "decimals": lambda n: '{"message":0.' + "1" * n + "}",
    "exponent": lambda n: '{"message":1e' + "1" * n + "}",
}


def parsing_cpu_seconds(body: bytes) -> float:
    """Return the least CPU time of five parsings. Other threads and processes do not count."""

    def measure() -> float:
        before = time.thread_time()
        with suppress(ServiceError):
            parse_request(body, max_message_chars=len(body))
        return time.thread_time() - before

    return min(measure() for _ in range(5))


@pytest.mark.parametrize("make_body", EXPENSIVE.values(), ids=EXPENSIVE)
def test_cost_of_parsing_grows_linearly(make_body: Callable[[int], str]) -> None:
    small, large = (parsing_cpu_seconds(make_body(n).encode()) for n in (500, 16_000))
    # 32 times the size: linear growth is 32 times the cost, quadratic growth 1,024 times.
    assert large < 200 * small


# ---- validation


def test_only_the_message_is_required() -> None:
    assert parse_request(request_body(), LIMIT) == ChatRequest(message="Hi")
    body = request_body(model_id=None, session_id=None)
    assert parse_request(body, LIMIT) == ChatRequest(message="Hi")


@pytest.mark.parametrize(
    ("model_id", "session_id"), [("groq/x:y z", "aZ0_-"), ("m" * 128, "s" * 64)]
)
def test_model_and_session_are_accepted(model_id: str, session_id: str) -> None:
    request = parse_request(request_body(model_id=model_id, session_id=session_id), LIMIT)
    assert (request.message, request.model_id, request.session_id) == ("Hi", model_id, session_id)


@pytest.mark.parametrize(
    "message",
    [
        "",
        " \t\r\n",
        "\u00a0\u3000\u2028\u2029",
        "\x00\x1b",
        "\u200b\u2060\ufeff",
        "\u200d",
        "\u200c \u200d",
        "\ufe0f\U000e0100",
        "\u00ad\u200e\u061c",
        "\u3164",
        "\u115f\u1160",
        "\uffa0",
        "\u2800",
        "\u034f",
        "\U000e0041",
        # Mongolian variation selectors, Khmer inherent vowels, reserved default-ignorables.
        "\u180b\u180c\u180d",
        "\u180f",
        "\u17b4\u17b5",
        "\u2065\ufff0\ufff8",
        "\U000e0080\U000e0fff",
    ],
    ids=ascii,
)
def test_message_without_visible_text_is_rejected(message: str) -> None:
    body = request_body(message=message)
    assert field_problems(body) == {"message": "must contain visible text"}


@pytest.mark.parametrize(
    "message", ["0", ".", "🙂", "\u3164a", "\u0301", "\ufffd", "\ue000"], ids=ascii
)
def test_message_with_visible_text_is_accepted(message: str) -> None:
    assert parse_request(request_body(message=message), LIMIT).message == message


# Greek alpha with the three marks that NFC composes with it into U+1F82.
DECOMPOSED = "\u03b1\u0313\u0300\u0345"


@pytest.mark.parametrize(
    ("message", "cleaned"),
    [
        ("x" * 10, "x" * 10),
        ("👍" * 10, "👍" * 10),
        (DECOMPOSED * 10, "\u1f82" * 10),
        ("  " + "x" * 10 + "\u200b\r\n", "x" * 10),
        ("x" * 10 + "\u200b" * 30, "x" * 10),
    ],
    ids=["letters", "emoji", "composed", "cleaned", "four times the limit"],
)
def test_message_of_maximum_length_after_cleaning_is_accepted(message: str, cleaned: str) -> None:
    assert parse_request(request_body(message=message), LIMIT).message == cleaned


@pytest.mark.parametrize(
    ("message", "length"),
    [
        ("x" * 11, 11),
        ("👍" * 11, 11),
        ("\u0958" * 6, 12),
        ("x\r\n" * 5 + "x", 11),
        ("x" * 10_000, 10_000),
        # More than four times the limit: not cleaned.
        ("x" * 10 + "\u200b" * 31, 41),
    ],
    ids=["letters", "emoji", "decomposed", "line ends", "10,000 letters", "not cleaned"],
)
def test_message_that_is_too_long_is_rejected(message: str, length: int) -> None:
    problem = f"must have at most 10 characters (got {length})"
    assert field_problems(request_body(message=message)) == {"message": problem}


NOT_A_STRING = "must be a string"
INVALID_SESSION = "must be 1 to 64 characters of A-Z, a-z, 0-9, _ and -"
NOT_A_BOOLEAN = "must be true or false"
FIELDS = "known fields: " + ", ".join(ChatRequest.model_fields)
LONG_NAME = "session_id" * 1_000


@pytest.mark.parametrize(
    ("body", "problems"),
    [
        (b"{}", {"message": "is required"}),
        (b'{"model_id": "m"}', {"message": "is required"}),
        (request_body(message=None), {"message": NOT_A_STRING}),
        (request_body(message=5), {"message": NOT_A_STRING}),
        (request_body(message=["Hi"]), {"message": NOT_A_STRING}),
        (request_body(model_id=5), {"model_id": NOT_A_STRING}),
        (request_body(model_id="m" * 129), {"model_id": "must have at most 128 characters"}),
        (request_body(session_id=5), {"session_id": NOT_A_STRING}),
        (request_body(session_id=""), {"session_id": INVALID_SESSION}),
        (request_body(session_id="a" * 65), {"session_id": INVALID_SESSION}),
        (request_body(session_id="a\n"), {"session_id": INVALID_SESSION}),
        (request_body(session_id="ä"), {"session_id": INVALID_SESSION}),
        (request_body(session_id="a b"), {"session_id": INVALID_SESSION}),
        (request_body(stream=None), {"stream": NOT_A_BOOLEAN}),
        (request_body(include_reasoning=1), {"include_reasoning": NOT_A_BOOLEAN}),
        (request_body(replace_last_turn="true"), {"replace_last_turn": NOT_A_BOOLEAN}),
        (
            b'{"message": 1, "model_id": 2, "session_id": 3}',
            {"message": NOT_A_STRING, "model_id": NOT_A_STRING, "session_id": NOT_A_STRING},
        ),
    ],
)
def test_every_invalid_field_is_named(body: bytes, problems: dict[str, str]) -> None:
    assert field_problems(body) == problems


@pytest.mark.parametrize(
    ("name", "reported", "hint"),
    [
        ("sesion_id", "sesion_id", "did you mean session_id?"),
        ("model", "model", "did you mean model_id?"),
        ("Message", "Message", "did you mean message?"),
        ("temperature", "temperature", FIELDS),
        # Shown as at most 64 printable ASCII characters.
        ("\x1b[31m\u202eé🙂~ ", "?[31m???~ ", FIELDS),
        ("n" * 65, "n" * 64, FIELDS),
        (LONG_NAME, LONG_NAME[:64], FIELDS),
    ],
)
def test_unknown_field_is_rejected_with_a_hint(name: str, reported: str, hint: str) -> None:
    problems = {reported: f"is not a known field ({hint})"}
    assert field_problems(request_body(**{name: 1})) == problems


def test_at_most_ten_invalid_fields_are_named() -> None:
    problems = field_problems(request_body(message=1, **{f"x{i}": i for i in range(20)}))
    assert list(problems) == ["message", *(f"x{i}" for i in range(9))]


def test_last_value_of_duplicate_json_field_wins() -> None:
    request = parse_request(b'{"message": 1, "message": "a", "message": "b"}', LIMIT)
    assert request.message == "b"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"null",
        b"[]",
        b'"Hi"',
        b'[{"message": "Hi"}]',
        b"{'message': 'Hi'}",
        b'{"message": "Hi"',
        b'{"message": "Hi",}',
        b'{"message": "Hi"} {}',
        b'{"message": "a\nb"}',
        b'{message: "Hi"}',
        b'{"message": "Hi", "x": \x00}',
        b'{"message": "\xff"}',
        b'{"message": "\\ud83d"}',
        b'{"message": "Hi", "\\udc00": 1}',
        b'{"message": "\xed\xa0\xbd"}',
        b'\xef\xbb\xbf{"message": "Hi"}',
        '{"message": "Hi"}'.encode("utf-16"),
        b"[" * 60_000,
        b'{"message":' + b"[" * 60_000,
        b'{"x":' * 10_000 + b"1" + b"}" * 10_000,
    ],
    ids=lambda body: ascii(body[:24]),
)
def test_non_object_or_non_utf8_body_returns_invalid_json(body: bytes) -> None:
    with raises("invalid_json"):
        parse_request(body, LIMIT)


@pytest.mark.parametrize(
    "body",
    [b'{"message": NaN}', b'{"message": -Infinity}', b'{"message": 1e999}', b'{"message": 1, "x":'],
)
def test_invalid_number_or_truncated_body_is_rejected(body: bytes) -> None:
    with pytest.raises(ServiceError):
        parse_request(body, LIMIT)


SECRET = "my secret 5512"


@pytest.mark.parametrize(
    "body",
    [
        request_body(message=SECRET),
        request_body(message=[SECRET]),
        request_body(message={SECRET: SECRET}),
        request_body(message=SECRET, session_id=SECRET, model_id=SECRET * 20, more=SECRET),
        request_body(message=SECRET)[:-1],
        json.dumps([SECRET]).encode(),
        b'{"message": "%s\xff"}' % SECRET.encode(),
    ],
)
def test_error_does_not_contain_the_message(body: bytes) -> None:
    with pytest.raises(ServiceError) as caught:
        parse_request(body, LIMIT)
    assert SECRET not in caught.value.detail().model_dump_json()
    assert SECRET not in str(caught.value)


def parse_or_reject(body: bytes) -> None:
    """Parse the body. Raise every exception but a ServiceError, and check what is returned."""
    try:
        request = parse_request(body, LIMIT)
    except ServiceError as error:
        detail = error.detail().model_dump_json().encode()
        assert len(detail) < 4000, detail
    else:
        assert 1 <= len(request.message) <= LIMIT
        assert clean_text(request.message) == request.message


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)
NAMES = st.sampled_from(["message", "model_id", "session_id", "mesage"]) | st.text()
OBJECTS = st.dictionaries(NAMES, JSON_VALUES, max_size=20)
JSON_TEXTS = st.builds(json.dumps, JSON_VALUES | OBJECTS, ensure_ascii=st.booleans())


@given(st.binary() | JSON_TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_body_is_parsed_or_rejected_with_a_service_error(body: bytes) -> None:
    parse_or_reject(body)
