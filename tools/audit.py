"""Check the locked packages for known vulnerabilities and write sbom.cdx.json (CycloneDX).

`make audit` runs it. Exit status 1: a vulnerability is known. Exit status 2: the database could not
be queried for every package, so the result is unknown.
"""

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
LOCK = "requirements/run.txt"
SBOM = "sbom.cdx.json"
UNAVAILABLE = "The vulnerability database is unavailable"


def write_sbom() -> None:
    """Install the locked packages alone in a temporary environment and list them."""
    with TemporaryDirectory() as directory:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", directory], check=True)
        pip = [sys.executable, "-m", "pip", "--python", directory, "install", "--quiet"]
        subprocess.run([*pip, "--require-hashes", "-r", LOCK], cwd=ROOT, check=True)
        command = [f"{BIN}/cyclonedx-py", "environment", "--pyproject", "pyproject.toml"]
        command += ["--output-reproducible", "-o", SBOM, directory]
        subprocess.run(command, cwd=ROOT, check=True)


def evaluate(report: str, stderr: str) -> tuple[int, str]:
    """Return the exit status and a summary of pip-audit's output."""
    try:
        packages = json.loads(report)["dependencies"]
    except ValueError:
        reason = (stderr.strip().splitlines() or ["pip-audit printed nothing"])[-1]
        return 2, f"{UNAVAILABLE}: {reason}"
    vulnerable = [
        f"{package['name']} {package['version']}: {vulnerability['id']}"
        for package in packages
        for vulnerability in package.get("vulns", ())
    ]
    unknown = [package["name"] for package in packages if "skip_reason" in package]
    if vulnerable:
        return 1, "\n".join(["Known vulnerabilities:", *vulnerable])
    if unknown and len(unknown) == len(packages):
        return 2, f"{UNAVAILABLE}: it knows none of the {len(packages)} packages"
    if unknown:
        return 2, f"The vulnerability database does not know these packages: {', '.join(unknown)}"
    return 0, f"No known vulnerabilities in {len(packages)} packages"


def main() -> None:
    write_sbom()
    sys.stdout.write(f"Wrote {SBOM}\n")
    command = [f"{BIN}/pip-audit", "-r", LOCK, "--require-hashes", "--disable-pip"]
    command += ["--format", "json", "--progress-spinner", "off"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    status, summary = evaluate(done.stdout, done.stderr)
    sys.stdout.write(f"{summary}\n")
    sys.exit(status)


if __name__ == "__main__":
    main()
