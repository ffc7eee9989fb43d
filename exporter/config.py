"""What every ONNX file of ours is written in."""

from __future__ import annotations

# Loads in ONNX Runtime from 1.15 on, so in every Triton container from 24.03 on. Newer must earn its place by speed.
OPSET = 18
IR_VERSION = 9
PRODUCER = "clipweld"
