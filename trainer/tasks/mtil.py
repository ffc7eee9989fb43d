"""The eleven data sets of the MTIL benchmark, as torchvision reads them.

Splits are torchvision's own; Caltech101, EuroSAT and SUN397 have none and get the 80/20 split of ``split.py``.
Templates follow those published with CLIP, cut to a handful a task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torchvision import datasets

from trainer.errors import TaskDataMissing
from trainer.tasks.flowers import FLOWERS
from trainer.tasks.split import split_by_seed
from trainer.tasks.task import Images, Task

EUROSAT = (
    "annual crop land", "forest", "brushland or shrubland", "highway or road", "industrial buildings",
    "pasture land", "permanent crop land", "residential buildings", "river", "sea or lake",
)  # fmt: skip


@dataclass(frozen=True)
class _Source:
    """How torchvision builds a data set, and what it calls things.

    Attributes:
        build: (root, split, download) -> data set; a split of None means that it has none.
        splits: torchvision's names of train and test; empty where the data set has none.
        labels: data set -> index of the class of every image.
        class_names: data set -> class names.
        folder: what to look for below the data root.
        by_hand: the download is dead; the folder has to be provided.
    """

    build: Callable
    folder: str
    templates: tuple[str, ...]
    splits: tuple = ()
    labels: Callable[[object], Sequence[int]] = lambda d: d._labels
    class_names: Callable[[object], Sequence[str]] = lambda d: d.classes
    by_hand: bool = False


SOURCES = {
    "aircraft": _Source(
        lambda root, split, download: datasets.FGVCAircraft(root, split=split, download=download),
        "fgvc-aircraft-2013b",
        ("a photo of a {}, a type of aircraft", "a photo of the {}, a type of aircraft"),
        ("trainval", "test"),
    ),
    "caltech101": _Source(
        lambda root, split, download: datasets.Caltech101(root, download=download),
        "caltech101",
        ("a photo of a {}", "a picture of a {}", "a drawing of a {}"),
        labels=lambda d: d.y,
        class_names=lambda d: d.categories,
    ),
    "cifar100": _Source(
        lambda root, split, download: datasets.CIFAR100(root, train=split, download=download),
        "cifar-100-python",
        ("a photo of a {}", "a blurry photo of a {}", "a low contrast photo of a {}"),
        (True, False),
        labels=lambda d: d.targets,
    ),
    "dtd": _Source(
        lambda root, split, download: datasets.DTD(root, split=split, download=download),
        "dtd",
        ("a photo of a {} texture", "a photo of a {} pattern", "a photo of a {} thing"),
        ("train", "test"),
    ),
    "eurosat": _Source(
        lambda root, split, download: datasets.EuroSAT(root, download=download),
        "eurosat",
        ("a centered satellite photo of {}", "a satellite photo of {}"),
        labels=lambda d: d.targets,
        class_names=lambda d: EUROSAT,
    ),
    "flowers": _Source(
        lambda root, split, download: datasets.Flowers102(root, split=split, download=download),
        "flowers-102",
        ("a photo of a {}, a type of flower",),
        ("train", "test"),
        class_names=lambda d: FLOWERS,
    ),
    "food": _Source(
        lambda root, split, download: datasets.Food101(root, split=split, download=download),
        "food-101",
        ("a photo of {}, a type of food", "a photo of a plate of {}"),
        ("train", "test"),
    ),
    "mnist": _Source(
        lambda root, split, download: datasets.MNIST(root, train=split, download=download),
        "MNIST",
        ('a photo of the number "{}"', 'a handwritten "{}"'),
        (True, False),
        labels=lambda d: d.targets.tolist(),
        class_names=lambda d: tuple("0123456789"),
    ),
    "oxford-pet": _Source(
        lambda root, split, download: datasets.OxfordIIITPet(root, split=split, download=download),
        "oxford-iiit-pet",
        ("a photo of a {}, a type of pet",),
        ("trainval", "test"),
    ),
    "stanford-cars": _Source(
        lambda root, split, download: datasets.StanfordCars(root, split=split, download=False),
        "stanford_cars",
        ("a photo of a {}", "a photo of my {}", "a photo of my new {}"),
        ("train", "test"),
        labels=lambda d: [label for _, label in d._samples],
        by_hand=True,
    ),
    "sun397": _Source(
        lambda root, split, download: datasets.SUN397(root, download=False),
        "SUN397",
        ("a photo of a {}", "a photo of the {}"),
        by_hand=True,
    ),
}


# The benchmark's two orders, and X-TAIL's tasks.
LISTS = {
    "mtil-1": tuple(SOURCES),
    "mtil-2": (
        "stanford-cars", "food", "mnist", "oxford-pet", "flowers", "sun397", "aircraft", "caltech101", "dtd", "eurosat",
        "cifar100",
    ),
    "x-tail": tuple(name for name in SOURCES if name != "cifar100"),
}  # fmt: skip


def names() -> tuple[str, ...]:
    """Names of the eleven tasks."""
    return tuple(SOURCES)


def load(name: str, root: Path, download: bool = False) -> Task:
    """One of the eleven, read from below ``root``.

    Raises:
        TaskDataMissing: says where the data was looked for and how to get it.
    """
    source = SOURCES[name]
    if source.splits:
        train, test = (_build(name, source, root, split, download) for split in source.splits)
        images = {"train": _images(train, source, name), "test": _images(test, source, name)}
    else:
        train = _build(name, source, root, None, download)
        images = split_by_seed(_images(train, source, name))
    return Task(
        name=name,
        class_names=tuple(str(c).replace("_", " ").replace("/", " ") for c in source.class_names(train)),
        templates=source.templates,
        load=images.__getitem__,
        source=str(root / source.folder),
    )


def _build(name: str, source: _Source, root: Path, split: object, download: bool) -> object:
    folder = root / source.folder
    if not folder.is_dir() and not (download and not source.by_hand):
        if source.by_hand:
            step = "its download is dead: put the folder there in torchvision's layout"
        else:
            step = "fetch it with --download, or name the folder it is in with --data"
        raise TaskDataMissing(f"task {name!r}: no data in {folder}; {step}")
    try:
        return source.build(str(root), split, download)
    except (
        OSError,
        RuntimeError,
        ValueError,
    ) as exc:  # torchvision's words for incomplete, unreachable, unreadable
        raise TaskDataMissing(
            f"task {name!r}: {folder} is not the whole data set ({' '.join(str(exc).split())[:200]}); "
            "fetch it again with --download"
        ) from exc


def _images(dataset: object, source: _Source, name: str) -> Images:
    return Images(
        labels=source.labels(dataset),
        open=lambda index: dataset[index][0],
        name_of=lambda index: f"{index} of {name}",
    )
