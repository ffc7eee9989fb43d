"""Print what a server must know of the Python that runs this file, as JSON. Nothing but Python's own is imported."""

from __future__ import annotations

import ctypes.util
import json
import os
import sys
import sysconfig


def facts() -> dict[str, str | bool | None]:
    """Return this Python's version, its folders, and where its shared library is, if anywhere."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    name = f"libpython{version}.so.1.0"
    given = [entry for entry in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if os.path.isabs(entry)]
    folders = [sysconfig.get_config_var("LIBDIR"), f"{sys.base_prefix}/lib", *given]
    files = [f"{folder}/{name}" for folder in folders if folder and os.path.isfile(f"{folder}/{name}")]
    return {
        "version": version,
        "packages": sysconfig.get_path("purelib"),
        "base": sys.base_prefix,
        "library": files[0] if files else None,
        # Looked for only then, because it may start a compiler.
        "system_has_library": not files and ctypes.util.find_library(f"python{version}") is not None,
    }


if __name__ == "__main__":
    print(json.dumps(facts()))
