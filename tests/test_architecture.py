"""What design.md promises of the code itself: who imports whom, how large it may be, what is
explained, and by which means it is tested."""

import ast
import io
import json
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("*.py"))}
TREES = {name: ast.parse(source) for name, source in MODULES.items()}
TESTS = {path.name: ast.parse(path.read_text("utf-8")) for path in sorted(ROOT.glob("tests/*.py"))}

# What each module may import of the project, the hall aside: it joins all of them.
BASE = {"errors": set[str](), "settings": set[str]()}
OTHERS = {"errors", "settings"}
# What crosses: the values from the wire to the provider to the stream, and the name of the server's
# extension.
VALUES = {
    "check": {"providers": {"create_transport"}},
    "providers": {"wire": {"Chunks", "CompletionParser", "classify_error"}},
    "chat": {"providers": {"Completion", "ChunkStream"}, "server": {"ABORT"}},
    # The interfaces that it fills, and what else fills them does alike.
    "redis_state": {
        "ratelimit": {"MICROSECONDS", "Caller", "RateLimiter", "Decision", "told"},
        "sessions": {
            "BUSY",
            "ISSUED_ID",
            "LOST",
            "UNAVAILABLE",
            "Session",
            "SessionStore",
            "Turn",
            "issue",
            "kept",
        },
    },
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Each module that is imported and each name taken from it, "" where it is the module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module or ".", alias.name) for alias in node.names)


@pytest.mark.parametrize("name", [name for name in TREES if name != "service"])
def test_imports_are_one_way(name: str) -> None:
    allowed = BASE.get(name, OTHERS)
    values = VALUES.get(name, {})
    strangers = [
        (module, taken)
        for module, taken in imports(TREES[name])
        if module in MODULES and module not in allowed and taken not in values.get(module, ())
    ]
    assert strangers == []


@pytest.mark.parametrize("name", TREES)
def test_no_import_hides_in_a_function_unless_it_is_an_optional_extras(name: str) -> None:
    hidden = {
        (function.name, module)
        for function in functions(TREES[name])
        for module, _ in imports(function)
    }
    # Redis' client is loaded where STATE_URL names one.
    assert hidden == ({("create_state", "redis_state")} if name == "service" else set())
    assert name == "redis_state" or "redis" not in {module for module, _ in imports(TREES[name])}


def environment(tree: ast.AST) -> list[int]:
    """The lines that read this process's environment, or a file that stands for it."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute | ast.Name)
        if getattr(node, "attr", getattr(node, "id", "")) in ("environ", "getenv", "read_env_file")
    ]


def test_only_main_reads_the_environment() -> None:
    main = next(function for function in functions(TREES["service"]) if function.name == "main")
    assert len(environment(main)) >= 2
    assert {name: environment(tree) for name, tree in TREES.items() if environment(tree)} == {
        "service": environment(main)
    }


WATCH = """
import json, logging, sys
seen = []
def watch(event, args):
    if event.startswith(("socket.", "subprocess.", "os.system", "_thread.start")):
        seen.append(event)
    elif event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        seen.append(f"open {args[0]}")
sys.addaudithook(watch)
for name in sys.argv[1:]:
    __import__(name)
handlers = [str(h) for l in (logging.root, logging.getLogger("chat_sidecar")) for h in l.handlers]
print(json.dumps([seen, handlers, logging.root.level]))
"""


def test_importing_the_modules_opens_nothing_and_configures_no_logging(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-B", "-c", WATCH, *MODULES],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=True,
        text=True,
    )
    assert done.stderr == ""
    assert json.loads(done.stdout) == [[], [], 30]
    assert list(tmp_path.iterdir()) == []


# ---- size


def documentation(tree: ast.AST) -> Iterator[int]:
    """The lines of all docstrings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | Function) and node.body:
            match node.body[0]:
                case ast.Expr(value=ast.Constant(value=str()), lineno=first, end_lineno=int(last)):
                    yield from range(first, last + 1)


def code_lines(source: str) -> int:
    """Lines with code on them: no blanks, comments, docstrings."""
    empty = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in empty:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - set(documentation(ast.parse(source))))


def test_the_lines_of_code_are_counted_as_by_hand() -> None:
    source = '''"""Two lines
of text."""

# A comment.
TEXT = """three
lines
of code"""


def twice(number: int) -> int:  # one
    """None."""
    return (
        number
        * 2
    )
'''
    assert code_lines(source) == 3 + 1 + 4


def test_all_of_it_can_be_read_in_one_sitting() -> None:
    sizes = {name: code_lines(source) for name, source in MODULES.items()}
    # Who keeps sessions in SQLite need not read it.
    assert sizes.pop("redis_state") <= 246
    assert sizes.pop("check") <= 120
    # The limit was 1,800, Redis included. README names what is over it; this may only go down.
    assert sum(sizes.values()) <= 2014, sizes
    assert {name: size for name, size in sizes.items() if size > 400} == {}


def test_no_function_is_longer_than_60_lines() -> None:
    lengths = {
        f"{name}.{function.name}": (function.end_lineno or 0) - function.lineno + 1
        for name, tree in TREES.items()
        for function in functions(tree)
    }
    assert {name: length for name, length in lengths.items() if length > 60} == {}


# ---- explanations


@pytest.mark.parametrize("name", [*TREES, *(name for name, tree in TESTS.items() if tree.body)])
def test_every_module_says_what_it_is(name: str) -> None:
    assert ast.get_docstring((TREES | TESTS)[name])


def is_number(node: ast.expr | None) -> bool:
    """A number, arithmetic with numbers, or a row of them."""
    match node:
        case ast.Constant(value=int() | float()):
            return True
        case ast.BinOp(left=left, right=right):
            return is_number(left) and is_number(right)
        case ast.UnaryOp(operand=operand):
            return is_number(operand)
        case ast.Tuple(elts=elements):
            return all(is_number(element) for element in elements)
    return False


def unexplained(source: str) -> list[str]:
    """Numeric constants with no comment above them, nor above the group in which they stand."""
    lines = ["", *source.splitlines()]
    found = []
    explained: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                pass
            case ast.AnnAssign(target=ast.Name(id=name), value=value):
                pass
            case _:
                continue
        if not (name.isupper() and is_number(value)):
            continue
        above = node.lineno - 1
        if lines[above].lstrip().startswith("#") or above in explained:
            explained.add(node.end_lineno or node.lineno)
        else:
            found.append(name)
    return found


def test_a_comment_explains_the_constants_right_below_it() -> None:
    source = "# Why.\nA = 1\nB = (2, 3)\nTEXT = 'x'\nC = 2**20\n\nD = -1.5\n# Why.\nE: int = 5\n"
    assert unexplained(source) == ["C", "D"]


@pytest.mark.parametrize("name", MODULES)
def test_every_numeric_constant_has_its_reason_above_it(name: str) -> None:
    assert unexplained(MODULES[name]) == []


# ---- the tests


def forbidden(tree: ast.AST) -> list[str]:
    """What a test would replace, or wait for blindly."""
    names = [
        f"{module}.{taken}"
        for module, taken in imports(tree)
        if {"mock", "pytest_mock"} & {*module.split("."), taken}
    ]
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="monkeypatch"), attr="setattr"):
                names.append("monkeypatch.setattr")
            case ast.Attribute(value=ast.Name(id="time"), attr="sleep"):
                names.append("time.sleep")
            case ast.arg(arg="mocker"):
                names.append("mocker")
    if ("time", "sleep") in imports(tree):
        names.append("time.sleep")
    return names


def test_what_tests_must_not_use_is_found() -> None:
    source = (
        "from unittest import mock\nimport unittest.mock\nfrom unittest.mock import patch\n"
        "from time import sleep\n"
        "def test(monkeypatch, mocker):\n    monkeypatch.setattr(a, 'b', 1)\n    time.sleep(1)\n"
    )
    assert len(forbidden(ast.parse(source))) == 7


@pytest.mark.parametrize("name", TESTS)
def test_no_test_replaces_what_it_tests_or_sleeps(name: str) -> None:
    assert forbidden(TESTS[name]) == []
