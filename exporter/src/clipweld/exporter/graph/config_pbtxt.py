"""``config.pbtxt`` of the three models, derived from the graphs alone, so equal for all versions of an architecture."""

from __future__ import annotations

from onnx import ModelProto, TensorProto, ValueInfoProto

# ONNX element types of CLIP's inputs and outputs -> Triton's names.
TYPES: dict[int, str] = {
    TensorProto.UINT8: "TYPE_UINT8",
    TensorProto.INT32: "TYPE_INT32",
    TensorProto.FLOAT: "TYPE_FP32",
    TensorProto.STRING: "TYPE_STRING",
}
MAX_BATCH_SIZE = 64
MAX_BATCH_BYTES = 2**30
# Memory per batch row, as a multiple of the widest layer's activations. Measured with ViT-B-16 in ONNX Runtime:
# 64 images take 0.7 GB besides the weights, a factor of 4.5; 64 texts take 0.2 GB, a factor of 5.1.
WIDEST_LAYERS = 5
WARM_UP_BATCHES = (1, 8)
WARM_UP_LENGTH = 16  # tokens per text: most prompts have fewer

_TEMPLATE = """\
name: "{name}"
backend: "onnxruntime"
# What fits into 1 GiB of activations, 64 at most.
max_batch_size: {max_batch_size}
{tensors}
# One: the default on a CPU is two a version, twice the memory and sessions that fight over the same cores. Of no kind:
# on a GPU where there is one.
instance_group [ {{ count: 1 }} ]
# What comes in while a batch runs is the next batch; nothing waits for company. No queue policy: with any, be it a size
# or a timeout, Triton 2.51 leaves a request waiting now and then for half a second.
dynamic_batching {{ }}
{warm_up}# What stands in this folder is what is served.
version_policy {{ all {{ }} }}
"""
_WARM_UP = """\
# A version is ready once it has answered these: no client meets its first, slow answers.
model_warmup [
{}
]
"""


def config(name: str, kind: str, model: ModelProto) -> str:
    """Return the file's text.

    It sets no thread counts: the number of cores is a property of the server (``deploy/``).

    Args:
        name: common to the three models.
        kind: image, text or card.
        model: with its weights.
    """
    ends = (("input", model.graph.input), ("output", model.graph.output))
    return _TEMPLATE.format(
        name=f"{name}_{kind}",
        max_batch_size=_max_batch_size(model),
        tensors="\n".join(_tensor(field, value) for field, values in ends for value in values),
        warm_up="" if kind == "card" else _warm_up(model.graph.input[0]),
    )


def _max_batch_size(model: ModelProto) -> int:
    """The largest power of two that fits; the widest layer is the first of an MLP, applied to every token."""
    tokens = max((t.dims[0] for t in model.graph.initializer if t.name.endswith("positional_embedding")), default=1)
    width = max((t.dims[0] for t in model.graph.initializer if t.name.endswith("mlp.c_fc.weight")), default=1)
    fitting = MAX_BATCH_BYTES // (WIDEST_LAYERS * tokens * width * 4)
    return min(MAX_BATCH_SIZE, 1 << max(0, fitting.bit_length() - 1))


def _tensor(field: str, value: ValueInfoProto) -> str:
    return f'{field} [ {{ name: "{value.name}" data_type: {_type(value)} dims: [ {", ".join(_dims(value))} ] }} ]'


def _warm_up(value: ValueInfoProto) -> str:
    """Warm up with zeros, which are valid tokens; random ones would be out of vocabulary."""
    dims = ", ".join(str(WARM_UP_LENGTH) if dim == "-1" else dim for dim in _dims(value))
    zeros = f'{{ key: "{value.name}" value: {{ data_type: {_type(value)} dims: [ {dims} ] zero_data: true }} }}'
    rows = [f'  {{ name: "batch of {size}" batch_size: {size} inputs {zeros} }}' for size in WARM_UP_BATCHES]
    return _WARM_UP.format(",\n".join(rows))


def _type(value: ValueInfoProto) -> str:
    return TYPES[value.type.tensor_type.elem_type]


def _dims(value: ValueInfoProto) -> list[str]:
    """All dimensions but the batch, which Triton implies; -1 for dynamic ones."""
    return [str(dim.dim_value or -1) for dim in value.type.tensor_type.shape.dim[1:]]
