"""Training that was interrupted: what is needed to go on as if nothing had happened.

One safetensors file, written whole or not at all: the tensors in training, the optimiser's state, and as metadata what
is being learned with which settings, and how far it is.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from trainer.errors import CheckpointError
from trainer.files import write_tensors

# A save follows after this many seconds, or later where saving itself takes long: at most a twentieth of all time.
SAVE_EVERY_S = 5.0
SHARE = 20


class Trainee(Protocol):
    """What a method trains: the pools of a model, or all its weights."""

    def state(self) -> dict[str, Tensor]:
        """Every tensor that training changes, by name; the live ones."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those that have a gradient."""

    def consolidate(self) -> None:
        """Called once, where the last part of training begins."""


class Checkpoint:
    """One file of unfinished training.

    Args:
        path: where to keep it; its folder is made when needed.
        identity: what is being learned, on what, with which settings: training goes on only where all of it is equal.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path = path
        self._identity = json.loads(json.dumps(identity))
        self._next_save = time.monotonic() + SAVE_EVERY_S

    def save_when_due(self, step: int, seconds: float, trainee: Trainee, optimizer: torch.optim.Optimizer) -> None:
        """Save after a step, if the last save is long enough ago."""
        started = time.monotonic()
        if started < self._next_save:
            return
        tensors = {f"trainee.{name}": tensor.detach() for name, tensor in trainee.state().items()}
        for place, values in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{place}.{name}": value for name, value in values.items()}
        metadata = json.dumps({"step": step, "seconds": seconds, "identity": self._identity})
        write_tensors(self.path, tensors, {"clipweld": metadata})
        done = time.monotonic()
        self._next_save = done + max(SAVE_EVERY_S, SHARE * (done - started))

    def load(self, trainee: Trainee, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
        """Put the saved state, if there is one, into what is being trained.

        Returns:
            the steps taken and the seconds they took; (0, 0.0) where nothing was saved.

        Raises:
            CheckpointError: the file is not whole, or is of training with other settings.
        """
        if not self.path.is_file():
            return 0, 0.0
        try:
            with safetensors.safe_open(self.path, "pt") as file:
                metadata = json.loads((file.metadata() or {})["clipweld"])
            tensors = load_file(self.path)
            identity = metadata["identity"]
        except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError) as exc:
            raise CheckpointError(
                f"{self.path}: not a whole checkpoint ({exc}); remove it, or start without --resume"
            ) from exc
        self._check(identity)
        with torch.no_grad():
            for name, tensor in trainee.state().items():
                tensor.copy_(tensors[f"trainee.{name}"])
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            if part == "optimizer":
                place, _, key = rest.partition(".")
                state.setdefault(int(place), {})[key] = tensor
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        return metadata["step"], metadata["seconds"]

    def _check(self, found: dict[str, Any]) -> None:
        if faults := differences(found, self._identity):
            raise CheckpointError(
                f"{self.path}: is of training with {'; '.join(faults)}; "
                "give the same settings, or start without --resume"
            )


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """What differs between two records of settings: ``lr 0.1, not 0.2``."""
    missing = object()
    faults = []
    for name in sorted(found.keys() | wanted.keys()):
        one, other = found.get(name, missing), wanted.get(name, missing)
        if isinstance(one, dict) and isinstance(other, dict):
            faults += differences(one, other)
        elif one != other:
            faults.append(f"{name} {'unset' if one is missing else one}, not {'unset' if other is missing else other}")
    return faults
