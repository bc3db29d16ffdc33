"""Metrics of the consensus: Muon's and Shampoo's steps from the mean dual."""

import pytest
import torch

from pisa_dist.admm.metrics import METRICS, KroneckerMetric, MuonMetric

SHAPES = [(6, 3), (3, 6), (4, 4), (5, 2, 3, 3)]


def polar(matrix):
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    return u @ v


def mean_dual(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("largest_side", [1024, 5])
def test_without_memory_the_kronecker_metric_is_the_exact_polar_factor(shape, largest_side):
    """With one side longer than the largest as well, by the other side alone."""
    rule = KroneckerMetric(decay=0.0, largest_side=largest_side)
    dual = mean_dual(shape)
    direction, _ = rule.solve(dual, torch.ones_like(dual), rule.init_state(dual))
    matrix = dual.flatten(1)
    expected = 0.2 * max(matrix.shape) ** 0.5 * polar(matrix)
    torch.testing.assert_close(direction.flatten(1), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_muons_metric_points_where_the_polar_factor_does(shape):
    dual = mean_dual(shape)
    direction, _ = MuonMetric().solve(dual, torch.ones_like(dual), {})
    matrix = direction.flatten(1)
    singular = torch.linalg.svdvals(matrix) / (0.2 * max(matrix.shape) ** 0.5)
    assert singular.min() > 0.4
    assert singular.max() < 1.3
    cosine = torch.cosine_similarity(matrix.flatten(), polar(dual.flatten(1)).flatten(), dim=0)
    assert cosine > 0.97


def test_the_kronecker_metric_averages_over_rounds():
    """Two rounds by hand: L = ((1 - b) b P1 P1' + (1 - b) P2 P2') / (1 - b^2), likewise R."""
    rule = KroneckerMetric(decay=0.6)
    first, second = mean_dual((3, 3), 1), mean_dual((3, 3), 2)
    state = rule.init_state(first)
    _, state = rule.solve(first, torch.ones(3, 3), state)
    direction, _ = rule.solve(second, torch.ones(3, 3), state)
    total = 1 - 0.6**2
    left = (0.4 * 0.6 * first @ first.T + 0.4 * second @ second.T) / total
    right = (0.4 * 0.6 * first.T @ first + 0.4 * second.T @ second) / total

    def root(matrix):
        values, vectors = torch.linalg.eigh(matrix)
        return vectors @ torch.diag(values**-0.25) @ vectors.T

    expected = 0.2 * 3**0.5 * root(left) @ second @ root(right)
    torch.testing.assert_close(direction, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [name for name, rule in METRICS.items() if rule is not None])
def test_no_dual_no_step(name):
    rule, zeros = METRICS[name], torch.zeros(4, 3)
    direction, _ = rule.solve(zeros, torch.ones(4, 3), rule.init_state(zeros))
    assert torch.equal(direction, zeros)


@pytest.mark.parametrize("name", ["adam", "muon", "kron"])
def test_vectors_are_divided_by_the_diagonal_but_never_step_further_than_one(name):
    """The last two: no gradient was seen there; a worker has just come that uses what no other did."""
    rule, dual = METRICS[name], torch.tensor([1.0, -4.0, 0.0, -0.5])
    direction, _ = rule.solve(dual, torch.tensor([2.0, 4.0, 0.0, 1e-8]), rule.init_state(dual))
    torch.testing.assert_close(direction, torch.tensor([0.5, -1.0, 0.0, -1.0]))
