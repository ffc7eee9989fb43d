"""Merge adapters into CLIP, write Triton model repositories, serve and switch their versions."""

import os

# ONNX Runtime from 1.29 on reports what it runs to Microsoft, unless it finds this when it is imported. The servers and
# commands that are started from here inherit it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
