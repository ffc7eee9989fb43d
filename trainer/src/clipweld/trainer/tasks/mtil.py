"""The eleven data sets of the MTIL benchmark, as torchvision reads them.

Splits are torchvision's own; Caltech101, EuroSAT and SUN397 have none and get the 80/20 split of ``split.py``.
Class names and templates follow those published with CLIP; templates are reduced to a handful per task.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import IO, Any

from torchvision import datasets

from clipweld.trainer.errors import TaskDataMissing
from clipweld.trainer.tasks.flowers import FLOWERS
from clipweld.trainer.tasks.lists import MTIL
from clipweld.trainer.tasks.split import split_by_seed
from clipweld.trainer.tasks.task import Images, Task

EUROSAT = (
    "annual crop land", "forest", "brushland or shrubland", "highway or road", "industrial buildings",
    "pasture land", "permanent crop land", "residential buildings", "river", "sea or lake",
)  # fmt: skip
# Class folders whose names would make poor prompts; in the other names, only underscores become spaces.
CALTECH = {
    "Faces": "off-center face",
    "Faces_easy": "centered face",
    "Leopards": "leopard",
    "Motorbikes": "motorbike",
    "airplanes": "airplane",
    "car_side": "side of a car",
    "cougar_body": "body of a cougar cat",
    "cougar_face": "face of a cougar cat",
    "crocodile_head": "head of a crocodile",
    "flamingo_head": "head of a flamingo",
    "snoopy": "snoopy, a cartoon beagle",
    "water_lilly": "water lily",
    "wild_cat": "wild cat",
    "yin_yang": "yin and yang symbol",
}


# torchvision has these URLs only inside functions, where they can't be imported from.
CALTECH_URL = "https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip"
EUROSAT_URL = (
    "https://huggingface.co/datasets/torchgeo/eurosat/resolve/c877bcd43f099cd0196738f714544e355477f3fd/EuroSAT.zip"
)
FLOWERS_URL = datasets.Flowers102._download_url_prefix
DEAD = "its download is dead: copy the data set there, in torchvision's layout"


@dataclass(frozen=True)
class _Source:
    """How to build a data set with torchvision, and how to read its labels, class names and files.

    Attributes:
        build: (root, split, download) -> data set; the split is None if the data set has no splits.
        folder: the data set's folder below the data root.
        needs: paths that must exist in that folder.
        by_hand: how to provide the data set without torchvision's download; ``{root}`` is the data root.
        splits: torchvision's names for train and test; empty if the data set has no splits.
        labels: data set -> class index of every image.
        class_names: data set -> class names.
        files: data set -> the image files that its annotations name.
    """

    build: Callable[..., Any]
    folder: str
    needs: tuple[str, ...]
    by_hand: str
    templates: tuple[str, ...]
    splits: tuple[str | bool, ...] = ()
    labels: Callable[[Any], Sequence[int]] = lambda d: d._labels
    class_names: Callable[[Any], Sequence[str]] = lambda d: d.classes
    files: Callable[[Any], Sequence[str | Path]] = lambda d: ()

    @property
    def dead(self) -> bool:
        """Whether the download no longer works, so that the user has to provide the folder."""
        return self.by_hand == DEAD


def _sun397(root: str, split: None, download: bool) -> datasets.SUN397:
    """Build SUN397 sorted by file name, as the split depends on the order, and torchvision uses the file system's."""
    dataset = datasets.SUN397(root, download=False)
    images = sorted(zip(dataset._image_files, dataset._labels, strict=True))
    dataset._image_files, dataset._labels = [list(column) for column in zip(*images, strict=True)] or ([], [])
    return dataset


SOURCES = {
    "aircraft": _Source(
        lambda root, split, download: datasets.FGVCAircraft(root, split=split, download=download),
        "fgvc-aircraft-2013b",
        ("data/variants.txt", "data/images_variant_trainval.txt", "data/images_variant_test.txt", "data/images"),
        f"unpack {datasets.FGVCAircraft._URL} in {{root}}",
        ("a photo of a {}, a type of aircraft", "a photo of the {}, a type of aircraft"),
        ("trainval", "test"),
        files=lambda d: d._image_files,
    ),
    "caltech101": _Source(
        lambda root, split, download: datasets.Caltech101(root, download=download),
        "caltech101",
        ("101_ObjectCategories/BACKGROUND_Google", "101_ObjectCategories/Faces"),
        f"unpack {CALTECH_URL}, and 101_ObjectCategories.tar.gz that is in it, in {{root}}/caltech101",
        ("a photo of a {}", "a picture of a {}", "a drawing of a {}"),
        labels=lambda d: d.y,
        class_names=lambda d: [CALTECH.get(name, name) for name in d.categories],
    ),
    "cifar100": _Source(
        lambda root, split, download: datasets.CIFAR100(root, train=split, download=download),
        "cifar-100-python",
        ("train", "test", "meta"),
        f"unpack {datasets.CIFAR100.url} in {{root}}",
        ("a photo of a {}", "a blurry photo of a {}", "a low contrast photo of a {}"),
        (True, False),
        labels=lambda d: d.targets,
    ),
    "dtd": _Source(
        lambda root, split, download: datasets.DTD(root, split=split, download=download),
        "dtd",
        ("dtd/labels/train1.txt", "dtd/labels/test1.txt", "dtd/images"),
        f"unpack {datasets.DTD._URL} in {{root}}/dtd",
        ("a photo of a {} texture", "a photo of a {} pattern", "a photo of a {} thing"),
        ("train", "test"),
        files=lambda d: d._image_files,
    ),
    "eurosat": _Source(
        lambda root, split, download: datasets.EuroSAT(root, download=download),
        "eurosat",
        ("2750",),
        f"unpack {EUROSAT_URL} in {{root}}/eurosat",
        ("a centered satellite photo of {}", "a satellite photo of {}"),
        labels=lambda d: d.targets,
        class_names=lambda d: EUROSAT,
    ),
    "flowers": _Source(
        lambda root, split, download: datasets.Flowers102(root, split=split, download=download),
        "flowers-102",
        ("imagelabels.mat", "setid.mat", "jpg"),
        f"unpack {FLOWERS_URL}102flowers.tgz in {{root}}/flowers-102, imagelabels.mat and setid.mat from there beside",
        ("a photo of a {}, a type of flower",),
        ("train", "test"),
        class_names=lambda d: FLOWERS,
        files=lambda d: d._image_files,
    ),
    "food": _Source(
        lambda root, split, download: datasets.Food101(root, split=split, download=download),
        "food-101",
        ("meta/train.json", "meta/test.json", "images"),
        f"unpack {datasets.Food101._URL} in {{root}}",
        ("a photo of {}, a type of food", "a photo of a plate of {}"),
        ("train", "test"),
        files=lambda d: d._image_files,
    ),
    "mnist": _Source(
        lambda root, split, download: datasets.MNIST(root, train=split, download=download),
        "MNIST",
        (
            "raw/train-images-idx3-ubyte",
            "raw/train-labels-idx1-ubyte",
            "raw/t10k-images-idx3-ubyte",
            "raw/t10k-labels-idx1-ubyte",
        ),
        f"put the four files from {datasets.MNIST.mirrors[0]}, unpacked, in {{root}}/MNIST/raw",
        ('a photo of the number "{}"', 'a handwritten "{}"'),
        (True, False),
        labels=lambda d: d.targets.tolist(),
        class_names=lambda d: tuple("0123456789"),
    ),
    "oxford-pet": _Source(
        lambda root, split, download: datasets.OxfordIIITPet(root, split=split, download=download),
        "oxford-iiit-pet",
        ("annotations/trainval.txt", "annotations/test.txt", "images"),
        f"unpack {' and '.join(url for url, _ in datasets.OxfordIIITPet._RESOURCES)} in {{root}}/oxford-iiit-pet",
        ("a photo of a {}, a type of pet",),
        ("trainval", "test"),
        files=lambda d: d._images,
    ),
    "stanford-cars": _Source(
        lambda root, split, download: datasets.StanfordCars(root, split=split, download=False),
        "stanford_cars",
        (
            "devkit/cars_meta.mat",
            "devkit/cars_train_annos.mat",
            "cars_test_annos_withlabels.mat",
            "cars_train",
            "cars_test",
        ),
        DEAD,
        ("a photo of a {}", "a photo of my {}", "a photo of my new {}"),
        ("train", "test"),
        labels=lambda d: [label for _, label in d._samples],
        files=lambda d: [path for path, _ in d._samples],
    ),
    "sun397": _Source(
        _sun397,
        "SUN397",
        ("ClassName.txt", "a/abbey"),
        DEAD,
        ("a photo of a {}", "a photo of the {}"),
        files=lambda d: d._image_files,
    ),
}


def names() -> tuple[str, ...]:
    """Return the names of the eleven tasks."""
    return MTIL


def load(name: str, root: Path, download: bool = False) -> Task:
    """Load one of the eleven tasks from below ``root``.

    Raises:
        TaskDataMissing: files are missing or can't be read; the message says which, and how to get them.
    """
    source = SOURCES[name]
    splits = source.splits or (None,)
    built = [_build(name, source, root, split, download) for split in splits]
    parts = [_images(dataset, source, name) for dataset in built]
    images = (
        dict(zip(("train", "test"), parts, strict=True)) if source.splits else split_by_seed(parts[0], f"task {name!r}")
    )
    return Task(
        name=name,
        class_names=tuple(str(c).replace("_", " ").replace("/", " ") for c in source.class_names(built[0])),
        templates=source.templates,
        load=images.__getitem__,
        source=str(root / source.folder),
        published=True,
    )


def missing(name: str, root: Path) -> str:
    """Return what a data set lacks below ``root`` and how to get it, for an error; empty if nothing is missing."""
    source = SOURCES[name]
    folder = root / source.folder
    lacking = [path for path in source.needs if not (folder / path).exists()]
    if not lacking:
        return ""
    step = source.by_hand.format(root=root)
    if folder.is_dir() and not source.dead:
        step = f"remove that folder and give --download, or {step}"
    elif not source.dead:
        step = f"give --download, or {step}; or name the folder that has {source.folder} with --data"
    return f"no {', '.join(lacking)} in {folder}; {step}"


def _build(name: str, source: _Source, root: Path, split: object, download: bool) -> object:
    """Build torchvision's data set of one split; its failures become TaskDataMissing."""
    folder = root / source.folder
    fetch = download and not source.dead and not folder.is_dir()
    if not fetch and (lacking := missing(name, root)):
        raise TaskDataMissing(f"task {name!r}: {lacking}")
    try:
        with _byte_order_marks_dropped():
            dataset = source.build(str(root), split, fetch)
    except (ImportError, OSError, RuntimeError, ValueError, KeyError) as exc:  # torchvision raises any of these
        reason = f"{type(exc).__name__}: {shorten(str(exc), 200, placeholder=' ...')}"
        by_hand = source.by_hand.format(root=root)
        if fetch:
            raise TaskDataMissing(f"task {name!r}: can't be downloaded ({reason}); {by_hand}") from exc
        again = by_hand if source.dead else f"remove it and give --download, or {by_hand}"
        raise TaskDataMissing(f"task {name!r}: {folder} can't be read ({reason}); {again}") from exc
    if absent := _absent(source.files(dataset)):
        raise TaskDataMissing(
            f"task {name!r}: {len(absent)} of its images are missing, such as {absent[0]}; provide them"
        )
    return dataset


@contextmanager
def _byte_order_marks_dropped() -> Iterator[None]:
    """Let torchvision read label lists that begin with a byte order mark, as editors on Windows save them."""

    def reading(file: str | Path, mode: str = "r") -> IO:
        return open(file, mode, encoding=None if "b" in mode else "utf-8-sig")

    modules = [datasets.dtd, datasets.fgvc_aircraft, datasets.food101, datasets.oxford_iiit_pet, datasets.sun397]
    for module in modules:
        module.open = reading  # shadows the built-in open in that module
    try:
        yield
    finally:
        for module in modules:
            del module.open


def _absent(files: Sequence[str | Path]) -> list[Path]:
    """Return the files that don't exist; each folder is listed only once."""
    by_folder = defaultdict(set)
    for path in map(Path, files):
        by_folder[path.parent].add(path.name)
    return sorted(
        folder / name
        for folder, names in by_folder.items()
        for name in names - set(os.listdir(folder) if folder.is_dir() else ())
    )


def _images(dataset: Any, source: _Source, name: str) -> Images:
    files = source.files(dataset)
    return Images(
        labels=source.labels(dataset),
        open=lambda index: dataset[index][0],
        name_of=lambda index: str(files[index]) if files else f"{index} of {name}",
    )
