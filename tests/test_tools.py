"""What the project says of itself: the packages it stands on, its settings, its releases."""

import json
import re
import subprocess
import tomllib
from datetime import date

import pytest

from tools import configuration, dependencies
from tools.audit import ROOT, decision
from tools.readme import PARTS, README, split


def part(name: str) -> str:
    """A part of the README that is made from the code."""
    return split(README.read_text(encoding="utf-8"), name)[1]


def rows(text: str) -> list[list[str]]:
    """The cells of a table, without the sizes, which differ from one platform to the next."""
    cells = [line.strip("| ").split(" | ") for line in text.splitlines()]
    return [[*row[:3], row[-1]] for row in cells]


def test_the_readme_lists_every_locked_package_as_it_is() -> None:
    assert rows(part("dependencies")) == rows(dependencies.table())


@pytest.mark.parametrize("name", ["endings", "settings"])
def test_the_readme_says_what_the_code_says(name: str) -> None:
    assert part(name) == PARTS[name](), "run `make docs`"


def test_the_example_of_an_env_says_what_the_code_says() -> None:
    assert configuration.EXAMPLE.read_text(encoding="utf-8") == configuration.example()


def test_every_package_is_direct_or_needed_and_has_a_licence() -> None:
    for row in rows(dependencies.table())[2:]:
        assert row[2] not in ("", "UNKNOWN")
        assert row[3] != "needed by "


@pytest.mark.parametrize(
    ("packages", "status", "told"),
    [
        ([{"name": "a", "version": "1", "vulns": []}], 0, "No weakness is known in 1 packages"),
        (
            [
                {"name": "a", "version": "1", "vulns": [{"id": "X-1"}]},
                {"name": "b", "skip_reason": ""},
            ],
            1,
            "Known weaknesses:\na 1: X-1",
        ),
        (
            [{"name": "a", "version": "1", "vulns": []}, {"name": "b", "skip_reason": "not found"}],
            2,
            "The database of weaknesses said nothing of 1 of 2 packages: b",
        ),
        (
            [{"name": "a", "skip_reason": "not found"}, {"name": "b", "skip_reason": "not found"}],
            2,
            "The database of weaknesses can't be reached: it knows none of 2 packages",
        ),
    ],
)
def test_an_audit_says_what_is_known(
    packages: list[dict[str, object]], status: int, told: str
) -> None:
    assert decision(json.dumps({"dependencies": packages}), "") == (status, told)


def test_an_audit_without_a_database_is_not_a_clean_one() -> None:
    assert decision("", "Traceback\nConnectionError: no route\n") == (
        2,
        "The database of weaknesses can't be reached: ConnectionError: no route",
    )


# ---- releases and commands


def releases(changelog: str) -> list[str]:
    """The released versions, newest first; every heading has the form of Keep a Changelog."""
    unreleased, *rest = re.findall(r"^## (.*)$", changelog, re.MULTILINE)
    assert unreleased == "[Unreleased]"
    matches = [re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)", each) for each in rest]
    dated = [(date.fromisoformat(match[2]), match[1]) for match in matches if match]
    assert len(dated) == len(rest)
    assert dated == sorted(dated, reverse=True)
    return [version for _, version in dated]


def test_a_changelog_is_read_as_it_is_meant() -> None:
    text = "# Changelog\n## [Unreleased]\n### Added\n## [0.2.0] - 2027-02-01\n"
    text += "## [0.1.0] - 2027-01-31\n"
    assert releases(text) == ["0.2.0", "0.1.0"]
    for broken in ("2027-01-01", "2027-02-30", "soon"):
        with pytest.raises((AssertionError, ValueError)):
            releases(text.replace("2027-02-01", broken))


def test_the_version_is_the_newest_release_of_the_changelog() -> None:
    released = releases((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    # Before the first release there is none to compare with.
    assert project["version"] == (released or ["0.1.0"])[0]


def test_make_help_lists_every_command() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z-]+):", makefile, re.MULTILINE)
    asked = ["make", "--no-print-directory", "help"]
    printed = subprocess.run(asked, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    assert [line.split()[1] for line in printed.splitlines()] == targets
    assert f".PHONY: {' '.join(targets)}\n" in makefile
