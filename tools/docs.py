"""Write the generated parts of the documentation and .env.example; `make docs` runs it."""

from collections.abc import Callable
from pathlib import Path

from bench import report
from tools import configuration

DOCS = Path(__file__).parent.parent / "docs"
# Each page has one generated part, between `<!-- generated -->` and `<!-- /generated -->`.
PAGES: dict[str, Callable[[], str]] = {
    "benchmarks.md": report.summary,
    "configuration.md": configuration.table,
}


def split(text: str) -> tuple[str, str, str]:
    """Return the text before the generated part, that part, and the text after it."""
    before, begin, rest = text.partition("<!-- generated -->\n")
    part, end, after = rest.partition("<!-- /generated -->")
    return before + begin, part, end + after


def main() -> None:
    configuration.EXAMPLE.write_text(configuration.example(), encoding="utf-8")
    for name, generate in PAGES.items():
        page = DOCS / name
        before, _, after = split(page.read_text(encoding="utf-8"))
        page.write_text(before + generate() + after, encoding="utf-8")


if __name__ == "__main__":
    main()
