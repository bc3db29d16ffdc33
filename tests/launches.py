"""Launches that end in one line, in a folder with finished runs."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import LAUNCHERS_OWN, run_main

from pisa_dist import runner

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
