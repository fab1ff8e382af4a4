"""The parts of the README that are made from the code, each between a comment and its end."""

from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def _around(name: str) -> tuple[str, str, str]:
    """What precedes the part of that name, the part, what follows it."""
    text = README.read_text(encoding="utf-8")
    before, begin, rest = text.partition(f"<!-- {name} -->\n")
    part, end, after = rest.partition(f"<!-- /{name} -->")
    return before + begin, part, end + after


def part(name: str) -> str:
    return _around(name)[1]


def write_part(name: str, text: str) -> None:
    before, _, after = _around(name)
    README.write_text(before + text + after, encoding="utf-8")
