"""Two small repositories whose versions of the same number differ."""

from __future__ import annotations

import pytest

from evidence.trust.served import write_versions


@pytest.fixture(scope="session")
def lineages(tmp_path_factory):
    """A folder for the repositories and their adapters."""
    return tmp_path_factory.mktemp("lineages")


@pytest.fixture(scope="session")
def versions(lineages):
    """A repository with the base, a version with one adapter, and one with two."""
    return write_versions(lineages, [1, 2], "models")


@pytest.fixture(scope="session")
def others(lineages):
    """A repository with the base, a version with two adapters, and one with one."""
    return write_versions(lineages, [2, 1], "other")
