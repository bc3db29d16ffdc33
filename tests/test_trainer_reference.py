"""The trainer's PISA, SISA and NSISA against the NumPy reference: several workers on several ranks."""

from functools import cache

import numpy as np
import pytest
import torch
from harness import run_ranks
from problems import make_trainer, small_net
from reference import Reference
from torch.func import functional_call

from pisa_dist.algorithms import ALGORITHMS
from pisa_dist.consensus import AllReduce, InProcess
from pisa_dist.metrics import cross_entropy

pytestmark = pytest.mark.timeout(300)

NUM_STEPS = 200
TOLERANCE = 1e-10
EVERYWHERE = {"consensus_l2": 0.05, "penalty_growth": 1.01, "lr": 0.8}
SCHEMES = {  # scheme: method, settings of both, penalty (NSISA: large enough not to be chaotic), preconditioner_scale
    "adam": ("sisa", {"second_moment_decay": 0.99, "preconditioner_bound": 0.1}, 2.0, 30.0),
    "rmsprop": ("sisa", {"second_moment_decay": 0.9, "preconditioner_bound": 0.1, "eps": 1e-6}, 3.0, 20.0),
    "adagrad": ("sisa", {"preconditioner_bound": 0.2}, 3.0, 10.0),
    "identity": ("pisa", {}, 4.0, 6.0),
    "nsisa": ("nsisa", {"momentum": 0.9, "preconditioner_bound": 0.1, "eps": 1e-6}, 100.0, 40.0),
}


def factors_of(num_workers):
    return [1.0 + 0.3 * (worker % 4) for worker in range(num_workers)]


def whole_shard_trainer(scheme, num_workers, consensus):
    """Batches as large as the shards, so that gradients are exact and need no sampling in the reference."""
    name, settings, penalty, scale = SCHEMES[scheme]
    chosen = {"preconditioner": scheme} if name == "sisa" else {}
    algorithm = ALGORITHMS[name](
        penalty=penalty,
        preconditioner_scale=scale,
        penalty_factors=factors_of(num_workers),
        **chosen,
        **settings,
        **EVERYWHERE,
    )
    return make_trainer(
        algorithm, num_workers=num_workers, rounds=NUM_STEPS, batch_size=1000, eval_every=NUM_STEPS, consensus=consensus
    )


def trajectories(rank, num_ranks, num_workers):
    found = {}
    for scheme in SCHEMES:
        trainer = whole_shard_trainer(scheme, num_workers, AllReduce() if num_ranks > 1 else InProcess())
        steps = []
        for _ in range(NUM_STEPS):
            trainer.run_round()
            steps.append(torch.cat([w.flatten() for w in trainer.state.weights.values()]).numpy())
        found[scheme] = np.array(steps)
    return found


@cache
def reference_trajectory(scheme, num_workers):
    trainer = whole_shard_trainer(scheme, num_workers, InProcess())
    _, settings, penalty, scale = SCHEMES[scheme]
    model, names = small_net(), list(trainer.state.weights)
    everywhere = {key: value for key, value in EVERYWHERE.items() if key != "lr"}
    reference = Reference(
        [trainer.state.weights[name].numpy() for name in names],
        scheme,
        worker_weights=trainer.shard_sizes,
        penalties=[penalty * factor for factor in factors_of(num_workers)],
        preconditioner_scales=[scale] * num_workers,
        **settings,
        **everywhere,
    )
    steps = []
    for _ in range(NUM_STEPS):
        gradients = []
        for worker in range(num_workers):
            leaves = [torch.tensor(w).requires_grad_() for w in reference.weights]
            shard = trainer.shards[worker]
            loss = cross_entropy(
                functional_call(model, dict(zip(names, leaves, strict=True)), (shard.inputs,)), shard.targets
            )
            gradients.append([g.numpy() for g in torch.autograd.grad(loss, leaves)])
        reference.step(gradients, lr=EVERYWHERE["lr"])
        steps.append(np.concatenate([w.ravel() for w in reference.weights]))
    return np.array(steps)


LAYOUTS = [
    # One process for all layouts of as many workers: they have one reference.
    pytest.param(workers, ranks, marks=pytest.mark.xdist_group(f"reference of {workers} workers"))
    for workers, ranks in [(1, 1), (3, 1), (3, 2), (10, 1), (10, 2), (10, 4)]
]


@pytest.mark.parametrize(("num_workers", "num_ranks"), LAYOUTS)
def test_workers_on_ranks_follow_the_reference(num_workers, num_ranks):
    by_rank = [trajectories(0, 1, num_workers)] if num_ranks == 1 else run_ranks(trajectories, num_ranks, num_workers)
    for scheme in SCHEMES:
        expected = reference_trajectory(scheme, num_workers)
        distance = np.linalg.norm(by_rank[0][scheme] - expected, axis=1) / np.linalg.norm(expected, axis=1)
        assert distance.max() <= TOLERANCE, (scheme, distance.max())
        assert np.linalg.norm(expected[-1] - expected[0]) > 0.1, "the trajectory must go somewhere"
        assert all(np.array_equal(other[scheme], by_rank[0][scheme]) for other in by_rank[1:])
