"""The command line in a process of its own or in this one, and what it leaves behind."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra

from pisa_dist import runner
from pisa_dist.train import main

LAUNCHERS_OWN = re.compile(r"RANK|WORLD_SIZE|LOCAL_|GROUP_|ROLE_|MASTER_|TORCHELASTIC|SLURM_|HYDRA_FULL_ERROR")

SMALL = ("data.num_train=400", "model.hidden_sizes=[16]", "split=dirichlet", "batch_size=16")

TrainHere = Callable[..., int]


def execute(
    command: list[str], *, cwd: Path, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command and whatever it starts; all of it is gone afterwards, also when it hangs."""
    clean = {key: value for key, value in os.environ.items() if not LAUNCHERS_OWN.match(key)}
    with subprocess.Popen(
        command,
        cwd=cwd,
        env=clean | {"OMP_NUM_THREADS": "1"} | dict(environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=90)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def train(
    *arguments: str, cwd: Path, num_ranks: int | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`python -m pisa_dist.train`, or the same under torchrun."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks), "-m"] if num_ranks else []
    return execute([sys.executable, "-m", *launcher, "pisa_dist.train", *arguments], cwd=cwd, environment=environment)


@pytest.fixture
def train_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TrainHere]:
    """The command line in this process and in `tmp_path`, which saves the start, without figures; the exit status."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(runner, "draw_run", lambda path: [])
    modules = set(sys.modules)

    yield partial(run_main, monkeypatch)
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def errors(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("pisa-train: error: ")]


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def without_time(run_dir: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "seconds"} for line in read_metrics(run_dir)]


def assert_same_metrics(run_dir: Path, reference: Path, *, rel: float) -> None:
    lines, expected = without_time(run_dir), without_time(reference)
    assert len(lines) == len(expected) > 0
    for line, wanted in zip(lines, expected, strict=True):
        assert list(line) == list(wanted)
        for key, value in wanted.items():
            found = line[key]
            assert found == (pytest.approx(value, rel=rel, abs=0) if isinstance(value, float) else value), (wanted, key)


def job_of(sweep: Path, override: str) -> Path:
    """The run directory of the one job in a sweep that had this override."""
    (found,) = (path for path in sweep.iterdir() if override in path.name.split(","))
    return found


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """`pisa-train` in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["pisa-train", *arguments])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert isinstance(exit_info.value.code, int)
    return exit_info.value.code
