"""The cost of a training step, compared with a naive step and with a lower bound on this machine.

The naive step implements the formulas literally: one prompt per image, over the whole context length; every block
computes every token; experts are multiplied out into dense updates; attention is not fused; dropout is torch's;
everything is in float32. Both steps must give the same loss and the same gradients, which is checked before anything is
timed, so that they differ in time and memory only.

The floor is the arithmetic that every method of this kind needs: the frozen towers' forward pass and the backward pass
through them, at the speed at which the machine multiplies matrices of their size.
"""

from __future__ import annotations

import copy
import random
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from typing import Literal

import open_clip
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from clipweld.trainer.base.backbone import Backbone, load_backbone
from clipweld.trainer.base.batches import Batch
from clipweld.trainer.base.cls_block import ClsBlock, cut_to_longest, encode_text
from clipweld.trainer.config import train_config
from clipweld.trainer.errors import BenchError
from clipweld.trainer.launch import Precision
from clipweld.trainer.learning.dry_run import peak_memory
from clipweld.trainer.learning.fit import Objective, one_device
from clipweld.trainer.method import ExpertPool, attach_pools, contrastive_loss
from clipweld.trainer.text import prompt_of

NUM_CLASSES = 100
TEMPLATE = "a photo of a {}, a kind of thing."
# Relative difference of losses and gradients that float32 rounding explains.
TOLERANCE = 1e-3
FEW = 3  # with fewer pairs, smallest and largest say little
WIDE = 0.1  # of a ratio: if half its range is wider, two machines or two methods can't be compared

Kind = Literal["pool", "naive"]


@dataclass(frozen=True)
class BenchResult:
    """A training step of the pool, compared with a naive one and the floor.

    Attributes:
        precision: of the pool's step; the naive step is in float32.
        loss_difference, gradient_difference: relative differences of the two steps in float32.
        pool_seconds, naive_seconds: median over the pairs.
        speedup: median over the pairs of naive / pool; the steps of a pair run directly after each other.
        speedup_range: smallest and largest over the pairs.
        naive_flops: floating-point operations of the naive step.
        floor_flops: floating-point operations of the frozen towers, forward and backward.
        flops_per_second: the machine's speed of matrix products in this precision, median over the pairs.
        floor_seconds: ``floor_flops / flops_per_second``.
        times_floor: median over the pairs of pool seconds / floor seconds, each with the pair's own speed.
        times_floor_range: smallest and largest over the pairs.
        pool_bytes, naive_bytes: peak memory: of tensors on a GPU, or of a separate process on a CPU.
    """

    model: str
    device: str
    precision: str
    batch_size: int
    pairs: int
    trainable_parameters: int
    loss_difference: float
    gradient_difference: float
    pool_seconds: float
    naive_seconds: float
    speedup: float
    speedup_range: tuple[float, float]
    naive_flops: int
    floor_flops: int
    flops_per_second: float
    floor_seconds: float
    times_floor: float
    times_floor_range: tuple[float, float]
    pool_bytes: int
    naive_bytes: int

    @property
    def warning(self) -> str | None:
        """A sentence why the figures are not reliable, or None if they are."""
        step = "give more --pairs, on a machine that does nothing else"
        if self.pairs < FEW:
            return f"{self.pairs} pairs are too few to tell how sure the figures are; {step}"
        for name, ratio, (low, high) in (
            ("speedup", self.speedup, self.speedup_range),
            ("times_floor", self.times_floor, self.times_floor_range),
        ):
            if (high - low) / 2 > WIDE * ratio:
                return f"{name} {ratio:.2f} lies between {low:.2f} and {high:.2f}, too wide to mean anything; {step}"
        return None


def bench(
    model: str, pretrained: str | None = None, *, batch_size: int, pairs: int, accelerator: str, precision: Precision
) -> BenchResult:
    """Time alternating steps of both kinds, after checking that both compute the same.

    Args:
        model, pretrained: as for ``load_backbone``.
        batch_size: images per step.
        pairs: number of steps of each kind.
        accelerator, precision: as for Lightning Fabric.

    Raises:
        BenchError: the two steps differ by more than rounding.
    """
    build = partial(Steps, model, pretrained, batch_size, accelerator, precision)
    pool_bytes, naive_bytes = _peak(build, "pool"), _peak(build, "naive")  # while this process holds little memory
    steps = build()
    loss_difference, gradient_difference = steps.differences()
    for name, difference in (("losses", loss_difference), ("gradients", gradient_difference)):
        if not difference <= TOLERANCE:
            raise BenchError(
                f"{name} of the two steps differ by {difference:.1e} of their size, rounding explains {TOLERANCE:g}; "
                "one of them is wrong, so their times say nothing"
            )
    bare = load_backbone(model, pretrained)
    floor_flops = frozen_flops(bare.model, random_batch(bare, batch_size))
    timed = (steps.pool, steps.naive, steps.product)
    steps.pool()
    steps.product()
    with FlopCounterMode(display=False) as counter:
        steps.naive()
    pool, naive, product = zip(*([steps.seconds(step) for step in timed] for _ in range(pairs)), strict=True)
    speedups = [slow / fast for slow, fast in zip(naive, pool, strict=True)]
    rates = [steps.product_flops / seconds for seconds in product]
    rate = statistics.median(rates)
    times_floor = [fast * its / floor_flops for fast, its in zip(pool, rates, strict=True)]
    return BenchResult(
        model=model,
        device=_name(steps.device),
        precision=precision,
        batch_size=batch_size,
        pairs=pairs,
        trainable_parameters=steps.pools.num_trainable,
        loss_difference=loss_difference,
        gradient_difference=gradient_difference,
        pool_seconds=statistics.median(pool),
        naive_seconds=statistics.median(naive),
        speedup=statistics.median(speedups),
        speedup_range=(min(speedups), max(speedups)),
        naive_flops=counter.get_total_flops(),
        floor_flops=floor_flops,
        flops_per_second=rate,
        floor_seconds=floor_flops / rate,
        times_floor=statistics.median(times_floor),
        times_floor_range=(min(times_floor), max(times_floor)),
        pool_bytes=pool_bytes,
        naive_bytes=naive_bytes,
    )


class Steps:
    """A model with fresh pools and a batch of random images, for steps of both kinds.

    Experts are picked without a router, because in the naive step prompts that occur twice would vote twice.

    Attributes:
        product_flops: floating-point operations of ``product``.
    """

    def __init__(
        self, model: str, pretrained: str | None, batch_size: int, accelerator: str, precision: Precision
    ) -> None:
        torch.manual_seed(0)
        fabric = Fabric(accelerator=accelerator, devices=1, precision=precision)
        self.device = fabric.device
        backbone = load_backbone(model, pretrained)
        backbone.model.to(self.device)
        self._model = backbone.model
        self._batch = random_batch(backbone, batch_size)
        config = replace(
            train_config(model), router="none", ago="off", drift_weight=0.0, anchor_weight=0.0, consolidate=0.0
        )
        self.pools = attach_pools(self._model, config)
        for pool in self.pools.pools.values():
            nn.init.normal_(pool.lora_B, std=0.02)  # with zeros, the gradient of lora_A would be zero
        self._objective = Objective(backbone, self.pools, config, fabric)
        self._optimizer = torch.optim.AdamW(self.pools.parameters(), lr=1e-6, fused=True)
        layer = self._model.visual.transformer.resblocks[0].mlp.c_fc.weight
        rows = batch_size * (self._model.visual.positional_embedding.shape[0])
        self._factors = torch.randn(rows, layer.shape[1], device=self.device), layer.T
        self.product_flops = 2 * rows * layer.numel()
        self._model.train()

    def pool(self) -> None:
        """Take a step as ``trainer fit`` does."""
        self._step(self._objective.loss(self._batch))

    def naive(self) -> None:
        """Take the same step naively."""
        self._step(self._naive_loss())

    @torch.no_grad()
    def product(self) -> Tensor:
        """Compute the matrix product of the image tower's largest layer, in the precision of the pool's step."""
        with self._objective.fabric.autocast():
            return self._factors[0] @ self._factors[1]

    def differences(self) -> tuple[float, float]:
        """Return the relative differences of losses and gradients of both steps, in float32 without dropout."""
        dropouts = [pool.dropout for pool in self.pools.pools.values()]
        rate = dropouts[0].p
        for dropout in dropouts:
            dropout.p = 0.0
        exact = replace(self._objective, fabric=one_device(self._objective.model))
        found = []
        for loss in (exact.loss(self._batch), self._naive_loss()):
            parts = torch.autograd.grad(loss, list(self.pools.parameters()))
            found.append((loss.detach(), torch.cat([part.flatten() for part in parts])))
        for dropout in dropouts:
            dropout.p = rate
        losses, gradients = (float((ours - its).norm() / its.norm()) for ours, its in zip(*found, strict=True))
        return losses, gradients

    def seconds(self, step: Callable[[], object]) -> float:
        """Time one call, until the device has finished it."""
        started = time.perf_counter()
        step()
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - started

    def _step(self, loss: Tensor) -> None:
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()

    def _naive_loss(self) -> Tensor:
        model, batch = self._model, self._batch
        with self._multiplied_out(), every_token(model), sdpa_kernel(SDPBackend.MATH):
            image_features = model.encode_image(batch.pixels, normalize=True)
            text_features = model.encode_text(batch.tokens[batch.text_of], normalize=True)
            return contrastive_loss(image_features, text_features, batch.labels, model.logit_scale.exp())

    @contextmanager
    def _multiplied_out(self) -> Iterator[None]:
        """Replace every pool by a ``DensePool`` until the block ends."""
        places = {path: path.rpartition(".") for path in self.pools.pools}
        for path, (parent, _, name) in places.items():
            setattr(self._model.get_submodule(parent), name, DensePool(self.pools.pools[path]))
        try:
            yield
        finally:
            for path, (parent, _, name) in places.items():
                setattr(self._model.get_submodule(parent), name, self.pools.pools[path])


class DensePool(nn.Module):
    """A pool with its active experts multiplied out: ``x W^T + dropout(x) (scaling B A)^T``."""

    def __init__(self, pool: ExpertPool) -> None:
        super().__init__()
        self.pool = pool

    @property
    def weight(self) -> Tensor:
        return self.pool.weight

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, seq_len, d_in) -> (batch, seq_len, d_out)."""
        pool = self.pool
        pool.router(x)
        active = pool.router.active
        update = pool.scaling * pool.lora_B[:, active] @ pool.lora_A[active]
        return pool.base_layer(x) + F.linear(F.dropout(x, pool.dropout.p), update)


@contextmanager
def every_token(model: open_clip.CLIP) -> Iterator[None]:
    """Let the image tower's last block compute all tokens, as open_clip's own does, until the block ends."""
    last = model.visual.transformer.resblocks[-1]
    if isinstance(last, ClsBlock):
        last.__dict__["forward"] = super(ClsBlock, last).forward
    try:
        yield
    finally:
        vars(last).pop("forward", None)


def random_batch(backbone: Backbone, batch_size: int) -> Batch:
    """Return random images of random classes out of ``NUM_CLASSES``, with their prompts."""
    draw = random.Random(0)
    names = draw.sample(open_clip.IMAGENET_CLASSNAMES, NUM_CLASSES)
    labels = torch.tensor(draw.choices(range(NUM_CLASSES), k=batch_size))
    classes, text_of = labels.unique(return_inverse=True)
    tokens = backbone.tokenizer([prompt_of(TEMPLATE, names[label]) for label in classes])
    pixels = torch.randn(batch_size, 3, backbone.image_size, backbone.image_size)
    return Batch(list(range(batch_size)), *(tensor.to(backbone.device) for tensor in (pixels, labels, tokens, text_of)))


def frozen_flops(model: open_clip.CLIP, batch: Batch) -> int:
    """Count the operations of a forward and backward pass, down to the positional embeddings, through towers without
    pools. The model is on the meta device, so nothing is computed.
    """
    shapes = copy.deepcopy(model).to("meta").requires_grad_(False).train()
    for positions in (shapes.visual.positional_embedding, shapes.positional_embedding):
        positions.requires_grad_(True)
    tokens = cut_to_longest(batch.tokens).to("meta")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        features = shapes.encode_image(batch.pixels.to("meta")), encode_text(shapes, tokens)
        torch.autograd.backward(features, [torch.empty_like(found) for found in features])
    return counter.get_total_flops()


def _peak(build: Callable[[], Steps], kind: Kind) -> int:
    """Return the peak memory of two steps in bytes, measured in a new process, where no other steps have run."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(_peak_here, build, kind).result()


def _peak_here(build: Callable[[], Steps], kind: Kind) -> int:
    steps = build()
    for _ in range(2):  # the first step creates the optimiser's moments
        getattr(steps, kind)()
    return peak_memory(steps.device)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
