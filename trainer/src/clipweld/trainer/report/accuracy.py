"""Figures of accuracy: the four measures, the accuracy matrices, and accuracy over the number of parameters kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from matplotlib.transforms import IdentityTransform

from clipweld.trainer.config import MEASURES
from clipweld.trainer.report.figures import GREY, INK, WIDTH, Picture, draw, hide_frame, looks, number_cells, wrap
from clipweld.trainer.report.groups import Group, Section
from clipweld.trainer.report.runs import Run
from clipweld.trainer.sequence.folder import SequenceResult

COLOUR_MAP = "viridis"
DASHES = (0, (4, 3))
MIN_RANGE = 4.0  # percentage points that an axis covers at least
CELL = 0.3  # inches: height of a heat map's cell


def comparison(section: Section, space: str, file_name: str) -> Picture:
    """Draw the four measures of every group: mean, standard deviation and single runs, with zero-shot for reference."""
    groups = section.groups
    styles = looks(groups)
    lasts = ", ".join(f"{group.label} {group.last(space).mean:.1f}%" for group in groups)

    def paint(figure: Figure) -> None:
        for ax, name in zip(figure.subplots(1, 4, sharey=True), MEASURES, strict=True):
            for row, group in enumerate(groups):
                _mean_and_runs(ax, row, group, space, name, styles[group.label])
                if before := group.zero_shot(space, name):
                    ax.plot(
                        [before.mean] * 2, [row - 0.5, row + 0.5], color=INK, linestyle=DASHES, linewidth=1, zorder=1
                    )
            arrow = "lower is better" if name == "forgetting" else "higher is better"
            ax.set_title(name.capitalize())
            ax.set_xlabel(f"{'percent points' if name == 'forgetting' else 'accuracy, %'}\n({arrow})")
            ax.set_yticks(range(len(groups)), [wrap(group.label) for group in groups])
            ax.set_ylim(len(groups) - 0.45, -0.65)
            _percent_axis(ax, defined=any(group.measure(space, name) for group in groups))
            ax.tick_params(axis="y", length=0)
            ax.spines["left"].set_visible(False)
        spreads = any(len(group.runs) > 1 for group in groups)
        figure.legend(handles=_comparison_key(spreads), loc="outside lower center", ncols=4, handletextpad=0.5)

    height = 1.45 + sum(0.36 + 0.14 * wrap(group.label).count("\n") for group in groups)
    alt = f"Dot plots of Transfer, Average, Last and Forgetting, one row for each group of runs. Last: {lasts}."
    return draw(file_name, alt, (WIDTH, height), paint)


def _mean_and_runs(ax: Axes, row: int, group: Group, space: str, name: str, style: dict[str, Any]) -> None:
    values = group.measure(space, name)
    if values is None:
        ax.text(0.5, row, "not defined", transform=ax.get_yaxis_transform(), ha="center", va="center", color=GREY,
                fontsize=8.5)  # fmt: skip
        return
    if values.sd is not None:
        single = np.linspace(-0.09, 0.09, values.n)
        ax.plot(values.values, row + single, "o", color=style["color"], alpha=0.3, markersize=3, markeredgewidth=0)
    ax.errorbar(values.mean, row, xerr=values.sd, capsize=3, linewidth=1.4, markersize=6.5, zorder=3, **style)
    ax.annotate(f"{values.mean:.1f}", (values.mean, row), (0, 7), textcoords="offset points", ha="center", fontsize=8.5,
                zorder=2.5, bbox={"facecolor": "white", "linewidth": 0, "pad": 0.6})  # fmt: skip


def _percent_axis(ax: Axes, *, defined: bool) -> None:
    """Leave room around the points, and show at least MIN_RANGE, so that a difference of 0.1 doesn't look large."""
    if not defined:
        ax.set_xticks([])
        return
    ax.margins(x=0.14)
    low, high = ax.get_xlim()
    missing = max(0.0, MIN_RANGE - (high - low))
    ax.set_xlim(low - missing / 2, high + missing / 2)
    ax.grid(axis="x")


def _comparison_key(spreads: bool) -> list[Line2D]:
    zero_shot = Line2D([], [], color=INK, linestyle=DASHES, linewidth=1, label="zero-shot, same tasks and orders")
    if not spreads:
        return [zero_shot]
    return [
        Line2D([], [], color=GREY, marker="o", linestyle="", label="mean (hollow: a setting was changed)"),
        Line2D([], [], color=GREY, marker="|", linewidth=1.4, label="± one standard deviation"),
        Line2D([], [], color=GREY, marker="o", markersize=3, alpha=0.5, linestyle="", label="one run"),
        zero_shot,
    ]


def matrices(section: Section, space: str, file_name: str) -> Picture:
    """Draw the accuracy matrix of one run per group: learned tasks down, tested tasks across."""
    runs = {group.label: section.representative(group) for group in section.groups}
    tested = max(len(run.results[space].tested) for run in runs.values())
    across = 2 if len(runs) > 1 and tested <= 12 else 1
    down = math.ceil(len(runs) / across)
    # A method that learns all tasks at once has only two rows; a line of only such panels is made lower.
    lengths = [1 + len(run.results[space].matrix) for run in runs.values()]
    rows = [max(lengths[i : i + across]) for i in range(0, len(runs), across)]
    width = WIDTH if across == 2 else min(WIDTH, 2.6 + 0.8 * tested)
    height = 1.0 + sum(0.75 + CELL * count for count in rows)

    def paint(figure: Figure) -> None:
        figure.set_layout_engine("constrained", h_pad=0.1)
        axes = figure.subplots(down, across, squeeze=False, height_ratios=rows)
        for place, (ax, (label, run)) in enumerate(zip(axes.flat, runs.items(), strict=False)):
            title = wrap(f"{label} (seed {run.seed}{_order(run)})", 58)
            heat_map(ax, title, run.results[space], rows[place // across], width / across / (tested + 1.6))
        for ax in axes.flat[len(runs) :]:
            ax.set_axis_off()
        scale = matplotlib.cm.ScalarMappable(Normalize(0, 100), COLOUR_MAP)
        figure.colorbar(scale, ax=axes, location="bottom", label="accuracy, %", aspect=60 if across == 2 else 25,
                        shrink=0.6 if across == 2 else 0.9, pad=0.12 / height)  # fmt: skip

    alt = (
        f"Heat maps of test accuracy, one for each of {', '.join(runs)}: a row for zero-shot and one after each "
        "learned task, a column for each tested task."
    )
    return draw(file_name, alt, (width, height), paint)


def _order(run: Run) -> str:
    return "" if run.order_seed is None else f", order {run.order_seed}"


def heat_map(ax: Axes, title: str, result: SequenceResult, rows: int, cell: float) -> None:
    """Draw accuracy on every tested task, zero-shot and after each learned task, whose own cell gets a frame.

    Args:
        rows: number of rows to leave room for.
        cell: width of a cell in inches.
    """
    values = np.array([result.zero_shot, *result.matrix])
    stepwise = len(result.matrix) == len(result.tasks)
    image = ax.imshow(values, aspect="auto", cmap=COLOUR_MAP, norm=Normalize(0, 100))
    number_cells(ax, values, image.to_rgba(values), "{:.1f}".format, 8.5 if cell > 0.42 else 7.5)
    for at in range(len(result.tasks) if stepwise else 0):
        for colour, line in (("white", 3.4), ("black", 1.5)):
            x, y = 0.022 / cell, 0.022 / CELL  # the line lies inside the cell
            box = Rectangle((at - 0.5 + x, at + 0.5 + y), 1 - 2 * x, 1 - 2 * y, fill=False, ec=colour, linewidth=line)
            ax.add_patch(box)
    if len(result.tested) > len(result.tasks):
        ax.axvline(len(result.tasks) - 0.5, color="white", linewidth=4)
    learned = [f"after {task}" for task in result.tasks] if stepwise else ["after all at once"]
    slanted = max(map(len, result.tested)) * 0.085 > cell
    ax.xaxis.tick_top()
    ax.set_xticks(range(len(result.tested)), result.tested, rotation=35 if slanted else 0,
                  ha="left" if slanted else "center", rotation_mode="anchor" if slanted else None)  # fmt: skip
    ax.set_yticks(range(len(values)), ["zero-shot", *learned])
    ax.set_ylim(rows - 0.5, -0.5)
    ax.set_title(title)
    hide_frame(ax)


def parameters(section: Section, space: str, file_name: str) -> Picture:
    """Draw Last over the number of parameters kept per task."""
    groups = section.groups
    styles = looks(groups)
    zero_shot = section.zero_shot(space).mean

    def paint(figure: Figure) -> None:
        ax = figure.subplots()
        for group in groups:
            last = group.last(space)
            ax.errorbar(group.kept_parameters, last.mean, yerr=last.sd, capsize=3, linewidth=1.3, markersize=7.5,
                        linestyle="", label=group.label, zorder=3, **styles[group.label])  # fmt: skip
        ax.axhline(zero_shot, color=INK, linestyle=DASHES, linewidth=1)
        ax.annotate("zero-shot", (1, zero_shot), (-2, 3), xycoords=("axes fraction", "data"), ha="right", color=INK,
                    textcoords="offset points", fontsize=8.5)  # fmt: skip
        _parameter_axis(ax, [group.kept_parameters for group in groups])
        ax.set_ylabel("Last, % (higher is better)")
        ax.margins(y=0.12)
        ax.grid()
        _direct_labels(figure, ax, groups, space, styles)

    alt = "Scatter plot of Last over parameters kept: " + "; ".join(
        f"{group.label} {group.last(space).mean:.1f}% with {short(group.kept_parameters)}" for group in groups
    )
    return draw(file_name, alt + ".", (WIDTH, 4.8), paint)


def short(number: float) -> str:
    """Return a count in three significant digits: 119808 becomes 120k."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def _parameter_axis(ax: Axes, counts: Sequence[float]) -> None:
    low, high = max(min(counts), 1) / 2.5, max(max(counts), 1) * 2.5
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if high / low < 300 else (1,)
    ax.set_xscale("log")
    ax.set_xlim(low, high)
    ax.xaxis.set_major_locator(
        FixedLocator([s * 10.0**d for d in decades for s in steps if low <= s * 10.0**d <= high])
    )
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    ax.set_xlabel("parameters kept for a task (log scale)")


def _direct_labels(figure: Figure, ax: Axes, groups: Sequence[Group], space: str, styles: dict) -> None:
    """Put a label beside every point, moved apart so that labels don't touch; if they still do, draw a legend."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    ax.autoscale(False)
    points = {g.label: ax.transData.transform((g.kept_parameters, g.last(space).mean)) for g in groups}
    reach, gap, line_height = 0.12 * ax.bbox.width, 0.22 * figure.dpi, 0.17 * figure.dpi
    texts, leaders = [], []
    for members in _near(points, reach):
        places = [points[label] for label in members]
        left = np.mean([x for x, _ in places]) > ax.bbox.x0 + 0.6 * ax.bbox.width
        edge = min(x for x, _ in places) - gap if left else max(x for x, _ in places) + gap
        for label, (x, y), height in zip(members, places, spread_out([y for _, y in places], line_height), strict=True):
            place: dict[str, Any] = {"transform": IdentityTransform(), "zorder": 1.5}
            leaders += ax.plot([x, edge], [y, height], linewidth=0.8, color=styles[label]["color"], **place)
            texts.append(ax.text(edge, height, f" {label} ", ha="right" if left else "left", va="center", **place))
    boxes = [text.get_window_extent() for text in texts]
    touching = any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
    hidden = any(box.contains(*point) for box in boxes for point in points.values())
    inside = all(ax.bbox.x0 <= box.x0 and box.x1 <= ax.bbox.x1 and box.y1 <= figure.bbox.y1 for box in boxes)
    if touching or hidden or not inside:
        for one in (*texts, *leaders):
            one.remove()
        ax.legend(loc="best", frameon=True)


def _near(points: dict[str, np.ndarray], reach: float) -> list[list[str]]:
    """Return clusters of labels, each sorted by height; in a cluster, neighbouring points are within ``reach`` in x."""
    clusters: list[list[str]] = []
    for label in sorted(points, key=lambda name: points[name][0]):
        if clusters and points[label][0] - points[clusters[-1][-1]][0] <= reach:
            clusters[-1].append(label)
        else:
            clusters.append([label])
    return [sorted(cluster, key=lambda name: points[name][1]) for cluster in clusters]


def spread_out(wanted: Sequence[float], gap: float) -> list[float]:
    """Return ascending positions at least ``gap`` apart that are closest to the wanted ones in least squares.

    The algorithm is pool adjacent violators: positions that would be too close are shifted as one block.

    Args:
        wanted: positions, ascending.
    """
    blocks: list[list[float]] = []
    for place, value in enumerate(wanted):
        blocks.append([value - place * gap])
        while len(blocks) > 1 and np.mean(blocks[-2]) > np.mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    level = [float(np.mean(block)) for block in blocks for _ in block]
    return [value + place * gap for place, value in enumerate(level)]
