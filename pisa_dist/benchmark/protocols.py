"""What all methods of a benchmark have in common: data, model, rounds, seeds; and the cells that they are run in."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pisa_dist.data.sampling import num_present

TUNING_SEED = 100
VALIDATION_FRACTION = 0.2
LOCAL_STEPS = 20
LOCAL, ONE_STEP = "local", "one_step"
"""How a method spends a round: several local steps, or one gradient of many samples."""

MODELS = {
    "fashion_mnist": "mlp",
    "mnist": "mlp",
    "cifar10": "cnn",
    "digits": "mlp",
    "libsvm": "mlp",
    "custom": "mlp",
}
DATA = tuple(MODELS)
OWN_DATA = ("libsvm", "custom")
"""Whose files or function the user names; all samples are taken unless data.num_train is set."""
SPLITS = {
    "iid": "split=iid",
    "label": "split=label_k split.labels_per_worker={}",
    "dirichlet": "split=dirichlet split.dirichlet_concentration={}",
    "quantity": "split=quantity split.dirichlet_concentration={}",
    "noise": "split=feature_noise split.noise_level={}",
}


class Cell(NamedTuple):
    """One place of the grid, in which all methods meet."""

    dataset: str
    split: str  # such as label_1, dirichlet_0.1, noise_0.1 or iid
    participation: float

    def __str__(self) -> str:
        return f"{self.dataset} {self.split} participation {self.participation:g}"


@dataclass(frozen=True)
class Protocol:
    """What is the same for all methods.

    Attributes:
        name: as `--protocol` takes it.
        summary: one sentence for the report.
        models: `model=` of each data set.
        rounds: of methods with local steps.
        one_step_rounds: of methods with one step a round.
        num_workers: m.
        num_train: training samples that are taken, where the data set is not in `num_train_of`; None for all.
        num_train_of: the same for single data sets.
        passes: a participant's samples in a round are this many mean shards...
        epochs: ...or, if given, local epochs in minibatches of `batch_size`.
        batch_size: samples per local step where `epochs` is given.
        num_seeds: scored seeds, 0, 1, ...
        eval_every: rounds between evaluations; the last round is always one.
    """

    name: str
    summary: str
    models: Mapping[str, str]
    rounds: int
    one_step_rounds: int
    num_workers: int = 10
    num_train: int | None = None
    num_train_of: Mapping[str, int | None] = field(default_factory=dict)
    passes: int = 2
    epochs: int | None = None
    batch_size: int = 64
    num_seeds: int = 3
    eval_every: int = 5

    def num_train_wanted(self, dataset: str) -> int | None:
        """Training samples to take of a data set, None for all."""
        return self.num_train_of.get(dataset, self.num_train)

    def data_overrides(self, cell: Cell) -> list[str]:
        """Data, model, split and participation."""
        num_train = self.num_train_wanted(cell.dataset)
        return [
            f"data={cell.dataset}",
            *([] if num_train is None else [f"data.num_train={num_train}"]),
            f"model={self.models[cell.dataset]}",
            *split_overrides(cell.split),
            f"participation={cell.participation:g}",
            f"num_workers={self.num_workers}",
        ]

    def step_overrides(self, kind: str, num_samples: int) -> list[str]:
        """Rounds, local steps and minibatches of a method.

        Args:
            kind: LOCAL or ONE_STEP.
            num_samples: training samples of all workers together.
        """
        shard = num_samples / self.num_workers
        if kind == ONE_STEP:
            # One gradient of as many samples; a shard that holds fewer is taken whole, and its gradient is exact.
            samples = shard if self.epochs else self.passes * shard
            rounds, steps, batch = self.one_step_rounds, 1, math.ceil(samples)
        elif self.epochs is not None:
            rounds, steps, batch = self.rounds, 1, self.batch_size
        else:
            rounds, steps, batch = self.rounds, LOCAL_STEPS, max(1, round(self.passes * shard / LOCAL_STEPS))
        eval_every = max(1, self.eval_every * rounds // self.rounds)
        epochs = [f"local_epochs={self.epochs}"] if kind == LOCAL and self.epochs is not None else []
        return [f"rounds={rounds}", f"local_steps={steps}", *epochs, f"batch_size={batch}", f"eval_every={eval_every}"]


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="quick",
            summary=(
                "10,000 training samples, full test set, 10 workers, 30 rounds; a participant draws two mean shards of "
                "samples a round, in 20 local steps or, in one-step methods, in one (at most its whole shard)"
            ),
            models=MODELS,
            rounds=30,
            one_step_rounds=30,
            num_train=10_000,
            num_train_of=dict.fromkeys(("digits", *OWN_DATA)),
        ),
        Protocol(
            name="niid",
            summary=(
                "NIID-Bench: all training samples, 10 workers, 50 rounds of 10 local epochs in minibatches of 64; "
                "one-step methods take 500 rounds of one local pass, a tenth of the passes and ten times the rounds"
            ),
            models={**MODELS, "fashion_mnist": "cnn", "mnist": "cnn"},
            rounds=50,
            one_step_rounds=500,
            epochs=10,
            num_seeds=5,
        ),
    )
}


def split_overrides(name: str) -> list[str]:
    """A split by its short name: label_2, dirichlet_0.1, quantity_0.5, noise_0.1, iid.

    Raises:
        ValueError: there is no such split.
    """
    kind, _, knob = name.partition("_")
    template = SPLITS.get(kind, "")
    try:
        number = int(knob) if kind == "label" else float(knob or "nan")
    except ValueError:
        number = math.nan
    if not template or ("{}" in template) != (knob != "") or (knob and not 0 < number < math.inf):
        raise ValueError(
            f"--split must be iid, or label_, dirichlet_, quantity_ or noise_ and a number > 0, such as label_2 or "
            f"dirichlet_0.1, got {name!r}"
        )
    return template.format(knob).split()


def make_cells(
    protocol: Protocol, datasets: Sequence[str], splits: Sequence[str], participations: Sequence[float]
) -> list[Cell]:
    """Every combination, checked as far as that needs no data.

    Raises:
        ValueError: an unknown data set or split, or a participation that selects nobody.
    """
    for dataset in datasets:
        if dataset not in DATA:
            raise ValueError(f"--data must be of {', '.join(DATA)}, got {dataset!r}")
    for split in splits:
        split_overrides(split)
    for participation in participations:
        if not 0 < participation <= 1:
            raise ValueError(f"--participation must be in (0, 1], got {participation:g}")
        try:
            num_present(protocol.num_workers, participation)
        except ValueError as error:
            raise ValueError(f"--participation: {error}") from None
    return [Cell(d, s, p) for d in datasets for p in participations for s in splits]
