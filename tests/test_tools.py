"""The tools: generated documentation, the locked packages, the changelog and make's targets."""

import re
import subprocess
import tomllib
from datetime import date
from pathlib import Path

import pytest

import service
from tools import configuration
from tools.docs import DOCS, PAGES, split

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]

# ---- generated files


@pytest.mark.parametrize("name", PAGES)
def test_generated_part_of_page_is_up_to_date(name: str) -> None:
    text = (DOCS / name).read_text(encoding="utf-8")
    assert split(text)[1] == PAGES[name](), "run `make docs`"


def test_env_example_is_up_to_date() -> None:
    text = configuration.EXAMPLE.read_text(encoding="utf-8")
    assert text == configuration.example(), "run `make docs`"


# ---- the package and its dependencies


def test_every_module_is_packaged_and_measured_for_coverage() -> None:
    modules = sorted(path.stem for path in ROOT.glob("*.py"))
    assert PYPROJECT["tool"]["setuptools"]["py-modules"] == modules
    # redis_state is measured by `make test-all`, because it needs Redis.
    measured = PYPROJECT["tool"]["coverage"]["run"]["source_pkgs"]
    assert measured == [name for name in modules if name != "redis_state"]


def test_every_dependency_has_a_reason_and_is_in_the_audit_guide() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.partition("\ndependencies = [\n")[2].partition("\n]")[0]
    reasons = dict(re.findall(r'^    "([a-z-]+)[^"]*", # (.+)$', section, re.MULTILINE))
    names = {re.split("[<>=]", each)[0] for each in PROJECT["dependencies"]}
    assert reasons.keys() == names
    guide = (DOCS / "audit.md").read_text(encoding="utf-8")
    assert names == set(re.findall(r"^\| `([a-z-]+)` \|", guide, re.MULTILINE))


def test_every_locked_package_has_a_version_and_hashes() -> None:
    files = sorted((ROOT / "requirements").glob("*.txt"))
    assert len(files) > 3
    for file in files:
        text = file.read_text(encoding="utf-8")
        entries = re.split(r"\n(?=\S)", text.strip())
        for entry in entries:
            assert re.match(r"[a-z0-9-]+(\[[a-z0-9,-]+\])?==\S+", entry), entry
            assert "--hash=sha256:" in entry, entry
        assert "://" not in text, "an index address or a URL"


# ---- releases and commands


def releases(changelog: str) -> list[str]:
    """Return the released versions, newest first. Check that headings follow Keep a Changelog."""
    unreleased, *rest = re.findall(r"^## (.*)$", changelog, re.MULTILINE)
    assert unreleased == "[Unreleased]"
    matches = [re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)", each) for each in rest]
    dated = [(date.fromisoformat(match[2]), match[1]) for match in matches if match]
    assert len(dated) == len(rest)
    assert dated == sorted(dated, reverse=True)
    return [version for _, version in dated]


def test_invalid_changelog_heading_is_found() -> None:
    text = "# Changelog\n## [Unreleased]\n### Added\n## [0.2.0] - 2027-02-01\n"
    text += "## [0.1.0] - 2027-01-31\n"
    assert releases(text) == ["0.2.0", "0.1.0"]
    for broken in ("2027-01-01", "2027-02-30", "soon"):
        with pytest.raises((AssertionError, ValueError)):
            releases(text.replace("2027-02-01", broken))


def test_version_is_the_newest_release_in_the_changelog() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert PROJECT["version"] == releases(changelog)[0]
    assert PROJECT["version"] == service.VERSION


def test_make_help_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z-]+):", makefile, re.MULTILINE)
    command = ["make", "--no-print-directory", "help"]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    assert [line.split()[1] for line in output.splitlines()] == targets
    assert f".PHONY: {' '.join(targets)}\n" in makefile
