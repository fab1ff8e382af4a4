"""What there is to read of the settings, .env.example and the README's table, made of settings.py:
its fields, their bounds and defaults, and the comments above them.
"""

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from settings import RATE_UNITS, Rate, Settings

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / ".env.example"
HEAD = "| variable | default | takes | |\n|---|---|---|---|\n"
# In settings.py a heading, or a comment of some lines and the field below it.
ENTRY = re.compile(r"^    # ---- (.+)\n|^((?:    # .+\n)+)    ([a-z_]+): ", re.MULTILINE)

INTRODUCTION = """\
# Settings of the chat sidecar: each variable, why it is there, its default. `make docs` writes this
# file from settings.py.
#
#   cp .env.example .env
#
# As it stands this file changes nothing: without a key a mock answers. What is commented out is
# unset by default; an empty value is an unset one; the environment wins over this file.
# A secret may stand in a mounted file instead: OPENAI_API_KEY_FILE=/run/secrets/openai, and the
# same with API_KEYS_FILE, STATE_URL_FILE and with the key of each of PROVIDERS.
"""
# What a provider of that name adds to the variables.
EXAMPLES = {
    "providers": """\
# GROQ_BASE_URL=https://api.groq.com/openai/v1
# GROQ_API_KEY=
"""
}


class Entry(NamedTuple):
    section: str
    name: str
    why: str
    default: str
    takes: str


def entries() -> Iterator[Entry]:
    """Every setting in the order of settings.py."""
    source = (ROOT / "settings.py").read_text(encoding="utf-8")
    schemas = Settings.model_json_schema()["properties"]
    section = ""
    for heading, comment, name in ENTRY.findall(source.partition("\nclass Settings(")[2]):
        if heading:
            section = heading
            continue
        why = " ".join(line.strip().removeprefix("# ") for line in comment.splitlines())
        default = shown(Settings.model_fields[name].default, why)
        yield Entry(section, name, why, default, takes(schemas[name]))


def shown(default: object, why: str) -> str:
    """A default as it stands in the environment, "" where there is none."""
    match default:
        case None | ():
            return ""
        case Rate(limit, seconds):
            unit = next(unit for unit, size in RATE_UNITS.items() if size == seconds)
            return f"{limit}/{unit}"
        case tuple():
            return ",".join(map(str, default))
        case bool():
            # In a word of the pair from which the reason takes the other.
            words = ("off", "on") if why.startswith("off ") else ("false", "true")
            return words[default]
    return str(default)


def takes(schema: dict[str, Any]) -> str:
    """In a few words, from a field's JSON schema."""
    # What may be null is unset by an empty value.
    schema = schema.get("anyOf", [schema])[0]
    least, most = schema.get("minimum"), schema.get("maximum")
    match schema:
        case {"$ref": _}:
            return "a rate"
        case {"enum": words}:
            return ", ".join(words)
        case {"format": "password"}:
            return "a secret"
        case {"format": "uri"}:
            return "a URL"
        case {"type": "array"}:
            return "a list"
        case {"type": "boolean"}:
            return "on or off, true or false"
        case {"type": "number"}:
            return f"seconds, {'above 0' if least is None else least} up to {most:,.0f}"
        case {"type": "integer"}:
            return f"a number from {least}" + (f" to {most:,}" if most else "")
    return "text"


def example() -> str:
    made, section = INTRODUCTION, ""
    for entry in entries():
        if entry.section != section:
            section = entry.section
            made += f"\n# ---- {section}\n\n"
        made += "".join(f"# {line}\n" for line in textwrap.wrap(entry.why, 98))
        made += f"{'' if entry.default else '# '}{entry.name.upper()}={entry.default}\n"
        made += EXAMPLES.get(entry.name, "")
    return made


def table() -> str:
    rows = []
    for entry in entries():
        default = f"`{entry.default}`" if entry.default else ""
        rows.append(f"| `{entry.name.upper()}` | {default} | {entry.takes} | {entry.why} |\n")
    return HEAD + "".join(rows)
