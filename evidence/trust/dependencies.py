"""Check that the installed packages are pinned and listed, and look for known vulnerabilities if data is available.

Run: python -m evidence.trust.dependencies --out runs/trust/dependencies.json
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from evidence import command_line
from evidence.trust.record import Record

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
OURS = {"clipweld", "clipweld-client", "clipweld-trainer", "clipweld-exporter"}
NOT_PINNED = OURS | {"pip", "setuptools", "wheel"}  # the last three come with a new environment


def main(
    *,
    sbom: Annotated[Path, Parameter(help="File for the list, in CycloneDX JSON.")] = Path("runs/trust/sbom.json"),
    out: Annotated[Path, Parameter(help="JSON file for the figures.")] = Path("runs/trust/dependencies.json"),
) -> None:
    """Check every package in this environment."""
    with Record(out) as record:
        pins = pinned(CONSTRAINTS.read_text(encoding="utf-8"))
        there = {_normal(found.name): found.version for found in distributions()}
        for name, version in sorted(there.items()):
            if name not in NOT_PINNED and pins.get(name) != version:
                record.broken.append(f"{name} {version} is installed, constraints.txt has {pins.get(name)}")
        sbom.parent.mkdir(parents=True, exist_ok=True)
        listing = ["cyclonedx_py", "environment", "--output-reproducible", "--output-file", str(sbom)]
        subprocess.run([sys.executable, "-m", *listing], check=True, capture_output=True)
        listed = {_normal(part["name"]) for part in json.loads(sbom.read_text(encoding="utf-8"))["components"]}
        if missing := sorted(set(there) - listed):
            record.broken.append(f"{sbom} lacks {', '.join(missing)}")
        audited, vulnerabilities = audit()
        record.broken += vulnerabilities
        record.figures = {
            "installed": len(there),
            "pinned": len(set(there) & set(pins)),
            "listed": len(listed),
            "audited": audited,
            "vulnerabilities": len(vulnerabilities),
        }
        if not audited:
            print("no data on vulnerabilities can be reached from here: pinned and listed only", file=sys.stderr)


def pinned(constraints: str) -> dict[str, str]:
    """Return the pinned versions by normalised name."""
    lines = (line.partition("#")[0].partition(";")[0].strip() for line in constraints.splitlines())
    return {_normal(name): version for name, _, version in (line.partition("==") for line in lines if line)}


def audit() -> tuple[int, list[str]]:
    """Return the number of packages that could be audited, and a line for each known vulnerability."""
    command = [sys.executable, "-m", "pip_audit", "--local", "--format", "json", "--progress-spinner", "off"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        found = json.loads(done.stdout)["dependencies"]
    except ValueError:  # pip_audit prints no JSON without a network
        return 0, []
    audited = [part for part in found if "vulns" in part]
    lines = [
        f"{part['name']} {part['version']}: {fault['id']}, fixed in {', '.join(fault['fix_versions']) or 'nothing yet'}"
        for part in audited
        for fault in part["vulns"]
    ]
    return len(audited), lines


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    command_line.run(main)
