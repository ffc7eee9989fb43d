"""Installed packages are pinned and listed, and known vulnerabilities would be reported."""

from __future__ import annotations

import json
import subprocess
from contextlib import suppress
from importlib.metadata import distributions

import pytest

from evidence.trust import dependencies


@pytest.fixture
def check(tmp_path, monkeypatch):
    """A function that checks this environment against given pins and returns the record."""

    def check(locked):
        (tmp_path / "dev.txt").write_text(locked)
        monkeypatch.setattr(dependencies, "LOCKED", tmp_path / "dev.txt")
        monkeypatch.setattr(dependencies, "audit", lambda: (0, []))
        with suppress(SystemExit):
            dependencies.main(sbom=tmp_path / "sbom.json", out=tmp_path / "record.json")
        return json.loads((tmp_path / "record.json").read_text())

    return check


@pytest.mark.slow
def test_pinned_packages_are_listed(check, tmp_path):
    pins = sorted(f"{found.name}=={found.version}" for found in distributions())
    record = check("\n".join(["# pins", *pins]))
    assert record["broken"] == []
    assert record["figures"]["installed"] == record["figures"]["listed"] > 100
    listed = {part["name"]: part["version"] for part in json.loads((tmp_path / "sbom.json").read_text())["components"]}
    assert listed["pillow"].count(".") == 2
    of_server = json.loads((tmp_path / "sbom-server.json").read_text())["components"]
    assert {part["name"]: part["version"] for part in of_server}["numpy"].startswith("1.")
    assert "numpy" not in record["figures"]["without_licence"]


@pytest.mark.slow
def test_a_package_that_differs_from_its_pin_is_reported(check):
    pins = [f"{found.name}=={found.version}" for found in distributions() if found.name != "numpy"]
    (line,) = check("\n".join([*pins, "numpy==0.1"]))["broken"]
    assert line.startswith("numpy 2.")
    assert line.endswith("dev.txt has 0.1")


def test_hashes_comments_and_pins_of_other_pythons_are_left_out():
    hashed = " \\\n    --hash=sha256:0 \\\n    --hash=sha256:1\n"
    locked = f"# by hand\na==1.0{hashed}B_b==2 ; python_version < '3'{hashed}b-b==3\n"
    assert dependencies.pinned(locked) == {"a": "1.0", "b-b": "3"}


def test_a_known_vulnerability_is_reported(monkeypatch):
    """Vulnerability data needs a network, so pip-audit's output is written by hand."""
    vulnerable = {"name": "p", "version": "1.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["1.1"]}]}
    found = {"dependencies": [vulnerable, {"name": "q", "skip_reason": "not found"}]}
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, json.dumps(found), ""))
    assert dependencies.audit() == (1, ["p 1.0: PYSEC-1, fixed in 1.1"])
