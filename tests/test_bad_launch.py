"""A bad launch or resume ends in one line that says what is wrong and a status that is not 0: no hang, no traceback."""

import fcntl
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from test_bad_config import run_main
from test_cli import LAUNCHERS_OWN, execute, train

from pisa_dist import checkpoint, checksums, runner
from pisa_dist.distributed import require_own_devices

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

TINY = (
    "rounds=2",
    "num_workers=3",
    "data.num_train=100",
    "model.hidden_sizes=[8]",
    "batch_size=4",
    "eval_every=1",
    "checkpoint.every=1",
)
OWN_DATA = """
import numpy as np


def three_classes():
    generator = np.random.default_rng(0)
    inputs, targets = generator.normal(size=(100, 64)), np.arange(100) % 3
    return (inputs, targets), (inputs, targets)
"""
Launch = Callable[..., str]


def overrides(*own: str) -> list[str]:
    """The tiny run with some keys changed: Hydra refuses a key given twice."""
    changed = {override.partition("=")[0] for override in own}
    kept = [override for override in TINY if override.partition("=")[0] not in changed]
    if any(override.startswith("model=") for override in own):
        kept = [override for override in kept if not override.startswith("model.")]
    return [*kept, *own]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with finished runs: `run` is the tiny one, the others are called after their algorithm."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        without_launcher(patch)
        patch.chdir(folder)
        patch.setattr(runner, "draw_run", lambda path: [])
        assert run_main(patch, *TINY, "run_dir=run") == 0
        for algorithm in ("synchronous", "nsisa"):
            assert run_main(patch, *TINY, f"algorithm={algorithm}", f"run_dir={algorithm}") == 0
    return folder


def without_launcher(patch: pytest.MonkeyPatch) -> None:
    """No variables of torchrun or srun here, and none left of what the program itself sets."""
    for name in [*filter(LAUNCHERS_OWN.match, os.environ), "MASTER_ADDR", "MASTER_PORT"]:
        patch.setenv(name, "")
        patch.delenv(name)


@pytest.fixture
def launch(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Launch]:
    """The command line in this process and in a folder with copies of the runs; returns its one line."""
    shutil.copytree(runs, tmp_path, dirs_exist_ok=True)
    (tmp_path / "own_data.py").write_text(OWN_DATA)
    without_launcher(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(runner, "draw_run", lambda path: [])
    before = files_of(tmp_path)

    def refused(*own: str, warnings: int = 0) -> str:
        given = files_of(tmp_path) if warnings or before != files_of(tmp_path) else before
        capfd.readouterr()
        assert run_main(monkeypatch, *overrides(*own)) == 2
        out, err = capfd.readouterr()
        lines = err.splitlines()
        assert len(lines) == 1 + warnings, err
        assert all(line.startswith("warning: ") for line in lines[:-1]), err
        assert lines[-1].startswith("pisa-train: error: "), err
        assert "round" not in out  # nothing was trained
        now = files_of(tmp_path)
        assert {path: now.get(path) for path in given} == given  # and nothing was touched
        return lines[-1].removeprefix("pisa-train: error: ")

    yield refused
    sys.modules.pop("own_data", None)


def files_of(folder: Path) -> dict[Path, bytes]:
    return {
        path: path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock" and "__pycache__" not in path.parts
    }


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


NO_CHECKPOINT = "must be auto or a run or checkpoint directory"
BAD_RESUMES: dict[str, tuple[str, ...]] = {
    # Nothing to resume.
    "resume=nowhere": (f"`resume` {NO_CHECKPOINT}, got 'nowhere'",),
    "resume=''": ("`resume`",),
    "resume=empty": (f"`resume` {NO_CHECKPOINT}, got 'empty'", "checkpoint.every=N"),
    "resume=own_data.py": (f"`resume` {NO_CHECKPOINT}, got 'own_data.py'",),
    "resume=run/metrics.jsonl": (f"`resume` {NO_CHECKPOINT}",),
    "resume=run/checkpoints/round_000009": (f"`resume` {NO_CHECKPOINT}",),
    "resume=[1]": ("resume",),
    "resume=auto": ("`resume`=auto needs `run_dir`",),
    "resume=auto run_dir=own_data.py": ("`run_dir` 'own_data.py' cannot be written",),
    "resume=auto run_dir=finished": ("`run_dir` 'finished' holds a finished run without a checkpoint",),
    # A checkpoint of something else.
    "model.hidden_sizes=[9]": ("its tensors is layers.1.weight [[8, 64]", "[[9, 64]", "set model, data and dtype"),
    "model.hidden_sizes=[8,8]": ("its tensors is layers.3.weight", "set model, data and dtype"),
    "model.hidden_sizes=[]": ("its tensors is",),
    "model=cnn": ("`model` cnn needs images",),
    "model=resnet20": ("its tensors is",),
    "data=custom data._target_=own_data.three_classes": ("its tensors is layers.3.weight [[10, 8]", "[[3, 8]"),
    "dtype=float64": ("its tensors is", "torch.float32", "torch.float64"),
    "dtype=bfloat16": ("its tensors is", "torch.bfloat16"),
    "algorithm=fedavg": ("its algorithm is sisa, this run's is fedavg: set algorithm to the one that wrote it",),
    "algorithm=pisa": ("its algorithm is sisa, this run's is pisa",),
    "algorithm=nsisa": ("its algorithm is sisa, this run's is nsisa",),
    "algorithm=synchronous": ("its algorithm is sisa, this run's is synchronous",),
    "algorithm.preconditioner=adagrad": ("its choices is preconditioner adam, this run's is preconditioner adagrad",),
    "resume=synchronous algorithm=synchronous algorithm.optimizer=SGD": ("optimizer AdamW", "optimizer SGD"),
    "resume=nsisa algorithm=nsisa algorithm.sisa_parameters=[layers.1.weight]": ("workers/0/layers.1.weight/",),
    "seed=1": ("its seed is 0, this run's is 1",),
    "data.num_train=90": ("its shard_sizes is [34, 33, 33], this run's is [30, 30, 30]",),
    "split=dirichlet": ("its shard_sizes is",),
    # Into a run of its own.
    "resume=run run_dir=synchronous": ("`run_dir` 'synchronous' holds another run than `resume` 'run'", "resume=auto"),
    "resume=run/checkpoints/round_000001 run_dir=nsisa": ("`run_dir` 'nsisa' holds another run than `resume`",),
    "algorithm=fedavg resume=auto run_dir=run": ("its algorithm is sisa, this run's is fedavg",),
    # Another number of workers.
    "num_workers=4": ("its num_workers is 3, this run's is 4", "checkpoint.resize=resplit or drop"),
    "num_workers=2": ("its num_workers is 3, this run's is 2", "checkpoint.resize=resplit or drop"),
    "num_workers=5 checkpoint.resize=drop": ("`checkpoint.resize`=drop needs num_workers of at most", "3, got 5"),
    "num_workers=101 checkpoint.resize=resplit": ("num_workers", "101"),
    "num_workers=2 checkpoint.resize=resplit split=label_k": ("`split.labels_per_worker`",),
    "num_workers=2 checkpoint.resize=drop split=label_k": ("`split.labels_per_worker`",),
    "num_workers=2 checkpoint.resize=resplit algorithm=fedavg": ("its algorithm is sisa",),
    "num_workers=2 checkpoint.resize=drop model.hidden_sizes=[9]": ("its tensors is",),
}


@pytest.mark.parametrize("command", BAD_RESUMES)
def test_a_checkpoint_that_is_none_or_of_something_else_is_refused(
    command: str, launch: Launch, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "finished").mkdir()
    for name in ("metrics.jsonl", "summary.json"):
        shutil.copy(tmp_path / "run" / name, tmp_path / "finished")
    own = command.split(" ")
    own += [] if "resume=" in command else ["resume=run"]
    own += [] if "run_dir=" in command or "resume=auto" in command else ["run_dir=new"]
    line = launch("rounds=4", *own)
    assert not [part for part in BAD_RESUMES[command] if part not in line], line


FILES = (".metadata", "__0_0.distcp", "contents.json", "checksums.json")


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda file: file.write_bytes(b""),
    "cut short": lambda file: file.write_bytes(file.read_bytes()[:-10]),
    "with a flipped bit": flip,
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", DAMAGES)
def test_a_checkpoint_with_a_damaged_file_is_refused_when_it_is_named(
    kind: str, name: str, launch: Launch, tmp_path: Path
) -> None:
    path = Path("run/checkpoints/round_000002")
    DAMAGES[kind](tmp_path / path / name)
    line = launch("rounds=4", "run_dir=new", f"resume={path}")
    if name == "contents.json" and kind in ("missing", "a folder"):
        assert line.startswith(f"`resume` {NO_CHECKPOINT}, got '{path}', which holds no checkpoint")
    else:
        # A checksum that is wrong speaks against its file.
        named = "" if name == "checksums.json" and kind == "with a flipped bit" else f"{name} "
        assert line.startswith(f"`resume` '{path}' is damaged: {named}")
        assert line.endswith(": use an older one, or resume=auto")


@pytest.mark.parametrize("resume", ["run", "auto"])
def test_a_run_whose_checkpoints_are_all_damaged_is_refused_with_a_warning_for_each(
    resume: str, launch: Launch, tmp_path: Path
) -> None:
    for path in checkpoint.complete(tmp_path / "run"):
        flip(path / "__0_0.distcp")
    line = launch("rounds=4", f"run_dir={'run' if resume == 'auto' else 'new'}", f"resume={resume}", warnings=2)
    expected = "`run_dir` 'run' holds 2 checkpoints, none of them whole" if resume == "auto" else NO_CHECKPOINT
    assert expected in line


# What a checkpoint says of itself, with checksums to match: written by another version, or by hand.
BAD_CONTENTS: dict[str, tuple[object, str]] = {
    "a newer format": ({"format": 99}, "its format is 99, this run's is 2: use the version of pisa_dist that wrote it"),
    "no format": ({"format": None}, "its format is None, this run's is 2"),
    "a format of another type": ({"format": "1"}, "its format is '1', this run's is 2"),
    "a round of another type": ({"round": "two"}, "round in contents.json must be of type int, got 'two'"),
    "no round": ({"round": None}, "round in contents.json must be of type int, got None"),
    "workers of another type": ({"num_workers": "3"}, "num_workers in contents.json must be of type int, got '3'"),
    "workers that are a truth": ({"num_workers": True}, "num_workers in contents.json must be of type int, got True"),
    "an algorithm of another type": ({"algorithm": 3}, "algorithm in contents.json must be of type str, got 3"),
    "choices of another type": ({"choices": "adam"}, "choices in contents.json must be of type dict, got 'adam'"),
    "tensors of another type": ({"tensors": []}, "tensors in contents.json must be of type dict, got []"),
    "weights of another type": ({"worker_weight": 1}, "worker_weight in contents.json must be of type list, got 1"),
    "a tensor of another type": ({"tensors": {"layers.1.weight": 3}}, "its tensors is layers.1.weight 3"),
    "no tensors": ({"tensors": {}}, "its tensors is layers.1.weight absent"),
    "another seed": ({"seed": "x"}, "its seed is x, this run's is 0"),
    "a list": ([1], "is not a checkpoint: contents.json holds no mapping"),
    "a number": (3, "is not a checkpoint: contents.json holds no mapping"),
    "no JSON": ("{", "is not a checkpoint: "),
}


def forge(path: Path, name: str, content: bytes) -> None:
    (path / name).write_bytes(content)
    sums = {file.name: checksums._digest(file) for file in path.iterdir() if file.name != "checksums.json"}
    (path / "checksums.json").write_text(json.dumps(sums))


@pytest.mark.parametrize("kind", BAD_CONTENTS)
def test_contents_that_make_no_sense_are_refused(kind: str, launch: Launch, tmp_path: Path) -> None:
    content, words = BAD_CONTENTS[kind]
    path = tmp_path / "run/checkpoints/round_000002"
    if isinstance(content, dict):
        content = {**json.loads((path / "contents.json").read_text()), **content}
    forge(path, "contents.json", (content if isinstance(content, str) else json.dumps(content)).encode())
    line = launch("rounds=4", "run_dir=run", "resume=auto")
    assert line.startswith("`resume` 'run/checkpoints/round_000002' ")
    assert words in line


@pytest.mark.parametrize(
    "weights", [[], [0.5, 0.5], [0.3, 0.3, "0.4"], [0.3, 0.3, 1.4], [0.3, 0.3, None], [float("nan")] * 3], ids=str
)
def test_weights_that_make_no_sense_are_refused_where_they_are_used(
    weights: list[object], launch: Launch, tmp_path: Path
) -> None:
    path = tmp_path / "run/checkpoints/round_000002"
    content = {**json.loads((path / "contents.json").read_text()), "worker_weight": weights}
    forge(path, "contents.json", json.dumps(content).encode())
    line = launch("rounds=4", "run_dir=new", "resume=run", "num_workers=2", "checkpoint.resize=resplit")
    assert "worker_weight in contents.json must be 3 numbers in [0, 1], got [" in line


BAD_CHECKSUMS = {"an empty mapping": {}, "a list": [], "numbers": dict.fromkeys(FILES[:3], 3), "null": None}


@pytest.mark.parametrize("kind", BAD_CHECKSUMS)
def test_checksums_that_vouch_for_nothing_are_refused(kind: str, launch: Launch, tmp_path: Path) -> None:
    path = Path("run/checkpoints/round_000002")
    (tmp_path / path / "checksums.json").write_text(json.dumps(BAD_CHECKSUMS[kind]))
    assert launch("rounds=4", "run_dir=new", f"resume={path}").startswith(f"`resume` '{path}' is damaged: ")


# Files that are whole by their checksums and that torch cannot make sense of.
UNREADABLE: dict[str, tuple[str, bytes]] = {
    "metadata that is text": (".metadata", b"garbage"),
    "metadata that is empty": (".metadata", b""),
    "metadata that is another object": (".metadata", pickle.dumps([1, 2])),
    "metadata of a class that is not there": (".metadata", b"cno.such.module\nThing\n."),
    "tensors that are empty": ("__0_0.distcp", b""),
    "tensors that are zeros": ("__0_0.distcp", bytes(4096)),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_files_that_cannot_be_understood_end_in_one_line(kind: str, launch: Launch, tmp_path: Path) -> None:
    path = Path("run/checkpoints/round_000002")
    forge(tmp_path / path, *UNREADABLE[kind])
    line = launch("rounds=4", "run_dir=new", f"resume={path}")
    assert line.startswith(f"checkpoint {path} cannot be read: ")


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
    tables = (BAD_SETTINGS, BAD_RESUMES, BAD_CONTENTS, BAD_CHECKSUMS, UNREADABLE, BAD_ENVIRONMENTS)
    assert sum(map(len, tables)) + len(FILES) * len(DAMAGES) >= 130
