"""Sends the metrics of a run to Weights & Biases or TensorBoard, or nowhere.

Both packages are optional and imported only by the tracker that uses them.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TRACKERS = ("none", "wandb", "tensorboard")
WANDB_MODES = ("online", "offline")


class Tracker(ABC):
    """Where metrics go while a run trains."""

    @abstractmethod
    def log(self, metrics: Mapping[str, float | int | None]) -> None:
        """Record one evaluation; `metrics["round"]` is its step, and what is None is left out."""

    @abstractmethod
    def finish(self) -> None:
        """Write what is still in memory and close."""


class NoTracker(Tracker):
    """Records nothing: the run directory holds the metrics anyway."""

    def log(self, metrics: Mapping[str, float | int | None]) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""


class WandbTracker(Tracker):
    """Weights & Biases, with its files in `run_dir`/wandb.

    Args:
        project: project that the run is listed in.
        name: name of the run, None for one that wandb invents.
        mode: "online", or "offline" to write files only (`wandb sync` sends them later).
        run_dir: the run directory; created if needed.
        config: the resolved configuration, shown beside the run.

    Raises:
        ValueError: wandb is not installed, `mode` is unknown, or wandb refuses to start (no login).
    """

    def __init__(self, *, project: str, name: str | None, mode: str, run_dir: Path, config: Mapping[str, Any]) -> None:
        check_tracking("wandb")
        if mode not in WANDB_MODES:
            raise ValueError(f"`tracking.mode` must be one of {', '.join(WANDB_MODES)}, got {mode!r}")
        import wandb

        # wandb writes to the temporary directory, with no more than a warning, if this one is missing.
        run_dir.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                project=project,
                name=name,
                mode="offline" if mode == "offline" else "online",
                dir=str(run_dir),
                config=dict(config),
                settings=wandb.Settings(console="off"),  # capturing stdout would break the progress bar
            )
        except wandb.errors.Error as error:
            raise ValueError(
                f"`tracking` wandb cannot start: {error} (run `wandb login`, or set tracking.mode=offline)"
            ) from error

    def log(self, metrics: Mapping[str, float | int | None]) -> None:
        """Record one evaluation under its round."""
        step, values = _step_and_values(metrics)
        self._run.log(values, step=step)

    def finish(self) -> None:
        """End the run; what wandb's own process has still to write is waited for when the interpreter exits."""
        self._run.finish()


class TensorboardTracker(Tracker):
    """TensorBoard event files in `run_dir`/tensorboard.

    Args:
        run_dir: the run directory; created if needed.

    Raises:
        ValueError: tensorboard is not installed.
    """

    def __init__(self, run_dir: Path) -> None:
        check_tracking("tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / "tensorboard"))

    def log(self, metrics: Mapping[str, float | int | None]) -> None:
        """Record one evaluation, a scalar per metric, and flush: evaluations are rare."""
        step, values = _step_and_values(metrics)
        for name, value in values.items():
            self._writer.add_scalar(name, value, global_step=step)
        self._writer.flush()

    def finish(self) -> None:
        """Close the event file."""
        self._writer.close()


def check_tracking(name: str) -> None:
    """Refuse a tracker that does not exist or whose package is missing.

    Raises:
        ValueError: one line; for a missing package it holds the command that installs it.
    """
    if name not in TRACKERS:
        raise ValueError(f"`tracking` must be one of {', '.join(TRACKERS)}, got {name!r}")
    if name == "none":
        return
    package = importlib.util.find_spec(name)
    # Without an origin it is no package but a folder of that name, which wandb itself leaves behind.
    if package is None or package.origin is None:
        raise ValueError(f'`tracking` {name} needs a package that is not installed: pip install "pisa-dist[{name}]"')


def make_tracker(
    name: str,
    *,
    run_dir: Path,
    config: Mapping[str, Any],
    project: str = "pisa_dist",
    run_name: str | None = None,
    mode: str = "online",
) -> Tracker:
    """The tracker of that name; only rank 0 should have one.

    Args:
        name: "none", "wandb" or "tensorboard".
        run_dir: the run directory, which receives the tracker's files.
        config: the resolved configuration.
        project: wandb only, project that the run is listed in.
        run_name: wandb only, None for one that wandb invents.
        mode: wandb only, "online" or "offline".

    Raises:
        ValueError: as `check_tracking` and `WandbTracker`.
    """
    check_tracking(name)
    if name == "wandb":
        return WandbTracker(project=project, name=run_name, mode=mode, run_dir=run_dir, config=config)
    return TensorboardTracker(run_dir) if name == "tensorboard" else NoTracker()


def _step_and_values(metrics: Mapping[str, float | int | None]) -> tuple[int, dict[str, float | int]]:
    step = metrics["round"]
    if step is None:
        raise ValueError("metrics need a `round`: it is the step that they are recorded under")
    values = {name: value for name, value in metrics.items() if value is not None and name != "round"}
    return int(step), values
