"""FedProx, FedNova, SCAFFOLD, FedDyn, MIFA, DiLoCo: against few-line re-statements, and by what defines each."""

import math

import numpy as np
import pytest
import torch
from problems import make_trainer, small_net

from pisa_dist.algorithms import ALGORITHMS
from pisa_dist.algorithms.base import Round

ALPHA = np.array([0.2, 0.5, 0.3])
STEPS = 4


class Quadratics:
    """F_i(w) = 1/2 (w - c_i)' H_i (w - c_i), very different from worker to worker; w may be a matrix, H_i is not."""

    def __init__(self, seed=0, shape=(4,)):
        random, size = np.random.default_rng(seed), math.prod(shape)
        factors = random.normal(size=(3, size, size))
        self.hessians = factors @ factors.transpose(0, 2, 1) / size + 0.3 * np.eye(size)
        self.centres = 3 * random.normal(size=(3, *shape))
        self.start = random.normal(size=shape)

    def gradient(self, i, w):
        return (self.hessians[i] @ (w - self.centres[i]).ravel()).reshape(w.shape)

    def minimiser(self):
        total = np.einsum("i,ijk->jk", ALPHA, self.hessians)
        pulls = np.einsum("i,ijk,ik->j", ALPHA, self.hessians, self.centres.reshape(3, -1))
        return np.linalg.solve(total, pulls).reshape(self.start.shape)


def everyone(number):
    return [0, 1, 2]


def run(algorithm, problem, rounds, *, present=everyone, steps=STEPS, alpha=ALPHA):
    """The package's method on the quadratics: weights after every round. `steps`: of all, or of each worker."""
    steps = steps if isinstance(steps, list) else [steps] * 3
    weights = {"w": torch.tensor(problem.start)}
    workers = algorithm.init_worker_state(weights, 3)
    shared = algorithm.init_shared_state(weights)
    counts, num_steps = torch.zeros(2, 3, dtype=torch.int64)
    hessians, centres = torch.tensor(problem.hessians), torch.tensor(problem.centres)
    alpha = torch.tensor(alpha)
    trajectory = []
    for number in range(1, rounds + 1):
        here = present(number)
        counts[here] += 1
        message = {}
        for num_local_steps in {steps[i] for i in here}:  # as the trainer does: one call for equal numbers of steps
            rows = [i for i in here if steps[i] == num_local_steps]

            def gradients(local, step, rows=rows):
                away = (local["w"] - centres[rows]).flatten(1)
                return {"w": torch.einsum("ijk,ik->ij", hessians[rows], away).view_as(local["w"])}

            round_ = Round(
                number=number,
                num_rounds=rounds,
                num_local_steps=num_local_steps,
                weights=weights,
                workers=rows,
                worker_weight=alpha[rows],
                all_worker_weights=alpha,
                present_weight=float(alpha[here].sum()),
                num_participations=counts[rows],
                num_steps_before=num_steps[rows],
                gradients=gradients,
                shared=shared,
            )
            state = {n: {k: v[rows] for k, v in kinds.items()} for n, kinds in workers.items()}
            local = algorithm.local_work(round_, state)
            message = {key: value + message.get(key, 0) for key, value in local.message.items()}
            for name, kinds in local.state.items():
                for kind, value in kinds.items():
                    workers[name][kind][rows] = value
            num_steps[rows] += num_local_steps
        absent = [i for i in range(3) if i not in here]
        if absent:
            away = {n: {k: v[absent] for k, v in kinds.items()} for n, kinds in workers.items()}
            for key, value in algorithm.standing_message(away, alpha[absent], round_).items():
                message[key] = message[key] + value
        weights, shared, _ = algorithm.consensus(round_, message, shared)
        trajectory.append(weights["w"].numpy().copy())
    return np.array(trajectory)


def some(number):
    return [[0, 1, 2], [1], [0, 2]][number % 3]


def fedprox(problem, rounds, *, lr, proximal):
    w, out = problem.start.copy(), []
    for number in range(1, rounds + 1):
        ends = {}
        for i in some(number):
            v = w.copy()
            for _ in range(STEPS):
                v = v - lr * (problem.gradient(i, v) + proximal * (v - w))
            ends[i] = v
        w = sum(ALPHA[i] * v for i, v in ends.items()) / sum(ALPHA[i] for i in ends)
        out.append(w)
    return np.array(out)


def fednova(problem, rounds, *, lr, momentum, steps):
    """The paper's equation (9) with a_i written out: how often each step's gradient enters the displacement."""
    w, out = problem.start.copy(), []
    for number in range(1, rounds + 1):
        direction, tau = np.zeros(4), 0.0
        total = sum(ALPHA[i] for i in some(number))
        for i in some(number):
            v, gradients = w.copy(), []
            for last in range(steps[i]):
                gradients.append(problem.gradient(i, v))
                v = v - lr * sum(momentum ** (last - k) * g for k, g in enumerate(gradients))
            a = [sum(momentum**power for power in range(steps[i] - k)) for k in range(steps[i])]
            np.testing.assert_allclose(w - v, lr * sum(c * g for c, g in zip(a, gradients, strict=True)), atol=1e-12)
            direction += ALPHA[i] / total * sum(c * g for c, g in zip(a, gradients, strict=True)) / sum(a)
            tau += ALPHA[i] / total * sum(a)
        w = w - tau * lr * direction
        out.append(w)
    return np.array(out)


def scaffold(problem, rounds, *, lr, server_lr, option):
    w, c, controls, out = problem.start.copy(), np.zeros(4), np.zeros((3, 4)), []
    for number in range(1, rounds + 1):
        step, change = np.zeros(4), np.zeros(4)
        for i in some(number):
            v = w.copy()
            for _ in range(STEPS):
                v = v - lr * (problem.gradient(i, v) - controls[i] + c)
            new = problem.gradient(i, w) if option == 1 else controls[i] - c + (w - v) / (STEPS * lr)
            step += ALPHA[i] * (v - w)
            change += ALPHA[i] * (new - controls[i])
            controls[i] = new
        w = w + server_lr * step / sum(ALPHA[i] for i in some(number))
        c = c + change
        out.append(w)
    return np.array(out)


def feddyn(problem, rounds, *, lr, regularization):
    w, h, memories, out = problem.start.copy(), np.zeros(4), np.zeros((3, 4)), []
    for number in range(1, rounds + 1):
        ends = {}
        for i in some(number):
            v = w.copy()
            for _ in range(STEPS):
                v = v - lr * (problem.gradient(i, v) - memories[i] + regularization * (v - w))
            memories[i] = memories[i] - regularization * (v - w)
            ends[i] = v
        h = h - regularization * sum(ALPHA[i] * (v - w) for i, v in ends.items())
        w = sum(ALPHA[i] * v for i, v in ends.items()) / sum(ALPHA[i] for i in ends) - h / regularization
        out.append(w)
    return np.array(out)


def mifa(problem, rounds, *, lr):
    w, updates, out = problem.start.copy(), np.zeros((3, 4)), []
    for number in range(1, rounds + 1):
        for i in some(number):
            v = w.copy()
            for _ in range(STEPS):
                v = v - lr * problem.gradient(i, v)
            updates[i] = v - w
        w = w + ALPHA @ updates
        out.append(w)
    return np.array(out)


def diloco(problem, rounds, *, lr, weight_decay, outer_lr, outer_momentum, steps=(STEPS,) * 3):
    outer = torch.nn.Parameter(torch.tensor(problem.start))
    outer_optimizer = torch.optim.SGD([outer], lr=outer_lr, momentum=outer_momentum, nesterov=outer_momentum > 0)
    inner = [torch.nn.Parameter(outer.detach().clone()) for _ in range(3)]
    optimizers = [torch.optim.AdamW([p], lr=lr, weight_decay=weight_decay) for p in inner]
    out = []
    for number in range(1, rounds + 1):
        mean = np.zeros(4)
        for i in some(number):
            inner[i].data.copy_(outer.data)
            for _ in range(steps[i]):
                inner[i].grad = torch.tensor(problem.gradient(i, inner[i].detach().numpy()))
                optimizers[i].step()
            mean += ALPHA[i] * (outer.detach() - inner[i].detach()).numpy()
        outer.grad = torch.tensor(mean / sum(ALPHA[i] for i in some(number)))
        outer_optimizer.step()
        out.append(outer.detach().numpy().copy())
    return np.array(out)


RESTATEMENTS = [
    ("fedprox", fedprox, {"lr": 0.1, "proximal": 0.7}),
    ("scaffold", scaffold, {"lr": 0.1, "server_lr": 0.8, "option": 1}),
    ("scaffold", scaffold, {"lr": 0.1, "server_lr": 0.8, "option": 2}),
    ("feddyn", feddyn, {"lr": 0.1, "regularization": 0.9}),
    ("mifa", mifa, {"lr": 0.05}),
    ("diloco", diloco, {"lr": 0.05, "weight_decay": 0.1, "outer_lr": 0.7, "outer_momentum": 0.9}),
]


@pytest.mark.parametrize(("name", "restatement", "settings"), RESTATEMENTS)
def test_a_baseline_equals_its_few_lines_with_workers_that_come_and_go(name, restatement, settings):
    problem = Quadratics()
    found = run(ALGORITHMS[name](**settings), problem, 30, present=some)
    expected = restatement(problem, 30, **settings)
    assert np.abs(expected[-1] - problem.start).max() > 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_fednova_equals_its_few_lines_with_unequal_steps_and_workers_that_come_and_go(momentum):
    problem, steps = Quadratics(), [1, 7, 3]
    found = run(ALGORITHMS["fednova"](lr=0.02, momentum=momentum), problem, 30, present=some, steps=steps)
    expected = fednova(problem, 30, lr=0.02, momentum=momentum, steps=steps)
    assert np.abs(expected[-1] - problem.start).max() > 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_fednova_with_equal_steps_is_fedavg(momentum):
    problem = Quadratics()
    one = run(ALGORITHMS["fednova"](lr=0.1, momentum=momentum), problem, 20, present=some)
    other = run(ALGORITHMS["fedavg"](lr=0.1, momentum=momentum), problem, 20, present=some)
    np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-13)


def test_with_unequal_steps_fednova_stops_near_the_minimiser_and_fedavg_far_from_it():
    """Objective inconsistency: what is left to FedNova goes with lr, FedAvg's error does not."""
    problem, steps = Quadratics(), [2, 40, 8]
    errors = {}
    for name in ("fedavg", "fednova"):
        for lr in (0.01, 0.002):
            found = run(ALGORITHMS[name](lr=lr), problem, round(1.5 / lr), steps=steps)
            np.testing.assert_allclose(found[-1], found[-2], atol=1e-6)
            errors[name, lr] = np.linalg.norm(found[-1] - problem.minimiser())
    assert errors["fednova", 0.002] < 0.05 * errors["fedavg", 0.002]
    assert errors["fednova", 0.002] < 0.3 * errors["fednova", 0.01]
    assert errors["fedavg", 0.002] > 0.5 * errors["fedavg", 0.01]


def test_diloco_counts_the_inner_steps_that_a_worker_took_whoever_else_took_more():
    """AdamW's bias correction needs each worker's own count."""
    problem, steps = Quadratics(), [1, 5, 3]
    settings = {"lr": 0.05, "weight_decay": 0.1, "outer_lr": 0.7, "outer_momentum": 0.9}
    found = run(ALGORITHMS["diloco"](**settings), problem, 30, present=some, steps=steps)
    expected = diloco(problem, 30, **settings, steps=steps)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("scaffold", {"lr": 0.1, "option": 1}), ("scaffold", {"lr": 0.1}), ("feddyn", {"lr": 0.1, "regularization": 1.0})],
)
def test_methods_with_a_correction_reach_the_global_minimiser_with_local_steps(name, settings):
    problem = Quadratics()
    found = run(ALGORITHMS[name](**settings), problem, 3000)
    np.testing.assert_allclose(found[-1], problem.minimiser(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["fedavg", "fedprox"])
def test_averaging_without_a_correction_stops_elsewhere(name):
    problem = Quadratics()
    found = run(ALGORITHMS[name](lr=0.1), problem, 3000)
    np.testing.assert_allclose(found[-1], found[-2], atol=1e-12)
    assert np.abs(found[-1] - problem.minimiser()).max() > 0.01


def test_mifa_with_one_local_step_reaches_the_minimiser_though_workers_come_and_go():
    problem = Quadratics()
    found = run(ALGORITHMS["mifa"](lr=0.05), problem, 3000, present=some, steps=1)
    np.testing.assert_allclose(found[-1], problem.minimiser(), rtol=1e-9, atol=1e-9)
    averaged = run(ALGORITHMS["fedavg"](lr=0.05), problem, 3000, present=some, steps=1)
    assert np.abs(averaged[-1] - problem.minimiser()).max() > 0.01


def test_fedprox_without_the_proximal_term_is_fedavg():
    problem = Quadratics()
    one = run(ALGORITHMS["fedprox"](lr=0.1, proximal=0.0, momentum=0.5), problem, 20, present=some)
    other = run(ALGORITHMS["fedavg"](lr=0.1, momentum=0.5), problem, 20, present=some)
    np.testing.assert_allclose(one, other, rtol=1e-14, atol=0)


def test_diloco_with_outer_lr_1_and_no_momentum_averages_the_local_weights():
    problem = Quadratics()
    settings = {"lr": 0.05, "outer_lr": 1.0, "outer_momentum": 0.0}
    found = run(ALGORITHMS["diloco"](**settings), problem, 1)
    expected = np.zeros(4)
    for i, alpha in enumerate(ALPHA):
        w = torch.nn.Parameter(torch.tensor(problem.start))
        optimizer = torch.optim.AdamW([w], lr=0.05, weight_decay=0.0)
        for _ in range(STEPS):
            w.grad = torch.tensor(problem.gradient(i, w.detach().numpy()))
            optimizer.step()
        expected += alpha * w.detach().numpy()
    np.testing.assert_allclose(found[0], expected, rtol=1e-12)


def test_scaffolds_option_1_takes_no_gradient_beyond_those_of_its_steps():
    """From equal weights and zero controls its first round is FedAvg's: training loss, batch norm and all."""
    outcomes, buffers = [], []
    for algorithm in (ALGORITHMS["fedavg"](lr=0.1), ALGORITHMS["scaffold"](lr=0.1, option=1)):
        trainer = make_trainer(algorithm, local_steps=3, model=small_net(batch_norm=True))
        outcomes.append(trainer.run_round().train_loss)
        buffers.append(trainer.state.buffers)
    assert outcomes[0] == outcomes[1]
    assert buffers[1]["1.num_batches_tracked"] == 3
    assert all(torch.equal(buffers[1][name], value) for name, value in buffers[0].items())


def test_scaffolds_message_is_twice_fedavgs():
    sent = {}
    for name in ("fedavg", "scaffold"):
        trainer = make_trainer(ALGORITHMS[name](lr=0.1), local_steps=2)
        trainer.run_round()
        sent[name] = trainer.state.bytes_sent
    numel = sum(w.numel() for w in trainer.state.weights.values())
    assert sent["scaffold"] - sent["fedavg"] == 3 * 8 * numel


def relative_distance(found, expected):
    return float((found.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", ["diloco", "synchronous"])
def test_second_moments_of_bfloat16_weights_decay_as_those_of_float32_weights_do(name):
    """.999 v is v again in bfloat16, whose numbers have eight bits."""
    moments = {}
    for dtype in (torch.float32, torch.bfloat16):
        trainer = make_trainer(ALGORITHMS[name](lr=1e-6), num_workers=1, rounds=100, dtype=dtype, eval_every=100)
        list(trainer.run())
        state = trainer.state.workers if name == "diloco" else trainer.state.shared
        moments[dtype] = torch.cat([kinds["exp_avg_sq"].flatten() for kinds in state.values()])
    assert relative_distance(moments[torch.bfloat16], moments[torch.float32]) < 0.05


def test_local_steps_too_small_for_bfloat16_add_up_before_they_are_sent():
    displacements = {}
    for dtype in (torch.float32, torch.bfloat16):
        trainer = make_trainer(ALGORITHMS["mifa"](lr=1e-5), rounds=1, local_steps=20, dtype=dtype)
        trainer.run_round()
        displacements[dtype] = trainer.state.workers["2.weight"]["last_update"]
    assert relative_distance(displacements[torch.bfloat16], displacements[torch.float32]) < 0.05


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("scaffold", {"option": 3}, r"`algorithm\.option` must be an integer in \[1, 2\], got 3"),
        ("fedprox", {"proximal": -1.0}, r"`algorithm\.proximal` \(mu\) must be >= 0, got -1\.0"),
        ("feddyn", {"regularization": 0.0}, r"`algorithm\.regularization` \(alpha\) must be > 0, got 0\.0"),
        (
            "diloco",
            {"first_moment_decay": 1.0},
            r"`algorithm\.first_moment_decay` \(beta_1\) must be in \[0, 1\), got 1",
        ),
        ("diloco", {"outer_lr": 0.0}, r"`algorithm\.outer_lr` must be > 0"),
        ("diloco", {"outer_momentum": 1.0}, r"`algorithm\.outer_momentum` must be in \[0, 1\)"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(name, settings, words):
    with pytest.raises(ValueError, match=words):
        ALGORITHMS[name](**settings)
