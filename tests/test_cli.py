"""The command line as users type it: real processes, alone and under torchrun, from composing to the run directory."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from commands import SMALL, TrainHere, assert_same_metrics, errors, execute, job_of, read_metrics, train
from commands import train_here as train_here  # a fixture
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from matplotlib.image import imread

from pisa_dist.schema import as_plain
from pisa_dist.train import config_directory, register_schemas

pytestmark = pytest.mark.timeout(300)


ROOT = Path(__file__).resolve().parents[1]


METRICS = [
    "round",
    "train_loss",
    "test_loss",
    "test_accuracy",
    "samples_seen",
    "bytes_sent",
    "seconds",
    "penalty",
    "primal_residual",
    "dual_residual",
]


def test_one_command_writes_the_whole_run_directory(tmp_path: Path) -> None:
    overrides = ["rounds=4", "eval_every=2", "num_workers=4", *SMALL[:3]]
    done = train(*overrides, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert f"run directory: runs/{run_dir.name}" in done.stdout
    assert {path.name for path in run_dir.iterdir()} == {
        "config.yaml",
        "metrics.jsonl",
        "summary.json",
        "split.json",
        "figures",
        ".lock",
    }

    register_schemas()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        expected = as_plain(compose("config", overrides=overrides))
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert config == {**expected, "run_dir": f"runs/{run_dir.name}"}

    metrics = read_metrics(run_dir)
    assert [line["round"] for line in metrics] == [2, 4]
    for line in metrics:
        assert list(line) == METRICS
        assert None not in line.values()
    assert 0 < metrics[0]["seconds"] < metrics[1]["seconds"]
    assert [line["samples_seen"] for line in metrics] == [2 * 4 * 32, 4 * 4 * 32]

    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "completed"
    assert summary["last"] == metrics[-1]
    assert summary["best"]["test_accuracy"] == max(line["test_accuracy"] for line in metrics)
    assert summary["best"]["test_loss"] == min(line["test_loss"] for line in metrics)
    assert summary["wall_seconds"] == pytest.approx(metrics[-1]["seconds"], rel=0.5)
    assert (summary["vectorized"], summary["vectorized_why_not"]) == (True, None)
    assert {"torch", "numpy", "python", "pisa_dist"} <= set(summary["versions"])
    assert summary["commit"] is None or re.fullmatch("[0-9a-f]{40}", summary["commit"])

    split = json.loads((run_dir / "split.json").read_text())
    assert np.shape(split["counts"]) == (4, 10)
    assert np.sum(split["counts"]) == 400
    assert split["sizes"] == np.sum(split["counts"], axis=1).tolist()
    assert split["skew"]

    figures = sorted((run_dir / "figures").iterdir())
    assert [figure.name for figure in figures] == ["accuracy.png", "loss.png", "residuals.png", "split.png"]
    for figure in figures:
        height, width, _ = imread(figure).shape
        assert min(height, width) > 100


def test_the_first_example_trains_on_one_class_per_worker(tmp_path: Path) -> None:
    command = "data=digits split=label_k split.labels_per_worker=1 algorithm=sisa num_workers=10"
    done = train(*command.split(), "rounds=3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (run_dir,) = (tmp_path / "runs").iterdir()
    counts = np.array(json.loads((run_dir / "split.json").read_text())["counts"])
    assert ((counts > 0).sum(axis=1) == 1).all()
    assert read_metrics(run_dir)[-1]["round"] == 3


def test_the_torchrun_example_trains_on_two_ranks(tmp_path: Path) -> None:
    done = train("experiment=digits_label1", "rounds=3", cwd=tmp_path, num_ranks=2)
    assert done.returncode == 0, done.stderr
    (run_dir,) = (tmp_path / "runs").iterdir()
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["num_ranks"] == 2
    assert summary["last"]["round"] == 3
    counts = np.array(json.loads((run_dir / "split.json").read_text())["counts"])
    assert ((counts > 0).sum(axis=1) == 1).all()


def test_the_libsvm_example_takes_files_whose_labels_and_widths_are_their_own(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for name, num_samples, width in (("train.svm", 300, 7), ("test.svm", 60, 5)):
        labels = generator.choice([-1, 1], num_samples)
        features = generator.normal(size=(num_samples, width)) + labels[:, None]
        lines = [
            f"{label:+d} " + " ".join(f"{column}:{value:.4f}" for column, value in enumerate(row, start=1))
            for label, row in zip(labels, features, strict=True)
        ]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    command = "data=libsvm data.train_file=train.svm data.test_file=test.svm split=dirichlet"
    done = train(*command.split(), "split.dirichlet_concentration=0.5", "rounds=3", "run_dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["num_train"] == 300
    assert summary["num_parameters"] == (7 + 1) * 128 + (128 + 1) * 64 + (64 + 1) * 2
    split = json.loads((tmp_path / "run/split.json").read_text())
    assert np.shape(split["counts"]) == (10, 2)


EXPERIMENTS = {
    "plain_sisa": ("sisa", {}),
    "plain_nsisa": ("nsisa", {}),
    "some_absent": ("sisa", {"participation": 0.5}),
    "three_steps": ("fedavg", {"local_steps": 3}),
    "all_at_once": ("synchronous", {}),
}


def write_experiments(folder: Path) -> None:
    (folder / "experiment").mkdir(parents=True)
    for name, (algorithm, settings) in EXPERIMENTS.items():
        content = {"defaults": [{"override /algorithm": algorithm}], **settings}
        (folder / "experiment" / f"{name}.yaml").write_text("# @package _global_\n" + yaml.safe_dump(content))


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_the_trajectory_does_not_depend_on_the_number_of_ranks(
    num_ranks: int, tmp_path: Path, train_here: TrainHere
) -> None:
    write_experiments(tmp_path / "own")
    arguments = ["--config-dir", str(tmp_path / "own"), "--multirun", f"experiment={','.join(EXPERIMENTS)}"]
    arguments += ["dtype=float64", "num_workers=10", "rounds=4", "eval_every=1", *SMALL]
    assert train_here(*arguments, "run_dir=alone") == 0
    done = train(*arguments, "run_dir=together", cwd=tmp_path, num_ranks=num_ranks)
    assert done.returncode == 0, done.stderr
    for name, (algorithm, settings) in EXPERIMENTS.items():
        together, alone = (job_of(tmp_path / sweep, f"experiment={name}") for sweep in ("together", "alone"))
        assert_same_metrics(together, alone, rel=1e-9)
        summary = json.loads((together / "summary.json").read_text())
        assert (summary["num_ranks"], summary["algorithm"]) == (num_ranks, algorithm)
        present = 10 * settings.get("participation", 1)
        assert summary["last"]["samples_seen"] <= 4 * 16 * present * settings.get("local_steps", 1)


@pytest.mark.parametrize("slow_rank", [None, 0])
def test_more_ranks_than_workers_end_in_one_line_however_late_the_first_rank_is(
    slow_rank: int | None, tmp_path: Path
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(
        f"import os, time\nif os.environ.get('RANK') == '{slow_rank}':\n    time.sleep(4)\n"
    )
    done = train("num_workers=2", cwd=tmp_path, num_ranks=3, environment={"PYTHONPATH": str(tmp_path / "site")})
    assert done.returncode != 0
    (line,) = errors(done.stderr)
    assert "`num_workers` must be at least the number of ranks, got 2 workers on 3 ranks" in line
    assert not (tmp_path / "runs").exists()


def test_a_sweep_makes_a_run_directory_for_each_job(tmp_path: Path, train_here: TrainHere) -> None:
    tiny = ("rounds=1", "num_workers=2", *SMALL)
    assert train_here("--multirun", "seed=0,1", *tiny) == 0
    runs = [path for path in (tmp_path / "runs").iterdir() if (path / "summary.json").is_file()]
    assert sorted(json.loads((run / "summary.json").read_text())["seed"] for run in runs) == [0, 1]

    assert train_here("--multirun", "seed=0,1", "run_dir=sweep", *tiny) == 0
    for seed in (0, 1):
        summary = json.loads((job_of(tmp_path / "sweep", f"seed={seed}") / "summary.json").read_text())
        assert summary["seed"] == seed


def test_a_sweep_with_many_fixed_settings_still_finds_names_for_its_directories(
    tmp_path: Path, train_here: TrainHere
) -> None:
    fixed = ["rounds=1", "num_workers=2", "eval_every=1", "participation=1.0", "worker_weight=uniform", "device=cpu"]
    fixed += ["on_nonfinite=skip", "dtype=float64", "algorithm.penalty=1.5", "algorithm.preconditioner_scale=10.0"]
    fixed += ["algorithm.second_moment_decay=0.99", "algorithm.eps=1e-6", "algorithm.penalty_growth=1.01", *SMALL]
    assert train_here("--multirun", "seed=0,1", "run_dir=sweep", *fixed) == 0
    summaries = [json.loads(file.read_text()) for file in (tmp_path / "sweep").glob("*/summary.json")]
    assert sorted(summary["seed"] for summary in summaries) == [0, 1]


def test_an_occupied_run_directory_is_refused_and_left_as_it_was(
    tmp_path: Path, train_here: TrainHere, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny = ("rounds=1", "num_workers=2", "run_dir=run", *SMALL)
    assert train_here(*tiny) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    capfd.readouterr()
    assert train_here(*tiny, "seed=1") == 2
    assert errors(capfd.readouterr().err) == [
        "pisa-train: error: `run_dir` 'run' holds a run already: choose another, or resume=auto to go on"
    ]
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_run_that_found_no_data_does_not_occupy_its_directory(
    tmp_path: Path, train_here: TrainHere, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train_here("data=mnist", "data.root=nowhere", "run_dir=run") == 2
    (line,) = errors(capfd.readouterr().err)
    assert "train-images-idx3-ubyte" in line
    assert str(tmp_path / "nowhere") in line
    assert not (tmp_path / "run").exists(), "what it made is gone"
    (tmp_path / "run").mkdir()
    assert train_here("data=mnist", "data.root=nowhere", "run_dir=run") == 2
    capfd.readouterr()
    assert (tmp_path / "run").exists(), "what it found stays"
    assert train_here("rounds=1", "num_workers=2", "run_dir=run", *SMALL) == 0, capfd.readouterr().err


CUSTOM = """
import numpy as np
from torch import nn


def load(size, classes=3):
    generator = np.random.default_rng(0)
    targets = np.arange(size) % classes
    inputs = generator.normal(size=(size, 5)) + targets[:, None]
    return (inputs, targets), (inputs[: size // 2], targets[: size // 2])


class Net(nn.Module):
    def __init__(self, input_shape, num_classes, width=4):
        super().__init__()
        self.hidden = nn.Linear(*input_shape, width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, inputs):
        return self.head(self.hidden(inputs).relu())
"""


OWN_DATA = ("data=custom", "data._target_=custom_task.load", "+data.size=90")


OWN_MODEL = ("model=custom", "model._target_=custom_task.Net", "+model.width=7")


@pytest.mark.parametrize("entry", ["python -m pisa_dist.train", "pisa-train"])
def test_data_and_model_may_come_from_a_file_in_the_working_directory(entry: str, tmp_path: Path) -> None:
    (tmp_path / "custom_task.py").write_text(CUSTOM)
    script = [str(Path(sys.executable).with_name("pisa-train"))]
    command = script if entry == "pisa-train" else [sys.executable, "-m", "pisa_dist.train"]
    done = execute([*command, *OWN_DATA, *OWN_MODEL, "rounds=1", "num_workers=3", "run_dir=run"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["num_train"] == 90
    assert summary["num_parameters"] == (5 + 1) * 7 + (7 + 1) * 3
    assert summary["model"] == "custom_task.Net"


def test_the_report_compares_two_runs(tmp_path: Path, train_here: TrainHere) -> None:
    tiny = ("rounds=2", "eval_every=1", "num_workers=2", *SMALL)
    assert train_here(*tiny, "run_dir=runs/first") == 0
    assert train_here(*tiny, "algorithm=fedavg", "run_dir=runs/second") == 0
    done = execute([sys.executable, "-m", "pisa_dist.report", "runs/first", "runs/second"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.strip()]
    assert [row[1] for name in ("first", "second") for row in rows if row[0] == name] == ["sisa", "fedavg"]
    pictures = list((tmp_path / "runs/report").glob("*.png"))
    assert pictures
    assert all(imread(picture).ndim == 3 for picture in pictures)


def test_an_installed_wheel_brings_its_configs(tmp_path: Path) -> None:
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(wheels), str(ROOT)]
    built = execute(build, cwd=tmp_path)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = wheels.glob("pisa_dist-*.whl")
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--no-compile", "--quiet"]
    installed = execute([*install, "--target", str(site), str(wheel)], cwd=tmp_path)
    assert installed.returncode == 0, installed.stderr
    packaged = site / "pisa_dist/configs"
    assert {path.relative_to(packaged) for path in packaged.rglob("*.yaml")} == {
        path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.yaml")
    }
    assert (site / "pisa_dist/py.typed").is_file()

    # Only a run that reads the installed files sees this change.
    root = packaged / "config.yaml"
    changed = root.read_text().replace("eval_every: 10", "eval_every: 17")
    assert changed != root.read_text()
    root.write_text(changed)
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    done = train("rounds=1", "run_dir=run", *SMALL, cwd=outside, environment={"PYTHONPATH": str(site)})
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load((outside / "run/config.yaml").read_text())["eval_every"] == 17
    summary = json.loads((outside / "run/summary.json").read_text())
    assert summary["commit"] is None
