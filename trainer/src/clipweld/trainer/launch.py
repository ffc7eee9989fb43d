"""The processes of a command: one per device, which the trainer starts itself.

Launchers (Slurm, MPI, torchrun) set environment variables that make a library believe it is one process of many. Only a
command's arguments decide what it does, so those variables are removed before anything reads them.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Literal

from clipweld.trainer.errors import ConfigError

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]  # some of Fabric's
# Environment variable of the processes that a trainer starts: the ID of the process that started them.
STARTED_BY = "CLIPWELD_STARTED_BY"
PATIENCE_S = 3.0  # how long to wait for the first process to end with an error that all share

LAUNCHERS = ("SLURM_", "OMPI_", "PMI_", "PMIX_", "MPI_", "TORCHELASTIC_", "LSB_", "JSM_", "LT_")
RANKS = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE",
    "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "STANDALONE_PORT",
)  # fmt: skip


def process_number() -> int:
    """Return which of a command's processes this is: 0 is the one that the user started."""
    return int(os.environ.get("LOCAL_RANK", 0)) if os.environ.get(STARTED_BY) == str(os.getppid()) else 0


def forget_launchers() -> None:
    """Remove launchers' variables from the environment of a command's first process."""
    if process_number() == 0:
        for name in [name for name in os.environ if name in RANKS or name.startswith(LAUNCHERS)]:
            del os.environ[name]


def speaks() -> bool:
    """Return whether this process should report its error.

    The first process does. Any other waits up to PATIENCE_S for the first to end, and reports if it has not. So an
    error that all processes share is printed once, and an error in a single process is printed before the others are
    stopped.
    """
    started_by, patience = os.getppid(), time.monotonic() + PATIENCE_S
    if process_number() == 0:
        return True
    while os.getppid() == started_by and time.monotonic() < patience:
        time.sleep(0.05)
    return os.getppid() == started_by


def fabric(accelerator: str, devices: int, precision: Precision) -> Fabric:
    """Return the devices of a command, not launched yet. With several, launching starts the command again for each.

    Raises:
        ConfigError: this machine has no such accelerator, or fewer devices.
    """
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments.lightning import LightningEnvironment
    from lightning_fabric.utilities.exceptions import MisconfigurationException

    from clipweld.trainer.schemas import one_line

    if devices > 1 and process_number() == 0:
        os.environ[STARTED_BY] = str(os.getpid())
    try:
        return Fabric(accelerator=accelerator, devices=devices, precision=precision, plugins=LightningEnvironment())
    except (TypeError, ValueError, RuntimeError, MisconfigurationException) as exc:  # raised for missing devices
        raise ConfigError(
            f"--accelerator {accelerator} --devices {devices}: not here ({one_line(str(exc))}); give others, such as "
            "--accelerator cpu --devices 1"
        ) from exc
