"""Asks whether weaknesses are known in the locked packages, and lists what they are.

`make audit` runs it. Writes `sbom.cdx.json` (CycloneDX) from an environment that holds the locked
requirements and nothing else. Ends with 1 if a weakness is known, with 2 if the database could not
be asked about every package: then nothing is known of those, which is not the same as no weakness.
"""

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
SBOM = "sbom.cdx.json"


def write_sbom() -> None:
    with TemporaryDirectory() as directory:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", directory], check=True)
        pip = [sys.executable, "-m", "pip", "--python", directory, "install", "--quiet"]
        subprocess.run(
            [*pip, "--require-hashes", "-r", "requirements/run.txt"], cwd=ROOT, check=True
        )
        made = [f"{BIN}/cyclonedx-py", "environment", "--pyproject", "pyproject.toml"]
        made += ["--output-reproducible", "-o", SBOM, directory]
        subprocess.run(made, cwd=ROOT, check=True)


def decision(report: str, stderr: str) -> tuple[int, str]:
    """The exit status and what to tell, from what pip-audit printed."""
    try:
        packages = json.loads(report)["dependencies"]
    except ValueError:
        reason = (stderr.strip().splitlines() or ["pip-audit said nothing"])[-1]
        return 2, f"The database of weaknesses can't be reached: {reason}"
    weak = [
        f"{package['name']} {package['version']}: {weakness['id']}"
        for package in packages
        for weakness in package.get("vulns", ())
    ]
    unknown = [package["name"] for package in packages if "skip_reason" in package]
    if weak:
        return 1, "\n".join(["Known weaknesses:", *weak])
    if unknown and len(unknown) == len(packages):
        reason = f"it knows none of {len(packages)} packages"
        return 2, f"The database of weaknesses can't be reached: {reason}"
    if unknown:
        told = f"The database of weaknesses said nothing of {len(unknown)} of {len(packages)}"
        return 2, f"{told} packages: {', '.join(unknown)}"
    return 0, f"No weakness is known in {len(packages)} packages"


def main() -> None:
    write_sbom()
    sys.stdout.write(f"{SBOM} lists the packages\n")
    asked = [f"{BIN}/pip-audit", "-r", "requirements/run.txt", "--require-hashes", "--disable-pip"]
    asked += ["--format", "json", "--progress-spinner", "off"]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=False)
    status, told = decision(done.stdout, done.stderr)
    sys.stdout.write(f"{told}\n")
    sys.exit(status)


if __name__ == "__main__":
    main()
