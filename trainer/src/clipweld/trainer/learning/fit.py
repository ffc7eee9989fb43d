"""The training loop that all methods share, and ``fit``, which learns one task as one adapter."""

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

from clipweld.trainer.adapters.adapter import Adapter, Coefficients, Moved, When, check_readable
from clipweld.trainer.adapters.folder import check_new
from clipweld.trainer.adapters.merge import merge
from clipweld.trainer.base.backbone import Backbone, with_weights
from clipweld.trainer.base.batches import Batch, Batches, check_batch_size
from clipweld.trainer.base.cls_block import cut_to_longest, encode_text
from clipweld.trainer.config import TrainConfig, shots_of, with_steps
from clipweld.trainer.errors import NotFinite
from clipweld.trainer.finite import all_finite, first_fault, first_not_finite
from clipweld.trainer.learning.checkpoint import Checkpoint, Trainee
from clipweld.trainer.learning.coefficients import held_out, smallest_update
from clipweld.trainer.learning.evaluate import Accuracies, evaluate
from clipweld.trainer.learning.movement import movement
from clipweld.trainer.method import PoolSet, attach_pools, contrastive_loss, detach_pools, orthogonality_loss
from clipweld.trainer.method.anchors import WordAnchors
from clipweld.trainer.method.drift import drift_loss, past_inputs, principal_inputs
from clipweld.trainer.tasks import Task, check_prompts

MIN_LR = 1e-6
UNTESTED: Accuracies = {"task": {}, "task_classes": {}}


@dataclass(frozen=True)
class Step:
    """What one optimiser step reports.

    Attributes:
        number: counted from 1.
        iterations: number of all steps.
        loss: the minimised sum: CLIP's contrastive loss and the weighted losses against forgetting.
        contrastive: CLIP's loss alone.
        images_per_s: over all devices.
    """

    number: int
    iterations: int
    loss: float
    contrastive: float
    images_per_s: float


@dataclass(frozen=True)
class Fitted:
    """A learned task.

    Attributes:
        adapter: the adapter of the task.
        backbone: the model with this adapter and all earlier ones merged.
        accuracies: of that model, on the tasks of ``test_on``.
        tested: number of test images of these tasks.
        trainable_parameters: number of trained values.
        seconds: training time without evaluation, including the time before an interruption.
    """

    adapter: Adapter
    backbone: Backbone
    accuracies: Accuracies
    tested: dict[str, int]
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
        test_on: tasks whose accuracy before and after is measured and recorded in the adapter.
        start: the base with the lineage merged, if the caller has it already; not changed.
        before: accuracies of the lineage on ``test_on``, if they are known already.
        fabric: devices and precision, already launched; every process returns the same. None takes the base's device.
        unfinished: checkpoint file of the training; the caller removes it once the adapter is saved.
        resume: continue from that file, if it exists.
        on_step: called after every optimiser step.

    Raises:
        TaskAlreadyLearned: the lineage has an adapter of this task.
        TaskInvalid: two of its classes have the same tokens; or coefficients are to be chosen, and no class has two
            images.
        ConfigError: a batch has one image only.
        AdapterError: the adapter's metadata would be too large to be read again (``check_readable``).
        CheckpointError: ``unfinished`` is a checkpoint of another task or with other settings.
        NotFinite: training diverged, or the result can't be used; ``unfinished`` is from before the fault.
    """
    check_new(task.name, (adapter.task for adapter in lineage))
    check_prompts(task, base.tokenizer)
    fabric = fabric or one_device(base)
    check_batch_size(config, fabric.world_size)
    config = for_tasks(config, [task], base, fabric)
    weights = start.model.state_dict() if start else merge(base.model.state_dict(), lineage)
    model = with_weights(base, weights)
    parents = tuple(parent.sha256 for parent in lineage)
    before = evaluate(model, test_on, fabric) if before is None else before
    coefficients = merge_coefficients(task, base, lineage, config, model, fabric, on_step)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        pools = attach_pools(model.model, config)
        try:
            batches = batches_of(task, model, config, fabric)
            adapter = untrained(task, base, parents, config, before, pools)
            check_readable(adapter)  # now, rather than after hours of training
            objective = Objective(
                model, pools, config, fabric,
                past_columns=past_columns(lineage, base.device) if config.ago != "off" else {},
                past_inputs=past_inputs(lineage, pools) if config.drift_weight else {},
            )  # fmt: skip
            checkpoint = checkpoint_of(unfinished, [batches], base, config, fabric, parents)
            seconds = train([batches], objective, checkpoint, resume=resume, on_step=on_step)
            pools.scale(coefficients)
            inputs = principal_inputs(task, model, pools, batches, config.drift_directions)
        finally:
            detach_pools(pools)
    adapter = replace(adapter, activation_counts=pools.activation_counts(), tensors=pools.merged_tensors() | inputs)
    merged = with_weights(base, merge(weights, [adapter]))
    accuracies = evaluate(merged, test_on, fabric)
    adapter = replace(
        adapter,
        accuracy=recorded(before, accuracies),
        moved=movement(model, merged, batches),  # the model's pools are detached: it is the one before the task
        coefficients=coefficients,
    )
    tested = {of.name: len(of.load("test")) for of in test_on}
    return Fitted(adapter, merged, accuracies, tested, pools.num_trainable, seconds)


def merge_coefficients(
    task: Task,
    base: Backbone,
    lineage: Sequence[Adapter],
    config: TrainConfig,
    start: Backbone,
    fabric: Fabric,
    on_step: Callable[[Step], None],
) -> Coefficients:
    """Return how much of the update is to be merged into each tower, for which the task may be learned once before."""
    if config.coefficients == "full":
        return Coefficients(image=1.0, text=1.0)
    part = held_out(task, cast("int", config.shots), config.seed)
    config = replace(config, coefficients="full", shots=0)
    probe = fit(part, base, lineage, config, test_on=[], start=start, before=UNTESTED, fabric=fabric, on_step=on_step)
    return fabric.broadcast(smallest_update(probe.adapter, start, part))


def for_tasks(config: TrainConfig, tasks: Sequence[Task], base: Backbone, fabric: Fabric) -> TrainConfig:
    """Return the settings with images per class and steps chosen for tasks that are learned at once."""
    shots = [shots_of(config, base.model_name, is_folder=task.origin is not None) for task in tasks]
    most = max(len(task.load("train").few_shot(own, config.seed)) for task, own in zip(tasks, shots, strict=True))
    same = shots[0] if len(set(shots)) == 1 else None
    return with_steps(replace(config, shots=same), base.model_name, most, fabric.world_size)


def untrained(
    task: Task, base: Backbone, parents: tuple[str, ...], config: TrainConfig, before: Accuracies, pools: PoolSet
) -> Adapter:
    """Return the adapter of a task before training: its metadata so far, and no tensors."""
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
        accuracy=recorded(before, UNTESTED),
        config={**asdict(config), "source": task.source, **base.own_preprocessing},
        activation_counts=pools.activation_counts(),
        tensors={},
        moved=Moved(words_mean=0.0, words_p95=0.0, images_kl=0.0, names_mean=0.0),
    )


def recorded(before: Accuracies, after: Accuracies) -> dict[When, dict[str, float]]:
    """Return the accuracies that an adapter records: among the classes of an image's own task."""
    return {
        "before": before["task"],
        "after": after["task"],
        "before_classes": before["task_classes"],
        "after_classes": after["task_classes"],
    }


@dataclass(frozen=True)
class Objective:
    """The loss of a training step: CLIP's loss on its batch, and the losses against forgetting earlier tasks.

    Each process has its share of the images and all prompts. Image features are gathered, so that every process
    computes the loss of the whole batch. The mean of the processes' gradients is then the gradient of that loss.

    Attributes:
        model: the model in training.
        trainee: the trained part of the model: its pools, or all its weights.
        past_columns: lora_B of earlier tasks by layer, for the AGO loss (``past_columns``).
        past_inputs: second moments of earlier tasks' inputs by layer, for the drift loss (``method.drift``).
    """

    model: Backbone
    trainee: Trainee
    config: TrainConfig
    fabric: Fabric
    past_columns: Mapping[str, Tensor] = field(default_factory=dict)
    past_inputs: Mapping[str, Tensor] = field(default_factory=dict)

    def loss(self, batch: Batch, anchors: WordAnchors | None = None, number: int = 1) -> Tensor:
        """Return the sum of the terms, a scalar; ``number`` is the step, which determines the anchors' words."""
        return added(self.terms(batch, anchors, number))

    def terms(self, batch: Batch, anchors: WordAnchors | None, number: int) -> dict[str, Tensor]:
        """Return the weighted terms of the loss by name, each a scalar."""
        config, model = self.config, self.model.model
        words = [anchors.tokens(number)] if anchors else []
        tokens = cut_to_longest(torch.cat([batch.tokens, *words]))
        with self.fabric.autocast():
            encoded = model.encode_image(batch.pixels), encode_text(model, tokens)
        # In float32 even if the towers run in bfloat16, whose rounding moves a logit by tenths at a scale of 100.
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
    """Train the objective's model in place. Tasks alternate, with ``config.iterations`` steps each.

    Args:
        batches: those of each task.
        objective: its settings have a number of steps (``for_tasks``).

    Returns:
        training time in seconds, including the time before an interruption.

    Raises:
        NotFinite: a loss, an updated weight or an optimiser moment is NaN or infinite; names the step and the first
            such value. Every process raises it, before anything of that step is saved.
    """
    model, trainee, config, fabric = objective.model, objective.trainee, objective.config, objective.fabric
    anchors = [WordAnchors(model, own, config.seed) if config.anchor_weight else None for own in batches]
    parameters = list(trainee.parameters())
    adamw = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=True)
    optimizer = cast("torch.optim.Optimizer", fabric.setup_optimizers(adamw))
    steps_before, seconds_before = checkpoint.load(trainee, adamw) if checkpoint and resume else (0, 0.0)
    iterations = cast("int", config.iterations) * len(batches)
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
        if not math.isfinite(mean_loss):  # before it gets into the weights
            seed_dropout(config.seed, number)
            first = first_fault(model.model, batch.pixels, terms, fabric)
            raise not_finite(number, f"the loss is {mean_loss}, and the first", first, config, fabric)
        optimizer.step()
        if not all_finite([*parameters, *(state["exp_avg_sq"] for state in adamw.state.values())]):
            broken = first_not_finite(trained(trainee, adamw)) or "the square of a gradient"
            raise not_finite(number, "after its update the first", broken, config, fabric)
        rate = len(batch.labels) / (time.perf_counter() - step_started)
        on_step(Step(number, iterations, mean_loss, float(parts["contrastive"].detach()), rate))
        if checkpoint and fabric.is_global_zero:
            seconds = seconds_before + time.perf_counter() - started
            checkpoint.save_when_due(number, seconds, trainee, adamw)
    model.model.eval()
    return seconds_before + time.perf_counter() - started


def added(terms: Mapping[str, Tensor]) -> Tensor:
    """Return the sum of a loss's terms."""
    return functools.reduce(torch.add, terms.values())


def seed_dropout(seed: int, number: int) -> None:
    """Seed the dropout of a step by its number, so that it doesn't depend on earlier draws."""
    torch.manual_seed(random.Random(f"dropout {seed} {number}").getrandbits(63))


def trained(trainee: Trainee, adamw: torch.optim.AdamW) -> dict[str, Tensor]:
    """Return the tensors that an update changes, by name: weights, then second moments of their gradients."""
    state = trainee.state()
    names = {tensor.data_ptr(): name for name, tensor in state.items()}
    moments = {names[weight.data_ptr()]: moment["exp_avg_sq"] for weight, moment in adamw.state.items()}
    return {f"weight {name}": tensor for name, tensor in state.items()} | {
        f"the second moment of {name}'s gradient": moment for name, moment in moments.items()
    }


def not_finite(number: int, what: str, first: str, config: TrainConfig, fabric: Fabric) -> NotFinite:
    """Return the error of a training step."""
    precision = fabric.strategy.precision.precision
    exact = "" if precision == "32-true" else f", or --precision 32-true instead of {precision}"
    return NotFinite(
        f"training step {number}: {what} to be NaN or infinite is {first}; give a lower --lr than {config.lr:g}{exact}"
    )


def batches_of(task: Task, model: Backbone, config: TrainConfig, fabric: Fabric) -> Batches:
    """Return a task's batches, with this process's share of the images."""
    return Batches(task, model, config, rank=fabric.global_rank, world_size=fabric.world_size)


def checkpoint_of(
    path: Path | None,
    batches: Sequence[Batches],
    base: Backbone,
    config: TrainConfig,
    fabric: Fabric,
    parents: Sequence[str],
) -> Checkpoint | None:
    """Return the checkpoint of a training, identified by everything the result depends on; None without a path."""
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
    """Return a fabric of the backbone's device alone."""
    return Fabric(accelerator=backbone.device.type, devices=1)


def cosine(lr: float, number: int, iterations: int) -> float:
    """Return the learning rate of a step, counted from 1: half a cosine from ``lr`` down to ``MIN_LR``."""
    return MIN_LR + (lr - MIN_LR) * (1 + math.cos(math.pi * (number - 1) / iterations)) / 2


def average_gradients(fabric: Fabric, parameters: Sequence[Tensor]) -> None:
    """Replace each gradient by its mean over all processes, in a single all-reduce."""
    if fabric.world_size == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    flat = cast("Tensor", fabric.all_reduce(flat, reduce_op="mean"))
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def past_columns(lineage: Sequence[Adapter], device: torch.device) -> dict[str, Tensor]:
    """Return by layer lora_B of all earlier tasks, concatenated: (d_out, past experts). Empty for an empty lineage."""
    if not lineage:
        return {}
    return {
        module: torch.cat([adapter.experts(module)[1] for adapter in lineage], dim=1).to(device)
        for module in lineage[0].modules()
    }
