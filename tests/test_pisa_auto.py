"""The untuned PISA: what it sets, when it begins local steps, and that the scale of the loss does not matter to it."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from problems import make_trainer
from test_baselines import Quadratics, run, some

from pisa_dist.algorithms.pisa_auto import FIRST_PENALTY, LAST_PENALTY, PisaAuto, agreement
from pisa_dist.algorithms.pisa_local import PisaLocal

ROUNDS = 12


def alike():
    """Quadratics whose gradients have most of their square in common at the start, and not the same one."""
    problem = Quadratics()
    problem.hessians[:] = problem.hessians.mean(0)
    problem.centres = problem.centres.mean(0) + 0.2 * (problem.centres - problem.centres.mean(0))
    problem.start = problem.centres.mean(0) + 4.0
    return problem


def different():
    """Quadratics whose gradients nearly cancel at the start."""
    problem = Quadratics()
    problem.start = problem.minimiser() + 0.1
    return problem


@dataclass
class ByHand(PisaLocal):
    """`pisa_local` with a penalty for each round, one step a round until the round given, and local steps after it."""

    penalties: tuple[float, ...] = ()
    until: int = 0

    def at(self, round_):
        penalty = self.penalties[round_.number - 1]
        if round_.number <= self.until:
            return PisaLocal(penalty=penalty, enlarge_batch=True)
        return PisaLocal(penalty=penalty, metric_rounds=3, metric_interval=10)

    def local_work(self, round_, state):
        return self.at(round_).local_work(round_, state)

    def standing_message(self, state, worker_weight, round_):
        return self.at(round_).standing_message(state, worker_weight, round_)

    def consensus(self, round_, message_sum, shared):
        return self.at(round_).consensus(round_, message_sum, shared)


@pytest.mark.parametrize(("make", "until"), [(different, ROUNDS), (alike, 2)])
def test_it_is_pisa_local_with_shrinking_steps_that_takes_local_steps_once_workers_agree(make, until):
    """`some` has one worker in the first round, which agrees with nobody, and the other two in the second."""
    problem = make()
    steps = 0.5 * np.linspace(1 / FIRST_PENALTY, 1 / LAST_PENALTY, ROUNDS)
    by_hand = ByHand(penalties=tuple(1 / steps), until=until)
    found = run(PisaAuto(lr=0.5), problem, ROUNDS, present=some)
    np.testing.assert_allclose(found, run(by_hand, problem, ROUNDS, present=some), rtol=1e-9)
    other = run(replace(by_hand, until=0 if until == ROUNDS else ROUNDS), problem, ROUNDS, present=some)
    assert np.abs(found - other).max() > 1e-3


def test_agreement_is_the_mean_inner_product_of_two_workers_duals():
    random = np.random.default_rng(0)
    alpha, duals = np.array([0.1, 0.2, 0.3]), random.normal(size=(3, 4)) * [[1.0], [2.0], [0.5]] + 0.7
    pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
    weight = sum(alpha[i] * alpha[j] for i, j in pairs)
    common = sum(alpha[i] * alpha[j] * duals[i] @ duals[j] for i, j in pairs) / weight
    expected = common / (alpha @ (duals**2).sum(1) / alpha.sum())
    assert 0.1 < abs(expected) < 0.9
    assert of(alpha, duals) == pytest.approx(expected, rel=1e-12)


def of(alpha, duals):
    """`agreement` of these duals, from what messages bring."""
    square, alpha = (np.asarray(duals) ** 2).sum(1), np.asarray(alpha)
    mean, squares = alpha @ duals, torch.tensor([alpha @ square, alpha**2 @ square, alpha @ alpha])
    return float(agreement(torch.tensor(mean @ mean), squares, seen=torch.tensor(alpha.sum())))


@pytest.mark.parametrize("num_seen", [2, 5])
def test_agreement_is_one_for_equal_duals_and_zero_for_orthogonal_ones_however_many_are_seen(num_seen):
    alpha = np.linspace(0.1, 0.2, num_seen)
    assert of(alpha, np.ones((num_seen, 3))) == pytest.approx(1.0)
    assert of(alpha, np.diag(1.0 + np.arange(num_seen))) == pytest.approx(0.0, abs=1e-12)


def test_a_worker_that_has_been_seen_alone_agrees_with_nobody():
    assert of([0.3], [[1.0, 2.0]]) == 0
    assert of([0.3, 0.2], np.zeros((2, 3))) == 0


def test_the_only_worker_of_a_run_takes_local_steps_from_the_second_round_on():
    trainer = make_trainer(PisaAuto(), num_workers=1, rounds=3, local_steps=30)
    taken = []
    for _ in range(3):
        trainer.run_round()
        taken.append(int(trainer.state.num_steps[0]))
    assert taken == [12, 42, 72]  # a pass over 90 samples in minibatches of 8, then all steps


@pytest.mark.parametrize("factor", [1e-3, 1e3])
@pytest.mark.parametrize("make", [Quadratics, alike])
def test_the_scale_of_the_loss_does_not_matter(factor, make):
    """Penalty and duals are in units of the gradient, which is measured."""
    problem, scaled = make(), make()
    scaled.hessians = factor * scaled.hessians
    plain = run(PisaAuto(), problem, 30, present=some)
    assert np.abs(plain[-1] - problem.start).max() > 0.1
    np.testing.assert_allclose(run(PisaAuto(), scaled, 30, present=some), plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("local_steps", [1, 10])
def test_it_trains_one_class_per_worker_with_its_default(local_steps):
    trainer = make_trainer(PisaAuto(), rounds=60, local_steps=local_steps, participation=0.67, dtype=torch.float32)
    accuracies = [metrics["test_accuracy"] for _, _, metrics in trainer.run() if metrics]
    assert accuracies[-1] > 0.68  # AdamW with everyone present ends at 0.78


@pytest.mark.parametrize("is_skewed", [False, True])
def test_a_message_is_one_tensor_and_with_local_steps_two_where_the_metric_is_formed(is_skewed):
    trainer = make_trainer(PisaAuto(), is_skewed=is_skewed, rounds=16, local_steps=5, dtype=torch.float32)
    sent = [0]
    for _ in range(16):
        trainer.run_round()
        sent.append(trainer.state.bytes_sent)
    numel = sum(w.numel() for w in trainer.state.weights.values())
    tensors = (np.diff(sent) // (3 * 4 * numel)).tolist()
    # P of the matrices is formed with the first local steps, in the second round, in the third and in the tenth.
    assert tensors == [1] * 16 if is_skewed else [1, 2, 2, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1, 1, 1]
