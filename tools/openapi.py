"""Writes static/openapi.json: the contract as OpenAPI 3.1, with the schemas of the very models that
read requests and write events and errors.

`python -m tools.openapi`; `make openapi` runs it. What no model says stands here: the routes, which
error each may answer, and the headers.
"""

import json
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import AwareDatetime, BaseModel
from pydantic.json_schema import (
    GenerateJsonSchema,
    JsonSchemaMode,
    JsonSchemaValue,
    models_json_schema,
)

import errors
from chat import ChatRequest, ChunkEvent, DoneEvent, ErrorEvent
from errors import ErrorBody, ServiceError

ROOT = Path(__file__).parent.parent
FILE = ROOT / "static" / "openapi.json"
Object = dict[str, Any]  # a part of the document


class Models(BaseModel):
    """What the caller may ask for; `default` answers a request that names no model."""

    default: str
    models: list[str]


class SessionMessage(BaseModel):
    """`complete` is false where an answer was cut."""

    role: Literal["user", "assistant"]
    content: str
    created_at: AwareDatetime
    complete: bool


class SessionView(BaseModel):
    """What the assistant remembers, the oldest message first, and until when it will."""

    session_id: str
    created_at: AwareDatetime
    expires_at: AwareDatetime
    messages: list[SessionMessage]


READ: list[tuple[type[BaseModel], JsonSchemaMode]] = [(ChatRequest, "validation")]
WRITTEN: list[tuple[type[BaseModel], JsonSchemaMode]] = [
    (model, "serialization")
    for model in (ChunkEvent, DoneEvent, ErrorEvent, ErrorBody, Models, SessionView)
]

WHEN: dict[errors.Code, str] = {
    "invalid_json": "the body is not a JSON object in UTF-8",
    "invalid_api_key": "the key is unknown, or one is needed",
    "not_found": "there is no such route",
    "session_not_found": "the session has ended, was never there, or is not the caller's",
    "method_not_allowed": "the route takes the methods that `Allow` names",
    "request_timeout": "the body did not arrive in time",
    "session_busy": "another answer is being written in this session",
    "body_too_large": "the body is larger than the service allows",
    "unsupported_media_type": "the body is not sent as `application/json`",
    "invalid_request": "a field is wrong; `fields` says which and why",
    "context_too_long": "the conversation is too long for the model, says the provider",
    "content_refused": "the provider's policy refuses the conversation",
    "rate_limited": "the caller asked too often",
    "too_many_streams": "the caller has as many answers open as it may",
    "upstream_error": "the provider refused, failed or answered nonsense",
    "upstream_incomplete": "the provider broke off its answer",
    "upstream_unavailable": "the provider is overloaded, or the quota there is used up",
    "upstream_timeout": "the provider took too long",
    "internal_error": "the service has a defect: report the request id",
    "overloaded": "as many answers are open as the service can hold",
    "shutting_down": "the service is being stopped",
    "state_unavailable": "sessions or limits can't be read or stored",
}

JSON = "application/json"
ID: Object = {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"}
BUCKET = '"(anonymous|key)"'
HEADERS: Object = {
    "X-Request-ID": {
        "description": "The request's own if it was usable, else a new one.",
        "required": True,
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9._:+/=-]{1,128}$"},
    },
    "X-Session-ID": {
        "description": "Of the conversation that the answer belongs to.",
        "required": True,
        "schema": ID,
    },
    "RateLimit-Policy": {
        "description": "The caller's bucket: `q` requests in `w` seconds. Absent without a limit.",
        "schema": {"type": "string", "pattern": f"^{BUCKET};q=[0-9]+;w=[0-9]+$"},
    },
    "RateLimit": {
        "description": "What is left: `r` requests now, one more in `t` seconds.",
        "schema": {"type": "string", "pattern": f"^{BUCKET};r=[0-9]+;t=[0-9]+$"},
    },
    "Retry-After": {
        "description": "Seconds to wait, wherever `retry_after` is a number.",
        "schema": {"type": "integer", "minimum": 0},
    },
    "WWW-Authenticate": {"required": True, "schema": {"type": "string", "const": "Bearer"}},
    "Allow": {
        "description": "The methods that the route takes.",
        "required": True,
        "schema": {"type": "string"},
    },
}
PARAMETERS: Object = {
    "X-Request-ID": {
        "name": "X-Request-ID",
        "in": "header",
        "description": "1 to 128 of `A-Z a-z 0-9 . _ : + / = -`, to find the request again. The"
        " answer has it too; in place of any other, one of the service's own.",
        "schema": {"type": "string"},
    },
}
# They come with every answer that passed the limiter.
LIMITS = ("RateLimit-Policy", "RateLimit")
# Headers of one kind of error.
OWN_HEADER = {errors.InvalidAPIKey: "WWW-Authenticate", errors.MethodNotAllowed: "Allow"}

Kinds = set[type[ServiceError]]
ANYWHERE: Kinds = {errors.InternalError}
LIMITED: Kinds = {*ANYWHERE, errors.InvalidAPIKey, errors.RateLimited}
ON_SESSION: Kinds = {
    *LIMITED,
    errors.InvalidRequest,
    errors.SessionNotFound,
    errors.StateUnavailable,
}
CHAT: Kinds = {
    *ON_SESSION,
    *errors.CallerError.__subclasses__(),
    *errors.ProviderError.__subclasses__(),
    *errors.OurError.__subclasses__(),
} - {errors.NotFound, errors.MethodNotAllowed}
READY: Kinds = {*ANYWHERE, errors.ShuttingDown, errors.StateUnavailable}
# A key is optional, unless the service is told to answer nobody without one.
ANYBODY: list[Object] = [{}, {"key": []}]

ABOUT = """\
One POST in, one event stream out. Every answer has an `X-Request-ID`, every error the same JSON \
body. A path that is not listed is answered 404 `not_found`, another method of one that is 405 \
`method_not_allowed` with `Allow`; a `Host` that the service is not told to answer, a bare 400."""
MESSAGE = """\
Has to hold something visible, and at most as many characters as the service allows: 8,000 unless \
it is told otherwise."""
STREAM = """\
The answer, as Server-Sent Events: each event is one `data:` line that holds a ChatEvent in JSON, \
and a blank line; lines that begin with `:` are to be ignored. Exactly one event with `status` \
ends every stream; a stream that closes without one was cut on its way. This status is sent with \
the first chunk of text, or after 15 s of silence: until then a failure has a status of its own, \
later it is the last event."""


class Schema(GenerateJsonSchema):
    """pydantic's, without the titles, which only repeat the names."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def schemas() -> JsonSchemaValue:
    _, found = models_json_schema(
        [*READ, *WRITTEN], schema_generator=Schema, ref_template="#/components/schemas/{model}"
    )
    made: JsonSchemaValue = found["$defs"]
    request = made["ChatRequest"]
    for schema in made.values():
        schema.pop("title")
        schema["description"] = " ".join(schema["description"].split())
        if schema is not request:
            # What the service writes it writes in full.
            schema["required"] = list(schema["properties"])
    fields = request["properties"]
    # A validator of our own looks for something visible, once the text is cleaned.
    fields["message"] |= {"minLength": 1, "description": MESSAGE}
    fields["model_id"]["description"] = "One of GET /api/v1/models; null or absent: the default."
    fields["session_id"]["description"] = "Of an earlier answer, or your own; absent: a new one."
    request["examples"] = [{"message": "Hello"}]
    events = [reference("schemas", name) for name in ("ChunkEvent", "DoneEvent", "ErrorEvent")]
    made["ChatEvent"] = {"oneOf": events, "description": "What the `data` of an event holds."}
    # OpenAPI 3.2 (4.14.4) has such a schema for each event of a stream. In 3.1 some tools take a
    # stream's schema for that of an event, others for that of the whole text: it allows either.
    data = {
        "type": "string",
        "contentMediaType": JSON,
        "contentSchema": reference("schemas", "ChatEvent"),
    }
    made["Event"] = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    return made


def reference(kind: str, name: str) -> Object:
    return {"$ref": f"#/components/{kind}/{name}"}


def headers(*names: str) -> Object:
    return {name: reference("headers", name) for name in ("X-Request-ID", *names)}


def success(description: str, media_type: str, schema: Object, *names: str) -> Object:
    content = {media_type: {"schema": schema}}
    return {"description": description, "headers": headers(*names), "content": content}


def failure(kinds: Iterable[type[ServiceError]], *names: str) -> Object:
    """The answer of one status, whichever of `kinds` it tells of."""
    ordered = sorted(kinds, key=lambda kind: kind.code)
    own = [OWN_HEADER[kind] for kind in ordered if kind in OWN_HEADER]
    waiting = ["Retry-After"] if any(kind.retryable for kind in ordered) else []
    told = "; ".join(f"`{kind.code}`: {WHEN[kind.code]}" for kind in ordered)
    return success(told, JSON, reference("schemas", "ErrorBody"), *names, *own, *waiting)


def operation(name: str, summary: str, answers: Object, kinds: Kinds, **more: object) -> Object:
    limits = LIMITS if errors.RateLimited in kinds else ()
    if limits:
        more |= {"security": ANYBODY, "parameters": [reference("parameters", "X-Request-ID")]}
    for status in sorted({kind.status for kind in kinds}):
        same = (kind for kind in kinds if kind.status == status)
        answers[str(status)] = failure(same, *limits)
    return {"operationId": name, "summary": summary, "responses": answers, **more}


def chat() -> Object:
    ids: Object = {"id": "req_123", "session_id": "s_456"}
    done = DoneEvent(**ids, model="gpt-4o-mini", finish_reason="stop", usage=None)
    chunks = [ChunkEvent(chunk=chunk, id="req_123") for chunk in ("Hello", " world")]
    stream = {"anyOf": [{"type": "string"}, reference("schemas", "Event")]}
    answer = success(STREAM, "text/event-stream", stream, "X-Session-ID", *LIMITS)
    answer["links"] = {
        name: {"operationId": name, "parameters": {"session_id": "$response.header.X-Session-ID"}}
        for name in ("readSession", "deleteSession")
    }
    example = "".join(f"data: {event.model_dump_json()}\n\n" for event in (*chunks, done))
    answer["content"]["text/event-stream"]["example"] = example
    body = {"content": {JSON: {"schema": reference("schemas", "ChatRequest")}}, "required": True}
    summary = "Ask, and stream the answer"
    return operation("chat", summary, {"200": answer}, CHAT, requestBody=body)


def paths() -> Object:
    def get(
        name: str, summary: str, schema: Object, kinds: Kinds = ANYWHERE, media_type: str = JSON
    ) -> Object:
        answer = success(summary, media_type, schema)
        return {"get": operation(name, summary, {"200": answer}, kinds)}

    def status(word: str) -> Object:
        return {"type": "object", "properties": {"status": {"const": word}}, "required": ["status"]}

    view = success("The session", JSON, reference("schemas", "SessionView"), *LIMITS)
    gone = {"description": "It is gone", "headers": headers(*LIMITS)}
    session = {
        "parameters": [{"name": "session_id", "in": "path", "required": True, "schema": ID}],
        "get": operation("readSession", "What the assistant remembers", {"200": view}, ON_SESSION),
        "delete": operation(
            "deleteSession", "Forget it", {"204": gone}, {*ON_SESSION, errors.SessionBusy}
        ),
    }
    text: Object = {"type": "string"}
    return {
        "/api/v1/chat": {"post": chat()},
        "/api/v1/models": get("models", "What may be asked for", reference("schemas", "Models")),
        "/api/v1/sessions/{session_id}": session,
        "/healthz": get("health", "The process serves", status("ok")),
        "/readyz": get("ready", "It takes new requests", status("ready"), READY),
        "/metrics": get(
            "metrics", "Prometheus's text; absent where METRICS=off", text, media_type="text/plain"
        ),
        "/openapi.json": get("openapi", "This document", {"type": "object"}),
        "/": get(
            "page",
            "A page to chat with the service; absent where PLAYGROUND=off",
            text,
            media_type="text/html",
        ),
    }


def document() -> Object:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    info = {"title": project["name"], "version": project["version"], "description": ABOUT}
    return {
        "openapi": "3.1.0",
        "info": info,
        "servers": [{"url": "/"}],
        "paths": paths(),
        "components": {
            "schemas": schemas(),
            "headers": HEADERS,
            "parameters": PARAMETERS,
            # Where no operation is: other paths, other methods.
            "responses": {
                "NotFound": failure([errors.NotFound]),
                "MethodNotAllowed": failure([errors.MethodNotAllowed]),
            },
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def text() -> str:
    return json.dumps(document(), indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    FILE.write_text(text(), encoding="utf-8")


if __name__ == "__main__":
    main()
