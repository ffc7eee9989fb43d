"""Constants shared by all ONNX files that clipweld writes, and their precisions."""

from __future__ import annotations

from enum import StrEnum

# Loads in ONNX Runtime from 1.15 on, so in every Triton container from 24.03 on. Raise it only for a
# measured gain in speed.
OPSET = 18
IR_VERSION = 9
PRODUCER = "clipweld"

MODEL_NAME = "[A-Za-z0-9_-]{1,100}"  # common to the three models: part of folders' names and of addresses


class Precision(StrEnum):
    """The numeric precision of a version.

    fp32: the precision of training.
    fp16: for GPUs; half the size. Pixel scaling and the final normalisation stay in float32; layer norms and softmax
        accumulate in float32 inside their kernels.
    int8: for CPUs; ONNX Runtime's dynamic quantisation of the image tower's matrix products (weights and activations).
        The text tower stays in float32: clients cache its features, so an error there would affect every image.
    """

    fp32 = "fp32"
    fp16 = "fp16"
    int8 = "int8"


# Allowed deviation of a feature's L2 norm from 1, as left by normalising in a lower precision.
UNIT_TOLERANCE = 1e-2
