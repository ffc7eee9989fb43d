"""The Python library that is linked for a Triton from the package."""

from __future__ import annotations

import ctypes.util
import sys
import sysconfig

import pytest

from clipweld.exporter.errors import TritonMissing
from clipweld.exporter.serving.installation import link_python_library

NAME = f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"


def test_only_the_library_of_the_running_python_is_linked(tmp_path, monkeypatch):
    (tmp_path / "python").mkdir()
    for name in (NAME, "libstdc++.so.6"):
        (tmp_path / "python" / name).write_bytes(b"")
    monkeypatch.setattr(sysconfig, "get_config_var", {"LIBDIR": str(tmp_path / "python")}.get)
    link_python_library(tmp_path / "lib")
    (linked,) = (tmp_path / "lib").iterdir()
    assert linked.resolve() == tmp_path / "python" / NAME


def test_a_python_without_a_shared_library_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_config_var", {"LIBDIR": str(tmp_path)}.get)
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path))
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    with pytest.raises(TritonMissing, match=rf"{NAME}: .*install the system's"):
        link_python_library(tmp_path / "lib")


def test_the_system_s_library_is_used_without_a_link(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_config_var", {"LIBDIR": str(tmp_path)}.get)
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path))
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: NAME)
    link_python_library(tmp_path / "lib")
    assert list((tmp_path / "lib").iterdir()) == []
