"""Runs survive disks that are full or read-only."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import TrainHere, errors, without_time
from commands import train_here as train_here  # a fixture
from harm import COMMON, ROUNDS, assert_as_undisturbed, event, files_of, summary
from harm import here as here  # a fixture

from pisa_dist import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with little room, in the working directory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs root to mount a small tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path, *, leaving: int) -> Path:
    room = os.statvfs(folder)
    ballast = folder / "ballast"
    ballast.write_bytes(bytes(room.f_bavail * room.f_frsize - leaving))
    return ballast


def assert_whole(checkpoints: list[Path]) -> None:
    assert checkpoints
    assert [checkpoint.damage(path) for path in checkpoints] == [None] * len(checkpoints)


def test_a_disk_too_full_for_a_checkpoint_is_a_warning_and_the_older_checkpoints_stay(
    disk: Path, tmp_path: Path, here: TrainHere, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").symlink_to("disk/run")
    (disk / "run").mkdir()
    assert here(*COMMON, "rounds=6", "run_dir=run") == 0
    before = files_of(disk / "run/checkpoints")
    size = sum(len(content) for content in before.values()) // 2
    ballast = fill(disk, leaving=size // 2)
    capfd.readouterr()
    assert here(*COMMON, ROUNDS, "run_dir=run", "resume=auto") == 0
    warnings = capfd.readouterr().err.splitlines()
    assert len(warnings) == 2  # of rounds 9 and 12
    for line in warnings:
        assert line.startswith("warning: checkpoint not written, training goes on: ")
    assert any("No space left on device" in line for line in warnings)
    assert files_of(disk / "run/checkpoints") == before
    assert_whole(checkpoint.complete(disk / "run"))
    assert_as_undisturbed(tmp_path, here)

    ballast.unlink()
    assert here(*COMMON, ROUNDS, "run_dir=run", "resume=auto") == 0
    assert capfd.readouterr().err == ""
    assert checkpoint.complete(disk / "run")[0].name == "round_000012"
    assert_as_undisturbed_again(tmp_path)


def assert_as_undisturbed_again(folder: Path) -> None:
    assert without_time(folder / "run") == without_time(folder / "undisturbed")


def test_a_run_whose_metrics_cannot_be_written_ends_in_one_line_and_goes_on_when_there_is_room(
    disk: Path, tmp_path: Path, here: TrainHere, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").symlink_to("disk/run")
    (disk / "run").mkdir()
    # A page of the file system holds some lines more after it is full.
    overrides = (*COMMON, "rounds=40", "run_dir=run", "resume=auto")
    # No checkpoint is being written at that moment, which would give its room back.
    assert here(*overrides, *event("fill", at_call=30), "checkpoint.asynchronous=false") == 2
    (line,) = errors(capfd.readouterr().err)
    assert line.startswith("pisa-train: error: ")
    assert line.endswith("run/metrics.jsonl cannot be written: No space left on device")
    assert_whole(checkpoint.complete(disk / "run"))
    rounds_done = len((disk / "run/metrics.jsonl").read_bytes().splitlines())
    assert rounds_done >= 7

    # It is still full: nothing is lost by trying.
    metrics, checkpoints = (disk / "run/metrics.jsonl").read_bytes(), files_of(disk / "run/checkpoints")
    assert here(*overrides) == 2
    (line,) = errors(capfd.readouterr().err)
    assert "No space left on device" in line
    assert (disk / "run/metrics.jsonl").read_bytes() == metrics
    assert files_of(disk / "run/checkpoints") == checkpoints

    (disk / "ballast").unlink()
    assert here(*overrides) == 0
    assert_as_undisturbed(tmp_path, here, "rounds=40")


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_stop_whose_checkpoint_does_not_fit_on_the_disk_is_no_preempted_run(
    asynchronous: str, disk: Path, tmp_path: Path, here: TrainHere, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").symlink_to("disk/run")
    (disk / "run").mkdir()
    assert here(*COMMON, "rounds=6", "run_dir=run") == 0
    fill(disk, leaving=24_000)
    capfd.readouterr()
    limited = (*COMMON, ROUNDS, "run_dir=run", "resume=auto", "max_seconds=1e-6")
    assert here(*limited, f"checkpoint.asynchronous={asynchronous}") == 2
    (line,) = errors(capfd.readouterr().err)
    assert line == "pisa-train: error: stopped after round 7, and its checkpoint could not be written"
    assert summary(disk / "run")["status"] == "completed"  # of the session before
    assert_whole(checkpoint.complete(disk / "run"))


def test_a_run_directory_below_folders_that_do_not_exist_is_made(tmp_path: Path, here: TrainHere) -> None:
    assert here(*COMMON, "rounds=1", "run_dir=deep/below/run") == 0
    assert summary(tmp_path / "deep/below/run")["status"] == "completed"


def test_a_run_directory_on_a_read_only_disk_is_refused_in_one_line(
    disk: Path, here: TrainHere, capfd: pytest.CaptureFixture[str]
) -> None:
    (disk / "old").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for name in ("disk/new", "disk/old"):
        assert here(*COMMON, "rounds=1", f"run_dir={name}") == 2
        assert capfd.readouterr().err == (
            f"pisa-train: error: `run_dir` '{name}' cannot be written: Read-only file system\n"
        )
