"""The report finds, labels and compares runs, finished or not, and says in one line what it cannot read."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from pisa_dist import figures
from pisa_dist.report import draw_run, find_runs, label_runs, load_run, main
from pisa_dist.seeds import averaged, group_by_seed

PNG = b"\x89PNG"


def metrics_line(done: int, **changes: Any) -> dict[str, Any]:
    line: dict[str, Any] = {
        "round": done,
        "train_loss": 2.0 / (done + 1),
        "test_loss": 2.2 / (done + 1),
        "test_accuracy": 0.1 + 0.02 * done,
        "samples_seen": 100 * done,
        "bytes_sent": 4000 * done,
        "seconds": 0.5 * done,
        "penalty": None,
        "primal_residual": None,
        "dual_residual": None,
    }
    return line | changes


def make_run(
    path: Path,
    lines: Sequence[dict[str, Any]] | None = None,
    *,
    finished: bool = True,
    counts: Sequence[Sequence[int]] = ((50, 0), (0, 50)),
    **summary: Any,
) -> Path:
    lines = [metrics_line(done) for done in (0, 10, 20, 30)] if lines is None else lines
    path.mkdir(parents=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "config.yaml").write_text("algorithm:\n  name: sisa\n  penalty: 1.0\nrounds: 30\n")
    split = {
        "split": "label_k",
        "num_workers": len(counts),
        "num_classes": len(counts[0]),
        "counts": [list(row) for row in counts],
        "sizes": [sum(row) for row in counts],
        "skew": {"hellinger": 0.541, "jensen_shannon": 0.6931, "size_variation": None},
    }
    (path / "split.json").write_text(json.dumps(split))
    if finished:
        facts = {"status": "completed", "algorithm": "sisa", "split": "label_k", "num_train": 100, "rounds": 30}
        totals = {"passes": 30.0, "bytes_sent": 120_000, "wall_seconds": 15.25}
        (path / "summary.json").write_text(json.dumps(facts | totals | summary))
    return path


def draw(function: Callable[[figures.Runs], Figure | None], *paths: Path) -> Figure:
    figure = function(label_runs([load_run(path) for path in paths]))
    assert figure is not None
    figure.draw_without_rendering()
    return figure


def row_of(output: str, label: str) -> list[str]:
    return [line.split() for line in output.splitlines() if line.split()[:1] == [label]][-1]


def test_a_finished_run_is_one_row_of_its_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [metrics_line(done) for done in (0, 10, 20)] + [metrics_line(30, test_accuracy=0.4567)]
    run = make_run(tmp_path / "one", lines)
    assert main([str(run)]) == 0
    output = capsys.readouterr().out
    expected = ["one", "sisa", "label_k", "45.67", "50.00", "30", "120.0", "kB", "30.0", "15.2", "completed"]
    assert row_of(output, "one") == expected


def test_an_unfinished_run_is_shown_from_its_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "killed", finished=False)
    assert main([str(run)]) == 0
    row = row_of(capsys.readouterr().out, "killed")
    assert " ".join(row) == "killed sisa label_k 70.00 70.00 30 120.0 kB 30.0 15.0 running/unfinished"


def test_a_run_with_nothing_to_show_yet_is_a_row_of_dashes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "new"
    run.mkdir()
    (run / "metrics.jsonl").touch()
    assert main([str(run)]) == 0
    assert " ".join(row_of(capsys.readouterr().out, "new")) == "new ? ? - - - - - - running/unfinished"
    assert not list((run / "figures").iterdir())


def test_the_algorithm_of_an_unfinished_run_is_read_from_its_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configs = {"name": "algorithm: fedavg\n", "list": "- fedavg\n", "unnamed": "algorithm: {lr: 1}\n"}
    for label, config in configs.items():
        (make_run(tmp_path / label, finished=False) / "config.yaml").write_text(config)
    main([str(tmp_path)])
    output = capsys.readouterr().out
    assert [row_of(output, label)[1] for label in configs] == ["fedavg", "?", "?"]


def test_bytes_are_shown_in_units_that_people_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = {"0 B": 0, "999 B": 999, "1.5 kB": 1500, "2.0 MB": 2_040_000, "2.5 GB": 2.5e9, "70.0 TB": 7e13}
    for index, count in enumerate(shown.values()):
        make_run(tmp_path / str(index), bytes_sent=count)
    main([str(tmp_path)])
    output = capsys.readouterr().out
    assert [" ".join(row_of(output, str(index))[6:8]) for index in range(len(shown))] == list(shown)


def test_a_summary_alone_is_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "kept")
    (run / "metrics.jsonl").unlink()
    assert main([str(run)]) == 0
    row = row_of(capsys.readouterr().out, "kept")
    assert " ".join(row) == "kept sisa label_k - - 30 120.0 kB 30.0 15.2 completed"


def test_labels_are_the_shortest_path_ends_that_differ(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / name) for name in ("a/x/seed1", "b/x/seed1", "b/x/seed2")]
    labelled = label_runs([load_run(path) for path in paths])
    assert list(labelled) == ["a/x/seed1", "b/x/seed1", "seed2"]
    assert [run.path for run in labelled.values()] == paths


def test_a_directory_above_runs_counts_as_all_of_them_and_each_once(tmp_path: Path) -> None:
    shallow, deep = make_run(tmp_path / "all/b"), make_run(tmp_path / "all/a/seed1")
    make_run(shallow / "checkpoints/copy")  # inside a run: not one of its own
    (tmp_path / "all/configs").mkdir()
    assert find_runs([tmp_path / "all", shallow]) == [deep, shallow]


def test_brackets_in_a_directory_name_are_not_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(make_run(tmp_path / "sizes=[red]$x_$"))])
    assert row_of(capsys.readouterr().out, "sizes=[red]$x_$")


def test_figures_of_one_run_go_into_it_and_of_several_beside_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = make_run(tmp_path / "all/a"), make_run(tmp_path / "all/deep/b")
    assert main([str(first)]) == 0
    assert main([str(first), str(second)]) == 0
    assert main([str(second), "--output", str(tmp_path / "elsewhere")]) == 0
    names = {"accuracy.png", "loss.png", "split.png"}
    for folder in (first / "figures", tmp_path / "all/report", tmp_path / "elsewhere"):
        assert {file.name for file in folder.iterdir()} == names
        assert all(file.read_bytes().startswith(PNG) for file in folder.iterdir())
    assert not (second / "figures").exists()
    assert str(tmp_path / "elsewhere/split.png") in capsys.readouterr().out


def test_draw_run_returns_the_figures_that_it_wrote(tmp_path: Path) -> None:
    lines = [metrics_line(done, primal_residual=0.1, dual_residual=0.2) for done in (1, 2)]
    run = make_run(tmp_path / "run", lines)
    written = draw_run(run)
    assert [file.name for file in written] == ["accuracy.png", "loss.png", "residuals.png", "split.png"]
    assert all(file.parent == run / "figures" and file.is_file() for file in written)


def test_a_last_line_that_breaks_off_is_left_out_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", finished=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"round": 40, "train_lo')
    assert main([str(run)]) == 0
    captured = capsys.readouterr()
    assert captured.err == f"warning: {run / 'metrics.jsonl'}:5 breaks off; the line is left out\n"
    assert row_of(captured.out, "run")[5] == "30"


def test_a_last_line_that_only_lacks_its_line_break_counts(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(metrics_line(40)))
    loaded = load_run(run)
    assert loaded.metrics[-1]["round"] == 40
    assert not loaded.warnings


def test_where_a_resumed_run_repeats_rounds_the_later_line_counts(tmp_path: Path) -> None:
    lines = [metrics_line(done, test_accuracy=value) for done, value in [(0, 0.1), (10, 0.2), (20, 0.3), (10, 0.5)]]
    loaded = load_run(make_run(tmp_path / "run", lines))
    np.testing.assert_array_equal(loaded.series("round"), [0, 10])
    np.testing.assert_array_equal(loaded.series("test_accuracy"), [0.1, 0.5])


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metrics.jsonl", '{"round": 0}\nnot json\n{"round": 1}\n', "metrics.jsonl:2 is not a line of metrics"),
        ("metrics.jsonl", '{"round": 0}\n{"round": \n', "metrics.jsonl:2 is not a line of metrics"),
        ("metrics.jsonl", '{"train_loss": 1}\n', "metrics.jsonl:1 is not a line of metrics"),
        ("metrics.jsonl", "\n[1]\n", "metrics.jsonl:2 is not a line of metrics"),
        ("summary.json", "{", "summary.json is not a JSON object"),
        ("split.json", "[]", "split.json is not a JSON object"),
        ("split.json", '{"counts": [[1, 2], [3]]}', "`counts` must have one row per worker"),
        ("split.json", '{"counts": {"0": 5}}', "`counts` must have one row per worker"),
        ("config.yaml", "a: [", "config.yaml is not YAML"),
    ],
)
def test_a_damaged_file_is_one_line_on_stderr_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, content: str, message: str
) -> None:
    run = make_run(tmp_path / "run")
    (run / file).write_text(content)
    assert main([str(run)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_missing_directories_and_directories_without_runs_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "missing")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'missing'} is not a directory\n"
    assert main([str(tmp_path)]) == 2
    assert "has no runs" in capsys.readouterr().err
    with pytest.raises(ValueError, match="is not a run directory"):
        load_run(tmp_path)


def with_seed(path: Path, seed: int, *, lift: float = 0.0, penalty: float = 1.0, **options: Any) -> Path:
    lines = [metrics_line(done, test_accuracy=0.1 + 0.02 * done + lift) for done in (0, 10, 20, 30)]
    run = make_run(path, lines, **options)
    config = {"algorithm": {"name": "sisa", "penalty": penalty}, "seed": seed, "run_dir": str(path)}
    (run / "config.yaml").write_text(json.dumps(config))
    return run


def test_runs_that_differ_only_in_their_seed_are_one_curve_and_one_row_with_mean_and_deviation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (0, 1, 2):
        with_seed(tmp_path / f"penalty=1,seed={seed}", seed, lift=0.1 * seed)
    with_seed(tmp_path / "penalty=2,seed=0", 0, penalty=2.0)
    assert main([str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert row_of(output, "penalty=1,seed=1")[3] == "80.00"  # each run still has its row
    assert row_of(output, "penalty=1")[3:] == ["3", "80.00", "±", "10.00", "80.00", "±", "10.00"]
    assert row_of(output, "penalty=2,seed=0")[3:] == ["1", "70.00", "70.00"]
    groups = group_by_seed(label_runs([load_run(path) for path in sorted(tmp_path.glob("penalty=*"))]))
    assert {label: len(members) for label, members in groups.items()} == {"penalty=1": 3, "penalty=2,seed=0": 1}
    figure = figures.draw_accuracy({label: averaged(members) for label, members in groups.items()})
    assert figure is not None
    first, _ = figure.axes[0].get_lines()
    np.testing.assert_allclose(first.get_ydata(), [20, 40, 60, 80])
    (band,) = figure.axes[0].collections
    corners = band.get_paths()[0].vertices
    assert corners[:, 1].min() == pytest.approx(10)
    assert corners[:, 1].max() == pytest.approx(90)


def test_each_run_can_have_its_own_curve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (0, 1):
        with_seed(tmp_path / str(seed), seed)
    assert main([str(tmp_path), "--each"]) == 0
    assert "±" not in capsys.readouterr().out


def test_the_mean_is_over_the_rounds_that_all_seeds_have_and_says_that_one_is_unfinished(tmp_path: Path) -> None:
    full = load_run(with_seed(tmp_path / "a", 0))
    short = load_run(with_seed(tmp_path / "b", 1, finished=False))
    short = replace(short, metrics=short.metrics[:2])
    mean = averaged([full, short])
    assert mean.series("round").tolist() == [0, 10]
    assert mean.summary == {}


@pytest.mark.parametrize("other", [{"seed": 0}, {"seed": 1, "penalty": 2.0}], ids=["the same seed", "another penalty"])
def test_runs_of_one_seed_or_of_different_experiments_are_not_averaged(tmp_path: Path, other: dict[str, Any]) -> None:
    runs = [load_run(with_seed(tmp_path / "a", 0)), load_run(with_seed(tmp_path / "b", **other))]
    assert [len(members) for members in group_by_seed(label_runs(runs)).values()] == [1, 1]


def test_the_command_ends_with_its_status_and_imports_matplotlib_only_to_draw(tmp_path: Path) -> None:
    code = (
        "import runpy, sys\n"
        "try:\n"
        "    runpy.run_module('pisa_dist.report', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end:\n"
        "    print(end.code, 'matplotlib' in sys.modules)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "missing")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "2 False\n"
    assert done.stderr == f"error: {tmp_path / 'missing'} is not a directory\n"


def test_accuracy_is_drawn_against_rounds_data_sent_and_passes(tmp_path: Path) -> None:
    figure = draw(figures.draw_accuracy, make_run(tmp_path / "run"))
    panels = figure.axes
    assert [panel.get_xlabel() for panel in panels] == [
        "Round",
        "Data sent (kB)",
        "Passes over the training data",
    ]
    horizontal = [panel.lines[0].get_xdata()[-1] for panel in panels]
    np.testing.assert_allclose(np.array(horizontal, dtype=float), [30, 120, 30])
    np.testing.assert_allclose(np.asarray(panels[0].lines[0].get_ydata()), [10, 30, 50, 70])


def test_a_run_has_one_colour_in_every_figure(tmp_path: Path) -> None:
    plain = make_run(tmp_path / "fedavg")
    lines = [metrics_line(done, primal_residual=0.1 / done) for done in (1, 2)]
    admm = make_run(tmp_path / "pisa", lines)
    accuracy = draw(figures.draw_accuracy, plain, admm)
    residuals = draw(figures.draw_residuals, plain, admm)
    colours = [line.get_color() for line in accuracy.axes[0].lines]
    assert len(set(colours)) == 2
    assert [line.get_color() for line in residuals.axes[0].lines] == [colours[1]]


def test_forty_nine_runs_are_told_apart(tmp_path: Path) -> None:
    run = load_run(make_run(tmp_path / "run"))
    figure = figures.draw_accuracy({f"run {index}": run for index in range(49)})
    assert figure is not None
    assert len({(line.get_color(), line.get_marker()) for line in figure.axes[0].lines}) == 49


def test_data_sent_is_logarithmic_only_where_runs_differ_by_magnitudes(tmp_path: Path) -> None:
    many, few = make_run(tmp_path / "many"), make_run(tmp_path / "few", [metrics_line(1), metrics_line(2)])
    together = draw(figures.draw_accuracy, many, few).axes[1]
    assert together.get_xscale() == "log"
    assert together.get_xlabel() == "Data sent (kB), log scale"
    assert all(np.all(np.asarray(line.get_xdata()) > 0) for line in together.lines)
    assert draw(figures.draw_accuracy, many).axes[1].get_xscale() == "linear"


def test_a_diverging_run_does_not_flatten_the_others(tmp_path: Path) -> None:
    good = make_run(tmp_path / "good")
    lost = [metrics_line(0), metrics_line(10, train_loss=1e12), metrics_line(20, train_loss=float("nan"))]
    panel = draw(figures.draw_loss, good, make_run(tmp_path / "lost", lost)).axes[0]
    assert panel.get_ylim()[1] == pytest.approx(3 * 2.2)
    assert panel.get_yscale() == "log"


def test_loss_is_linear_while_its_range_is_small(tmp_path: Path) -> None:
    lines = [metrics_line(done, train_loss=1.0 + 1 / (done + 1), test_loss=None) for done in range(4)]
    panel = draw(figures.draw_loss, make_run(tmp_path / "run", lines)).axes[0]
    assert (panel.get_yscale(), panel.get_ylabel()) == ("linear", "Loss")


def test_residuals_show_only_runs_and_panels_with_positive_values(tmp_path: Path) -> None:
    lines = [metrics_line(done, primal_residual=value) for done, value in [(0, 0.0), (1, 0.5), (2, 0.25)]]
    figure = draw(figures.draw_residuals, make_run(tmp_path / "a"), make_run(tmp_path / "b", lines))
    (panel,) = figure.axes
    assert panel.get_title() == "Primal residual"
    (line,) = panel.lines
    np.testing.assert_array_equal(np.asarray(line.get_ydata()), [0.5, 0.25])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["b"]
    assert figures.draw_residuals({"a": load_run(tmp_path / "a")}) is None


def test_a_small_split_is_drawn_with_its_counts_and_skew(tmp_path: Path) -> None:
    panel = draw(figures.draw_split, make_run(tmp_path / "run", counts=[[50, 0, 3], [0, 47, 0]])).axes[0]
    np.testing.assert_array_equal(np.asarray(panel.images[0].get_array()), [[50, 0], [0, 47], [3, 0]])
    assert sorted(text.get_text() for text in panel.texts) == ["3", "47", "50"]
    assert panel.get_title() == "Split label_k (skew: Hellinger 0.54, Jensen-Shannon 0.69)"


def test_data_without_classes_have_no_split_figure(tmp_path: Path) -> None:
    run = load_run(make_run(tmp_path / "text", counts=[[], []]))
    assert figures.draw_split({"text": run}) is None


def test_a_thousand_workers_are_ordered_by_class_and_carry_no_text(tmp_path: Path) -> None:
    counts = [[9 if label == worker % 10 else 0 for label in range(10)] for worker in range(1000)]
    panel = draw(figures.draw_split, make_run(tmp_path / "run", counts=counts)).axes[0]
    picture = np.asarray(panel.images[0].get_array())
    assert picture.shape == (10, 1000)
    assert (np.diff(picture.argmax(axis=0)) >= 0).all()
    assert not panel.texts
    assert panel.get_xlabel() == "1,000 workers, ordered by their largest class"


def test_one_huge_shard_among_a_thousand_does_not_fade_the_others(tmp_path: Path) -> None:
    counts = [[10, 0] for _ in range(999)] + [[0, 50_000]]
    panel = draw(figures.draw_split, make_run(tmp_path / "run", counts=counts)).axes[0]
    assert panel.images[0].get_clim() == (0, 10)


def test_many_classes_do_not_crowd_the_axis(tmp_path: Path) -> None:
    counts = [[1] * 100 for _ in range(3)]
    panel = draw(figures.draw_split, make_run(tmp_path / "run", counts=counts)).axes[0]
    assert len(panel.get_yticks()) < 20
    assert all(tick == int(tick) for tick in panel.get_yticks())


def test_runs_of_the_same_split_share_a_heat_map_and_others_are_named(tmp_path: Path) -> None:
    same = [make_run(tmp_path / name) for name in ("a", "b")]
    assert len(draw(figures.draw_split, *same).axes) == 2  # heat map and colour bar
    other = [make_run(tmp_path / f"other{size}", counts=[[size, 1], [1, 1]]) for size in range(2, 7)]
    figure = draw(figures.draw_split, *same, *other)
    titles = [panel.get_title().split("\n")[0] for panel in figure.axes if panel.get_title()]
    assert titles == ["a, b", "other2", "other3", "other4"]
    assert figure.get_supxlabel() == "2 more splits are not shown"
