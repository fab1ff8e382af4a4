"""Take the README's screenshots of the playground; `make screenshots` runs it.

A scripted provider sends the response.
"""

import asyncio
from pathlib import Path

from tests.browser import open_tab
from tests.conftest import running_service
from tests.upstream import DONE, END, Connection, event, running_upstream

DOCS = Path(__file__).parent.parent / "docs"
MESSAGE = "How do I show a response in Python while it is being written?"
RESPONSE = """Send one POST and read **one line for each event**:

```python
import httpx, json

request = {"message": "Hello", "session_id": "demo"}
with httpx.stream("POST", f"{URL}/api/v1/chat", json=request) as response:
    for line in response.iter_lines():
        if line.startswith("data: "):
            event = json.loads(line[6:])
            print(event.get("chunk", ""), end="")
```

- An event has a `chunk` of text, or a `status`.
- *Exactly one* event with `done` or `error` ends the response.
"""


async def script(connection: Connection) -> None:
    chunk = {"model": "demo", "choices": [{"delta": {"content": RESPONSE}}]}
    usage = {"prompt_tokens": 15, "completion_tokens": 117, "total_tokens": 132}
    end = {"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": usage}
    await connection.stream(event(chunk), event(end), DONE)
    await connection.send(END)


async def main() -> None:
    async with running_upstream(script) as upstream:
        model = {"PROVIDERS": "local", "LOCAL_BASE_URL": upstream.url, "DEFAULT_MODEL": "demo"}
        async with running_service(model) as app:
            for scheme in ("light", "dark"):
                size = {"width": 860, "height": 740}
                async with open_tab(app.url, viewport=size, color_scheme=scheme) as tab:
                    await tab.send(MESSAGE)
                    await tab.ending()
                    await tab.page.screenshot(path=DOCS / f"playground-{scheme}.png")


if __name__ == "__main__":
    asyncio.run(main())
