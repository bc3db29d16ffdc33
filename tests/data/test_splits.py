"""The splits equal NIID-Bench's partitions index for index, and refuse what NIID-Bench would hang on."""

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pisa_dist.data import splits
from pisa_dist.data.splits import SPLITS, dirichlet, feature_noise, iid, label_k, quantity

KEYWORDS: dict[str, dict[str, Any]] = {
    "iid": {},
    "label_k": {"labels_per_worker": 2},
    "dirichlet": {"dirichlet_concentration": 0.5},
    "quantity": {"dirichlet_concentration": 0.5},
    "feature_noise": {},
}


def make_labels(num_samples: int, num_classes: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, num_classes, size=num_samples)


# NIID-Bench's rules, stated again with the global generators that it uses.


def seed_globals(seed: int) -> None:
    np.random.seed(seed)
    random.seed(seed)


def bench_iid(labels: np.ndarray, num_workers: int) -> list[list[int]]:
    return [part.tolist() for part in np.array_split(np.random.permutation(len(labels)), num_workers)]


def bench_label_k(labels: np.ndarray, num_workers: int, k: int, num_classes: int) -> list[list[int]]:
    result = [np.ndarray(0, dtype=np.int64) for _ in range(num_workers)]
    if k == num_classes:
        for label in range(num_classes):
            where = np.where(labels == label)[0]
            np.random.shuffle(where)
            for worker, piece in enumerate(np.array_split(where, num_workers)):
                result[worker] = np.append(result[worker], piece)
        return [part.tolist() for part in result]
    times, contain = [0] * num_classes, []
    for worker in range(num_workers):
        current = [worker % num_classes]
        times[worker % num_classes] += 1
        j = 1
        while j < k:
            candidate = random.randint(0, num_classes - 1)
            if candidate not in current:
                j += 1
                current.append(candidate)
                times[candidate] += 1
        contain.append(current)
    for label in range(num_classes):
        where = np.where(labels == label)[0]
        np.random.shuffle(where)
        pieces = np.array_split(where, times[label])  # raises where the class has no owner
        position = 0
        for worker in range(num_workers):
            if label in contain[worker]:
                result[worker] = np.append(result[worker], pieces[position])
                position += 1
    return [part.tolist() for part in result]


def bench_dirichlet(
    labels: np.ndarray, num_workers: int, beta: float, num_classes: int
) -> tuple[list[list[int]], list[bool]]:
    """The partition, and for each try whether a class was dealt out by NaN."""
    smallest, broken = 0, []
    while smallest < 10:
        broken.append(False)
        batches: list[list[int]] = [[] for _ in range(num_workers)]
        for label in range(num_classes):
            where = np.where(labels == label)[0]
            np.random.shuffle(where)
            p = np.random.dirichlet(np.repeat(beta, num_workers))
            with np.errstate(invalid="ignore"):
                p = np.array([q * (len(b) < len(labels) / num_workers) for q, b in zip(p, batches, strict=True)])
                p = p / p.sum()
                broken[-1] |= bool(np.isnan(p).any()) and len(where) > 0
                cuts = (np.cumsum(p) * len(where)).astype(int)[:-1]
            batches = [b + part.tolist() for b, part in zip(batches, np.split(where, cuts), strict=True)]
        smallest = min(map(len, batches))
        if broken[-1]:
            smallest = 0  # our rule: such a try has failed
    for batch in batches:
        np.random.shuffle(batch)
    return batches, broken


def bench_quantity(labels: np.ndarray, num_workers: int, beta: float) -> list[list[int]]:
    permutation = np.random.permutation(len(labels))
    smallest = 0.0
    while smallest < 10:
        p = np.random.dirichlet(np.repeat(beta, num_workers))
        p = p / p.sum()
        smallest = np.min(p * len(permutation))
    cuts = (np.cumsum(p) * len(permutation)).astype(int)[:-1]
    return [part.tolist() for part in np.split(permutation, cuts)]


@pytest.mark.parametrize("num_samples", [7, 100, 1437])
@pytest.mark.parametrize("num_workers", [1, 3, 7])
@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_iid_is_niid_benchs(num_samples: int, num_workers: int, seed: int) -> None:
    labels = make_labels(num_samples, 10)
    seed_globals(seed)
    expected = bench_iid(labels, num_workers)
    assert iid(labels, num_workers, seed=seed) == expected
    assert feature_noise(labels, num_workers, seed=seed) == expected


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("num_classes", "num_workers", "k"),
    [
        (10, 10, 1),
        (10, 10, 2),
        (10, 10, 3),
        (10, 10, 10),
        (10, 100, 2),
        (2, 5, 1),
        (2, 1, 2),
        (3, 13, 2),
        (100, 100, 7),
    ],
)
def test_label_k_is_niid_benchs(num_classes: int, num_workers: int, k: int, seed: int) -> None:
    labels = np.concatenate([np.arange(num_classes).repeat(40), make_labels(1000, num_classes)])
    seed_globals(seed)
    expected = bench_label_k(labels, num_workers, k, num_classes)
    assert label_k(labels, num_workers, seed=seed, labels_per_worker=k) == expected


def test_label_k_draws_again_where_niid_bench_crashes() -> None:
    labels = np.arange(10).repeat(30)
    crashed = 0
    for seed in range(5):
        seed_globals(seed)
        expected = None
        while expected is None:  # from the continuing stream of `random`, with a fresh numpy stream
            np.random.seed(seed)
            try:
                expected = bench_label_k(labels, 6, 3, 10)
            except ValueError:
                crashed += 1
        assert label_k(labels, 6, seed=seed, labels_per_worker=3) == expected
    assert crashed > 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("num_classes", "num_workers", "beta"),
    [(10, 10, 0.1), (10, 10, 0.5), (10, 1, 0.5), (2, 5, 0.5), (10, 30, 0.5), (100, 10, 0.05), (10, 5, 100.0)],
)
def test_dirichlet_is_niid_benchs(num_classes: int, num_workers: int, beta: float, seed: int) -> None:
    labels = make_labels(2000, num_classes, seed=3)
    seed_globals(seed)
    expected, _ = bench_dirichlet(labels, num_workers, beta, num_classes)
    actual = dirichlet(labels, num_workers, seed=seed, dirichlet_concentration=beta, num_classes=num_classes)
    assert actual == expected


def test_dirichlet_counts_a_try_without_proportions_as_failed_and_stays_in_step_with_niid_bench() -> None:
    labels = make_labels(120, 10)
    broken_tries = 0
    for seed in range(8):
        seed_globals(seed)
        expected, broken = bench_dirichlet(labels, 3, 0.001, 10)
        broken_tries += sum(broken)
        assert dirichlet(labels, 3, seed=seed, dirichlet_concentration=0.001) == expected
    assert broken_tries > 0


@pytest.mark.parametrize("seed", range(4))
def test_dirichlet_accepts_ten_samples_each_and_then_classes_without_samples(seed: int) -> None:
    labels = np.zeros(20, dtype=int)  # after class 0 both workers are full, and no one is left to deal to
    seed_globals(seed)
    expected, _ = bench_dirichlet(labels, 2, 50.0, 4)
    parts = dirichlet(labels, 2, seed=seed, dirichlet_concentration=50.0, num_classes=4)
    assert parts == expected
    assert [len(part) for part in parts] == [10, 10]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("num_workers", "beta"), [(10, 0.5), (1, 0.5), (3, 0.1), (50, 5.0)])
def test_quantity_is_niid_benchs(num_workers: int, beta: float, seed: int) -> None:
    labels = make_labels(3000, 10)
    seed_globals(seed)
    expected = bench_quantity(labels, num_workers, beta)
    assert quantity(labels, num_workers, seed=seed, dirichlet_concentration=beta) == expected


@pytest.mark.parametrize("name", sorted(SPLITS))
@settings(max_examples=25, deadline=None)
@given(
    num_samples=st.integers(200, 400),
    num_workers=st.integers(1, 7),
    num_classes=st.integers(2, 6),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_sample_has_exactly_one_worker_and_every_worker_has_samples(
    name: str, num_samples: int, num_workers: int, num_classes: int, seed: int
) -> None:
    labels = np.arange(num_samples) % num_classes
    keywords = KEYWORDS[name]
    if name == "label_k" and 2 * num_workers < num_classes:
        keywords = {"labels_per_worker": num_classes}
    parts = SPLITS[name](labels, num_workers, seed=seed, **keywords)
    assert len(parts) == num_workers
    assert sorted(index for part in parts for index in part) == list(range(num_samples))
    assert all(type(index) is int for part in parts for index in part)
    assert min(map(len, parts)) >= (9 if name in ("dirichlet", "quantity") else 1)
    if name == "label_k":
        assert max(len(set(labels[part])) for part in parts) <= keywords["labels_per_worker"]
    if name == "iid":
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("name", sorted(SPLITS))
def test_the_global_random_state_is_neither_read_nor_changed(name: str) -> None:
    labels = make_labels(500, 4)
    seed_globals(1)
    torch.manual_seed(1)
    before = (random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().tolist())
    first = SPLITS[name](labels, 4, seed=9, **KEYWORDS[name])
    assert before == (random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().tolist())
    seed_globals(2)
    assert SPLITS[name](labels, 4, seed=9, **KEYWORDS[name]) == first


@pytest.mark.parametrize("name", sorted(SPLITS))
@pytest.mark.parametrize("convert", [list, np.int32, np.uint8, torch.tensor])
def test_labels_may_be_a_list_an_array_or_a_tensor_and_stay_unchanged(name: str, convert: Callable[[Any], Any]) -> None:
    plain = make_labels(300, 4).tolist()
    labels = convert(plain)
    assert SPLITS[name](labels, 4, seed=9, **KEYWORDS[name]) == SPLITS[name](plain, 4, seed=9, **KEYWORDS[name])
    assert [int(label) for label in labels] == plain


@pytest.mark.parametrize("name", ["label_k", "dirichlet", "quantity", "iid"])
def test_another_seed_gives_another_split(name: str) -> None:
    labels = make_labels(300, 4)
    assert SPLITS[name](labels, 4, seed=0, **KEYWORDS[name]) != SPLITS[name](labels, 4, seed=1, **KEYWORDS[name])


@pytest.mark.parametrize("name", sorted(SPLITS))
@pytest.mark.parametrize(
    ("labels", "num_workers", "seed", "message"),
    [
        ([0, 1] * 50, 0, 0, r"^`num_workers` must be in 1\.\.100, the number of samples, got 0$"),
        ([0, 1] * 50, -1, 0, r"^`num_workers` must be in 1\.\.100"),
        ([0, 1] * 50, 101, 0, r"^`num_workers` must be in 1\.\.100, the number of samples, got 101$"),
        ([0, 1] * 50, 2, -1, r"^`seed` must be in 0\.\.4294967295"),
        ([0, 1] * 50, 2, 2**32, r"^`seed` must be in 0\.\.4294967295"),
        ([], 1, 0, r"^labels must be a vector of at least one integer, got shape \(0,\)$"),
        ([[0, 1]], 1, 0, r"^labels must be a vector of at least one integer, got shape \(1, 2\)$"),
        ([0.5, 1.0], 1, 0, r"^labels must be integers, got float64$"),
        ([0, -1] * 50, 2, 0, r"^labels must be >= 0, got -1$"),
    ],
)
def test_a_bad_argument_is_refused_with_its_name_and_value(
    name: str, labels: list[Any], num_workers: int, seed: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        SPLITS[name](labels, num_workers, seed=seed, **KEYWORDS[name])


@pytest.mark.parametrize("split", [dirichlet, quantity])
@pytest.mark.parametrize("concentration", [0.0, -1.0, math.nan, math.inf])
def test_a_concentration_that_is_not_positive_and_finite_is_refused(split: Any, concentration: float) -> None:
    with pytest.raises(ValueError, match=r"^`split.dirichlet_concentration` must be > 0 and finite, got"):
        split([0, 1] * 50, 2, seed=0, dirichlet_concentration=concentration)


@pytest.mark.parametrize("split", [dirichlet, quantity])
def test_ten_samples_for_each_worker_are_required_at_once(split: Any) -> None:
    with pytest.raises(ValueError, match=r"^`num_workers` must be at most 9 for a Dirichlet split of 99 samples"):
        split([0] * 99, 10, seed=0, dirichlet_concentration=1.0)


@pytest.mark.parametrize("split", [dirichlet, quantity])
@pytest.mark.parametrize("concentration", [5e-324, 1e-3, 1e308])
def test_a_hopeless_draw_ends_with_an_error_instead_of_going_on_for_ever(
    split: Any, concentration: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(splits, "MAX_TRIES", 200)
    monkeypatch.setattr(splits, "MAX_QUANTITY_TRIES", 200)
    with pytest.raises(ValueError, match=r"^`split.dirichlet_concentration` .* `num_workers` 40: in 200 draws"):
        split(make_labels(420, 3), 40, seed=0, dirichlet_concentration=concentration)


@pytest.mark.parametrize(
    ("num_workers", "k", "message"),
    [
        (10, 0, r"^`split.labels_per_worker` must be in 1\.\.10, got 0$"),
        (10, 11, r"^`split.labels_per_worker` must be in 1\.\.10, got 11$"),
        (4, 2, r"must be >= 10, the number of classes, so that every class has an owner, got 2 \* 4$"),
        (60, 1, r"^worker 50 would have no samples, because its classes have fewer samples than owners"),
    ],
)
def test_an_impossible_number_of_labels_per_worker_is_refused(num_workers: int, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        label_k(np.arange(10).repeat(5)[:60].tolist() + [9] * 20, num_workers, seed=0, labels_per_worker=k)


def test_a_class_that_never_finds_an_owner_ends_with_an_error() -> None:
    labels = np.arange(100).repeat(5)
    with pytest.raises(ValueError, match=r"`split.labels_per_worker` 10 is too low for `num_workers` 10: in 10000"):
        label_k(labels, 10, seed=0, labels_per_worker=10)


@pytest.mark.parametrize("split", [label_k, dirichlet])
def test_a_label_beyond_the_number_of_classes_is_refused(split: Any) -> None:
    keywords = KEYWORDS[split.__name__]
    with pytest.raises(ValueError, match=r"^labels must be in 0\.\.2, got 3$"):
        split([0, 1, 2, 3] * 20, 2, seed=0, num_classes=3, **keywords)


def test_a_worker_whose_only_class_has_no_samples_is_named() -> None:
    with pytest.raises(ValueError, match=r"^worker 2 would have no samples"):
        label_k([0, 1] * 20, 3, seed=0, labels_per_worker=1, num_classes=3)
