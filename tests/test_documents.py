"""SECURITY.md and docs/audit.md name what there is: code that keeps a promise, tests that try to
break it, and for each of OWASP's risks a line."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL))
ROWS = re.findall(r"^\| (.+) \|$", SECTIONS["Promises"], re.MULTILINE)
PROMISES = [row.split(" | ") for row in ROWS[1:]]
REFERENCE = re.compile(r"`([\w/]+\.py):([\w.]+)`")


def named(tree: ast.Module | ast.ClassDef, prefix: str = "") -> Iterator[str]:
    """The functions, classes and constants of a module, and the methods as `Class.method`."""
    for node in tree.body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield prefix + name
            case ast.ClassDef(name=name):
                yield name
                yield from named(node, f"{name}.")
            case ast.Assign(targets=[ast.Name(id=name)]):
                yield prefix + name


def missing(text: str) -> list[str]:
    """The references in `text` to what is not there."""
    return [
        f"{file}:{name}"
        for file, name in REFERENCE.findall(text)
        if name not in named(ast.parse(source(file).read_text(encoding="utf-8")))
    ]


def source(file: str) -> Path:
    return ROOT / ("tests" if file.startswith("test_") else "") / file


def test_what_is_not_there_is_missed() -> None:
    assert missing("`telemetry.py:Record` `telemetry.py:Log`") == ["telemetry.py:Log"]
    assert missing("`telemetry.py:Metrics.__init__` `telemetry.py:PROBES`") == []


def test_there_are_promises() -> None:
    assert len(PROMISES) > 20


@pytest.mark.parametrize(("promise", "kept", "tried"), PROMISES)
def test_what_keeps_a_promise_and_what_tries_to_break_it_exist(
    promise: str, kept: str, tried: str
) -> None:
    for cell in (kept, tried):
        assert REFERENCE.sub("", cell).strip() == ""
        assert missing(cell) == [], promise
    assert REFERENCE.search(kept)
    assert {name[:5] for _, name in REFERENCE.findall(tried)} == {"test_"}


def test_the_guide_for_auditors_leads_to_what_there_is() -> None:
    guide = (ROOT / "docs" / "audit.md").read_text(encoding="utf-8")
    questions = re.findall(r"^\| \d+ \| [^|]+\? \| ([^|]+) \| ([^|]+) \|$", guide, re.MULTILINE)
    assert len(questions) == 20
    assert all(REFERENCE.search(lines) or lines.startswith("Nothing") for lines, _ in questions)
    assert all(REFERENCE.fullmatch(tried) for _, tried in questions)
    assert missing(guide) == []
    modules = {path.name for path in ROOT.glob("*.py")}
    assert modules <= set(re.findall(r"\w+\.py", guide))


@pytest.mark.parametrize(
    ("section", "risks"),
    [
        ("OWASP API Security Top 10, 2023", [f"API{number}" for number in range(1, 11)]),
        ("OWASP Top 10 for LLM applications, 2026", [f"LLM{number:02}" for number in range(1, 11)]),
    ],
)
def test_each_risk_has_a_line_that_says_whether_it_is_kept_or_ours(
    section: str, risks: list[str]
) -> None:
    said = re.findall(r"^- (\w+) [^:\n]+: (kept|not applicable|not ours)", SECTIONS[section], re.M)
    assert [risk for risk, _ in said] == risks
