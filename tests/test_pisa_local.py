"""PISA with local steps: against a restatement, exact at its fixed point, with workers that come and go."""

import numpy as np
import pytest
import torch
from problems import make_trainer
from test_baselines import ALPHA, STEPS, Quadratics, run, some

from pisa_dist.algorithms import ALGORITHMS

SETTINGS = {"penalty": 2.0, "lr": 0.05, "relaxation": 0.7, "second_moment_decay": 0.9, "metric_rounds": 3}


def restated(problem, rounds, *, penalty, lr, relaxation, second_moment_decay, metric_rounds, metric_interval=5):
    """DESIGN's method, one worker at a time; the first round averages and forms the metric."""
    b1, b2, eps = 0.9, second_moment_decay, 1e-8
    w, out = problem.start.copy(), []
    dual, first, second, rms = np.zeros((4, 3, 4))
    count, seen, metric = np.zeros(3), np.zeros(3), np.zeros(4)
    for number in range(1, rounds + 1):
        moves = np.zeros((3, 4))
        for i in some(number):
            v = w.copy()
            for _ in range(STEPS):
                count[i] += 1
                g = problem.gradient(i, v)
                first[i] = b1 * first[i] + (1 - b1) * (g + dual[i])
                second[i] = b2 * second[i] + (1 - b2) * g * g
                step = lr / (np.sqrt(second[i] / (1 - b2 ** count[i])) + eps)
                pull = step * penalty * metric
                v = (v - step * first[i] / (1 - b1 ** count[i]) + pull * w) / (1 + pull)
            rms[i] = np.sqrt(second[i] / (1 - b2 ** count[i]))
            moves[i] = v - w
            dual[i] = dual[i] + penalty * metric * moves[i]
            seen[i] = 1
        total = ALPHA @ seen
        if number == 1:
            w = w + ALPHA @ moves / total
        else:
            w = w + relaxation * (ALPHA @ moves) / total + (ALPHA * seen) @ dual / total / (penalty * metric)
        if number <= metric_rounds or number % metric_interval == 0:
            metric = (ALPHA * seen) @ rms / total + eps
        out.append(w)
    return np.array(out)


def test_it_equals_its_restatement_with_workers_that_come_and_go():
    problem = Quadratics()
    found = run(ALGORITHMS["pisa_local"](**SETTINGS), problem, 40, present=some)
    expected = restated(problem, 40, **SETTINGS)
    assert np.abs(expected[-1] - problem.start).max() > 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("relaxation", [1.0, 0.5])
@pytest.mark.parametrize("steps", [1, 4])
def test_where_it_stands_still_every_dual_is_minus_the_local_gradient(relaxation, steps):
    """From the minimiser and duals pi_i = -grad F_i, with zero first moments, nothing moves whoever is present."""
    problem = Quadratics()
    problem.start = problem.minimiser()
    algorithm = ALGORITHMS["pisa_local"](penalty=2.0, relaxation=relaxation)
    worker_duals = torch.tensor(np.array([-problem.gradient(i, problem.start) for i in range(3)]))
    fresh = algorithm.init_worker_state({"w": torch.tensor(problem.start)}, 3)
    fresh["w"]["dual"] = worker_duals.clone()
    fresh["w"]["rms"] = torch.ones(3, 4, dtype=torch.float64)
    fresh["weight seen"]["count"] += 1
    shared = {"w": {"metric": torch.ones(4, dtype=torch.float64)}}

    class AtRest(type(algorithm)):
        def init_worker_state(self, parameters, num_workers):
            return fresh

        def init_shared_state(self, parameters):
            return shared

        def consensus(self, round_, message_sum, shared):
            # Past the first round, which only forms the metric.
            from dataclasses import replace

            return super().consensus(replace(round_, number=round_.number + 1), message_sum, shared)

    at_rest = AtRest(penalty=2.0, relaxation=relaxation)
    found = run(at_rest, problem, 30, present=some, steps=steps)
    np.testing.assert_allclose(found, np.tile(problem.start, (30, 1)), rtol=0, atol=1e-12)
    torch.testing.assert_close(fresh["w"]["dual"], worker_duals, rtol=0, atol=1e-12)


def test_it_trains_one_class_per_worker_though_half_of_them_are_away():
    final = {}
    for name, settings in {"pisa_local": {"lr": 0.01, "penalty": 20.0}, "fedavg": {"lr": 0.1}}.items():
        trainer = make_trainer(
            ALGORITHMS[name](**settings), rounds=80, local_steps=10, participation=0.34, eval_every=1, batch_size=8
        )
        accuracies = [metrics["test_accuracy"] for _, _, metrics in trainer.run() if metrics]
        final[name] = np.mean(accuracies[-20:])
    assert final["pisa_local"] > final["fedavg"] + 0.1


def test_the_metrics_bytes_vanish_in_most_rounds():
    trainer = make_trainer(
        ALGORITHMS["pisa_local"](metric_rounds=1, metric_interval=4), rounds=8, local_steps=2, dtype=torch.float32
    )
    sent = [0]
    for _ in range(8):
        trainer.run_round()
        sent.append(trainer.state.bytes_sent)
    sizes = np.diff(sent)
    numel = sum(w.numel() for w in trainer.state.weights.values())
    assert (sizes[[0, 3, 7]] - sizes[[1, 4, 5]] == 3 * 4 * numel).all()
    assert len(set(sizes[[1, 2, 4, 5, 6]])) == 1
