"""One run of a benchmark, in one of its processes: overrides in, numbers out, no file."""

from collections.abc import Sequence
from typing import Any

import torch

from pisa_dist.benchmark.pool import one_line
from pisa_dist.data.datasets import TrainTest
from pisa_dist.runner import load_data, read_data, trainer_alone
from pisa_dist.schema import DataConfig
from pisa_dist.train import compose_config


def execute(overrides: Sequence[str]) -> dict[str, Any]:
    """Train as `pisa-train OVERRIDES...` does, without a run directory.

    Returns:
        `status` (ok or failed), `error` (one line or None), `rounds`, `passes`, `bytes_sent`, `seconds`,
        `accuracies` ([round, accuracy, passes, bytes sent] at every evaluation), `last_accuracy` and `best_accuracy`. A
        run that fails has the evaluations until then, and None as last and best accuracy.
    """
    torch.set_num_threads(1)
    accuracies: list[tuple[int, float, float, int]] = []
    trainer, error, num_train = None, None, 0
    try:
        config = compose_config(overrides)
        data = load_data(config, _read)
        num_train = len(data.train)
        trainer = trainer_alone(config, data)
        for number, _, metrics in trainer.run():
            if metrics is not None:
                spent = (trainer.state.samples_seen / num_train, trainer.state.bytes_sent)
                accuracies.append((number, float(metrics["test_accuracy"] or 0.0), *spent))
    except Exception as problem:
        error = one_line(problem)
    state = trainer.state if trainer is not None else None
    return {
        "rounds": state.round_number if state else 0,
        "passes": state.samples_seen / num_train if state else 0.0,
        "bytes_sent": state.bytes_sent if state else 0,
        "seconds": round(state.seconds, 3) if state else 0.0,
        "last_accuracy": accuracies[-1][1] if error is None else None,
        "best_accuracy": max(point[1] for point in accuracies) if error is None else None,
        "status": "ok" if error is None else "failed",
        "error": error,
        "accuracies": accuracies,
    }


def check_run(overrides: Sequence[str]) -> int:
    """Compose and check a run, read its data and split them; nothing is trained.

    Returns:
        Number of training samples.

    Raises:
        ValueError, OSError: one line.
    """
    config = compose_config(overrides)
    data = load_data(config, _read)
    trainer_alone(config, data)
    return len(data.train)


def forget_data() -> None:
    """Give the memory of the last data set back."""
    _last.clear()


# Cells come data set by data set: one is remembered.
_last: dict[str, TrainTest] = {}


def _read(data: DataConfig) -> TrainTest:
    files = {key: value for key, value in vars(data).items() if key not in ("num_train", "validation_fraction")}
    key = repr(sorted(files.items()))
    if key not in _last:
        _last.clear()
        _last[key] = read_data(data)
    return _last[key]
