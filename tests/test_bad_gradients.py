"""A gradient that is not a number ends a run in one line, or its round is skipped."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
from commands import TrainHere, assert_same_metrics, errors, job_of, read_metrics, train
from commands import train_here as train_here  # a fixture

pytestmark = pytest.mark.timeout(300)


POISON = """
import numpy as np
import torch
from torch import nn


def load():
    targets = np.arange(80) % 4
    inputs = np.random.default_rng(0).normal(size=(80, 3)) + targets[:, None]
    test = inputs.copy(), targets
    inputs[2, 0] = 1000.0  # a sample of class 2
    return (inputs, targets), test


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 4)

    def forward(self, inputs):
        return self.head(torch.where(inputs > 500, torch.nan, inputs))
"""


POISONED = (
    "data=custom",
    "data._target_=poison.load",
    "model=custom",
    "model._target_=poison.Net",
    "split=label_k",
    "num_workers=4",
    "batch_size=5",
    "rounds=8",
    "eval_every=1",
    "dtype=float64",
)


SKIPPED = re.compile(r"^round (\d+): .*non-finite gradient on worker 2 in head\.weight.* skipped$", re.MULTILINE)


def test_a_gradient_that_is_not_a_number_ends_the_run_in_a_line_that_names_worker_and_parameter(
    tmp_path: Path, train_here: TrainHere, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "poison.py").write_text(POISON)
    assert train_here(*POISONED, "batch_size=20", "run_dir=run") == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("pisa-train: error: non-finite gradient on worker 2 in head.weight in round 1")


def test_a_round_with_a_gradient_that_is_not_a_number_is_skipped_on_request(
    tmp_path: Path, train_here: TrainHere, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "poison.py").write_text(POISON)
    assert train_here(*POISONED, "on_nonfinite=skip", "run_dir=run") == 0
    skipped = {int(number) for number in SKIPPED.findall(capfd.readouterr().err)}
    assert 0 < len(skipped) < 8
    metrics = read_metrics(tmp_path / "run")
    assert [line["round"] for line in metrics] == list(range(1, 9))
    assert {line["round"] for line in metrics if line["train_loss"] is None} == skipped
    for before, line in pairwise(metrics):
        assert (line["test_loss"] == before["test_loss"]) == (line["round"] in skipped)


@pytest.mark.parametrize("order", ["skip,raise", "raise,skip"])
def test_two_ranks_refuse_the_same_gradients_and_a_sweep_goes_on_after_a_failed_job(
    order: str, tmp_path: Path, train_here: TrainHere
) -> None:
    (tmp_path / "poison.py").write_text(POISON)
    assert train_here(*POISONED, "on_nonfinite=skip", "run_dir=alone") == 0
    done = train("--multirun", *POISONED, f"on_nonfinite={order}", "run_dir=together", cwd=tmp_path, num_ranks=2)
    assert done.returncode != 0
    lines = errors(done.stderr)
    assert lines
    assert all(line.count("pisa-train: error: ") == 1 for line in lines)
    assert all(re.search(r"error: non-finite gradient on worker 2 in head\.weight", line) for line in lines)
    assert "in _train" not in done.stderr  # the only traceback is torchrun's own
    skipping = job_of(tmp_path / "together", "on_nonfinite=skip")
    assert_same_metrics(skipping, tmp_path / "alone", rel=1e-9)
    assert (skipping / "summary.json").is_file()
    assert len(list((skipping / "figures").glob("*.png"))) == 4
    assert not (job_of(tmp_path / "together", "on_nonfinite=raise") / "summary.json").exists()
