"""Measures of skew against closed forms, scipy and the splits that they describe."""

import time
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon

from pisa_dist.data.skew import class_counts, skew_measures


def test_counts_are_by_worker_and_class() -> None:
    targets = [2, 0, 1, 0, 2, 2]
    expected = [[1, 0, 2, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    for labels in (targets, np.array(targets), torch.tensor(targets)):
        counts = class_counts(labels, [[0, 1, 4], [5, 3, 2], []], 4)
        assert counts.dtype == np.int64
        assert counts.tolist() == expected


@pytest.mark.parametrize("targets", [[0, 3], [-1, 0]])
def test_counting_refuses_a_label_outside_the_classes(targets: list[int]) -> None:
    with pytest.raises(ValueError, match=r"^labels must be in 0\.\.2, got"):
        class_counts(targets, [[0, 1]], 3)


def test_equal_shards_and_one_worker_have_no_skew() -> None:
    zeros = {"hellinger": 0.0, "jensen_shannon": 0.0, "size_variation": 0.0}
    assert skew_measures([[3, 1, 0]] * 4) == zeros
    assert skew_measures([[3, 1, 0]]) == zeros


def test_shards_without_a_common_class_are_at_distance_one() -> None:
    measures = skew_measures(np.diag([5, 10, 15]))
    assert measures["hellinger"] == 1.0
    assert measures["jensen_shannon"] == 1.0
    assert measures["size_variation"] == pytest.approx(np.sqrt(50 / 3) / 10)


def test_two_workers_by_hand() -> None:
    measures = skew_measures([[4, 0], [1, 1]])
    assert measures["hellinger"] == pytest.approx(np.sqrt(1 - np.sqrt(0.5)))
    divergence = np.log2(1 / 0.75) / 2 + (0.5 * np.log2(0.5 / 0.75) + 0.5 * np.log2(0.5 / 0.25)) / 2
    assert measures["jensen_shannon"] == pytest.approx(np.sqrt(divergence))
    assert measures["size_variation"] == pytest.approx(1 / 3)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 5).flatmap(
        lambda width: st.lists(
            st.lists(st.integers(0, 1000), min_size=width, max_size=width).filter(any), min_size=2, max_size=6
        )
    )
)
def test_measures_are_the_means_over_pairs_and_lie_in_range(table: list[list[int]]) -> None:
    measures = skew_measures(table)
    shares = [np.array(row) / sum(row) for row in table]
    pairs = [(p, q) for i, p in enumerate(shares) for q in shares[i + 1 :]]
    hellinger = np.mean([np.linalg.norm(np.sqrt(p) - np.sqrt(q)) / np.sqrt(2) for p, q in pairs])
    # scipy takes the root of a rounding error where p and q are equal.
    jensen_shannon = np.mean([0.0 if (p == q).all() else jensenshannon(p, q, base=2) for p, q in pairs])
    assert measures["hellinger"] == pytest.approx(hellinger, abs=1e-7)
    assert measures["jensen_shannon"] == pytest.approx(jensen_shannon, abs=1e-7)
    assert 0 <= measures["hellinger"] <= 1
    assert 0 <= measures["jensen_shannon"] <= 1


def test_a_thousand_workers_take_less_than_two_seconds() -> None:
    counts = np.random.default_rng(0).integers(0, 30, size=(1000, 10)) + np.eye(1000, 10, dtype=int)
    start = time.process_time()
    measures = skew_measures(counts)
    assert time.process_time() - start < 2
    assert 0.2 < measures["hellinger"] < 0.5


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([1, 2], r"^counts must be >= 0 with shape \[workers, classes\], got shape \(2,\)$"),
        ([[]], "^counts must be"),
        ([[1, -1]], "^counts must be"),
        ([[1, np.nan]], "^counts must be"),
        ([[1, 2], [0, 0]], "^worker 1 has no samples"),
    ],
)
def test_counts_that_describe_no_split_are_refused(counts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        skew_measures(counts)
