"""The run directory: configuration, metrics, split and summary as files, written by rank 0 alone."""

import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

import pisa_dist

Metrics = Mapping[str, float | int | None]


class RunDirectory:
    """Writes one run's files; every line of metrics is on disk before the next round starts.

    Args:
        path: the directory, from `prepare`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @staticmethod
    def prepare(run_dir: str | None, *, name: str, resume: str | None) -> Path:
        """Make the directory of a run, or find that of the run to go on with.

        Args:
            run_dir: where to put it; None makes a new one below `runs/`, called after name and time.
            name: data, split and algorithm, for the directory's name.
            resume: "auto" if it may hold a run already; a checkpoint, or a run with one, if it may hold that; or None.

        Raises:
            ValueError: it holds another run, or cannot be written.
        """
        try:
            if run_dir is None:
                return _new_directory(Path("runs"), f"{name}-{datetime.now():%Y%m%d-%H%M%S}")
            path = Path(run_dir).expanduser()
            path.mkdir(parents=True, exist_ok=True)
            metrics = path / "metrics.jsonl"
            is_used = (metrics.exists() and metrics.stat().st_size > 0) or any(path.glob("checkpoints/round_*"))
            if is_used and resume is None:
                raise ValueError(f"`run_dir` {run_dir!r} holds a run already: choose another, or resume=auto to go on")
            if is_used and resume != "auto" and not Path(str(resume)).resolve().is_relative_to(path.resolve()):
                raise ValueError(
                    f"`run_dir` {run_dir!r} holds another run than `resume` {resume!r}: choose another, or resume=auto "
                    "to go on with the one that it holds"
                )
            metrics.touch()
        except OSError as error:
            raise ValueError(f"`run_dir` {run_dir or 'runs'!r} cannot be written: {error.strerror}") from error
        return path

    def require_restart(self, num_damaged: int) -> None:
        """Make way for a run that starts afresh here, because it has no checkpoint to go on from; lose nothing.

        Args:
            num_damaged: checkpoints that are there, none of them whole.

        Raises:
            ValueError: there is more here than the beginning of a run.
        """
        summary = self.path / "summary.json"
        if num_damaged:
            raise ValueError(
                f"`run_dir` {str(self.path)!r} holds {num_damaged} checkpoints, none of them whole: move them away"
            )
        if summary.exists():
            raise ValueError(
                f"`run_dir` {str(self.path)!r} holds a finished run without a checkpoint to go on from: choose another"
            )
        if self.metrics():
            number = 1
            while (kept := self.path / f"metrics-before-restart-{number}.jsonl").exists():
                number += 1
            (self.path / "metrics.jsonl").rename(kept)
            (self.path / "metrics.jsonl").touch()
            print(f"no checkpoint yet: starting afresh, earlier metrics are in {kept}", file=sys.stderr, flush=True)

    def set_aside(self, later: Sequence[Path], *, round_number: int) -> None:
        """Before a run goes on from an earlier round than it had come to, move what is later to `abandoned-N/`.

        Otherwise `resume=auto` would one day go on from a checkpoint of the history that was given up.

        Args:
            later: checkpoints of rounds after `round_number`.
            round_number: the round that the run goes on from.
        """
        if not later and not any(line["round"] > round_number for line in self.metrics()):
            return
        number = 1
        while (folder := self.path / f"abandoned-{number}").exists():
            number += 1
        folder.mkdir()
        shutil.copy2(self.path / "metrics.jsonl", folder)
        for path in later:
            path.rename(folder / path.name)
        print(f"going back to round {round_number}: what is later is in {folder}", file=sys.stderr, flush=True)

    def remove_unused(self) -> None:
        """Remove the directory again if no run has begun in it: there is no configuration, no metrics, nothing else."""
        metrics = self.path / "metrics.jsonl"
        with suppress(OSError):
            if {file.name for file in self.path.iterdir()} <= {".lock", metrics.name} and metrics.stat().st_size == 0:
                metrics.unlink()
                (self.path / ".lock").unlink(missing_ok=True)
                self.path.rmdir()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory for this process; the lock goes with the process, however it ends.

        Raises:
            ValueError: another process holds it.
        """
        with (self.path / ".lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                owner = file.read().strip() or "another process"
                raise ValueError(
                    f"`run_dir` {str(self.path)!r} is in use by {owner}: wait for it, or choose another"
                ) from error
            except OSError as error:
                raise ValueError(f"`run_dir` {str(self.path)!r} cannot be locked: {error.strerror}") from error
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}")
            file.flush()
            yield

    def write_config(self, config: Mapping[str, Any]) -> None:
        """config.yaml: the resolved configuration."""
        _replace(self.path / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False))

    def write_split(self, split: Mapping[str, Any]) -> None:
        """split.json: counts per worker and class, and skew measures."""
        _replace(self.path / "split.json", json.dumps(split) + "\n")

    def keep_metrics_until(self, round_number: int) -> None:
        """Drop the lines of rounds after `round_number`, which a resumed run will write again."""
        kept = [line for line in self.metrics() if line["round"] <= round_number]
        _replace(self.path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))

    def append_metrics(self, metrics: Metrics) -> None:
        """Add a line to metrics.jsonl; not-a-number and infinity become null, which JSON can hold.

        Raises:
            OSError: it cannot be written; names the file.
        """
        finite = {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in metrics.items()}
        path = self.path / "metrics.jsonl"
        try:
            with path.open("a") as file:
                file.write(json.dumps(finite) + "\n")
        except OSError as error:
            raise _unwritable(path, error) from error

    def metrics(self) -> list[dict[str, Any]]:
        """The whole lines of metrics.jsonl, up to one that a kill or a full disk cut short."""
        parsed = []
        for line in (self.path / "metrics.jsonl").read_bytes().splitlines():
            try:
                content = json.loads(line)
            except ValueError:
                break
            if not isinstance(content, dict) or not isinstance(content.get("round"), int):
                break
            parsed.append(content)
        return parsed

    def write_summary(self, facts: Mapping[str, Any], *, status: str = "completed") -> None:
        """summary.json: status, facts of the run, last and best of the metrics, versions, commit."""
        metrics = self.metrics()
        best = {
            "train_loss": _best(min, metrics, "train_loss"),
            "test_loss": _best(min, metrics, "test_loss"),
            "test_accuracy": _best(max, metrics, "test_accuracy"),
        }
        summary = {
            "status": status,
            **facts,
            "last": metrics[-1] if metrics else None,
            "best": best,
            "versions": versions(),
            "commit": commit(),
        }
        _replace(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    return {
        "pisa_dist": pisa_dist.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "hydra": version("hydra-core"),
    }


def commit() -> str | None:
    """The checkout's commit, None for an installed package."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _replace(file: Path, text: str) -> None:
    """Write a file whole or not at all: a kill or a full disk leaves the one that was there.

    Raises:
        OSError: it cannot be written; names the file.
    """
    fresh = file.with_name(f"{file.name}.new")
    try:
        fresh.write_text(text)
        os.replace(fresh, file)
    except OSError as error:
        with suppress(OSError):
            fresh.unlink(missing_ok=True)
        raise _unwritable(file, error) from error


def _unwritable(file: Path, error: OSError) -> OSError:
    return OSError(f"{file} cannot be written: {error.strerror or error}")


def _best(choose: Any, metrics: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [line[key] for line in metrics if line[key] is not None]
    return choose(values) if values else None


def _new_directory(parent: Path, name: str) -> Path:
    for attempt in range(1000):
        path = parent / (name if attempt == 0 else f"{name}-{attempt}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        (path / "metrics.jsonl").touch()
        return path
    raise ValueError(f"`run_dir` must be given: {parent / name} and 999 like it exist")
