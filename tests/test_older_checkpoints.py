"""Which checkpoint a run goes on from, and when it writes one: damaged ones, renames, going back, the clock."""

from collections.abc import Callable
from pathlib import Path

import pytest
from commands import TrainHere, read_metrics
from commands import train_here as train_here  # a fixture
from harm import COMMON, ROUNDS, assert_as_undisturbed
from harm import here as here  # a fixture
from problems import make_trainer

from pisa_dist import checkpoint
from pisa_dist.algorithms import ALGORITHMS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def flip_a_byte(path: Path) -> None:
    file = max(path.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def truncate(path: Path) -> None:
    file = max(path.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize("damage", [flip_a_byte, truncate], ids=["a flipped byte", "a truncated file"])
def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning_and_the_run_ends_the_same(
    damage: Callable[[Path], None], tmp_path: Path, here: TrainHere, capfd: pytest.CaptureFixture[str]
) -> None:
    overrides = (*COMMON, "run_dir=run")
    assert here(*overrides, "rounds=8") == 0
    damage(checkpoint.complete(tmp_path / "run")[0])
    capfd.readouterr()
    # One round each: a session that writes but one checkpoint, older than the damaged one, must keep it all the same.
    stopped = (*overrides, ROUNDS, "checkpoint.keep_last=1", "resume=auto", "max_seconds=1e-6")
    assert here(*stopped) == 75
    (warning,) = capfd.readouterr().err.splitlines()
    assert warning.startswith("warning: checkpoint run/checkpoints/round_000008 is passed over: __0_0.distcp is dam")
    assert [path.name for path in checkpoint.complete(tmp_path / "run")] == ["round_000008", "round_000007"]
    assert here(*overrides, ROUNDS, "resume=auto") == 0
    assert capfd.readouterr().err == f"{warning}\n"
    assert_as_undisturbed(tmp_path, here)
    newest = checkpoint.newest(tmp_path / "run")
    assert newest is not None
    assert newest.name == "round_000012"


def test_checkpoints_without_metrics_are_a_run_too(
    tmp_path: Path, here: TrainHere, capfd: pytest.CaptureFixture[str]
) -> None:
    # As a kill before the first evaluation leaves it: a fresh start here would one day go on from the old checkpoint.
    assert here(*COMMON, "rounds=3", "run_dir=run") == 0
    (tmp_path / "run/metrics.jsonl").write_text("")
    capfd.readouterr()
    assert here(*COMMON, "rounds=3", "run_dir=run") == 2
    assert "`run_dir` 'run' holds a run already" in capfd.readouterr().err


def test_rounds_beyond_a_million_are_newer_than_those_below(tmp_path: Path, here: TrainHere) -> None:
    assert here(*COMMON, "rounds=3", "run_dir=run") == 0
    (path,) = checkpoint.complete(tmp_path / "run")
    folder = path.rename(path.with_name("round_999999")).parent
    for name in ("round_1000000", "round_000010-copy", "round_"):
        (folder / name).mkdir()
        (folder / name / "contents.json").write_text("{}")
    assert [path.name for path in checkpoint.complete(tmp_path / "run")] == ["round_1000000", "round_999999"]


def test_going_back_to_an_earlier_round_sets_the_later_history_aside(
    tmp_path: Path, here: TrainHere, capfd: pytest.CaptureFixture[str]
) -> None:
    assert here(*COMMON, ROUNDS, "run_dir=run") == 0
    whole, checkpoints = read_metrics(tmp_path / "run"), tmp_path / "run/checkpoints"
    capfd.readouterr()
    assert here(*COMMON, "rounds=9", "run_dir=run", f"resume={checkpoints / 'round_000006'}") == 0
    assert "going back to round 6: what is later is in " in capfd.readouterr().err
    abandoned = tmp_path / "run/abandoned-1"
    assert {path.name for path in abandoned.iterdir()} == {"metrics.jsonl", "round_000009", "round_000012"}
    assert read_metrics(abandoned) == whole
    assert checkpoint.damage(abandoned / "round_000012") is None
    newest = checkpoint.newest(tmp_path / "run")
    assert newest is not None
    assert newest.name == "round_000009"
    assert here(*COMMON, ROUNDS, "run_dir=run", "resume=auto") == 0
    assert_as_undisturbed(tmp_path, here)


def test_a_kill_between_the_two_renames_of_a_checkpoint_that_is_written_again_loses_none(
    tmp_path: Path, here: TrainHere
) -> None:
    assert here(*COMMON, ROUNDS, "run_dir=run") == 0
    newest = tmp_path / "run/checkpoints/round_000012"
    newest.rename(newest.with_name("round_000012-replaced.unfinished"))
    checkpoint.Checkpointer(newest.parent).close()
    assert checkpoint.newest(tmp_path / "run") == newest


def test_by_default_a_run_writes_a_checkpoint_whenever_so_much_time_has_passed(tmp_path: Path, here: TrainHere) -> None:
    common = [override for override in COMMON if not override.startswith("checkpoint.")]
    assert here(*common, ROUNDS, "run_dir=short") == 0
    assert not (tmp_path / "short/checkpoints").exists()
    assert here(*common, ROUNDS, "run_dir=long", "checkpoint.every_seconds=1e-6", "checkpoint.keep_last=4") == 0
    names = [path.name for path in checkpoint.complete(tmp_path / "long")]
    assert names == ["round_000012", "round_000011", "round_000010", "round_000009"]
    assert here(*common, ROUNDS, "run_dir=never", "checkpoint.every_seconds=0") == 0
    assert not (tmp_path / "never/checkpoints").exists()


def test_the_time_to_the_next_checkpoint_begins_with_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    trainer = make_trainer(ALGORITHMS["sisa"](), num_workers=2)
    with checkpoint.Checkpointer(tmp_path, every_seconds=10.0, asynchronous=False) as checkpointer:
        never = checkpoint.Checkpointer(tmp_path)
        for moment, is_due in ((109.0, False), (110.0, True), (115.0, True)):
            now[0] = moment
            assert (checkpointer.is_due(), never.is_due()) == (is_due, False)
        checkpointer.save(trainer)
        now[0] = 124.0
        assert not checkpointer.is_due()
        now[0] = 125.0
        assert checkpointer.is_due()
        never.close()
