"""The usual way to write such a service: FastAPI, StreamingResponse, the openai SDK, slowapi.

A peer to measure against, as short and as fast as its parts allow: no middleware, sessions in a
dictionary. Settings: OPENAI_BASE_URL, OPENAI_API_KEY and RATE_LIMIT.
"""

import json
import os
import uuid
from collections.abc import AsyncIterator

from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionMessageParam
from pydantic import BaseModel, Field
from slowapi import Limiter, _rate_limit_exceeded_handler
from slowapi.errors import RateLimitExceeded
from slowapi.util import get_remote_address

client = AsyncOpenAI()
limiter = Limiter(key_func=get_remote_address)
sessions: dict[str, list[ChatCompletionMessageParam]] = {}
app = FastAPI()
app.state.limiter = limiter
app.add_exception_handler(RateLimitExceeded, _rate_limit_exceeded_handler)


class ChatRequest(BaseModel):
    message: str = Field(min_length=1, max_length=8000)
    session_id: str | None = None


def event(**fields: object) -> str:
    return f"data: {json.dumps(fields)}\n\n"


async def completion(request_id: str, session_id: str, message: str) -> AsyncIterator[str]:
    history = sessions.setdefault(session_id, [])
    text = ""
    try:
        stream = await client.chat.completions.create(
            model="gpt-4o-mini",
            messages=[*history, {"role": "user", "content": message}],
            stream=True,
        )
        async for part in stream:
            if part.choices and (chunk := part.choices[0].delta.content):
                text += chunk
                yield event(chunk=chunk, id=request_id)
    except Exception as error:
        yield event(status="error", id=request_id, message=str(error))
        return
    history.append({"role": "user", "content": message})
    history.append({"role": "assistant", "content": text})
    yield event(status="done", id=request_id, session_id=session_id)


@app.post("/chat")
@limiter.limit(os.environ["RATE_LIMIT"])
async def chat(request: Request, body: ChatRequest) -> StreamingResponse:
    request_id = uuid.uuid4().hex
    session_id = body.session_id or uuid.uuid4().hex
    events = completion(request_id, session_id, body.message)
    return StreamingResponse(events, media_type="text/event-stream")


@app.get("/healthz")
async def healthz() -> dict[str, str]:
    return {"status": "ok"}
