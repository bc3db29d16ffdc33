"""Figures of a grid, as PNG bytes: accuracy by round in every cell, and regrets."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from pisa_dist.benchmark.methods import METHODS, is_ours, label
from pisa_dist.benchmark.results import Record, curve
from pisa_dist.benchmark.summary import Scores, estimate, groups, regrets, standings
from pisa_dist.figures import COLOURS, DOTS_PER_INCH, MARKERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.7,
    "figure.constrained_layout.use": True,
}
# What a point of a curve is drawn over: its label, and the factor on its number.
AXES = {
    "round": ("Round", 1.0),
    "bytes_sent": ("Sent (MB)", 1e-6),
    "passes": ("Passes over the data", 1.0),
}
_OURS, _THEIRS = {"linewidth": 2.4, "zorder": 4}, {"linewidth": 1.2, "zorder": 3}


def draw(scores: Scores) -> dict[str, bytes]:
    """Every figure by its file name.

    Args:
        scores: at least one cell.
    """
    import matplotlib

    drawings: dict[str, Callable[[], Figure]] = {"regret.png": lambda: _draw_regrets(scores)}
    for name, own in groups(scores).items():
        for axis in AXES:
            drawings[file_name(name, axis)] = partial(_draw_curves, own, _styles(scores), axis)
    pictures = {}
    for name, make in drawings.items():
        with matplotlib.rc_context(_STYLE):
            buffer = io.BytesIO()
            make().savefig(buffer, dpi=DOTS_PER_INCH, format="png")
            pictures[name] = buffer.getvalue()
    return pictures


def file_name(group: str, axis: str = "round") -> str:
    """The picture of a group of cells, with rounds, bytes or passes to the right."""
    suffix = "" if axis == "round" else f"_by_{axis.removesuffix('_sent')}"
    return f"accuracy_{group.replace(', ', '_').replace(' ', '_')}{suffix}.png"


def _styles(scores: Scores) -> dict[str, dict[str, Any]]:
    """Colour and marker of each method: the same in every figure, whichever methods were run."""
    used = dict.fromkeys(name for methods in scores.values() for name in methods)
    names = [name for name in METHODS if name in used] + [name for name in used if name not in METHODS]
    return {
        name: {
            "color": COLOURS[place % len(COLOURS)],
            "marker": MARKERS[(place + place // len(COLOURS)) % len(MARKERS)],
            "linestyle": "-" if place < len(COLOURS) else "--",
        }
        for place, name in enumerate(names)
    }


def _draw_curves(scores: Scores, styles: Mapping[str, dict[str, Any]], axis: str) -> "Figure":
    """Mean test accuracy over the seeds, a panel for each cell; 95 % bands of PISA's family."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    columns = min(3, len(scores))
    rows = math.ceil(len(scores) / columns)
    figure = Figure(figsize=(3.3 * max(2, columns), 2.5 * rows + 1.0))
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for panel in panels.flat[len(scores) :]:
        panel.set_visible(False)
    levels: list[float] = []
    for panel, (cell, methods) in zip(panels.flat, scores.items(), strict=False):
        panel.set_title(cell.split)
        for name, score in methods.items():
            if score.ok:
                levels += _plot_curve(panel, score.ok, axis, styles[name], is_ours=is_ours(name))
    if levels:  # of the means: the band of a few seeds may be wider than the range of accuracies
        margin = 0.05 * (max(levels) - min(levels)) + 0.5
        panels[0, 0].set_ylim(max(0, min(levels) - margin), min(100, max(levels) + margin))
    for panel in panels[-1]:
        panel.set_xlabel(AXES[axis][0])
    for panel in panels[:, 0]:
        panel.set_ylabel("Test accuracy (%)")
    styles = {name: style for name, style in styles.items() if any(name in methods for methods in scores.values())}
    handles = [Line2D([], [], markersize=4, **style) for style in styles.values()]
    names = [label(name) for name in styles]
    columns = max(1, min(len(styles), int(figure.get_figwidth() / 2.2)))
    figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False)
    return figure


def _plot_curve(
    panel: "Axes", records: Sequence[Record], axis: str, style: Mapping[str, Any], *, is_ours: bool
) -> list[float]:
    curves = [{point.round: point for point in curve(record)} for record in records]
    rounds = sorted(set.intersection(*(set(points) for points in curves)))
    estimates = [estimate([100 * points[number].accuracy for points in curves]) for number in rounds]
    position = [AXES[axis][1] * np.mean([getattr(points[number], axis) for points in curves]) for number in rounds]
    means = np.array([point.mean for point in estimates])
    panel.plot(position, means, markersize=3.5, **style, **(_OURS if is_ours else _THEIRS))  # type: ignore[arg-type]
    if is_ours and len(records) > 1:
        band = np.array([point.half_width for point in estimates], dtype=np.float64)
        panel.fill_between(position, means - band, means + band, color=style["color"], alpha=0.15, linewidth=0)
    return [point.mean for point in estimates]


def _draw_regrets(scores: Scores) -> "Figure":
    """A dot for each cell, a bar to the largest: points of accuracy behind the cell's best method."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    order = [standing.method for standing in standings(scores)][::-1]
    participations = list(dict.fromkeys(cell.participation for cell in scores))
    figure = Figure(figsize=(9.0, 0.36 * len(order) + 1.3))
    panel = figure.subplots()
    regret = {cell: regrets(methods) for cell, methods in scores.items()}
    for row, name in enumerate(order):
        values = {cell: 100 * own[name] for cell, own in regret.items() if name in own}
        panel.barh(row, max(values.values()), height=0.62, color="#cfe3f3" if is_ours(name) else "#ececec")
        for cell, value in values.items():
            place = participations.index(cell.participation)
            shift = 0.3 * (place - (len(participations) - 1) / 2) / max(1, len(participations) - 1)
            panel.plot(value, row - shift, MARKERS[place % 7], color=COLOURS[place % 7], markersize=5, alpha=0.75)
    panel.set_yticks(range(len(order)), [label(name) for name in order])
    for text, name in zip(panel.get_yticklabels(), order, strict=True):
        text.set_fontweight("bold" if is_ours(name) else "normal")
    panel.grid(visible=False, axis="y")
    panel.set_xlim(left=-0.5)
    panel.set_xlabel("Points of test accuracy behind the best method of the cell; bar: the largest")
    handles = [
        Line2D([], [], linestyle="", marker=MARKERS[i % 7], color=COLOURS[i % 7]) for i in range(len(participations))
    ]
    names = [f"participation {p:g}" for p in participations]
    figure.legend(handles, names, loc="outside upper right", ncols=len(names), frameon=False)
    return figure
