"""Elastic training on two hosts, which are network namespaces joined by a bridge: one is cut off, or joins later."""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.timeout(400), pytest.mark.xdist_group("namespaces")]

ROOT = Path(__file__).resolve().parents[2]
SEARCH_PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
LAUNCHERS_OWN = re.compile(
    r"RANK|WORLD_SIZE|LOCAL_|GROUP_|ROLE_|MASTER_|TORCHELASTIC|SLURM_|OMP_|NNODES|NPROC|RDZV_|MAX_REST|CHECKPOINT_"
)
ENVIRONMENT = {key: value for key, value in os.environ.items() if not LAUNCHERS_OWN.match(key)} | {"PATH": SEARCH_PATH}
RUN = ("rounds=600", "eval_every=50", "dtype=float64", "num_workers=4", "split=label_k", "split.labels_per_worker=3")


def call(*command: str) -> None:
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"


class Hosts:
    """Hosts `first`, `second`, ... with names and addresses of their own; all that they run ends with `close`."""

    NAMES = ("first", "second")

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.prefix = f"pisa-{os.getpid()}"
        self.switch = f"{self.prefix}-switch"
        lines = ["127.0.0.1 localhost", *(f"{self.address(name)} {name}" for name in self.NAMES)]
        (folder / "hosts").write_text("\n".join(lines) + "\n")

    def address(self, name: str) -> str:
        return f"10.98.0.{self.NAMES.index(name) + 1}"

    def namespace(self, name: str) -> str:
        return f"{self.prefix}-{name}"

    def open(self) -> None:
        """Make the hosts and a switch between them; nothing of it touches the machine's own network."""
        call("ip", "netns", "add", self.switch)
        call("ip", "-n", self.switch, "link", "add", "bridge", "type", "bridge")
        call("ip", "-n", self.switch, "link", "set", "bridge", "up")
        for name in self.NAMES:
            inside = self.namespace(name)
            call("ip", "netns", "add", inside)
            # Both ends are made where they belong, the port at the switch under the host's name.
            call(
                *("ip", "-n", self.switch, "link", "add", name, "type", "veth"),
                *("peer", "name", "eth0", "netns", inside),
            )
            call("ip", "-n", self.switch, "link", "set", name, "master", "bridge", "up")
            call("ip", "-n", inside, "address", "add", f"{self.address(name)}/24", "dev", "eth0")
            call("ip", "-n", inside, "link", "set", "eth0", "up")
            call("ip", "-n", inside, "link", "set", "lo", "up")

    def cut(self, name: str) -> None:
        """Take a host's port at the switch down."""
        call("ip", "-n", self.switch, "link", "set", name, "down")

    def start(self, name: str, command: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
        """Run a command on a host: in its network, under its name, with a hosts file that knows all of them."""
        own = f'hostname {name}; mount --bind "$0" /etc/hosts; exec "$@"'
        enter = ["ip", "netns", "exec", self.namespace(name), "unshare", "--uts", "--mount", "bash", "-ec", own]
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [*enter, str(self.folder / "hosts"), *command],
                cwd=self.folder,
                env=ENVIRONMENT | environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes[name] = process
        return process

    def close(self) -> None:
        """End every process on the hosts, whoever started it, and remove the hosts."""
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for namespace in [*(self.namespace(name) for name in self.NAMES), self.switch]:
            listed = ["ip", "netns", "pids", namespace]
            found = subprocess.run(listed, env=ENVIRONMENT, capture_output=True, text=True, timeout=30, check=False)
            for pid in found.stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "delete", namespace], env=ENVIRONMENT, capture_output=True, check=False)
        for process in self.processes.values():
            process.wait(timeout=30)

    def logs(self) -> str:
        return "\n".join(f"--- {file.name}\n{file.read_text()[-6000:]}" for file in sorted(self.folder.glob("*.log")))


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    programs = ("ip", "unshare", "mount", "hostname")
    if os.geteuid() != 0 or any(shutil.which(program, path=SEARCH_PATH) is None for program in programs):
        pytest.skip("needs root and iproute2")
    probe = ["ip", "netns", "exec", f"pisa-{os.getpid()}-probe", "unshare", "--uts", "--mount", "true"]
    made = subprocess.run(["ip", "netns", "add", probe[3]], env=ENVIRONMENT, capture_output=True, check=False)
    works = made.returncode == 0 and subprocess.run(probe, env=ENVIRONMENT, capture_output=True).returncode == 0
    subprocess.run(["ip", "netns", "delete", probe[3]], env=ENVIRONMENT, capture_output=True, check=False)
    if not works:
        pytest.skip("needs root that may make network namespaces (CAP_SYS_ADMIN, CAP_NET_ADMIN)")
    hosts = Hosts(tmp_path)
    try:
        hosts.open()
        yield hosts
    finally:
        hosts.close()


def until(condition: Callable[[], Any], hosts: Hosts, *, seconds: float) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    raise TimeoutError(f"{condition.__name__}: not within {seconds:.0f} s\n{hosts.logs()}")


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def start_elastic(hosts: Hosts, name: str, run_dir: Path, *arguments: str, last_call_seconds: int) -> None:
    environment = {
        "OMP_NUM_THREADS": "1",
        "PYTHON": sys.executable,
        "NNODES": "1:2",
        "NPROC_PER_NODE": "1",
        "RDZV_ENDPOINT": "first:29400",
        "LAST_CALL_SECONDS": str(last_call_seconds),
        "MAX_RESTARTS": "5",
        "CHECKPOINT_EVERY": "20",
    }
    keys = (f"run_dir={run_dir}", "timeout_seconds=8", "checkpoint.keep_last=100000")
    hosts.start(name, [str(ROOT / "launch" / "torchrun.sh"), *keys, *arguments], environment)


def num_writers(checkpoint: Path) -> int:
    """Number of ranks that have written it: each its own part."""
    return len(list(checkpoint.glob("*.distcp")))


@pytest.mark.slow
def test_training_survives_the_loss_of_a_host_and_ends_as_if_undisturbed(hosts: Hosts, tmp_path: Path) -> None:
    run_dir, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    command = [sys.executable, "-m", "pisa_dist.train", f"run_dir={undisturbed}", *RUN]
    environment = ENVIRONMENT | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=100, capture_output=True)

    for name in Hosts.NAMES:
        start_elastic(hosts, name, run_dir, *RUN, last_call_seconds=20)
    first = hosts.processes["first"]
    oldest = run_dir / "checkpoints" / "round_000020"

    def has_started() -> bool:
        assert all(process.poll() is None for process in hosts.processes.values()), hosts.logs()
        return oldest.exists()

    until(has_started, hosts, seconds=100)
    hosts.cut("second")
    num_written = len(list((run_dir / "checkpoints").glob("round_*")))
    written = oldest.stat().st_ctime_ns
    assert num_writers(oldest) == 2

    until(lambda: first.poll() is not None, hosts, seconds=180)
    assert first.returncode == 0, hosts.logs()
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["status"], summary["num_ranks"]) == ("completed", 1)
    assert num_written < 30, "the link was cut after the end"
    assert oldest.stat().st_ctime_ns == written, "the survivor began afresh"
    found, expected = metrics(run_dir), metrics(undisturbed)
    assert [line["round"] for line in found] == [line["round"] for line in expected]
    for line, wanted in zip(found, expected, strict=True):
        for key in line.keys() - {"seconds"}:
            assert math.isclose(line[key], wanted[key], rel_tol=1e-9, abs_tol=1e-12), (line["round"], key)


def test_a_host_that_joins_later_takes_part_and_no_round_is_lost(hosts: Hosts, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    endless = ("rounds=1000000", "eval_every=1", "num_workers=4", "model.hidden_sizes=[8]")

    def has_written(num_ranks: int) -> Callable[[], bool]:
        def is_there() -> bool:
            assert all(process.poll() is None for process in hosts.processes.values()), hosts.logs()
            complete = (run_dir / "checkpoints").glob("round_" + "[0-9]" * 6)
            return any(num_writers(checkpoint) == num_ranks for checkpoint in complete)

        return is_there

    start_elastic(hosts, "first", run_dir, *endless, last_call_seconds=2)
    until(has_written(1), hosts, seconds=90)
    start_elastic(hosts, "second", run_dir, *endless, last_call_seconds=2)
    until(has_written(2), hosts, seconds=150)

    first = hosts.processes["first"]
    # The process group's leader has become torchrun, which passes the signal on.
    os.kill(first.pid, signal.SIGTERM)
    until(lambda: first.poll() is not None, hosts, seconds=60)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["status"], summary["num_ranks"]) == ("preempted", 2), hosts.logs()
    rounds = [line["round"] for line in metrics(run_dir)]
    assert rounds == list(range(1, summary["rounds"] + 1))
    stops = re.findall(r"stopped after round (\d+)", (hosts.folder / "first.log").read_text())
    assert len(stops) == 2, hosts.logs()  # to let the other in, and at the end
