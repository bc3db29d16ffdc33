"""results.jsonl: a line per run, written as runs end, read again by whoever goes on or reports."""

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

RESULTS, GRID = "results.jsonl", "grid.json"
TUNE, SCORE = "tune", "score"

Record = Mapping[str, Any]
Key = tuple[str, ...]


def key_of(phase: str, overrides: list[str] | tuple[str, ...]) -> Key:
    """What makes a run the same run: its phase and its overrides, which hold the seed."""
    return (phase, *overrides)


class Point(NamedTuple):
    """An evaluation of a run, and what the run had spent by then."""

    round: int
    accuracy: float
    passes: float
    bytes_sent: float


def curve(record: Record) -> list[Point]:
    """The evaluations of a run.

    Lines written before they kept what was spent have it in proportion to the rounds, as methods whose rounds all cost
    the same spend it.
    """
    points = []
    for number, accuracy, *spent in record["accuracies"]:
        share = number / record["rounds"]
        points.append(Point(number, accuracy, *(spent or (share * record["passes"], share * record["bytes_sent"]))))
    return points


class Results:
    """The folder of a benchmark.

    Args:
        folder: created by `claimed`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / RESULTS

    @contextmanager
    def claimed(self, grid: Mapping[str, Any]) -> Iterator[None]:
        """Make the folder, hold it for this process, and cut off a half-written last line.

        Args:
            grid: what all lines have in common, so that runs of two protocols never mix.

        Raises:
            ValueError: another process holds it, or it belongs to another grid.
            OSError: it cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"--out {self.folder} is in use by another process: wait, or choose another") from None
            known = self.grid()
            if known and known != grid:
                raise ValueError(f"--out {self.folder} holds a grid of {known}, not of {dict(grid)}: choose another")
            (self.folder / GRID).write_text(json.dumps(grid) + "\n")
            if self.file.exists():
                content = self.file.read_bytes()
                whole = content.rfind(b"\n") + 1
                if whole < len(content):
                    with self.file.open("r+b") as file:
                        file.truncate(whole)
            yield

    def grid(self) -> dict[str, Any]:
        """What `claimed` was given; empty in a new folder.

        Raises:
            ValueError: the file is damaged.
        """
        path = self.folder / GRID
        if not path.exists():
            return {}
        try:
            grid = json.loads(path.read_text())
        except ValueError:
            grid = None
        if not isinstance(grid, dict):
            raise ValueError(f"{path} is not a JSON object")
        return grid

    def append(self, record: Record) -> None:
        """Add a line, on disk for whoever comes after this process."""
        with self.file.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """The lines, the last one of each run; one that a kill cut short is left out.

        Raises:
            ValueError: a whole line is not a record.
        """
        if not self.file.exists():
            return []
        records: dict[Key, dict[str, Any]] = {}
        *whole, _ = self.file.read_text(errors="replace").split("\n")
        for number, line in enumerate(whole, start=1):
            try:
                record = json.loads(line)
                key = key_of(record["phase"], record["overrides"])
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{self.file}:{number} is not a result: {line[:60]!r}") from None
            records.pop(key, None)  # a run that is done again counts as done then
            records[key] = record
        return list(records.values())
