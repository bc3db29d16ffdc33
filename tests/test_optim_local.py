"""PISA with local steps as a drop-in optimizer, in one process: the trainer's numbers, void rounds, resuming."""

import copy
import inspect
import math
import pickle

import pytest
import torch
from local_optimizers import CASES, STEPS, finish, flat, train_on_shard, trainers_weights
from optimizers import one_thread as one_thread  # a fixture
from optimizers import through_a_file
from problems import blobs, small_net
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from pisa_dist import PISA, LocalPISA
from pisa_dist.rounds import begin_round, contribution, local_step

pytestmark = pytest.mark.timeout(300)


# The trainer's numbers


@pytest.mark.parametrize("case", CASES)
def test_one_worker_in_the_trainer_equals_the_drop_in_optimizer(case):
    trainer, expected = trainers_weights(case, num_workers=1, rounds=12)
    model = small_net()
    optimizer = PISA(model.parameters(), local_steps=STEPS, **CASES[case])
    found = []
    for _ in train_on_shard(optimizer, model, trainer.shards[0], rounds=12):
        if optimizer.at_consensus:
            found.append(flat(model))
    assert (expected[-1] - expected[0]).abs().max() > 1e-2
    torch.testing.assert_close(torch.stack(found), expected, rtol=1e-12, atol=1e-12)


def test_one_local_step_without_a_metric_is_the_step_of_pisa():
    ends = []
    for make in (PISA, LocalPISA):
        model = small_net()
        knobs = {"penalty": 3.0, "preconditioner_scale": 2.0, "penalty_growth": 1.01, "lr": 0.7}
        optimizer = make(model.parameters(), local_steps=1, metric="none", **knobs)
        finish(train_on_shard(optimizer, model, blobs(), rounds=5))
        ends.append(flat(model))
    assert type(optimizer) is not PISA
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-12, atol=1e-14)


# What a user of torch expects


def test_pisa_with_local_steps_or_a_metric_is_the_local_form_and_else_what_it_was():
    parameters = [nn.Parameter(torch.zeros(2))]
    for settings in ({"local_steps": 20}, {"metric": "adam"}, {"local_steps": 2, "metric": "none"}):
        optimizer = PISA(parameters, **settings)
        for kind in (LocalPISA, PISA, torch.optim.Optimizer):
            assert isinstance(optimizer, kind)
        with optimizer.accumulate():  # all that users call on a PISA
            pass
    assert PISA(parameters, local_steps=20).param_groups[0]["metric"] == "muon"
    for settings in ({}, {"local_steps": 1}, {"local_steps": 1, "metric": "none"}):
        assert type(PISA(parameters, **settings)) is PISA


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"local_steps": 0}, r"`local_steps` must be an integer in \[1, 1000000\], got 0"),
        ({"local_steps": 2.5}, r"`local_steps` must be an integer .* got 2\.5"),
        ({"metric": "shampoo"}, "`metric` must be one of none, adam, muon, kron, got 'shampoo'"),
        ({"penalty": 0.0}, r"`penalty` \(sigma\) must be > 0, got 0\.0"),
        ({"preconditioner_scale": 0.0}, r"`preconditioner_scale` \(rho\) must be > 0 or None"),
        ({"relaxation": -1.0}, r"`relaxation` \(kappa\) must be >= 0, got -1\.0"),
        ({"metric_interval": 0}, "`metric_interval` must be an integer >= 1, got 0"),
        ({"on_nonfinite": "ignore"}, "`on_nonfinite` must be one of raise, skip, got 'ignore'"),
        ({"preconditioner": "adam"}, "`preconditioner` must be left out with local_steps > 1 or a metric"),
        ({"overlap": True}, "`overlap` must be left out with local_steps > 1 or a metric"),
        ({"compression": "int8"}, "`compression` must be left out with local_steps > 1 or a metric"),
        ({"fused": True}, "`fused` must be left out with local_steps > 1 or a metric"),
        ({"consensus_l2": 0.1}, "`consensus_l2` must be left out with local_steps > 1 or a metric"),
    ],
)
def test_a_bad_argument_is_refused_in_one_line(settings, words):
    with pytest.raises(ValueError, match=f"^{words}"):
        PISA([nn.Parameter(torch.zeros(2))], **{"local_steps": 20, "metric": "muon"} | settings)


def test_groups_may_not_differ_in_the_number_of_local_steps():
    groups = [{"params": [nn.Parameter(torch.zeros(2))], "local_steps": n} for n in (3, 4)]
    with pytest.raises(ValueError, match="`local_steps` must be the same in all parameter groups, got 3 and 4"):
        PISA(groups, local_steps=3)


def test_a_metric_in_a_group_needs_one_for_the_optimizer():
    with pytest.raises(ValueError, match="in a parameter group need local_steps > 1 or a metric for PISA itself"):
        PISA([{"params": [nn.Parameter(torch.zeros(2))], "metric": "adam"}])


def test_each_group_steps_as_if_it_were_alone_with_its_own_metric_and_penalty():
    own = [{"metric": "adam", "penalty": 30.0, "metric_rounds": 1}, {"metric": "kron"}, {"metric": "none"}]
    together = [nn.Parameter(torch.ones(3, 2, dtype=torch.float64)) for _ in own]
    alone = copy.deepcopy(together)
    groups = [{"params": [p], **settings} for p, settings in zip(together, own, strict=True)]
    optimizers = [PISA([p], local_steps=2, **settings) for p, settings in zip(alone, own, strict=True)]
    optimizers.append(PISA(groups, local_steps=2))
    for step in range(12):
        for p in together + alone:
            p.grad = torch.sin(p.detach() + step)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(together, alone, rtol=0, atol=0)
    assert len({float(p.detach().sum()) for p in together}) == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_steps", [2, 4 * STEPS, 4 * STEPS + 3])
@pytest.mark.parametrize("enlarge_batch", [False, True])
@pytest.mark.parametrize("metric", ["none", "adam", "kron"])
def test_a_reloaded_state_dict_continues_bit_for_bit_in_the_middle_of_a_round_too(
    metric, enlarge_batch, num_steps, dtype
):
    model, data = small_net(dtype=dtype), blobs(dtype=dtype)
    settings = {"metric_rounds": 2, "penalty_growth": 1.1, "enlarge_batch": enlarge_batch}
    optimizer = PISA(model.parameters(), local_steps=STEPS, metric=metric, **settings)
    steps = train_on_shard(optimizer, model, data, rounds=9)
    for _ in range(num_steps):
        next(steps)
    resumed = copy.deepcopy(model)
    for p in resumed.parameters():  # what the file brings must do, whatever the model holds in a round
        p.data += 0 if optimizer.at_consensus else 1
    other = PISA(resumed.parameters(), local_steps=STEPS, metric=metric, penalty=7.0)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    finish(steps)
    finish(train_on_shard(other, resumed, data, rounds=9, skip=num_steps))
    assert torch.equal(flat(resumed), flat(model))
    kinds = [{name: value.dtype for name, value in s.items() if torch.is_tensor(value)} for s in other.state.values()]
    assert {t for kind in kinds for t in kind.values()} == {torch.float32 if dtype == torch.bfloat16 else dtype}


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_a_copied_optimizer_continues_bit_for_bit(duplicate):
    model = small_net()
    optimizer = PISA(model.parameters(), local_steps=STEPS)
    steps = train_on_shard(optimizer, model, blobs(), rounds=3)
    for _ in range(STEPS + 1):
        next(steps)
    other, others = duplicate((optimizer, model))
    ends = []
    for one, net in ((optimizer, model), (other, others)):
        finish(train_on_shard(one, net, blobs(), rounds=2))
        ends.append(flat(net))
    assert torch.equal(*ends)


def test_a_closure_is_evaluated_once_a_step_and_its_loss_returned():
    model, calls = small_net(), []
    optimizer = PISA(model.parameters(), local_steps=2)

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = model(blobs().inputs).square().mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(6)]
    assert calls == [True] * 6
    assert losses[-1] < losses[0]


def test_in_the_middle_of_a_round_a_context_holds_the_weights_of_the_last_consensus():
    model = small_net()
    optimizer = PISA(model.parameters(), local_steps=STEPS)
    last = flat(model)
    for _ in train_on_shard(optimizer, model, blobs(), rounds=3):
        own = flat(model)
        if optimizer.at_consensus:
            last = own
        with optimizer.consensus_weights():
            assert torch.equal(flat(model), last)
        assert torch.equal(flat(model), own)
        assert optimizer.at_consensus or not torch.equal(own, last)


# Learning rates


def test_a_learning_rate_that_changes_between_rounds_divides_penalty_and_scale():
    rates, ends = [0.3, 1.0, 2.0, 0.1], []
    for is_scheduled in (True, False):
        model = small_net()
        optimizer = PISA(model.parameters(), local_steps=STEPS, metric="adam", preconditioner_scale=300.0)
        scheduler = LambdaLR(optimizer, lambda step: rates[min(step // STEPS, 3)]) if is_scheduled else None
        steps = train_on_shard(optimizer, model, blobs(), rounds=len(rates))
        for rate in rates:
            if not is_scheduled:
                optimizer.param_groups[0].update(penalty=100.0 / rate, preconditioner_scale=300.0 / rate)
            for _ in range(STEPS):
                next(steps)
                if is_scheduled:
                    scheduler.step()
        ends.append(flat(model))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-12, atol=1e-12)


def test_where_the_rate_changes_within_a_round_the_consensus_takes_its_mean():
    rates, ends = [0.5, 1.5], []
    for given in (rates, [1.0, 1.0]):
        parameter = nn.Parameter(torch.ones(3, dtype=torch.float64))
        optimizer = PISA([parameter], local_steps=2, metric="none", penalty=1e-9, preconditioner_scale=1.0)
        for lr in given:
            optimizer.param_groups[0]["lr"] = lr
            parameter.grad = torch.arange(3, dtype=torch.float64)
            optimizer.step()
        ends.append((parameter.detach(), optimizer.state[parameter]["dual"]))
    # With hardly any penalty the steps add up, and so do displacement and dual.
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)


def test_a_cosine_that_ends_at_zero_within_a_round_leaves_finite_weights_and_duals_of_the_gradients_size():
    model = small_net()
    optimizer = PISA(model.parameters(), local_steps=STEPS, metric="adam")
    scheduler = CosineAnnealingLR(optimizer, T_max=10 * STEPS - 1)
    for _ in train_on_shard(optimizer, model, blobs(), rounds=10):
        last = optimizer.param_groups[0]["lr"]
        scheduler.step()
    assert last == 0
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    duals = torch.cat([optimizer.state[p]["dual"].flatten() for p in model.parameters()])
    assert flat(model).isfinite().all()
    assert duals.norm() < 5 * gradients.norm() + 1


# Bad gradients


def poisoned_run(rounds, poisoned, *, on_nonfinite="raise", **settings):
    """A run whose gradients of the steps `poisoned` (from 0) are NaN: model, optimizer and what was said."""
    model, said = small_net(), []
    optimizer = PISA(model.named_parameters(), local_steps=STEPS, on_nonfinite=on_nonfinite, **settings)
    weights = [flat(model)]
    for step in range(rounds * STEPS):
        for position, p in enumerate(model.parameters()):
            p.grad = torch.sin(p.detach() + position + step)
        if step in poisoned:
            model[0].bias.grad[0] = math.nan
        try:
            optimizer.step()
        except FloatingPointError as error:
            said.append((step, str(error)))
        if optimizer.at_consensus:
            weights.append(flat(model))
    return weights, optimizer, said


@pytest.mark.parametrize("metric", ["none", "adam", "muon", "kron"])
@pytest.mark.parametrize("enlarge_batch", [False, True])
@pytest.mark.parametrize("bad_round", [0, 2])
def test_a_nan_is_told_at_the_consensus_and_the_round_is_void(metric, enlarge_batch, bad_round):
    weights, optimizer, said = poisoned_run(4, {bad_round * STEPS + 1}, metric=metric, enlarge_batch=enlarge_batch)
    ((step, message),) = said
    assert step == (bad_round + 1) * STEPS - 1
    assert message.startswith("non-finite gradient on worker 0 in 0.bias: the round is void")
    assert torch.equal(weights[bad_round + 1], weights[bad_round])
    assert not torch.equal(weights[-1], weights[-2])
    assert weights[-1].isfinite().all()
    assert optimizer.param_groups[0]["num_rounds"] == 3


@pytest.mark.parametrize("poisoned", [{1}, {STEPS + 2}, set(range(STEPS)), set(range(STEPS, 2 * STEPS))], ids=str)
@pytest.mark.parametrize("metric", ["none", "adam", "muon", "kron"])
@pytest.mark.parametrize("enlarge_batch", [False, True])
def test_skipping_leaves_bad_steps_out_and_goes_on(metric, enlarge_batch, poisoned):
    settings = {"metric": metric, "enlarge_batch": enlarge_batch}
    weights, optimizer, said = poisoned_run(4, poisoned, on_nonfinite="skip", **settings)
    assert said == []
    assert all(w.isfinite().all() for w in weights)
    assert not torch.equal(weights[-1], weights[-2])
    assert {state["num_steps"] for state in optimizer.state.values()} == {4 * STEPS - len(poisoned)}


def test_a_sum_that_overflows_voids_the_round():
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = PISA([parameter], local_steps=2, metric="none", penalty=1.0, worker_weight=1e38)
    parameter.grad = torch.full((3,), 1e3)
    optimizer.step()
    with pytest.raises(FloatingPointError, match="overflowed float32 although every gradient is finite: the round is"):
        optimizer.step()
    assert torch.equal(parameter, torch.zeros(3))


@pytest.mark.parametrize("huge_step", [1, 5])
def test_a_square_that_overflows_voids_its_round_and_is_forgotten(huge_step):
    parameter = nn.Parameter(torch.ones(3))
    optimizer = PISA([parameter], local_steps=2, metric="adam")
    said, weights = [], []
    for step in range(12):
        parameter.grad = torch.full((3,), 1e25 if step == huge_step else 1.0 + step)
        try:
            optimizer.step()
        except FloatingPointError:
            said.append(step)
        weights.append(parameter.detach().clone())
    assert said == [huge_step]
    assert all(w.isfinite().all() for w in weights)
    assert not torch.equal(weights[-1], weights[-3])


def test_a_newcomer_sends_minus_its_mean_gradient_and_moves_nothing_once_there_is_a_metric():
    group = PISA([nn.Parameter(torch.zeros(2))], local_steps=2, metric="adam").param_groups[0]
    state = {}
    begin_round(state, torch.ones(2), group)
    state["metric"] = torch.tensor([0.5, 0.0])
    for gradient in (1.0, 4.0):
        local_step(state, torch.full((2,), gradient), group)
    dual, (pull, _), follows = contribution(state, group, penalty=100.0)
    assert not follows
    torch.testing.assert_close(dual, torch.full((2,), -2.5))
    assert pull[0] == 0
    assert pull[1] == 100 * state["displacement"][1] != 0


# In the middle of a round


def test_parameters_come_and_go_between_rounds_only():
    model = small_net()
    model[2].requires_grad_(False)
    optimizer = PISA(model.parameters(), local_steps=STEPS)
    finish(train_on_shard(optimizer, model, blobs(), rounds=2))
    frozen = model[2].weight.detach().clone()
    model[2].requires_grad_(True)
    extra = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer.add_param_group({"params": [extra], "metric": "adam"})
    steps = train_on_shard(optimizer, model, blobs(), rounds=2)
    next(steps)
    assert not torch.equal(model[2].weight, frozen)
    with pytest.raises(RuntimeError, match="parameters were added in the middle of a round"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    model[2].requires_grad_(False)
    with pytest.raises(RuntimeError, match="requires_grad was changed in the middle of a round"):
        next(steps)


def test_the_signature_that_users_see_is_that_of_the_contract():
    names = list(inspect.signature(PISA).parameters)
    assert names[:4] == ["params", "preconditioner", "penalty", "preconditioner_scale"]
    assert {"local_steps", "metric", "worker_weight", "process_group"} <= set(names)


@pytest.mark.parametrize("settings", [{}, {"metric": "adam"}, {"local_steps": 2}], ids=str)
def test_the_defaults_that_users_see_are_those_of_both_forms(settings):
    shown = {p.name: p.default for p in inspect.signature(PISA).parameters.values() if p.name != "params"}
    parameters = [nn.Parameter(torch.zeros(2))]
    group = PISA(parameters, **settings).param_groups[0]
    assert PISA(parameters, **shown | settings).param_groups[0] == group
    fixed = {name: value for name, value in (shown | settings).items() if value is not None}
    assert {name: group[name] for name in fixed if name in group}.items() <= fixed.items()
