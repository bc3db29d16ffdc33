"""Runs that differ in nothing but their seed, as one: means over the seeds, with their standard deviation."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from pisa_dist.figures import HIGH, LOW, Run, Runs

# Beside the seed, what a configuration may say of where a run lies and how it came to be.
_NOT_THE_EXPERIMENT = ("seed", "run_dir", "resume")


def group_by_seed(runs: Runs) -> dict[str, list[Run]]:
    """The runs in groups of one experiment each, in the order of their first runs.

    Two runs belong together if they have the same configuration but for `seed`, which differs. A run without a
    configuration or a seed is alone.

    Returns:
        Label to runs. A group's label is that of its runs without the `seed=` in it, if they then have the same one;
        otherwise it lists them.
    """
    groups: dict[str, dict[str, Run]] = {}
    for label, run in runs.items():
        groups.setdefault(_experiment(run) or label, {})[label] = run
    named: dict[str, list[Run]] = {}
    for members in groups.values():
        seeds = {run.config.get("seed") for run in members.values()}
        if len(seeds) < len(members):  # the same experiment twice: no seed to average over
            named.update({label: [run] for label, run in members.items()})
        else:
            named[_label(list(members))] = list(members.values())
    return named


def averaged(runs: Sequence[Run]) -> Run:
    """A run whose metrics are means over these, at the rounds that all of them have, see `group_by_seed`.

    Beside each metric stand the mean minus and plus the sample standard deviation, under its name and `figures.LOW` and
    `figures.HIGH`. Split, configuration and path are those of the first run.
    """
    first, *others = runs
    if not others:
        return first
    by_round = [{line["round"]: line for line in run.metrics} for run in runs]
    shared = [number for number in by_round[0] if all(number in lines for lines in by_round)]
    metrics = [_mean_line([lines[number] for lines in by_round]) | {"round": number} for number in shared]
    statuses = {str(run.summary.get("status")) for run in runs}
    means = {k: fmean(values) for k in first.summary if (values := _numbers(run.summary.get(k) for run in runs))}
    summary = {**first.summary, **means, "status": statuses.pop() if len(statuses) == 1 else "not all completed"}
    return Run(
        first.path, tuple(metrics), summary if all(run.summary for run in runs) else {}, first.split, first.config
    )


def _mean_line(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    mean: dict[str, Any] = {}
    for key in lines[0]:
        if values := _numbers(line.get(key) for line in lines):
            centre, spread = fmean(values), stdev(values)
            mean |= {key: centre, key + LOW: centre - spread, key + HIGH: centre + spread}
    return mean


def _experiment(run: Run) -> str | None:
    """What makes a run's experiment; None where it is not known."""
    if "seed" not in run.config:
        return None
    return json.dumps(
        {k: v for k, v in run.config.items() if k not in _NOT_THE_EXPERIMENT}, sort_keys=True, default=str
    )


def _label(labels: Sequence[str]) -> str:
    if len(labels) == 1:
        return labels[0]
    bare = {re.sub(r",?\bseed=[^,/]*", "", label).strip(",/") for label in labels}
    return bare.pop() if len(bare) == 1 and "" not in bare else ", ".join(labels)


def _numbers(values: Iterable[object]) -> list[float]:
    """The values, or nothing unless all of them are numbers."""
    given = list(values)
    numbers = [float(v) for v in given if isinstance(v, int | float) and not isinstance(v, bool)]
    return numbers if len(numbers) == len(given) else []
