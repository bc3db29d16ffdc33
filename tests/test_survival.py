"""Runs survive kills, signals, time limits and each other: real processes, signals and files."""

import itertools
import os
import platform
import signal
import subprocess
import time
from pathlib import Path

import pytest
from commands import TrainHere, errors, read_metrics
from commands import train_here as train_here  # a fixture
from harm import COMMON, ROUNDS, assert_as_undisturbed, event, files_of, started, summary, wait_until
from harm import here as here  # a fixture

from pisa_dist import checkpoint, preemption
from pisa_dist.preemption import StopRequest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.mark.parametrize(
    ("what", "at_call", "restart_from"),
    [("kill", 7, 0), ("kill", 34, 6), ("kill in a checkpoint", 3, 6)],
    ids=["before the first checkpoint", "in the middle of a round", "in the middle of a checkpoint"],
)
def test_a_killed_process_goes_on_from_the_newest_whole_checkpoint(
    what: str, at_call: int, restart_from: int, tmp_path: Path, here: TrainHere
) -> None:
    synchronous = "checkpoint.asynchronous=false"  # so that it is certain which checkpoint is whole
    harm = event(what, at_call=at_call)
    harm = (f"+model.event='{what}'", *harm[1:])
    with started(*COMMON, ROUNDS, synchronous, "run_dir=run", *harm, cwd=tmp_path) as (process,):
        assert process.end() == -signal.SIGKILL, process.err
    whole = checkpoint.newest(tmp_path / "run")
    assert (checkpoint.read_contents(whole)["round"] if whole else 0) == restart_from
    halves = list(tmp_path.glob("run/checkpoints/*.unfinished"))
    assert len(halves) == (what == "kill in a checkpoint")
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"round": 11, "train_lo')  # as a kill in the middle of a line would leave it
    assert here(*COMMON, ROUNDS, "run_dir=run", "resume=auto") == 0
    assert not list(tmp_path.glob("run/checkpoints/*.unfinished"))
    assert_as_undisturbed(tmp_path, here)


@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_restarts_all_ranks_after_one_was_killed_and_the_run_ends_as_if_nothing_had_happened(
    rank: int, tmp_path: Path, here: TrainHere
) -> None:
    overrides = (*COMMON, ROUNDS, "run_dir=run", "resume=auto", *event("kill", at_call=15, on_rank=rank))
    with started(*overrides, cwd=tmp_path, num_ranks=2, torchrun=("--max-restarts", "1")) as (torchrun,):
        assert torchrun.end() == 0, torchrun.err
    assert (tmp_path / "happened").exists()
    assert summary(tmp_path / "run")["num_ranks"] == 2
    assert_as_undisturbed(tmp_path, here, on_one_layout=False)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_ends_a_run_after_the_round_with_a_checkpoint_and_status_75(
    name: str, tmp_path: Path, here: TrainHere
) -> None:
    overrides = (*COMMON, ROUNDS, "run_dir=run", "resume=auto")
    with started(*overrides, *event(name, at_call=18), cwd=tmp_path) as (process,):
        assert process.end() == 75, process.err
        assert "stopped after round 5: go on with run_dir=run resume=auto" in process.out.splitlines()
        assert process.err == ""
    assert summary(tmp_path / "run")["status"] == "preempted"
    assert summary(tmp_path / "run")["last"]["round"] == 5
    newest = checkpoint.newest(tmp_path / "run")
    assert newest is not None
    assert newest.name == "round_000005"
    assert here(*overrides) == 0
    assert_as_undisturbed(tmp_path, here)


@pytest.mark.parametrize(("name", "rank"), [("SIGTERM", 1), ("SIGUSR1", 0)])
def test_a_signal_to_one_rank_stops_all_after_the_same_round_and_none_leaves_before_the_files_are_written(
    name: str, rank: int, tmp_path: Path, here: TrainHere
) -> None:
    overrides = (*COMMON, ROUNDS, "run_dir=run", "resume=auto")
    (tmp_path / "summary is slow").touch()
    with started(*overrides, *event(name, at_call=10, on_rank=rank), cwd=tmp_path, num_ranks=2) as ranks:
        wait_until((tmp_path / "summary is being written").exists, *ranks)
        # torchrun would end the first rank as soon as the second has left.
        with pytest.raises(subprocess.TimeoutExpired):
            ranks[1].popen.wait(timeout=2)
        (tmp_path / "go").touch()
        assert [process.end() for process in ranks] == [75, 75], [process.err for process in ranks]
        assert [process.err for process in ranks] == ["", ""]
    assert summary(tmp_path / "run")["status"] == "preempted"
    assert [path.name for path in checkpoint.complete(tmp_path / "run")] == ["round_000005", "round_000003"]
    (tmp_path / "summary is slow").unlink()
    assert here(*overrides) == 0
    assert_as_undisturbed(tmp_path, here, on_one_layout=False)


def test_a_second_signal_ends_a_process_at_once_and_the_older_checkpoints_are_whole(
    tmp_path: Path, here: TrainHere
) -> None:
    overrides = (*COMMON, ROUNDS, "run_dir=run", "resume=auto")
    with started(*overrides, *event("block", at_call=20), cwd=tmp_path) as (process,):
        wait_until((tmp_path / "happened").exists, process)
        while process.popen.poll() is None:  # the round never ends; signals close together count as one
            process.popen.send_signal(signal.SIGTERM)
            time.sleep(0.1)
        assert process.end() == 128 + signal.SIGTERM
    assert not (tmp_path / "run/summary.json").exists()
    (tmp_path / "go").touch()
    assert here(*overrides) == 0
    assert_as_undisturbed(tmp_path, here)


def test_a_launchers_echo_of_a_signal_is_no_second_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now, ended = [100.0], []
    monkeypatch.setattr(preemption.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(os, "_exit", ended.append)
    stop = StopRequest()
    before = {number: signal.getsignal(number) for number in preemption.SIGNALS}
    with stop.listening():
        assert not stop()
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
            now[0] += 2.0
        assert stop()
        assert ended == []
        now[0] += 2.0
        os.kill(os.getpid(), signal.SIGUSR1)
        assert ended == [128 + signal.SIGUSR1]
    assert {number: signal.getsignal(number) for number in preemption.SIGNALS} == before


def test_a_time_limit_ends_every_session_after_a_round_at_least_and_the_sessions_add_up(
    tmp_path: Path, here: TrainHere, capfd: pytest.CaptureFixture[str]
) -> None:
    limited = (*COMMON, "rounds=4", "run_dir=run", "resume=auto", "max_seconds=1e-6")
    for session in (1, 2, 3):
        assert here(*limited) == 75
        assert f"stopped after round {session}: " in capfd.readouterr().out
        assert summary(tmp_path / "run")["status"] == "preempted"
    assert here(*limited) == 0  # the last round has been done: there is nothing to go on with
    assert_as_undisturbed(tmp_path, here, "rounds=4")


def test_a_generous_time_limit_changes_nothing(tmp_path: Path, here: TrainHere) -> None:
    assert here(*COMMON, "rounds=4", "run_dir=run", "max_seconds=1e9") == 0
    assert_as_undisturbed(tmp_path, here, "rounds=4")


@pytest.mark.parametrize("step", [86400.0 * 365, -86400.0 * 365], ids=["forwards", "backwards"])
def test_a_clock_that_jumps_moves_no_duration_and_no_time_limit(
    step: float, tmp_path: Path, here: TrainHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    started_at, wall, jumps = time.monotonic(), time.time(), itertools.count()
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: wall + step * next(jumps))
        assert here(*COMMON, "rounds=7", "run_dir=run", "max_seconds=1e6") == 0
        assert next(jumps) > 0  # somebody asked
        for number, path in enumerate(checkpoint.complete(tmp_path / "run")):  # newest first
            os.utime(path, times=(number * 1000, number * 1000))
        assert here(*COMMON, ROUNDS, "run_dir=run", "resume=auto", "max_seconds=1e6") == 0
    assert_as_undisturbed(tmp_path, here)
    assert read_metrics(tmp_path / "run")[0]["seconds"] > 0
    assert summary(tmp_path / "run")["wall_seconds"] < time.monotonic() - started_at


def test_a_second_run_on_the_same_directory_is_refused_by_name_and_the_first_is_unharmed(
    tmp_path: Path, here: TrainHere, capfd: pytest.CaptureFixture[str]
) -> None:
    overrides = (*COMMON, ROUNDS, "checkpoint.asynchronous=false", "run_dir=run", "resume=auto")
    with started(*overrides, *event("block", at_call=20), cwd=tmp_path) as (process,):
        wait_until((tmp_path / "happened").exists, process)
        before = files_of(tmp_path / "run")
        assert here(*overrides) == 2
        (line,) = errors(capfd.readouterr().err)
        owner = f"process {process.popen.pid} on {platform.node()}"
        assert line == f"pisa-train: error: `run_dir` 'run' is in use by {owner}: wait for it, or choose another"
        assert here(*COMMON, ROUNDS, "run_dir=run") == 2
        assert "holds a run already" in capfd.readouterr().err
        assert files_of(tmp_path / "run") == before
        (tmp_path / "go").touch()
        assert process.end() == 0, process.err
    assert_as_undisturbed(tmp_path, here)
    assert here(*overrides) == 0  # the lock went with its process


def test_a_rank_that_hangs_ends_the_others_after_the_timeout_in_one_line(tmp_path: Path, here: TrainHere) -> None:
    overrides = (*COMMON, ROUNDS, "run_dir=run", "resume=auto")
    hang = ("timeout_seconds=15", *event("stop", at_call=10, on_rank=1))
    with started(*overrides, *hang, cwd=tmp_path, num_ranks=2) as (first, second):
        assert first.end() == 2, first.err
        (line,) = errors(first.err)
        assert "rank 0: the consensus all-reduce" in line
        assert "another rank has stopped, does not answer" in line
        assert "Traceback" not in first.err
        assert second.popen.poll() is None
    assert here(*overrides) == 0
    assert_as_undisturbed(tmp_path, here, on_one_layout=False)
