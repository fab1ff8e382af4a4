"""What is accepted, how text is cleaned, the events, and the stream's clocks.

The streams here run on a loop whose time jumps to the next timer, so that the defaults of minutes
can be kept to the second. How it all looks on a socket is in test_service.py.
"""

import json
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chat import ChatRequest, clean, parse_request
from errors import ServiceError
from tests.conftest import raises

LIMIT = 10


def asked(**fields: object) -> bytes:
    """A request's body; the message is "Hi" unless another is given."""
    return json.dumps({"message": "Hi", **fields}).encode()


def refused(body: bytes) -> dict[str, str]:
    """The fields that a 422 names, and what it says of each."""
    with raises("invalid_request") as caught:
        parse_request(body, LIMIT)
    return {problem.field: problem.message for problem in caught.value.fields}


# ---- cleaning


def unwanted(char: str) -> bool:
    """What the contract says is removed, carriage returns aside."""
    code = ord(char)
    return (
        (unicodedata.category(char) == "Cc" and char not in "\t\n\r")
        or 0x202A <= code <= 0x202E
        or 0x2066 <= code <= 0x2069
        or 0xE0000 <= code <= 0xE007F
        or 0x2060 <= code <= 0x2064
        or 0xFFF9 <= code <= 0xFFFB
        or code in (0x200B, 0xFEFF, 0x180E)
        # Noncharacters: the last two of each plane, and 32 among the Arabic forms.
        or code & 0xFFFE == 0xFFFE
        or 0xFDD0 <= code <= 0xFDEF
    )


def test_of_all_characters_exactly_those_of_the_contract_are_removed() -> None:
    # Nothing in Unicode composes with a solidus that precedes it.
    chars = [chr(c) for c in range(sys.maxunicode + 1) if not 0xD800 <= c <= 0xDFFF]
    chars = [char for char in chars if char not in "\r/"]
    kept = clean("x/" + "/".join(chars) + "/x").split("/")[1:-1]
    expected = ["" if unwanted(c) else unicodedata.normalize("NFC", c) for c in chars]
    assert [(hex(ord(c)), k) for c, k, e in zip(chars, kept, expected, strict=True) if k != e] == []


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
)
def test_what_languages_and_emoji_need_stays_as_it_is(text: str) -> None:
    assert clean(text) == text


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("a\r\nb", "a\nb"),
        ("a\rb", "a\nb"),
        ("a\r\r\nb\n\rc", "a\n\nb\n\nc"),
        ("e\u0301 \u212b \u1112\u1161\u11ab", "é Å 한"),
        # Excluded from composition: NFC takes it apart.
        ("\u0958", "\u0915\u093c"),
        # Removed first, composed then.
        ("e\u200b\u0301", "é"),
        (" \t\r\n hi \u3000\u2029\u00a0", "hi"),
        ("\ufeff hi \u200b ", "hi"),
        # An instruction in tag characters, which a model reads and nobody sees.
        ("hi" + "".join(chr(0xE0000 + ord(c)) for c in "obey"), "hi"),
        ("\x1b[31mred\x07", "[31mred"),
    ],
)
def test_text_is_cleaned(text: str, cleaned: str) -> None:
    assert clean(text) == cleaned


MARKS = [char for char in map(chr, range(0x300, 0x20000)) if unicodedata.combining(char)]


@given(
    st.text(
        st.sampled_from([*MARKS, "a", "\u1f82", "\u1112", "\u1161", "\u11ab", "漢"]), max_size=99
    )
)
def test_marks_are_ordered_as_unicode_orders_them(text: str) -> None:
    assert clean(f"x{text}x") == unicodedata.normalize("NFC", f"x{text}x")


def test_half_a_million_marks_on_one_letter_are_ordered_all_the_same() -> None:
    # In the square of their number this would take minutes, and end in this test's timeout.
    marks = 250_000
    assert clean("x" + "\u0300\u0316" * marks) == "x" + "\u0316" * marks + "\u0300" * marks


@given(st.text())
def test_cleaning_twice_changes_nothing(text: str) -> None:
    once = clean(text)
    assert clean(once) == once
    assert once == once.strip()
    assert unicodedata.is_normalized("NFC", once)


# ---- the request


def test_a_request_needs_only_a_message() -> None:
    assert parse_request(asked(), LIMIT) == ChatRequest(message="Hi")
    assert parse_request(asked(model_id=None, session_id=None), LIMIT) == ChatRequest(message="Hi")


def test_a_request_may_name_model_and_session() -> None:
    request = parse_request(asked(model_id="groq/x:y z", session_id="aZ0_-"), LIMIT)
    assert (request.message, request.model_id, request.session_id) == ("Hi", "groq/x:y z", "aZ0_-")


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
def test_a_message_that_shows_nothing_is_refused(message: str) -> None:
    assert refused(asked(message=message)) == {"message": "holds nothing to answer"}


@pytest.mark.parametrize(
    "message", ["0", ".", "🙂", "\u3164a", "\u0301", "\ufffd", "\ue000"], ids=ascii
)
def test_a_message_that_shows_anything_is_accepted(message: str) -> None:
    assert parse_request(asked(message=message), LIMIT).message == message


@pytest.mark.parametrize(
    ("message", "length"),
    [
        ("x" * 11, 11),
        ("👍" * 11, 11),
        ("\u0958" * 6, 12),
        ("x" * 10_000, 10_000),
        ("x\r\n" * 5 + "x", 11),
    ],
    ids=["letters", "emoji", "grown by NFC", "far too long", "line ends"],
)
def test_a_message_that_is_too_long_is_refused(message: str, length: int) -> None:
    said = f"has {length} characters, {LIMIT} are allowed"
    assert refused(asked(message=message)) == {"message": said}


@pytest.mark.parametrize(
    ("message", "cleaned"),
    [
        ("x" * 10, "x" * 10),
        ("👍" * 10, "👍" * 10),
        ("e\u0301" * 10, "é" * 10),
        ("  " + "x" * 10 + "\u200b\r\n", "x" * 10),
    ],
    ids=["letters", "emoji", "shrunk by NFC", "shrunk by cleaning"],
)
def test_a_message_of_just_the_limit_is_accepted_whole(message: str, cleaned: str) -> None:
    assert parse_request(asked(message=message), LIMIT).message == cleaned


NAME = "must be 1 to 64 of A-Z, a-z, 0-9, _ and -"
STRING = "must be a string"


@pytest.mark.parametrize(
    ("body", "problems"),
    [
        (b"{}", {"message": "is required"}),
        (b'{"model_id": "m"}', {"message": "is required"}),
        (asked(message=None), {"message": STRING}),
        (asked(message=5), {"message": STRING}),
        (asked(message=["Hi"]), {"message": STRING}),
        (asked(model_id=5), {"model_id": STRING}),
        (asked(model_id="m" * 129), {"model_id": "must have at most 128 characters"}),
        (asked(session_id=5), {"session_id": STRING}),
        (asked(session_id=""), {"session_id": NAME}),
        (asked(session_id="a" * 65), {"session_id": NAME}),
        (asked(session_id="a\n"), {"session_id": NAME}),
        (asked(session_id="ä"), {"session_id": NAME}),
        (asked(session_id="a b"), {"session_id": NAME}),
        (
            b'{"message": 1, "model_id": 2, "session_id": 3}',
            {"message": STRING, "model_id": STRING, "session_id": STRING},
        ),
    ],
)
def test_each_field_that_breaks_its_rule_is_named(body: bytes, problems: dict[str, str]) -> None:
    assert refused(body) == problems


def test_the_longest_names_of_model_and_session_are_accepted() -> None:
    request = parse_request(asked(model_id="m" * 128, session_id="s" * 64), LIMIT)
    assert (request.model_id, request.session_id) == ("m" * 128, "s" * 64)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("sesion_id", "did you mean session_id?"),
        ("model", "did you mean model_id?"),
        ("Message", "did you mean message?"),
        ("temperature", "there are message, model_id, session_id"),
    ],
)
def test_an_unknown_field_is_refused_by_name_with_a_hint(name: str, hint: str) -> None:
    assert refused(asked(**{name: 1})) == {name: f"is not a field of this request; {hint}"}


def test_a_field_is_named_in_at_most_64_printable_ascii_characters() -> None:
    names = ["\x1b[31m\u202eé🙂~ ", "n" * 65, "n" * 10_000]
    named = [next(iter(refused(asked(**{name: 1})))) for name in names]
    assert named == ["?[31m???~ ", "n" * 64, "n" * 64]


def test_at_most_ten_fields_are_named() -> None:
    problems = refused(asked(message=1, **{f"x{i}": i for i in range(20)}))
    assert list(problems) == ["message", *(f"x{i}" for i in range(9))]


def test_of_a_field_given_twice_the_last_counts() -> None:
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
def test_what_is_not_a_json_object_in_unicode_is_invalid_json(body: bytes) -> None:
    with raises("invalid_json"):
        parse_request(body, LIMIT)


@pytest.mark.parametrize(
    "body",
    [b'{"message": NaN}', b'{"message": -Infinity}', b'{"message": 1e999}', b'{"message": 1, "x":'],
)
def test_a_number_that_json_does_not_know_is_refused(body: bytes) -> None:
    with pytest.raises(ServiceError):
        parse_request(body, LIMIT)


SECRET = "my secret 5512"


@pytest.mark.parametrize(
    "body",
    [
        asked(message=SECRET),
        asked(message=[SECRET]),
        asked(message={SECRET: SECRET}),
        asked(message=SECRET, session_id=SECRET, model_id=SECRET * 20, more=SECRET),
        asked(message=SECRET)[:-1],
        json.dumps([SECRET]).encode(),
        b'{"message": "%s\xff"}' % SECRET.encode(),
    ],
)
def test_the_callers_message_does_not_stand_in_the_error(body: bytes) -> None:
    with pytest.raises(ServiceError) as caught:
        parse_request(body, LIMIT)
    assert SECRET not in caught.value.detail().model_dump_json()
    assert SECRET not in str(caught.value)


def parsed_or_refused(body: bytes) -> None:
    """Raises whatever is neither a request nor one of the two refusals."""
    try:
        request = parse_request(body, LIMIT)
    except ServiceError as error:
        detail = error.detail().model_dump_json().encode()
        assert len(detail) < 4000, detail
    else:
        assert 1 <= len(request.message) <= LIMIT
        assert clean(request.message) == request.message


@given(st.binary())
def test_any_bytes_are_a_request_or_refused(body: bytes) -> None:
    parsed_or_refused(body)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)
FIELDS = st.sampled_from(["message", "model_id", "session_id", "mesage"]) | st.text()


@given(JSON_VALUES | st.dictionaries(FIELDS, JSON_VALUES, max_size=20), st.booleans())
def test_any_json_is_a_request_or_refused(value: object, escaped: bool) -> None:
    text = json.dumps(value, ensure_ascii=escaped)
    parsed_or_refused(text.encode("utf-8", "surrogatepass"))
