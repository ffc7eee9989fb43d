"""What every ONNX file of ours is written in."""

from __future__ import annotations

from enum import Enum

# Loads in ONNX Runtime from 1.15 on, so in every Triton container from 24.03 on. Newer must earn its place by speed.
OPSET = 18
IR_VERSION = 9
PRODUCER = "clipweld"

MODEL_NAME = "[A-Za-z0-9_-]{1,100}"  # common to the three models: part of folders' names and of addresses


class Precision(str, Enum):
    """What a version computes in.

    fp32: as it was trained.
    fp16: for GPUs; half the bytes. Scaling of pixels and the last normalisation stay float32, and layer norms and
        softmax sum in float32 inside their kernels.
    int8: for CPUs; weights and activations of the image tower's products, by ONNX Runtime's own dynamic quantisation.
        The text tower stays float32: clients keep its answers, and each error in them would fall on every image.
    """

    fp32 = "fp32"
    fp16 = "fp16"
    int8 = "int8"


# Of a feature's length, which is 1: what normalising in a lower precision may leave.
UNIT_TOLERANCE = 1e-2
