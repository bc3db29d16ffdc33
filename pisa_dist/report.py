"""Compares run directories: a table on the terminal and figures beside the runs.

    python -m pisa_dist.report RUN... [--output DIR] [--each]

A directory above several runs counts as all of them. Runs that differ in nothing but their seed are one curve and, in a
second table, one row: their mean and standard deviation.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from textwrap import shorten
from typing import Any

import numpy as np
import yaml

from pisa_dist.figures import Run, byte_unit, save_figures
from pisa_dist.seeds import averaged, group_by_seed

METRICS = "metrics.jsonl"
SUMMARY = "summary.json"


def load_run(path: Path) -> Run:
    """Read a run directory.

    A last line of metrics.jsonl that breaks off, as a killed run leaves it, is dropped with a warning in
    `Run.warnings`. Where a resumed run repeats rounds, the later line counts.

    Raises:
        ValueError: a file is not what it should be; the message is one line with its name.
    """
    if not _is_run(path):
        raise ValueError(f"{path} is not a run directory: it has neither {METRICS} nor {SUMMARY}")
    metrics, warnings = _read_metrics(path / METRICS)
    return Run(
        path=path,
        metrics=metrics,
        summary=_read_object(path / SUMMARY),
        split=_read_split(path / "split.json"),
        config=_read_config(path / "config.yaml"),
        warnings=warnings,
    )


def find_runs(directories: Iterable[Path]) -> list[Path]:
    """The run directories among and below these, each once, in the order given and then by name.

    Raises:
        ValueError: one does not exist or holds no run.
    """
    found: dict[Path, Path] = {}
    for directory in directories:
        if not directory.is_dir():
            raise ValueError(f"{directory} is not a directory")
        runs = []
        for folder, children, _ in os.walk(directory):
            if _is_run(Path(folder)):
                runs.append(Path(folder))
                children.clear()  # what lies inside a run (checkpoints, tracking) is not another one
            children.sort()
        if not runs:
            raise ValueError(f"{directory} has no runs: no {METRICS} or {SUMMARY} in it or below")
        for run in runs:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def label_runs(runs: Sequence[Run]) -> dict[str, Run]:
    """Each run under the shortest end of its path that no other run has."""
    parts = [run.path.resolve().parts for run in runs]
    labelled = {}
    for own, run in zip(parts, runs, strict=True):
        length = 1
        while sum(other[-length:] == own[-length:] for other in parts) > 1:
            length += 1
        labelled["/".join(own[-length:])] = run
    return labelled


def draw_run(run_dir: Path) -> list[Path]:
    """Write the figures of one run into its `figures/` and return their paths."""
    run = load_run(run_dir)
    return save_figures(label_runs([run]), run_dir / "figures")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, write the figures; 0 if all went well, 2 if the runs cannot be read."""
    parser = argparse.ArgumentParser(
        prog="pisa-report", description="Compare training runs: a table on the terminal, and figures."
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory, or one above several")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="where the figures go (default: figures/ of a single run, report/ above several)",
    )
    parser.add_argument(
        "--each", action="store_true", help="a curve for each run, also where runs differ only in their seed"
    )
    options = parser.parse_args(argv)
    try:
        runs = [load_run(path) for path in find_runs(options.runs)]
        for run in runs:
            for warning in run.warnings:
                print(f"warning: {warning}", file=sys.stderr)
        labelled = label_runs(runs)
        _print_table(labelled)
        groups = {label: [run] for label, run in labelled.items()} if options.each else group_by_seed(labelled)
        if any(len(members) > 1 for members in groups.values()):
            _print_means(groups)
        curves = {_curve_label(label, members): averaged(members) for label, members in groups.items()}
        for figure in save_figures(curves, options.output or _default_output(runs)):
            print(figure)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _is_run(directory: Path) -> bool:
    return (directory / METRICS).is_file() or (directory / SUMMARY).is_file()


def _read_metrics(file: Path) -> tuple[tuple[Mapping[str, Any], ...], tuple[str, ...]]:
    if not file.is_file():
        return (), ()
    text = file.read_text(encoding="utf-8", errors="replace")
    warnings: tuple[str, ...] = ()
    entries: list[Mapping[str, Any]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = _parse_object(line)
            entry_round = int(entry["round"])
        except (ValueError, KeyError, TypeError) as error:
            # Only a write that was cut short ends without a line break; anything else is damage.
            if not text.endswith("\n") and number == text.count("\n") + 1:
                warnings = (f"{file}:{number} breaks off; the line is left out",)
                continue
            raise ValueError(f"{file}:{number} is not a line of metrics: {line[:60]!r}") from error
        # A resumed run goes back to its checkpoint: what came after it the first time is void.
        while entries and int(entries[-1]["round"]) >= entry_round:
            entries.pop()
        entries.append(entry)
    return tuple(entries), warnings


def _read_object(file: Path) -> Mapping[str, Any]:
    if not file.is_file():
        return {}
    try:
        return _parse_object(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not a JSON object") from error


def _read_split(file: Path) -> Mapping[str, Any]:
    split = _read_object(file)
    rows = split.get("counts") or [[]]
    if not all(isinstance(row, list) for row in rows) or len({len(row) for row in rows}) != 1:
        raise ValueError(f"{file}: `counts` must have one row per worker and one column per class")
    return split


def _read_config(file: Path) -> Mapping[str, Any]:
    if not file.is_file():
        return {}
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not YAML") from error
    return config if isinstance(config, dict) else {}


def _parse_object(text: str) -> Mapping[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _default_output(runs: Sequence[Run]) -> Path:
    if len(runs) == 1:
        return runs[0].path / "figures"
    return Path(os.path.commonpath([run.path.resolve().parent for run in runs])) / "report"


def _print_table(runs: Mapping[str, Run]) -> None:
    left, right = ("run", "algorithm", "split"), ("last %", "best %", "rounds", "sent", "passes", "seconds")
    _print(left, right, [[label, *_table_cells(run)] for label, run in runs.items()], last="status")


def _print_means(groups: Mapping[str, Sequence[Run]]) -> None:
    """A row for every group of runs of one experiment: accuracy in percent, mean and standard deviation."""
    rows = []
    for label, runs in groups.items():
        algorithm, split, *_ = _table_cells(runs[0])
        accuracies = [100 * run.series("test_accuracy") for run in runs]
        last = [values[-1] for values in accuracies if values.size]
        best = [np.nanmax(values) for values in accuracies if np.isfinite(values).any()]
        rows.append([label, algorithm, split, str(len(runs)), _mean_and_deviation(last), _mean_and_deviation(best)])
    _print(("runs that differ in their seed", "algorithm", "split"), ("seeds", "last %", "best %"), rows)


def _print(
    left: Sequence[str], right: Sequence[str], rows: Iterable[Sequence[str]], *, last: str | None = None
) -> None:
    """A table whose first columns are words and whose next ones are numbers."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Wider than any table: rich would fit a narrow terminal, or the 80 columns that it takes a pipe for, by
    # breaking words into columns of three letters. A line that the terminal wraps stays readable.
    console = Console(file=sys.stdout, width=1000)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for header in left:
        table.add_column(header, no_wrap=True)
    for header in right:
        table.add_column(header, justify="right", no_wrap=True)
    if last is not None:
        table.add_column(last, no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: brackets are no markup
    console.print(table)


def _curve_label(label: str, runs: Sequence[Run]) -> str:
    return label if len(runs) == 1 else f"{shorten(label, 60, placeholder=' …')} ({len(runs)} seeds)"


def _mean_and_deviation(values: Sequence[float]) -> str:
    if len(values) < 2:
        return _number(values[0] if values else math.nan, ".2f")
    return f"{_number(fmean(values), '.2f')} ± {_number(stdev(values), '.2f')}"


def _table_cells(run: Run) -> list[str]:
    accuracy = run.series("test_accuracy") * 100
    measured = accuracy[np.isfinite(accuracy)]
    return [
        str(run.summary.get("algorithm") or _configured_name(run, "algorithm")),
        str(run.summary.get("split") or run.split.get("split") or _configured_name(run, "split")),
        _number(accuracy[-1] if accuracy.size else math.nan, ".2f"),
        _number(measured.max() if measured.size else math.nan, ".2f"),
        _number(_final(run, "rounds", "round"), ".0f"),
        _human_bytes(_final(run, "bytes_sent", "bytes_sent")),
        _number(_final(run, "passes", "passes"), ".1f"),
        _number(_final(run, "wall_seconds", "seconds"), ".1f"),
        str(run.summary.get("status", "running/unfinished")),
    ]


def _final(run: Run, in_summary: str, in_metrics: str) -> float:
    if run.summary.get(in_summary) is not None:
        return float(run.summary[in_summary])
    series = run.series(in_metrics)
    return float(series[-1]) if series.size else math.nan


def _configured_name(run: Run, group: str) -> str:
    chosen = run.config.get(group)
    return str(chosen.get("name", "?") if isinstance(chosen, dict) else chosen or "?")


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "-"


def _human_bytes(count: float) -> str:
    if not math.isfinite(count):
        return "-"
    unit, name = byte_unit(count)
    return f"{count / unit:.{0 if unit == 1 else 1}f} {name}"


if __name__ == "__main__":
    sys.exit(main())
