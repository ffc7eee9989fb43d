"""Learning: the loop that all methods share, and one task -> one adapter."""

from __future__ import annotations

import functools
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor

from clipweld.trainer.adapters.adapter import Adapter, check_readable
from clipweld.trainer.adapters.folder import check_new
from clipweld.trainer.adapters.merge import merge
from clipweld.trainer.base.backbone import Backbone, with_weights
from clipweld.trainer.base.batches import Batch, Batches, check_batch_size
from clipweld.trainer.base.cls_block import cut_to_longest, encode_text
from clipweld.trainer.config import TrainConfig
from clipweld.trainer.errors import NotFinite
from clipweld.trainer.finite import all_finite, first_fault, first_not_finite
from clipweld.trainer.learning.checkpoint import Checkpoint, Trainee
from clipweld.trainer.learning.evaluate import Accuracies, evaluate
from clipweld.trainer.method import PoolSet, attach_pools, contrastive_loss, detach_pools, orthogonality_loss
from clipweld.trainer.method.anchors import WordAnchors
from clipweld.trainer.method.drift import drift_loss, past_inputs, principal_inputs
from clipweld.trainer.tasks import Task, check_prompts

MIN_LR = 1e-6


@dataclass(frozen=True)
class Step:
    """What one optimiser step reports.

    Attributes:
        loss: what was minimised: CLIP's contrastive loss and all that holds back, weighted.
        contrastive: CLIP's loss alone.
        images_per_s: of all devices together.
    """

    number: int
    loss: float
    contrastive: float
    images_per_s: float


@dataclass(frozen=True)
class Fitted:
    """A learned task.

    Attributes:
        adapter: what it leaves behind.
        backbone: the model with the adapter, and all before it, merged.
        accuracies: of that model, on the tasks it was tested on.
        trainable_parameters: how many numbers were trained.
        seconds: spent training, evaluation not counted; those before an interruption included.
    """

    adapter: Adapter
    backbone: Backbone
    accuracies: Accuracies
    trainable_parameters: int
    seconds: float


def fit(
    task: Task,
    base: Backbone,
    lineage: Sequence[Adapter],
    config: TrainConfig,
    *,
    test_on: Sequence[Task],
    start: Backbone | None = None,
    before: Accuracies | None = None,
    fabric: Fabric | None = None,
    unfinished: Path | None = None,
    resume: bool = False,
    on_step: Callable[[Step], None] = lambda step: None,
) -> Fitted:
    """Learn a task on top of those learned before.

    Args:
        base: the base model, on the fabric's device; not changed.
        lineage: adapters learned before, oldest first.
        test_on: tasks whose accuracy before and after is measured and kept in the adapter.
        start: the base with the lineage merged, if the caller has it already; not changed.
        before: accuracies of the lineage on ``test_on``, where they are known already.
        fabric: devices and precision, already launched; every process returns the same. One CPU or GPU when None.
        unfinished: file to save training in as it goes; the caller removes it once the adapter is safe.
        resume: go on from that file, if it is there.
        on_step: called after every optimiser step.

    Raises:
        TaskAlreadyLearned: the lineage has an adapter of this task.
        TaskInvalid: two of its classes are the same tokens.
        ConfigError: a batch of one image.
        AdapterError: the adapter would say more than can be read again (``check_readable``).
        CheckpointError: ``unfinished`` holds training of another task or with other settings.
        NotFinite: training diverged, or what came of it can't be used; ``unfinished`` is from before.
    """
    check_new(task.name, (adapter.task for adapter in lineage))
    check_prompts(task, base.tokenizer)
    fabric = fabric or one_device(base)
    check_batch_size(config, fabric.world_size)
    weights = start.model.state_dict() if start else merge(base.model.state_dict(), lineage)
    model = with_weights(base, weights)
    parents = tuple(parent.sha256 for parent in lineage)
    before = evaluate(model, test_on, fabric) if before is None else before
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        pools = attach_pools(model.model, config)
        try:
            batches = batches_of(task, model, config, fabric)
            adapter = untrained(task, base, parents, config, before, pools)
            check_readable(adapter)  # before hours of training
            objective = Objective(
                model, pools, config, fabric,
                past_columns=past_columns(lineage, base.device) if config.ago != "off" else {},
                past_inputs=past_inputs(lineage, pools) if config.drift_weight else {},
            )  # fmt: skip
            checkpoint = checkpoint_of(unfinished, [batches], base, config, fabric, parents)
            seconds = train([batches], objective, checkpoint, resume=resume, on_step=on_step)
            tensors = pools.merged_tensors()
            if config.drift_weight:
                tensors |= principal_inputs(task, model, pools, batches, config.drift_directions)
        finally:
            detach_pools(pools)
    adapter = replace(adapter, activation_counts=pools.activation_counts(), tensors=tensors)
    merged = with_weights(base, merge(weights, [adapter]))
    accuracies = evaluate(merged, test_on, fabric)
    adapter = replace(adapter, accuracy={"before": before["task"], "after": accuracies["task"]})
    return Fitted(adapter, merged, accuracies, pools.num_trainable, seconds)


def untrained(
    task: Task, base: Backbone, parents: tuple[str, ...], config: TrainConfig, before: Accuracies, pools: PoolSet
) -> Adapter:
    """The adapter of a task before it is learned: all that it says then, and no tensors."""
    return Adapter(
        task=task.name,
        class_names=task.class_names,
        templates=task.templates,
        model_name=base.model_name,
        pretrained=base.pretrained,
        base_fingerprint=base.fingerprint,
        parents=parents,
        scaling=config.alpha / config.rank,
        seed=config.seed,
        accuracy={"before": before["task"], "after": {}},
        config={**asdict(config), "source": task.source, **base.own_preprocessing},
        activation_counts=pools.activation_counts(),
        tensors={},
    )


@dataclass(frozen=True)
class Objective:
    """What a training step minimises: CLIP's loss on its batch, and what keeps it off things known before.

    Every process sees its share of the images and all of the prompts; image features are gathered, so the loss is that
    of the whole batch wherever it is computed. The mean of the processes' gradients is then the gradient of that loss.

    Attributes:
        trainee: what is trained of the model: its pools, or all its weights.
        past_columns: what earlier tasks merged, which the AGO loss keeps off.
        past_inputs: what earlier tasks feed into the layers, where the drift loss keeps the outputs.
    """

    model: Backbone
    trainee: Trainee
    config: TrainConfig
    fabric: Fabric
    past_columns: Mapping[str, Tensor] = field(default_factory=dict)
    past_inputs: Mapping[str, Tensor] = field(default_factory=dict)

    def loss(self, batch: Batch, anchors: WordAnchors | None = None, number: int = 1) -> Tensor:
        """A scalar, the sum of its terms; ``number`` is the step, which draws the anchors' words."""
        return added(self.terms(batch, anchors, number))

    def terms(self, batch: Batch, anchors: WordAnchors | None, number: int) -> dict[str, Tensor]:
        """What adds up to the loss, weighted, by name."""
        config, model = self.config, self.model.model
        words = [anchors.tokens(number)] if anchors else []
        tokens = cut_to_longest(torch.cat([batch.tokens, *words]))
        with self.fabric.autocast():
            encoded = model.encode_image(batch.pixels), encode_text(model, tokens)
        # In float32 whatever the towers are in: at a scale of 100, bfloat16's rounding moves a logit by tenths.
        own_features, text_features = (F.normalize(features.float(), dim=-1) for features in encoded)
        gathered = cast("Tensor", self.fabric.all_gather(own_features, sync_grads=True))
        image_features = gathered.flatten(0, -2)
        prompt_features, word_features = text_features.tensor_split([len(batch.tokens)])
        logit_scale = model.logit_scale.detach().exp()
        contrastive = contrastive_loss(image_features, prompt_features[batch.text_of], batch.labels, logit_scale)
        terms = {"contrastive": contrastive}
        pools = self.trainee.pools if isinstance(self.trainee, PoolSet) else {}
        if self.past_columns and config.ago != "off":
            orthogonality = orthogonality_loss(pools, self.past_columns, config.ago)
            terms["orthogonality"] = config.ago_weight * orthogonality
        if self.past_inputs:
            terms["drift"] = config.drift_weight * drift_loss(pools, self.past_inputs)
        if anchors:
            terms["anchors"] = config.anchor_weight * anchors.loss(number, batch, own_features, word_features)
        return terms


def train(
    batches: Sequence[Batches],
    objective: Objective,
    checkpoint: Checkpoint | None,
    *,
    resume: bool,
    on_step: Callable[[Step], None],
) -> float:
    """Train the objective's model in place. Tasks take turns, ``config.iterations`` steps each.

    Args:
        batches: of every task.

    Returns:
        seconds spent.

    Raises:
        NotFinite: a loss, or what an update made, is NaN or infinite; names the step and what was so first. Raised by
            every process alike, and nothing of it was saved.
    """
    model, trainee, config, fabric = objective.model, objective.trainee, objective.config, objective.fabric
    anchors = [WordAnchors(model, own, config.seed) if config.anchor_weight else None for own in batches]
    parameters = list(trainee.parameters())
    adamw = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=True)
    optimizer = cast("torch.optim.Optimizer", fabric.setup_optimizers(adamw))
    steps_before, seconds_before = checkpoint.load(trainee, adamw) if checkpoint and resume else (0, 0.0)
    iterations = config.iterations * len(batches)
    started = time.perf_counter()
    model.model.train()
    for number in range(steps_before + 1, iterations + 1):
        step_started = time.perf_counter()
        if number > iterations - round(config.consolidate * iterations):
            trainee.consolidate()
        for group in optimizer.param_groups:
            group["lr"] = cosine(config.lr, number, iterations)
        turn, place = divmod(number - 1, len(batches))
        batch = batches[place][turn + 1]
        terms = partial(objective.terms, batch, anchors[place], turn + 1)
        seed_dropout(config.seed, number)
        parts = terms()
        loss = added(parts)
        optimizer.zero_grad()
        fabric.backward(loss)
        average_gradients(fabric, parameters)
        mean_loss = float(cast("Tensor", fabric.all_reduce(loss.detach(), reduce_op="mean")))
        if not math.isfinite(mean_loss):  # before the weights take it up
            seed_dropout(config.seed, number)
            first = first_fault(model.model, batch.pixels, terms, fabric)
            raise not_finite(number, f"the loss is {mean_loss}, and the first", first, config, fabric)
        optimizer.step()
        if not all_finite([*parameters, *(state["exp_avg_sq"] for state in adamw.state.values())]):
            broken = first_not_finite(trained(trainee, adamw)) or "the square of a gradient"
            raise not_finite(number, "after its update the first", broken, config, fabric)
        rate = len(batch.labels) / (time.perf_counter() - step_started)
        on_step(Step(number, mean_loss, float(parts["contrastive"].detach()), rate))
        if checkpoint and fabric.is_global_zero:
            seconds = seconds_before + time.perf_counter() - started
            checkpoint.save_when_due(number, seconds, trainee, adamw)
    model.model.eval()
    return seconds_before + time.perf_counter() - started


def added(terms: Mapping[str, Tensor]) -> Tensor:
    """The sum of a loss's terms."""
    return functools.reduce(torch.add, terms.values())


def seed_dropout(seed: int, number: int) -> None:
    """Have a step draw its own dropout, whatever was drawn before."""
    torch.manual_seed(random.Random(f"dropout {seed} {number}").getrandbits(63))


def trained(trainee: Trainee, adamw: torch.optim.AdamW) -> dict[str, Tensor]:
    """What an update changes, by name: weights, then the second moments of their gradients."""
    state = trainee.state()
    names = {tensor.data_ptr(): name for name, tensor in state.items()}
    moments = {names[weight.data_ptr()]: moment["exp_avg_sq"] for weight, moment in adamw.state.items()}
    return {f"weight {name}": tensor for name, tensor in state.items()} | {
        f"the second moment of {name}'s gradient": moment for name, moment in moments.items()
    }


def not_finite(number: int, what: str, first: str, config: TrainConfig, fabric: Fabric) -> NotFinite:
    """The error of a training step."""
    precision = fabric.strategy.precision.precision
    exact = "" if precision == "32-true" else f", or --precision 32-true instead of {precision}"
    return NotFinite(
        f"training step {number}: {what} to be NaN or infinite is {first}; give a lower --lr than {config.lr:g}{exact}"
    )


def batches_of(task: Task, model: Backbone, config: TrainConfig, fabric: Fabric) -> Batches:
    """A task's batches as this process sees them."""
    return Batches(task, model, config, rank=fabric.global_rank, world_size=fabric.world_size)


def checkpoint_of(
    path: Path | None,
    batches: Sequence[Batches],
    base: Backbone,
    config: TrainConfig,
    fabric: Fabric,
    parents: Sequence[str],
) -> Checkpoint | None:
    """Where training is saved, with all that its course depends on; None where it isn't to be saved."""
    if path is None:
        return None
    tasks = [own.task for own in batches]
    identity = {
        "tasks": [task.name for task in tasks],
        "class_names": [task.class_names for task in tasks],
        "templates": [task.templates for task in tasks],
        "sources": [task.source for task in tasks],
        "images": [own.drawn() for own in batches],
        "model": base.model_name,
        "base_fingerprint": base.fingerprint,
        "parents": list(parents),
        "devices": fabric.world_size,
        "precision": fabric.strategy.precision.precision,
        **asdict(config),
    }
    return Checkpoint(path, identity, fabric.strategy.precision)


def one_device(backbone: Backbone) -> Fabric:
    """A fabric of the one device that a backbone is on."""
    return Fabric(accelerator=backbone.device.type, devices=1)


def cosine(lr: float, number: int, iterations: int) -> float:
    """Return the learning rate of a step, counted from 1: half a cosine from ``lr`` down to ``MIN_LR``."""
    return MIN_LR + (lr - MIN_LR) * (1 + math.cos(math.pi * (number - 1) / iterations)) / 2


def average_gradients(fabric: Fabric, parameters: Sequence[Tensor]) -> None:
    """Replace every gradient by its mean over all processes, in one exchange."""
    if fabric.world_size == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    flat = cast("Tensor", fabric.all_reduce(flat, reduce_op="mean"))
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def past_columns(lineage: Sequence[Adapter], device: torch.device) -> dict[str, Tensor]:
    """By layer, lora_B of all earlier tasks side by side: (d_out, experts so far). Empty for an empty lineage."""
    if not lineage:
        return {}
    return {
        module: torch.cat([adapter.experts(module)[1] for adapter in lineage], dim=1).to(device)
        for module in lineage[0].modules()
    }
