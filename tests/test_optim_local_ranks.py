"""PISA with local steps as a drop-in optimizer on two ranks: one collective a round, and the same end for all."""

import copy
import math
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from harness import run_cases
from local_optimizers import (
    CASES,
    SIZES,
    STEPS,
    finish,
    flat,
    make_net,
    shard_of,
    train_on_shard,
    trainers_weights,
)
from optimizers import one_thread as one_thread  # a fixture
from optimizers import through_a_file
from problems import blobs, small_net
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from pisa_dist import PISA
from pisa_dist.metrics import cross_entropy

pytestmark = pytest.mark.timeout(300)


# Two ranks


def every_case_on_two_ranks(rank, num_ranks):
    cases = [
        follow_the_trainer,
        count_collectives,
        resume_in_a_round,
        meet_bad_gradients,
        miss_the_first_round,
        train_with_gradient_scaler,
        train_on_skewed_data,
        construct_what_does_not_fit,
    ]
    return {case.__name__: case(rank) for case in cases}


@pytest.fixture(scope="module")
def two_ranks():
    """What a case returned on rank 0 and on rank 1."""
    return run_cases(every_case_on_two_ranks, 2)


def follow_the_trainer(rank):
    found = {}
    for case, settings in CASES.items():
        model, optimizer = make_net(rank, **settings)
        steps = train_on_shard(optimizer, model, shard_of(rank), rounds=12, worker=rank)
        found[case] = torch.stack([flat(model) for _ in steps])
    return found


def test_two_ranks_equal_two_workers_in_the_trainer_and_each_other_after_every_consensus(two_ranks):
    first, second = two_ranks(follow_the_trainer)
    for case in CASES:
        trainer, expected = trainers_weights(case, num_workers=2, rounds=12)
        assert tuple(trainer.shard_sizes) == SIZES
        consensus = slice(STEPS - 1, None, STEPS)
        assert torch.equal(first[case][consensus], second[case][consensus])
        torch.testing.assert_close(first[case][consensus], expected, rtol=1e-12, atol=1e-12, msg=case)
        stays = CASES[case].get("enlarge_batch", False)
        assert torch.equal(first[case][STEPS], second[case][STEPS]) == stays, "in a round each rank has its own"


def count_collectives(rank):
    """Names of the collectives in each step, bytes sent so far, and the number of weights."""
    model, optimizer = make_net(rank, metric="muon", metric_rounds=1, metric_interval=4)
    calls, sent = [], []

    def counted(name, original):
        def call(*args, **kwargs):
            calls[-1].append(name)
            return original(*args, **kwargs)

        return call

    names = [n for n in dir(dist) if n.startswith(("all_", "broadcast", "reduce", "gather", "scatter", "barrier"))]
    names = [n for n in names if callable(getattr(dist, n))] + ["send", "recv", "isend", "irecv"]
    with mock.patch.multiple(dist, **{n: counted(n, getattr(dist, n)) for n in names}):
        calls.append([])
        for _ in train_on_shard(optimizer, model, shard_of(rank), rounds=4, worker=rank):
            calls.append([])
            sent.append(optimizer.bytes_sent)
    return calls[:-1], sent, flat(model).numel()


def test_a_round_is_one_all_reduce_and_its_other_steps_communicate_nothing(two_ranks):
    for calls, sent, numel in two_ranks(count_collectives):
        one_round = [[]] * (STEPS - 1) + [["all_reduce"]]
        first_round = [*one_round[:-1], ["all_reduce", "all_reduce"]]  # the first duals go by themselves
        assert calls == first_round + 3 * one_round
        tensors = [(after - before) / 8 / numel for before, after in zip([0, *sent], sent, strict=False)]
        assert [int(t) for t in tensors[STEPS - 1 :: STEPS]] == [3, 1, 1, 2]


def resume_in_a_round(rank):
    model, optimizer = make_net(rank)
    steps = train_on_shard(optimizer, model, shard_of(rank), rounds=3, worker=rank)
    for _ in range(STEPS + 1):
        next(steps)
    state, saved_by_rank_0 = through_a_file(optimizer.state_dict()), [copy.deepcopy(model.state_dict())]
    dist.broadcast_object_list(saved_by_rank_0)
    resumed, other = make_net(rank)
    resumed.load_state_dict(saved_by_rank_0[0])
    other.load_state_dict(state)
    finish(steps)
    finish(train_on_shard(other, resumed, shard_of(rank), rounds=3, worker=rank, skip=STEPS + 1))
    return flat(model), flat(resumed)


def test_every_rank_resumes_in_the_middle_of_a_round_from_its_own_state(two_ranks):
    for straight, resumed in two_ranks(resume_in_a_round):
        assert torch.equal(resumed, straight)


def meet_bad_gradients(rank):
    """Rank 1 meets a NaN in the third round of five: what is raised, and weights after each round."""
    outcome = {"said": []}
    for mode in ("raise", "skip"):
        model, optimizer = make_net(rank, on_nonfinite=mode)
        outcome[mode] = []
        for step in range(5 * STEPS):
            for position, p in enumerate(model.parameters()):
                p.grad = torch.sin(p.detach() + position + step + rank)
            if rank == 1 and step == 2 * STEPS + 1:
                model[0].bias.grad[0] = math.nan
            try:
                optimizer.step()
            except FloatingPointError as error:
                outcome["said"].append((step, str(error)))
            if optimizer.at_consensus:
                outcome[mode].append(flat(model))
    return outcome


def test_a_nan_on_one_rank_voids_the_round_of_all_or_is_left_out_there(two_ranks):
    first, second = two_ranks(meet_bad_gradients)
    for outcome in (first, second):
        ((step, message),) = outcome["said"]
        assert step == 3 * STEPS - 1
        assert "worker 1 in parameter 1 of shape (8,)" in message
        assert torch.equal(outcome["raise"][2], outcome["raise"][1])
    for mode in ("raise", "skip"):
        assert all(torch.equal(a, b) for a, b in zip(first[mode], second[mode], strict=True))
        assert not torch.equal(first[mode][4], first[mode][3])
    assert not torch.equal(first["skip"][2], first["skip"][1])


def step_round(model, optimizer, rank, number, *, is_poisoned=False):
    for step in range(number * STEPS, (number + 1) * STEPS):
        for position, p in enumerate(model.parameters()):
            p.grad = torch.sin(p.detach() + position + step + rank)
        if is_poisoned:
            model[0].bias.grad[0] = math.nan
        optimizer.step()
    return flat(model)


def miss_the_first_round(rank):
    """Weights after each of three rounds, in the first of which rank 1 has no finite gradient."""
    model, optimizer = make_net(rank, on_nonfinite="skip", metric="adam")
    return [step_round(model, optimizer, rank, n, is_poisoned=rank == 1 and n == 0) for n in range(3)]


def test_a_rank_without_any_finite_gradient_yet_does_not_count_and_joins_later(two_ranks):
    first, second = two_ranks(miss_the_first_round)
    model = small_net()
    alone = PISA(model.parameters(), local_steps=STEPS, metric="adam")
    torch.testing.assert_close(first[0], step_round(model, alone, 0, 0), rtol=1e-12, atol=1e-12)
    difference = (first[1] - step_round(model, alone, 0, 1)).abs().max()
    assert 1e-6 < difference < 1
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def train_with_gradient_scaler(rank):
    """Three rounds; in one step rank 1 overflows: with GradScaler, and with that step's NaN skipped without it."""
    outcome = {}
    for is_scaled in (True, False):
        model = small_net(seed=rank, dtype=torch.float32)
        optimizer = PISA(model.parameters(), local_steps=STEPS, on_nonfinite="raise" if is_scaled else "skip")
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=is_scaled)
        for step in range(3 * STEPS):
            optimizer.zero_grad()
            scaler.scale(sum((torch.cos(p + step + rank)).sum() for p in model.parameters())).backward()
            if rank == 1 and step == STEPS + 1:
                model[0].bias.grad[0] = math.inf
            scaler.step(optimizer)
            scaler.update()
        outcome[is_scaled] = flat(model)
        outcome[is_scaled, "scale"] = scaler.get_scale()
    return outcome


def test_an_overflow_under_grad_scaler_is_left_out_on_its_rank_and_nobody_hangs(two_ranks):
    first, second = two_ranks(train_with_gradient_scaler)
    assert (first[True, "scale"], second[True, "scale"]) == (2.0**10, 2.0**9)
    assert torch.equal(first[True], second[True])
    torch.testing.assert_close(first[True], first[False], rtol=1e-6, atol=1e-6)


def train_on_skewed_data(rank):
    """How far from the least loss PISA and local SGD end, where each rank has a class and a half."""
    data = blobs()
    shard = data.select(list(range(45 * rank, 45 + 45 * rank)))

    def loss_of(model, dataset):
        decay = 0.01 * sum(p.square().sum() for p in model.parameters())
        return cross_entropy(model(dataset.inputs / 3), dataset.targets) + decay

    def linear():
        torch.manual_seed(0)
        return nn.Linear(4, 3, dtype=torch.float64)

    def minimise(loss, optimizer):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    best = linear()
    newton = torch.optim.LBFGS(best.parameters(), max_iter=500)
    newton.step(lambda: minimise(lambda: loss_of(best, data), newton))
    excess = {}
    for name in ("PISA", "local SGD"):
        model = linear()
        is_ours = name == "PISA"
        optimizer = (
            PISA(model.parameters(), local_steps=20, metric="adam", penalty=3.0)
            if is_ours
            else torch.optim.SGD(model.parameters(), lr=0.3)
        )
        for step in range(1600):
            minimise(lambda net=model: loss_of(net, shard), optimizer)
            optimizer.step()
            if not is_ours and step % 20 == 19:
                for p in model.parameters():
                    dist.all_reduce(p.data)
                    p.data /= 2
        excess[name] = (loss_of(model, data) - loss_of(best, data)).item()
    return excess


def test_it_reaches_the_least_loss_of_skewed_data_where_averaged_local_steps_settle_elsewhere(two_ranks):
    first, second = two_ranks(train_on_skewed_data)
    assert first == second
    assert first["local SGD"] > 0.03
    assert 0 <= first["PISA"] < 1e-3


def construct_what_does_not_fit(rank):
    """Message of the ValueError in each case, on this rank."""
    mesh = init_device_mesh("cpu", (2,))
    cases = {
        "metric": lambda: make_net(rank, metric=("muon", "adam")[rank]),
        "local_steps": lambda: make_net(rank, local_steps=2 + rank),
        "penalty": lambda: make_net(rank, penalty=2.0 + rank),
        "sharded": lambda: PISA(fully_shard(small_net(), mesh=mesh).parameters(), local_steps=STEPS),
    }
    messages = {}
    for case, make in cases.items():
        try:
            make()
            messages[case] = "nothing"
        except ValueError as error:
            messages[case] = str(error)
    return messages


def test_settings_that_differ_by_rank_and_sharded_parameters_are_refused_on_every_rank(two_ranks):
    for messages in two_ranks(construct_what_does_not_fit):
        assert "metric=muon" in messages["metric"]
        assert "metric=adam" in messages["metric"]
        assert "local_steps=3" in messages["local_steps"]
        assert "penalty=3.0" in messages["penalty"]
        assert "got a sharded one of shape (8, 4)" in messages["sharded"]
