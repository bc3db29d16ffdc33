"""`python -m pisa_dist.benchmark heterogeneity [--protocol quick|niid] [--data A,B] ... --out DIR`."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from pisa_dist.benchmark.heterogeneity import how_to_go_on, make_plan, run_grid
from pisa_dist.benchmark.methods import METHODS, check_methods
from pisa_dist.benchmark.protocols import PROTOCOLS, make_cells
from pisa_dist.benchmark.report import write_report
from pisa_dist.benchmark.results import Results

SPLITS = "label_1,label_2,dirichlet_0.1,dirichlet_0.5,noise_0.1,iid"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage that argparse puts before it."""
        self.exit(2, f"error: {message}\n")


class _Stopped(BaseException):
    """SIGTERM."""


def make_parser() -> argparse.ArgumentParser:
    """The command line; lists are separated by commas."""
    parser = _Parser(prog="python -m pisa_dist.benchmark", description="Methods against each other.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="BENCHMARK")
    grid = commands.add_parser(
        "heterogeneity",
        help="methods on workers whose data differ and who are not always there",
        description="A grid of data, splits, participation, methods and seeds; each method is tuned alike.",
    )
    grid.add_argument("--protocol", default="quick", help="quick (default) or niid")
    grid.add_argument("--data", default="fashion_mnist", type=_list, help="default fashion_mnist")
    grid.add_argument("--split", default=SPLITS, type=_list, help=f"default {SPLITS}")
    grid.add_argument("--participation", default="1,0.3", type=_list, help="shares of the workers, default 1,0.3")
    grid.add_argument("--method", default=",".join(METHODS), type=_list, help=f"default all: {', '.join(METHODS)}")
    grid.add_argument("--seeds", type=int, metavar="N", help="seeds 0..N-1 are scored; default: the protocol's")
    grid.add_argument("--jobs", type=int, metavar="N", help="processes, default one for each core")
    grid.add_argument("--out", type=Path, metavar="DIR", help="default runs/heterogeneity-PROTOCOL")
    grid.add_argument("--report-only", action="store_true", help="write the report of the results that are there")
    grid.add_argument("--set", default=[], action="append", metavar="KEY=VALUE", help="override of all runs")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the grid and write the report.

    Returns:
        0; 1 if not a single run succeeded; 2 after bad input, with one line on stderr; 130 or 143 after Ctrl-C or
        SIGTERM, with one line that says how to go on.
    """
    options = make_parser().parse_args(argv)
    folder = options.out or Path("runs", f"heterogeneity-{options.protocol}")
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        return _report(folder) if options.report_only else _run(options, folder)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, _Stopped) as stopped:
        print(how_to_go_on(folder), flush=True)
        return 143 if isinstance(stopped, _Stopped) else 130
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(options: argparse.Namespace, folder: Path) -> int:
    if options.protocol not in PROTOCOLS:
        raise ValueError(f"--protocol must be one of {', '.join(PROTOCOLS)}, got {options.protocol!r}")
    protocol = PROTOCOLS[options.protocol]
    check_methods(options.method)
    cells = make_cells(protocol, options.data, options.split, [_number(text) for text in options.participation])
    jobs = _cores() if options.jobs is None else options.jobs
    if jobs < 1:
        raise ValueError(f"--jobs must be >= 1, got {jobs}")
    num_seeds = protocol.num_seeds if options.seeds is None else options.seeds
    results = Results(folder)
    plan = make_plan(protocol, cells, options.method, num_seeds, options.set)
    with results.claimed({"protocol": protocol.name, "set": list(options.set)}):
        total, num_failed = run_grid(plan, results, jobs)
        status = _report(folder)
    print(f"{total} runs, {num_failed} of those of this session failed")
    return status


def _report(folder: Path) -> int:
    results = Results(folder)
    records = results.read()
    if not records:
        raise ValueError(f"--out {folder} holds no results yet")
    page = write_report(folder, records, results.grid())
    print(f"report: {page}")
    return 0 if any(record["status"] == "ok" for record in records) else 1


def _list(text: str) -> list[str]:
    items = [item.strip() for item in text.split(",")]
    if "" in items:
        raise argparse.ArgumentTypeError(f"an empty name in {text!r}")
    return list(dict.fromkeys(items))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--participation must be numbers in (0, 1], got {text!r}") from None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _stop(number: int, frame: FrameType | None) -> None:
    raise _Stopped


if __name__ == "__main__":
    sys.exit(main())
