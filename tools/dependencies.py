"""Writes the README's table of what the service stands on: every locked package, its version, its
licence, its size as installed here, and why it is there.

`python -m tools.dependencies`, in an environment that has the locked requirements; `make docs` runs
it. Reasons of direct dependencies stand beside them in pyproject.toml.
"""

import re
from importlib.metadata import Distribution, distribution, requires
from pathlib import Path

ROOT = Path(__file__).parent.parent
HEAD = "| package | version | licence | size | why |\n|---|---|---|--:|---|\n"


def locked() -> dict[str, str]:
    """The packages of requirements/run.txt that are for this platform and any newer Python, and their
    versions."""
    lines = (ROOT / "requirements" / "run.txt").read_text(encoding="utf-8")
    found = re.findall(r"^([a-z0-9-]+)==([^ ;]+)( ; [^\\]+)?", lines, re.MULTILINE)
    elsewhere = re.compile("win32|python_full_version <")
    return {name: version for name, version, marker in found if not elsewhere.search(marker)}


def reasons() -> dict[str, str]:
    """Of each direct dependency the comment that ends its line in pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.partition("\ndependencies = [")[2].partition("\n]")[0]
    return dict(re.findall(r'"([a-z0-9-]+)[^"]*", # (.+)', section))


def licence(package: Distribution) -> str:
    """The SPDX expression where a package has one, else what its classifiers or field say."""
    told, text = (
        "".join(package.metadata.get_all(field) or ())
        for field in ("License-Expression", "License")
    )
    classifiers = package.metadata.get_all("Classifier") or ()
    named = [each.rpartition(" :: ")[2] for each in classifiers if each.startswith("License ::")]
    if "Redistribution and use in source and binary forms" in text:
        text = "BSD-3-Clause" if "Neither the name" in text else "BSD-2-Clause"
    return told or ", ".join(named) or text


def size(package: Distribution) -> int:
    """The bytes of a package's installed files, compiled ones left out."""
    files = [Path(str(file.locate())) for file in package.files or () if file.suffix != ".pyc"]
    return sum(file.stat().st_size for file in files if file.is_file())


def needed_by(name: str, packages: dict[str, str]) -> str:
    """Which of the packages ask for this one."""
    users = []
    for other in packages:
        asked = [line for line in requires(other) or () if "extra ==" not in line]
        names = {re.split(r"[^A-Za-z0-9._-]", line)[0].lower().replace("_", "-") for line in asked}
        if name in names:
            users.append(other)
    return "needed by " + ", ".join(users)


def table() -> str:
    packages, why = locked(), reasons()
    rows = []
    for name in sorted(packages, key=lambda name: (name not in why, name)):
        package = distribution(name)
        told = why.get(name) or needed_by(name, packages)
        cells = (name, packages[name], licence(package), f"{size(package) / 1e3:,.0f} kB", told)
        rows.append(f"| {' | '.join(cells)} |\n")
    return HEAD + "".join(rows)
