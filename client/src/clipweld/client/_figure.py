"""The figure of a bench: the cost of merged and unmerged adapters relative to the base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from clipweld.client._bench import BenchResult, Timing
from clipweld.client._results_file import replacing
from clipweld.client.errors import ResultsError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BASE, MERGED, UNMERGED = "#8c96a0", "#0f766e", "#c2410c"


def draw(result: BenchResult, path: Path) -> None:
    """Draw a result to a file, in the format of its ending.

    Raises:
        ResultsError: matplotlib is not installed, the ending is unknown, or the file can't be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as exc:
        raise ResultsError("a figure needs matplotlib; install it with: pip install 'clipweld[figure]'") from exc
    settings = list(dict.fromkeys((timing.batch, timing.concurrency) for timing in result.timings))
    figure = Figure(figsize=(8.2, 0.9 + 0.75 * len(settings) + 0.25 * len(result.timings)), layout="constrained")
    axes = figure.subplots()
    place, ticks = 0.0, []
    for setting in settings:
        group = [timing for timing in result.timings if (timing.batch, timing.concurrency) == setting]
        heading = _heading(*setting)
        axes.text(
            0.0,
            place - 0.62,
            heading,
            transform=axes.get_yaxis_transform(),
            fontsize=9,
            color="#57606a",
            backgroundcolor="white",
        )
        for timing in group:
            ticks.append((place, _name(timing)))
            _point(axes, timing, place)
            place += 1
        place += 1.1
    axes.axvline(1, color=BASE, linewidth=1, zorder=0)
    axes.set_yticks([at for at, _ in ticks], [name for _, name in ticks])
    axes.set_ylim(place - 1.3, -1.3)
    axes.set_xlim(left=min(0.9, axes.get_xlim()[0]), right=axes.get_xlim()[1] * 1.06)
    axes.set_xlabel("latency relative to the base (median of alternating requests; bar: 95% interval)")
    axes.set_title("Inference cost of adapters", loc="left", fontsize=12, fontweight="bold")
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    try:
        with replacing(path) as staged, staged.open("wb") as file:
            kind = path.suffix.removeprefix(".")
            figure.savefig(file, format=kind, metadata={"Date": None} if kind == "svg" else None, dpi=150)
    except (OSError, ValueError) as exc:
        raise ResultsError(f"figure {path}: cannot be written ({exc}); give a .svg or .png that can") from exc


def _point(axes: Axes, timing: Timing, place: float) -> None:
    color = {"base": BASE, "merged": MERGED, "unmerged": UNMERGED}[timing.contender]
    ratio = timing.to_base
    if timing.contender != "base":
        axes.plot([ratio.low, ratio.high], [place, place], color=color, linewidth=3, alpha=0.45, solid_capstyle="round")
    axes.plot(ratio.ratio, place, "o", color=color, markersize=7)
    label = f"{timing.p50_ms:.3g} ms" if timing.contender == "base" else f"{ratio.ratio:.3f}"
    axes.annotate(
        label, (ratio.high, place), xytext=(8, 0), textcoords="offset points", va="center", fontsize=9, color=color
    )


def _name(timing: Timing) -> str:
    if timing.contender == "base":
        return "base CLIP"
    tasks = f"{timing.tasks} task{'s' if timing.tasks != 1 else ''}"
    return f"{tasks}, {timing.contender}"


def _heading(batch: int, concurrency: int) -> str:
    images = "1 image" if batch == 1 else f"{batch} images"
    at_a_time = "" if concurrency == 1 else f", {concurrency} requests at a time"
    return f"{images} per request{at_a_time}"
