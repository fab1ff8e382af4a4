"""The examples: each deals with every ending, and is short enough to copy; and the rehearsal, which
says of a client where it does not."""

import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from providers import MockProvider
from tests.redis_server import find_program as program
from tools.rehearse import ENDINGS, Answer, Run, broken_off, faults, rehearse, run

EXAMPLES = Path(__file__).parent.parent / "examples"
ASKING = sorted(path for path in EXAMPLES.iterdir() if path.stem == "ask")
slow = pytest.mark.slow


@pytest.mark.parametrize("path", ASKING, ids=lambda path: path.name)
def test_an_example_is_under_40_lines_of_code(path: Path) -> None:
    text = re.sub(r"<!--.*?-->", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    code = [line for line in text.splitlines() if not re.match(r"\s*(//.*|#.*)?$", line)]
    assert 5 < len(code) < 40


def test_every_ending_of_the_mock_is_rehearsed() -> None:
    models = {ending.model.partition("/")[2] for ending in ENDINGS}
    assert {re.sub("-[0-9]+$", "", each) for each in MockProvider.models} == {
        re.sub("-[0-9]+$", "", each) for each in models
    }


@pytest.mark.parametrize(
    ("expected", "done", "found"),
    [
        (Answer("Hi ", None), Run(0, "Hi", "Hi\n", ""), ""),
        (Answer("Hi", None), Run(1, "Hi", "Hi", "Oh\n"), "ended with 1, not 0: Oh"),
        (Answer("Hi", None), Run(0, "Ho", "Ho", ""), "printed 'Ho', not 'Hi'"),
        (Answer("Hi", "e"), Run(1, "Hi", "Hi", "e: no"), ""),
        (Answer("Hi", "e"), Run(1, "Hi", "Hi", ""), "did not name e on stderr"),
        (Answer("Hi", "e"), Run(0, "Hi", "Hi", "e"), "ended with 0, as if the answer were whole"),
        (Answer("", "e"), Run(None, "", "", "e"), "did not end within 20 s"),
    ],
)
def test_what_a_client_did_wrong_is_named(expected: Answer, done: Run, found: str) -> None:
    assert "; ".join(faults(expected, done)) == found


def test_a_client_has_to_see_that_an_answer_broke_off() -> None:
    assert broken_off(Run(1, "", "", "")) == []
    assert broken_off(Run(0, "", "", "")) == ["ended with 0, as if the answer were whole"]


async def wrong(*command: str) -> dict[str, list[str]]:
    """The endings with which a client does not deal."""
    return {what: found async for what, found in rehearse(list(command)) if found}


def with_python(folder: Path) -> list[str]:
    return [sys.executable, f"{EXAMPLES}/ask.py"]


def with_curl(folder: Path) -> list[str]:
    for needed in ("curl", "jq"):
        program(needed)
    return [program("sh"), f"{EXAMPLES}/ask.sh"]


def with_node(folder: Path) -> list[str]:
    return [program("node"), f"{EXAMPLES}/ask.mjs"]


def with_go(folder: Path) -> list[str]:
    built = f"{folder}/ask"
    subprocess.run([program("go"), "build", "-o", built, f"{EXAMPLES}/ask.go"], check=True)
    return [built]


@slow
@pytest.mark.parametrize("command", [with_python, with_curl, with_node, with_go])
async def test_an_example_deals_with_every_ending(
    command: Callable[[Path], list[str]], tmp_path: Path
) -> None:
    assert await wrong(*command(tmp_path)) == {}


@slow
@pytest.mark.parametrize("command", [with_python, with_curl, with_node, with_go])
async def test_an_example_says_that_the_service_is_not_there(
    command: Callable[[Path], list[str]], tmp_path: Path
) -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))  # and does not listen: the port refuses
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        done = await run(command(tmp_path), url, "mock/echo")
    assert done.status
    assert re.search("could not be reached: .*refused|curl: .7. Failed to connect", done.told, re.I)
    assert "cut off" not in done.told


# Waits for the end, however long, splits lines as Python's text does and after 64 KiB, takes any
# answer for a whole one, does not let itself be stopped.
CARELESS = """
import json, os, signal, urllib.error, urllib.request
signal.signal(signal.SIGINT, signal.SIG_IGN)
body = json.dumps({"message": os.environ["CHAT_MESSAGE"], "model_id": os.environ["CHAT_MODEL"]})
request = urllib.request.Request(os.environ["CHAT_URL"] + "/api/v1/chat", body.encode())
request.add_header("Content-Type", "application/json")
text = ""
try:
    with urllib.request.urlopen(request) as reply:
        for line in iter(lambda: reply.readline(2**16), b""):
            for part in line.decode().splitlines():
                try:
                    text += json.loads(part.removeprefix("data: ")).get("chunk", "")
                except ValueError:
                    pass
except OSError:
    pass
print(text)
"""


@slow
async def test_a_careless_client_is_found_out() -> None:
    found = await wrong(sys.executable, "-c", CARELESS)
    [unicode] = found.pop("mock/unicode: done")
    assert unicode.startswith("printed 'naïve")
    [large] = found.pop("a chunk of 100 kB: done")
    assert large.startswith("printed 'This is a mock")
    whole = "ended with 0, as if the answer were whole"
    codes = {
        "lorem-0": "invalid_request",
        "error": "upstream_error",
        "rate-limited": "upstream_unavailable",
        "hang": "upstream_timeout",
        "error-midstream": "upstream_error",
        "truncated": "upstream_incomplete",
    }
    assert found == {
        "mock/slow: done": ["showed nothing before the answer was whole"],
        **{
            f"mock/{model}: {code}": [whole, f"did not name {code} on stderr"]
            for model, code in codes.items()
        },
        "stopped by SIGINT": [whole, "did not stop its answer"],
        "the connection is silent": ["did not end within 20 s"],
        "the connection is cut": [whole],
    }
