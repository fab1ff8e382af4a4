"""The example clients handle every outcome, and `make test-client` finds clients that do not."""

import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from providers import MockProvider
from tests.redis_server import find_program
from tools.check_client import (
    MODELS,
    Expected,
    Run,
    check,
    find_faults,
    find_missed_failure,
    find_resume_faults,
    find_retry_faults,
    run,
)

EXAMPLES = Path(__file__).parent.parent / "examples"
CLIENTS = sorted([*EXAMPLES.glob("client.*"), *EXAMPLES.glob("resume.*")])
slow = pytest.mark.slow


@pytest.mark.parametrize("path", CLIENTS, ids=lambda path: path.name)
def test_example_has_fewer_than_60_lines_of_code(path: Path) -> None:
    text = re.sub(r"<!--.*?-->", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    code = [line for line in text.splitlines() if not re.match(r"\s*(//.*|#.*)?$", line)]
    assert 5 < len(code) < 60


def test_every_mock_model_is_tested_and_documented() -> None:
    def kinds(models: Iterable[str]) -> set[str]:
        return {re.sub("-[0-9]+$", "-N", model) for model in models}

    page = (EXAMPLES.parent / "docs/clients.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\| `mock/([a-z0-9-]+)` \|", page, re.MULTILINE)
    assert kinds(MockProvider.models) == kinds(MODELS) == kinds(documented)


@pytest.mark.parametrize(
    ("expected", "done", "faults"),
    [
        (Expected("Hi "), Run(0, "Hi", "Hi\n", ""), ""),
        (Expected("Hi"), Run(1, "Hi", "Hi", "Oh\n"), "exited with 1, not 0: Oh"),
        (Expected("Hi"), Run(0, "Ho", "Ho", ""), "printed 'Ho', not 'Hi'"),
        (Expected("Hi", "e"), Run(1, "Hi", "Hi", "e: no"), ""),
        (Expected("Hi", "e"), Run(1, "Hi", "Hi", ""), "did not name e on stderr"),
        (
            Expected("Hi", "e"),
            Run(0, "Hi", "Hi", "e"),
            "exited with 0, although the response is incomplete",
        ),
        (Expected("", "e"), Run(None, "", "", "e"), "did not exit within 15 s"),
    ],
)
def test_faults_of_a_client_are_found(expected: Expected, done: Run, faults: str) -> None:
    assert "; ".join(find_faults(expected, done)) == faults


def test_client_has_to_notice_an_incomplete_response() -> None:
    assert find_missed_failure(Run(1, "", "", "")) == []
    assert find_missed_failure(Run(0, "", "", "")) == [
        "exited with 0, although the response is incomplete"
    ]


def request(seconds: int) -> dict[str, Any]:
    """Return the log line of a request of half a second that ended at this time."""
    return {"time": f"2026-01-01T00:00:0{seconds}.500+00:00", "duration_ms": 500}


@pytest.mark.parametrize(
    ("expected", "requests", "faults"),
    [
        (Expected("", "e"), [request(0)], ""),
        (
            Expected("", "e"),
            [request(0), request(1)],
            "retried, although the error is not retryable",
        ),
        (Expected("", "e", retryable=True), [request(0), request(1)], ""),
        (Expected("", "e", True, 2), [request(0), request(3)], ""),
        (
            Expected("", "e", True, 2),
            [request(0), request(3), request(5)],
            "retried after 1.5 s, not after 2 s",
        ),
        (
            Expected("Hi", "e", retryable=True),
            [request(0), request(1)],
            "retried after text: the session has a second turn",
        ),
    ],
)
def test_faulty_retries_are_found(
    expected: Expected, requests: list[dict[str, Any]], faults: str
) -> None:
    assert "; ".join(find_retry_faults(expected, requests)) == faults


@pytest.mark.parametrize(
    ("keyed", "done", "requests", "faults"),
    [
        (True, Run(0, "Hi", "Hi", ""), [{}, {"original_request_id": "a"}], ""),
        (False, Run(1, "H", "H", "lost"), [{}], ""),
        (False, Run(0, "H", "H", ""), [{}], "printed 'H', not 'Hi'"),
        (
            True,
            Run(0, "Hi", "Hi", ""),
            [{}, {}],
            "did not repeat its request with the same key",
        ),
        (
            True,
            Run(1, "H", "H", "lost"),
            [{}],
            "exited with 1, not 0: lost; printed 'H', not 'Hi'",
        ),
    ],
)
def test_lost_responses_are_found(
    keyed: bool, done: Run, requests: list[dict[str, Any]], faults: str
) -> None:
    assert "; ".join(find_resume_faults(keyed, Expected("Hi"), done, requests)) == faults


async def failed_tests(*command: str) -> dict[str, list[str]]:
    """Test a client. Return the failed tests and their faults."""
    return {name: faults async for name, faults in check(list(command)) if faults}


def python_client(folder: Path) -> list[str]:
    return [sys.executable, f"{EXAMPLES}/client.py"]


def curl_client(folder: Path) -> list[str]:
    for needed in ("curl", "jq"):
        find_program(needed)
    return [find_program("sh"), f"{EXAMPLES}/client.sh"]


def node_client(folder: Path) -> list[str]:
    return [find_program("node"), f"{EXAMPLES}/client.mjs"]


def resuming_python_client(folder: Path) -> list[str]:
    return [sys.executable, f"{EXAMPLES}/resume.py"]


def resuming_node_client(folder: Path) -> list[str]:
    return [find_program("node"), f"{EXAMPLES}/resume.mjs"]


def go_client(folder: Path) -> list[str]:
    client = f"{folder}/client"
    source = f"{EXAMPLES}/client.go"
    subprocess.run([find_program("go"), "build", "-o", client, source], check=True)
    return [client]


@slow
@pytest.mark.parametrize(
    "command",
    [
        *(python_client, curl_client, node_client, go_client),
        *(resuming_python_client, resuming_node_client),
    ],
)
async def test_example_handles_every_outcome(
    command: Callable[[Path], list[str]], tmp_path: Path
) -> None:
    assert await failed_tests(*command(tmp_path)) == {}


@slow
@pytest.mark.parametrize("command", [python_client, curl_client, node_client, go_client])
async def test_example_reports_that_it_cannot_connect(
    command: Callable[[Path], list[str]], tmp_path: Path
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # does not listen: connections are refused
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        done = await run(command(tmp_path), url, "mock/echo")
    assert done.status
    message = "Cannot connect to the service: .*refused|curl: .7. Failed to connect"
    assert re.search(message, done.stderr, re.I)
    assert "connection was lost" not in done.stderr


# Waits for the end of the response, decodes it wrongly, splits lines after 64 KiB, ignores errors
# and SIGINT, and retries at once without discarding text.
CARELESS_CLIENT = """
import json, os, signal, urllib.error, urllib.request
signal.signal(signal.SIGINT, signal.SIG_IGN)
body = json.dumps({"message": os.environ["CHAT_MESSAGE"], "model_id": os.environ["CHAT_MODEL"]})
request = urllib.request.Request(os.environ["CHAT_URL"] + "/api/v1/chat", body.encode())
request.add_header("Content-Type", "application/json")
text = ""
for attempt in (1, 2):
    try:
        with urllib.request.urlopen(request) as response:
            for line in iter(lambda: response.readline(2**16), b""):
                try:
                    text += json.loads(line.decode("latin-1")[6:]).get("chunk", "")
                except ValueError:
                    pass
        break
    except Exception:
        pass
print(text)
"""


@slow
async def test_careless_client_fails() -> None:
    failed = await failed_tests(sys.executable, "-c", CARELESS_CLIENT)
    [unicode] = failed.pop("mock/unicode: done")
    assert unicode.startswith("printed 'naÃ¯ve")
    [large] = failed.pop("a chunk of 100 kB: done")
    assert large.startswith("printed 'This is the mock")
    for where in ("in the middle", "before the last event"):
        [twice] = failed.pop(f"the connection is lost {where}")
        assert twice.startswith("printed 'lorem ipsum ")
    early = failed["mock/rate-limited: upstream_unavailable"].pop()
    assert re.fullmatch(r"retried after -?0\.\d s, not after 2 s", early)
    missed = "exited with 0, although the response is incomplete"
    codes = {
        "lorem-0": "invalid_request",
        "error": "upstream_error",
        "rate-limited": "upstream_unavailable",
        "hang": "upstream_timeout",
        "error-midstream": "upstream_error",
        "truncated": "upstream_incomplete",
    }
    expected = {
        f"mock/{model}: {code}": [missed, f"did not name {code} on stderr"]
        for model, code in codes.items()
    }
    expected["mock/lorem-0: invalid_request"].append("retried, although the error is not retryable")
    assert failed == expected | {
        "mock/slow: done": ["printed nothing before the response was complete"],
        "stopped by SIGINT": [missed, "did not close the connection"],
        "the connection is silent": ["did not exit within 15 s"],
        "the connection is reset": [missed],
    }
