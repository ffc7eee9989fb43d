"""Unmerged adapters in a tower's graph: one LoRA branch per adapter and layer."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper
from torch import Tensor

from clipweld.exporter.errors import UnsupportedModel
from clipweld.trainer.adapters.adapter import Adapter
from clipweld.trainer.adapters.merge import STACKED, delta_weight, weight_of


def with_branches(graph: ModelProto, adapters: Sequence[Adapter]) -> ModelProto:
    """Add LoRA branches: each adapted product becomes ``weight x + sum_i lora_B_i (lora_A_i x)``, one term per adapter.

    Nothing else changes. Branches are added before the bias, which ONNX Runtime fuses with the operator after it.

    Args:
        graph: a traced tower whose weights are still inputs; not changed. Layers of the other tower are ignored.

    Returns:
        the graph with the branches' weights as additional inputs, to be filled from ``branch_weights``.

    Raises:
        UnsupportedModel: an adapted layer has no matrix product of its own in the graph.
    """
    if not adapters:
        return graph
    products, names = _products(graph.graph), {value.name for value in graph.graph.input}
    modules = {}
    for layer in dict.fromkeys(module for adapter in adapters for module in adapter.modules()):
        weight = weight_of(layer)
        if weight[0] in names:
            if weight not in products:
                raise UnsupportedModel(f"layer {layer}: no product of its own in the graph; merge without --unmerged")
            modules[products[weight]] = layer
    branched = copy.deepcopy(graph)
    del branched.graph.node[:]
    for node in graph.graph.node:
        branched.graph.node.append(node)
        if module := modules.get(node.output[0]):
            beside = {n: adapter.experts(module) for n, adapter in enumerate(adapters) if module in adapter.modules()}
            branched.graph.node[-1].output[0] = f"{module}.base_layer"
            branched.graph.node.extend(_branches(module, list(beside), node.input[0], node.output[0]))
            branched.graph.input.extend(
                helper.make_tensor_value_info(f"{module}.{part}.{n}", TensorProto.FLOAT, tensor.shape)
                for n, tensors in beside.items()
                for part, tensor in zip(("lora_A", "lora_B"), tensors, strict=True)
            )
    onnx.checker.check_model(branched, full_check=True)
    return branched


def branch_weights(adapters: Sequence[Adapter]) -> dict[str, Tensor]:
    """Return ``<module>.lora_A.<n> (num_experts, d_in)`` and ``<module>.lora_B.<n> (d_out, num_experts)`` per adapter.

    The scaling is multiplied into lora_B, which saves an operator in the graph.
    """
    weights = {}
    for number, adapter in enumerate(adapters):
        for module in adapter.modules():
            lora_A, lora_B = adapter.experts(module)  # noqa: N806
            weights[f"{module}.lora_A.{number}"] = lora_A
            weights[f"{module}.lora_B.{number}"] = adapter.scaling * lora_B
    return weights


def fold_branches(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Merge branches into the weights; without branches, return the weights as they are.

    Args:
        weights: of the towers, with their ``branch_weights``; not changed.
    """
    folded = dict(weights)
    for name, lora_A in weights.items():  # noqa: N806
        module, found, number = name.partition(".lora_A.")
        if found:
            key, place = weight_of(module)
            weight = folded[key].clone()
            rows = weight if place is None else weight.chunk(len(STACKED))[place]
            rows += delta_weight(lora_A, weights[f"{module}.lora_B.{number}"], scaling=1.0)
            folded[key] = weight
    return folded


def _products(graph: GraphProto) -> dict[tuple[str, int | None], str]:
    """Map each weight, keyed as by ``weight_of`` (name, index of the chunk or None), to its product's output name."""
    weights: dict[str, tuple[str, int | None]] = {value.name: (value.name, None) for value in graph.input[1:]}
    products = {}
    for node in graph.node:
        operands = [weights.get(name) for name in node.input]
        if node.op_type == "Transpose" and operands[0]:
            weights[node.output[0]] = operands[0]
        elif node.op_type == "Split" and operands[0]:
            weights |= {output: (operands[0][0], place) for place, output in enumerate(node.output)}
        elif node.op_type == "MatMul" and operands[1]:
            products[operands[1]] = node.output[0]
    return products


def _branches(module: str, numbers: Sequence[int], x: str, output: str) -> Iterator[NodeProto]:
    """Yield the nodes that add the branches to ``<module>.base_layer``; the last sum takes the name of the output."""
    total = f"{module}.base_layer"
    for number in numbers:
        last, result = total, x
        for part in ("lora_A", "lora_B"):
            weight = f"{module}.{part}.{number}"
            yield helper.make_node("Transpose", [weight], [f"{weight}.T"], name=f"{weight}.T", perm=[1, 0])
            yield helper.make_node("MatMul", [result, f"{weight}.T"], [f"{weight}.out"], name=f"{weight}.out")
            result = f"{weight}.out"
        total = output if number == numbers[-1] else f"{module}.sum.{number}"
        yield helper.make_node("Add", [last, result], [total], name=f"{module}.sum.{number}")
