"""Write static/openapi.json, the HTTP API as OpenAPI 3.1; `make openapi` runs it.

Schemas come from the models that parse requests and write events and errors. The routes, their
headers and their errors are declared here.
"""

import json
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import AwareDatetime, BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode, models_json_schema

from chat import (
    ChatRequest,
    ChunkEvent,
    CompletionBody,
    DoneEvent,
    ErrorEvent,
    ReasoningEvent,
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


EVENTS = (ChunkEvent, ReasoningEvent, DoneEvent, ErrorEvent)
WRITTEN = (*EVENTS, CompletionBody, ErrorBody, Models, SessionView)
# Fields that are left out of some responses.
OPTIONAL = {
    (model.__name__, name)
    for model in WRITTEN
    for name, info in model.model_fields.items()
    if info.exclude_if
}

MEANINGS: dict[Code, str] = {
    "invalid_json": "the body is not a JSON object in UTF-8",
    "invalid_api_key": "the API key is unknown, or missing where one is required",
    "not_found": "no such route",
    "session_not_found": "the session does not exist, has expired or belongs to another caller",
    "method_not_allowed": "the route does not accept this method; `Allow` lists those it accepts",
    "request_timeout": "the body did not arrive in time",
    "session_busy": "another response is running in this session",
    "body_too_large": "the body exceeds the limit",
    "unsupported_media_type": "the Content-Type is not `application/json`",
    "invalid_request": "a field is invalid; `fields` lists each with the reason",
    "context_too_long": "the conversation is too long for the model",
    "content_refused": "the provider's policy rejects the conversation",
    "rate_limited": "the caller exceeded its rate limit",
    "too_many_streams": "the caller has as many open streams as it may have",
    "upstream_error": "the provider failed, rejected the request or sent a malformed response",
    "upstream_incomplete": "the provider's stream ended before the response was complete",
    "upstream_unavailable": "the provider is overloaded, or the quota there is used up",
    "upstream_timeout": "the provider took too long",
    "internal_error": "a bug in the service; report the request id",
    "overloaded": "the service is at its limit of concurrent streams",
    "shutting_down": "the service is shutting down",
    "state_unavailable": "the session store or the shared rate limiter does not respond",
}
# The errors of each kind of route, besides internal_error.
LIMITED: set[Code] = {"invalid_api_key", "rate_limited"}
SESSION: set[Code] = {*LIMITED, "invalid_request", "session_not_found", "state_unavailable"}
CHAT: set[Code] = {*KINDS} - {"not_found", "method_not_allowed"}
READY: set[Code] = {"shutting_down", "state_unavailable"}

ID: Object = {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"}
BUCKET = '"(anonymous|key)"'
HEADERS: Object = {
    "X-Request-ID": {
        "description": "The request's own id if it is valid, otherwise a generated one.",
        "required": True,
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9._:+/=-]{1,128}$"},
    },
    "X-Session-ID": {
        "description": "The session of this response.",
        "required": True,
        "schema": ID,
    },
    "RateLimit-Policy": {
        "description": "The caller's limit: `q` requests in `w` seconds. Absent without a limit.",
        "schema": {"type": "string", "pattern": f"^{BUCKET};q=[0-9]+;w=[0-9]+$"},
    },
    "RateLimit": {
        "description": "`r` requests are left, and one more is added in `t` seconds.",
        "schema": {"type": "string", "pattern": f"^{BUCKET};r=[0-9]+;t=[0-9]+$"},
    },
    "Retry-After": {
        "description": "Seconds to wait before a retry, if `retry_after` is a number.",
        "schema": {"type": "integer", "minimum": 0},
    },
    "WWW-Authenticate": {"required": True, "schema": {"type": "string", "const": "Bearer"}},
    "Allow": {
        "description": "The methods that the route accepts.",
        "required": True,
        "schema": {"type": "string"},
    },
}
# On every response that passed the rate limiter.
LIMIT_HEADERS = ("RateLimit-Policy", "RateLimit")
ERROR_HEADERS: dict[Code, str] = {
    "invalid_api_key": "WWW-Authenticate",
    "method_not_allowed": "Allow",
}
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
STREAM = """\
Server-sent events. Each event is one `data:` line with a ChatEvent as JSON, followed by a blank \
line. Lines that begin with `:` are comments and keep the connection alive. Exactly one event \
with a `status` ends the stream. If the connection closes without one, the response is \
incomplete. The status line is sent with the first chunk or after 15 s; earlier failures have \
their own HTTP status, and later ones are the last event. With `"stream": false`: one \
CompletionBody, sent at the end."""


class Schema(GenerateJsonSchema):
    """pydantic's schemas without titles, which only repeat the names."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def ref(kind: str, name: str) -> Object:
    return {"$ref": f"#/components/{kind}/{name}"}


def schemas() -> Object:
    mode: JsonSchemaMode = "serialization"
    _, definitions = models_json_schema(
        [(ChatRequest, "validation"), *((model, mode) for model in WRITTEN)],
        schema_generator=Schema,
        ref_template="#/components/schemas/{model}",
    )
    result: Object = definitions["$defs"]
    for name, schema in result.items():
        schema.pop("title")
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
    # OpenAPI 3.2 (4.14.4) describes each event of a stream this way. In OpenAPI 3.1 some tools
    # apply a stream's schema to one event and others to the whole text, so it accepts both.
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


def error_response(codes: set[Code], *names: str) -> Object:
    """The response of one status, which may have any of these codes."""
    own = [header for code, header in ERROR_HEADERS.items() if code in codes]
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
    stream = {"anyOf": [{"type": "string"}, ref("schemas", "Event")]}
    success = response(STREAM, "text/event-stream", stream, "X-Session-ID", *LIMIT_HEADERS)
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
    return operation("chat", summary, success, CHAT, requestBody=body)


def session() -> Object:
    view = response("The session", JSON, ref("schemas", "SessionView"), *LIMIT_HEADERS)
    deleted = {"description": "Deleted", "headers": headers(*LIMIT_HEADERS)}
    return {
        "parameters": [{"name": "session_id", "in": "path", "required": True, "schema": ID}],
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
    text: Object = {"type": "string"}
    return {
        "/api/v1/chat": {"post": chat()},
        "/api/v1/models": get("models", "The models callers may request", ref("schemas", "Models")),
        "/api/v1/sessions/{session_id}": session(),
        "/healthz": get("health", "The process is running", status("ok")),
        "/readyz": get("ready", "New requests are accepted", status("ready"), codes=READY),
        "/metrics": get("metrics", "Prometheus metrics; absent if METRICS=off", text, "text/plain"),
        "/openapi.json": get("openapi", "This document", {"type": "object"}),
        "/": get("playground", "The playground; absent if PLAYGROUND=off", text, "text/html"),
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
            # For all other paths and methods.
            "responses": {
                "NotFound": error_response({"not_found"}),
                "MethodNotAllowed": error_response({"method_not_allowed"}),
            },
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def text() -> str:
    return json.dumps(document(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
