"""PISA with local steps: against a restatement, exact at its fixed point, with workers that come and go."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from problems import make_trainer
from test_baselines import ALPHA, STEPS, Quadratics, everyone, run, some

from pisa_dist.algorithms import ALGORITHMS

SETTINGS = {"metric": "adam", "penalty": 2.0, "relaxation": 0.7, "second_moment_decay": 0.9, "metric_rounds": 3}


def restated(
    problem, rounds, *, penalty, relaxation, second_moment_decay, metric_rounds, growth=1.0, scale=None, stays=False
):
    """PISA with local steps under a diagonal metric, one worker at a time; a worker that `stays` moves in none."""
    b1, b2, eps = 0.9, second_moment_decay, 1e-8
    w, out = problem.start.copy(), []
    dual, first, second, rms = np.zeros((4, 3, 4))
    count, metric = np.zeros(3), np.zeros(4)
    for number in range(1, rounds + 1):
        sigma = penalty * growth ** (number - 1)
        lr = 1 / (scale or sigma * STEPS)
        moves = np.zeros((3, 4))
        for i in some(number):
            v, gradients, is_new = w.copy(), [], count[i] == 0
            for _ in range(STEPS):
                count[i] += 1
                g = problem.gradient(i, v)
                gradients.append(g)
                first[i] = b1 * first[i] + (1 - b1) * (g + dual[i])
                second[i] = b2 * second[i] + (1 - b2) * g * g
                step = lr / (np.sqrt(second[i] / (1 - b2 ** count[i])) + eps)
                pull = step * sigma * metric
                if stays:
                    continue
                v = (v - step * first[i] / (1 - b1 ** count[i]) + pull * w) / (1 + pull)
            rms[i] = np.sqrt(second[i] / (1 - b2 ** count[i]))
            moves[i] = 0 if is_new and number > 1 else v - w
            dual[i] = -np.mean(gradients, axis=0) if is_new or stays else dual[i] + sigma * metric * moves[i]
        seen = ALPHA * (count > 0) / (ALPHA @ (count > 0))
        formed = metric
        if number <= metric_rounds or number % 5 == 0:
            formed = seen @ rms + eps
        used = metric if metric.any() else formed
        mean_dual = seen @ dual
        direction = mean_dual / np.maximum(used, np.abs(mean_dual))
        w = w + relaxation * (ALPHA @ moves) / (ALPHA @ (count > 0)) + direction / sigma
        metric = formed
        out.append(w)
    return np.array(out)


@pytest.mark.parametrize(
    "changes", [{}, {"penalty_growth": 1.05}, {"preconditioner_scale": 20.0}, {"enlarge_batch": True}], ids=str
)
def test_it_equals_its_restatement_with_workers_that_come_and_go(changes):
    problem = Quadratics()
    found = run(ALGORITHMS["pisa_local"](**SETTINGS, **changes), problem, 40, present=some)
    names = {"penalty_growth": "growth", "preconditioner_scale": "scale", "enlarge_batch": "stays"}
    own = {name: value for name, value in SETTINGS.items() if name != "metric"}
    expected = restated(problem, 40, **own, **{names[name]: value for name, value in changes.items()})
    assert np.abs(expected[-1] - problem.start).max() > 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("participation", [1.0, 0.4])
@pytest.mark.parametrize("relaxation", [1.0, 0.3])
def test_one_local_step_without_a_metric_is_the_papers_step(participation, relaxation):
    knobs = {"penalty": 3.0, "preconditioner_scale": 2.0, "penalty_growth": 1.01, "lr": 0.7}
    weights = []
    for algorithm in (
        ALGORITHMS["pisa"](**knobs),
        ALGORITHMS["pisa_local"](metric="none", relaxation=relaxation, **knobs),
    ):
        trainer = make_trainer(algorithm, num_workers=5, rounds=30, participation=participation, eval_every=30)
        list(trainer.run())
        weights.append(torch.cat([w.flatten() for w in trainer.state.weights.values()]))
    difference = (weights[0] - weights[1]).abs().max()
    assert difference < 1e-12 if relaxation == 1 else difference > 1e-3


@pytest.mark.parametrize("present", [everyone, some])
@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({"metric": "none", "penalty": 2.0, "preconditioner_scale": 4.0}, 1e-9),
        ({"metric": "none", "penalty": 2.0, "preconditioner_scale": 4.0, "relaxation": 0.0}, 1e-9),
        ({"metric": "adam", "penalty": 4.0, "metric_rounds": 500}, 1e-6),
        ({"metric": "none", "penalty": 8.0, "enlarge_batch": True}, 1e-9),
        ({"metric": "adam", "penalty": 8.0, "metric_rounds": 500, "enlarge_batch": True}, 1e-6),
    ],
    ids=str,
)
def test_it_reaches_the_minimiser_of_quadratics_that_differ_from_worker_to_worker(settings, tolerance, present):
    problem = Quadratics()
    found = run(ALGORITHMS["pisa_local"](**settings), problem, 2000, present=present)
    assert np.abs(problem.start - problem.minimiser()).max() > 0.5
    assert np.abs(found[-1] - problem.minimiser()).max() < tolerance


def distances(problem, rounds, *, present, **settings):
    """From the minimiser, after every round: the largest of a matrix's entries, and before the first."""
    found = run(ALGORITHMS["pisa_local"](**settings), problem, rounds, present=present)
    away = np.abs(np.stack([problem.start, *found]) - problem.minimiser())
    return away.reshape(rounds + 1, -1).max(axis=1)


# Growth ends a run early if it is too fast: the steps that are left, 1/sigma each, must be enough to get there.
GROWING = {"none": (4.0, 1.004, 300), "adam": (4.0, 1.004, 800), "muon": (1.5, 1.02, 500), "kron": (1.5, 1.02, 500)}


@pytest.mark.parametrize("enlarge_batch", [False, True], ids=["local steps", "large batch"])
@pytest.mark.parametrize("present", [everyone, some])
@pytest.mark.parametrize("metric", GROWING)
def test_with_a_growing_penalty_it_reaches_the_minimiser_in_every_metric(metric, present, enlarge_batch):
    """On matrices, for which each metric has a rule of its own. What muon and kron are away by goes as 1/sigma."""
    problem, (penalty, growth, rounds) = Quadratics(shape=(4, 3)), GROWING[metric]
    settings = {"penalty": penalty, "penalty_growth": growth, "metric_rounds": 3, "enlarge_batch": enlarge_batch}
    away = distances(problem, rounds, present=present, metric=metric, **settings)
    assert away[0] > 3
    assert away[-1] < {"none": 1e-9, "adam": 1e-6, "muon": 2e-4, "kron": 2e-4}[metric]
    if metric in ("muon", "kron"):
        in_steps = away[1:] * penalty * growth ** np.arange(rounds)
        assert in_steps[rounds // 2 :].max() < 4


@pytest.mark.parametrize("penalty", [5.0, 20.0])
@pytest.mark.parametrize("metric", ["muon", "kron"])
def test_with_a_constant_penalty_muon_and_kron_stay_about_a_step_away_from_the_minimiser(metric, penalty):
    """Their step has the same length however small the mean dual is."""
    away = distances(Quadratics(shape=(4, 3)), 500, present=everyone, metric=metric, penalty=penalty, metric_rounds=3)
    assert 0.2 < penalty * away[-100:].min() < penalty * away[-100:].max() < 2


class Balanced:
    """Gradients at the minimiser, 0, are large and cancel without rounding: whole numbers, and alpha in quarters."""

    alpha = np.array([0.25, 0.5, 0.25])

    def __init__(self):
        random = np.random.default_rng(0)
        self.hessians = np.stack([size * np.eye(12) for size in (1.0, 2.0, 4.0)])
        first, second = random.integers(-8, 9, size=(2, 4, 3)).astype(float)
        self.centres = np.stack([4 * first, 2 * second, -first - 2 * second])
        self.start = np.zeros((4, 3))

    def gradient(self, i, w):
        return (self.hessians[i] @ (w - self.centres[i]).ravel()).reshape(w.shape)


@pytest.mark.parametrize("metric", ["none", "adam", "muon", "kron"])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("enlarge_batch", [False, True])
def test_where_it_stands_still_every_dual_is_minus_the_local_gradient(metric, steps, enlarge_batch):
    """From the minimiser and duals pi_i = -grad F_i, with zero first moments, nothing moves whoever is present."""
    problem, settings = Balanced(), {"penalty": 2.0, "relaxation": 0.5, "enlarge_batch": enlarge_batch}
    algorithm = ALGORITHMS["pisa_local"](metric=metric, **settings)
    worker_duals = torch.tensor(np.array([-problem.gradient(i, problem.start) for i in range(3)]))
    fresh = algorithm.init_worker_state({"w": torch.tensor(problem.start)}, 3)
    fresh["w"]["dual"] = worker_duals.clone()
    fresh["weight seen"]["steps"] += 1
    shared = algorithm.init_shared_state({"w": torch.tensor(problem.start)})
    if metric != "none":
        shared["w"]["metric"] += 1

    class AtRest(type(algorithm)):
        def init_worker_state(self, parameters, num_workers):
            return fresh

        def init_shared_state(self, parameters):
            return shared

        def local_work(self, round_, state):
            # Past a worker's first round, in which it has no dual yet.
            return super().local_work(replace(round_, num_steps_before=round_.num_steps_before + 1), state)

    found = run(AtRest(metric=metric, **settings), problem, 30, present=some, steps=steps, alpha=problem.alpha)
    assert worker_duals.abs().amax(dim=(1, 2)).min() > 1
    assert not found.any()
    assert torch.equal(fresh["w"]["dual"], worker_duals)


def test_it_trains_one_class_per_worker_though_half_of_them_are_away():
    final = {}
    for name, settings in {"pisa_local": {"penalty": 20.0}, "fedavg": {"lr": 0.1}}.items():
        trainer = make_trainer(
            ALGORITHMS[name](**settings), rounds=80, local_steps=10, participation=0.34, eval_every=1, batch_size=8
        )
        accuracies = [metrics["test_accuracy"] for _, _, metrics in trainer.run() if metrics]
        final[name] = np.mean(accuracies[-20:])
    assert final["pisa_local"] > final["fedavg"] + 0.1


@pytest.mark.parametrize("enlarge_batch", [False, True])
def test_a_message_is_one_tensor_and_more_where_the_metric_is_formed_or_duals_are_new(enlarge_batch):
    algorithm = ALGORITHMS["pisa_local"](metric_rounds=1, metric_interval=4, enlarge_batch=enlarge_batch)
    trainer = make_trainer(algorithm, rounds=8, local_steps=2, dtype=torch.float32)
    sent = [0]
    for _ in range(8):
        trainer.run_round()
        sent.append(trainer.state.bytes_sent)
    sizes = np.diff(sent)
    weights = trainer.state.weights.values()
    numel, in_vectors = sum(w.numel() for w in weights), sum(w.numel() for w in weights if w.ndim == 1)
    assert len(set(sizes[[1, 2, 4, 5, 6]])) == 1
    assert sizes[1] // (3 * 4 * numel) == 1
    formed = in_vectors if enlarge_batch else numel
    assert (sizes[[3, 7]] - sizes[[1, 2]] == 3 * 4 * formed).all()
    assert sizes[0] - sizes[1] == 3 * 4 * (formed if enlarge_batch else formed + numel)


@pytest.mark.parametrize("epochs", [None, 3.0])
def test_one_step_of_a_large_batch_goes_once_through_the_data_at_most(epochs):
    """Blobs in shards of 34, 26 and 30, minibatches of 8: a pass takes 5, 4 and 4 steps."""
    taken = {}
    for enlarge_batch in (False, True):
        algorithm = ALGORITHMS["pisa_local"](enlarge_batch=enlarge_batch)
        steps = {"local_steps": 12} if epochs is None else {"local_epochs": epochs}
        trainer = make_trainer(algorithm, rounds=2, **steps)
        assert list(trainer.shard_sizes) == [34, 26, 30]
        trainer.run_round()
        taken[enlarge_batch] = trainer.state.num_steps.tolist()
        assert trainer.state.samples_seen == 8 * sum(taken[enlarge_batch])
    assert taken == {False: [12, 12, 12] if epochs is None else [13, 10, 12], True: [5, 4, 4]}
