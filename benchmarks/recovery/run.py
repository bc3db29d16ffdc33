"""100 kills: a training that loses a random rank at a random moment, restarted on a random number of ranks.

    python benchmarks/recovery/run.py [--kills 100] [--work FOLDER] [--seed 0]

10 workers with one digit class each, SISA, float64. Trainings of 600 rounds with an asynchronous checkpoint every 10
rounds are killed 10 times each: kill -9 of a random rank, half a second or less after the first round of a session, or,
one time in five, within three seconds of the launch, before there is one. A supervisor ends the other ranks as torchrun
does (SIGTERM, later SIGKILL) and starts 2 to 4 ranks anew with resume=auto. When a training is through, its weights,
duals, other state and metrics are compared with those of a run on one rank that nobody disturbed.

Writes results.json beside this file. With --work, kills that were measured before are kept and the rest is done.
"""

import argparse
import json
import os
import platform
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from pisa_dist import checkpoint
from pisa_dist.rundir import commit

ROUNDS, EVERY, KILLS_PER_TRAINING, RANKS = 600, 10, 10, (2, 3, 4)
SETTINGS = (
    "experiment=digits_label1",
    f"rounds={ROUNDS}",
    "num_workers=10",
    "dtype=float64",
    "eval_every=1",
    f"checkpoint.every={EVERY}",
    "timeout_seconds=60",
)
DEADLINE = 600.0  # seconds for a session to come to its next round
GRACE = 30.0  # seconds between SIGTERM and SIGKILL, torchrun's
TOLERANCE = 1e-10


class Session:
    """One launch of the command line on several ranks; `end` leaves no process behind."""

    def __init__(self, run_dir: Path, num_ranks: int) -> None:
        self.metrics = run_dir / "metrics.jsonl"
        self.before = identity(self.metrics)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        own = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, "-m", "pisa_dist.train", *SETTINGS, f"run_dir={run_dir}", "resume=auto"]
        self.log = (run_dir.parent / "log").open("a")
        self.processes = [
            subprocess.Popen(
                command,
                env={**os.environ, **own, "RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(num_ranks)},
                stdout=subprocess.DEVNULL,
                stderr=self.log,
            )
            for r in range(num_ranks)
        ]

    def wait_for_a_round(self) -> None:
        """Until this session has finished a round: it puts a new metrics.jsonl in place, then adds lines."""
        deadline = time.monotonic() + DEADLINE
        first = None
        while first is None or len(rounds_of(self.metrics)) <= first:
            if any(process.poll() not in (None, 0) for process in self.processes) or time.monotonic() > deadline:
                raise RuntimeError(f"no round was finished, see {self.log.name}")
            if first is None and identity(self.metrics) != self.before:
                first = newest_round(self.metrics.parent)
            time.sleep(0.005)

    def is_over(self) -> bool:
        return all(process.poll() is not None for process in self.processes)

    def wait(self) -> None:
        """Until it ends by itself, which must be well."""
        statuses = [process.wait(timeout=DEADLINE) for process in self.processes]
        if any(statuses):
            raise RuntimeError(f"ended with {statuses}, see {self.log.name}")

    def end(self) -> int:
        """End what is left, as torchrun does; how many had to be killed."""
        for process in self.processes:
            process.terminate()
        deadline, num_killed = time.monotonic() + GRACE, 0
        for process in self.processes:
            try:
                process.wait(timeout=max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                num_killed += 1
        self.log.close()
        return num_killed


def identity(file: Path) -> int | None:
    return file.stat().st_ino if file.exists() else None


def rounds_of(metrics: Path) -> list[int]:
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    return [json.loads(line)["round"] for line in lines if line.endswith("\n")]


def newest_round(run_dir: Path) -> int:
    whole = [path for path in checkpoint.complete(run_dir) if checkpoint.damage(path) is None]
    return checkpoint.read_contents(whole[0])["round"] if whole else 0


def state_of(run_dir: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint: weights, duals and other state of every worker, counters."""
    path = checkpoint.complete(run_dir)[0]
    return {key: checkpoint._read_alone(path, key) for key in checkpoint._tensor_keys(path)}


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-300))


def compare(run_dir: Path, reference: Path) -> dict:
    """How far a training ended from the undisturbed one."""
    mine, theirs = state_of(run_dir), state_of(reference)
    timed = "counters/seconds"
    largest = dict.fromkeys(("weights", "dual", "other"), 0.0)
    lost = len(set(theirs) - set(mine))
    for key in (set(mine) & set(theirs)) - {timed}:
        kind = "weights" if key.startswith("weights/") else "dual" if key.endswith("/dual") else "other"
        apart = difference(mine[key], theirs[key])
        largest[kind] = max(largest[kind], apart)
        lost += kind == "dual" and not apart <= TOLERANCE
    lines, expected = ([json.loads(x) for x in (d / "metrics.jsonl").open()] for d in (run_dir, reference))
    is_once = [line["round"] for line in lines] == [line["round"] for line in expected]
    metric = max(
        (abs(line[key] - wanted[key]) / max(abs(wanted[key]), 1e-300))
        for line, wanted in zip(lines, expected, strict=is_once)
        for key in wanted
        if key != "seconds" and wanted[key]
    )
    duals = sum(key.endswith("/dual") for key in theirs)
    is_equal = is_once and metric <= TOLERANCE and all(apart <= TOLERANCE for apart in largest.values())
    return {
        "equal": is_equal,
        "every_round_once": is_once,
        "duals": duals,
        "duals_lost": lost,
        "largest_difference": {**largest, "metrics": metric},
    }


def one_training(folder: Path, reference: Path, generator: random.Random, num_kills: int) -> dict:
    """Kill a training up to `num_kills` times, let it end, compare."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    run_dir, kills = folder / "run", []
    session = Session(run_dir, generator.choice(RANKS))
    try:
        while len(kills) < num_kills:
            is_early = generator.random() < 0.2
            if not is_early:
                session.wait_for_a_round()
            time.sleep(generator.uniform(0.0, 3.0 if is_early else 0.5))
            if session.is_over():
                break
            victim = generator.randrange(len(session.processes))
            session.processes[victim].send_signal(signal.SIGKILL)
            killed_at = time.monotonic()
            num_stuck = session.end()
            done, restart_from = max(rounds_of(session.metrics), default=0), newest_round(run_dir)
            num_ranks = len(session.processes)
            session = Session(run_dir, generator.choice(RANKS))
            if done < ROUNDS:
                session.wait_for_a_round()
            kills.append(
                {
                    "victim": victim,
                    "ranks": num_ranks,
                    "ranks_after": len(session.processes),
                    "early": is_early,
                    "round": done,
                    "rounds_repeated": done - restart_from,
                    "seconds_to_next_round": time.monotonic() - killed_at,
                    "survivors_that_needed_sigkill": num_stuck,
                }
            )
        session.wait()
    finally:
        session.end()
    return {"kills": kills, **compare(run_dir, reference)}


def summarise(trainings: list[dict]) -> dict:
    kills = [kill for training in trainings for kill in training["kills"]]
    seconds = sorted(kill["seconds_to_next_round"] for kill in kills)
    repeated = [kill["rounds_repeated"] for kill in kills]
    return {
        "kills": len(kills),
        "recovered": len(kills),  # a restart that comes to no round ends the benchmark
        "kills_before_the_first_round": sum(kill["early"] for kill in kills),
        "kills_of_rank_0": sum(kill["victim"] == 0 for kill in kills),
        "restarts_on_another_number_of_ranks": sum(kill["ranks"] != kill["ranks_after"] for kill in kills),
        "survivors_that_needed_sigkill": sum(kill["survivors_that_needed_sigkill"] for kill in kills),
        "trainings": len(trainings),
        "trainings_equal_to_undisturbed_1e-10": sum(training["equal"] for training in trainings),
        "largest_relative_difference": {
            kind: max(training["largest_difference"][kind] for training in trainings)
            for kind in trainings[0]["largest_difference"]
        },
        "duals_compared": sum(training["duals"] for training in trainings),
        "duals_lost": sum(training["duals_lost"] for training in trainings),
        "seconds_from_kill_to_next_round": {"median": median(seconds), "worst": seconds[-1]},
        "checkpoint_every": EVERY,
        "rounds_repeated": {"median": median(repeated), "worst": max(repeated)},
        "kills_that_repeated_more_than_an_interval": sum(number > EVERY for number in repeated),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="folder for runs, kept; a temporary one without it")
    arguments = parser.parse_args()
    work = arguments.work or Path(tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    reference, log = work / "reference", work / "trainings.jsonl"
    if not (reference / "summary.json").exists():
        shutil.rmtree(reference, ignore_errors=True)
        command = [sys.executable, "-m", "pisa_dist.train", *SETTINGS, f"run_dir={reference}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    trainings = [json.loads(line) for line in log.open()] if log.exists() else []
    while (missing := arguments.kills - sum(len(training["kills"]) for training in trainings)) > 0:
        generator = random.Random(f"{arguments.seed} {len(trainings)}")
        number = min(missing, KILLS_PER_TRAINING)
        trainings.append(one_training(work / "training", reference, generator, number))
        with log.open("a") as file:
            file.write(json.dumps(trainings[-1]) + "\n")
        print(f"{sum(len(t['kills']) for t in trainings)} kills, equal: {trainings[-1]['equal']}", flush=True)
    result = {
        "recovery": summarise(trainings),
        "machine": f"{os.cpu_count()} x {platform.machine()}, {platform.system()}, torch {torch.__version__}, gloo",
        "load_average": os.getloadavg()[0],
        "commit": commit(),
        "command": "python benchmarks/recovery/run.py",
    }
    file = Path(__file__).with_name("results.json")
    others = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**others, "kills": result}, indent=2) + "\n")
    for key, value in result["recovery"].items():
        shown = ", ".join(f"{k} {v:.3g}" for k, v in value.items()) if isinstance(value, dict) else value
        print(f"{key.replace('_', ' '):45} {shown}")
    if arguments.work is None:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
