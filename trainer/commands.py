"""The trainer's commands as settings: flags, defaults and help come from these classes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from trainer.config import TrainConfig, train_config

MODEL = "ViT-B-16"


@dataclass(frozen=True)
class Tasks:
    """What can be learned here, and what is missing where.

    Example: trainer tasks
    """

    data: Path = Path("data")
    """Where the MTIL data sets lie."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True, kw_only=True)
class WithModel:
    model: str = MODEL
    """An open_clip ViT model, or 'mini', the small CLIP that ships."""
    pretrained: str | None = None
    """Weights: an open_clip tag, a checkpoint file, or 'random'. Default: the model's own (openai; mini: shipped)."""
    data: Path = Path("data")
    """Where the MTIL data sets lie."""
    download: bool = False
    """Fetch a data set that is missing."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True, kw_only=True)
class Fit(WithModel):
    """Learn one task on top of the adapters learned before.

    Example: trainer fit --model mini --task digits
    """

    task: str
    """A name that 'trainer tasks' lists, or a folder of images (train/CLASS/*, test/CLASS/*)."""
    name: str | None = None
    """What to call the task of a folder. Default: the folder's name."""
    template: tuple[str, ...] = ()
    """Prompts for the task of a folder, such as 'a photo of a {}, a type of bolt'."""
    adapters: Path = Path("adapters")
    """Adapters learned before are read here, the new one is written here."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How to learn. Defaults are those of the model."""


@dataclass(frozen=True, kw_only=True)
class Chain(WithModel):
    """Learn tasks one after another, testing all of them after each.

    Example: trainer sequence --model mini --tasks digits fashion letters --out runs/three
    """

    tasks: tuple[str, ...]
    """Tasks to learn, in this order."""
    out: Path
    """Folder for the adapters and the accuracy matrix."""
    watch: tuple[str, ...] = ()
    """Tasks to test but not to learn."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How to learn. Defaults are those of the model."""


@dataclass(frozen=True, kw_only=True)
class Evaluate(WithModel):
    """Test accuracy with the adapters merged.

    Example: trainer evaluate --model mini --tasks digits emoji
    """

    tasks: tuple[str, ...]
    """Tasks to test."""
    adapters: Path = Path("adapters")
    """Adapters to merge; an empty or absent folder tests the base model."""


def parse(args: Sequence[str] | None = None) -> Tasks | Fit | Chain | Evaluate:
    """The command of a command line; exits with 2 on one that can't be read.

    A model has its own training defaults, so the model is looked up first: ``--help`` shows what will be used.
    """
    args = sys.argv[1:] if args is None else list(args)
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--model", nargs="?", default=MODEL)
    model = finder.parse_known_args(args)[0].model or MODEL
    learning = {"model": model, "train": train_config(model)}
    fit = Fit(task=tyro.MISSING, **learning)
    chain = Chain(tasks=tyro.MISSING, out=tyro.MISSING, **learning)
    command = (
        Annotated[Tasks, tyro.conf.subcommand("tasks")]
        | Annotated[Fit, tyro.conf.subcommand("fit", default=fit)]
        | Annotated[Chain, tyro.conf.subcommand("sequence", default=chain)]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    )
    return tyro.cli(
        command,
        prog="trainer",
        description="Learn image domains one after another, each as a small adapter that merges into CLIP.",
        args=args,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff),
    )
