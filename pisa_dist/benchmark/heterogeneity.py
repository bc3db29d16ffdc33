"""Runs the grid of the heterogeneity benchmark: data x split x participation x method x seed, on all cores."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pisa_dist.benchmark.grid import Plan, Run, Schedule
from pisa_dist.benchmark.methods import METHODS
from pisa_dist.benchmark.pool import Finished, Pool
from pisa_dist.benchmark.protocols import TUNING_SEED, Cell, Protocol
from pisa_dist.benchmark.results import SCORE, Record, Results, key_of
from pisa_dist.benchmark.worker import check_run, execute, forget_data
from pisa_dist.rundir import commit
from pisa_dist.train import compose_config

# Keys that make up the grid; setting one for all runs would make its columns untrue.
OWN_KEYS = ("data", "split", "algorithm", "participation", "seed", "data.validation_fraction", "num_workers")
FAILED: dict[str, Any] = {
    "rounds": 0,
    "passes": 0.0,
    "bytes_sent": 0,
    "seconds": 0.0,
    "last_accuracy": None,
    "best_accuracy": None,
    "status": "failed",
    "accuracies": [],
}


def make_plan(
    protocol: Protocol, cells: Sequence[Cell], methods: Sequence[str], num_seeds: int, extra: Sequence[str]
) -> Plan:
    """The plan, with everything checked that can be before training: overrides, data, splits, methods.

    Raises:
        ValueError, OSError: one line.
    """
    if not 1 <= num_seeds <= TUNING_SEED:
        raise ValueError(f"--seeds must be in 1..{TUNING_SEED}, got {num_seeds}: seed {TUNING_SEED} is for tuning")
    for override in extra:
        key, equals, _ = override.partition("=")
        if not equals or key.lstrip("+") in OWN_KEYS:
            raise ValueError(f"--set must be KEY=VALUE with a key that the grid does not set itself, got {override!r}")
    num_samples: dict[str, int] = {}
    for cell in cells:
        overrides = [*protocol.data_overrides(cell), *METHODS[methods[0]].overrides, "device=cpu", *extra]
        num_samples[cell.dataset] = check_run(overrides)
    forget_data()
    plan = Plan(protocol, cells, methods, range(num_seeds), num_samples, extra)
    first = {cell.dataset: cell for cell in reversed(cells)}
    for method in methods:
        for cell in first.values():
            settings = METHODS[method].settings_for(protocol, cell.dataset)
            compose_config(plan.run(cell, method, settings[0], 0, SCORE).overrides)
    return plan


def run_grid(plan: Plan, results: Results, num_processes: int) -> tuple[int, int]:
    """Run what is not done yet; every run that ends, however it ends, is a line of the results.

    Returns:
        (number of runs of the grid, number of them that failed in this session).
    """
    done = {
        key_of(record["phase"], record["overrides"]): record for record in results.read() if record["status"] == "ok"
    }
    schedule = Schedule(plan, done)
    facts = {"protocol": plan.protocol.name, "commit": commit()}
    num_failed = 0
    with Pool(execute, num_processes) as pool, Display(schedule.total, schedule.num_done) as display:
        while True:
            while pool.num_free and (run := schedule.next_run()) is not None:
                pool.submit(_Task(run))
            if not pool.running:
                return schedule.total, num_failed
            for finished in pool.wait():
                run = finished.task.run
                record = {**run.describe(), **_outcome(finished), **facts}
                results.append(record)
                schedule.finished(run, record)
                num_failed += record["status"] != "ok"
                display.show(run, record, schedule.total)


class _Task(tuple[str, ...]):
    """A run's overrides, which is all that travels to a process; the run itself stays here."""

    run: Run

    def __new__(cls, run: Run) -> Self:
        task = super().__new__(cls, run.overrides)
        task.run = run
        return task

    def __reduce__(self) -> tuple[type, tuple[list[str]]]:
        return tuple, (list(self),)


def _outcome(finished: Finished) -> Record:
    if finished.error is not None:
        return {**FAILED, "error": finished.error}
    outcome: Record = finished.value
    return outcome


class Display:
    """How far the grid is: a bar on a terminal, a line per run elsewhere."""

    def __init__(self, total: int, num_done: int) -> None:
        self.total, self.num_done = total, num_done
        self._started = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        if sys.stdout.isatty():
            columns = (MofNCompleteColumn(), BarColumn(bar_width=None), TextColumn("{task.fields[state]}"))
            console = Console(file=sys.stdout, force_terminal=True)
            left = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=False))
            self._bar = Progress(TextColumn("runs"), *columns, *left, console=console, expand=True)
            self._bar.start()
            self._bar.add_task("grid", total=self.total, completed=self.num_done, state="")
        elif self.num_done:
            print(f"{self.num_done} of {self.total} runs are done already", flush=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Give the cursor back."""
        if self._bar is not None:
            self._bar.stop()

    def show(self, run: Run, record: Record, total: int) -> None:
        """A run has ended, one of `total`, which may have grown."""
        self.num_done += 1
        self.total = total
        accuracy = record["last_accuracy"]
        result = f"{100 * accuracy:5.1f} %" if accuracy is not None else f"failed: {record['error']}"
        what = f"{run.cell}, {run.method}, {run.phase} seed {run.seed}"
        if self._bar is None:
            width = len(str(self.total))
            print(f"{self.num_done:>{width}}/{self.total}  {result}  {record['seconds']:5.1f} s  {what}", flush=True)
            return
        self._bar.update(self._bar.task_ids[0], completed=self.num_done, total=total, state=str(run.cell))
        if accuracy is None:
            self._bar.console.print(f"{what}: {result}", markup=False, highlight=False)


def how_to_go_on(folder: Path) -> str:
    """The one line of a grid that was stopped."""
    try:
        lines = len(Results(folder).read())
    except ValueError:
        lines = 0
    return f"stopped: {lines} runs are kept in {folder}; the same command goes on with the rest, --report-only reports"
