"""Metrics reach Weights & Biases and TensorBoard files, and a missing package is one clear line."""

from __future__ import annotations

import json
import struct
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pisa_dist.tracking import NoTracker, TensorboardTracker, WandbTracker, check_tracking, make_tracker

LINES: list[dict[str, float | int | None]] = [
    {"round": 0, "train_loss": 2.25, "penalty": None},
    {"round": 5, "train_loss": 0.5, "penalty": 8.0},
]


def tensorboard_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def wandb_history(file: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Logged rows and configuration of an offline run, read from the file that `wandb sync` would send.

    A LevelDB log: a header of 7 bytes, then blocks of 32 KiB of fragments, each with checksum (4 bytes),
    length (2) and kind (1: whole, 2: first, 3: middle, 4: last part of a record).
    """
    from wandb.proto.wandb_internal_pb2 import Record

    content, position, payload = file.read_bytes(), 7, b""
    rows, config = [], {}
    while position + 7 <= len(content):
        if (left := 32768 - position % 32768) < 7:
            position += left  # too little for a fragment: the block is padded
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        if position + 7 + length > len(content):
            break  # being written
        payload += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            record, payload = Record.FromString(payload), b""
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            if record.HasField("history"):
                items = record.history.item
                rows.append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in items})
    return rows, config


def test_tensorboard_gets_each_value_at_its_round_and_no_nulls(tmp_path: Path) -> None:
    tracker = make_tracker("tensorboard", run_dir=tmp_path, config={})
    assert isinstance(tracker, TensorboardTracker)
    for line in LINES:
        tracker.log(line)
    tracker.finish()
    assert tensorboard_scalars(tmp_path / "tensorboard") == {
        "train_loss": [(0, 2.25), (5, 0.5)],
        "penalty": [(5, 8.0)],
    }


def test_tensorboard_values_are_on_disk_before_the_run_ends(tmp_path: Path) -> None:
    tracker = TensorboardTracker(tmp_path)
    tracker.log(LINES[1])
    assert tensorboard_scalars(tmp_path / "tensorboard")["train_loss"] == [(5, 0.5)]
    tracker.finish()


def test_wandb_offline_writes_the_run_below_the_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("WANDB_SILENT", "true")
    tracker = make_tracker("wandb", run_dir=run_dir, config={"rounds": 5}, project="p", run_name="n", mode="offline")
    for line in LINES:
        tracker.log(line)
    tracker.finish()
    (file,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + 30
    rows, config = wandb_history(file)
    while len(rows) < len(LINES) and time.monotonic() < deadline:
        time.sleep(0.05)  # wandb's own process may still be writing; only the interpreter's exit waits for it
        rows, config = wandb_history(file)
    assert [row["_step"] for row in rows] == [0, 5]
    assert [row["train_loss"] for row in rows] == [2.25, 0.5]
    assert ["penalty" in row for row in rows] == [False, True]
    assert config["rounds"] == 5
    assert not list(elsewhere.iterdir())


def test_wandb_without_a_login_is_refused_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def refuse(**_: Any) -> None:
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ValueError, match=r"No API key configured.*wandb login.*tracking\.mode=offline"):
        make_tracker("wandb", run_dir=tmp_path, config={}, mode="online")


def test_an_unknown_wandb_mode_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`tracking\.mode` must be one of online, offline, got 'dryrun'"):
        WandbTracker(project="p", name=None, mode="dryrun", run_dir=tmp_path, config={})


def test_without_tracking_nothing_is_written(tmp_path: Path) -> None:
    tracker = make_tracker("none", run_dir=tmp_path, config={})
    assert isinstance(tracker, NoTracker)
    tracker.log(LINES[0])
    tracker.finish()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_missing_package_is_refused_early_with_the_command_that_installs_it(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    check_tracking(name)
    monkeypatch.setitem(sys.modules, name, None)  # how Python itself marks a module as not importable
    with pytest.raises(ValueError, match=rf'pip install "pisa-dist\[{name}\]"') as refusal:
        check_tracking(name)
    assert "\n" not in str(refusal.value)
    with pytest.raises(ValueError, match="pip install"):
        make_tracker(name, run_dir=tmp_path, config={}, mode="offline")


def test_a_folder_that_wandb_left_behind_is_not_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ValueError, match="pip install"):
        check_tracking("wandb")


def test_an_unknown_tracker_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="`tracking` must be one of none, wandb, tensorboard, got 'mlflow'"):
        check_tracking("mlflow")


def test_metrics_without_a_round_are_refused(tmp_path: Path) -> None:
    tracker = TensorboardTracker(tmp_path)
    with pytest.raises(ValueError, match="`round`"):
        tracker.log({"round": None, "train_loss": 1.0})
    tracker.finish()
