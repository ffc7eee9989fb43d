"""An estimate of a task's training time, memory and size, from its first three steps."""

from __future__ import annotations

import re
import resource
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from lightning_fabric import Fabric

from clipweld.trainer.adapters.adapter import Adapter
from clipweld.trainer.base.backbone import Backbone
from clipweld.trainer.config import TrainConfig
from clipweld.trainer.learning.fit import UNTESTED, fit
from clipweld.trainer.method import PoolSet, attach_pools, detach_pools
from clipweld.trainer.method.injection import tower_of
from clipweld.trainer.tasks import Task

STEPS = 3


@dataclass(frozen=True)
class DryRun:
    """The cost of learning a task.

    Attributes:
        trainable_parameters: number of trained values.
        parts: the same by tower, for experts and routers separately.
        kept_parameters: number of values in the adapter's tensors.
        kept_bytes: size of these tensors in bytes, float32.
        memory_bytes: peak memory over three steps: of the GPU, or of the whole process on a CPU.
        seconds_per_step: median of three steps.
    """

    trainable_parameters: int
    parts: dict[str, int]
    kept_parameters: int
    kept_bytes: int
    memory_bytes: int
    seconds_per_step: float


def dry_run(
    task: Task, base: Backbone, lineage: Sequence[Adapter], config: TrainConfig, fabric: Fabric | None = None
) -> DryRun:
    """Take the first three steps of ``fit``, and discard the result.

    Raises:
        TaskAlreadyLearned: the lineage has an adapter of this task.
    """
    pools = attach_pools(base.model, config)
    parts = parts_of(pools)
    detach_pools(pools)
    seconds: list[float] = []
    if base.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(base.device)
    few = replace(config, iterations=STEPS, consolidate=0.0, coefficients="full")
    fitted = fit(
        task, base, lineage, few, test_on=[], before=UNTESTED, fabric=fabric,
        on_step=lambda step: seconds.append(config.batch_size / step.images_per_s),
    )  # fmt: skip
    return DryRun(
        trainable_parameters=fitted.trainable_parameters,
        parts=parts,
        kept_parameters=fitted.adapter.num_parameters,
        kept_bytes=sum(tensor.nbytes for tensor in fitted.adapter.tensors.values()),
        memory_bytes=peak_memory(base.device),
        seconds_per_step=round(statistics.median(seconds), 4),
    )


def parts_of(pools: PoolSet) -> dict[str, int]:
    """Return the number of trained values in each tower, for experts and routers separately."""
    parts = dict.fromkeys(("image_experts", "image_routers", "text_experts", "text_routers"), 0)
    for name, tensor in pools.state().items():
        if tensor.requires_grad:
            parts[f"{tower_of(name)}_{'routers' if '.router.' in name else 'experts'}"] += tensor.numel()
    return parts


def peak_memory(device: torch.device) -> int:
    """Return the most bytes held so far: on a GPU by torch, else by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    # Preferred on Linux, where getrusage includes the peak of the parent process.
    if status.is_file() and (found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text(encoding="ascii"))):
        return 1024 * int(found[1])
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, kilobytes elsewhere
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
