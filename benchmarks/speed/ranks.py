"""Starts the ranks of one measurement, as processes of this machine or on two network namespaces."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("worker.py")
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


class Skipped(Exception):  # noqa: N818 - not an error
    """A case that this machine or this version cannot run; the message says what it needs."""


class Hosts:
    """Two hosts, `10.99.0.1` and `10.99.0.2`: network namespaces on one bridge, each with its own cable.

    Args:
        rate: what each host can send, as `tc` reads it, such as "100mbit"; None for a link that nothing slows.
    """

    def __init__(self, rate: str | None) -> None:
        self.rate = rate
        self.switch = f"speed-{os.getpid()}-switch"
        self.names = [f"speed-{os.getpid()}-{number}" for number in (1, 2)]

    def open(self) -> None:
        """Make the namespaces; nothing of it touches the machine's own network."""
        self._ip("netns", "add", self.switch)
        self._ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
        self._ip("-n", self.switch, "link", "set", "bridge", "up")
        for number, name in enumerate(self.names, start=1):
            port = f"port{number}"
            self._ip("netns", "add", name)
            end = ("peer", "name", "eth0", "netns", name)
            self._ip("-n", self.switch, "link", "add", port, "type", "veth", *end)
            self._ip("-n", self.switch, "link", "set", port, "master", "bridge", "up")
            self._ip("-n", name, "address", "add", f"10.99.0.{number}/24", "dev", "eth0")
            self._ip("-n", name, "link", "set", "eth0", "up")
            self._ip("-n", name, "link", "set", "lo", "up")
            if self.rate is not None:
                shape = ("tbf", "rate", self.rate, "burst", "256kb", "latency", "100ms")
                _call("tc", "-n", name, "qdisc", "add", "dev", "eth0", "root", *shape)

    def close(self) -> None:
        for name in (*self.names, self.switch):
            subprocess.run(["ip", "netns", "delete", name], env=_environment(), capture_output=True, check=False)

    @staticmethod
    def _ip(*arguments: str) -> None:
        _call("ip", *arguments)


@contextmanager
def hosts(rate: str | None) -> Iterator[Hosts]:
    """Two hosts for as long as the context lasts.

    Raises:
        Skipped: this user or machine cannot make them.
    """
    if os.geteuid() != 0 or any(shutil.which(program, path=SEARCH_PATH) is None for program in ("ip", "tc")):
        raise Skipped("needs root and iproute2 (ip, tc) for network namespaces")
    made = Hosts(rate)
    try:
        try:
            made.open()
        except RuntimeError as error:
            raise Skipped(f"needs root that may make network namespaces and shape links: {error}") from error
        yield made
    finally:
        made.close()


def run_ranks(task: str, spec: dict[str, Any], *, num_ranks: int = 2, on: Hosts | None = None) -> dict[str, Any]:
    """Run worker.py's `task` on every rank; what rank 0 returned.

    Args:
        task: a key of worker.TASKS.
        spec: its keyword arguments, as JSON.
        num_ranks: processes, each with one thread.
        on: put a rank on each of these two hosts instead of this machine's own network.

    Raises:
        Skipped: a data set is not there.
        RuntimeError: a rank failed; the message ends with its log.
    """
    own = {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(num_ranks)}
    if on is None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    else:
        own |= {"MASTER_ADDR": "10.99.0.1", "MASTER_PORT": "29400", "GLOO_SOCKET_IFNAME": "eth0"}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        command = [sys.executable, str(WORKER), task, json.dumps(spec), str(result)]
        logs = [Path(folder, f"rank{rank}.log") for rank in range(num_ranks)]
        processes = []
        for rank, log in enumerate(logs):
            enter = [] if on is None else ["ip", "netns", "exec", on.names[rank]]
            with log.open("wb") as output:
                environment = _environment() | own | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                processes.append(subprocess.Popen([*enter, *command], env=environment, stdout=output, stderr=output))
        try:
            while any(process.poll() is None for process in processes):
                if any(process.poll() not in (None, 0) for process in processes):
                    break
                time.sleep(0.05)
        finally:
            for process in processes:
                process.terminate()
            statuses = [process.wait() for process in processes]
        if any(statuses):
            # A negative status is that of a rank which was ended because another had failed.
            failed = next((rank for rank, status in enumerate(statuses) if status > 0), 0)
            text = logs[failed].read_text()
            if "FileNotFoundError: " in text:
                raise Skipped(f"needs data: {text.rpartition('FileNotFoundError: ')[2].strip()}")
            raise RuntimeError(f"{task} {spec}: ranks ended with {statuses}\n{text[-3000:]}")
        return json.loads(result.read_text())


def _environment() -> dict[str, str]:
    return {**os.environ, "PATH": SEARCH_PATH}


def _call(*command: str) -> None:
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, timeout=30, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
