"""What the project says of the packages it stands on."""

import json

import pytest

from tools.audit import verdict
from tools.dependencies import BEGIN, END, ROOT, table


def rows(text: str) -> list[list[str]]:
    """The cells of a table, without the sizes, which differ from one platform to the next."""
    cells = [line.strip("| ").split(" | ") for line in text.splitlines()]
    return [[*row[:3], row[-1]] for row in cells]


def test_the_readme_lists_every_locked_package_as_it_is() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert rows(readme.partition(BEGIN)[2].partition(END)[0]) == rows(table())


def test_every_package_is_direct_or_needed_and_has_a_licence() -> None:
    for row in rows(table())[2:]:
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
    ],
)
def test_an_audit_says_what_is_known(
    packages: list[dict[str, object]], status: int, told: str
) -> None:
    assert verdict(json.dumps({"dependencies": packages}), "") == (status, told)


def test_an_audit_without_a_database_is_not_a_clean_one() -> None:
    assert verdict("", "Traceback\nConnectionError: no route\n") == (
        2,
        "The database of weaknesses can't be reached: ConnectionError: no route",
    )
