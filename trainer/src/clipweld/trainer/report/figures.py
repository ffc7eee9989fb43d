"""The style of all figures, and their rendering to PNG by matplotlib's object API: no window, no global figure."""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from clipweld.trainer.report.groups import Group

WIDTH = 10.6  # inches of a figure as wide as the page
CSS_PX_PER_INCH = 100
SHARPNESS = 2  # pixels of the PNG per CSS pixel
GREY = "#5f6b76"
INK = "#1b1f24"
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9aa4ae",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#e3e7eb",
    "grid.linewidth": 0.8,
    "text.color": INK,
    "text.parse_math": False,  # a dollar sign in a setting doesn't start a formula
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}
# Okabe-Ito's palette, which colour-blind readers can tell apart: one colour per method, one marker per group.
COLOURS = {"pool": "#0072B2", "lora": "#E69F00", "finetune": "#009E73", "joint": "#CC79A7"}
OTHER_COLOURS = ("#D55E00", "#56B4E9", "#000000")
MARKERS = "osD^vPX<>hp*"


@dataclass(frozen=True)
class Picture:
    """A figure on the page.

    Attributes:
        file_name: name of the PNG in ``figures/``.
        alt: the alternative text, which says what the figure shows.
        width, height: size on the page, in CSS pixels.
    """

    file_name: str
    alt: str
    png: bytes = field(repr=False)
    width: int
    height: int

    @property
    def data(self) -> str:
        """The PNG as a data URL."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


def draw(file_name: str, alt: str, size: tuple[float, float], paint: Callable[[Figure], None]) -> Picture:
    """Draw a figure of ``size`` inches in the report's style, without changing matplotlib's global settings."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=size, dpi=CSS_PX_PER_INCH * SHARPNESS, layout="constrained")
        FigureCanvasAgg(figure)
        paint(figure)
        png = io.BytesIO()
        figure.savefig(png, format="png", metadata={"Software": None})
    return Picture(file_name, alt, png.getvalue(), *(round(CSS_PX_PER_INCH * side) for side in size))


def looks(groups: Sequence[Group]) -> dict[str, dict[str, Any]]:
    """Return each group's colour and marker, by label; the marker is filled only for its method's reference group."""
    others = [method for method in dict.fromkeys(group.method for group in groups) if method not in COLOURS]
    colours = COLOURS | {method: OTHER_COLOURS[i % len(OTHER_COLOURS)] for i, method in enumerate(others)}
    return {
        group.label: {
            "color": colours[group.method],
            "marker": MARKERS[place % len(MARKERS)],
            "markerfacecolor": colours[group.method] if group.is_reference else "white",
        }
        for place, group in enumerate(groups)
    }


def wrap(label: str, width: int = 26) -> str:
    """Return a label with line breaks, between settings where possible."""
    return "\n".join(textwrap.wrap(label, width, break_long_words=True))


def number_cells(ax: Axes, values: np.ndarray, colours: np.ndarray, form: Callable[[float], str], size: float) -> None:
    """Write every number into its cell, dark on light and light on dark.

    Args:
        values: (rows, columns); NaN cells stay empty.
        colours: (rows, columns, 4), RGBA of the cells.
    """
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    luminance = linear[..., :3] @ np.array([0.2126, 0.7152, 0.0722])
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            # At a luminance of 0.179, black and white have the same contrast (WCAG 2).
            ink = "white" if luminance[row, column] < 0.179 else "black"
            ax.text(column, row, form(value), ha="center", va="center", color=ink, fontsize=size)


def hide_frame(ax: Axes) -> None:
    """Hide spines and tick marks, which a heat map doesn't need."""
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
