"""A run that comes to harm at a chosen training call, so that no test depends on time, and how it should end."""

import json
import os
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
from commands import LAUNCHERS_OWN, TrainHere, assert_same_metrics, read_metrics, without_time
from commands import train_here as train_here  # a fixture

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


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
