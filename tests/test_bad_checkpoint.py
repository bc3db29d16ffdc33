"""A checkpoint that is none, is damaged or is of something else ends a resume in one line and is not touched."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from launches import Launch
from launches import launch as launch  # a fixture
from launches import runs as runs  # a fixture

from pisa_dist import checkpoint, checksums

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


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


def test_there_are_cases_enough_to_mean_something() -> None:
    tables = (BAD_RESUMES, BAD_CONTENTS, BAD_CHECKSUMS, UNREADABLE)
    assert sum(map(len, tables)) + len(FILES) * len(DAMAGES) >= 80
