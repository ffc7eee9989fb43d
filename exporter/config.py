"""What every ONNX file of ours is written in, and what keeps a server's model control to its administrator."""

from __future__ import annotations

from enum import Enum

# Loads in ONNX Runtime from 1.15 on, so in every Triton container from 24.03 on. Newer must earn its place by speed.
OPSET = 18
IR_VERSION = 9
PRODUCER = "clipweld"

# With this in the environment, servers that are started want it for model control, and commands that switch them send
# it: whoever reaches a server may ask it, but not change it.
ADMIN_KEY_VARIABLE = "CLIPWELD_ADMIN_KEY"
ADMIN_HEADER = "clipweld-admin-key"
RESTRICTED = "model-repository,shared-memory,trace,logging"


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
