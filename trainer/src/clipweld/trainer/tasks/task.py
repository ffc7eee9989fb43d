"""What a task is: class names, prompt templates, and two splits of labelled images."""

from __future__ import annotations

import functools
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from PIL import Image, UnidentifiedImageError

from clipweld.trainer.errors import TaskInvalid, UnreadableImage
from clipweld.trainer.preprocessing import FORMATS
from clipweld.trainer.schemas import one_line, printable
from clipweld.trainer.text import MAX_NAME_BYTES, check_words, prompt_of, task_name

if TYPE_CHECKING:  # slow to import, and not needed to check a task
    from torch import Tensor

SPLITS = ("train", "test")


@dataclass(frozen=True)
class Images:
    """Labelled images that are opened one at a time, on demand.

    Attributes:
        labels: class index of every image; known without decoding any.
        open: index -> PIL image in the file's own mode, which open_clip's preprocessing converts.
        name_of: index -> name of the image for error messages.
        files: path of every image, if the task is a user's own folder; else empty.
    """

    labels: Sequence[int]
    open: Callable[[int], Image.Image]
    name_of: Callable[[int], str]
    files: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Decode one image, and return it with its class index.

        Raises:
            UnreadableImage: it can't be decoded; names the file.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        with self._reading(index):
            image = self.open(index)
            image.load()
        return image, self.labels[index]

    def pixels(self, index: int, preprocess: Callable[[Image.Image], Tensor]) -> Tensor:
        """Decode and preprocess one image to float32 (3, size, size).

        Raises:
            UnreadableImage: it can't be decoded or preprocessed; names the file.
        """
        image, _ = self[index]
        with self._reading(index):
            return preprocess(image)

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        return (self[index] for index in range(len(self)))

    @contextmanager
    def _reading(self, index: int) -> Iterator[None]:
        try:
            yield
        except Exception as exc:  # Pillow can raise anything on damaged files
            raise UnreadableImage(
                f"image {self.name_of(index)} can't be read ({_reason(exc)}); replace or remove the file, or leave it "
                "out with --skip-unreadable"
            ) from exc

    def readable(self, preprocess: Callable[[Image.Image], Tensor], tell: Callable[[str], None]) -> Images:
        """Return the images that can be read, and report the others to ``tell``. Decodes all, keeps none in memory."""

        def fault(index: int) -> str | None:
            try:
                self.pixels(index, preprocess)
            except UnreadableImage as exc:
                return str(exc).rpartition("; ")[0]  # what is wrong, without the advice
            return None

        with ThreadPoolExecutor() as readers:
            faults = list(readers.map(fault, range(len(self))))
        for found in filter(None, faults):
            tell(found)
        return self.subset([index for index, found in enumerate(faults) if found is None])

    def subset(self, indices: Sequence[int]) -> Images:
        """Return the images at these indices, in this order."""
        return Images(
            labels=[self.labels[i] for i in indices],
            open=lambda i: self.open(indices[i]),
            name_of=lambda i: self.name_of(indices[i]),
            files=[self.files[i] for i in indices] if self.files else (),
        )

    def few_shot(self, shots: int, seed: int) -> Images:
        """Return at most ``shots`` images per class, drawn with ``seed``; all of them if ``shots`` is 0."""
        if shots == 0:
            return self
        by_class = defaultdict(list)
        for index, label in enumerate(self.labels):
            by_class[label].append(index)
        draw = random.Random(seed)
        return self.subset(
            sorted(i for c in sorted(by_class) for i in draw.sample(by_class[c], min(shots, len(by_class[c]))))
        )


def _reason(exc: Exception) -> str:
    """Return what is wrong with an image, in one line, as Pillow's message may give only the address of an object."""
    if isinstance(exc, UnidentifiedImageError):
        return f"it is none of the formats {', '.join(FORMATS)}"
    if isinstance(exc, OSError) and exc.strerror:
        return exc.strerror
    return " ".join(str(exc).split()) or type(exc).__name__


@dataclass(frozen=True)
class Origin:
    """How a user's folder was read.

    Attributes:
        class_folders: names of the class folders, in the order of the task's classes.
        left_out: how many entries were left out, by kind.
        notes: what a split is made of, if that isn't obvious.
        warnings: what a user should check.
    """

    class_folders: tuple[str, ...]
    left_out: Mapping[str, int]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """A classification task.

    Attributes:
        name: what the adapter and the served task are called.
        class_names: one per class, as written in prompts.
        templates: prompts with one ``{}`` for the class name.
        load: split (``train`` or ``test``) -> its images.
        source: where the images come from, for messages and records.
        origin: how a user's own folder was read; None for other tasks.
        published: whether the class names were published with a benchmark, and so are never refused.
    """

    name: str
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    load: Callable[[str], Images]
    source: str
    origin: Origin | None = None
    published: bool = False

    def __post_init__(self) -> None:
        try:
            task_name(self.name)
            check_words(self.class_names, self.templates)
            printable(self.source)
        except ValueError as exc:
            raise TaskInvalid(f"task {self.name[:MAX_NAME_BYTES]!r} ({one_line(self.source)}): {exc}") from exc

    def prompts(self) -> list[str]:
        """Return the prompt of every class, in the first template."""
        return [prompt_of(self.templates[0], name) for name in self.class_names]


def skip_unreadable(task: Task, preprocess: Callable[[Image.Image], Tensor], tell: Callable[[str], None]) -> Task:
    """Return the same task without the images that can't be read, each of which is reported to ``tell``.

    A split is checked when it is first loaded, which takes as long as reading all of it.

    Args:
        preprocess: the model's preprocessing, which refuses some images that can be decoded.
    """

    @functools.cache
    def load(split: str) -> Images:
        images = task.load(split).readable(preprocess, tell)
        if not len(images):
            raise TaskInvalid(f"task {task.name!r} ({task.source}): not one of its {split} images can be read")
        return images

    return replace(task, load=load)
