"""The drift loss, which keeps new experts from changing the layers' outputs on earlier tasks.

For a layer with input x, the second moment E[x x^T] over a task's images and prompts says how much the task uses each
input direction. An update dW moves the layer's output on that task by ``tr(dW E[x x^T] dW^T)``, the mean squared length
of the change, which can be computed without any image of the task. An adapter stores the principal directions of the
moment. Null-space methods (arXiv 2103.09762, 2103.07113) forbid such updates; here they are penalised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from clipweld.trainer.adapters.adapter import Adapter
from clipweld.trainer.base.backbone import Backbone
from clipweld.trainer.base.batches import Batches
from clipweld.trainer.base.cls_block import cut_to_longest, encode_text
from clipweld.trainer.errors import NotFinite
from clipweld.trainer.finite import first_not_finite, has_direction
from clipweld.trainer.method import ExpertPool, PoolSet
from clipweld.trainer.tasks import Task
from clipweld.trainer.text import prompt_of

CHUNK = 128
MAX_IMAGES = 1024


@torch.no_grad()
def principal_inputs(
    task: Task, backbone: Backbone, pools: PoolSet, batches: Batches, directions: int
) -> dict[str, Tensor]:
    """Return per layer ``<module>.inputs (directions, d_in)``: rows whose outer products add up to nearly E[x x^T].

    q, k and v have the same input and one common entry, that of k, because in the last block q sees only [CLS].

    Args:
        task: its templates and class names give the prompts.
        backbone: the model that has just learned the task, with its pools still attached.
        pools: the attached pools.
        batches: the task's training images, of which at most ``MAX_IMAGES`` are used.
        directions: the number of rows per layer.

    Raises:
        NotFinite: the second moment of a layer's inputs is NaN or infinite; names the layer.
    """
    sums: dict[str, Tensor] = {}
    tokens_seen: dict[str, int] = {}
    texts: Tensor | None = None

    def note(module: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def hook(_pool: nn.Module, inputs: tuple[Tensor]) -> None:
            x = inputs[0]
            if texts is None:
                x = x.flatten(0, 1).float()
            else:  # the tokens after EOT are padding
                x = x[torch.arange(x.shape[1], device=x.device) <= texts.argmax(dim=-1)[:, None]].float()
            sums[module] = sums.get(module, 0) + x.T @ x
            tokens_seen[module] = tokens_seen.get(module, 0) + len(x)

        return hook

    model = backbone.model.eval()
    hooks = [pools.pools[name].register_forward_pre_hook(note(name)) for name in pools.pools if _input_of(name) == name]
    try:
        for pixels in batches.chunks(CHUNK, MAX_IMAGES):
            model.encode_image(pixels)
        prompts = [prompt_of(template, name) for template in task.templates for name in task.class_names]
        for chunk in backbone.tokenizer(prompts).to(backbone.device).split(CHUNK):
            texts = cut_to_longest(chunk)
            encode_text(model, texts)
    finally:
        for hook in hooks:
            hook.remove()
    if (layer := first_not_finite(sums)) is not None:
        raise NotFinite(
            f"task {task.name!r}: what it feeds into layer {layer} is NaN or beyond float32; learn it again with a "
            "lower --lr"
        )
    return {f"{name}.inputs": _factor(sums[name] / tokens_seen[name], directions) for name in sums}


def past_inputs(lineage: Sequence[Adapter], pools: PoolSet) -> dict[str, Tensor]:
    """Return per layer the sum of the second moments (d_in, d_in) of its inputs on all earlier tasks.

    Each moment is divided by the mean squared length of the layer's own output on the task, so that layers and tasks
    have equal weight. The size doesn't grow with the number of tasks.

    Returns:
        an empty dict if no adapter has inputs.

    Raises:
        NotFinite: an adapter's inputs give outputs that are not finite or zero; names the adapter and the layer.
    """
    carrying = [adapter for adapter in lineage if any(name.endswith(".inputs") for name in adapter.tensors)]
    if not carrying:
        return {}
    past = {}
    for module, pool in pools.pools.items():
        carried = [adapter.tensors[f"{_input_of(module)}.inputs"] for adapter in carrying]
        counts = torch.tensor([len(own) for own in carried], device=pool.weight.device)
        rows = torch.cat(carried).to(pool.weight.device)
        outputs = (rows @ pool.weight.T.float()).square().sum(dim=1)
        lengths = torch.stack([own.sum() for own in outputs.split(counts.tolist())])
        usable = has_direction(lengths)
        if not usable.all():
            adapter = carrying[int((~usable).nonzero()[0])]
            raise NotFinite(
                f"adapter {adapter.task!r}: {_input_of(module)}.inputs are NaN, zero or beyond float32; restore it, "
                "fit that task again, or give --drift-weight 0"
            )
        weighted = rows / lengths.repeat_interleave(counts).sqrt()[:, None]
        past[module] = weighted.T @ weighted
    return past


def drift_loss(pools: Mapping[str, ExpertPool], past: Mapping[str, Tensor]) -> Tensor:
    """Return the relative squared change of the layers' outputs on earlier tasks, mean over layers; a scalar.

    With dW = scaling * B A and M from ``past_inputs``: ``tr(dW M dW^T) = scaling^2 * sum((A M A^T) * (B^T B))``.
    All experts count until the ones to merge are fixed (``Router.consolidating``), then only those.
    """
    drifts = []
    for module, moment in past.items():
        pool = pools[module]
        experts = pool.router.most_activated() if pool.router.consolidating else slice(None)
        lora_A, lora_B = pool.lora_A[experts], pool.lora_B[:, experts]  # noqa: N806
        drifts.append(pool.scaling**2 * ((lora_A @ moment @ lora_A.T) * (lora_B.T @ lora_B)).sum())
    return torch.stack(drifts).mean()


def _input_of(module: str) -> str:
    """Return the layer whose name a layer's inputs are stored under."""
    parent, _, name = module.rpartition(".")
    return f"{parent}.k_proj" if name in ("q_proj", "v_proj") else module


def _factor(moment: Tensor, directions: int) -> Tensor:
    """Return the principal directions of a second moment (d, d) as rows (directions, d), times sqrt(singular value)."""
    with torch.random.fork_rng():  # svd_lowrank starts from random numbers; the seed makes the result reproducible
        torch.manual_seed(0)
        vectors, values, _ = torch.svd_lowrank(moment, q=min(2 * directions, len(moment)), niter=4)
    return (vectors * values.sqrt()).T[:directions].cpu().contiguous()
