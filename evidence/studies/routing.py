"""Measure how the router chooses: whether its choice depends on the image, the class, and the task.

Run: python -m evidence.studies.routing

Each shipped task is learned from the base up to where the experts to merge are fixed. Then every training image (image
tower) and every prompt (text tower) names the experts of its choice in every layer.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import cast

import torch
from torch import Tensor, nn

from clipweld.trainer.base.backbone import Backbone, load_backbone, with_weights
from clipweld.trainer.base.batches import Batches
from clipweld.trainer.base.cls_block import encode_text
from clipweld.trainer.config import TrainConfig, train_config
from clipweld.trainer.files import replacing
from clipweld.trainer.learning.fit import Objective, Step, for_tasks, one_device, train
from clipweld.trainer.method import PoolSet, attach_pools, detach_pools
from clipweld.trainer.method.injection import tower_of
from clipweld.trainer.tasks import Task, shipped_tasks
from clipweld.trainer.text import prompt_of
from evidence import command_line, markdown

ROUTERS = {
    "learned": {"router": "learned"},
    "learned, 4 of 12 active": {"router": "learned", "k_active": 4},
    "fixed": {"router": "fixed"},
    "fixed, texts on token 0": {"router": "fixed", "route_on": "first"},
}
Choices = dict[str, tuple[Tensor, Tensor]]  # by layer: chosen experts (inputs, k_active), classes (inputs,)


def main(*, out: Path = Path("runs/results/routing.json"), iterations: int | None = None, show: bool = False) -> None:
    """Learn all shipped tasks with several routers, and print a Markdown table.

    Args:
        out: file for the figures.
        iterations: steps per task. Default: those of the preset.
        show: print the figures in --out instead.
    """
    if not show:
        figures = {name: measured(settings, iterations) for name, settings in ROUTERS.items()}
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as staged:
            staged.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print("\n".join(table(json.loads(out.read_text(encoding="utf-8")))))


def measured(settings: Mapping[str, object], iterations: int | None) -> dict[str, dict[str, float]]:
    """Return by tower the means over tasks and layers.

    ``image``, ``class`` and ``shuffled`` are mutual informations in bits of an input's experts and, in this order, the
    input itself, its class, and classes dealt at random, which show how much of ``class`` is chance. ``shared`` is the
    share of a task's merged experts that another task merges too, although both start from the same random experts.
    """
    base = load_backbone("mini")
    config = train_config("mini", seed=0, iterations=iterations, **settings)
    votes: dict[str, list[Choices]] = {"image": [], "text": []}
    merged: dict[str, list[dict[str, set[int]]]] = {"image": [], "text": []}
    for task in shipped_tasks():
        choices, experts = learn(task, base, config)
        for tower in votes:
            votes[tower].append({layer: own for layer, own in choices.items() if tower_of(layer) == tower})
            merged[tower].append({layer: own for layer, own in experts.items() if tower_of(layer) == tower})
    return {tower: informations(votes[tower]) | {"shared": shared(merged[tower])} for tower in votes}


def learn(task: Task, base: Backbone, config: TrainConfig) -> tuple[Choices, dict[str, set[int]]]:
    """Return the choices of a task's images and prompts when the experts to merge are fixed, and these experts."""
    fabric = one_device(base)
    config = for_tasks(config, [task], base, fabric)
    model = with_weights(base, base.model.state_dict())
    torch.manual_seed(config.seed)
    pools = attach_pools(model.model, config)
    batches = Batches(task, model, config)
    steps = cast("int", config.iterations)
    last_vote = steps - round(config.consolidate * steps)
    found: list[tuple[Choices, dict[str, set[int]]]] = []

    def on_step(step: Step) -> None:
        if step.number == last_vote:
            experts = {layer: set(pool.router.most_activated().tolist()) for layer, pool in pools.pools.items()}
            found.append((chosen(task, model, pools, batches, config), experts))
            raise Voted

    try:
        train([batches], Objective(model, pools, config, fabric), None, resume=False, on_step=on_step)
    except Voted:
        pass
    finally:
        detach_pools(pools)
    return found[0]


class Voted(Exception):
    """The experts to merge are fixed; the rest of the training doesn't matter here."""


@torch.no_grad()
def chosen(task: Task, model: Backbone, pools: PoolSet, batches: Batches, config: TrainConfig) -> Choices:
    """Return the experts that each training image and each prompt would vote for, in every layer."""
    votes: dict[str, list[Tensor]] = {}

    def note(layer: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def hook(_pool: nn.Module, inputs: tuple[Tensor]) -> None:
            router = pools.pools[layer].router
            logits = cast("nn.Linear", router.linear)(router.position.pick(inputs[0]))
            votes.setdefault(layer, []).append(logits.topk(router.k_active, dim=-1).indices)

        return hook

    model.model.eval()
    hooks = [pool.register_forward_pre_hook(note(layer)) for layer, pool in pools.pools.items()]
    images = task.load("train").few_shot(cast("int", config.shots), config.seed)
    for pixels in batches.chunks(128):
        model.model.encode_image(pixels)
    pairs = list(itertools.product(range(len(task.class_names)), task.templates))
    prompts = [prompt_of(template, task.class_names[label]) for label, template in pairs]
    encode_text(model.model, model.tokenizer(prompts))
    for hook in hooks:
        hook.remove()
    labels = {"image": torch.tensor(images.labels), "text": torch.tensor([label for label, _ in pairs])}
    return {layer: (torch.cat(own), labels[tower_of(layer)]) for layer, own in votes.items()}


def informations(tasks: Sequence[Choices]) -> dict[str, float]:
    """Return the mutual informations in bits, mean over tasks and layers."""
    found: dict[str, list[float]] = {"image": [], "class": [], "shuffled": []}
    generator = torch.Generator().manual_seed(0)
    for experts, classes in itertools.chain.from_iterable(choices.values() for choices in tasks):
        dealt = classes[torch.randperm(len(classes), generator=generator)]
        inputs = torch.arange(len(classes))
        for name, given in (("image", inputs), ("class", classes), ("shuffled", dealt)):
            found[name].append(information(experts, given))
    return {name: mean(values) for name, values in found.items()}


def information(experts: Tensor, given: Tensor) -> float:
    """Return the mutual information in bits of what is given about inputs and one of their experts, drawn at random.

    Args:
        experts: int64 (inputs, k_active).
        given: int64 (inputs,).
    """
    joint = torch.zeros(int(given.max()) + 1, int(experts.max()) + 1, dtype=torch.float64)
    joint.index_put_(
        (given[:, None].expand_as(experts), experts), torch.tensor(1.0, dtype=torch.float64), accumulate=True
    )
    joint /= joint.sum()
    apart = joint.sum(dim=1, keepdim=True) * joint.sum(dim=0, keepdim=True)
    return torch.xlogy(joint, joint / apart.clamp(min=1e-300)).sum().item() / math.log(2)


def shared(tasks: Sequence[Mapping[str, set[int]]]) -> float:
    """Return the share of a task's merged experts that another task merges too, mean over layers and pairs of tasks."""
    pairs = itertools.combinations(tasks, 2)
    return mean(len(one[layer] & other[layer]) / len(one[layer]) for one, other in pairs for layer in one)


def table(figures: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Iterator[str]:
    """Yield Markdown with a row per router and tower."""
    headings = (
        "router",
        "tower",
        "bits about the input",
        "about its class",
        "shuffled",
        "merged by another task too, %",
    )
    rows = (
        (router, tower, *(f"{own[name]:.3f}" for name in ("image", "class", "shuffled")), f"{100 * own['shared']:.0f}")
        for router, towers in figures.items()
        for tower, own in towers.items()
    )
    yield from markdown.table(headings, rows, text=2)


if __name__ == "__main__":
    command_line.run(main)
