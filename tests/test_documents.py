"""The documentation refers to existing code and tests, and covers every error, module and risk."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from errors import KINDS, Code

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md"), ROOT / "examples" / "README.md"])
README = (ROOT / "README.md").read_text(encoding="utf-8")
SECURITY = (ROOT / "docs" / "SECURITY.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", SECURITY, re.MULTILINE | re.DOTALL))
ROWS = re.findall(r"^\| (.+) \|$", SECTIONS["Promises"], re.MULTILINE)
PROMISES = [row.split(" | ") for row in ROWS[1:]]
REFERENCE = re.compile(r"`([\w/]+\.py):([\w.]+)`")
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)")


def defined(tree: ast.Module | ast.ClassDef, prefix: str = "") -> Iterator[str]:
    """Return functions, classes and constants of a module, and methods as `Class.method`."""
    for node in tree.body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield prefix + name
            case ast.ClassDef(name=name):
                yield name
                yield from defined(node, f"{name}.")
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                yield prefix + name


def missing(text: str) -> list[str]:
    """Return the references in `text` to code that does not exist."""
    return [
        f"{file}:{name}"
        for file, name in REFERENCE.findall(text)
        if name not in defined(ast.parse(source(file).read_text(encoding="utf-8")))
    ]


def source(file: str) -> Path:
    return ROOT / ("tests" if file.startswith("test_") else "") / file


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_reference_to_missing_code_is_found() -> None:
    assert missing("`errors.py:KINDS` `telemetry.py:Log`") == ["telemetry.py:Log"]
    assert missing("`telemetry.py:Metrics.__init__` `errors.py:KINDS`") == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target, anchor in LINK.findall(text):
        if not re.match("[a-z]+:", target):
            path = (page.parent / target) if target else page
            assert path.exists(), target
            if anchor:
                assert anchor in anchors(path.read_text(encoding="utf-8")), anchor


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_every_page_is_linked_from_the_readme(page: Path) -> None:
    assert f"(docs/{page.name})" in README


@pytest.mark.parametrize("code", KINDS)
def test_every_error_is_in_the_api_page_with_its_status(code: Code) -> None:
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    row = re.search(rf"^\| (\d+) \| `{code}` \| (yes|no|5xx)", text, re.MULTILINE)
    assert row is not None
    assert int(row[1]) == KINDS[code].status
    assert row[2] == "5xx" or (row[2] == "yes") == KINDS[code].retryable


def test_errors_in_the_readme_have_their_status() -> None:
    rows = re.findall(r"^\| (\d{3}) \| `(\w+)` \|", README, re.MULTILINE)
    assert len(rows) == 6
    assert {code: int(status) for status, code in rows}.items() <= {
        code: kind.status for code, kind in KINDS.items()
    }.items()


def test_every_module_is_in_architecture_and_audit_guide() -> None:
    modules = {path.name for path in ROOT.glob("*.py")}
    layout = (DOCS / "architecture.md").read_text(encoding="utf-8")
    assert modules == set(re.findall(r"^\| `(\w+\.py)` \|", layout, re.MULTILINE))
    assert modules <= set(re.findall(r"\w+\.py", (DOCS / "audit.md").read_text(encoding="utf-8")))


def test_audit_guide_answers_twenty_questions_with_code_and_tests() -> None:
    guide = (DOCS / "audit.md").read_text(encoding="utf-8")
    questions = re.findall(r"^\| \d+ \| [^|]+\? \| ([^|]+) \| ([^|]+) \|$", guide, re.MULTILINE)
    assert len(questions) == 20
    assert all(REFERENCE.search(code) or code.startswith("Nothing") for code, _ in questions)
    assert all(REFERENCE.fullmatch(test) for _, test in questions)
    assert missing(guide) == []


def test_there_are_promises() -> None:
    assert len(PROMISES) > 20


@pytest.mark.parametrize(("promise", "code", "tests"), PROMISES)
def test_code_and_tests_of_promise_exist(promise: str, code: str, tests: str) -> None:
    for cell in (code, tests):
        assert REFERENCE.sub("", cell).strip() == ""
        assert missing(cell) == [], promise
    assert REFERENCE.search(code)
    assert {name[:5] for _, name in REFERENCE.findall(tests)} == {"test_"}


@pytest.mark.parametrize(
    ("section", "risks"),
    [
        ("OWASP API Security Top 10, 2023", [f"API{number}" for number in range(1, 11)]),
        ("OWASP Top 10 for LLM applications, 2026", [f"LLM{number:02}" for number in range(1, 11)]),
    ],
)
def test_every_owasp_risk_is_covered_or_assigned(section: str, risks: list[str]) -> None:
    lines = re.findall(
        r"^- (\w+) [^:\n]+: (?:covered|operator|not applicable)", SECTIONS[section], re.MULTILINE
    )
    assert lines == risks
