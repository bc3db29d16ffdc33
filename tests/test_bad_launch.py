"""A bad launch ends in one line that says what is wrong and a status that is not 0: no hang, no traceback."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import execute, run_main, train
from launches import TINY, Launch, overrides
from launches import launch as launch  # a fixture
from launches import runs as runs  # a fixture

from pisa_dist.distributed import require_own_devices

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


# Command line -> what the line must hold.
BAD_SETTINGS: dict[str, tuple[str, ...]] = {
    "max_seconds=0": ("`max_seconds` must be > 0, got 0.0",),
    "max_seconds=-1": ("`max_seconds` must be > 0, got -1.0",),
    "max_seconds=nan": ("`max_seconds` must be > 0, got nan",),
    "max_seconds=inf": ("`max_seconds` must be > 0, got inf",),
    "max_seconds=soon": ("max_seconds", "soon"),
    "timeout_seconds=0": ("`timeout_seconds` must be", "got 0.0"),
    "timeout_seconds=-5": ("`timeout_seconds` must be", "got -5.0"),
    "timeout_seconds=nan": ("`timeout_seconds` must be", "got nan"),
    "timeout_seconds=inf": ("`timeout_seconds` must be", "got inf"),
    "timeout_seconds=null": ("timeout_seconds",),
    "checkpoint.keep_last=0": ("`checkpoint.keep_last` must be an integer >= 1, got 0",),
    "checkpoint.keep_last=-2": ("`checkpoint.keep_last` must be an integer >= 1, got -2",),
    "checkpoint.keep_last=all": ("checkpoint.keep_last", "all"),
    "checkpoint.every=-1": ("`checkpoint.every` must be an integer >= 0, got -1",),
    "checkpoint.asynchronous=maybe": ("checkpoint.asynchronous", "maybe"),
    "checkpoint.resize=grow": ("`checkpoint.resize` must be one of refuse, resplit, drop, got 'grow'",),
    "checkpoint.rotate=3": ("`checkpoint.rotate`", "not a known key"),
    "num_workers=101": ("num_workers", "101"),
    "split=label_k split.labels_per_worker=1": ("`split.labels_per_worker`", "10", "3"),
    "split=label_k split.labels_per_worker=11": ("`split.labels_per_worker`", "11"),
    "device=cuda:99": ("`device`", "'cuda:99'"),
    "device=tpu": ("`device`", "'tpu'"),
    "run_dir=file": ("`run_dir` 'file' cannot be written: ",),
    "run_dir=file/below": ("`run_dir` 'file/below' cannot be written: Not a directory",),
    "run_dir=''": ("`run_dir` must be a path or null, got ''",),
    "run_dir=/proc/nowhere/run": ("`run_dir` '/proc/nowhere/run' cannot be written: ",),
    "run_dir=run": ("`run_dir` 'run' holds a run already: choose another, or resume=auto to go on",),
    "run_dir=bare": ("`run_dir` 'bare' holds a run already",),
}


@pytest.mark.parametrize("command", BAD_SETTINGS)
def test_a_bad_setting_of_a_launch_is_refused(command: str, launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "bare/checkpoints").mkdir(parents=True)
    shutil.copytree(tmp_path / "run/checkpoints", tmp_path / "bare/checkpoints", dirs_exist_ok=True)
    own = command.split(" ")
    own += [] if "run_dir=" in command else ["run_dir=new"]
    line = launch(*own)
    assert not [part for part in BAD_SETTINGS[command] if part not in line], line


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_cuda_device_where_there_is_none_is_refused(launch: Launch) -> None:
    line = launch("device=cuda", "run_dir=new")
    assert line == "`device` 'cuda' needs a CUDA device, and this machine has none: use cpu or auto"


def test_a_run_directory_in_use_is_refused(launch: Launch, tmp_path: Path) -> None:
    with (tmp_path / "run/.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("process 12 on elsewhere")
        file.flush()
        expected = "`run_dir` 'run' is in use by process 12 on elsewhere: wait for it, or choose another"
        assert launch("run_dir=run", "resume=auto") == expected
        file.truncate(0)
        assert "is in use by another process: wait" in launch("run_dir=run", "resume=auto")


RANKS = "torchrun and srun set it; unset RANK and WORLD_SIZE to run alone"


BAD_ENVIRONMENTS: dict[str, tuple[str, ...]] = {
    "RANK=x WORLD_SIZE=2": ("the environment's RANK must be an integer in [0, 1], got 'x'", RANKS),
    "RANK=0 WORLD_SIZE=x": ("the environment's WORLD_SIZE must be an integer >= 1, got 'x'", RANKS),
    "RANK=5 WORLD_SIZE=2": ("RANK must be an integer in [0, 1], got '5'",),
    "RANK=2 WORLD_SIZE=2": ("RANK must be an integer in [0, 1], got '2'",),
    "RANK=-1 WORLD_SIZE=2": ("RANK must be an integer in [0, 1], got '-1'",),
    "RANK=1.0 WORLD_SIZE=2": ("RANK must be an integer in [0, 1], got '1.0'",),
    "RANK=1e0 WORLD_SIZE=2": ("RANK must be an integer in [0, 1], got '1e0'",),
    "RANK= WORLD_SIZE=2": ("RANK must be an integer in [0, 1], got ''",),
    "RANK=0 WORLD_SIZE=": ("WORLD_SIZE must be an integer >= 1, got ''",),
    "RANK=0 WORLD_SIZE=0": ("WORLD_SIZE must be an integer >= 1, got '0'",),
    "RANK=0 WORLD_SIZE=-2": ("WORLD_SIZE must be an integer >= 1, got '-2'",),
    "RANK=0 WORLD_SIZE=99999999999999999999": ("WORLD_SIZE must be",),
    "RANK=0 WORLD_SIZE=4": ("`num_workers` must be at least the number of ranks, got 3 workers on 4 ranks",),
    "WORLD_SIZE=2": ("RANK must be an integer in [0, 1], got nothing",),
    "RANK=3": ("RANK must be an integer in [0, 0], got '3'",),
    "RANK=0 WORLD_SIZE=2 LOCAL_RANK=x": ("LOCAL_RANK must be an integer >= 0, got 'x'",),
    "RANK=0 WORLD_SIZE=2 LOCAL_RANK=-1": ("LOCAL_RANK must be an integer >= 0, got '-1'",),
    "SLURM_PROCID=x SLURM_STEP_NUM_TASKS=2": ("SLURM_PROCID must be an integer in [0, 1], got 'x'",),
    "SLURM_PROCID=2 SLURM_STEP_NUM_TASKS=2": ("SLURM_PROCID must be an integer in [0, 1], got '2'",),
    "SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=many": ("SLURM_STEP_NUM_TASKS must be", "'many'"),
    "SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=-1": ("SLURM_STEP_NUM_TASKS must be", "'-1'"),
    "SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=2 SLURM_LOCALID=x": ("SLURM_LOCALID must be an integer >= 0, got 'x'",),
    "SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=2 SLURM_JOB_ID=x": ("SLURM_JOB_ID must be an integer >= 0, got 'x'",),
    "SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=9": ("got 3 workers on 9 ranks",),
    "RANK=0 WORLD_SIZE=2 MASTER_PORT=x": ("MASTER_PORT must be an integer in [1, 65535], got 'x'",),
    "RANK=0 WORLD_SIZE=2 MASTER_PORT=0": ("MASTER_PORT must be an integer in [1, 65535], got '0'",),
    "RANK=0 WORLD_SIZE=2 MASTER_PORT=65536": ("MASTER_PORT must be an integer in [1, 65535], got '65536'",),
    "RANK=0 WORLD_SIZE=2 MASTER_PORT=": ("MASTER_PORT must be an integer in [1, 65535], got ''",),
}


@pytest.mark.parametrize("variables", BAD_ENVIRONMENTS)
def test_an_environment_that_makes_no_sense_is_refused(
    variables: str, launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in variables.split(" "):
        monkeypatch.setenv(*variable.split("="))
    line = launch("run_dir=new", "timeout_seconds=5")
    assert not [part for part in BAD_ENVIRONMENTS[variables] if part not in line], line


@pytest.mark.parametrize("variables", ["RANK=0 WORLD_SIZE=1 LOCAL_RANK=0", "RANK=0", "WORLD_SIZE=1", "SLURM_PROCID=0"])
def test_one_rank_alone_is_no_process_group(
    variables: str, launch: Launch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for variable in variables.split(" "):
        monkeypatch.setenv(*variable.split("="))
    assert run_main(monkeypatch, *overrides("rounds=1", "run_dir=new")) == 0
    assert json.loads((tmp_path / "new/summary.json").read_text())["num_ranks"] == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_whose_others_never_come_ends_after_the_timeout(rank: int, tmp_path: Path) -> None:
    environment = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    if rank == 0:
        environment.pop("MASTER_PORT")  # one of its own
    command = [sys.executable, "-m", "pisa_dist.train", *TINY, "timeout_seconds=1", "run_dir=new"]
    try:
        done = execute(command, cwd=tmp_path, environment=environment)
    except subprocess.TimeoutExpired:
        pytest.fail("it hung")
    assert done.returncode == 2
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("pisa-train: error: "))
    assert f"rank {rank}: the 2 ranks did not come together at 127.0.0.1:" in line
    assert "timeout_seconds is 1" in line
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "new").exists()


# What fails on one rank of two -> command line, what the line must hold.
LONELY = """
import os

import numpy as np
import torch


def fail(rank):
    if os.environ["RANK"] == str(rank):
        raise ValueError("not on this machine")


def three_classes():
    generator = np.random.default_rng(0)
    inputs, targets = generator.normal(size=(100, 64)), np.arange(100) % 3
    return (inputs, targets), (inputs, targets)


def data(rank):
    fail(rank)
    return three_classes()


class Model(torch.nn.Linear):
    def __init__(self, input_shape, num_classes, at_start=-1, in_a_round=-1):
        super().__init__(64, num_classes)
        fail(at_start)
        self.rank = in_a_round

    def forward(self, inputs):
        if self.training:
            fail(self.rank)
        return super().forward(inputs)
"""


OWN_CLASSES = "data=custom data._target_=lonely.three_classes"


FAILS_ALONE: dict[str, tuple[str, ...]] = {
    "data=custom data._target_=lonely.data +data.rank=1": ("rank 1: ", "not on this machine"),
    f"{OWN_CLASSES} model=custom model._target_=lonely.Model +model.at_start=1": ("rank 1: ", "not on this machine"),
    f"{OWN_CLASSES} model=custom model._target_=lonely.Model +model.in_a_round=1": ("rank 1: ", "not on this machine"),
    f"{OWN_CLASSES} model=custom model._target_=lonely.Model +model.in_a_round=0": ("rank 0: ", "not on this machine"),
    "tracking=wandb tracking.mode=online": ("`tracking` wandb cannot start", "wandb login"),
}


@pytest.mark.parametrize("command", FAILS_ALONE)
def test_what_fails_on_one_rank_alone_ends_all_in_one_line_long_before_the_timeout(
    command: str, tmp_path: Path
) -> None:
    if "wandb" in command:
        pytest.importorskip("wandb")
    (tmp_path / "lonely.py").write_text(LONELY)
    environment = {"WANDB_API_KEY": "", "HOME": str(tmp_path), "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    arguments = overrides(*command.split(" "), "timeout_seconds=600", "vectorize=false", "run_dir=new")
    done = train(*arguments, cwd=tmp_path, num_ranks=2, environment=environment)  # in 90 seconds, or it hangs
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("pisa-train: error: ")]
    own = [line for line in lines if "another rank has stopped" not in line]
    assert len(own) == 1, done.stderr
    assert not [part for part in FAILS_ALONE[command] if part not in own[0]], own[0]
    assert "pisa_dist/" not in done.stderr  # no traceback of ours


def test_two_ranks_on_one_cuda_device_are_refused() -> None:
    require_own_devices(["gpu a of node1", "gpu a of node2", "gpu b of node1"])
    with pytest.raises(ValueError, match=r"ranks 0 and 2 share the CUDA device gpu a: .* or use device=cpu"):
        require_own_devices(["gpu a", "gpu b", "gpu a"])


def test_there_are_cases_enough_to_mean_something() -> None:
    assert len(BAD_SETTINGS) + len(BAD_ENVIRONMENTS) >= 50
