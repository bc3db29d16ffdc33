"""The contract that every method keeps, and each method against an independent few-line re-statement."""

import pytest
import torch
from omegaconf import OmegaConf
from problems import make_trainer, quadratic_gradients

from pisa_dist.algorithms import ALGORITHMS
from pisa_dist.algorithms.base import Round

# A further method is one line here.
SETTINGS = {
    "pisa": {"penalty": 4.0},
    "sisa": {"penalty": 2.0, "preconditioner_scale": 3.0},
    "nsisa": {"penalty": 10.0, "newton_schulz_precision": "float32"},
    "synchronous": {"optimizer": "AdamW", "lr": 0.01},
    "fedavg": {"lr": 0.05, "momentum": 0.5},
    "fedprox": {"lr": 0.05, "proximal": 0.1},
    "fednova": {"lr": 0.05, "momentum": 0.5},
    "scaffold": {"lr": 0.05},
    "feddyn": {"lr": 0.05, "regularization": 0.5},
    "mifa": {"lr": 0.05},
    "diloco": {"lr": 0.003},
    "pisa_local": {"penalty": 50.0},
    "pisa_auto": {},
}


def method(name, **changes):
    return ALGORITHMS[name](**{**SETTINGS[name], **changes})


def round_for(weights, gradients, *, worker_weight, number=1, local_steps=1, present_weight=1.0, shared=None):
    return Round(
        number=number,
        num_rounds=100,
        num_local_steps=local_steps,
        weights=weights,
        workers=range(len(worker_weight)),
        all_worker_weights=torch.tensor(worker_weight or [1.0], dtype=torch.float64),
        worker_weight=torch.tensor(worker_weight, dtype=torch.float64),
        present_weight=present_weight,
        shared=shared or {},
        num_participations=torch.full((len(worker_weight),), number),
        num_steps_before=torch.full((len(worker_weight),), (number - 1) * local_steps),
        gradients=gradients,
    )


def test_every_registered_method_is_in_the_contract_test():
    assert set(SETTINGS) == set(ALGORITHMS)


@pytest.mark.parametrize("name", SETTINGS)
class TestContract:
    def test_the_method_is_its_own_structured_config(self, name):
        built = OmegaConf.to_object(OmegaConf.structured(ALGORITHMS[name]))
        assert built == ALGORITHMS[name]()

    def test_training_lowers_the_loss(self, name):
        trainer = make_trainer(method(name), num_workers=3, rounds=60, is_skewed=False)
        lines = [metrics for _, _, metrics in trainer.run() if metrics]
        assert lines[-1]["test_loss"] < 0.8 * lines[0]["test_loss"]

    def test_local_work_and_consensus_leave_their_inputs_unchanged(self, name):
        algorithm = method(name)
        weights = {"w": torch.randn(3, 2, dtype=torch.float64)}
        state = algorithm.init_worker_state(weights, 2)
        shared = algorithm.init_shared_state(weights)
        gradients = quadratic_gradients(torch.randn(2, 3, 2, dtype=torch.float64))
        round_ = round_for(weights, gradients, worker_weight=[0.4, 0.6], shared=shared)
        before = [t.clone() for t in [weights["w"], *state.get("w", {}).values()]]
        local = algorithm.local_work(round_, state)
        message = {key: value.clone() for key, value in local.message.items()}
        algorithm.consensus(round_, local.message, shared)
        after = [weights["w"], *state.get("w", {}).values()]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert all(torch.equal(message[key], value) for key, value in local.message.items())

    def test_bfloat16_weights_stay_so_and_have_float32_state(self, name):
        trainer = make_trainer(method(name), rounds=2, dtype=torch.bfloat16)
        list(trainer.run())
        assert {w.dtype for w in trainer.state.weights.values()} == {torch.bfloat16}
        state = [*trainer.state.workers.values(), *trainer.state.shared.values()]
        kept = [value.dtype for kinds in state for value in kinds.values() if value.is_floating_point()]
        assert set(kept) <= {torch.float32}

    def test_a_rank_without_present_workers_sends_zeros_of_the_right_shape(self, name):
        algorithm = method(name)
        weights = {"w": torch.randn(3, 2, dtype=torch.float64), "b": torch.randn(2, dtype=torch.float64)}
        state = algorithm.init_worker_state(weights, 0)
        round_ = round_for(
            weights,
            lambda local, _: {n: torch.zeros_like(v) for n, v in local.items()},
            worker_weight=[],
            shared=algorithm.init_shared_state(weights),
        )
        local = algorithm.local_work(round_, state)
        assert all(value.eq(0).all() for value in local.message.values())
        shapes = {value.shape for value in local.message.values()}
        assert {(3, 2), (2,)} <= shapes

    def test_stacking_workers_equals_one_call_per_worker(self, name):
        algorithm = method(name)
        weights = {"w": torch.randn(4, 3, dtype=torch.float64), "b": torch.randn(3, dtype=torch.float64)}
        centres = torch.randn(2, 4, 3, dtype=torch.float64)
        shared = algorithm.init_shared_state(weights)

        def gradients_of(rows):
            return lambda local, _: {n: v - (centres[rows] if n == "w" else 1.0) for n, v in local.items()}

        together = algorithm.local_work(
            round_for(weights, gradients_of([0, 1]), worker_weight=[0.3, 0.7], shared=shared),
            algorithm.init_worker_state(weights, 2),
        )
        alone = [
            algorithm.local_work(
                round_for(weights, gradients_of([row]), worker_weight=[alpha], shared=shared),
                algorithm.init_worker_state(weights, 1),
            )
            for row, alpha in enumerate([0.3, 0.7])
        ]
        for key, value in together.message.items():
            torch.testing.assert_close(value, alone[0].message[key] + alone[1].message[key], rtol=1e-12, atol=1e-13)
        for parameter, kinds in together.state.items():
            for kind, value in kinds.items():
                torch.testing.assert_close(
                    value, torch.cat([a.state[parameter][kind] for a in alone]), rtol=1e-12, atol=1e-13
                )

    def test_half_the_weight_twice_changes_nothing(self, name):
        algorithm = method(name)
        weights = {"w": torch.randn(3, 2, dtype=torch.float64)}
        centre = torch.randn(1, 3, 2, dtype=torch.float64)

        def next_weights(copies):
            gradients = quadratic_gradients(centre.expand(copies, 3, 2))
            shared = algorithm.init_shared_state(weights)
            round_ = round_for(weights, gradients, worker_weight=[1 / copies] * copies, shared=shared)
            local = algorithm.local_work(round_, algorithm.init_worker_state(weights, copies))
            return algorithm.consensus(round_, local.message, shared).weights["w"]

        torch.testing.assert_close(next_weights(2), next_weights(1), rtol=1e-12, atol=1e-13)

    def test_a_learning_rate_of_zero_is_refused_by_name(self, name):
        with pytest.raises(ValueError, match=r"`algorithm\.lr` must be > 0, got 0"):
            method(name, lr=0.0)


def test_fedavg_equals_its_few_lines():
    torch.manual_seed(0)
    lr, mu, decay, steps, alpha = 0.1, 0.9, 0.01, 5, [0.25, 0.75]
    centres = torch.randn(2, 3, dtype=torch.float64)
    start = torch.randn(3, dtype=torch.float64)
    expected = torch.zeros(3, dtype=torch.float64)
    for a, centre in zip(alpha, centres, strict=True):
        w = start.clone().requires_grad_()
        optimizer = torch.optim.SGD([w], lr=lr, momentum=mu, weight_decay=decay)
        for _ in range(steps):
            optimizer.zero_grad()
            (0.5 * (w - centre).square().sum()).backward()
            optimizer.step()
        expected += a * w.detach()

    algorithm = ALGORITHMS["fedavg"](lr=lr, momentum=mu, weight_decay=decay)
    round_ = round_for({"w": start}, quadratic_gradients(centres), worker_weight=alpha, local_steps=steps)
    local = algorithm.local_work(round_, {})
    found = algorithm.consensus(round_, local.message, {}).weights["w"]
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-14)


def test_fedavg_averages_over_the_present_workers_alone():
    start = torch.zeros(3, dtype=torch.float64)
    centres = torch.ones(1, 3, dtype=torch.float64)
    algorithm = ALGORITHMS["fedavg"](lr=0.5)
    round_ = round_for({"w": start}, quadratic_gradients(centres), worker_weight=[0.2], present_weight=0.2)
    local = algorithm.local_work(round_, {})
    found = algorithm.consensus(round_, local.message, {}).weights["w"]
    torch.testing.assert_close(found, torch.full((3,), 0.5, dtype=torch.float64))


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [("AdamW", {"weight_decay": 0.1}), ("SGD", {"momentum": 0.9, "nesterov": True}), ("Muon", {}), ("Adagrad", {})],
)
def test_synchronous_equals_the_torch_optimizer_on_the_averaged_gradient(optimizer, options):
    torch.manual_seed(0)
    centres = torch.randn(3, 4, 3)
    alpha = torch.tensor([0.5, 0.3, 0.2])
    start = torch.randn(4, 3)
    reference = torch.nn.Parameter(start.clone())
    torch_optimizer = getattr(torch.optim, optimizer)([reference], lr=0.05, **options)
    algorithm = ALGORITHMS["synchronous"](optimizer=optimizer, lr=0.05, optimizer_options=options)
    weights, shared = {"w": start}, {}
    for number in range(1, 11):
        reference.grad = torch.tensordot(alpha, reference.detach() - centres, dims=1)
        torch_optimizer.step()
        round_ = round_for(weights, quadratic_gradients(centres), worker_weight=alpha.tolist(), number=number)
        local = algorithm.local_work(round_, {})
        weights, shared, _ = algorithm.consensus(round_, local.message, shared)
    torch.testing.assert_close(weights["w"], reference.detach(), rtol=1e-5, atol=1e-6)


def test_muon_gives_matrices_to_muon_and_the_rest_to_adamw():
    weights = {"m": torch.randn(4, 3), "v": torch.randn(3)}
    algorithm = ALGORITHMS["synchronous"](optimizer="Muon", lr=0.01)
    round_ = round_for(weights, lambda local, _: dict(local), worker_weight=[1.0])
    local = algorithm.local_work(round_, {})
    shared = algorithm.consensus(round_, local.message, {}).shared
    assert set(shared["m"]) == {"momentum_buffer"}
    assert set(shared["v"]) == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optimizer": "Nadamw"}, r"`algorithm\.optimizer` must be a class in torch\.optim.*'Nadamw'"),
        ({"optimizer": "lr_scheduler"}, r"`algorithm\.optimizer` must be a class"),
        ({"optimizer_options": {"momentun": 0.9}}, r"`algorithm\.optimizer_options\.momentun` is not an option"),
        ({"optimizer_options": {"lr": 0.1}}, r"`algorithm\.optimizer_options\.lr` is not an option"),
        ({"optimizer_options": {"weight_decay": -1.0}}, r"`algorithm\.optimizer_options`.*weight_decay"),
    ],
)
def test_synchronous_refuses_what_torch_would_refuse(settings, words):
    with pytest.raises(ValueError, match=words):
        ALGORITHMS["synchronous"](**settings)
