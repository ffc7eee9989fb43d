"""Plant NaN, infinity and overflow at random places, and check that each is reported where it first occurs.

Run: python -m evidence.trust.numbers --out runs/trust/numbers.json
"""

from __future__ import annotations

import math
import random
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import numpy as np
import onnx
import torch
from cyclopts import Parameter
from onnx import numpy_helper
from PIL import Image
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor

from clipweld.client import ZeroShotClassifier
from clipweld.client._transport import Transport
from clipweld.client.errors import ServerError
from clipweld.exporter import errors
from clipweld.exporter.checks.parity import measure_parity
from clipweld.exporter.config import Precision
from clipweld.exporter.graph.onnx_file import to_bytes
from clipweld.exporter.graph.precision import Towers
from clipweld.exporter.release.publish import release
from clipweld.exporter.serving.triton import serve
from clipweld.exporter.store.lineage import on_weights
from clipweld.exporter.store.repository import BASE_VERSION, TOWERS, Repository, towers
from clipweld.trainer.adapters.adapter import Adapter, load_adapter, save_adapter
from clipweld.trainer.adapters.merge import merge
from clipweld.trainer.base.backbone import DEFAULT_PRETRAINED, Backbone, load_backbone, with_weights
from clipweld.trainer.config import train_config
from clipweld.trainer.errors import NotFinite, TrainerError, WeightsError
from clipweld.trainer.learning.fit import fit
from clipweld.trainer.method import attach_pools
from clipweld.trainer.tasks import Task, load_task, sample
from evidence import command_line
from evidence.command_line import POSITIVE
from evidence.trust.record import Record

NOT_NUMBERS = (math.nan, math.inf, -math.inf)
LABELS = ("a cat", "a dog", "a cow")
STEPS = 4
# Weights with rows that few inputs read, or none: a bad number there may have no effect.
LOOKED_UP = ("token_embedding.weight", "positional_embedding")


@dataclass(frozen=True)
class Plant:
    """One planted fault.

    Attributes:
        meet: function that must fail because of the fault.
        error: class of the expected error.
        words: texts that its message must contain, in any order.
    """

    meet: Callable[[], object]
    error: type[Exception]
    words: Sequence[str]


@dataclass
class World:
    """Where faults are planted. Faults go into copies, so nothing here changes.

    Attributes:
        base: the small CLIP.
        task: the task that is learned.
        adapter: the adapter of that task.
        repository: a repository whose version 2 has the adapter merged.
        url: address of the server of the repository.
        folder: for temporary files.
    """

    base: Backbone
    task: Task
    adapter: Adapter
    repository: Repository
    url: str
    folder: Path

    @cached_property
    def half(self) -> Towers:
        """Both towers, traced in float16; cached, because tracing is slow."""
        return Towers(self.base, Precision.fp16, towers(self.repository.store / str(BASE_VERSION)))

    @cached_property
    def samples(self) -> tuple[list[Image.Image], list[str]]:
        """Images and prompts with which towers are compared."""
        images, prompts = sample(9)
        return images, prompts[:12]

    @cached_property
    def trained(self) -> list[str]:
        """Names of the trained tensors, in the order of the optimizer."""
        pools = attach_pools(with_weights(self.base, self.base.model.state_dict()).model, train_config("mini"))
        return [name for name, tensor in pools.state().items() if tensor.requires_grad]

    def learn(
        self,
        base: Backbone,
        on_step: Callable = lambda step: None,
        lineage: Sequence[Adapter] = (),
        **settings: Any,
    ) -> None:
        """Learn the task for a few steps."""
        quick = {"iterations": STEPS, "shots": 2, "batch_size": 4, "anchor_weight": 0.0, "drift_weight": 0.0}
        fit(self.task, base, lineage, train_config("mini", **(quick | settings)), test_on=[], on_step=on_step)

    def changed(self, change: dict[str, Tensor]) -> Backbone:
        """Return the base with some weights replaced."""
        return with_weights(self.base, self.base.model.state_dict() | change)


def main(
    *,
    plants: Annotated[
        int, Parameter(validator=POSITIVE, help="Number of faults to plant, of each kind in turn.")
    ] = 200,
    only: Annotated[int | None, Parameter(help="Plant only the fault with this number.")] = None,
    seed: Annotated[int, Parameter(help="Seed of the places and values.")] = 0,
    out: Annotated[Path, Parameter(help="JSON file for the figures.")] = Path("runs/trust/numbers.json"),
) -> None:
    """Plant faults in weights, adapters, training, exported towers and answers; each must be detected and located."""
    numbers = range(plants) if only is None else [only]
    with Record(out) as record, world() as ground:
        record.figures |= planted(record, ground, seed, track(numbers, "plants", console=Console(stderr=True)))


@contextmanager
def world() -> Iterator[World]:
    """Yield the small CLIP with one task learned in a few steps, released and served."""
    with tempfile.TemporaryDirectory(prefix="clipweld-numbers-") as name:
        folder, base, task = Path(name), load_backbone("mini"), load_task("emoji")
        fitted = fit(task, base, [], train_config("mini", iterations=STEPS, shots=2, batch_size=8), test_on=[task])
        repository = Repository(folder / "served" / "models", "clip")
        release(base, [fitted.adapter], repository, *sample(9))
        with serve(repository.path) as server:
            yield World(base, task, fitted.adapter, repository, server.url, folder)


def planted(record: Record, ground: World, seed: int, numbers: Sequence[int], kinds: Sequence[str] = ()) -> dict:
    """Plant faults, and count those that were detected with the right message.

    Args:
        numbers: numbers of the faults. The number alone determines the kind; seed and number determine the rest.
        kinds: kinds to use; empty for all.
    """
    kinds = kinds or list(KINDS)
    done, found = Counter(), Counter()
    for number in numbers:
        kind = kinds[number % len(kinds)]
        plant = KINDS[kind](ground, random.Random(f"{seed} {number}"))
        fault = missed(plant)
        done[kind] += 1
        found[kind] += fault is None
        if fault is not None:
            record.broken.append(f"{kind}, seed {seed}, number {number}: {fault}")
    return {"planted": done.total(), "found and named": found.total(), "of each kind": dict(found)}


def missed(plant: Plant) -> str | None:
    """Return why a fault was missed, or None if it was detected with the right message."""
    try:
        plant.meet()
    except plant.error as exc:
        if lacking := [word for word in plant.words if word not in str(exc)]:
            return f"expected {lacking} to be said, got: {exc}"
        return None
    except Exception as exc:  # any other error means that the fault was missed
        return f"expected {plant.error.__name__} with {list(plant.words)}, got {type(exc).__name__}: {exc}"
    return f"expected {plant.error.__name__} with {list(plant.words)}, nothing was said"


def weight_in_a_file(ground: World, draw: random.Random) -> Plant:
    """Spoil one number in a checkpoint."""
    weights = load_file(DEFAULT_PRETRAINED["mini"])
    name = draw.choice(sorted(weights))
    weights[name] = spoiled(weights[name], draw)
    file = ground.folder / "weights.safetensors"
    save_file(weights, file)
    return Plant(lambda: load_backbone("mini", str(file)), WeightsError, [name])


def number_in_an_adapter(ground: World, draw: random.Random) -> Plant:
    """Spoil one number in an adapter file whose hash fits."""
    name = draw.choice(sorted(ground.adapter.tensors))
    tensors = ground.adapter.tensors | {name: spoiled(ground.adapter.tensors[name], draw)}
    file = ground.folder / "adapter.safetensors"
    save_adapter(replace(ground.adapter, tensors=tensors), file)

    def meet() -> None:
        adapter = load_adapter(file)
        merge(ground.base.model.state_dict(), [adapter])
        ground.learn(ground.base, lineage=[replace(adapter, task="another")], drift_weight=1.0)

    return Plant(meet, TrainerError, [name.rpartition(".")[0]])


def product_in_a_merge(ground: World, draw: random.Random) -> Plant:
    """Make an adapter of finite numbers whose product overflows float32."""
    module = draw.choice(ground.adapter.modules())
    names = [f"{module}.{part}" for part in ("lora_A", "lora_B")]
    parts = {name: torch.full_like(ground.adapter.tensors[name], 10 ** draw.uniform(20, 37)) for name in names}
    adapter = replace(ground.adapter, tensors=ground.adapter.tensors | parts)
    words = [repr(adapter.task), f"layer {module}"]
    return Plant(lambda: merge(ground.base.model.state_dict(), [adapter]), NotFinite, words)


def weight_in_training(ground: World, draw: random.Random) -> Plant:
    """Spoil one number of a frozen weight."""
    names = [name for name in ground.base.model.state_dict() if name not in LOOKED_UP and name != "logit_scale"]
    name = draw.choice(names)
    base = ground.changed({name: spoiled(ground.base.model.state_dict()[name], draw)})
    # A pool splits in_proj into q, k and v, and moves its layer into a submodule, so only the parent's name is certain.
    parent, _, last = name.rpartition(".")
    stacked = last.startswith("in_proj_")
    words = ["training step 1:", "weight ", parent if stacked else parent or name]
    return Plant(lambda: ground.learn(base), NotFinite, words)


def output_in_training(ground: World, draw: random.Random) -> Plant:
    """Spoil one channel of a layer's output, at one step."""
    base, at, value, steps = ground.changed({}), draw.randint(1, STEPS), draw.choice(NOT_NUMBERS), []
    names = ["visual.conv1", "visual.ln_pre", "visual.ln_post", "ln_final", "token_embedding"]
    blocks = [f"{tower}transformer.resblocks.{n}" for tower, count in (("visual.", 6), ("", 4)) for n in range(count)]
    parts = ("", ".ln_1", ".ln_2", ".mlp.c_fc", ".mlp.c_proj", ".mlp")
    names += [f"{block}{part}" for block in blocks for part in parts]
    name = draw.choice(names)

    def spoil(_layer: torch.nn.Module, _inputs: tuple, output: Tensor) -> Tensor:
        if len(steps) + 1 != at:
            return output
        output = output.clone()
        output[..., 0] = value
        return output

    base.model.get_submodule(name).register_forward_hook(spoil)
    return Plant(
        lambda: ground.learn(base, steps.append), NotFinite, [f"training step {at}:", f"the output of layer {name}"]
    )


def gradient_in_training(ground: World, draw: random.Random) -> Plant:
    """Spoil one number of a gradient, at one step; 1e30 is finite, but its square overflows float32."""
    at, value, place = draw.randint(1, STEPS), draw.choice([*NOT_NUMBERS, 1e30]), draw.randrange(len(ground.trained))
    calls = []

    def spoil(_fabric: object, parameters: Sequence[Tensor]) -> None:
        calls.append(parameters)
        if len(calls) == at:
            gradient = parameters[place].grad
            gradient.view(-1)[draw.randrange(gradient.numel())] = value

    def meet() -> None:
        with mock.patch("clipweld.trainer.learning.fit.average_gradients", spoil):
            ground.learn(ground.base)

    return Plant(meet, NotFinite, [f"training step {at}: after its update", ground.trained[place]])


def trained_weight(ground: World, draw: random.Random) -> Plant:
    """Spoil one number of a trained tensor between two steps."""
    after, place, value = draw.randint(1, STEPS - 1), draw.randrange(len(ground.trained)), draw.choice(NOT_NUMBERS)
    weights = []

    def spoil(step: Any) -> None:
        if step.number == after:
            weight = weights[place].data
            weight.view(-1)[draw.randrange(weight.numel())] = value

    def meet() -> None:
        with mock.patch(
            "clipweld.trainer.learning.fit.average_gradients", lambda _, parameters: weights.extend(parameters)
        ):
            ground.learn(ground.base, spoil)

    return Plant(meet, NotFinite, [f"training step {after + 1}: ", f"weight {ground.trained[place]}"])


def learning_rate(ground: World, draw: random.Random) -> Plant:
    """Train with a learning rate so high that no training stays finite."""
    lr, steps = 10 ** draw.uniform(12, 37), []

    def meet() -> None:
        try:
            ground.learn(ground.base, steps.append, lr=lr, iterations=40)
        except NotFinite as exc:
            number = int(re.search(r"training step (\d+)", str(exc))[1])
            if len(steps) != number - 1 or not all(math.isfinite(step.loss) for step in steps):
                raise AssertionError(f"step {number} was named after losses {[step.loss for step in steps]}") from exc
            raise

    return Plant(meet, NotFinite, [f"a lower --lr than {lr:g}"])


def weight_beyond_float16(ground: World, draw: random.Random) -> Plant:
    """Set a weight to a value that fits in float32 but not in float16."""
    tower, names = draw.choice([("image", "visual."), ("text", "")])
    weights = ground.base.model.state_dict()
    mine = [n for n in weights if n != "logit_scale" and n.startswith("visual.") == bool(names)]
    name = draw.choice(mine)
    weight = weights[name].clone()
    weight.view(-1)[draw.randrange(weight.numel())] = draw.choice([-1, 1]) * 10 ** draw.uniform(5, 30)
    file = ground.repository.file(tower, BASE_VERSION)
    return Plant(lambda: ground.half.cast(tower, weights | {name: weight}, file), errors.NotFinite, [f"weight {name}"])


def sum_beyond_float16(ground: World, draw: random.Random) -> Plant:
    """Set two biases that fit in float16 but whose sum, in the residual stream, does not."""
    kind, prefix, blocks = draw.choice([("image", "visual.", 6), ("text", "", 4)])
    change = {}
    for block in draw.sample(range(blocks), 2):
        name = f"{prefix}transformer.resblocks.{block}.mlp.c_proj.bias"
        change[name] = ground.base.model.state_dict()[name].clone()
        change[name][3] = 6e4
    weights = ground.base.model.state_dict() | change
    files = dict(zip(TOWERS, towers(ground.repository.store / str(BASE_VERSION)), strict=True))

    def meet() -> None:
        half = ground.folder / "half.onnx"
        half.write_bytes(to_bytes(ground.half.cast(kind, weights, files[kind])))
        measure_parity(on_weights(ground.base, weights), *(files | {kind: half}).values(), *ground.samples)

    what = {"image": "images", "text": "prompts"}[kind]
    return Plant(meet, errors.NotFinite, [f"features of {what} in ONNX Runtime"])


def weight_in_a_tower(ground: World, draw: random.Random) -> Plant:
    """Spoil one number in an exported file."""
    files = dict(zip(TOWERS, towers(ground.repository.store / str(BASE_VERSION)), strict=True))
    kind = draw.choice(TOWERS)
    broken = ground.folder / "broken.onnx"
    spoil_file(files[kind], broken, ground.base.model.state_dict(), draw)
    what = {"image": "images", "text": "prompts"}[kind]
    chosen = (files | {kind: broken}).values()
    return Plant(
        lambda: measure_parity(ground.base, *chosen, *ground.samples),
        errors.NotFinite,
        [f"features of {what} in ONNX Runtime"],
    )


def answer(ground: World, draw: random.Random) -> Plant:
    """Spoil a row of the features in a server's answer, before the client reads it."""
    kind, value = draw.choice(TOWERS), draw.choice([*NOT_NUMBERS, 0.0, 1e30, 2.0])
    infer = Transport.infer

    async def spoil(self: Transport, model: str, *args: Any) -> np.ndarray:
        features = await infer(self, model, *args)
        if model == f"clip_{kind}":
            features = features.copy()
            row = draw.randrange(len(features))
            features[row] = features[row] * value if value in (0.0, 2.0) else value
        return features

    def meet() -> None:
        with mock.patch.object(Transport, "infer", spoil):
            ask(ground, ground.url)

    return Plant(meet, ServerError, [f"clip_{kind} version 2"])


def served_tower(ground: World, draw: random.Random) -> Plant:
    """Spoil one number in a file that a real Triton serves."""
    folder, kind = ground.folder / "copy", draw.choice(TOWERS)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ground.repository.path.parent, folder)
    copied = Repository(folder / ground.repository.path.name, "clip")
    file = copied.model(kind) / "2" / "model.onnx"
    spoil_file(file, file, ground.base.model.state_dict(), draw)

    def meet() -> None:
        with serve(copied.path) as server:
            ask(ground, server.url)

    return Plant(meet, ServerError, [f"clip_{kind} version 2"])


KINDS: dict[str, Callable[[World, random.Random], Plant]] = {
    "a weight in a checkpoint": weight_in_a_file,
    "a number in an adapter": number_in_an_adapter,
    "a product beyond float32 in a merge": product_in_a_merge,
    "a frozen weight in training": weight_in_training,
    "a layer's output in training": output_in_training,
    "a gradient in training": gradient_in_training,
    "a trained weight between steps": trained_weight,
    "a learning rate that diverges": learning_rate,
    "a weight beyond float16": weight_beyond_float16,
    "a sum beyond float16": sum_beyond_float16,
    "a weight in an exported tower": weight_in_a_tower,
    "a server's answer": answer,
    "a weight in a served tower": served_tower,
}


def spoiled(tensor: Tensor, draw: random.Random) -> Tensor:
    """Return a copy in which one number is NaN or infinite."""
    copy = tensor.clone()
    copy.view(-1)[draw.randrange(copy.numel())] = draw.choice(NOT_NUMBERS)
    return copy


def spoil_file(source: Path, target: Path, names: dict[str, Tensor], draw: random.Random) -> None:
    """Write a copy of a tower in which one number of a weight that every input uses is NaN or infinite."""
    model = onnx.load(source)
    used = [t for t in model.graph.initializer if t.name in names and t.name not in LOOKED_UP]
    weight = draw.choice(used)
    array = numpy_helper.to_array(weight).copy()
    array.flat[draw.randrange(array.size)] = draw.choice(NOT_NUMBERS)
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    target.unlink(missing_ok=True)  # may be a hard link
    onnx.save(model, target)


def ask(ground: World, url: str) -> None:
    """Classify three images with a client."""
    with ZeroShotClassifier(url, retries=0) as clip:
        list(clip.classify(ground.samples[0][:3], labels=LABELS))


if __name__ == "__main__":
    command_line.run(main)
