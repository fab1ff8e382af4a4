"""The chat request, the cleaning of its text, and the events of a stream.

Parsing is pure: it needs neither the settings nor a session. stream.py sends the events.
"""

import difflib
import math
import re
import unicodedata
from itertools import chain
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    StringConstraints,
    ValidationError,
    ValidationInfo,
)
from pydantic_core import ErrorDetails

import errors
from errors import ErrorDetail, FieldProblem, InvalidRequestDetail, ServiceError

# Invalid fields reported in one response.
MAX_PROBLEMS = 10
# Characters of a field's name that are matched and reported. The names are the caller's.
MAX_FIELD_NAME = 64
# NFC composes at most four characters into one (U+1F82). A message longer than this multiple of the
# limit is rejected before it is cleaned, which bounds the cost of cleaning.
MAX_COMPOSED = 4

# Characters that are removed because they are invisible or disturb a display: control characters
# except tab and LF, bidirectional controls, tag characters (invisible ASCII), zero-width space and
# invisible operators, interlinear annotations, noncharacters. ZWJ, ZWNJ and variation selectors
# stay: emoji, Persian and Indic text need them.
NONCHARACTERS = "".join(chr(p + 0xFFFE) + chr(p + 0xFFFF) for p in range(0, 0x110000, 0x10000))
UNWANTED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u180e\u200b\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufdd0-\ufdef"
    f"\ufeff\ufff9-\ufffb\U000e0000-\U000e007f{NONCHARACTERS}]"
)
# Characters of any category that render as nothing: Unicode's Default_Ignorable_Code_Point, and the
# blank Braille pattern.
BLANK = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f"
    "\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    "\U000e0000-\U000e0fff]"
)
# CPython sorts a run of combining marks in quadratic time: 60 KB of them blocked the event loop for
# 20 s. Longer runs than the 30 marks that any script needs (UAX 15, 13.1) are sorted here first.
# Marks are found after decomposition, because U+0F73, U+0F75 and U+0F81 have combining class 0 and
# decompose into two marks each. A mark is neither a letter nor a digit, so most text is skipped.
LONG_SYMBOL_RUN = re.compile(r"[^\w\x00-\u02ff]{31,}")
LONG_MARK_RUN = re.compile(rb"[^\0]{31,}")  # in combining classes


def clean_text(text: str) -> str:
    """Return `text` in NFC, with LF line ends, without invisible characters and outer white space.

    Takes linear time and is idempotent. It is hygiene, not a defence against prompt injection.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = LONG_SYMBOL_RUN.sub(_sort_marks, UNWANTED.sub("", text))
    return unicodedata.normalize("NFC", text).strip()


def _sort_marks(symbols: re.Match[str]) -> str:
    """Return the symbols decomposed, with long runs of marks in canonical order.

    The order is by combining class, and stable (Unicode 17, D109).
    """
    chars = [*chain.from_iterable(unicodedata.normalize("NFD", char) for char in symbols[0])]
    for marks in LONG_MARK_RUN.finditer(bytes(map(unicodedata.combining, chars))):
        run = slice(*marks.span())
        chars[run] = sorted(chars[run], key=unicodedata.combining)
    return "".join(chars)


def _is_visible(text: str) -> bool:
    # Controls, formats and separators. Unassigned characters count as visible: a newer Unicode may
    # have made emoji of them.
    invisible = ("Cc", "Cf", "Zs", "Zl", "Zp")
    return any(unicodedata.category(char) not in invisible for char in BLANK.sub("", text))


def _clean_message(text: str, info: ValidationInfo) -> str:
    """Return the message cleaned. Raise ValueError if it is too long or blank.

    The validation context is the maximum number of characters. Without a context there is none.
    """
    limit = math.inf if info.context is None else info.context
    if len(text) <= MAX_COMPOSED * limit:
        text = clean_text(text)
    if len(text) > limit:
        raise ValueError(f"must have at most {limit} characters (got {len(text)})")
    if not _is_visible(text):
        raise ValueError("must contain visible text")
    return text


class ChatRequest(BaseModel, extra="forbid", frozen=True, strict=True):
    """The body of POST /api/v1/chat.

    Unknown fields are rejected, so that a mistyped `sesion_id` does not silently start a new
    conversation.
    """

    message: Annotated[str, AfterValidator(_clean_message)]
    model_id: Annotated[str, StringConstraints(max_length=128)] | None = None
    session_id: Annotated[str, StringConstraints(pattern="^[A-Za-z0-9_-]{1,64}$")] | None = None
    stream: bool = True
    include_reasoning: bool = False
    replace_last_turn: bool = False


def parse_request(body: bytes, max_message_chars: int) -> ChatRequest:
    """Return the request in `body`. Raise a ServiceError: invalid_json or invalid_request."""
    try:
        return ChatRequest.model_validate_json(body, context=max_message_chars)
    except ValidationError as error:
        # Without the input: it would put the caller's message into the response.
        problems = error.errors(include_url=False, include_context=False, include_input=False)
    if not problems[0]["loc"]:
        problem = 'The body must be a JSON object in UTF-8, for example {"message": "Hello"}.'
        raise ServiceError("invalid_json", problem)
    raise errors.invalid_request(*map(_field_problem, problems[:MAX_PROBLEMS]))


def _field_problem(problem: ErrorDetails) -> FieldProblem:
    """Return the problem with a message of this service instead of pydantic's.

    ValueErrors from the validators above keep theirs.
    """
    # Truncated first: difflib would index a field name as long as the body.
    field = str(problem["loc"][0])[:MAX_FIELD_NAME]
    known = list(ChatRequest.model_fields)
    similar = difflib.get_close_matches(field, known, 1)
    hint = f"did you mean {similar[0]}?" if similar else f"known fields: {', '.join(known)}"
    messages = {
        "missing": "is required",
        "extra_forbidden": f"is not a known field ({hint})",
        "string_type": "must be a string",
        "bool_type": "must be true or false",
        "string_too_long": "must have at most 128 characters",
        "string_pattern_mismatch": "must be 1 to 64 characters of A-Z, a-z, 0-9, _ and -",
    }
    message = messages.get(problem["type"], problem["msg"].removeprefix("Value error, "))
    return FieldProblem(field=re.sub("[^ -~]", "?", field), message=message)


class ChunkEvent(BaseModel):
    """One text delta, as the provider sent it. `id` is the request id."""

    chunk: str
    id: str


class ReasoningEvent(BaseModel):
    """One delta of the model's reasoning, which is only sent on request."""

    reasoning: str
    id: str


class DoneEvent(BaseModel):
    """The terminal event of a complete response.

    `usage` is the provider's own object, or null if it sent none. `history_trimmed` is only sent if
    older turns no longer fit into the model and were left out.
    """

    status: Literal["done"] = "done"
    id: str
    session_id: str
    model: str | None
    finish_reason: str | None
    usage: dict[str, Any] | None
    history_trimmed: bool = Field(default=False, exclude_if=lambda trimmed: not trimmed)


class CompletionBody(BaseModel):
    """The body of a response to a request with `"stream": false`."""

    status: Literal["done", "stopped"]
    id: str
    session_id: str
    model: str | None
    content: str
    finish_reason: str | None
    usage: dict[str, Any] | None
    history_trimmed: bool = Field(default=False, exclude_if=lambda trimmed: not trimmed)
    reasoning: str | None = Field(default=None, exclude_if=lambda reasoning: reasoning is None)


class StoppedEvent(BaseModel):
    """The terminal event of a response that its caller stopped. The text so far is stored."""

    status: Literal["stopped"] = "stopped"
    id: str
    session_id: str


class ErrorEvent(BaseModel):
    """The terminal event of a response that failed after its status line was sent."""

    status: Literal["error"] = "error"
    id: str
    session_id: str
    error: InvalidRequestDetail | ErrorDetail
