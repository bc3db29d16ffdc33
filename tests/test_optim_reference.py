"""The drop-in optimizers, one worker per rank, against the NumPy reference on a smooth non-quadratic problem."""

import numpy as np
import pytest
import torch
from harness import run_ranks
from reference import Reference, newton_schulz
from torch import nn

from pisa_dist import NSISA, PISA, SISA
from pisa_dist.admm.preconditioners import Identity

NUM_STEPS = 200
TOLERANCE = 1e-10
SHAPES = {
    "kernel": (4, 2, 2, 2),
    "wide": (5, 16),
    "tall": (12, 5),
    "head": (3, 12),
    "bias": (3,),
    "log_scale": (),
}
HEAD = list(SHAPES).index("head")

WORKERS = {  # number of workers: unnormalised weights, and factors on sigma and rho for each
    1: ([2.0], [1.0], [1.0]),
    2: ([3.0, 1.0], [1.0, 2.5], [1.0, 0.4]),
    4: ([1.0, 4.0, 2.0, 0.5], [1.0, 0.5, 2.0, 1.5], [1.0, 2.0, 0.7, 0.1]),
}

SCHEMES = {  # name: penalty, preconditioner_scale, other settings of optimizer and reference alike
    "adam": (2.0, 30.0, {"second_moment_decay": 0.99, "preconditioner_bound": 0.1}),
    "rmsprop": (3.0, 20.0, {"second_moment_decay": 0.9, "preconditioner_bound": 0.1, "eps": 1e-6}),
    "adagrad": (3.0, 10.0, {"preconditioner_bound": 0.2}),
    "identity": (4.0, 6.0, {}),
    "nsisa": (
        20.0,
        40.0,
        {"momentum": 0.9, "second_moment_decay": 0.99, "preconditioner_bound": 0.1, "eps": 1e-6},
    ),
}
EVERYWHERE = {"consensus_l2": 0.05, "penalty_growth": 1.01, "penalty_growth_interval": 3}
LR = 0.8


def initial_weights():
    generator = torch.Generator().manual_seed(0)
    return [0.5 * torch.randn(shape, dtype=torch.float64, generator=generator) for shape in SHAPES.values()]


def loss_of(worker, step, parameters):
    """Cross-entropy of a small tanh network on a minibatch; inputs and labels are skewed by worker."""
    generator = torch.Generator().manual_seed(1000 * worker + step)
    images = torch.randn(8, 2, 3, 3, dtype=torch.float64, generator=generator) + 0.5 * worker
    labels = (torch.randint(2, (8,), generator=generator) + worker) % 3
    kernel, wide, tall, head, bias, log_scale = parameters
    hidden = torch.tanh(nn.functional.conv2d(images, kernel)).flatten(1)
    hidden = torch.tanh(torch.tanh(hidden @ wide.T) @ tall.T)
    return nn.functional.cross_entropy(log_scale.exp() * (hidden @ head.T + bias), labels)


def make_optimizer(scheme, parameters, **settings):
    if scheme == "identity":
        return PISA(parameters, preconditioner=Identity(), **settings)
    if scheme == "nsisa":
        matrices = [p for k, p in enumerate(parameters) if k != HEAD]
        groups = [{"params": matrices}, {"params": [parameters[HEAD]], "orthogonalize": False}]
        return NSISA(groups, newton_schulz_steps=5, **settings)
    return SISA(parameters, preconditioner=scheme, **settings)


def trajectory_of_optimizer(rank, num_ranks, scheme):
    """Weights after every step, flattened: an array [steps, numel]."""
    worker_weights, sigmas, rhos = WORKERS[num_ranks]
    penalty, scale, settings = SCHEMES[scheme]
    parameters = [nn.Parameter(w) for w in initial_weights()]
    optimizer = make_optimizer(
        scheme,
        parameters,
        penalty=penalty * sigmas[rank],
        preconditioner_scale=scale * rhos[rank],
        worker_weight=worker_weights[rank],
        lr=LR,
        **EVERYWHERE,
        **settings,
    )
    trajectory = []
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        loss_of(rank, step, parameters).backward()
        optimizer.step()
        trajectory.append(nn.utils.parameters_to_vector(parameters).detach().numpy().copy())
    return np.array(trajectory)


def trajectories_on_rank(rank, num_ranks):
    return {scheme: trajectory_of_optimizer(rank, num_ranks, scheme) for scheme in SCHEMES}


def trajectory_of_reference(num_workers, scheme):
    worker_weights, sigmas, rhos = WORKERS[num_workers]
    penalty, scale, settings = SCHEMES[scheme]
    reference = Reference(
        [w.numpy() for w in initial_weights()],
        scheme,
        worker_weights=worker_weights,
        penalties=[penalty * s for s in sigmas],
        preconditioner_scales=[scale * r for r in rhos],
        sisa_tensors=(HEAD,),
        **EVERYWHERE,
        **settings,
    )
    trajectory = []
    for step in range(NUM_STEPS):
        gradients = []
        for worker in range(num_workers):
            parameters = [torch.tensor(w, requires_grad=True) for w in reference.weights]
            gradients.append(torch.autograd.grad(loss_of(worker, step, parameters), parameters))
        trajectory.append(np.concatenate([w.ravel() for w in reference.step(gradients, lr=LR)]))
    return np.array(trajectory)


def relative_difference(a, b):
    """Largest over the steps, each in the norm of all weights."""
    return float(np.max(np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1)))


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_worker_without_a_process_group_follows_the_reference(scheme):
    expected = trajectory_of_reference(1, scheme)
    assert relative_difference(trajectory_of_optimizer(0, 1, scheme), expected) <= TOLERANCE


@pytest.mark.parametrize("num_workers", [2, 4])
def test_unequal_workers_on_ranks_follow_the_reference_and_agree_bit_for_bit(num_workers):
    by_rank = run_ranks(trajectories_on_rank, num_workers)
    for scheme in SCHEMES:
        for other in by_rank[1:]:
            np.testing.assert_array_equal(other[scheme], by_rank[0][scheme], err_msg=scheme)
    differences = {s: relative_difference(by_rank[0][s], trajectory_of_reference(num_workers, s)) for s in SCHEMES}
    assert {s: d for s, d in differences.items() if not d <= TOLERANCE} == {}


# The reference itself, against closed forms.


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_reference_moves_far_enough_to_be_worth_following(scheme):
    trajectory = trajectory_of_reference(2, scheme)
    start = np.concatenate([w.numpy().ravel() for w in initial_weights()])
    assert 0.1 < np.linalg.norm(trajectory[-1] - start) / np.linalg.norm(start) < 10


@pytest.mark.parametrize("shape", [(4, 4), (3, 8), (8, 3)])
def test_newton_schulz_of_the_reference_applies_the_quintic_to_the_singular_values(shape):
    matrix = np.random.default_rng(0).normal(size=shape)
    left, singular_values, right = np.linalg.svd(matrix, full_matrices=False)
    s = singular_values / (np.linalg.norm(singular_values) + 1e-7)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    np.testing.assert_allclose(newton_schulz(matrix), (left * s) @ right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scheme", ["identity", "adagrad", "rmsprop", "adam"])
def test_the_reference_stops_where_the_weighted_gradients_and_the_decay_cancel(scheme):
    curvatures, minimisers, alphas = np.array([1.0, 3.0, 0.2]), np.array([5.0, -2.0, 40.0]), np.array([0.2, 0.5, 0.3])
    reference = Reference(
        [np.zeros(())],
        scheme,
        worker_weights=10 * alphas,
        penalties=[4.0, 8.0, 2.0],
        preconditioner_scales=[1.0, 0.5, 0.2],
        consensus_l2=0.1,
    )
    for _ in range(2000):
        reference.step([[c * (reference.weights[0] - x)] for c, x in zip(curvatures, minimisers, strict=True)])
    expected = alphas @ (curvatures * minimisers) / (alphas @ curvatures + 0.1)
    np.testing.assert_allclose(reference.weights[0], expected, rtol=1e-12)
    duals = [dual[0] for dual in reference.duals]
    np.testing.assert_allclose(duals, -curvatures * (expected - minimisers), rtol=1e-11)
