"""A chat request and its answer: what is accepted, how text is cleaned, the events, their stream.

`EventStream` is one state machine for all that a streaming response is asked to do: commit the
status late, keep the line alive, not wait for a client that does not read, notice one that leaves,
and end exactly once. It knows nothing of limits or sessions: it is given the pieces, and whom to
tell how it ended.
"""

import difflib
import re
import unicodedata
from itertools import chain, groupby
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, StringConstraints, ValidationError, ValidationInfo
from pydantic_core import ErrorDetails

import errors
from errors import ErrorDetail, FieldProblem, InvalidRequestDetail, ServiceError

# Invalid fields in one response.
MAX_PROBLEMS = 10

# ---- the request

# What no reader sees and no writer means: control characters but tab and LF, bidirectional
# controls, tag characters (invisible ASCII), zero-width and interlinear marks, noncharacters. ZWJ,
# ZWNJ and variation selectors stay: emoji, Persian and Indic text need them.
NONCHARACTERS = "".join(chr(p + 0xFFFE) + chr(p + 0xFFFF) for p in range(0, 0x110000, 0x10000))
UNWANTED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u180e\u200b\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufdd0-\ufdef"
    f"\ufeff\ufff9-\ufffb\U000e0000-\U000e007f{NONCHARACTERS}]"
)
# Unicode's Default_Ignorable_Code_Point, which shows nothing whatever its category, and Braille's
# blank.
BLANK = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f"
    "\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    "\U000e0000-\U000e0fff]"
)
# Where more combining marks may stand in a row than the 30 that any script needs (UAX 15, 13.1).
# CPython orders them in the square of their number: 60 KB of them held every stream for a second.
MANY_MARKS = re.compile("[\u0300-\U0010ffff]{31,}")


def clean(text: str) -> str:
    """`text` with one kind of line end, in NFC, without what is invisible or breaks displays.

    Hygiene, not a defence against prompt injection. Cleaning twice changes nothing.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = MANY_MARKS.sub(_in_order, UNWANTED.sub("", text))
    return unicodedata.normalize("NFC", text).strip()


def _in_order(found: re.Match[str]) -> str:
    """Each row of combining marks in canonical order (Unicode 17, D109), by a stable sort."""
    rows = groupby(found[0], lambda char: unicodedata.combining(char) > 0)
    parts = (sorted(row, key=unicodedata.combining) if marks else row for marks, row in rows)
    return "".join(chain.from_iterable(parts))


def _is_visible(text: str) -> bool:
    # Controls, formats, separators; what Unicode has not assigned yet may well be an emoji.
    blank = ("Cc", "Cf", "Zs", "Zl", "Zp")
    return any(unicodedata.category(char) not in blank for char in BLANK.sub("", text))


def _message(text: str, info: ValidationInfo) -> str:
    text = clean(text)
    if not _is_visible(text):
        raise ValueError("holds nothing to answer")
    # Whoever validates says how long a message may be, if at all.
    limit: int | None = info.context
    if limit is not None and len(text) > limit:
        raise ValueError(f"has {len(text)} characters, {limit} are allowed")
    return text


class ChatRequest(BaseModel, extra="forbid", frozen=True, strict=True):
    """The body of POST /api/v1/chat. A field of another name is refused, so that a mistyped
    `sesion_id` does not silently begin a new conversation."""

    message: Annotated[str, AfterValidator(_message)]
    model_id: Annotated[str, StringConstraints(max_length=128)] | None = None
    session_id: Annotated[str, StringConstraints(pattern="^[A-Za-z0-9_-]{1,64}$")] | None = None


def parse_request(body: bytes, max_message_chars: int) -> ChatRequest:
    """Raises InvalidJSON or InvalidRequest."""
    try:
        return ChatRequest.model_validate_json(body, context=max_message_chars)
    except ValidationError as error:
        # The input would bring the caller's message into our answer.
        found = error.errors(include_url=False, include_context=False, include_input=False)
    if not found[0]["loc"]:
        raise ServiceError(
            "invalid_json", 'The body must be a JSON object in UTF-8: {"message": "Hello"}.'
        )
    raise errors.invalid_request(*map(_problem, found[:MAX_PROBLEMS]))


def _problem(found: ErrorDetails) -> FieldProblem:
    """A problem in our words; pydantic's where it has them from us."""
    field = str(found["loc"][0])
    known = list(ChatRequest.model_fields)
    near = difflib.get_close_matches(field, known, 1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
    words = {
        "missing": "is required",
        "extra_forbidden": f"is not a field of this request; {hint}",
        "string_type": "must be a string",
        "string_too_long": "must have at most 128 characters",
        "string_pattern_mismatch": "must be 1 to 64 of A-Z, a-z, 0-9, _ and -",
    }
    message = words.get(found["type"], found["msg"].removeprefix("Value error, "))
    return FieldProblem(field=re.sub("[^ -~]", "?", field)[:64], message=message)


# ---- the events


class ChunkEvent(BaseModel):
    """One text delta of text, as the provider sent it; `id` is the request id."""

    chunk: str
    id: str


class DoneEvent(BaseModel):
    """The end of a whole answer. `usage` is the provider's own, null where it sent none."""

    status: Literal["done"] = "done"
    id: str
    session_id: str
    model: str
    finish_reason: str | None
    usage: dict[str, Any] | None


class ErrorEvent(BaseModel):
    """The end of an answer that broke off."""

    status: Literal["error"] = "error"
    id: str
    session_id: str
    error: InvalidRequestDetail | ErrorDetail
