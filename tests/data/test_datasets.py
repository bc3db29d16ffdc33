"""The container of samples, seeded subsets and the embedded digits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pisa_dist.data import datasets
from pisa_dist.data.datasets import Dataset, digits, hold_out, subset

Refused = Callable[[type[Exception], Callable[[], object]], str]


def test_a_dataset_knows_its_length_and_shape_and_selects_copies_in_order() -> None:
    dataset = Dataset(torch.arange(12.0).view(3, 2, 2), torch.tensor([0, 1, 2]), num_classes=3)
    assert len(dataset) == 3
    assert dataset.input_shape == (2, 2)
    for indices in ([2, 0], np.array([2, 0]), torch.tensor([2, 0])):
        chosen = dataset.select(indices)
        assert chosen.targets.tolist() == [2, 0]
        assert torch.equal(chosen.inputs, dataset.inputs[[2, 0]])
        assert chosen.num_classes == 3
    chosen.inputs.zero_()
    assert dataset.inputs.sum() == 66
    assert len(dataset.select([])) == 0
    dataset.validate("set")


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        ([[0.0], [1.0]], [0], "here: found 2 inputs but 1 targets"),
        ([], [], "here: no samples or no features, got inputs of shape (0,)"),
        ([[], []], [0, 1], "here: no samples or no features, got inputs of shape (2, 0)"),
        ([[0.0], [1.0], [2.0]], [0, 3, -1], "here: label of sample 1 must be in 0..2, got 3"),
        ([[0.0], [1.0], [2.0]], [0, 1, -1], "here: label of sample 2 must be in 0..2, got -1"),
        ([[0.0], [float("nan")], [float("nan")]], [0, 1, 2], "here: sample 1 has a NaN or infinite feature"),
        ([[0.0], [1.0], [-float("inf")]], [0, 1, 2], "here: sample 2 has a NaN or infinite feature"),
    ],
)
def test_validation_names_the_set_and_the_first_bad_sample(
    refused: Refused, inputs: Any, targets: Any, message: str
) -> None:
    dataset = Dataset(torch.tensor(inputs), torch.tensor(targets, dtype=torch.int64), num_classes=3)
    assert refused(ValueError, lambda: dataset.validate("here")) == message


@pytest.mark.parametrize("size", [1, 4, 10])
def test_a_subset_is_seeded_ordered_and_nested(size: int) -> None:
    dataset = Dataset(torch.arange(10.0)[:, None], torch.arange(10), num_classes=10)
    chosen = subset(dataset, size, seed=3)
    assert len(chosen) == size
    assert chosen.targets.tolist() == sorted(set(chosen.targets.tolist()))
    assert torch.equal(chosen.inputs[:, 0], chosen.targets.float())
    assert torch.equal(chosen.targets, subset(dataset, size, seed=3).targets)
    assert set(chosen.targets.tolist()) <= set(subset(dataset, min(size + 1, 10), seed=3).targets.tolist())


def test_subsets_of_different_seeds_differ() -> None:
    dataset = Dataset(torch.zeros(100, 1), torch.arange(100), num_classes=100)
    assert subset(dataset, 50, seed=0).targets.tolist() != subset(dataset, 50, seed=1).targets.tolist()


@pytest.mark.parametrize("size", [0, -1, 11])
def test_an_impossible_subset_names_the_key(refused: Refused, size: int) -> None:
    dataset = Dataset(torch.zeros(10, 1), torch.arange(10), num_classes=10)
    assert refused(ValueError, lambda: subset(dataset, size, seed=0)) == (
        f"`data.num_train` must be in 1..10, got {size}"
    )
    assert "`seed`" in refused(ValueError, lambda: subset(dataset, 5, seed=-1))


def test_the_default_root_is_pisa_data_else_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PISA_DATA", "/some/where")
    assert datasets.default_root() == Path("/some/where")
    monkeypatch.delenv("PISA_DATA")
    assert datasets.default_root() == Path.home() / ".cache" / "pisa_dist"


def test_digits_are_real_stratified_and_always_the_same() -> None:
    np.random.seed(1)
    train, test = digits()
    np.random.seed(2)
    again = digits()
    assert (len(train), len(test)) == (1437, 360)
    assert train.inputs.shape == (1437, 1, 8, 8)
    assert train.inputs.dtype == torch.float32
    assert train.targets.dtype == torch.int64
    assert (float(train.inputs.min()), float(train.inputs.max())) == (0.0, 1.0)
    assert torch.equal(train.inputs, again.train.inputs)
    shares = train.targets.bincount() / (train.targets.bincount() + test.targets.bincount())
    assert shares.sub(0.8).abs().max() < 0.01
    rows = {tuple(row) for row in train.inputs.flatten(1).tolist()}
    assert len(rows & {tuple(row) for row in test.inputs.flatten(1).tolist()}) == 0
    train.validate("digits")
    test.validate("digits")


@pytest.mark.parametrize(("fraction", "num_held"), [(0.2, 2), (0.26, 3), (0.9, 9)])
def test_holding_out_parts_the_samples_keeps_their_order_and_depends_on_the_seed(
    fraction: float, num_held: int
) -> None:
    dataset = Dataset(torch.arange(10.0)[:, None], torch.arange(10), num_classes=10)
    train, held = hold_out(dataset, fraction, seed=3)
    assert len(held) == num_held
    assert sorted(train.targets.tolist() + held.targets.tolist()) == list(range(10))
    for part in (train, held):
        assert part.targets.tolist() == sorted(part.targets.tolist())
        assert torch.equal(part.inputs[:, 0], part.targets.float())
    assert torch.equal(held.targets, hold_out(dataset, fraction, seed=3).test.targets)
    others = [hold_out(dataset, fraction, seed=seed).test.targets.tolist() for seed in range(8)]
    assert any(other != held.targets.tolist() for other in others)


@pytest.mark.parametrize(("fraction", "num_held"), [(0.01, 0), (0.99, 10)])
def test_holding_out_nothing_or_everything_is_refused(refused: Refused, fraction: float, num_held: int) -> None:
    dataset = Dataset(torch.arange(10.0)[:, None], torch.arange(10), num_classes=10)
    assert refused(ValueError, lambda: hold_out(dataset, fraction, seed=0)) == (
        "`data.validation_fraction` must hold out between 1 and 9 of 10 training samples, "
        f"got {fraction}, which is {num_held}"
    )
