"""What the grid leaves open: absent workers at equal passes, one worker in ten, stragglers, many workers.

    export PISA_DATA=<folder with fashion-mnist/>
    python benchmarks/heterogeneity/studies.py passes few stragglers budgets workers

Fashion-MNIST, 10,000 training samples, MLP, as in protocol quick. Baselines take the settings that the grid chose for
the same split at 30 % participation (results.jsonl beside this file), PISA its default. A line per run in
studies.jsonl, a table of each study in studies.md. `--method pisa` runs it alone and keeps the others' lines.
"""

import argparse
import json
import resource
import time
from pathlib import Path
from statistics import mean, stdev

import torch

from pisa_dist.benchmark.methods import METHODS, label
from pisa_dist.benchmark.pool import Pool
from pisa_dist.benchmark.protocols import LOCAL, LOCAL_STEPS, PROTOCOLS, Cell
from pisa_dist.benchmark.results import Results
from pisa_dist.benchmark.summary import choices
from pisa_dist.runner import load_data, trainer_alone
from pisa_dist.train import compose_config

HERE = Path(__file__).parent
LINES = HERE / "studies.jsonl"
PROTOCOL = PROTOCOLS["quick"]
NUM_TRAIN = 10_000
SEEDS = (0, 1, 2)
SPLITS = ("label_1", "label_2", "dirichlet_0.1", "dirichlet_0.5", "noise_0.1", "iid")
OURS = "pisa"
PERIODS = (10, 20, 30, 60)  # virtual times at which stragglers' accuracies are shown, in rounds of the median worker
BASELINES = ("synchronous_muon", "mifa", "feddyn")  # the least mean regret in the grid
# Log-normal speeds with this factor between the quartiles; the median worker makes one local step in a second.
SPEED_SPREAD = 4


def chosen_setting(method: str, split: str) -> list[str]:
    """What the grid chose for a method in this split at 30 % participation."""
    found = choices(Results(HERE).read(), PROTOCOL).get((Cell("fashion_mnist", split, 0.3), method))
    if found is None:
        raise ValueError(f"results.jsonl has no tuning of {method} in {split} at 30 %")
    return list(found.setting)


def overrides(method: str, split: str, participation: float, seed: int, *extra: str) -> list[str]:
    """A run's overrides; the later of two for one key counts."""
    kind = METHODS[method].kind
    setting = [] if METHODS[method].ours else chosen_setting(method, split)
    every = [
        *PROTOCOL.data_overrides(Cell("fashion_mnist", split, participation)),
        *METHODS[method].overrides,
        *setting,
        *PROTOCOL.step_overrides(kind, NUM_TRAIN),
        "device=cpu",
        f"seed={seed}",
        *extra,
    ]
    return list({item.partition("=")[0]: item for item in every}.values())


def train(task: tuple[dict[str, object], list[str]]) -> dict[str, object]:
    """One run: what it was, and accuracy by round and virtual second."""
    facts, arguments = task
    torch.set_num_threads(1)
    config = compose_config(arguments)
    data = load_data(config)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    trainer = trainer_alone(config, data)
    curve, started = [], time.perf_counter()
    for number, _, metrics in trainer.run():
        if metrics is not None:
            curve.append([number, metrics["test_accuracy"], metrics.get("virtual_seconds")])
    return {
        **facts,
        "overrides": arguments,
        "rounds": trainer.state.round_number,
        "passes": trainer.state.samples_seen / len(data.train),
        "num_steps": int(trainer.state.num_steps.sum()),
        "bytes_sent": trainer.state.bytes_sent,
        "seconds": time.perf_counter() - started,
        "peak_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "megabytes_before": before / 1024,
        "state_megabytes": sum(v.nbytes for kinds in trainer.state.workers.values() for v in kinds.values()) / 2**20,
        "last_accuracy": curve[-1][1],
        "curve": curve,
    }


def passes() -> list[tuple[dict[str, object], list[str]]]:
    """30 % of the workers for 100 rounds against everyone for 30: the same passes."""
    return [
        ({"study": "passes", "method": OURS, "split": split, "participation": p, "seed": seed},
         overrides(OURS, split, p, seed, f"rounds={rounds}", f"eval_every={rounds}"))
        for split in SPLITS
        for p, rounds in ((0.3, 100), (1.0, 30))
        for seed in SEEDS
    ]  # fmt: skip


def few() -> list[tuple[dict[str, object], list[str]]]:
    """One worker of ten in each round."""
    return [
        ({"study": "few", "method": method, "split": split, "participation": 0.1, "seed": seed},
         overrides(method, split, 0.1, seed))
        for split in SPLITS
        for method in (OURS, *BASELINES)
        for seed in SEEDS
    ]  # fmt: skip


def stragglers() -> list[tuple[dict[str, object], list[str]]]:
    """Everyone takes part, at unequal speeds: a consensus when the median worker is done, or when the slowest is.

    A one-step method's step takes all samples of a round, and so as long as the local steps of the others.
    """
    tasks = []
    for split in ("label_1", "dirichlet_0.5"):
        for method in (OURS, *BASELINES):
            steps = LOCAL_STEPS if METHODS[method].kind == LOCAL else 1
            for wait in ("median", "slowest"):
                for seed in SEEDS:
                    clock = [f"clock.speed_spread={SPEED_SPREAD}", "eval_every=1"]
                    clock += [f"clock.period={steps}"] if wait == "median" else []
                    facts = {"study": "stragglers", "method": method, "split": split, "seed": seed, "wait": wait}
                    tasks.append(({**facts, "steps": steps}, overrides(method, split, 1.0, seed, *clock)))
    return tasks


def budgets() -> list[tuple[dict[str, object], list[str]]]:
    """Waiting for the slowest, PISA with as many rounds as fit in a time, which its schedule then goes by.

    How many fit is read from the runs of `stragglers`.
    """
    runs = [x for x in kept_lines() if (x["study"], x["method"], x.get("wait")) == ("stragglers", OURS, "slowest")]
    if not runs:
        raise SystemExit("budgets needs PISA's runs of stragglers, and studies.jsonl has none: run that study first")
    tasks = []
    for run in runs:
        for budget in PERIODS[2:]:  # in less than those a few rounds fit at most
            rounds = sum(seconds <= budget * run["steps"] + 1e-9 for _, _, seconds in run["curve"])
            facts = {**{key: run[key] for key in ("method", "split", "seed", "wait", "steps")}, "budget": budget}
            clock = [f"clock.speed_spread={SPEED_SPREAD}", f"eval_every={rounds}", f"rounds={rounds}"]
            tasks.append(({"study": "budgets", **facts}, overrides(OURS, run["split"], 1.0, run["seed"], *clock)))
    return tasks


def workers() -> list[tuple[dict[str, object], list[str]]]:
    """10, 100 and 1,000 workers, everyone present, minibatches of 10."""
    extra = ("local_steps=10", "batch_size=10", "rounds=3", "eval_every=3", "data.num_train=60000")
    return [
        ({"study": "workers", "method": OURS, "num_workers": m, "seed": 0},
         overrides(OURS, "iid", 1.0, 0, f"num_workers={m}", *extra))
        for m in (10, 100, 1000)
    ]  # fmt: skip


def kept_lines() -> list[dict]:
    """The lines of studies.jsonl, of which there may be none."""
    return [json.loads(line) for line in LINES.read_text().splitlines()] if LINES.exists() else []


def tables(lines: list[dict]) -> str:
    """Markdown tables of the studies that there are lines of."""
    out = []

    def score(**key: object) -> str:
        values = [100 * x["last_accuracy"] for x in lines if all(x.get(k) == v for k, v in key.items())]
        return f"{mean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else "-"

    studies = {x["study"] for x in lines}
    if "passes" in studies:
        out += ["PISA at equal passes", "", "| split | 30 %, 100 rounds | everyone, 30 rounds |", "| --- | --- | --- |"]
        for split in SPLITS:
            pair = [score(study="passes", split=split, participation=p) for p in (0.3, 1.0)]
            out.append(f"| {split} | {pair[0]} | {pair[1]} |")
    if "few" in studies:
        names = (OURS, *BASELINES)
        out += ["", "10 % participation, 30 rounds", "", "| split | " + " | ".join(map(label, names)) + " |"]
        out.append("| --- |" + " --- |" * len(names))
        out += [f"| {s} | " + " | ".join(score(study="few", split=s, method=n) for n in names) + " |" for s in SPLITS]
    if "stragglers" in studies:
        out += ["", "Stragglers: accuracy after virtual time, in rounds of the median worker", ""]
        out += [
            "| split | method | consensus with | " + " | ".join(map(str, PERIODS)) + " |",
            "| --- | --- | --- |" + " --- |" * len(PERIODS),
        ]
        for split in ("label_1", "dirichlet_0.5"):
            for method in (OURS, *BASELINES):
                for wait in ("median", "slowest"):
                    runs = [
                        x
                        for x in lines
                        if (x["study"], x.get("split"), x["method"], x.get("wait"))
                        == ("stragglers", split, method, wait)
                    ]
                    cells = [accuracy_at(runs, time_) for time_ in PERIODS]
                    who = "whoever is done" if wait == "median" else "everyone"
                    out.append(f"| {split} | {label(method)} | {who} | " + " | ".join(cells) + " |")
            cells = [score(study="budgets", split=split, budget=time_).split(" ")[0] for time_ in PERIODS]
            if set(cells) != {"-"}:
                out.append(f"| {split} | {label(OURS)}, rounds by the time | everyone | " + " | ".join(cells) + " |")
    if "workers" in studies:
        out += [
            "",
            "| workers | seconds per 100 worker-steps | MB of state per worker | peak MB |",
            "| --- |" + " --- |" * 3,
        ]
        for x in sorted((x for x in lines if x["study"] == "workers"), key=lambda x: x["num_workers"]):
            seconds = 100 * x["seconds"] / x["num_steps"]
            state = x["state_megabytes"] / x["num_workers"]
            out.append(f"| {x['num_workers']} | {seconds:.3f} | {state:.2f} | {x['peak_megabytes']:.0f} |")
    return "\n".join(out) + "\n"


def accuracy_at(runs: list[dict], rounds_of_median: float) -> str:
    """Mean accuracy of the last consensus until then; a dash where the runs end before."""
    values = []
    for x in runs:
        reached = [a for _, a, seconds in x["curve"] if seconds <= rounds_of_median * x["steps"] + 1e-9]
        if reached and x["curve"][-1][2] >= rounds_of_median * x["steps"] - 1e-9:
            values.append(100 * reached[-1])
    return f"{mean(values):.1f}" if len(values) == len(runs) and values else "-"


def main() -> None:
    """Run the studies named, add their lines to studies.jsonl in place of earlier ones, and write studies.md."""
    known = {study.__name__: study for study in (passes, few, stragglers, budgets, workers)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", choices=known)
    parser.add_argument("--method", nargs="+", choices=(OURS, *BASELINES), default=(OURS, *BASELINES))
    arguments = parser.parse_args()
    kept = kept_lines()
    for name in arguments.studies:
        tasks = [task for task in known[name]() if task[0]["method"] in arguments.method]
        lines: list[dict] = []
        with Pool(train, 1 if name == "workers" else 2) as pool:
            while tasks or pool.running:
                while tasks and pool.num_free:
                    pool.submit(tasks.pop(0))
                for finished in pool.wait():
                    if finished.error:
                        raise SystemExit(f"{finished.task[0]}: {finished.error}")
                    lines.append(finished.value)
                    print(f"{name}: {len(lines)} done, {len(tasks)} to go", flush=True)
        kept = [x for x in kept if x["study"] != name or x["method"] not in arguments.method] + lines
        LINES.write_text("".join(json.dumps(line) + "\n" for line in kept))
        (HERE / "studies.md").write_text(tables(kept))
    print(tables(kept))


if __name__ == "__main__":
    main()
