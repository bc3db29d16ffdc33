"""What the algorithm promises, each promise a test: exact statements about SISA and PISA in float64."""

from functools import cache

import numpy as np
import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pisa_dist import PISA, SISA
from pisa_dist.admm.preconditioners import Identity

PRECONDITIONERS = ["adam", "rmsprop", "adagrad"]
SIZE = 5
positive = st.floats(0.1, 100.0)
not_negative = st.floats(0.0, 100.0)
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    torch.set_num_threads(1)


def random_vectors(seed, num_vectors):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(num_vectors, SIZE)))


def record(optimizer, parameter, gradients):
    """Weights before the first and after every step, and the dual after every step."""
    weights, duals = [parameter.detach().clone()], []
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
        weights.append(parameter.detach().clone())
        duals.append(optimizer.state[parameter]["dual"].clone())
    return weights, duals


def assert_close(actual, expected, rtol=1e-12, atol=1e-12):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


# 1. Without a preconditioner (rho = 0)


@settings(deadline=None, max_examples=20)
@given(penalty=positive, preconditioner=st.sampled_from(PRECONDITIONERS), seed=seeds)
def test_without_preconditioning_the_dual_is_minus_the_last_gradient(penalty, preconditioner, seed):
    parameter = nn.Parameter(random_vectors(seed, 1)[0])
    optimizer = SISA([parameter], penalty=penalty, preconditioner_scale=0.0, preconditioner=preconditioner)
    gradients = random_vectors(seed + 1, 6)
    _, duals = record(optimizer, parameter, gradients)
    for dual, gradient in zip(duals, gradients, strict=True):
        assert_close(dual, -gradient)


@settings(deadline=None, max_examples=20)
@given(penalty=positive, seed=seeds)
def test_without_preconditioning_one_worker_moves_by_twice_the_new_gradient_less_the_old_one(penalty, seed):
    parameter = nn.Parameter(random_vectors(seed, 1)[0])
    optimizer = SISA([parameter], penalty=penalty, preconditioner_scale=0.0)
    gradients = random_vectors(seed + 1, 6)
    weights, _ = record(optimizer, parameter, gradients)
    assert_close(weights[1], weights[0] - 2 * gradients[0] / penalty)
    for t in range(1, len(gradients)):
        assert_close(weights[t + 1], weights[t] - (2 * gradients[t] - gradients[t - 1]) / penalty)


# 2. With a constant preconditioner


@settings(deadline=None, max_examples=20)
@given(penalty=positive, scale=not_negative, seed=seeds)
def test_with_a_constant_preconditioner_minus_the_dual_is_an_exponential_average_of_gradients(penalty, scale, seed):
    parameter = nn.Parameter(random_vectors(seed, 1)[0])
    optimizer = PISA([parameter], preconditioner=Identity(), penalty=penalty, preconditioner_scale=scale)
    gradients = random_vectors(seed + 1, 8)
    weights, duals = record(optimizer, parameter, gradients)
    theta = penalty / (penalty + scale)
    average = torch.zeros(SIZE, dtype=torch.float64)
    for t, gradient in enumerate(gradients):
        move = -((1 - 2 * theta) * average + 2 * theta * gradient) / penalty
        average = (1 - theta) * average + theta * gradient
        assert_close(duals[t], -average)
        assert_close(weights[t + 1], weights[t] + move)


@settings(deadline=None, max_examples=20)
@given(penalty=positive, momentum=st.floats(0.0, 0.8), seed=seeds)
def test_one_over_the_penalty_is_the_long_run_step_size(penalty, momentum, seed):
    parameter = nn.Parameter(torch.zeros(SIZE, dtype=torch.float64))
    scale = penalty * momentum / (1 - momentum)
    optimizer = PISA([parameter], preconditioner=Identity(), penalty=penalty, preconditioner_scale=scale)
    gradient = random_vectors(seed, 1)[0]
    weights, _ = record(optimizer, parameter, [gradient] * 150)
    assert_close(weights[-1] - weights[-2], -gradient / penalty, rtol=1e-10)


# 3. Workers whose data differ

NUM_WORKERS = 4
CONSENSUS_L2 = 0.03
NUM_STEPS = 460
SCALES = {"adam": 1.0, "rmsprop": 1.0, "adagrad": 0.01, "identity": 1.0}  # rho of worker 0
WORKER_WEIGHTS = np.array([0.1, 0.2, 0.3, 0.4])


@cache
def quadratics():
    """Hessians with eigenvalues from 0.1 to 4 in other directions for each worker, and minimisers far apart."""
    random = np.random.default_rng(0)
    bases = [np.linalg.qr(random.normal(size=(SIZE, SIZE)))[0] for _ in range(NUM_WORKERS)]
    hessians = np.array([q @ np.diag([4.0, 2.0, 1.0, 0.5, 0.1]) @ q.T for q in bases])
    return hessians, 100 * random.normal(size=(NUM_WORKERS, SIZE))


def local_gradients(weights):
    """Gradient of every worker, at the same weights or at its own (one row for each worker)."""
    hessians, minimisers = quadratics()
    return np.einsum("ijk,ik->ij", hessians, weights - minimisers)


def global_minimiser():
    hessians, minimisers = quadratics()
    left = np.einsum("i,ijk->jk", WORKER_WEIGHTS, hessians) + CONSENSUS_L2 * np.eye(SIZE)
    return np.linalg.solve(left, np.einsum("i,ijk,ik->j", WORKER_WEIGHTS, hessians, minimisers))


def relative_error(w):
    return np.linalg.norm(w - global_minimiser()) / np.linalg.norm(global_minimiser())


def solve_quadratics(rank, num_ranks):
    """Final weights and dual of this worker for each preconditioner."""
    hessians, minimisers = (torch.from_numpy(x[rank]) for x in quadratics())
    parameters = {name: nn.Parameter(torch.zeros(SIZE, dtype=torch.float64)) for name in SCALES}
    *second_moments, identity = [
        {"params": [parameters[name]], "preconditioner_scale": scale / (1 + rank)} for name, scale in SCALES.items()
    ]
    for name, group in zip(PRECONDITIONERS, second_moments, strict=True):
        group["preconditioner"] = name
    common = {"penalty": 4.0 + rank, "consensus_l2": CONSENSUS_L2, "worker_weight": WORKER_WEIGHTS[rank]}
    optimizers = [
        SISA(second_moments, second_moment_decay=0.9, **common),
        PISA([identity], preconditioner=Identity(), **common),
    ]
    for _ in range(NUM_STEPS):
        for p in parameters.values():
            p.grad = hessians @ (p.detach() - minimisers)
        for optimizer in optimizers:
            optimizer.step()
    state = optimizers[0].state | optimizers[1].state
    return {name: (p.detach().numpy(), state[p]["dual"].numpy()) for name, p in parameters.items()}


def test_on_heterogeneous_quadratics_every_worker_reaches_the_global_minimiser_and_its_dual_minus_its_gradient():
    by_rank = run_ranks(solve_quadratics, NUM_WORKERS)
    gradients = local_gradients(global_minimiser())
    assert np.linalg.norm(gradients, axis=1).min() > 10, "the workers must disagree for this to mean anything"
    for preconditioner in SCALES:
        weights, duals = zip(*(outcome[preconditioner] for outcome in by_rank), strict=True)
        assert max(relative_error(w) for w in weights) < 2e-12, preconditioner
        np.testing.assert_allclose(duals, -gradients, rtol=0, atol=1e-10, err_msg=preconditioner)


@pytest.mark.parametrize("num_local_steps", [2, 10])
def test_on_heterogeneous_quadratics_fedavg_with_local_steps_stops_elsewhere(num_local_steps):
    w, step_size = np.zeros(SIZE), 0.1
    for _ in range(4000 // num_local_steps):
        previous, local = w, np.tile(w, (NUM_WORKERS, 1))
        for _ in range(num_local_steps):
            local = local - step_size * (local_gradients(local) + CONSENSUS_L2 * local)
        w = WORKER_WEIGHTS @ local
    assert np.linalg.norm(w - previous) < 1e-10, "it has stopped"
    assert relative_error(w) > 0.01


# 4. A growing penalty


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
@pytest.mark.parametrize("gamma", [0.75, 0.95])
def test_a_growing_penalty_makes_moves_and_disagreement_vanish_geometrically(preconditioner, gamma):
    penalty, num_steps = 2.0, 60
    parameter = nn.Parameter(torch.zeros(SIZE, dtype=torch.float64))
    optimizer = SISA(
        [parameter],
        penalty=penalty,
        preconditioner_scale=5.0,
        preconditioner=preconditioner,
        penalty_growth=1 / gamma,
    )
    gradients = random_vectors(0, num_steps).clamp(-1, 1)  # never die down by themselves
    weights, duals = record(optimizer, parameter, gradients)
    for t in range(num_steps):
        sigma = penalty / gamma**t
        before = duals[t - 1] if t else torch.zeros(SIZE, dtype=torch.float64)
        disagreement = (duals[t] - before) / sigma  # u_i, from the dual step
        # |pi_i| <= max |g_i| by induction, so |sigma u_i| <= 2 max |g_i| and the move adds |pi_i| once more.
        assert disagreement.abs().max() <= 2 * gamma**t / penalty
        assert (weights[t + 1] - weights[t]).abs().max() <= 3 * gamma**t / penalty * (1 + 1e-9) + 1e-15


def test_a_constant_penalty_keeps_moving_on_gradients_that_do_not_die_down():
    parameter = nn.Parameter(torch.zeros(SIZE, dtype=torch.float64))
    optimizer = SISA([parameter], penalty=2.0, preconditioner_scale=5.0, penalty_growth=1.0)
    weights, _ = record(optimizer, parameter, random_vectors(0, 60).clamp(-1, 1))
    assert (weights[-1] - weights[-2]).abs().max() > 0.01


# 5. A worker split in two


def two_workers_and_one_of_them_halved(rank, num_ranks):
    """Weights after 50 steps: three ranks of which 0 and 1 are halves of one worker; then ranks 1 and 2 alone.

    Last, those two again with both weights seven times as large.
    """
    pair = dist.new_group([1, 2])
    worker = 0 if rank < 2 else 1
    hessians, minimisers = (torch.from_numpy(x[worker]) for x in quadratics())
    trajectories = []
    for group, worker_weight in [
        (None, [0.35, 0.35, 0.3][rank]),
        (pair, [0, 0.7, 0.3][rank]),
        (pair, [0, 4.9, 2.1][rank]),
    ]:
        if group is pair and rank == 0:
            continue
        parameter = nn.Parameter(torch.ones(SIZE, dtype=torch.float64))
        optimizer = SISA(
            [parameter],
            penalty=[5.0, 9.0][worker],
            preconditioner_scale=[3.0, 1.0][worker],
            consensus_l2=CONSENSUS_L2,
            penalty_growth=1.001,
            worker_weight=worker_weight,
            process_group=group,
        )
        weights = []
        for _ in range(50):
            parameter.grad = hessians @ (parameter.detach() - minimisers)
            optimizer.step()
            weights.append(parameter.detach().numpy().copy())
        trajectories.append(np.array(weights))
    return trajectories


def test_splitting_a_worker_into_halves_or_scaling_all_weights_changes_nothing():
    halved, whole, scaled = run_ranks(two_workers_and_one_of_them_halved, 3)[2]
    assert np.linalg.norm(whole[-1] - whole[0]) > 1
    np.testing.assert_allclose(halved, whole, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(scaled, whole, rtol=1e-12, atol=1e-12)
