"""Generates .env.example and the table of settings from settings.py.

Both contain each variable, its default and the comment above its field.
"""

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from check import format_value
from settings import ProviderSettings, Settings, requirement

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / ".env.example"
HEAD = "| variable | default | value | |\n|---|---|---|---|\n"
# In a class of settings.py: a section heading, or a comment and the field below it.
ENTRY = re.compile(r"^    # ---- (.+)\n|^((?:    # .+\n)+)    ([a-z_]+): ", re.MULTILINE)

INTRODUCTION = """\
# Settings of the chat sidecar. `make docs` generates this file from settings.py.
#
#   cp .env.example .env
#
# As it is, this file changes no default. Without an API key, the mock provider responds. Variables
# that are commented out have no default. An empty value counts as unset. Environment variables
# override this file. A $ in a value is an ordinary character.
#
# A secret can come from a file instead: OPENAI_API_KEY_FILE=/run/secrets/openai, and likewise
# API_KEYS_FILE, STATE_URL_FILE, and the API key and the extra headers of each provider.
"""
# Variables of an example provider, shown below PROVIDERS.
EXAMPLES = {
    "PROVIDERS": """\
# GROQ_BASE_URL=https://api.groq.com/openai/v1
# GROQ_API_KEY=
"""
}


class Entry(NamedTuple):
    """A variable. `default` is empty if it has none, `requirement` is what its value must be."""

    section: str
    name: str
    comment: str
    default: str
    requirement: str


def entries() -> Iterator[Entry]:
    """Yield every setting in the order of settings.py."""
    source = (ROOT / "settings.py").read_text(encoding="utf-8")
    section = ""
    for prefix, model in (("OPENAI_", ProviderSettings), ("", Settings)):
        body = source.partition(f"\nclass {model.__name__}(")[2].partition("\n\n\n")[0]
        for heading, lines, field in ENTRY.findall(body):
            if heading:
                section = heading
                continue
            comment = " ".join(line.strip().removeprefix("# ") for line in lines.splitlines())
            default = format_value(model.model_fields[field].default)
            must_be = requirement(model, field)
            yield Entry(section, prefix + field.upper(), comment, default, must_be)


def example() -> str:
    """Return the text of .env.example."""
    text, section = INTRODUCTION, ""
    for entry in entries():
        if entry.section != section:
            section = entry.section
            text += f"\n# ---- {section}\n\n"
        text += "".join(f"# {line}\n" for line in textwrap.wrap(entry.comment, 98))
        text += f"{'' if entry.default else '# '}{entry.name}={entry.default}\n"
        text += EXAMPLES.get(entry.name, "")
    return text


def table() -> str:
    """Return the settings as a Markdown table."""
    rows = []
    for entry in entries():
        default = f"`{entry.default}`" if entry.default else ""
        rows.append(f"| `{entry.name}` | {default} | {entry.requirement} | {entry.comment} |\n")
    return HEAD + "".join(rows)
