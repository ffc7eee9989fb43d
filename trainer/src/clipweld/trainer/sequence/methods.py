"""The methods that can be compared: what each trains, and what it leaves behind after a task.

=========  ==========================================================  ============================================
method     trains                                                      leaves behind
=========  ==========================================================  ============================================
pool       rank-1 experts per layer, kept apart from earlier tasks'    an adapter: the most used experts
lora       one plain LoRA of the same rank                             an adapter: the whole LoRA
finetune   all weights                                                 the weights
joint      all weights, on all tasks in turn: the upper bound          the weights
=========  ==========================================================  ============================================
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import open_clip
from lightning_fabric import Fabric
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from clipweld.trainer.adapters.adapter import Adapter, check_place, load_lineage, save_adapter
from clipweld.trainer.adapters.merge import merge
from clipweld.trainer.base.backbone import Backbone, with_weights
from clipweld.trainer.config import TrainConfig
from clipweld.trainer.errors import CheckpointError
from clipweld.trainer.learning.evaluate import Accuracies, evaluate
from clipweld.trainer.learning.fit import Objective, Step, batches_of, checkpoint_of, fit, for_tasks, train
from clipweld.trainer.schemas import STRICT, one_line
from clipweld.trainer.tasks import Task
from clipweld.trainer.tensors import write_tensors


@dataclass(frozen=True)
class Learned:
    """The result of one stage."""

    __pydantic_config__: ClassVar[Any] = STRICT

    accuracies: Accuracies
    seconds: float
    trainable_parameters: int
    kept_parameters: int


@dataclass(frozen=True)
class Run:
    """What every stage of a run shares.

    Attributes:
        out: the run's folder.
        tested: tasks whose accuracy is measured after each stage.
        before_learned: the same tasks with other test images, for as long as they are not learned.
    """

    base: Backbone
    config: TrainConfig
    out: Path
    tested: Sequence[Task]
    before_learned: Sequence[Task]
    fabric: Fabric

    @property
    def unfinished(self) -> Path:
        """Where the current stage is saved while it trains."""
        return self.out / "unfinished.safetensors"

    def tests(self, learned: Collection[str]) -> list[Task]:
        """Return the tasks to test after those of these names are learned."""
        others = {task.name: task for task in self.before_learned if task.name not in learned}
        return [others.get(task.name, task) for task in self.tested]


class Learner(Protocol):
    """The interface of a method during a run."""

    def restore(self, learned: Sequence[Task]) -> None:
        """Load what was saved after these tasks."""

    def learn(
        self,
        tasks: Sequence[Task],
        test_on: Sequence[Task],
        before: Accuracies,
        *,
        resume: bool,
        on_step: Callable[[Step], None],
    ) -> Learned:
        """Learn tasks on top of the earlier ones, save the result in the run's folder, and test it."""

    def clear(self) -> None:
        """Remove files that are no longer needed, now that the tasks learned last are on record."""


class AdapterLearner:
    """A learner that saves ``adapters/<task>.safetensors``."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._folder = run.out / "adapters"
        self._lineage: list[Adapter] = []
        self._model = run.base

    def restore(self, learned: Sequence[Task]) -> None:
        base = self._run.base
        self._lineage = load_lineage([self._path(task) for task in learned], base.fingerprint)
        self._model = with_weights(base, merge(base.model.state_dict(), self._lineage))

    def learn(
        self,
        tasks: Sequence[Task],
        test_on: Sequence[Task],
        before: Accuracies,
        *,
        resume: bool,
        on_step: Callable[[Step], None],
    ) -> Learned:
        (task,) = tasks
        run = self._run
        check_place(self._path(task), task.name)
        fitted = fit(
            task, run.base, self._lineage, run.config, test_on=test_on, start=self._model, before=before,
            fabric=run.fabric, unfinished=run.unfinished, resume=resume, on_step=on_step,
        )  # fmt: skip
        self._lineage.append(fitted.adapter)
        self._model = fitted.backbone
        if run.fabric.is_global_zero:
            save_adapter(fitted.adapter, self._path(task))
        return Learned(fitted.accuracies, fitted.seconds, fitted.trainable_parameters, fitted.adapter.num_parameters)

    def clear(self) -> None:
        """Remove nothing: every adapter is needed."""

    def _path(self, task: Task) -> Path:
        return self._folder / f"{task.name}.safetensors"


class WeightsLearner:
    """A learner that saves ``weights/<task learned last>.safetensors``, an open_clip checkpoint."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._folder = run.out / "weights"
        self._model = run.base
        self._path: Path | None = None

    def restore(self, learned: Sequence[Task]) -> None:
        if learned:
            self._path = self._path_of(learned)
            try:
                self._model = with_weights(self._run.base, load_file(self._path))
            except (SafetensorError, OSError, RuntimeError) as exc:  # RuntimeError: names or shapes don't match
                raise CheckpointError(
                    f"{self._path}: not the weights that the run left ({one_line(str(exc))}); restore it, or start "
                    "without --resume"
                ) from exc

    def learn(
        self,
        tasks: Sequence[Task],
        test_on: Sequence[Task],
        before: Accuracies,
        *,
        resume: bool,
        on_step: Callable[[Step], None],
    ) -> Learned:
        run = self._run
        config = for_tasks(run.config, tasks, run.base, run.fabric)
        self._model = with_weights(run.base, self._model.model.state_dict())
        weights = AllWeights(self._model.model)
        try:
            batches = [batches_of(task, self._model, config, run.fabric) for task in tasks]
            objective = Objective(self._model, weights, config, run.fabric)
            checkpoint = checkpoint_of(run.unfinished, batches, run.base, config, run.fabric, parents=())
            seconds = train(batches, objective, checkpoint, resume=resume, on_step=on_step)
        finally:
            weights.freeze()
        self._path = self._path_of(tasks)
        if run.fabric.is_global_zero:
            write_tensors(self._path, self._model.model.state_dict())
        accuracies = evaluate(self._model, test_on, run.fabric)
        return Learned(accuracies, seconds, weights.num_trainable, weights.num_trainable)

    def clear(self) -> None:
        for path in {self._path_of([task]) for task in self._run.tested} - {self._path}:
            path.unlink(missing_ok=True)

    def _path_of(self, learned: Sequence[Task]) -> Path:
        return self._folder / f"{learned[-1].name}.safetensors"


class AllWeights:
    """All weights of a model, for training, except the temperature."""

    def __init__(self, model: open_clip.CLIP) -> None:
        self._model = model.requires_grad_(True)
        model.logit_scale.requires_grad_(False)
        self.num_trainable = sum(parameter.numel() for parameter in self.parameters())

    def state(self) -> dict[str, Tensor]:
        return self._model.state_dict()

    def parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for parameter in self._model.parameters() if parameter.requires_grad)

    def consolidate(self) -> None:
        """Do nothing: all weights are kept, so there is nothing to choose."""

    def freeze(self) -> None:
        """End training: no gradients, evaluation mode."""
        self._model.requires_grad_(False).eval()


LEARNERS: dict[str, Callable[[Run], Learner]] = {
    "pool": AdapterLearner,
    "lora": AdapterLearner,
    "finetune": WeightsLearner,
    "joint": WeightsLearner,
}
