"""The content of the page: numbers as text, and figures, or a sentence if there is nothing to show."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import jinja2

from clipweld.trainer.config import MEASURES
from clipweld.trainer.report import accuracy, pools
from clipweld.trainer.report.accuracy import short
from clipweld.trainer.report.experts import Overlap, Votes, overlap, votes
from clipweld.trainer.report.figures import Picture
from clipweld.trainer.report.groups import Group, Section, Spread
from clipweld.trainer.report.runs import Run

TEMPLATE = "page.html.j2"
NOTHING = "\N{EM DASH}"
MINUS = "\N{MINUS SIGN}"


@dataclass
class View:
    """A section in the form that the template needs; what the runs don't provide is None or empty."""

    section: Section
    comparisons: list[dict[str, Any]] = field(default_factory=list)
    maps: dict[str, Picture] = field(default_factory=dict)
    votes_group: Group | None = None
    votes_of: Run | None = None
    votes: Votes | None = None
    vote_maps: Picture | None = None
    overlap_maps: Picture | None = None
    overlap_rows: list[list[str]] = field(default_factory=list)
    overlap_notes: list[tuple[str, str]] = field(default_factory=list)
    parameters: Picture | None = None

    @property
    def pictures(self) -> list[Picture]:
        drawn = [one["picture"] for one in self.comparisons] + list(self.maps.values())
        drawn += [self.vote_maps, self.overlap_maps, self.parameters]
        return [picture for picture in drawn if picture]


def view(section: Section, prefix: str) -> View:
    """Draw all figures and compute all tables of one section.

    Args:
        prefix: start of the figures' file names.

    Raises:
        AdapterError: an adapter is corrupted or can't be read.
    """
    shown = View(section)
    _add_overlaps(shown, prefix)  # first, so that a corrupted adapter is found before anything is drawn
    _add_votes(shown, prefix)
    for space in section.spaces:
        picture = accuracy.comparison(section, space, f"{prefix}comparison-{space}.png")
        shown.comparisons.append({"space": space, "picture": picture, **_tables(section, space)})
        shown.maps[space] = accuracy.matrices(section, space, f"{prefix}accuracy-{space}.png")
    shown.parameters = accuracy.parameters(section, section.spaces[0], f"{prefix}parameters.png")
    return shown


def render(views: list[View]) -> str:
    """Return the page as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"spread": as_text, "signed": signed, "short": short, "percent": _percent, "json": _as_json}
    return environment.get_template(TEMPLATE).render(views=views, measures=MEASURES)


def as_text(spread: Spread | None, form: str = "{:.1f}") -> str:
    """Return text such as ``84.5 ± 0.3``, without the deviation for a single run; a dash for None."""
    if spread is None:
        return NOTHING
    average = form.format(spread.mean)
    average = average.replace("-", MINUS) if float(average) else "0.0"
    if spread.sd is None:
        return average
    return f"{average} ± {'<0.1' if 0 < spread.sd < 0.05 else f'{spread.sd:.1f}'}"


def signed(spread: Spread | None) -> str:
    """Return a difference as text, with its sign."""
    return as_text(spread, "{:+.1f}")


def _percent(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.1f}"


def _as_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def _tables(section: Section, space: str) -> dict[str, Any]:
    """Return the best groups per measure, and each group's differences from the reference over runs in common."""
    comparable = [
        group for group in section.groups if group.method != "joint" and group.orders == section.reference.orders
    ]
    best = {}
    for name in MEASURES:
        means = {group.label: round(found.mean, 1) for group in comparable if (found := group.measure(space, name))}
        extreme = (min if name == "forgetting" else max)(means.values(), default=None)
        best[name] = {label for label, value in means.items() if value == extreme} if len(means) > 1 else set()
    against = [
        (group, [group.against(section.reference, space, name) for name in MEASURES]) for group in section.groups[1:]
    ]
    return {"best": best, "against": [(group, row) for group, row in against if any(row)]}


def _add_votes(shown: View, prefix: str) -> None:
    """Add the votes of the first pool that has any; a pool without a router has none."""
    for group in (group for group in shown.section.groups if group.method == "pool"):
        shown.votes_group, shown.votes_of = group, shown.section.representative(group)
        shown.votes = votes(shown.votes_of.adapters())
        if shown.votes:
            shown.vote_maps = pools.vote_maps(shown.votes, f"{prefix}votes.png")
            return


def _add_overlaps(shown: View, prefix: str) -> None:
    found: dict[str, dict[str, Overlap]] = {}
    for group in shown.section.groups:
        of_runs = {run.name: one for run in group.runs if (one := overlap(run.adapters()))}
        if of_runs:
            found[group.label] = of_runs
            shown.overlap_rows.append(_overlap_row(group, list(of_runs.values())))
    panels = {}
    for group, run in _with_and_without(shown.section, found):
        order = "" if run.order_seed is None else f", order {run.order_seed}"
        setting = "without AGO" if group.config.get("ago") == "off" else "with AGO"
        panels[f"{setting}: {group.label} (seed {run.seed}{order})"] = found[group.label][run.name]
    if panels:
        shown.overlap_maps = pools.overlap_maps(panels, f"{prefix}overlap.png")
    shown.overlap_notes = _overlap_notes(shown.section, panels)


def _overlap_row(group: Group, overlaps: list[Overlap]) -> list[str]:
    cosine = Spread(tuple(one.mean_cosine for one in overlaps))
    product = Spread(tuple(one.mean_product for one in overlaps))
    chance = mean(one.chance for one in overlaps)
    return [group.label, str(len(overlaps)), _three_digits(cosine), _three_digits(product), f"{chance:.3g}"]


def _three_digits(spread: Spread) -> str:
    """Return the mean in three significant digits, and the deviation with the same number of decimals."""
    decimals = max(0, 2 - math.floor(math.log10(spread.mean))) if spread.mean > 0 else 1
    return f"{spread.mean:.{decimals}f}" + ("" if spread.sd is None else f" ± {spread.sd:.{decimals}f}")


def _with_and_without(section: Section, found: dict[str, Any]) -> list[tuple[Group, Run]]:
    """Return a pool's run with AGO, and the most similar one without it: by settings, then by order, then by seed."""
    candidates = [group for group in section.groups if group.method == "pool" and group.label in found]
    without = [group for group in candidates if group.config.get("ago") == "off"]
    chosen = [group for group in candidates if group not in without][:1]
    if without:
        like = chosen[0].config if chosen else {}
        chosen.append(min(without, key=lambda group: sum(group.config.get(name) != like[name] for name in like)))
    shown: list[tuple[Group, Run]] = []
    for group in chosen:
        run = section.representative(group)
        if shown:
            first = shown[0][1]
            run = min(group.runs, key=lambda one: (one.order != first.order, one.seed != first.seed, one.seed))
        if run.name in found[group.label]:
            shown.append((group, run))
    return shown


def _overlap_notes(section: Section, panels: dict[str, Overlap]) -> list[tuple[str, str]]:
    """Return sentences about what is missing, each with the command that would produce it; the command may be empty."""
    if not panels and len(section.order) < 2:
        return [("No figure: one task alone overlaps with nothing.", "")]
    if not panels:
        return [("No figure: no run of the pool here has the adapters of two tasks beside its sequence.json.", "")]
    command = f"trainer sequence --model {section.model} --tasks {' '.join(section.order)} --out FOLDER --ago"
    sides = {title.partition(":")[0] for title in panels}
    if "without AGO" not in sides:
        return [("No run without AGO is here to compare with. This makes one:", f"{command} off")]
    if "with AGO" not in sides:
        return [("No run with AGO is here to compare with. This makes one:", f"{command} sum")]
    if len({tuple(one.tasks) for one in panels.values()}) > 1:
        return [("The two runs learned the tasks in different orders.", "")]
    return []
