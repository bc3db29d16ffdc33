"""Small grids of the heterogeneity benchmark."""

from typing import Any

from pisa_dist.benchmark.grid import Plan
from pisa_dist.benchmark.protocols import PROTOCOLS, Cell

QUICK = PROTOCOLS["quick"]

CELL, OTHER, THIRD = Cell("digits", "label_1", 1.0), Cell("digits", "iid", 0.3), Cell("digits", "label_2", 0.3)

TINY = ("data.num_train=200", "model.hidden_sizes=[8]", "rounds=3", "eval_every=2", "local_steps=2", "batch_size=20")


def plan(*methods: str, cells: tuple[Cell, ...] = (CELL,), num_seeds: int = 2, extra: tuple[str, ...] = ()) -> Plan:
    return Plan(QUICK, cells, methods, range(num_seeds), {"digits": 1437}, extra)


def record(cell: Cell, method: str, seed: int, last: float | None, phase: str = "score", **more: Any) -> dict[str, Any]:
    best = None if last is None else last + 0.01
    return {
        "dataset": cell.dataset,
        "split": cell.split,
        "participation": cell.participation,
        "method": method,
        "phase": phase,
        "setting": [],
        "seed": seed,
        "overrides": [f"{cell}", method, f"seed={seed}"],
        "rounds": 4,
        "passes": 8.0,
        "bytes_sent": 1000,
        "seconds": 1.0,
        "last_accuracy": last,
        "best_accuracy": best,
        "status": "failed" if last is None else "ok",
        "error": "FloatingPointError: a NaN" if last is None else None,
        "accuracies": [] if last is None else [[2, last + 0.01], [4, last]],
        "protocol": "quick",
        "commit": "0" * 40,
        **more,
    }
