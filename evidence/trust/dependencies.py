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
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from clipweld.exporter.serving.server_environment import server_environment
from evidence import command_line
from evidence.trust.record import Record

LOCKED = Path(__file__).parents[2] / "requirements" / "dev.txt"
OURS = {"clipweld", "clipweld-client", "clipweld-trainer", "clipweld-exporter"}
NOT_PINNED = OURS | {"pip", "setuptools", "wheel"}  # the last three come with a new environment


def main(
    *,
    sbom: Annotated[Path, Parameter(help="File for the list, in CycloneDX JSON.")] = Path("runs/trust/sbom.json"),
    out: Annotated[Path, Parameter(help="JSON file for the figures.")] = Path("runs/trust/dependencies.json"),
) -> None:
    """Check every package in this environment."""
    with Record(out) as record:
        pins = pinned(LOCKED.read_text(encoding="utf-8"))
        there = {canonicalize_name(found.name): found.version for found in distributions()}
        for name, version in sorted(there.items()):
            if name not in NOT_PINNED and pins.get(name) != version:
                record.broken.append(f"{name} {version} is installed, {LOCKED.name} has {pins.get(name)}")
        parts = list_packages(Path(sys.executable), sbom)
        listed = {canonicalize_name(part["name"]) for part in parts}
        list_packages(server_environment().executable, sbom.with_name("sbom-server.json"))
        if missing := sorted(set(there) - listed):
            record.broken.append(f"{sbom} lacks {', '.join(missing)}")
        audited, vulnerabilities = audit()
        record.broken += vulnerabilities
        record.figures = {
            "installed": len(there),
            "pinned": len(set(there) & set(pins)),
            "listed": len(listed),
            "without_licence": sorted(part["name"] for part in parts if not part.get("licenses")),
            "audited": audited,
            "vulnerabilities": len(vulnerabilities),
        }
        if not audited:
            print("no data on vulnerabilities can be reached from here: pinned and listed only", file=sys.stderr)


def list_packages(python: Path, sbom: Path) -> list[dict]:
    """Write the list of a Python's packages, with their licences, and return its entries."""
    sbom.parent.mkdir(parents=True, exist_ok=True)
    listing = ["cyclonedx_py", "environment", str(python), "--output-reproducible", "--output-file", str(sbom)]
    subprocess.run([sys.executable, "-m", *listing], check=True, capture_output=True)
    return json.loads(sbom.read_text(encoding="utf-8"))["components"]


def pinned(locked: str) -> dict[str, str]:
    """Return by normalised name the versions that a file of pinned and hashed requirements has for this Python."""
    lines = re.sub(r"\\\n\s+--hash=\S+|(?m:^#.*\n)", "", locked).splitlines()
    found = [Requirement(line) for line in lines if line.strip()]
    return {
        canonicalize_name(each.name): str(each.specifier).removeprefix("==")
        for each in found
        if each.marker is None or each.marker.evaluate()
    }


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


if __name__ == "__main__":
    command_line.run(main)
