"""What the runs of a grid say: means with intervals, regrets, and who is at least as good as the best of the others."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev
from typing import NamedTuple

import numpy as np

from pisa_dist.benchmark.methods import METHODS, Setting, best, is_ours, to_try
from pisa_dist.benchmark.protocols import Cell, Protocol
from pisa_dist.benchmark.results import SCORE, TUNE, Record, curve

CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A mean and half the width of its 95 % interval; None where one value, or none, gives no interval."""

    mean: float
    half_width: float | None


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and half width t s / sqrt(n) of Student's interval, s with n - 1 in the denominator; NaN of nothing."""
    n = len(values)
    if n < 2:
        return Estimate(values[0] if values else math.nan, None)
    from scipy.special import stdtrit  # slow to import

    quantile = float(stdtrit(n - 1, 0.5 + CONFIDENCE / 2))
    return Estimate(mean(values), quantile * stdev(values) / math.sqrt(n))


@dataclass
class Score:
    """One method's scored runs in one cell, by seed; the later of two runs of a seed counts."""

    records: dict[int, Record] = field(default_factory=dict)

    @property
    def ok(self) -> list[Record]:
        """The runs that reached their last round."""
        return [record for record in self.records.values() if record["status"] == "ok"]

    @property
    def num_failed(self) -> int:
        """How many did not."""
        return len(self.records) - len(self.ok)

    def estimate(self, key: str) -> Estimate:
        """Of `last_accuracy` or `best_accuracy`, over the runs that did not fail."""
        return estimate([record[key] for record in self.ok])

    def by_seed(self) -> dict[int, float]:
        """Last accuracy; 0 of a failed run, so that failing never pays."""
        return {seed: record["last_accuracy"] or 0.0 for seed, record in self.records.items()}

    @property
    def value(self) -> float:
        """Mean last accuracy, failed runs counting as 0: what regrets and ranks are made of."""
        return mean(self.by_seed().values())

    def at(self, cost: str, budget: float) -> Estimate:
        """Accuracy once so many `passes` or `bytes_sent` are spent, linear between evaluations, of the runs in `ok`."""
        values = []
        for record in self.ok:
            points = curve(record)
            spent = [getattr(point, cost) for point in points]
            values.append(float(np.interp(budget, spent, [point.accuracy for point in points])))
        return estimate(values)

    def mean_of(self, key: str) -> float:
        """Mean of a number of the runs that did not fail."""
        return mean(record[key] for record in self.ok) if self.ok else math.nan


Scores = dict[Cell, dict[str, Score]]


def cell_of(record: Record) -> Cell:
    """The cell that a record belongs to."""
    return Cell(record["dataset"], record["split"], record["participation"])


def collect(records: Sequence[Record], protocol: Protocol | None) -> Scores:
    """The scored runs by cell, in the order of the first run of each, and by method, in the order of the table.

    Of a method that is tuned, only those at the setting that tuning chose: what was scored before tuning went on to a
    better one stays in the file and does not count. Without a protocol all scored runs count.
    """
    chosen = choices(records, protocol) if protocol else {}
    scores: Scores = {}
    for record in records:
        if record["phase"] == SCORE:
            choice = chosen.get((cell_of(record), record["method"]))
            if choice is not None and choice.setting != tuple(record["setting"]):
                continue
            score = scores.setdefault(cell_of(record), {}).setdefault(record["method"], Score())
            score.records[record["seed"]] = record
    order = {name: place for place, name in enumerate(METHODS)}
    return {
        cell: dict(sorted(methods.items(), key=lambda item: order.get(item[0], len(order))))
        for cell, methods in scores.items()
    }


def equal_budget(methods: Mapping[str, Score], cost: str) -> float:
    """The most `passes` or `bytes_sent` that every run of a cell came to; NaN where none came to an end."""
    return min((record[cost] for score in methods.values() for record in score.ok), default=math.nan)


def groups(scores: Scores) -> dict[str, Scores]:
    """The cells of one data set and participation together, under a name for both."""
    found: dict[str, Scores] = {}
    for cell, methods in scores.items():
        found.setdefault(f"{cell.dataset}, participation {cell.participation:g}", {})[cell] = methods
    return found


def is_at_least_as_good(own: Mapping[int, float], rival: Mapping[int, float]) -> bool:
    """Whether the 95 % interval of the mean difference own - rival, paired by seed, reaches 0 or lies above it.

    Seeds share split, initial weights and participants, which pairing takes out. With one seed in common the difference
    itself must be >= 0; with none nothing can be said, and the answer is no.
    """
    common = sorted(set(own) & set(rival))
    if not common:
        return False
    difference = estimate([own[seed] - rival[seed] for seed in common])
    return difference.mean + (difference.half_width or 0.0) >= 0


def best_rival(methods: Mapping[str, Score], name: str) -> str | None:
    """Of the other methods, for PISA's family of those outside it, the one with the highest mean; None without any."""
    others = [other for other in methods if other != name and not (is_ours(name) and is_ours(other))]
    return max(others, key=lambda other: methods[other].value, default=None)


def regrets(methods: Mapping[str, Score]) -> dict[str, float]:
    """How far each method's mean last accuracy lies below that of the best method of the cell, of any family."""
    best = max(score.value for score in methods.values())
    return {name: best - score.value for name, score in methods.items()}


@dataclass(frozen=True)
class Standing:
    """A method over all cells.

    Attributes:
        num_cells: cells in which it has scored runs and a rival.
        num_good: those in which it is at least as good as the best of its rivals.
        num_best: cells in which no method has a higher mean.
        worst_regret: the largest, and `worst_cell` where.
        mean_regret: over all cells.
        num_failed: scored runs that failed.
        bytes_sent, passes, seconds: means over the runs that did not fail.
    """

    method: str
    num_cells: int
    num_good: int
    num_best: int
    worst_regret: float
    worst_cell: Cell
    mean_regret: float
    num_failed: int
    bytes_sent: float
    passes: float
    seconds: float


def standings(scores: Scores) -> list[Standing]:
    """Every method over the cells, the smallest largest regret first."""
    names = list(dict.fromkeys(name for methods in scores.values() for name in methods))
    return sorted((_standing(scores, name) for name in names), key=lambda standing: standing.worst_regret)


def _standing(scores: Scores, name: str) -> Standing:
    own = {cell: methods for cell, methods in scores.items() if name in methods}
    regret = {cell: regrets(methods)[name] for cell, methods in own.items()}
    rivals = {cell: best_rival(methods, name) for cell, methods in own.items()}
    good = [
        is_at_least_as_good(own[cell][name].by_seed(), own[cell][rival].by_seed())
        for cell, rival in rivals.items()
        if rival is not None
    ]
    worst = max(regret, key=lambda cell: regret[cell])
    runs = Score(dict(enumerate(r for methods in own.values() for r in methods[name].records.values())))
    return Standing(
        method=name,
        num_cells=len(good),
        num_good=sum(good),
        num_best=sum(value == 0 for value in regret.values()),
        worst_regret=regret[worst],
        worst_cell=worst,
        mean_regret=mean(regret.values()),
        num_failed=runs.num_failed,
        bytes_sent=runs.mean_of("bytes_sent"),
        passes=runs.mean_of("passes"),
        seconds=runs.mean_of("seconds"),
    )


class Choice(NamedTuple):
    """The best setting of a method in a cell so far, whether tuning is over there, and whether it ends a range."""

    setting: Setting
    is_final: bool
    is_at_end: bool


def choices(records: Sequence[Record], protocol: Protocol) -> dict[tuple[Cell, str], Choice]:
    """What tuning chose, by cell and method; a run that failed counts as accuracy 0."""
    tried: dict[tuple[Cell, str], dict[Setting, float]] = {}
    for record in records:
        if record["phase"] == TUNE and record["method"] in METHODS:
            accuracies = tried.setdefault((cell_of(record), record["method"]), {})
            accuracies[tuple(record["setting"])] = record["last_accuracy"] or 0.0
    found = {}
    for (cell, method), accuracies in tried.items():
        settings = METHODS[method].settings_for(protocol, cell.dataset)
        known = [setting for setting in settings if setting in accuracies]
        if known:
            winner = best(settings, accuracies)
            at_end = winner in (known[0], known[-1])
            found[cell, method] = Choice(winner, not to_try(settings, accuracies), at_end)
    return found


@dataclass(frozen=True)
class Tuning:
    """How often each setting of a method was chosen, and in how many cells that was the first or last one tried."""

    method: str
    chosen: dict[Setting, int]
    num_cells: int
    num_at_end: int


def tunings(records: Sequence[Record], protocol: Protocol) -> list[Tuning]:
    """What tuning chose, by method; cells in which it is not over are left out."""
    over = {key: choice for key, choice in choices(records, protocol).items() if choice.is_final}
    found = []
    for method in METHODS:
        own = {cell: choice for (cell, name), choice in over.items() if name == method}
        order = [setting for cell in own for setting in METHODS[method].settings_for(protocol, cell.dataset)]
        counts = Counter(choice.setting for choice in own.values())
        chosen = {setting: counts[setting] for setting in dict.fromkeys(order) if counts[setting]}
        if own:
            found.append(Tuning(method, chosen, len(own), sum(choice.is_at_end for choice in own.values())))
    return found
