"""One task -> one adapter."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor

from trainer.adapter import Adapter
from trainer.anchors import WordAnchors
from trainer.backbone import Backbone, cut_to_longest, encode_text, with_weights
from trainer.config import TrainConfig
from trainer.errors import TaskAlreadyLearned
from trainer.evaluate import evaluate
from trainer.merge import merge
from trainer.pool import PoolSet, attach_pools, contrastive_loss, detach_pools, orthogonality_loss
from trainer.tasks import Task

MIN_LR = 1e-6


@dataclass(frozen=True)
class Step:
    """What one optimiser step has to tell."""

    number: int
    loss: float
    images_per_s: float


@dataclass(frozen=True)
class Fitted:
    """A learned task.

    Attributes:
        adapter: what it leaves behind.
        backbone: the model with the adapter, and all before it, merged.
        trainable_parameters: how many numbers were trained.
        seconds: spent training, evaluation not counted.
    """

    adapter: Adapter
    backbone: Backbone
    trainable_parameters: int
    seconds: float


def fit(
    task: Task,
    base: Backbone,
    lineage: Sequence[Adapter],
    config: TrainConfig,
    *,
    test_on: Sequence[Task],
    before: dict[str, float] | None = None,
    on_step: Callable[[Step], None] = lambda step: None,
) -> Fitted:
    """Learn a task on top of those learned before.

    Args:
        base: the base model; not changed.
        lineage: adapters learned before, oldest first.
        test_on: tasks whose accuracy before and after is measured and kept in the adapter.
        before: accuracies of the lineage on ``test_on``, where they are known already.
        on_step: told of every optimiser step.

    Raises:
        TaskAlreadyLearned: the lineage has an adapter of this task.
    """
    if task.name in (adapter.task for adapter in lineage):
        raise TaskAlreadyLearned(
            f"task {task.name!r} was learned already; give another --adapters folder, "
            "or remove its adapter and those learned after it"
        )
    weights = merge(base.model.state_dict(), lineage)
    model = with_weights(base, weights)
    before = evaluate(model, test_on) if before is None else before
    anchors = None
    if config.anchor_weight:
        anchors = WordAnchors(with_weights(base, weights), config.seed, keep=config.shots > 0)
    started = time.perf_counter()
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        pools = attach_pools(model.model, config)
        try:
            train(task, model, pools, lineage, config, anchors, on_step)
        finally:
            detach_pools(pools)
    seconds = time.perf_counter() - started
    adapter = Adapter(
        task=task.name,
        class_names=task.class_names,
        templates=task.templates,
        model_name=base.model_name,
        pretrained=base.pretrained,
        base_fingerprint=base.fingerprint,
        parents=tuple(parent.sha256 for parent in lineage),
        scaling=config.alpha / config.rank,
        seed=config.seed,
        accuracy={"before": before, "after": {}},
        config={**asdict(config), "source": task.source},
        tensors=pools.merged_tensors(),
    )
    merged = with_weights(base, merge(base.model.state_dict(), [*lineage, adapter]))
    adapter = replace(adapter, accuracy={"before": before, "after": evaluate(merged, test_on)})
    return Fitted(adapter, merged, pools.num_trainable, seconds)


def train(
    task: Task,
    backbone: Backbone,
    pools: PoolSet,
    lineage: Sequence[Adapter],
    config: TrainConfig,
    anchors: WordAnchors | None,
    on_step: Callable[[Step], None],
) -> None:
    """Train the pools of a model in place; the model's own weights stay frozen."""
    fabric = Fabric(accelerator=backbone.device.type, devices=1)
    optimizer = torch.optim.AdamW(pools.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.iterations, eta_min=MIN_LR)
    optimizer = fabric.setup_optimizers(optimizer)
    past = past_columns(lineage, backbone.device)
    logit_scale = backbone.model.logit_scale.exp()
    consolidate_at = config.iterations - round(config.consolidate * config.iterations) + 1
    backbone.model.train()
    batches = draw_batches(task, backbone, config)
    for number in range(1, config.iterations + 1):
        started = time.perf_counter()
        if number == consolidate_at:
            pools.consolidate()
        batch = next(batches)
        image_features = F.normalize(backbone.model.encode_image(batch.pixels), dim=-1)
        text_features = F.normalize(encode_text(backbone.model, batch.tokens), dim=-1)[batch.text_of]
        loss = contrastive_loss(image_features, text_features, batch.labels, logit_scale)
        if config.ago != "off":
            loss = loss + config.ago_weight * orthogonality_loss(pools.pools, past, config.ago)
        if anchors:
            held = anchors.loss(backbone.model, batch.indices, batch.pixels, image_features)
            loss = loss + config.anchor_weight * held
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()
        schedule.step()
        on_step(Step(number, loss.item(), len(batch.labels) / (time.perf_counter() - started)))
    backbone.model.eval()


def past_columns(lineage: Sequence[Adapter], device: torch.device) -> dict[str, Tensor]:
    """By layer, lora_B of all earlier tasks side by side: (d_out, experts so far). Empty for an empty lineage."""
    if not lineage:
        return {}
    return {
        module: torch.cat([adapter.experts(module)[1] for adapter in lineage], dim=1).to(device)
        for module in lineage[0].modules()
    }


@dataclass(frozen=True)
class Batch:
    """Images with their prompts.

    Attributes:
        indices: which of the drawn training images these are.
        pixels: float32 (batch, 3, S, S).
        labels: int64 (batch,).
        tokens: int64 (distinct prompts, seq_len), cut to the longest.
        text_of: int64 (batch,), which of the prompts belongs to which image.
    """

    indices: list[int]
    pixels: Tensor
    labels: Tensor
    tokens: Tensor
    text_of: Tensor


def draw_batches(task: Task, backbone: Backbone, config: TrainConfig) -> Iterator[Batch]:
    """Endless batches, drawn without replacement until all images were seen, then anew.

    A batch holds fewer classes than images: each prompt is encoded once. Few-shot images are decoded once and kept.
    """
    images = task.load("train").few_shot(config.shots, config.seed)
    draw = torch.Generator().manual_seed(config.seed)
    kept: dict[int, Tensor] = {}
    order: list[int] = []
    while True:
        while len(order) < config.batch_size:
            order += torch.randperm(len(images), generator=draw).tolist()
        chosen, order = order[: config.batch_size], order[config.batch_size :]
        pixels = []
        for index in chosen:
            decoded = kept[index] if index in kept else backbone.preprocess(images[index][0])
            if config.shots:
                kept[index] = decoded
            pixels.append(decoded)
        labels = torch.tensor([images.labels[index] for index in chosen])
        classes, text_of = labels.unique(return_inverse=True)
        template = task.templates[int(torch.randint(len(task.templates), (), generator=draw))]
        tokens = cut_to_longest(backbone.tokenizer([template.replace("{}", task.class_names[c]) for c in classes]))
        yield Batch(chosen, *(t.to(backbone.device) for t in (torch.stack(pixels), labels, tokens, text_of)))
