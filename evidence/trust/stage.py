"""The commands that write, each with its initial folder, and a server for those that need one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from clipweld.exporter.release.publish import release
from clipweld.exporter.serving.announcement import FOLDER
from clipweld.exporter.serving.switch import rollback
from clipweld.exporter.serving.triton import serve
from clipweld.exporter.store.repository import Repository
from clipweld.trainer.adapters.adapter import load_lineage
from clipweld.trainer.base.backbone import load_backbone
from clipweld.trainer.tasks import sample
from evidence.studies.release import EXPERTS, write_adapters

# The trainer's own command line, but it saves after every step, so that some kills come while it saves.
TRAINER = (
    "from clipweld.trainer import cli; from clipweld.trainer.learning import checkpoint as saving; "
    "saving.SAVE_EVERY_S = saving.SHARE = 0; cli.main()"
)
CLIENT = "from clipweld.client.cli import main; main()"
LEARN = ("--model", "mini", "--shots", "4", "--batch-size", "8", "--iterations", "30", "--accelerator", "cpu")
REPOSITORY = ("--repository", "{folder}/model_repository")
VERIFY = ("-m", "clipweld.exporter", "verify", *REPOSITORY)
STAGING = (
    ".model_repository.staging-*",
    *(
        f"model_repository.store/clip/{name}"
        for name in ("history.json", ".history.json", ".*-removed", ".*-removed/*")
    ),
)
SERVERS = f"model_repository.store/{FOLDER}"
IMAGES = 200


@dataclass(frozen=True)
class Command:
    """A command that writes to a folder.

    Attributes:
        name: its name in messages and records.
        run: arguments of Python; ``{folder}`` is the folder that it writes to.
        prepare: brings a folder into the state before the command.
        on: arguments to add after an interruption, to resume.
        unfinished: patterns of files that exist in the folder only while it runs.
        done: path that exists once its work is done, although it may still be killed; then it is not run again.
        after: command that runs instead in that case, because the next command of any kind has to clean up.
        refusal: text that the same command prints in that case, exiting with status 1; None if it exits with 0.
        shared: folder of a running server, if all cases use this one folder; ``prepare`` resets it.
        proof: command that must exit with status 0 on the folder of an undisturbed run.
    """

    name: str
    run: tuple[str, ...]
    prepare: Callable[[Path], None]
    on: tuple[str, ...] = ()
    unfinished: tuple[str, ...] = ()
    done: str | None = None
    after: tuple[str, ...] | None = None
    refusal: str | None = None
    shared: Path | None = None
    proof: tuple[str, ...] | None = None


@contextmanager
def stage(folder: Path) -> Iterator[list[Command]]:
    """Yield all commands for the small CLIP, while a Triton runs for those that need a server.

    Args:
        folder: an empty folder for the initial states.
    """
    learned = folder / "learned"
    adapters = learned / "adapters"
    base, samples = load_backbone("mini"), sample(8)
    write_adapters(base, 2, EXPERTS, adapters)
    repository = Repository(folder / "released" / "model_repository", "clip")
    for versions in range(1, 5):  # 1 and 2 are active, the others retired; the first merge writes two
        release(base, load_lineage(adapters, base.fingerprint), repository, *samples)
        shutil.copytree(folder / "released", folder / f"{versions + 1}-versions", copy_function=os.link)
    images = folder / "images"
    _write_images(images)
    live = folder / "3-versions"
    with serve(live / "model_repository") as server:
        _copy(live, folder / "served")
        yield [
            Command(
                "trainer fit",
                ("-c", TRAINER, "fit", "--task", "emoji", *LEARN, "--adapters", "{folder}/adapters"),
                partial(_copy, learned),
                on=("--resume",),
                unfinished=("adapters/.emoji.unfinished", "adapters/.*.tmp"),
                done="adapters/emoji.safetensors",
                refusal="task 'emoji' was learned already",
            ),
            Command(
                "trainer sequence",
                ("-c", TRAINER, "sequence", "--tasks", "emoji", "clipart", *LEARN, "--out", "{folder}/run"),
                lambda own: None,
                on=("--resume",),
                unfinished=("run/unfinished.safetensors", "run/progress.json", "run/.*.tmp", "run/adapters/.*.tmp"),
            ),
            Command(
                "exporter merge",
                (
                    *("-m", "clipweld.exporter", "merge", "--to", "onnx", "--model", "mini"),
                    *("--adapters", str(adapters), *REPOSITORY),
                ),
                partial(_copy, folder / "2-versions"),
                unfinished=STAGING,
                done="model_repository.store/clip/3",
                after=("-m", "clipweld.exporter", "prune", "--keep", "9", *REPOSITORY),
                proof=VERIFY,
            ),
            Command(
                "exporter promote",
                ("-m", "clipweld.exporter", "promote", "3", *REPOSITORY, "--url", server.url),
                partial(_roll_back, server.url),
                unfinished=STAGING,
                shared=live,
                proof=VERIFY,
            ),
            Command(
                "exporter prune",
                ("-m", "clipweld.exporter", "prune", "--keep", "1", *REPOSITORY),
                partial(_copy, folder / "5-versions"),
                unfinished=STAGING,
                proof=VERIFY,
            ),
            Command(
                "client classify",
                (
                    *("-c", CLIENT, "classify", str(images), "--labels", "cat, dog, bird", "--version", "2"),
                    *("--out", "{folder}/answers.csv", "--url", server.url),
                ),
                lambda own: None,
                unfinished=("answers.csv.part", ".answers.csv.new"),
                done="answers.csv",
                refusal="there already",
            ),
            Command(
                "exporter serve",
                ("-m", "clipweld.exporter", "serve", *REPOSITORY, "--port", "0", "--", "true"),
                partial(_copy, folder / "served"),
                unfinished=("tmp/clipweld-*-backends-*", SERVERS, f"{SERVERS}/*"),
            ),
        ]


def environment(folder: Path) -> dict[str, str]:
    """Return environment variables for a command: one thread, and temporary files in the folder that is checked."""
    return os.environ | {"TMPDIR": str(folder / "tmp"), "OMP_NUM_THREADS": "1"}


def _copy(template: Path, folder: Path) -> None:
    """Copy a folder with hard links, which is safe because commands replace files and never write into them."""
    ignored = shutil.ignore_patterns(Path(SERVERS).name)  # announces the running server
    shutil.copytree(template, folder, ignore=ignored, copy_function=os.link, dirs_exist_ok=True)


def _roll_back(url: str, folder: Path) -> None:
    repository = Repository(folder / "model_repository", "clip")
    if repository.served == 3:
        rollback(repository, [url])


def _write_images(folder: Path) -> None:
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(IMAGES):
        Image.fromarray(random.integers(0, 256, (64, 64, 3), np.uint8)).save(folder / f"{number:03}.png")
