"""Worker updates per second of this package's trainer, of pfl and of Flower, at 10, 100 and 1,000 workers.

    python benchmarks/simulation/run.py [--pfl-python PATH] [--flwr-python PATH] [--repeats 5] [--workers 10 100 1000]

A worker update is one local step of one worker on its own minibatch, its part of the aggregation included: the same
network (64-64-10), digits, 32 samples, for all. The systems take turns, each time in a fresh process; the first rounds
of a process do not count. A process' rate is that of its median round, a system's the median over the processes. Rates
are by wall time; by processor time too where one process does all the work, which other programs disturb less.
Writes results.json beside this file; rows of other numbers of workers stay in it.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median

FOLDER = Path(__file__).parent
WORKERS = (10, 100, 1000)
WARM_UP = 2
KINDS = ("wall", "processor")


@dataclass(frozen=True)
class System:
    """What to start, and how many rounds at each number of workers; None where it is not installed."""

    name: str
    python: str | None
    script: str
    rounds: tuple[int, int, int]
    arguments: tuple[str, ...] = ()

    def seconds(self, num_workers: int) -> dict[str, float]:
        """The median round of one process, by wall and by processor time."""
        count = WARM_UP + self.rounds[WORKERS.index(num_workers)]
        command = [str(self.python), str(FOLDER / self.script), str(num_workers), str(count), *self.arguments]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER.parents[1])},
        )
        if done.returncode:
            raise RuntimeError(f"{self.name} failed:\n{done.stderr[-2000:]}")
        found = json.loads(done.stdout.splitlines()[-1])
        return {kind: median(times[WARM_UP:]) for kind, times in found.items()}


def packages(python: str | None, *names: str) -> dict[str, str]:
    code = f"from importlib.metadata import version; print(*map(version, {names!r}))"
    if python is None:
        return {}
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return dict(zip(names, done.stdout.split(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pfl-python", help="interpreter of an environment with pfl[pytorch]")
    parser.add_argument("--flwr-python", help="interpreter of an environment with flwr[simulation] and torch")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", choices=WORKERS, default=WORKERS)
    options = parser.parse_args()
    own = [
        System(
            f"pisa_dist {method}, vectorize={vectorize}", sys.executable, "with_pisa.py", rounds, (method, vectorize)
        )
        for method in ("fedavg", "sisa")
        for vectorize, rounds in (("auto", (300, 100, 20)), ("true", (300, 100, 20)), ("false", (100, 20, 5)))
    ]
    pfl = System("pfl fedavg", options.pfl_python, "with_pfl.py", (50, 10, 4))
    flwr = System("flwr fedavg", options.flwr_python, "with_flwr.py", (10, 5, 3))
    systems = [*own, pfl, flwr]
    installed = [system for system in systems if system.python is not None]
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    versions = {
        "torch": version("torch"),
        "pfl": packages(options.pfl_python, "pfl", "torch"),
        "flwr": packages(options.flwr_python, "flwr", "ray", "torch"),
    }
    file = FOLDER / "results.json"
    rows = {row["num_workers"]: row for row in json.loads(file.read_text())["rows"]} if file.exists() else {}
    for num_workers in options.workers:
        turns: dict[str, list[dict[str, float]]] = {system.name: [] for system in installed}
        loads = []
        for _ in range(options.repeats):
            loads.append(round(os.getloadavg()[0], 1))
            for system in installed:
                turns[system.name].append(system.seconds(num_workers))
        rates = {
            name: {kind: [round(num_workers / turn[kind]) for turn in taken] for kind in KINDS}
            for name, taken in turns.items()
        }
        row = {
            "num_workers": num_workers,
            "repeats": options.repeats,
            "machine": machine,
            "versions": versions,
            "load_average": loads,
            "updates_per_second": {
                kind: {
                    system.name: {"median": round(median(rates[system.name][kind])), "all": rates[system.name][kind]}
                    if system in installed
                    else "not installed"
                    for system in systems
                    if kind == "wall" or system is not flwr
                }
                for kind in KINDS
            },
            "ratios": {
                kind: {
                    f"{mine.name} / {other.name}": round(
                        median(rates[mine.name][kind]) / median(rates[other.name][kind]), 1
                    )
                    for mine in own
                    if "auto" in mine.name
                    for other in (pfl, flwr, own[own.index(mine) + 2])
                    if other in installed and (kind == "wall" or other is not flwr)
                }
                for kind in KINDS
            },
        }
        print(json.dumps(row, indent=1), flush=True)
        rows[num_workers] = row
    file.write_text(json.dumps({"rows": [rows[num_workers] for num_workers in sorted(rows)]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
