"""The trainer's commands as settings: flags, defaults and help come from these classes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import KW_ONLY, MISSING, asdict, dataclass, field, fields, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

from cyclopts import Group, Parameter

from clipweld.trainer import command_line
from clipweld.trainer.adapters.folder import check_named
from clipweld.trainer.base.model_choice import DEFAULT_MODEL, choose_model
from clipweld.trainer.config import LabelSpace, Method, TrainConfig, train_config

Accelerator = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "32-true", "bf16-mixed", "16-mixed"]

HELP = """Learn image domains one after another, each as a small adapter that merges into CLIP.

Example: trainer fit --model mini --task digits
"""

# Rare flags are in groups below those that every user needs.
Training = Parameter(name="*", group=Group("Training", help="Defaults are those of the model.", sort_key=3))
Data = Parameter(group=Group("Model and data", sort_key=1))
Hardware = Parameter(group=Group("Hardware", sort_key=2))


@dataclass(frozen=True, kw_only=True)
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
    model: Annotated[str, Data] = DEFAULT_MODEL
    """An open_clip ViT model, or 'mini', the small CLIP that ships. Default: that of the adapters."""
    pretrained: Annotated[str | None, Data] = None
    """Weights: an open_clip tag, a checkpoint file, or 'random'. Default: the adapters', else the model's own (openai;
    mini: shipped)."""
    data: Annotated[Path, Data] = Path("data")
    """Where the MTIL data sets lie."""
    download: Annotated[bool, Data] = False
    """Fetch a data set that is missing."""
    skip_unreadable: Annotated[bool, Data] = False
    """Name images that can't be decoded and leave them out, instead of stopping; looks through all of them first."""
    accelerator: Annotated[Accelerator, Hardware] = "auto"
    """What to run on."""
    devices: Annotated[int, Hardware] = 1
    """How many devices; each sees its own --batch-size images per step. The trainer starts a process for each itself:
    srun, mpirun and torchrun are not needed, and their variables are ignored."""
    precision: Annotated[Precision, Hardware] = "auto"
    """Of the towers in training: bf16-mixed on a GPU that has it, else 32-true. Weights and adapters are float32."""


@dataclass(frozen=True, kw_only=True)
class Fit(WithModel):
    """Learn one task on top of the adapters learned before.

    Example: trainer fit --model mini --task digits
    """

    task: str
    """A name that 'trainer tasks' lists, or a folder of images (`train/CLASS/*`, `test/CLASS/*`)."""
    name: str | None = None
    """What to call the task of a folder. Default: the folder's name."""
    template: tuple[str, ...] = ()
    """Prompts for the task of a folder, such as 'a photo of a {}, a type of bolt'."""
    adapters: Path = Path("adapters")
    """Adapters learned before are read here, the new one is written here."""
    dry_run: bool = False
    """Say how big and how long it will be, from three steps; learn nothing, write nothing."""
    resume: bool = False
    """Resume the same command after an interruption."""
    json: bool = False
    """Print JSON."""
    train: Annotated[TrainConfig, Training] = field(default_factory=TrainConfig)


@dataclass(frozen=True, kw_only=True)
class Sequence(WithModel):
    """Learn tasks one after another, testing all of them after each.

    Example: trainer sequence --model mini --tasks digits fashion letters --out runs/three
    """

    tasks: tuple[str, ...]
    """Tasks or folders to learn, in this order; NAME=FOLDER gives a folder another name. 'mini' stands for the six that
    ship, mtil-1, mtil-2 and x-tail for benchmarks."""
    out: Path
    """Folder for the adapters and the accuracy matrix."""
    watch: tuple[str, ...] = ()
    """Tasks or folders (NAME=FOLDER too) to test but not to learn."""
    method: Method = "pool"
    """The expert pool; or one plain LoRA, all weights task after task, all weights on all tasks at once."""
    label_space: LabelSpace = "task"
    """What to print: images classified among the classes of their own task, or of all tasks. Both are written."""
    validate: bool = False
    """Learn from 80% of the training images and test on the rest: for choosing settings without a test image."""
    seeds: tuple[int, ...] = ()
    """Repeat with these seeds, each in a folder of its own below --out."""
    order_seed: int | None = None
    """Shuffle the tasks by this seed."""
    resume: bool = False
    """Resume the same command after an interruption."""
    json: bool = False
    """Print JSON."""
    train: Annotated[TrainConfig, Training] = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class Report:
    """One page with figures on all sequences below a folder.

    Example: trainer report runs/three
    """

    run: Path
    """Folder that 'trainer sequence --out' wrote, or one that holds several of them."""
    _: KW_ONLY
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True, kw_only=True)
class Evaluate(WithModel):
    """Test accuracy with the adapters merged.

    Example: trainer evaluate --model mini --tasks digits emoji
    """

    tasks: tuple[str, ...]
    """Tasks or folders to test; NAME=FOLDER gives a folder another name. Names of lists, such as 'mini', stand for all
    of theirs."""
    adapters: Path = Path("adapters")
    """Adapters to merge; an empty folder tests the base model, and so does leaving this out where there is none."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Time training steps beside naive ones, and beside the least that this machine could need.

    Example: trainer bench --model mini
    """

    model: str = DEFAULT_MODEL
    """An open_clip ViT model, or 'mini'."""
    pretrained: str = "random"
    """Weights; speed doesn't depend on them."""
    batch_size: int = 32
    """Images per step."""
    pairs: int = 5
    """How many steps of each kind, in turn."""
    accelerator: Accelerator = "auto"
    """What to run on."""
    precision: Precision = "auto"
    """Of the pool's step; the naive step is in float32."""
    json: bool = False
    """Print JSON."""


Command = Tasks | Fit | Sequence | Evaluate | Report | Bench
Settings = TypeVar("Settings", bound=Command | TrainConfig)


def parse(args: list[str] | None = None) -> Command:
    """The command of a command line; exits with 2 on one that can't be read.

    A model and a method have their own training defaults, so they are looked up first: ``--help`` shows what will be
    used.

    Raises:
        AdapterError: there is no such folder as was named to read adapters from.
        UnknownModel: open_clip has no model of the name that was given.
        WrongBase: the adapters are of another model.
    """
    args = sys.argv[1:] if args is None else list(args)
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--model", nargs="?")
    finder.add_argument("--method", nargs="?")
    finder.add_argument("--adapters", nargs="?", const="adapters", default="adapters")
    found = finder.parse_known_args(args)[0]
    reads_adapters = args[:1] in (["fit"], ["evaluate"]) and not {"-h", "--help"} & set(args)
    if reads_adapters and args[0] == "evaluate" and any(arg.partition("=")[0] == "--adapters" for arg in args):
        check_named(Path(found.adapters))
    model = choose_model(found.model, Path(found.adapters) if reads_adapters else None)
    method = found.method if found.method in get_args(Method) else "pool"
    chosen: dict[type[Command], dict[str, Any]] = {
        Tasks: {},
        Fit: {"model": model, "train": train_config(model)},
        Sequence: {"model": model, "train": train_config(model, method)},
        Evaluate: {"model": model},
        Report: {},
        Bench: {},
    }
    app = command_line.application("trainer", HELP, consume_multiple=True)
    for command, defaults in chosen.items():
        app.command(_reader(_with_defaults(command, defaults)), name=command.__name__.lower(), help=command.__doc__)
    parsed = command_line.run(app, args)
    if parsed is None:
        raise SystemExit(0)  # help was printed
    if isinstance(parsed, (Fit, Sequence)):
        parsed = replace(parsed, train=TrainConfig(**asdict(parsed.train)))
    plain = next(command for command in chosen if isinstance(parsed, command))
    values = {setting.name: getattr(parsed, setting.name) for setting in fields(plain)}
    if "model" in values:
        values["model"] = model
    return plain(**values)


def _with_defaults(settings: type[Settings], defaults: dict[str, Any]) -> type[Settings]:
    """The same settings with other defaults, down into the training settings: help shows the class's own."""
    hints = get_type_hints(settings, include_extras=True)
    changed: list[tuple[str, Any, Any]] = []
    for name, default in defaults.items():
        hint = hints[name]
        if isinstance(default, TrainConfig):
            training = _with_defaults(TrainConfig, asdict(default))
            changed.append((name, Annotated[training, Training], field(default_factory=training)))
        else:
            changed.append((name, hint, field(default=default)))
    home = {"__module__": settings.__module__}  # else it would be a type of Python's own
    return make_dataclass(settings.__name__, changed, bases=(settings,), namespace=home, frozen=True, kw_only=True)


def _reader(settings: type[Command]) -> Callable[[Command], Command]:
    """A function that has the fields as its parameters, and returns them."""

    def read(command: Command) -> Command:
        return command

    read.__annotations__ = {"command": Annotated[settings, Parameter(name="*")]}
    if all(default.default is not MISSING or default.default_factory is not MISSING for default in fields(settings)):
        read.__defaults__ = (settings(),)  # type: ignore[call-arg]  # all fields have defaults
    return read
