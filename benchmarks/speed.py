"""How fast PISA's optimizers are next to DDP with AdamW or Muon: time, memory, bytes on the wire, time to a loss.

    PISA_DATA=<folder with tinyshakespeare/ and cifar10/> python benchmarks/speed.py [--quick] [--cases 'step/gpt/*']

Every figure is a ratio, ours over the baseline's, of measurements that alternate in one run (below 1: ours is less).
Updates speed/results.json case by case and keeps the cases that are not run; speed/README.md explains the cases.
"""

import argparse
import json
import os
import platform
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from pisa_dist.rundir import commit

FOLDER = Path(__file__).resolve().with_name("speed")
sys.path.insert(0, str(FOLDER))

from cases import Options, cases  # noqa: E402 - the folder must be on the path
from ranks import Skipped  # noqa: E402


def machine() -> str:
    """Processor, its number of cores and vector instructions, GPUs, system and torch."""
    found = [line.partition(":")[2].strip() for line in _read("/proc/cpuinfo") if line.startswith("model name")]
    processor = found[0] if found else platform.machine()
    parts = [f"{os.cpu_count()} x {processor}, {torch.backends.cpu.get_cpu_capability()}"]
    if torch.cuda.is_available():
        parts.append(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}")
    return ", ".join([*parts, platform.system(), f"torch {torch.__version__}"])


def _read(file: str) -> list[str]:
    return Path(file).read_text().splitlines() if Path(file).exists() else []


def record(file: Path, entries: dict[str, dict[str, Any]]) -> None:
    """Put entries into the file and keep its others; the file is whole at every moment."""
    known = json.loads(file.read_text()) if file.exists() else {}
    fresh = file.with_suffix(".new")
    fresh.write_text(json.dumps(dict(sorted({**known, **entries}.items())), indent=1) + "\n")
    fresh.replace(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["*"], metavar="PATTERN", help="which, as shell patterns")
    parser.add_argument("--list", action="store_true", help="print the cases' names and stop")
    parser.add_argument("--missing", action="store_true", help="leave out cases that this commit has measured")
    parser.add_argument("--quick", action="store_true", help="short and rough: does everything run?")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each method where a loss is compared")
    parser.add_argument("--results", type=Path, default=FOLDER / "results.json")
    arguments = parser.parse_args()
    chosen = [case for case in cases() if any(fnmatchcase(case.name, pattern) for pattern in arguments.cases)]
    if not chosen:
        parser.error(f"no case is called {' or '.join(arguments.cases)}: see --list")
    if arguments.list:
        print("\n".join(case.name for case in chosen))
        return
    known = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
    done = {name for name, entry in known.items() if entry["commit"] == commit()}
    print(f"{'case':58} {'ours':>10} {'baseline':>10} {'ratio':>6}  (lowest to highest)")
    for case in chosen:
        if arguments.missing and any(name == case.name or name.startswith(f"{case.name}/") for name in done):
            continue
        load = os.getloadavg()[0]
        try:
            entries = case.run(Options(quick=arguments.quick, seeds=arguments.seeds))
        except Skipped as reason:
            print(f"{case.name:58} skipped: {reason}", flush=True)
            continue
        named = {f"{case.name}/{key}" if key else case.name: entry for key, entry in entries.items()}
        for name, entry in named.items():
            entry |= {"machine": machine(), "load_average": load, "commit": commit(), "quick": arguments.quick}
            span = f"({entry['lowest']:.3f} to {entry['highest']:.3f}, {entry['runs']} runs)"
            values = f"{entry['ours']:10.4g} {entry['baseline']:10.4g} {entry['ratio']:6.3f}"
            print(f"{name:58} {values}  {span} {entry['unit']}", flush=True)
        record(arguments.results, named)


if __name__ == "__main__":
    main()
