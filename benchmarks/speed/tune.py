"""Step sizes for the trainings of cases.py, every method with its own grid; a line of tuning.jsonl for each run.

    PISA_DATA=<folder with tinyshakespeare/ and cifar10/> python benchmarks/speed/tune.py [--model gpt] [--methods sisa]

Two ranks on one machine, seed 100, which no case uses. Runs that tuning.jsonl already has are not repeated; `--table`
prints what there is, best first.
"""

import argparse
import json
import math
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from ranks import run_ranks
from settings import TRAINING, TUNING

FILE = Path(__file__).with_name("tuning.jsonl")
SEED = 100

Settings = dict[str, Any]


def _grid(**axes: list[Any]) -> Iterator[Settings]:
    """All combinations; an axis `rest_x` is setting x of vectors, embeddings and the last layer."""
    for values in product(*axes.values()):
        settings: Settings = {}
        for name, value in zip(axes, values, strict=True):
            where = settings.setdefault("rest", {}) if name.startswith("rest_") else settings
            where[name.removeprefix("rest_")] = value
        yield settings


GRIDS: dict[str, dict[str, list[Settings]]] = {
    "gpt": {
        "adamw_fused": [*_grid(lr=[2e-4, 3e-4, 5e-4, 1e-3, 2e-3])],
        "muon": [],
        "sisa": [*_grid(penalty=[1.0], preconditioner_scale=[3000.0, 10000.0])],
        "nsisa": [
            *_grid(penalty=[35.0, 70.0], rest_penalty=[0.3], rest_preconditioner_scale=[100.0]),
            *_grid(penalty=[70.0], rest_penalty=[3.0], rest_preconditioner_scale=[300.0]),
            *_grid(penalty=[100.0], rest_penalty=[1.0], rest_preconditioner_scale=[300.0, 3000.0, 10000.0]),
            *_grid(penalty=[70.0, 150.0], rest_penalty=[1.0], rest_preconditioner_scale=[3000.0]),
            *_grid(penalty=[100.0], rest_penalty=[3.0], rest_preconditioner_scale=[10000.0]),
        ],
    },
    "gpt_small": {
        "adamw_fused": [*_grid(lr=[1e-3, 3e-3, 1e-2])],
        "muon": [*_grid(lr=[0.02, 0.05], rest_lr=[1e-3, 3e-3])],
        "sisa": [
            *_grid(penalty=[0.1, 0.3, 1.0], preconditioner_scale=[10.0, 100.0, 1000.0]),
            *_grid(penalty=[0.1, 0.3], preconditioner_scale=[3000.0, 10000.0]),
        ],
        "nsisa": [
            *_grid(penalty=[20.0, 35.0, 50.0, 70.0], rest_penalty=[0.3], rest_preconditioner_scale=[100.0]),
            *_grid(penalty=[20.0, 50.0], rest_penalty=[1.0], rest_preconditioner_scale=[100.0]),
            *_grid(penalty=[50.0], rest_penalty=[0.1], rest_preconditioner_scale=[100.0, 300.0]),
            *_grid(penalty=[50.0], momentum=[0.8, 0.98], rest_penalty=[0.3], rest_preconditioner_scale=[100.0]),
            *_grid(
                penalty=[50.0],
                preconditioner_scale=[100.0, 500.0, 2000.0],
                rest_penalty=[0.3],
                rest_preconditioner_scale=[1000.0],
            ),
        ],
    },
    "cnn": {
        "adamw_fused": [*_grid(lr=[3e-4, 1e-3, 3e-3, 1e-2])],
        "muon": [*_grid(lr=[0.01, 0.02, 0.05, 0.1], rest_lr=[1e-3])],
        "sisa": [
            *_grid(penalty=[3.0, 10.0], preconditioner_scale=[30.0, 300.0]),
            *_grid(penalty=[0.3, 1.0], preconditioner_scale=[300.0, 1000.0]),
        ],
        "nsisa": [
            *_grid(penalty=[20.0, 50.0], rest_penalty=[1.0], rest_preconditioner_scale=[300.0]),
            *_grid(penalty=[10.0], rest_penalty=[1.0], rest_preconditioner_scale=[300.0]),
        ],
    },
}


def known(model: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in FILE.read_text().splitlines()] if FILE.exists() else []
    return [line for line in lines if line["model"] == model]


def _training(model: str) -> dict[str, Any]:
    return {**TRAINING[model], **TUNING[model]}


def tune(model: str, method: str, settings: Settings) -> dict[str, Any]:
    """Train once; what the table needs."""
    training = _training(model)
    chosen = {"name": method, "settings": settings}
    found = run_ranks("train", {**training, "model": model, "methods": [chosen], "seed": SEED})["methods"][0]
    return {
        "model": model,
        "method": method,
        "settings": settings,
        "training": training,
        "steps_done": len(found["losses"]),
        "training_loss": _finite(found["smoothed"][-1]) if found["smoothed"] else None,
        "validation_loss": _finite(found["validation"]),
        "smoothed_every_20": [_finite(loss) for loss in found["smoothed"][19::20]],
        "seconds": found["seconds"][-1] if found["seconds"] else None,
    }


def _finite(value: float) -> float | None:
    return round(value, 5) if math.isfinite(value) else None


def table(model: str) -> None:
    """Markdown, a line per run, best first within a method: fewest steps to the target, or lowest validation loss."""
    target = TUNING[model].get("target")
    kinds = f"steps to {target} |" if target else "training loss | validation loss |"
    print(f"| method | settings | {kinds}\n| --- | --- |{' --- |' * kinds.count('|')}")
    lines = known(model)
    for method in GRIDS[model]:
        own = [line for line in lines if line["method"] == method]
        for line in sorted(own, key=lambda line: _rank(line, target)):
            rest = line["settings"].get("rest", {})
            parts = [f"{k} {v:g}" for k, v in line["settings"].items() if k != "rest"]
            parts += [f"rest: {k} {v:g}" for k, v in rest.items()]
            print(f"| {method} | {', '.join(parts).replace('_', ' ')} | {_outcome(line, target)} |")


def _rank(line: dict[str, Any], target: float | None) -> tuple[float, float]:
    """Sorts runs, best first: those that reached the target by their steps, others behind them by their loss."""
    if target is None:
        return (0.0, line["validation_loss"] or math.inf)
    loss = line["training_loss"] or math.inf
    return (line["steps_done"], loss) if loss <= target else (math.inf, loss)


def _outcome(line: dict[str, Any], target: float | None) -> str:
    if target is None:
        losses = [line["training_loss"], line["validation_loss"]]
        return " | ".join("diverged" if line["validation_loss"] is None else f"{loss:.3f}" for loss in losses)
    loss = line["training_loss"]
    if loss is None:
        return "diverged"
    return f"{line['steps_done']}" if loss <= target else f"{loss:.2f} after {line['steps_done']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=GRIDS, default="gpt")
    parser.add_argument("--methods", nargs="+", choices=GRIDS["gpt"], default=list(GRIDS["gpt"]))
    parser.add_argument("--table", action="store_true", help="print the table of all runs and stop")
    arguments = parser.parse_args()
    if arguments.table:
        table(arguments.model)
        return
    done = [(line["method"], line["settings"], line["training"]) for line in known(arguments.model)]
    for method in arguments.methods:
        for settings in GRIDS[arguments.model][method]:
            if (method, settings, _training(arguments.model)) in done:
                continue
            line = tune(arguments.model, method, settings)
            with FILE.open("a") as file:
                file.write(json.dumps(line) + "\n")
            losses = f"training {line['training_loss']}, validation {line['validation_loss']}"
            print(f"{method} {settings}: {losses}, {line['steps_done']} steps", flush=True)


if __name__ == "__main__":
    main()
