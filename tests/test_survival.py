"""Runs survive kills, signals, full disks, damaged checkpoints and each other: real processes, signals and files.

Harm is done at a chosen training call of a model from the working directory, so that no test depends on time.
"""

import itertools
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from problems import make_trainer
from test_cli import LAUNCHERS_OWN, TrainHere, assert_same_metrics, errors, read_metrics, without_time
from test_cli import train_here as train_here  # a fixture

from pisa_dist import checkpoint, preemption
from pisa_dist.algorithms import ALGORITHMS
from pisa_dist.preemption import StopRequest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PATIENCE = 200.0  # seconds, for a machine that has much else to do
FRAGILE = """
import os
import signal
import time
from pathlib import Path

from torch import nn

from pisa_dist import checkpoint
from pisa_dist.rundir import RunDirectory

RANK = int(os.environ.get("RANK", 0))


def send(number):
    os.kill(os.getpid(), number)


def block():
    while not Path("go").exists():
        time.sleep(0.01)


def fill():
    # What is free at this moment, to the last page.
    with open(Path("disk", "ballast"), "ab", buffering=0) as file:
        for size in (2**16, 2**12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                pass


EVENTS = {
    "kill": lambda: send(signal.SIGKILL),
    "stop": lambda: send(signal.SIGSTOP),
    "SIGTERM": lambda: send(signal.SIGTERM),
    "SIGUSR1": lambda: send(signal.SIGUSR1),
    "block": block,
    "fill": fill,
}


class Net(nn.Module):
    # Linear. On one rank, at one training call, something happens: once, as the file "happened" remembers.
    def __init__(self, num_classes, event=None, at_call=0, on_rank=0):
        super().__init__()
        self.flatten, self.head = nn.Flatten(), nn.Linear(64, num_classes)
        self.event, self.at_call, self.calls = event, at_call, 0
        self.is_here = RANK == on_rank
        if event == "kill in a checkpoint":
            self.event = None
            calls, seal = [], checkpoint.seal

            def seal_or_die(folder):
                calls.append(folder)
                if len(calls) == at_call:
                    send(signal.SIGKILL)
                seal(folder)

            checkpoint.seal = seal_or_die

    def forward(self, inputs):
        if self.training:
            self.calls += 1
            if self.event and self.is_here and self.calls == self.at_call and not Path("happened").exists():
                Path("happened").touch()
                EVENTS[self.event]()
        return self.head(self.flatten(inputs))


if Path("summary is slow").exists() and RANK == 0:
    write_summary = RunDirectory.write_summary

    def write_late(*arguments, **options):
        Path("summary is being written").touch()
        block()
        write_summary(*arguments, **options)

    RunDirectory.write_summary = write_late
"""
COMMON = (
    "model=custom",
    "model._target_=fragile.Net",
    "data.num_train=200",
    "split=dirichlet",
    "num_workers=4",
    "batch_size=8",
    "dtype=float64",
    "eval_every=1",
    "checkpoint.every=3",
    "vectorize=false",  # the model counts its calls, one a worker and round
)
ROUNDS = "rounds=12"


@pytest.fixture
def here(tmp_path: Path, train_here: TrainHere) -> TrainHere:
    """`train_here` with the fragile model in the working directory."""
    (tmp_path / "fragile.py").write_text(FRAGILE)
    return train_here


def event(name: str, *, at_call: int, on_rank: int = 0) -> tuple[str, ...]:
    """Overrides that make something happen at a training call of a rank, which makes one a worker and round."""
    return (f"+model.event={name}", f"+model.at_call={at_call}", f"+model.on_rank={on_rank}")


class Process:
    """A running command, its output in files."""

    def __init__(self, command: list[str], cwd: Path, name: str, environment: Mapping[str, str]) -> None:
        clean = {key: value for key, value in os.environ.items() if not LAUNCHERS_OWN.match(key)}
        self.files = (cwd / f"{name}.out", cwd / f"{name}.err")
        with self.files[0].open("w") as out, self.files[1].open("w") as err:
            self.popen = subprocess.Popen(
                command,
                cwd=cwd,
                env=clean | {"OMP_NUM_THREADS": "1"} | dict(environment),
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    def end(self) -> int:
        """Its exit status, once it has ended by itself."""
        return self.popen.wait(timeout=PATIENCE)

    @property
    def out(self) -> str:
        return self.files[0].read_text()

    @property
    def err(self) -> str:
        return self.files[1].read_text()


@contextmanager
def started(*overrides: str, cwd: Path, num_ranks: int = 1, torchrun: tuple[str, ...] = ()) -> Iterator[list[Process]]:
    """The command line, alone, as ranks without a launcher, or under torchrun; none is left at the end."""
    module = ["pisa_dist.train", *overrides]
    processes: list[Process] = []
    try:
        if torchrun:
            launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks), *torchrun]
            processes.append(Process([sys.executable, "-m", *launcher, "-m", *module], cwd, "torchrun", {}))
        else:
            for rank, ranks_own in enumerate(environments(num_ranks)):
                processes.append(Process([sys.executable, "-m", *module], cwd, f"rank{rank}", ranks_own))
        yield processes
    finally:
        for process in processes:
            for child in children(process.popen.pid):  # torchrun gives each rank a session of its own
                kill(child)
            if process.popen.poll() is None:
                kill(process.popen.pid)
            process.popen.wait()


def environments(num_ranks: int) -> list[dict[str, str]]:
    if num_ranks == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    return [{**address, "RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(num_ranks)} for r in range(num_ranks)]


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def wait_until(condition: Callable[[], bool], *processes: Process) -> None:
    """Until it holds; fails when a process ends before, or never."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        for process in processes:
            assert process.popen.poll() is None, process.err
        assert time.monotonic() < deadline
        time.sleep(0.01)


def summary(run_dir: Path) -> dict[str, Any]:
    content = json.loads((run_dir / "summary.json").read_text())
    assert isinstance(content, dict)
    return content


def assert_as_undisturbed(folder: Path, here: TrainHere, rounds: str = ROUNDS, *, on_one_layout: bool = True) -> None:
    """The run in `run` has each round's line once, and the same as a run that nothing happened to."""
    assert here(*COMMON, rounds, "run_dir=undisturbed") == 0
    lines = read_metrics(folder / "run")
    assert [line["round"] for line in lines] == list(range(1, int(rounds.partition("=")[2]) + 1))
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)
    if on_one_layout:
        assert without_time(folder / "run") == without_time(folder / "undisturbed")
    assert_same_metrics(folder / "run", folder / "undisturbed", rel=1e-10)
    assert summary(folder / "run")["status"] == "completed"


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


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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
