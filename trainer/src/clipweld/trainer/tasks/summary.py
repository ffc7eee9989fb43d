"""Summarise a task in one line, and warn about likely mistakes in it, before anything that takes long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from clipweld.trainer.schemas import one_line
from clipweld.trainer.tasks.equal_files import equal_files
from clipweld.trainer.tasks.task import Images, Task
from clipweld.trainer.tasks.tree import listed

UNEVEN = 4  # warn if one class has more than this many times the images of another
SHOWN = 5  # of renamed folders, or of kinds of files


@dataclass(frozen=True)
class Counts:
    """Numbers of images in a split.

    Attributes:
        per_class: one number per class, in the order of the task's class names.
    """

    per_class: tuple[int, ...]

    def __str__(self) -> str:
        fewest, most = min(self.per_class), max(self.per_class)
        return f"{most:,}" if fewest == most else f"{fewest:,} to {most:,}"


@dataclass(frozen=True)
class Summary:
    """What was loaded.

    Attributes:
        train, test: images per class.
        used: the training images per class that training draws. ``train`` and ``used`` are None if the task is only
            tested.
        left_out: how many entries of a folder were left out, by kind.
        renamed: class folder -> class name, where they differ.
        notes: what a split is made of, if that isn't obvious.
        warnings: what a user should check.
    """

    task: str
    source: str
    class_names: tuple[str, ...]
    train: Counts | None
    used: Counts | None
    test: Counts
    left_out: Mapping[str, int]
    renamed: Mapping[str, str]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    def lines(self) -> list[str]:
        """Return the summary as a line, followed by one line per warning."""
        return [self.line(), *(f"warning: {self.task}: {warning}" for warning in self.warnings)]

    def line(self) -> str:
        """Return the summary as one line, without the warnings."""
        where = "" if self.source == self.task else f" ({self.source})"
        parts = [f"{self.task}{where}: {len(self.class_names):,} classes"]
        if self.train and self.used:
            used = "all used" if self.used == self.train else f"{self.used} per class used (--shots)"
            parts.append(f"train {self._range(self.train)}, {used}")
        parts += [f"test {self._range(self.test)}", *self.notes]
        if self.left_out:
            parts.append(f"{sum(self.left_out.values()):,} left out ({_some(_kinds(self.left_out))})")
        if self.renamed:
            parts.append(f"names: {_some([f'{folder} -> {name}' for folder, name in self.renamed.items()])}")
        return "; ".join(parts)

    def _range(self, counts: Counts) -> str:
        fewest = min(counts.per_class)
        if fewest == max(counts.per_class):
            return f"{counts} {'image' if fewest == 1 else 'images'} per class"
        return f"{counts} images per class (fewest: {self.class_names[counts.per_class.index(fewest)]})"


def summarise(task: Task, shots: int | None = None, *, balanced: bool = False) -> Summary:
    """Count a task's images, and look for common mistakes in a user's own folder.

    Args:
        shots: images per class that training draws, 0 for all; None if the task is only tested.
        balanced: whether training draws all classes equally often, so that uneven numbers need no warning.
    """
    number = len(task.class_names)
    test = task.load("test")
    train = None if shots is None else task.load("train")
    counts = None if train is None else _counts(train, number)
    used = None if counts is None else Counts(tuple(min(count, shots or count) for count in counts.per_class))
    origin = task.origin
    warnings: tuple[str, ...] = ()
    if origin:
        warnings = (
            *origin.warnings,
            *_warnings(task.class_names, None if balanced else used, _counts(test, number)),
            *_equal(task.load("train"), test),
        )
    folders = origin.class_folders if origin else task.class_names
    return Summary(
        task=task.name,
        source=task.source,
        class_names=task.class_names,
        train=counts,
        used=used,
        test=_counts(test, number),
        left_out=dict(origin.left_out) if origin else {},
        renamed={own: name for own, name in zip(folders, task.class_names, strict=True) if own != name},
        notes=origin.notes if origin else (),
        warnings=warnings,
    )


def _counts(images: Images, classes: int) -> Counts:
    counts = [0] * classes
    for label in images.labels:
        counts[label] += 1
    return Counts(tuple(counts))


def _warnings(names: Sequence[str], train: Counts | None, test: Counts) -> list[str]:
    """Return warnings about the numbers of images: those that training uses, and those that are tested."""
    warnings = []
    for split, counts in (("training", train), ("test", test)):
        ranked = sorted((count, name) for count, name in zip(counts.per_class, names, strict=True)) if counts else []
        some = [(count, name) for count, name in ranked if count]
        if some and some[-1][0] > UNEVEN * some[0][0]:
            (fewest, rare), (most, common) = some[0], some[-1]
            advice = "; --balance draws all classes equally often" if split == "training" else ""
            warnings.append(f"class {common!r} has {most:,} {split} images, class {rare!r} {fewest:,}{advice}")
            break
    if untested := [name for count, name in zip(test.per_class, names, strict=True) if not count]:
        warnings.append(f"no test image in class {listed(untested)}; its accuracy is not measured")
    return warnings


def _equal(train: Images, test: Images) -> list[str]:
    """Return a warning if images are in both splits."""
    equal = equal_files(train.files, test.files)
    if not equal.found:
        return []
    (one, other), looked_at = equal.found[0], "" if equal.looked_at == len(test) else " looked at"
    return [
        f"{len(equal.found):,} of {equal.looked_at:,} test images{looked_at} are training images too, so that "
        f"accuracies will be too high, such as {one_line(one)} and {one_line(other)}"
    ]


def _kinds(left_out: Mapping[str, int]) -> list[str]:
    return [f"{count:,} {kind}" for kind, count in sorted(left_out.items(), key=lambda item: (-item[1], item[0]))]


def _some(texts: Sequence[str]) -> str:
    shown = ", ".join(texts[:SHOWN])
    return shown if len(texts) <= SHOWN else f"{shown} and {len(texts) - SHOWN:,} more"
