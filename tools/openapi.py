"""Write static/openapi.json, the HTTP API as OpenAPI 3.1; `make openapi` runs it.

Schemas come from the models that parse requests and write events and errors. The routes, their
headers and their errors are declared here.
"""

import json
import re
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import AwareDatetime, BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from chat import (
    ChatRequest,
    ChunkEvent,
    CompletionBody,
    DoneEvent,
    ErrorEvent,
    ReasoningEvent,
    StoppedEvent,
)
from errors import KINDS, Code, ErrorBody

ROOT = Path(__file__).parent.parent
FILE = ROOT / "static" / "openapi.json"
Object = dict[str, Any]  # a part of the document
JSON = "application/json"


class Models(BaseModel):
    """The models that callers may request. `default` is used when a request names none."""

    default: str
    models: list[str]


class SessionMessage(BaseModel):
    """A message. `complete` is false if the response was cut short."""

    role: Literal["user", "assistant"]
    content: str
    created_at: AwareDatetime
    complete: bool


class SessionView(BaseModel):
    """The retained messages of a session, oldest first."""

    session_id: str
    created_at: AwareDatetime
    expires_at: AwareDatetime
    messages: list[SessionMessage]


EVENTS = (ChunkEvent, ReasoningEvent, DoneEvent, StoppedEvent, ErrorEvent)
WRITTEN = (*EVENTS, CompletionBody, ErrorBody, Models, SessionView)
# Fields that are left out of some responses.
OPTIONAL = {
    (model.__name__, name)
    for model in WRITTEN
    for name, info in model.model_fields.items()
    if info.exclude_if
}

# The causes of each error, from its table.
API = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
MEANINGS = dict(re.findall(r"^\| \d+ \| `(\w+)` \| [^|]+ \| (.+) \|$", API, re.MULTILINE))
# The errors of each kind of route, besides internal_error.
LIMITED: set[Code] = {"invalid_api_key", "rate_limited"}
SESSION: set[Code] = {*LIMITED, "invalid_request", "session_not_found", "state_unavailable"}
CHAT: set[Code] = {*KINDS} - {"not_found", "method_not_allowed"}
STREAM: set[Code] = {"session_not_found", *CHAT} - {
    *("invalid_json", "body_too_large", "request_timeout", "unsupported_media_type"),
    "idempotency_key_reused",
}
READY: set[Code] = {"shutting_down", "state_unavailable"}

ID: Object = {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"}
BUCKET = '"(anonymous|key)"'
TEXT: Object = {"type": "string"}


def header(description: str, schema: Object, **more: object) -> Object:
    return {"description": description, "schema": schema, **more}


HEADERS: Object = {
    "X-Request-ID": header(
        "The request's own id if it is valid, otherwise a generated one.",
        {**TEXT, "pattern": "^[A-Za-z0-9._:+/=-]{1,128}$"},
        required=True,
    ),
    "X-Session-ID": header("The session of this response.", ID, required=True),
    "Idempotent-Replayed": header(
        "Present if an earlier request with this key started the stream.", {"const": "true"}
    ),
    "RateLimit-Policy": header(
        "The caller's limit: `q` requests in `w` seconds. Absent without a limit.",
        {**TEXT, "pattern": f"^{BUCKET};q=[0-9]+;w=[0-9]+$"},
    ),
    "RateLimit": header(
        "`r` requests are left, and one more is added in `t` seconds.",
        {**TEXT, "pattern": f"^{BUCKET};r=[0-9]+;t=[0-9]+$"},
    ),
    "Retry-After": header(
        "Seconds to wait before a retry, if `retry_after` is a number.",
        {"type": "integer", "minimum": 0},
    ),
    "WWW-Authenticate": header("The scheme of API keys.", {"const": "Bearer"}, required=True),
}
# On every response that passed the rate limiter.
LIMIT_HEADERS = ("RateLimit-Policy", "RateLimit")
REQUEST_ID: Object = {
    "name": "X-Request-ID",
    "in": "header",
    "description": "Your own id for this request: 1 to 128 of `A-Z a-z 0-9 . _ : + / = -`. The"
    " response repeats it. An invalid id is replaced by a generated one.",
    "schema": {"type": "string"},
}

ABOUT = """\
Streaming chat over HTTP: one POST per message, one event stream per response. Every response has \
an `X-Request-ID`; every error has the same JSON body. A path that is not listed is 404 \
`not_found`, except for the scripts and the style of the playground. A method that is not listed \
is 405 `method_not_allowed`, with `Allow`. A `Host` that is not in ALLOWED_HOSTS is 400 without a \
JSON body."""
MESSAGE = """\
Must contain visible text. The maximum is MAX_MESSAGE_CHARS code points, 8,000 by default."""
EVENT_STREAM = """\
Server-sent events. Each event is one `data:` line with a ChatEvent as JSON, followed by a blank \
line. Lines that begin with `:` are comments and keep the connection alive. Exactly one event \
with a `status` ends the stream. If the connection closes without one, the response is \
incomplete. The status line is sent with the first chunk or after 15 s; earlier failures have \
their own HTTP status, and later ones are the last event. With `"stream": false`: one \
CompletionBody, sent at the end."""
RESUMABLE = """\
With the header `Idempotency-Key` (16 to 255 visible ASCII characters, such as a UUID) the stream \
goes on for RESUME_SECONDS without a client. The same request with the same key attaches to it. \
Its events have an `id:` line; `Last-Event-ID` skips those that the client has."""


def ref(kind: str, name: str) -> Object:
    return {"$ref": f"#/components/{kind}/{name}"}


# OpenAPI 3.2 (4.14.4) describes each event of a stream by the schema Event. In OpenAPI 3.1 some
# tools apply a stream's schema to one event and others to the whole text, so it accepts both.
STREAM_SCHEMA: Object = {"anyOf": [{"type": "string"}, ref("schemas", "Event")]}


def schemas() -> Object:
    mode: JsonSchemaMode = "serialization"
    _, definitions = models_json_schema(
        [(ChatRequest, "validation"), *((model, mode) for model in WRITTEN)],
        ref_template="#/components/schemas/{model}",
    )
    result: Object = definitions["$defs"]
    for name, schema in result.items():
        # Titles only repeat the names.
        for each in (schema, *schema["properties"].values()):
            each.pop("title", None)
        schema["description"] = " ".join(schema["description"].split())
        if name != "ChatRequest":
            # The service also writes fields that have their default.
            schema["required"] = [
                field for field in schema["properties"] if (name, field) not in OPTIONAL
            ]
    fields = result["ChatRequest"]["properties"]
    # Whether text is visible is checked by code, which no JSON Schema can express.
    fields["message"] |= {"minLength": 1, "description": MESSAGE}
    fields["model_id"]["description"] = "One of GET /api/v1/models. Absent or null: the default."
    fields["session_id"]["description"] = (
        "The session to continue, or an id of your own. Absent or null: a new session."
    )
    fields["stream"]["description"] = "False: one JSON response instead of a stream."
    fields["include_reasoning"]["description"] = "Whether to send the model's reasoning, too."
    fields["replace_last_turn"]["description"] = (
        "Whether this turn replaces the session's last one. Needs a session_id."
    )
    result["ChatRequest"] |= {
        "if": {
            "properties": {"replace_last_turn": {"const": True}},
            "required": ["replace_last_turn"],
        },
        "then": {"properties": {"session_id": {"type": "string"}}, "required": ["session_id"]},
    }
    result["ChatRequest"]["examples"] = [{"message": "Hello"}]
    result["ChatEvent"] = {
        "oneOf": [ref("schemas", event.__name__) for event in EVENTS],
        "description": "The JSON in an event's `data` line.",
    }
    data = {
        "type": "string",
        "contentMediaType": JSON,
        "contentSchema": ref("schemas", "ChatEvent"),
    }
    result["Event"] = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    return result


def headers(*names: str) -> Object:
    return {name: ref("headers", name) for name in ("X-Request-ID", *names)}


def response(description: str, media_type: str, schema: Object, *names: str) -> Object:
    content = {media_type: {"schema": schema}}
    return {"description": description, "headers": headers(*names), "content": content}


def no_content(description: str) -> Object:
    return {"description": description, "headers": headers(*LIMIT_HEADERS)}


def error_response(codes: set[Code], *names: str) -> Object:
    """The response of one status, which may have any of these codes."""
    own = ["WWW-Authenticate"] if "invalid_api_key" in codes else []
    retry = ["Retry-After"] if any(KINDS[code].retryable for code in codes) else []
    text = "; ".join(f"`{code}`: {MEANINGS[code]}" for code in sorted(codes))
    return response(text, JSON, ref("schemas", "ErrorBody"), *names, *own, *retry)


def operation(
    name: str, summary: str, success: Object, codes: set[Code], *, status: int = 200, **more: object
) -> Object:
    """An operation whose errors are `codes` and internal_error."""
    codes = {*codes, "internal_error"}
    limits = LIMIT_HEADERS if "rate_limited" in codes else ()
    if limits:
        # A key is optional unless ALLOW_ANONYMOUS=false.
        more |= {"security": [{}, {"key": []}], "parameters": [ref("parameters", "X-Request-ID")]}
    responses = {str(status): success}
    for error in sorted({KINDS[code].status for code in codes}):
        same = {code for code in codes if KINDS[code].status == error}
        responses[str(error)] = error_response(same, *limits)
    return {"operationId": name, "summary": summary, "responses": responses, **more}


def chat() -> Object:
    ids: Object = {"id": "req_123", "session_id": "s_456"}
    done = DoneEvent(**ids, model="gpt-4o-mini", finish_reason="stop", usage=None)
    chunks = [ChunkEvent(chunk=chunk, id="req_123") for chunk in ("Hello", " world")]
    headers = ("X-Session-ID", "Idempotent-Replayed", *LIMIT_HEADERS)
    success = response(EVENT_STREAM, "text/event-stream", STREAM_SCHEMA, *headers)
    success["content"][JSON] = {"schema": ref("schemas", "CompletionBody")}
    success["content"]["text/event-stream"]["example"] = "".join(
        f"data: {event.model_dump_json()}\n\n" for event in (*chunks, done)
    )
    success["links"] = {
        name: {"operationId": name, "parameters": {"session_id": "$response.header.X-Session-ID"}}
        for name in ("readSession", "deleteSession")
    }
    body = {"content": {JSON: {"schema": ref("schemas", "ChatRequest")}}, "required": True}
    summary = "Send a message and stream the response"
    return operation("chat", summary, success, CHAT, requestBody=body, description=RESUMABLE)


SESSION_ID: Object = {"name": "session_id", "in": "path", "required": True, "schema": ID}


def session_stream() -> Object:
    summary = "Resume the latest stream with an Idempotency-Key"
    headers = ("X-Session-ID", *LIMIT_HEADERS)
    success = response(EVENT_STREAM, "text/event-stream", STREAM_SCHEMA, *headers)
    resume = operation("resumeStream", summary, success, STREAM)
    resume["responses"]["204"] = no_content("Nothing to resume, or the client has all events")
    stopped = no_content("Stopped, or nothing was running")
    stop = operation("stopStream", "Stop the running stream", stopped, SESSION, status=204)
    return {"parameters": [SESSION_ID], "get": resume, "delete": stop}


def session() -> Object:
    view = response("The session", JSON, ref("schemas", "SessionView"), *LIMIT_HEADERS)
    deleted = no_content("Deleted")
    return {
        "parameters": [SESSION_ID],
        "get": operation("readSession", "Read a session", view, SESSION),
        "delete": operation(
            "deleteSession", "Delete a session", deleted, {*SESSION, "session_busy"}, status=204
        ),
    }


def get(
    name: str, summary: str, schema: Object, media_type: str = JSON, codes: set[Code] | None = None
) -> Object:
    success = response(summary, media_type, schema)
    return {"get": operation(name, summary, success, codes or set())}


def status(word: str) -> Object:
    return {"type": "object", "properties": {"status": {"const": word}}, "required": ["status"]}


def paths() -> Object:
    return {
        "/api/v1/chat": {"post": chat()},
        "/api/v1/models": get("models", "The models callers may request", ref("schemas", "Models")),
        "/api/v1/sessions/{session_id}": session(),
        "/api/v1/sessions/{session_id}/stream": session_stream(),
        "/healthz": get("health", "The process is running", status("ok")),
        "/readyz": get("ready", "New requests are accepted", status("ready"), codes=READY),
        "/metrics": get("metrics", "Prometheus metrics; absent if METRICS=off", TEXT, "text/plain"),
        "/openapi.json": get("openapi", "This document", {"type": "object"}),
        "/": get("playground", "The playground; absent if PLAYGROUND=off", TEXT, "text/html"),
    }


def document() -> Object:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {
        "openapi": "3.1.0",
        "info": {"title": project["name"], "version": project["version"], "description": ABOUT},
        "servers": [{"url": "/"}],
        "paths": paths(),
        "components": {
            "schemas": schemas(),
            "headers": HEADERS,
            "parameters": {"X-Request-ID": REQUEST_ID},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def text() -> str:
    return json.dumps(document(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
