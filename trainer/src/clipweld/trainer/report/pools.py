"""Figures of the experts: which ones each task used, and how much the tasks overlap."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from clipweld.trainer.report.experts import Overlap, Votes
from clipweld.trainer.report.figures import WIDTH, Picture, draw, hide_frame, number_cells, wrap

COLOUR_MAP = "cividis"
ACROSS = 12  # most panels side by side


def vote_maps(votes: Votes, file_name: str) -> Picture:
    """Draw a heat map per task: experts across, layers down, with one colour scale for all."""
    tasks = list(votes.shares)
    towers = [tower for tower in ("image", "text", "other") if tower in (one for one, _ in votes.layers)]
    layers = {tower: [i for i, (one, _) in enumerate(votes.layers) if one == tower] for tower in towers}
    lines = -(-len(tasks) // ACROSS)
    across = -(-len(tasks) // lines)
    highest = max(float(np.nanmax(shares)) for shares in votes.shares.values())
    scale = Normalize(0, 100 * highest)

    def paint(figure: Figure) -> None:
        axes = figure.subplots(
            lines * len(towers),
            across,
            squeeze=False,
            sharex=True,
            height_ratios=lines * [len(layers[t]) for t in towers],
        )
        for ax in axes.flat:
            ax.set_axis_off()
        for place, task in enumerate(tasks):
            line, column = divmod(place, across)
            for number, tower in enumerate(towers):
                ax = axes[line * len(towers) + number, column]
                blocks = [votes.layers[i][1] for i in layers[tower]]
                _votes(ax, votes.shares[task][layers[tower]], blocks, scale)
                if number == 0:
                    kept = f"{100 * votes.kept_share(task):.0f}%"
                    if across <= 8:
                        ax.set_title(f"{wrap(task, 12)}\ntop {votes.k_merge}: {kept}", fontsize=9)
                    else:
                        ax.set_title(f"{task} {kept}", fontsize=9, rotation=35, rotation_mode="anchor")
                if column == 0:
                    ax.set_ylabel(f"{tower} tower: block")
                    ax.tick_params(axis="y", labelleft=True)
                if number == len(towers) - 1:
                    ax.tick_params(axis="x", labelbottom=True)
                    ax.set_xlabel("expert")
        mappable = matplotlib.cm.ScalarMappable(scale, COLOUR_MAP)
        bar = figure.colorbar(mappable, ax=axes, location="right", shrink=0.6, aspect=30, pad=0.015)
        bar.set_label("share of the layer's votes, %")
        bar.ax.axhline(100 / votes.rank, color="white", linewidth=2.5)
        bar.ax.axhline(100 / votes.rank, color="black", linewidth=1)
        bar.ax.annotate("even", (0, 100 / votes.rank), (-3, 0), textcoords="offset points", ha="right", va="center",
                        fontsize=8)  # fmt: skip

    height = lines * (0.9 + min(max(0.105 * len(votes.layers), 2.2), 8.4))
    alt = (
        f"Heat maps of votes, one for each of the tasks {', '.join(tasks)}: {votes.rank} experts across, "
        f"{len(votes.layers)} layers down, coloured by each expert's share of its layer's votes."
    )
    return draw(file_name, alt, (min(WIDTH, 1.9 + 1.9 * across), height), paint)


def _votes(ax: Axes, shares: np.ndarray, blocks: Sequence[int], scale: Normalize) -> None:
    """Draw one tower of one task; lines separate the blocks, each of which is labelled once."""
    ax.set_axis_on()
    ax.set_facecolor("#d0d5da")
    ax.imshow(100 * shares, aspect="auto", cmap=COLOUR_MAP, norm=scale, interpolation="nearest")
    starts = [i for i, block in enumerate(blocks) if i == 0 or block != blocks[i - 1]]
    for start in starts[1:]:
        ax.axhline(start - 0.5, color="white", linewidth=1.2)
    middles = [(start + end - 1) / 2 for start, end in zip(starts, [*starts[1:], len(blocks)], strict=True)]
    ax.set_yticks(middles, [str(blocks[start]) for start in starts])
    ax.set_xticks(range(0, shares.shape[1], max(1, round(shares.shape[1] / 4))))
    hide_frame(ax)
    ax.tick_params(labelleft=False, labelbottom=False)


def three_decimals(value: float) -> str:
    """Return a number from 0 to 1 such as ``.058``, without the leading 0."""
    return f"{value:.3f}".removeprefix("0")


def overlap_maps(overlaps: dict[str, Overlap], file_name: str) -> Picture:
    """Draw the mean |cosine| of merged columns of B for each pair of tasks; all panels share one colour scale.

    Args:
        overlaps: panel title -> overlap of a run.
    """
    highest = max(float(np.nanmax(one.cosine)) for one in overlaps.values())
    tasks = max(len(one.tasks) for one in overlaps.values())
    scale = Normalize(0, highest or 1.0)

    def paint(figure: Figure) -> None:
        axes = figure.subplots(1, len(overlaps), squeeze=False)
        for ax, (title, one) in zip(axes.flat, overlaps.items(), strict=True):
            lower = np.where(np.tri(len(one.tasks), dtype=bool), one.cosine, np.nan)
            image = ax.imshow(lower, aspect="auto", cmap=COLOUR_MAP, norm=scale)
            number_cells(ax, lower, image.to_rgba(lower), three_decimals, 8.5)
            slanted = tasks > 5
            ax.set_xticks(range(len(one.tasks)), one.tasks, rotation=35 if slanted else 0,
                          ha="right" if slanted else "center", rotation_mode="anchor" if slanted else None)  # fmt: skip
            ax.set_yticks(range(len(one.tasks)), one.tasks)
            ax.set_title(wrap(title, 52))
            hide_frame(ax)
        mappable = matplotlib.cm.ScalarMappable(scale, COLOUR_MAP)
        figure.colorbar(mappable, ax=axes, label="mean |cosine|", shrink=0.8, aspect=25, pad=0.015)

    means = ", ".join(f"{title} {one.mean_cosine:.3f}" for title, one in overlaps.items())
    alt = f"Heat maps of the overlap between tasks. Mean |cosine| over pairs of tasks: {means}."
    panel = min(4.6, 1.6 + 0.52 * tasks)
    return draw(file_name, alt, (0.9 + panel * len(overlaps), 1.1 + 0.36 * tasks), paint)
