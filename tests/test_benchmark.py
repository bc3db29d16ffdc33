"""The heterogeneity benchmark: what is run in which order, what survives, what is kept."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from grids import CELL, OTHER, QUICK, TINY, plan, record

from pisa_dist.benchmark import heterogeneity
from pisa_dist.benchmark.__main__ import main
from pisa_dist.benchmark.grid import Plan, Run, Schedule
from pisa_dist.benchmark.methods import BEYOND, METHODS, Method, to_try
from pisa_dist.benchmark.pool import Pool
from pisa_dist.benchmark.protocols import LOCAL, ONE_STEP, PROTOCOLS, TUNING_SEED, split_overrides
from pisa_dist.benchmark.results import Results, curve
from pisa_dist.benchmark.summary import (
    collect,
)
from pisa_dist.benchmark.worker import execute
from pisa_dist.data.datasets import TrainTest, digits
from pisa_dist.runner import load_data
from pisa_dist.train import compose_config

pytestmark = pytest.mark.timeout(300)


# What is run.


def test_tuning_runs_see_no_test_data_and_have_a_seed_that_is_not_scored() -> None:
    schedule = Schedule(plan("fedavg", "synchronous_adamw", "pisa"), {})
    runs = drain(schedule, lambda run: 0.5)
    tuning = [run for run in runs if run.phase == "tune"]
    assert len(tuning) == 10  # all as good as each other: of three settings the first, and two beyond it
    for run in tuning:
        assert run.seed == TUNING_SEED
        train, _ = digits()
        without_test: Any = TrainTest(train, None)  # type: ignore[arg-type]
        config = compose_config(run.overrides)
        data = load_data(config, lambda _, found=without_test: found)
        assert (len(data.train), len(data.test)) == (1437 - 287, 287)
    scored = [run for run in runs if run.phase == "score"]
    assert {run.seed for run in scored} == {0, 1}
    assert not [run for run in scored if any("validation" in override for override in run.overrides)]


def drain(schedule: Schedule, accuracy: Any) -> list[Run]:
    """Every run of the schedule, one at a time."""
    runs = []
    while (run := schedule.next_run()) is not None:
        runs.append(run)
        schedule.finished(run, {"last_accuracy": accuracy(run)})
    assert schedule.num_done == schedule.total == len(runs)
    return runs


def test_cells_come_one_after_the_other_and_in_a_cell_tuning_comes_first() -> None:
    runs = drain(Schedule(plan("fedavg", "pisa", "mifa", cells=(CELL, OTHER)), {}), lambda run: 0.5)
    order = [(run.cell, run.phase) for run in runs]
    assert list(dict.fromkeys(order)) == [(CELL, "tune"), (CELL, "score"), (OTHER, "tune"), (OTHER, "score")]
    assert Counter(order) == {(cell, phase): {"tune": 10, "score": 6}[phase] for cell, phase in order}


def test_while_the_last_tuning_run_is_under_way_the_next_cell_begins() -> None:
    schedule = Schedule(plan("fedavg", cells=(CELL, OTHER)), {})
    first = [schedule.next_run() for _ in range(4)]
    assert [run.cell for run in first if run] == [CELL, CELL, CELL, OTHER]
    for run, accuracy in zip(first[:3], (0.5, 0.6, 0.5), strict=True):
        assert run is not None
        schedule.finished(run, {"last_accuracy": accuracy})
    following = schedule.next_run()
    assert following is not None
    assert (following.cell, following.phase) == (CELL, "score")


def test_the_scored_setting_is_the_best_in_tuning_and_a_failed_one_counts_as_nothing() -> None:
    first = METHODS["fedavg"].settings_for(QUICK, "digits")[BEYOND:-BEYOND]
    accuracies = dict(zip(first, (None, 0.3, 0.2), strict=True))
    runs = drain(Schedule(plan("fedavg"), {}), lambda run: accuracies[run.setting])
    assert {run.setting for run in runs if run.phase == "tune"} == set(first)
    assert {run.setting for run in runs if run.phase == "score"} == {first[1]}


@pytest.mark.parametrize(
    ("accuracies", "tried", "chosen"),
    [
        ((9, 9, 1, 2, 3, 4, 9), (2, 3, 4, 5, 6), 6),
        ((9, 9, 1, 2, 3, 2, 9), (2, 3, 4, 5), 4),
        ((9, 1, 3, 2, 1, 9, 9), (2, 3, 4, 1), 2),
        ((9, 9, 1, 2, 1, 9, 9), (2, 3, 4), 3),
        ((1, 1, 1, 1, 1, 1, 1), (2, 3, 4, 1, 0), 0),  # of equals the first
    ],
)
def test_while_the_best_setting_is_at_an_end_tuning_goes_on_beyond_it(
    accuracies: tuple[int, ...], tried: tuple[int, ...], chosen: int
) -> None:
    settings = METHODS["mifa"].settings_for(QUICK, "digits")
    values = dict(zip(settings, accuracies, strict=True))
    runs = drain(Schedule(plan("mifa"), {}), lambda run: values[run.setting] / 10)
    assert [settings.index(run.setting) for run in runs if run.phase == "tune"] == list(tried)
    assert {run.setting for run in runs if run.phase == "score"} == {settings[chosen]}
    assert to_try(settings, {settings[place]: values[settings[place]] for place in tried}) == []


def test_what_was_scored_before_tuning_went_on_to_a_better_setting_does_not_count() -> None:
    settings = METHODS["mifa"].settings_for(QUICK, "digits")
    lines = [
        record(CELL, "mifa", TUNING_SEED, place / 10, phase="tune", setting=list(settings[place]))
        for place in (2, 3, 4, 5)
    ]
    lines += [record(CELL, "mifa", 0, 0.9, setting=list(settings[4])), record(CELL, "pisa", 0, 0.5)]
    assert list(collect(lines, QUICK)[CELL]) == ["pisa"]
    lines.append(record(CELL, "mifa", 0, 0.7, setting=list(settings[5])))
    assert collect(lines, QUICK)[CELL]["mifa"].value == 0.7


def test_a_grid_that_is_gone_on_with_tunes_on_from_the_results_that_are_there() -> None:
    def worse(run: Run) -> float:
        return -float(run.setting[0].partition("=")[2])

    before = drain(Schedule(plan("fedavg"), {}), worse)
    kept = {run.key: {"last_accuracy": worse(run)} for run in before if run.phase == "tune"}
    left = drain_rest(Schedule(plan("fedavg"), kept))
    assert [(run.phase, run.seed) for run in left] == [("score", 0), ("score", 1)]


def drain_rest(schedule: Schedule) -> list[Run]:
    runs = []
    while (run := schedule.next_run()) is not None:
        runs.append(run)
    return runs


def test_runs_that_are_done_are_not_handed_out_again() -> None:
    before = drain(Schedule(plan("fedavg", "pisa"), {}), lambda run: 0.5)
    kept = {run.key: {"last_accuracy": 0.5} for run in before if run.seed != 1}
    again = Schedule(plan("fedavg", "pisa"), kept)
    assert again.num_done == len(kept) == 7
    left = drain_rest(again)
    assert [(run.method, run.phase, run.seed) for run in left] == [("fedavg", "score", 1), ("pisa", "score", 1)]


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS.keys())
def test_every_method_composes_in_every_setting_and_is_tuned_over_three_or_not_at_all(protocol: Any) -> None:
    whole = Plan(protocol, (CELL,), list(METHODS), range(1), {"digits": 1437, "cifar10": 50_000})
    for name, method in METHODS.items():
        for dataset in ("digits", "cifar10"):
            settings = method.settings_for(protocol, dataset)
            assert len(settings) == (1 if name in ("pisa", "pisa_constant") else 3 + 2 * BEYOND)
            assert len(set(settings)) == len(settings)
            numbers = [float(part.partition("=")[2]) for setting in settings for part in setting[:1]]
            assert numbers == sorted(numbers)
        for setting in METHODS[name].settings_for(protocol, "digits")[:: 2 * BEYOND + 2]:
            compose_config(whole.run(CELL, name, setting, 0, "tune").overrides)


def test_the_protocols_have_the_steps_that_they_say() -> None:
    quick, niid = PROTOCOLS["quick"], PROTOCOLS["niid"]
    assert quick.step_overrides(LOCAL, 10_000) == ["rounds=30", "local_steps=20", "batch_size=100", "eval_every=5"]
    assert quick.step_overrides(ONE_STEP, 10_000) == ["rounds=30", "local_steps=1", "batch_size=2000", "eval_every=5"]
    assert niid.step_overrides(LOCAL, 60_000) == [
        "rounds=50",
        "local_steps=1",
        "local_epochs=10",
        "batch_size=64",
        "eval_every=5",
    ]
    assert niid.step_overrides(ONE_STEP, 60_000) == ["rounds=500", "local_steps=1", "batch_size=6000", "eval_every=50"]
    assert split_overrides("noise_0.1") == ["split=feature_noise", "split.noise_level=0.1"]
    assert split_overrides("label_2") == ["split=label_k", "split.labels_per_worker=2"]


# What happens when something fails.


@pytest.fixture
def bad_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    deadly = ("algorithm=fedavg", "model=custom", "model._target_=os._exit", "+model.status=7")
    diverging = ("algorithm=fedavg", "algorithm.lr=1e30")
    monkeypatch.setitem(METHODS, "deadly", Method("deadly", deadly))
    monkeypatch.setitem(METHODS, "diverging", Method("diverging", diverging))


@pytest.mark.usefixtures("bad_methods")
def test_a_run_that_diverges_or_ends_its_process_is_recorded_and_the_grid_goes_on(tmp_path: Path) -> None:
    extra = tuple(override for override in TINY if "hidden" not in override)
    results = Results(tmp_path)
    with results.claimed({}):
        total, num_failed = heterogeneity.run_grid(
            plan("deadly", "diverging", "pisa", num_seeds=1, extra=extra), results, 1
        )
    lines = {line["method"]: line for line in results.read()}
    assert (total, num_failed) == (3, 2)
    assert (lines["deadly"]["status"], lines["deadly"]["last_accuracy"]) == ("failed", None)
    assert lines["deadly"]["error"] == "the process ended with status 7"
    assert (lines["diverging"]["status"], lines["diverging"]["last_accuracy"]) == ("failed", None)
    assert lines["diverging"]["error"].startswith("FloatingPointError: ")
    assert lines["pisa"]["status"] == "ok"
    assert lines["pisa"]["last_accuracy"] > 0


def test_a_killed_process_costs_its_task_alone() -> None:
    with Pool(time.sleep, 1) as pool:
        pool.submit(60)
        next(iter(pool._processes.values())).kill()
        assert [(done.task, done.error) for done in pool.wait()] == [(60, "the process was killed by SIGKILL")]
        pool.submit("not a number")
        (done,) = pool.wait()
        assert done.error is not None
        assert done.error.startswith("TypeError: ")
        next(iter(pool._processes.values())).kill()  # idle
        time.sleep(0.2)
        pool.submit(0)
        assert [(done.task, done.error) for done in pool.wait()] == [(0, None)]


# The command.


def command(folder: Path) -> list[str]:
    grid = ["--data", "digits", "--split", "label_1", "--participation", "0.3", "--method", "fedavg,pisa"]
    overrides = [part for override in TINY for part in ("--set", override)]
    options = ["--seeds", "6", "--jobs", "1", "--out", str(folder)]
    return [sys.executable, "-m", "pisa_dist.benchmark", "heterogeneity", *grid, *options, *overrides]


def interrupted(folder: Path, number: signal.Signals, num_lines: int) -> tuple[int, str]:
    """Exit status and last line of the command, stopped once so many lines are there."""
    file = folder / "results.jsonl"
    process = subprocess.Popen(command(folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + 120
        while not file.exists() or file.read_bytes().count(b"\n") < num_lines:
            assert time.monotonic() < deadline, "no results"
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.01)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert children
    for child in children:
        wait_until_gone(int(child))
    return process.returncode, output.splitlines()[-1]


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.05)


def test_a_grid_that_is_killed_and_stopped_goes_on_where_it_was_and_reports(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    status, _ = interrupted(tmp_path, signal.SIGKILL, 2)
    assert status == -signal.SIGKILL
    with file.open("a") as opened:
        opened.write('{"dataset": "dig')  # as a kill in the middle of a line leaves it
    before = file.read_bytes()
    status, line = interrupted(tmp_path, signal.SIGTERM, before.count(b"\n") + 2)
    assert status == 143
    assert line.startswith("stopped: ")
    assert "the same command goes on" in line
    whole = before[: before.rfind(b"\n") + 1]
    assert file.read_bytes().startswith(whole)

    done = subprocess.run(command(tmp_path), capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert file.read_bytes().startswith(whole)
    lines = [json.loads(text) for text in file.read_text().splitlines()]
    assert len({tuple(line["overrides"]) for line in lines}) == len(lines)
    counts = Counter((line["method"], line["phase"]) for line in lines)
    assert 3 <= counts.pop(("fedavg", "tune")) <= 3 + BEYOND
    assert counts == {("fedavg", "score"): 6, ("pisa", "score"): 6}
    again = execute(lines[-1]["overrides"])  # by hand, in another process
    timed = {"seconds"}
    assert {k: v for k, v in again.items() if k not in timed} == {
        k: tuplify(v) for k, v in lines[-1].items() if k in again and k not in timed
    }
    points = curve(again)
    assert [point.round for point in points] == [2, 3]
    assert points[-1][2:] == (again["passes"], again["bytes_sent"])
    assert 0 < points[0].passes < points[1].passes
    assert 0 < points[0].bytes_sent < points[1].bytes_sent
    check_report(tmp_path)


def tuplify(value: Any) -> Any:
    return [tuple(item) for item in value] if isinstance(value, list) else value


def check_report(folder: Path) -> None:
    page = (folder / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 1 + 3
    assert "http" not in page  # self-contained
    assert (folder / "figures" / "regret.png").read_bytes().startswith(b"\x89PNG")
    assert "| FedAvg |" in (folder / "table.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "pisa,adam"], "--method must be of pisa, "),
        (["--split", "label"], "--split must be iid, or label_"),
        (["--split", "label_1.5"], "got 'label_1.5'"),
        (["--split", "dirichlet_0"], "got 'dirichlet_0'"),
        (["--split", "iid_3"], "got 'iid_3'"),
        (
            ["--data", "imagenet"],
            "--data must be of fashion_mnist, mnist, cifar10, digits, libsvm, custom, got 'imagenet'",
        ),
        (["--participation", "0.04"], "--participation: `participation` must select at least one of 10 workers"),
        (["--participation", "2"], "--participation must be in (0, 1], got 2"),
        (["--participation", "all"], "--participation must be numbers in (0, 1], got 'all'"),
        (["--protocol", "slow"], "--protocol must be one of quick, niid, got 'slow'"),
        (["--seeds", "0"], "--seeds must be in 1..100, got 0"),
        (["--seeds", "101"], "--seeds must be in 1..100, got 101"),
        (["--jobs", "0"], "--jobs must be >= 1, got 0"),
        (["--set", "seed=3"], "--set must be KEY=VALUE with a key that the grid does not set itself, got 'seed=3'"),
        (["--set", "rounds"], "got 'rounds'"),
        (["--set", "rounds=0"], "`rounds` must be an integer >= 1, got 0"),
        (["--set", "data.num_train=9999"], "`data.num_train` must be in 1..1437, got 9999"),
        (["--data", "mnist", "--set", "data.root=/nowhere"], "MNIST not found"),
        (["--report-only"], "holds no results yet"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    folder = tmp_path / "out"
    given = ["--data", "digits", "--split", "iid", "--method", "pisa", "--out", str(folder)]
    assert main(["heterogeneity", *given, *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert shown.err.startswith("error: ")
    assert message in shown.err
    assert not folder.exists()


@pytest.mark.parametrize("arguments", [["heterogeneity", "--seeds", "two"], ["heterogeneity", "--data", "a,,b"], []])
def test_what_the_parser_refuses_is_one_line_too(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_folder_takes_one_grid_and_one_process(tmp_path: Path) -> None:
    results = Results(tmp_path)
    in_use = pytest.raises(ValueError, match="is in use by another process")
    with results.claimed({"protocol": "quick"}), in_use, Results(tmp_path).claimed({}):
        pass
    with pytest.raises(ValueError, match="choose another"), results.claimed({"protocol": "niid"}):
        pass


def test_a_run_that_is_done_again_counts_once_and_a_damaged_line_is_named(tmp_path: Path) -> None:
    results = Results(tmp_path)
    with results.claimed({}):
        results.append(record(CELL, "pisa", 0, None))
        results.append(record(CELL, "pisa", 0, 0.5))
    assert [line["last_accuracy"] for line in results.read()] == [0.5]
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write("oops\n")
    with pytest.raises(ValueError, match=r"results\.jsonl:3 is not a result: 'oops'"):
        results.read()


def test_a_grid_takes_data_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_grid_data.py").write_text(
        "import numpy as np\n\n\n"
        "def load(size):\n"
        "    generator = np.random.default_rng(0)\n"
        "    data = generator.normal(size=(size, 5)), np.arange(size) % 3\n"
        "    return data, data\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    own = ("data._target_=own_grid_data.load", "+data.size=150", "rounds=2", "model.hidden_sizes=[4]")
    command = ["heterogeneity", "--data", "custom", "--split", "dirichlet_0.5", "--participation", "0.3", "--jobs", "1"]
    command += ["--method", "pisa", "--seeds", "1", "--out", str(tmp_path / "out")]
    for override in own:
        command += ["--set", override]
    assert main(command) == 0
    (line,) = Results(tmp_path / "out").read()
    assert (line["dataset"], line["status"], line["rounds"]) == ("custom", "ok", 2)
    assert "data.num_train=10000" not in line["overrides"]


def test_ctrl_c_in_the_terminal_is_for_the_parent_alone() -> None:
    with Pool(time.sleep, 1) as pool:
        pool.submit(0)
        pool.wait()
        (process,) = pool._processes.values()
        assert process.pid is not None
        os.kill(process.pid, signal.SIGINT)
        pool.submit(0.1)
        assert [(done.task, done.error) for done in pool.wait()] == [(0.1, None)]
        assert list(pool._processes.values()) == [process]


def test_processes_do_arithmetic_with_one_thread_and_leave_the_environment_as_it_was() -> None:
    before = os.environ.get("OMP_NUM_THREADS")
    with Pool(os.getenv, 1) as pool:
        pool.submit("OMP_NUM_THREADS")
        assert [done.value for done in pool.wait()] == ["1"]
    assert os.environ.get("OMP_NUM_THREADS") == before
