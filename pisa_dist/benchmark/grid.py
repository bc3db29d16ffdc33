"""Which run comes next: cell by cell; in a cell first all tuning, then the scored seeds at the best settings."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pisa_dist.benchmark.methods import METHODS, Setting, best, to_try
from pisa_dist.benchmark.protocols import TUNING_SEED, VALIDATION_FRACTION, Cell, Protocol
from pisa_dist.benchmark.results import SCORE, TUNE, Key, Record, key_of


@dataclass(frozen=True)
class Run:
    """One training run of the grid; `overrides` repeat it with `pisa-train`."""

    cell: Cell
    method: str
    setting: Setting
    seed: int
    phase: str
    overrides: tuple[str, ...]

    @property
    def key(self) -> Key:
        """What makes it the same run when the grid is gone on with."""
        return key_of(self.phase, self.overrides)

    def describe(self) -> dict[str, object]:
        """The columns of its line in results.jsonl that do not depend on how it went."""
        return {
            "dataset": self.cell.dataset,
            "split": self.cell.split,
            "participation": self.cell.participation,
            "method": self.method,
            "phase": self.phase,
            "setting": list(self.setting),
            "seed": self.seed,
            "overrides": list(self.overrides),
        }


@dataclass(frozen=True)
class Plan:
    """What is to be run.

    Attributes:
        protocol: what all methods have in common.
        cells: in the order in which they are run.
        methods: names.
        seeds: scored seeds, without the tuning seed.
        num_samples: training samples of each data set, all workers together.
        extra: overrides of all runs, which come last.
    """

    protocol: Protocol
    cells: Sequence[Cell]
    methods: Sequence[str]
    seeds: Sequence[int]
    num_samples: Mapping[str, int] = field(default_factory=dict)
    extra: Sequence[str] = ()

    def run(self, cell: Cell, method: str, setting: Setting, seed: int, phase: str) -> Run:
        """A run with its overrides; in tuning a part of the training data stands in for the test set."""
        num_samples = self.num_samples[cell.dataset]
        validation = []
        if phase == TUNE:
            num_samples -= round(VALIDATION_FRACTION * num_samples)
            validation = [f"data.validation_fraction={VALIDATION_FRACTION}"]
        overrides = [
            *self.protocol.data_overrides(cell),
            *validation,
            *METHODS[method].overrides,
            *setting,
            *self.protocol.step_overrides(METHODS[method].kind, num_samples),
            "device=cpu",
            f"seed={seed}",
            *self.extra,
        ]
        last = {override.partition("=")[0]: override for override in overrides}  # as the command line has it
        return Run(cell, method, setting, seed, phase, tuple(last.values()))


class Schedule:
    """Hands out the runs of a plan and takes their results.

    The order keeps cells whole, but nobody waits: while the last tuning of a method is under way, the next cell begins.

    Args:
        plan: what is to be run.
        done: records of runs that need no repetition.
    """

    def __init__(self, plan: Plan, done: Mapping[Key, Record]) -> None:
        self.plan = plan
        self.num_done = 0
        self._done = done
        self._entries = {cell: {method: _Entry(plan, cell, method) for method in plan.methods} for cell in plan.cells}
        for entries in self._entries.values():
            for entry in entries.values():
                self._skip(entry)

    @property
    def total(self) -> int:
        """Number of runs, those that are done included; grows where tuning goes on beyond its first settings."""
        return sum(entry.total for entries in self._entries.values() for entry in entries.values())

    def next_run(self) -> Run | None:
        """A run to start now; None if all that are left wait for others to end, or none is left."""
        for entries in self._entries.values():
            for phase in (TUNE, SCORE):
                for entry in entries.values():
                    if entry.queues[phase]:
                        return entry.queues[phase].popleft()
        return None

    def finished(self, run: Run, record: Record) -> None:
        """Take a result."""
        self.num_done += 1
        if run.phase == TUNE:
            entry = self._entries[run.cell][run.method]
            entry.take(run.setting, record)
            self._skip(entry)

    def _skip(self, entry: "_Entry") -> None:
        """Take the results that are there already; those of tuning may bring further runs into the queues."""
        while known := [run for queue in entry.queues.values() for run in queue if run.key in self._done]:
            for run in known:
                entry.queues[run.phase].remove(run)
                self.num_done += 1
                if run.phase == TUNE:
                    entry.take(run.setting, self._done[run.key])


class _Entry:
    """One method in one cell."""

    def __init__(self, plan: Plan, cell: Cell, method: str) -> None:
        self.plan, self.cell, self.method = plan, cell, method
        self.settings = METHODS[method].settings_for(plan.protocol, cell.dataset)
        self.total = len(plan.seeds)
        self.queues: dict[str, deque[Run]] = {TUNE: deque(), SCORE: deque()}
        self._accuracies: dict[Setting, float] = {}
        self._num_asked = 0
        if len(self.settings) > 1:
            self._try(to_try(self.settings, {}))
        else:
            self._score(self.settings[0])

    def take(self, setting: Setting, record: Record) -> None:
        """A tuning result; a run that failed counts as accuracy 0."""
        self._accuracies[setting] = record["last_accuracy"] or 0.0
        if len(self._accuracies) < self._num_asked:
            return
        if further := to_try(self.settings, self._accuracies):
            self._try(further)
        else:
            self._score(best(self.settings, self._accuracies))

    def _try(self, settings: Sequence[Setting]) -> None:
        runs = (self.plan.run(self.cell, self.method, setting, TUNING_SEED, TUNE) for setting in settings)
        self.queues[TUNE].extend(runs)
        self._num_asked += len(settings)
        self.total += len(settings)

    def _score(self, setting: Setting) -> None:
        runs = (self.plan.run(self.cell, self.method, setting, seed, SCORE) for seed in self.plan.seeds)
        self.queues[SCORE].extend(runs)
