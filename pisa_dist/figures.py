"""Draws loaded runs: accuracy, loss, residuals and the split, as matplotlib figures.

Every function takes runs and returns a figure, or None where no run has what it shows. Nothing is read from
disk here. Matplotlib is imported when a figure is drawn and its `pyplot`, which keeps global state and looks
for a display, never.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

# Okabe and Ito's colours, told apart with any kind of colour vision; their yellow is too faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DOTS_PER_INCH = 130
MARKERS_PER_CURVE = 8
SPAN_FOR_LOG = 10  # values that differ by more than this factor get a logarithmic axis
WIDTH = 10.0  # inches; on a 900-pixel page the smallest text is then about 11 pixels high

CELLS_WITH_TEXT = 20  # per side; more counts than that cannot be read
WORKERS_IN_ORDER = 200  # beyond, a worker is a few pixels wide and its place says nothing
SPLITS_SHOWN = 4

# Behind a metric's name: where its mean over several runs, less and plus their deviation, lies.
LOW, HIGH = " low", " high"

_STYLE: dict[Any, Any] = {  # matplotlib types the keys as a literal of 300 names
    "font.size": 10.5,
    "axes.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.7,
    "lines.markersize": 4.5,
    "lines.linewidth": 1.6,
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True)
class Run:
    """One run directory, read.

    Attributes:
        path: the directory.
        metrics: the lines of metrics.jsonl in the order of their rounds.
        summary: summary.json, empty while the run is unfinished.
        split: split.json, empty if there is none.
        config: config.yaml, empty if there is none.
        warnings: what was odd about the files, one line each.
    """

    path: Path
    metrics: tuple[Mapping[str, Any], ...]
    summary: Mapping[str, Any]
    split: Mapping[str, Any]
    config: Mapping[str, Any]
    warnings: tuple[str, ...] = ()

    @property
    def num_train(self) -> int | None:
        """Training samples of all workers together, None if no file tells."""
        known = self.summary.get("num_train") or sum(self.split.get("sizes", ()))
        return int(known) if known else None

    def series(self, key: str) -> NDArray[np.float64]:
        """One value per evaluation, NaN where it is null or missing.

        `key` is a name in metrics.jsonl, or "passes": samples seen over training samples.
        """
        if key == "passes":
            return self.series("samples_seen") / (self.num_train or math.nan)
        values = [line.get(key) for line in self.metrics]
        return np.array([math.nan if value is None else value for value in values], dtype=np.float64)


Runs = Mapping[str, Run]  # label to run, in the order of the legend
Curve = tuple[str, Run, dict[str, Any]]  # label, run, colour and marker


def save_figures(runs: Runs, directory: Path) -> list[Path]:
    """Draw everything that the runs have data for.

    Args:
        runs: label to run.
        directory: receives accuracy.png, loss.png, residuals.png and split.png; created if needed.

    Returns:
        The files that were written.
    """
    import matplotlib

    drawings: dict[str, Callable[[Runs], Figure | None]] = {
        "accuracy.png": draw_accuracy,
        "loss.png": draw_loss,
        "residuals.png": draw_residuals,
        "split.png": draw_split,
    }
    written = []
    directory.mkdir(parents=True, exist_ok=True)
    for name, draw in drawings.items():
        with matplotlib.rc_context(_STYLE):
            figure = draw(runs)
            if figure is not None:
                figure.savefig(directory / name, dpi=DOTS_PER_INCH, format="png")
                written.append(directory / name)
    return written


def draw_accuracy(runs: Runs) -> Figure | None:
    """Test accuracy in percent against rounds, data sent and passes over the data."""
    return _draw_progress(runs, {"test_accuracy": "-"}, scale=100.0, label="Test accuracy (%)")


def draw_loss(runs: Runs) -> Figure | None:
    """Training loss (solid) and test loss (dashed) against rounds, data sent and passes over the data."""
    return _draw_progress(runs, {"train_loss": "-", "test_loss": "--"}, scale=1.0, label="Loss")


def draw_residuals(runs: Runs) -> Figure | None:
    """Primal and dual residual against rounds, log scale, for the runs that report them."""
    titles = {"primal_residual": "Primal residual", "dual_residual": "Dual residual"}
    curves = _curves(runs, titles)
    keys = [key for key in titles if any(_any_positive(run.series(key)) for _, run, _ in curves)]
    if not keys:
        return None
    figure = _new_figure(curves)
    panels = figure.subplots(1, len(keys), squeeze=False)[0]
    for panel, key in zip(panels, keys, strict=True):
        for _, run, style in curves:
            values = run.series(key)
            _plot(panel, run.series("round"), np.where(values > 0, values, np.nan), style)
        panel.set(title=titles[key], xlabel="Round", yscale="log")
    panels[0].set_ylabel("Norm, log scale")
    _add_legend(figure, curves)
    return figure


def draw_split(runs: Runs) -> Figure | None:
    """Samples per worker and class: one heat map for each different split, the first few of them."""
    labels: dict[str, list[str]] = {}
    splits: dict[str, Mapping[str, Any]] = {}
    for label, run in runs.items():
        if any(run.split.get("counts", ())):  # data without classes have rows without columns
            key = json.dumps(run.split, sort_keys=True)
            labels.setdefault(key, []).append(label)
            splits[key] = run.split
    shown = list(splits)[:SPLITS_SHOWN]
    if not shown:
        return None
    heights = [_heat_map_height(splits[key]) for key in shown]
    figure = _figure(sum(heights))
    panels = figure.subplots(len(shown), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, key in zip(panels, shown, strict=True):
        _draw_heat_map(panel, splits[key])
        title = _split_title(splits[key])
        if len(splits) > 1:
            title = shorten(_escape(", ".join(labels[key])), 110, placeholder=" …") + "\n" + title
        panel.set_title(title)
    if len(splits) > len(shown):
        figure.supxlabel(f"{len(splits) - len(shown)} more splits are not shown", fontsize=9)
    return figure


def byte_unit(largest: float) -> tuple[float, str]:
    """The decimal unit in which a number of bytes reads well, as (bytes in one, name)."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if largest >= unit:
            return unit, name
    return 1.0, "B"


def _draw_progress(runs: Runs, lines: Mapping[str, Any], *, scale: float, label: str) -> Figure | None:
    """Three panels of the same curves; `lines` is metric to line style."""
    curves = _curves(runs, lines)
    if not curves:
        return None
    sent = [max(_finite([run.series("bytes_sent")]), default=0.0) for _, run, _ in curves]
    unit, unit_name = byte_unit(max(sent))
    axes = {
        "round": (1.0, "Round"),
        "bytes_sent": (unit, f"Data sent ({unit_name})"),
        "passes": (1.0, "Passes over the training data"),
    }
    figure = _new_figure(curves)
    panels = figure.subplots(1, len(axes), sharey=True)
    for panel, (key, (divisor, title)) in zip(panels, axes.items(), strict=True):
        # Methods differ in what they send by orders of magnitude: on a linear axis the frugal ones vanish.
        logarithmic = key == "bytes_sent" and 0 < SPAN_FOR_LOG * min(sent) < max(sent)
        for _, run, style in curves:
            position = run.series(key) / divisor
            if logarithmic:
                position[position <= 0] = np.nan
            for metric, line in lines.items():
                _plot(panel, position, run.series(metric) * scale, style, line)
                _shade(panel, position, run.series(metric + LOW) * scale, run.series(metric + HIGH) * scale, style)
        if logarithmic:
            panel.set_xscale("log")
        panel.set_xlabel(title + (", log scale" if logarithmic else ""))
    panels[0].set_ylabel(label)
    if label == "Loss":
        _scale_loss(panels[0], [_finite([run.series(key)]) for _, run, _ in curves for key in lines])
    _add_legend(figure, curves, lines)
    return figure


def _scale_loss(panel: Axes, losses: Sequence[Sequence[float]]) -> None:
    """Log scale for a wide range; a run that diverges leaves through the top and does not flatten the rest."""
    ceiling = 3 * max(curve[0] for curve in losses if curve)
    values = [value for curve in losses for value in curve]
    if 0 < SPAN_FOR_LOG * min(values) < max(values):
        panel.set(yscale="log", ylabel="Loss, log scale")
    if max(values) > SPAN_FOR_LOG * ceiling > 0:
        panel.set_ylim(top=ceiling)


def _curves(runs: Runs, keys: Iterable[str]) -> list[Curve]:
    """The runs that have a value of any of these metrics, each in the style that it has in every figure."""
    wanted = tuple(keys)
    curves = []
    for index, (label, run) in enumerate(runs.items()):
        if _finite(run.series(key) for key in wanted):
            # Colour and marker run through their seven values at different speeds: 49 pairs.
            marker = MARKERS[(index + index // len(COLOURS)) % len(MARKERS)]
            style = {"color": COLOURS[index % len(COLOURS)], "marker": marker}
            curves.append((label, run, style))
    return curves


def _plot(
    panel: Axes,
    horizontal: NDArray[np.float64],
    vertical: NDArray[np.float64],
    style: Mapping[str, Any],
    line: Any = "-",
) -> None:
    kept = np.isfinite(horizontal) & np.isfinite(vertical)
    step = max(1, math.ceil(kept.sum() / MARKERS_PER_CURVE))
    panel.plot(horizontal[kept], vertical[kept], linestyle=line, markevery=step, **style)


def _shade(
    panel: Axes,
    horizontal: NDArray[np.float64],
    low: NDArray[np.float64],
    high: NDArray[np.float64],
    style: Mapping[str, Any],
) -> None:
    kept = np.isfinite(horizontal) & np.isfinite(low) & np.isfinite(high)
    if kept.any():
        panel.fill_between(horizontal[kept], low[kept], high[kept], color=style["color"], alpha=0.15, linewidth=0)


def _new_figure(curves: Sequence[Curve]) -> Figure:
    return _figure(3.1 + 0.22 * math.ceil(len(curves) / _legend_columns(curves)))


def _figure(height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height))


def _legend_columns(curves: Sequence[Curve]) -> int:
    longest = max(len(label) for label, _, _ in curves)
    return max(1, 120 // (longest + 8))


def _add_legend(figure: Figure, curves: Sequence[Curve], lines: Mapping[str, Any] | None = None) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], **style) for _, _, style in curves]
    labels = [_escape(label) for label, _, _ in curves]
    columns = min(len(curves), _legend_columns(curves))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    if lines is not None and len(lines) > 1:
        kinds = [Line2D([], [], color="#555555", linestyle=line) for line in lines.values()]
        names = [metric.replace("_", " ") for metric in lines]
        figure.legend(kinds, names, loc="outside upper center", ncols=len(lines), frameon=False)


def _heat_map_height(split: Mapping[str, Any]) -> float:
    num_classes = len(split["counts"][0])
    return 1.3 + min(4.5, max(1.2, 0.26 * num_classes))


def _draw_heat_map(panel: Axes, split: Mapping[str, Any]) -> None:
    from matplotlib.ticker import MaxNLocator

    counts = np.asarray(split["counts"])
    num_workers, num_classes = counts.shape
    label = "Worker"
    top = counts.max()
    if num_workers > WORKERS_IN_ORDER:
        counts = counts[np.argsort(counts.argmax(axis=1), kind="stable")]
        label = f"{num_workers:,} workers, ordered by their largest class"
        top = np.percentile(counts[counts > 0], 99) if top else top  # a few huge shards would fade the rest
    image = panel.imshow(counts.T, aspect="auto", cmap="Blues", vmin=0, vmax=top, interpolation="nearest")
    extend = "max" if top < counts.max() else "neither"
    panel.figure.colorbar(image, ax=panel, label="Samples", pad=0.015, aspect=14, extend=extend)
    panel.set(xlabel=label, ylabel="Class")
    panel.grid(visible=False)
    for axis, count in ((panel.xaxis, num_workers), (panel.yaxis, num_classes)):
        if count <= CELLS_WITH_TEXT:
            axis.set_ticks(range(count))
        else:
            axis.set_major_locator(MaxNLocator(integer=True))
    if num_workers > WORKERS_IN_ORDER:
        panel.set_xticks([])
    if max(counts.shape) <= CELLS_WITH_TEXT:
        dark = 0.6 * counts.max()
        for (worker, label_), count in np.ndenumerate(counts):
            if count:
                colour = "white" if count > dark else "black"
                panel.text(worker, label_, str(count), ha="center", va="center", color=colour, fontsize=8)


def _split_title(split: Mapping[str, Any]) -> str:
    names = {"hellinger": "Hellinger", "jensen_shannon": "Jensen-Shannon", "size_variation": "size variation"}
    skew = split.get("skew", {})
    measures = [f"{name} {skew[key]:.2f}" for key, name in names.items() if skew.get(key) is not None]
    return f"Split {split.get('split', '?')}" + (f" (skew: {', '.join(measures)})" if measures else "")


def _escape(label: str) -> str:
    return label.replace("$", r"\$")  # a pair of dollar signs would be read as a formula


def _finite(arrays: Iterable[NDArray[np.float64]]) -> list[float]:
    return [float(value) for array in arrays for value in array if math.isfinite(value)]


def _any_positive(values: NDArray[np.float64]) -> bool:
    return bool((values[np.isfinite(values)] > 0).any())
