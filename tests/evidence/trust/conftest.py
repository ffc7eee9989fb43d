"""Two small repositories, of which the same numbers are not the same versions."""

from __future__ import annotations

import pytest

from evidence.trust.served import write_versions


@pytest.fixture(scope="session")
def lineages(tmp_path_factory):
    """A folder for repositories and the adapters in them."""
    return tmp_path_factory.mktemp("lineages")


@pytest.fixture(scope="session")
def versions(lineages):
    """The base, one adapter, and two."""
    return write_versions(lineages, [1, 2], "models")


@pytest.fixture(scope="session")
def others(lineages):
    """The base, two adapters, and one."""
    return write_versions(lineages, [2, 1], "other")
