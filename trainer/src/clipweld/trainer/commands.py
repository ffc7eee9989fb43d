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

TRUE = ("true", "t", "yes", "y", "1")  # what cyclopts takes for a flag's true

HELP = """Learn image domains one after another, each as a small adapter that merges into CLIP.

Example: trainer fit --model mini --task digits
"""

# Rare flags are in groups below those that every user needs.
Training = Parameter(name="*", group=Group("Training", help="Defaults are those of the model.", sort_key=3))
Data = Parameter(group=Group("Model and data", sort_key=1))
Hardware = Parameter(group=Group("Hardware", sort_key=2))


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """List the tasks that can be learned here, and what is missing for the others.

    Example: trainer tasks
    """

    data: Path = Path("data")
    """Where the MTIL data sets lie."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True, kw_only=True)
class WithModel:
    model: Annotated[str, Data] = DEFAULT_MODEL
    """An open_clip ViT model, or 'mini', the small CLIP that ships with clipweld. Default: the adapters' model."""
    pretrained: Annotated[str | None, Data] = None
    """Weights: an open_clip tag, a checkpoint file, or 'random'. Default: the adapters', else the model's own (openai;
    mini: shipped)."""
    data: Annotated[Path, Data] = Path("data")
    """Where the MTIL data sets lie."""
    download: Annotated[bool, Data] = False
    """Download missing data sets."""
    skip_unreadable: Annotated[bool, Data] = False
    """Report images that can't be decoded and leave them out, instead of stopping; decodes all images first."""
    accelerator: Annotated[Accelerator, Hardware] = "auto"
    """Kind of device to run on."""
    devices: Annotated[int, Hardware] = 1
    """Number of devices; each processes --batch-size images per step. The trainer starts a process per device itself:
    srun, mpirun and torchrun are not needed, and their variables are ignored."""
    precision: Annotated[Precision, Hardware] = "auto"
    """Precision of the towers in training. auto: bf16-mixed on a GPU that supports it, else 32-true. Weights and
    adapters are float32."""


@dataclass(frozen=True, kw_only=True)
class Fit(WithModel):
    """Learn one task on top of the adapters learned before.

    Example: trainer fit --model mini --task digits
    """

    task: str
    """A name that 'trainer tasks' lists, or a folder of images (`train/CLASS/*`, `test/CLASS/*`)."""
    name: str | None = None
    """Name for the task of a folder. Default: the folder's name."""
    template: tuple[str, ...] = ()
    """Prompts for the task of a folder, such as 'a photo of a {}, a type of bolt'."""
    adapters: Path = Path("adapters")
    """Folder of the adapters: earlier ones are read from it, the new one is written to it."""
    published: bool = False
    """Take the paper's own settings (arXiv 2601.22828) as defaults: no loss protects what other tasks use."""
    dry_run: bool = False
    """Estimate size, memory and time from three steps; learn nothing, write nothing."""
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
    """Tasks or folders to learn, in this order; NAME=FOLDER gives a folder another name. 'mini' is short for six of the
    shipped tasks, mini-unseen for the other three; mtil-1, mtil-2 and x-tail are short for those of benchmarks."""
    out: Path
    """Folder for the adapters and the accuracy matrix."""
    watch: tuple[str, ...] = ()
    """Tasks or folders (also NAME=FOLDER) to test but not to learn."""
    method: Method = "pool"
    """pool: the expert pool; lora: one plain LoRA; finetune: all weights, task after task; joint: all weights, on all
    tasks at once."""
    label_space: LabelSpace = "task"
    """Accuracies to print: images are classified among the classes of their own task, or of all tasks (union). Both are
    written to --out."""
    published: bool = False
    """Take the paper's own settings (arXiv 2601.22828) as defaults: no loss protects what other tasks use."""
    validate: bool = False
    """Choose settings without a test image: learn from 80% of the training images, and test on the rest; until a task
    is learned, on all of them."""
    seeds: tuple[int, ...] = ()
    """Repeat with each of these seeds, in a separate folder below --out."""
    order_seed: int | None = None
    """Shuffle the tasks with this seed."""
    resume: bool = False
    """Resume the same command after an interruption."""
    json: bool = False
    """Print JSON."""
    train: Annotated[TrainConfig, Training] = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class Report:
    """Write one page with figures of all sequences below a folder.

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
    """Tasks or folders to test; NAME=FOLDER gives a folder another name. The name of a list, such as 'mini', means all
    of its tasks."""
    adapters: Path = Path("adapters")
    """Folder of the adapters to merge. An empty folder tests the base model; so does the default if it doesn't
    exist."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Time training steps, and compare them with naive ones and with a lower bound for this machine.

    Example: trainer bench --model mini
    """

    model: str = DEFAULT_MODEL
    """An open_clip ViT model, or 'mini'."""
    pretrained: str = "random"
    """Weights; speed doesn't depend on them."""
    batch_size: int = 32
    """Images per step."""
    pairs: int = 5
    """Number of steps of each kind, which alternate."""
    accelerator: Accelerator = "auto"
    """Kind of device to run on."""
    precision: Precision = "auto"
    """Precision of the pool's step; the naive step is in float32."""
    json: bool = False
    """Print JSON."""


Command = Tasks | Fit | Sequence | Evaluate | Report | Bench
Settings = TypeVar("Settings", bound=Command | TrainConfig)


def parse(args: list[str] | None = None) -> Command:
    """Return the command of a command line; exit with status 2 if it is not valid.

    Training defaults depend on the model and the method, so these are looked up first: ``--help`` shows the values that
    will be used.

    Raises:
        AdapterError: the folder given to read adapters from doesn't exist.
        UnknownModel: open_clip has no model of the given name.
        WrongBase: the adapters belong to another model.
    """
    args = sys.argv[1:] if args is None else list(args)
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--model", nargs="?")
    finder.add_argument("--method", nargs="?")
    finder.add_argument("--published", nargs="?", const="true", default="false")
    finder.add_argument("--adapters", nargs="?", const="adapters", default="adapters")
    found = finder.parse_known_args(args)[0]
    reads_adapters = args[:1] in (["fit"], ["evaluate"]) and not {"-h", "--help"} & set(args)
    if reads_adapters and args[0] == "evaluate" and any(arg.partition("=")[0] == "--adapters" for arg in args):
        check_named(Path(found.adapters))
    model = choose_model(found.model, Path(found.adapters) if reads_adapters else None)
    method = found.method if found.method in get_args(Method) else "pool"
    published = str(found.published).lower() in TRUE
    chosen: dict[type[Command], dict[str, Any]] = {
        Tasks: {},
        Fit: {"model": model, "train": train_config(model, published=published)},
        Sequence: {"model": model, "train": train_config(model, method, published=published)},
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
    """Return a class with other defaults, also in its training settings, as help shows the defaults of a class."""
    hints = get_type_hints(settings, include_extras=True)
    changed: list[tuple[str, Any, Any]] = []
    for name, default in defaults.items():
        hint = hints[name]
        if isinstance(default, TrainConfig):
            training = _with_defaults(TrainConfig, asdict(default))
            changed.append((name, Annotated[training, Training], field(default_factory=training)))
        else:
            changed.append((name, hint, field(default=default)))
    home = {"__module__": settings.__module__}  # make_dataclass would set another module
    return make_dataclass(settings.__name__, changed, bases=(settings,), namespace=home, frozen=True, kw_only=True)


def _reader(settings: type[Command]) -> Callable[[Command], Command]:
    """Return a function whose parameters are the settings' fields, and which returns the settings."""

    def read(command: Command) -> Command:
        return command

    read.__annotations__ = {"command": Annotated[settings, Parameter(name="*")]}
    if all(default.default is not MISSING or default.default_factory is not MISSING for default in fields(settings)):
        read.__defaults__ = (settings(),)  # type: ignore[call-arg]  # all fields have defaults
    return read
