"""launch/slurm.sbatch on a real Slurm of two nodes: it trains, is stopped and requeued, and sweeps."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

# One cluster at a time under `pytest -n N --dist loadgroup`; without it several in parallel are only slower.
pytestmark = [pytest.mark.timeout(300), pytest.mark.xdist_group("slurm")]

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "slurm.sbatch"
PROGRAMS = ("sbatch", "slurmctld", "slurmd", "munged")
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
LAUNCHERS_OWN = re.compile(r"RANK|WORLD_SIZE|LOCAL_|GROUP_|ROLE_|MASTER_|TORCHELASTIC|SLURM_|SBATCH_|SRUN_|OMP_")
ENDED = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL")
# Long enough for a signal to come in the middle: some seconds.
RUN = ("rounds=500", "eval_every=50", "dtype=float64", "num_workers=4", "split=label_k", "split.labels_per_worker=3")
SHORT = ("rounds=20", "eval_every=10", "dtype=float64", "num_workers=4")


class Cluster:
    """Submits to the private Slurm and asks it for the state of jobs."""

    def __init__(self, state: Path, work: Path) -> None:
        self.state, self.work = state, work
        clean = {key: value for key, value in os.environ.items() if not LAUNCHERS_OWN.match(key)}
        self.environment = clean | {
            "SLURM_CONF": str(state / "slurm.conf"),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), SEARCH_PATH]),
            "RUN_ROOT": str(work / "runs"),
        }

    def call(self, *command: str, environment: Mapping[str, str] | None = None) -> str:
        done = subprocess.run(
            command,
            cwd=self.work,
            env=self.environment | dict(environment or {}),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(
        self, *arguments: str, options: tuple[str, ...] = (), environment: Mapping[str, str] | None = None
    ) -> str:
        options = ("--parsable", "--cpus-per-task=1", *options)
        return self.call("sbatch", *options, str(SCRIPT), *arguments, environment=environment).strip()

    def status(self, job: str) -> dict[str, str]:
        """The fields of `scontrol show job`; of an array's task by its number ARRAY_TASK."""
        lines = self.call("scontrol", "--oneliner", "show", "job", job)
        return dict(field.split("=", 1) for field in lines.split() if "=" in field)

    def wait(self, job: str) -> dict[str, str]:
        """The fields of a job once it has ended for good."""

        def ended() -> dict[str, str] | None:
            status = self.status(job)
            return status if status["JobState"] in ENDED else None

        return self.until(ended)

    def until(self, condition: Callable[[], Any], seconds: float = 240) -> Any:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if found := condition():
                return found
            time.sleep(0.1)
        raise TimeoutError(f"{condition.__name__}: not within {seconds:.0f} s\n{self.logs()}")

    def log(self, job: str) -> str:
        return (self.work / f"pisa-{job}.log").read_text()

    def logs(self) -> str:
        """What a person wants to see when a test has failed."""
        files = [*sorted(self.work.glob("*.log")), *sorted(self.state.glob("*.log"))]
        return "\n".join(f"--- {file.name}\n{file.read_text()[-3000:]}" for file in files)

    def run_directory(self, job: str) -> Path:
        return self.work / "runs" / f"pisa-{job}"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if any(shutil.which(program, path=SEARCH_PATH) is None for program in PROGRAMS):
        pytest.skip("needs slurm-wlm and munge")
    if os.geteuid() != 0:
        pytest.skip("needs root, to start Slurm's daemons")
    script = str(Path(__file__).with_name("slurm.sh"))
    # Not below tmp_path: a socket's path holds 107 bytes.
    state = Path(tempfile.mkdtemp(prefix="pisa-slurm-"))
    try:
        subprocess.run([script, "start", str(state), str(os.getpid())], check=True, timeout=150)
        yield Cluster(state, tmp_path_factory.mktemp("slurm"))
    finally:
        subprocess.run([script, "stop", str(state)], check=True, timeout=60)
        shutil.rmtree(state)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Metrics of RUN on one process, undisturbed."""
    return train_alone(tmp_path_factory.mktemp("alone") / "run", *RUN)


def train_alone(run_dir: Path, *arguments: str) -> list[dict[str, Any]]:
    clean = {key: value for key, value in os.environ.items() if not LAUNCHERS_OWN.match(key)}
    command = [sys.executable, "-m", "pisa_dist.train", f"run_dir={run_dir}", *arguments]
    subprocess.run(command, env=clean | {"OMP_NUM_THREADS": "1"}, check=True, timeout=200, capture_output=True)
    return metrics(run_dir)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def summary(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    return found


def assert_same_metrics(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Equal to 1e-9 but for the time that they took."""
    assert [line["round"] for line in found] == [line["round"] for line in expected]
    for line, wanted in zip(found, expected, strict=True):
        assert line.keys() == wanted.keys()
        for key in line.keys() - {"seconds"}:
            assert math.isclose(line[key], wanted[key], rel_tol=1e-9, abs_tol=1e-12), (line["round"], key)


def test_a_job_on_two_nodes_trains_as_one_process_does(cluster: Cluster, alone: list[dict[str, Any]]) -> None:
    job = cluster.submit(*RUN)
    status = cluster.wait(job)
    assert status["JobState"] == "COMPLETED", cluster.logs()
    assert status["NodeList"] == "node[1-2]"
    assert summary(cluster.run_directory(job))["num_ranks"] == 2
    assert_same_metrics(metrics(cluster.run_directory(job)), alone)


def test_a_job_that_is_asked_to_stop_is_requeued_and_ends_as_if_undisturbed(
    cluster: Cluster, alone: list[dict[str, Any]]
) -> None:
    job = cluster.submit(*RUN, environment={"CHECKPOINT_EVERY": "20"})
    run_dir = cluster.run_directory(job)
    cluster.until(lambda: any((run_dir / "checkpoints").glob("round_*")))
    cluster.call("scancel", "--batch", "--signal=USR1", job)
    status = cluster.wait(job)
    assert status["JobState"] == "COMPLETED", cluster.logs()
    assert status["Restarts"] == "1", cluster.logs()
    log = cluster.log(job)  # appended to, not overwritten, by the second start
    assert re.search(r"start 1, .*stopped after round \d+.*requeued.*start 2, ", log, re.DOTALL), log
    assert summary(run_dir)["status"] == "completed"
    assert_same_metrics(metrics(run_dir), alone)


def test_requeues_are_bounded(cluster: Cluster) -> None:
    job = cluster.submit(*RUN, "max_seconds=0.1", environment={"MAX_REQUEUES": "0"})
    status = cluster.wait(job)
    assert (status["JobState"], status["ExitCode"], status["Restarts"]) == ("FAILED", "75:0", "0"), cluster.logs()
    assert summary(cluster.run_directory(job))["status"] == "preempted"


@pytest.mark.slow
def test_an_array_job_runs_one_seed_per_task(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit(*SHORT, options=("--array=1-2", "--nodes=1", "--ntasks-per-node=2"))
    for seed in (1, 2):
        status = cluster.wait(f"{job}_{seed}")
        assert status["JobState"] == "COMPLETED", cluster.logs()
        about = summary(cluster.run_directory(f"{job}_{seed}"))
        assert (about["seed"], about["num_ranks"]) == (seed, 2)
    assert_same_metrics(metrics(cluster.run_directory(f"{job}_2")), train_alone(tmp_path / "run", *SHORT, "seed=2"))


def test_an_array_job_takes_its_settings_from_the_lines_of_a_file(cluster: Cluster) -> None:
    sweep = cluster.work / "sweep.txt"
    sweep.write_text("algorithm.penalty=3.0 seed=5\nalgorithm=fedavg local_steps=2\n")
    job = cluster.submit(
        *SHORT,
        options=("--array=1-2", "--nodes=1"),
        environment={"ARRAY_FILE": str(sweep)},
    )
    found = []
    for task in (1, 2):
        assert cluster.wait(f"{job}_{task}")["JobState"] == "COMPLETED", cluster.logs()
        about = summary(cluster.run_directory(f"{job}_{task}"))
        found.append((about["algorithm"], about["seed"], about["num_ranks"]))
    assert found == [("sisa", 5, 1), ("fedavg", 0, 1)]
