"""``client classify`` on whole folders: images, skipped files, and answers written to a file."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TextColumn

from clipweld.client._classifier import ZeroShotClassifier
from clipweld.client._folders import LeftOut, Tally
from clipweld.client._images import as_images, is_url, name_of
from clipweld.client._output import print_json, say
from clipweld.client._results_file import ResultsFile, check_ending, place_of
from clipweld.client.errors import BadImage

UNREADABLE_SHOWN = 20


def check_images(images: list[str], allow_urls: bool) -> None:
    """Raises:
    BadImage: a name is empty, or is a URL although URLs are not allowed.
    """
    for image in images:
        if not image:
            raise BadImage("an empty text is no image; name image files, or folders of them")
        if is_url(image) and not allow_urls:
            raise BadImage(f"{name_of(image, 0)} is a URL; --allow-urls allows that")


def image_names(images: list[str], tally: Tally) -> Iterator[str]:
    """Yield the images, and those in folders; what is left out of a folder is counted."""
    for image in images:
        yield from map(str, as_images(image, tally.add))


def _names_once(images: list[str], tally: Tally) -> list[str]:
    """Return each image once, however often it is given, and however its folder is spelled."""
    listed: dict[str, str] = {}
    for image in image_names(images, tally):
        place = place_of(name_of(image, 0))
        if place in listed:
            tally.add(LeftOut(image, "named twice"))
        listed.setdefault(place, image)
    return list(listed.values())


def say_left_out(tally: Tally) -> None:
    """Print one line about what was left out, if anything was."""
    if tally.counts:
        say(f"left out: {tally}")


def classify_into(
    classifier: ZeroShotClassifier, images: list[str], question: dict[str, Any], out: Path, as_json: bool
) -> None:
    """Write answers to a file, with a progress bar; images that an earlier run has answered are skipped."""
    asked = {name: question[name] for name in ("labels", "task", "templates", "top_k")}
    versions: set[int] = set()
    bad: list[BadImage] = []
    tally = Tally()
    check_ending(out)
    listed = _names_once(images, tally)
    columns = (*Progress.get_default_columns(), TextColumn("{task.fields[rate]}"))
    with ResultsFile(out, question) as results, Progress(*columns, console=Console(stderr=True)) as progress:
        earlier = len(results.done)
        todo = [image for image in listed if not results.has(image)]
        bar = progress.add_task("Classifying", total=len(listed), completed=len(listed) - len(todo), rate="")
        started = time.monotonic()

        def step() -> None:
            rate = (len(results.done) - earlier) / (time.monotonic() - started)
            progress.update(bar, advance=1, rate=f"{rate:,.1f} images/s")

        def unreadable(error: BadImage) -> None:
            bad.append(error)
            results.add_unreadable(error)
            step()

        for answer in classifier.classify(todo, **asked, unreadable=unreadable):
            results.add(answer)
            versions.add(answer.version)
            step()
        results.finish()
        seconds = time.monotonic() - started
    summary = {
        "out": str(out),
        "images": len(results.done),
        "of_earlier_runs": earlier,
        "unreadable": results.unreadable,
        "left_out": dict(tally.counts),
        "versions": sorted(versions),
        "seconds": round(seconds, 2),
        "images_per_s": round((len(results.done) - earlier) / seconds, 1),
    }
    for error in bad[:UNREADABLE_SHOWN]:
        say(str(error))
    say_left_out(tally)
    if as_json:
        print_json(summary)
    else:
        told = f", {results.unreadable:,} of them unreadable: see the column error" if results.unreadable else ""
        told += f"; {tally.counts.total():,} left out" if tally.counts else ""
        print(f"{out}: {len(results.done):,} images{told}; {summary['images_per_s']:,} images/s")
