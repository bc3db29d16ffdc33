"""Figures of a grid, as PNG bytes: accuracy by round in every cell, and regrets."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pisa_dist.benchmark.methods import METHODS, is_ours, label
from pisa_dist.benchmark.summary import Scores, estimate, regrets, standings
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
_OURS, _THEIRS = {"linewidth": 2.4, "zorder": 4}, {"linewidth": 1.2, "zorder": 3}


def draw(scores: Scores) -> dict[str, bytes]:
    """Every figure by its file name.

    Args:
        scores: at least one cell.
    """
    import matplotlib

    drawings: dict[str, Callable[[], Figure]] = {"regret.png": lambda: _draw_regrets(scores)}
    for dataset in dict.fromkeys(cell.dataset for cell in scores):
        own = {cell: methods for cell, methods in scores.items() if cell.dataset == dataset}
        drawings[f"accuracy_{dataset}.png"] = lambda own=own: _draw_curves(own)  # type: ignore[misc]
    pictures = {}
    for name, make in drawings.items():
        with matplotlib.rc_context(_STYLE):
            buffer = io.BytesIO()
            make().savefig(buffer, dpi=DOTS_PER_INCH, format="png")
            pictures[name] = buffer.getvalue()
    return pictures


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


def _draw_curves(scores: Scores) -> "Figure":
    """Mean test accuracy over the seeds by round, a panel for each cell; 95 % bands of PISA's family."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    splits = list(dict.fromkeys(cell.split for cell in scores))
    participations = list(dict.fromkeys(cell.participation for cell in scores))
    records = [r for methods in scores.values() for score in methods.values() for r in score.ok]
    by_passes = len({record["rounds"] for record in records}) > 1
    styles = _styles(scores)
    height = 2.4 * len(participations) + 0.9
    figure = Figure(figsize=(max(6.0, 2.35 * len(splits) + 0.4), height))
    grid = figure.subplots(len(participations), len(splits), sharex=True, sharey=True, squeeze=False)
    for panel in grid.flat:
        panel.set_visible(False)
    for cell, methods in scores.items():
        panel = grid[participations.index(cell.participation), splits.index(cell.split)]
        panel.set_visible(True)
        panel.set_title(f"{cell.split}, participation {cell.participation:g}")
        for name, score in methods.items():
            if score.ok:
                _plot_curve(panel, score.ok, by_passes, styles[name], is_ours=is_ours(name))
    for panel in grid[-1]:
        panel.set_xlabel("Passes over the data" if by_passes else "Round")
    for panel in grid[:, 0]:
        panel.set_ylabel("Test accuracy (%)")
    handles = [Line2D([], [], markersize=4, **style) for style in styles.values()]
    columns = max(1, min(len(styles), int(figure.get_figwidth() / 2)))
    names = [label(name) for name in styles]
    figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False)
    return figure


def _plot_curve(
    panel: "Axes", records: Sequence[Mapping[str, Any]], by_passes: bool, style: Mapping[str, Any], *, is_ours: bool
) -> None:
    rounds = sorted(set.intersection(*({point[0] for point in record["accuracies"]} for record in records)))
    curves = [dict(map(tuple, record["accuracies"])) for record in records]
    estimates = [estimate([100 * curve[number] for curve in curves]) for number in rounds]
    scale = np.mean([record["passes"] / record["rounds"] for record in records]) if by_passes else 1.0
    position = scale * np.array(rounds)
    means = np.array([point.mean for point in estimates])
    panel.plot(position, means, markersize=3.5, **style, **(_OURS if is_ours else _THEIRS))  # type: ignore[arg-type]
    if is_ours and len(records) > 1:
        band = np.array([point.half_width for point in estimates], dtype=np.float64)
        panel.fill_between(position, means - band, means + band, color=style["color"], alpha=0.15, linewidth=0)


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
