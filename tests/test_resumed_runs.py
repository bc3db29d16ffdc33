"""Runs go on where they were interrupted or ended, on another number of ranks, in another directory."""

import json
from pathlib import Path

import pytest
import yaml
from commands import SMALL, TrainHere, assert_same_metrics, errors, read_metrics, train, without_time
from commands import train_here as train_here  # a fixture

from pisa_dist.progress import Progress

pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize(
    "settings", [("participation=0.5",), ("algorithm=synchronous",), ("algorithm=nsisa",)], ids=" ".join
)
def test_a_run_that_was_interrupted_goes_on_as_if_nothing_had_happened(
    settings: tuple[str, ...], tmp_path: Path, train_here: TrainHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ("rounds=8", "eval_every=1", "num_workers=6", "checkpoint.every=2", *settings, *SMALL)
    assert train_here(*common, "run_dir=straight") == 0

    def interrupt(self: Progress, round_number: int, train_loss: float) -> None:
        if round_number == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "advance", interrupt)
        assert train_here(*common, "run_dir=run") == 130
    assert [line["round"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5]
    assert train_here(*common, "run_dir=run", "resume=auto") == 0
    assert without_time(tmp_path / "run") == without_time(tmp_path / "straight")
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "completed"


def test_a_finished_run_goes_on_for_more_rounds_bit_for_bit(tmp_path: Path, train_here: TrainHere) -> None:
    common = ("eval_every=2", "num_workers=6", "checkpoint.every=2", *SMALL)
    assert train_here(*common, "rounds=8", "run_dir=straight") == 0
    assert train_here(*common, "rounds=4", "run_dir=run") == 0
    assert train_here(*common, "rounds=8", "run_dir=run", "resume=auto") == 0
    assert without_time(tmp_path / "run") == without_time(tmp_path / "straight")
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["rounds"] == 8


def test_a_run_goes_on_from_one_rank_to_two_and_back(tmp_path: Path, train_here: TrainHere) -> None:
    common = ("eval_every=2", "num_workers=5", "checkpoint.every=2", "participation=0.6", "dtype=float64", *SMALL)
    assert train_here(*common, "rounds=10", "run_dir=straight") == 0
    assert train_here(*common, "rounds=4", "run_dir=run") == 0
    done = train(*common, "rounds=8", "run_dir=run", "resume=auto", cwd=tmp_path, num_ranks=2)
    assert done.returncode == 0, done.stderr
    assert train_here(*common, "rounds=10", "run_dir=run", "resume=auto") == 0
    assert_same_metrics(tmp_path / "run", tmp_path / "straight", rel=1e-10)


def test_resume_takes_the_path_of_another_run(tmp_path: Path, train_here: TrainHere) -> None:
    common = ("eval_every=2", "num_workers=4", "checkpoint.every=2", *SMALL)
    assert train_here(*common, "rounds=6", "run_dir=straight") == 0
    assert train_here(*common, "rounds=4", "run_dir=first") == 0
    assert train_here(*common, "rounds=6", "run_dir=second", "resume=first") == 0
    assert without_time(tmp_path / "second") == without_time(tmp_path / "straight")[2:]
    third = ("rounds=6", "run_dir=third", "resume=first/checkpoints/round_000002")
    assert train_here(*common, *third) == 0
    assert without_time(tmp_path / "third") == without_time(tmp_path / "straight")[1:]


def test_a_checkpoint_of_another_method_is_refused(
    tmp_path: Path, train_here: TrainHere, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny = ("rounds=2", "num_workers=2", "checkpoint.every=2", *SMALL)
    assert train_here(*tiny, "run_dir=first") == 0
    capfd.readouterr()
    for change, named in (("algorithm=pisa", "pisa"), ("num_workers=3", "3"), ("dtype=float64", "float64")):
        assert train_here(*tiny, change, f"run_dir={named}", "resume=first") == 2
        (line,) = errors(capfd.readouterr().err)
        assert "`resume`" in line
        assert named in line
