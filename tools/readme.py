"""Writes the parts of the README that are made from the code, each between a comment with its name
and another one, and .env.example.

`python -m tools.readme`, in an environment that has the locked requirements; `make docs` runs it.
"""

from pathlib import Path

from bench import report
from tools import configuration, dependencies, rehearse

README = Path(__file__).parent.parent / "README.md"
PARTS = {
    "comparison": report.summary,
    "dependencies": dependencies.table,
    "endings": rehearse.table,
    "settings": configuration.table,
}


def split(text: str, name: str) -> tuple[str, str, str]:
    """What precedes the part of that name, the part, what follows it."""
    before, begin, rest = text.partition(f"<!-- {name} -->\n")
    part, end, after = rest.partition(f"<!-- /{name} -->")
    return before + begin, part, end + after


def main() -> None:
    configuration.EXAMPLE.write_text(configuration.example(), encoding="utf-8")
    text = README.read_text(encoding="utf-8")
    for name, table in PARTS.items():
        before, _, after = split(text, name)
        text = before + table() + after
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
