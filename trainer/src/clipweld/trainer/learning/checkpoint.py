"""Checkpoints of unfinished training, from which it resumes with the same result as without an interruption.

A checkpoint is one safetensors file, written atomically: the tensors in training and the optimiser's state, and as
metadata the task, the settings, the progress, and the state of the float16 loss scaler.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol

import safetensors
import torch
from lightning_fabric.plugins.precision import Precision
from pydantic import Field
from torch import Tensor, nn

from clipweld.trainer.errors import CheckpointError, OutputError
from clipweld.trainer.header import ENTRY
from clipweld.trainer.schemas import STRICT, Count, Json, Sha256, one_line, read_json
from clipweld.trainer.tensors import canonical, content_sha256, read_tensors, write_tensors

# Seconds between saves. More if saving itself takes long: at most a twentieth of the time goes into saving.
SAVE_EVERY_S = 5.0
SHARE = 20
ADAMW = {"step", "exp_avg", "exp_avg_sq"}  # the optimiser's state of each parameter

SHOWN = 100  # characters; of longer lists, a message shows only the first difference

_log = logging.getLogger(__name__)


class Trainee(Protocol):
    """The trained part of a model: its pools, or all its weights."""

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that training changes, by name; they are not copies."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the tensors that have a gradient."""

    def consolidate(self) -> None:
        """Begin the last part of training; called before each of its steps."""


@dataclass(frozen=True)
class Progress:
    """The progress of training, as saved in the file."""

    __pydantic_config__: ClassVar[Any] = STRICT

    step: Count
    seconds: Annotated[float, Field(ge=0)]
    identity: Json
    scaler: dict[str, int | float]


@dataclass(frozen=True)
class _Sealed(Progress):
    """The metadata of a file: with the hash over metadata and tensors."""

    sha256: Sha256


class Checkpoint:
    """One file of unfinished training.

    Args:
        path: of the file; its folder is created if necessary.
        identity: the task, the model and the settings: training resumes only if all of them are equal.
        precision: Lightning Fabric's precision plugin, which has the state of the loss scaler.
    """

    def __init__(self, path: Path, identity: dict[str, Any], precision: Precision) -> None:
        self.path = path
        self._precision = precision
        self._identity = json.loads(json.dumps(identity))
        self._next_save = time.monotonic() + SAVE_EVERY_S
        self._warned = False

    def save_when_due(self, step: int, seconds: float, trainee: Trainee, optimizer: torch.optim.Optimizer) -> None:
        """Save after a step, if the last save is long enough ago.

        If saving fails, a warning is logged, training continues, and the previous save stays.
        """
        started = time.monotonic()
        if started < self._next_save:
            return
        tensors = {f"trainee.{name}": tensor.detach() for name, tensor in trainee.state().items()}
        for place, values in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{place}.{name}": value for name, value in values.items()}
        said = asdict(Progress(step, seconds, self._identity, self._precision.state_dict()))
        sealed = {**said, "sha256": content_sha256(said, tensors)}
        try:
            write_tensors(self.path, tensors, {ENTRY: canonical(sealed)})
            self._warned = False
        except OutputError as exc:
            if not self._warned:
                _log.warning("training goes on, but isn't saved: %s", exc)
            self._warned = True
        done = time.monotonic()
        self._next_save = done + max(SAVE_EVERY_S, SHARE * (done - started))

    def load(self, trainee: Trainee, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
        """Load the saved state, if there is one, into the trainee and the optimiser.

        Returns:
            the number of steps taken and their time in seconds; (0, 0.0) if there is no file.

        Raises:
            CheckpointError: the file is damaged, or belongs to training with other settings.
        """
        if not self.path.exists():
            return 0, 0.0
        try:
            text, tensors = read_tensors(self.path)
            sealed = read_json(_Sealed, text)
            progress = Progress(**{f.name: getattr(sealed, f.name) for f in fields(Progress)})
            if content_sha256(asdict(progress), tensors) != sealed.sha256:
                raise ValueError(f"it is not what its own SHA-256 {sealed.sha256[:8]} says")
        except (safetensors.SafetensorError, OSError, ValueError) as exc:
            raise self._not_whole(one_line(str(exc))) from exc
        self._check(progress.identity)
        if progress.scaler.keys() != self._precision.state_dict().keys():
            raise self._not_whole(f"it scales losses by {len(progress.scaler)} numbers")
        self._precision.load_state_dict(progress.scaler)
        with torch.no_grad():
            for name, tensor in trainee.state().items():
                tensor.copy_(self._tensor(tensors, f"trainee.{name}", tensor.shape))
        optimizer.load_state_dict({**optimizer.state_dict(), "state": self._optimizer_state(tensors, optimizer)})
        return progress.step, progress.seconds

    def _optimizer_state(
        self, tensors: dict[str, Tensor], optimizer: torch.optim.Optimizer
    ) -> dict[int, dict[str, Tensor]]:
        """Return the optimiser's state by parameter index; its tensors are scalars or have the parameter's shape."""
        shapes = [parameter.shape for group in optimizer.param_groups for parameter in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for name in tensors:
            part, _, rest = name.partition(".")
            if part == "optimizer":
                place, _, key = rest.partition(".")
                if not re.fullmatch(r"0|[1-9][0-9]{0,8}", place) or int(place) >= len(shapes):
                    raise self._not_whole(f"{one_line(name)}: there are {len(shapes)} tensors in training")
                shape = torch.Size() if key == "step" else shapes[int(place)]
                state.setdefault(int(place), {})[key] = self._tensor(tensors, name, shape)
        for number, values in state.items():
            if values.keys() != ADAMW:
                raise self._not_whole(
                    f"optimizer.{number} has {len(values)} values, expected {', '.join(sorted(ADAMW))}"
                )
        return state

    def _tensor(self, tensors: dict[str, Tensor], name: str, shape: torch.Size) -> Tensor:
        found = tensors.get(name)
        if found is None or found.shape != shape:
            got = "missing" if found is None else tuple(found.shape)
            raise self._not_whole(f"{one_line(name)} is {got}, expected {tuple(shape)}")
        return found

    def _not_whole(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: not a whole checkpoint ({reason}); remove it, or start without --resume")

    def _check(self, found: dict[str, Any]) -> None:
        if faults := differences(found, self._identity):
            raise CheckpointError(
                f"{self.path}: is of training with {one_line('; '.join(faults))}; "
                "give the same settings, or start without --resume"
            )


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """List the differences between two records of settings: ``lr 0.1, not 0.2``; of long lists, the first only."""
    missing = object()
    faults = []
    for name in sorted(found.keys() | wanted.keys()):
        one, other = found.get(name, missing), wanted.get(name, missing)
        if isinstance(one, dict) and isinstance(other, dict):
            faults += differences(one, other)
        elif isinstance(one, list) and isinstance(other, list) and one != other and len(f"{one}{other}") > SHOWN:
            place = next(i for i, (a, b) in enumerate(zip_longest(one, other, fillvalue=missing)) if a != b)
            first = ({f"{name}[{place}]": side[place]} if place < len(side) else {} for side in (one, other))
            faults += differences(*first)
        elif one != other:
            faults.append(f"{name} {'unset' if one is missing else one}, not {'unset' if other is missing else other}")
    return faults
