"""What PyTorch users expect of the optimizers on several ranks: one collective a step, errors alike, exact resuming."""

import copy
import math
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from harness import run_cases, run_ranks
from optimizers import (
    SETTINGS,
    assert_same_bits,
    make_parameters,
    set_gradients,
    snapshot,
    through_a_file,
    train,
)
from optimizers import one_thread as one_thread  # a fixture
from torch import nn

from pisa_dist import PISA, SISA

# Several ranks: all on the same two, because starting one takes seconds


def every_case_on_two_ranks(rank, num_ranks):
    cases = [
        one_collective_each_step,
        start_from_other_weights,
        construct_what_does_not_fit,
        meet_gradients_that_are_not_finite,
        overflow_the_sum,
        train_with_gradient_scaler,
        save_and_resume_duals,
    ]
    return {case.__name__: case(rank) for case in cases}


@pytest.fixture(scope="module")
def two_ranks():
    """What a case returned on rank 0 and on rank 1."""
    return run_cases(every_case_on_two_ranks, 2)


def one_collective_each_step(rank):
    """Bytes of every collective in each of three steps: [[(name, bytes), ...], ...], and the number of weights."""
    parameters = make_parameters(torch.float32)
    optimizer = SISA([{"params": parameters[:2], "penalty": 2.0}, {"params": parameters[2:]}], **SETTINGS)
    calls = []

    def counted(name, original):
        def call(*args, **kwargs):
            tensors = [a for a in [*args, *kwargs.values()] if torch.is_tensor(a)]
            calls[-1].append((name, sum(t.numel() * t.element_size() for t in tensors)))
            return original(*args, **kwargs)

        return call

    names = [n for n in dir(dist) if n.startswith(("all_", "broadcast", "reduce", "gather", "scatter", "barrier"))]
    names = [n for n in names if callable(getattr(dist, n))] + ["send", "recv", "isend", "irecv"]
    with mock.patch.multiple(dist, **{n: counted(n, getattr(dist, n)) for n in names}):
        for step in range(3):
            set_gradients(parameters, 10 * step + rank)
            calls.append([])
            optimizer.step()
    return calls, sum(p.numel() for p in parameters)


def test_a_step_is_one_all_reduce_of_the_parameters_and_a_few_scalars(two_ranks):
    for calls, num_weights in two_ranks(one_collective_each_step):
        for in_one_step in calls:
            assert [name for name, _ in in_one_step] == ["all_reduce"]
            assert 4 * num_weights <= in_one_step[0][1] <= 4 * (num_weights + 8)


def start_from_other_weights(rank):
    parameters = make_parameters(seed=rank)
    SISA(parameters, **SETTINGS)
    return [p.detach() for p in parameters]


def test_unequal_initial_weights_become_those_of_rank_0_at_construction(two_ranks):
    first, second = two_ranks(start_from_other_weights)
    assert_same_bits(first, [p.detach() for p in make_parameters(seed=0)])
    assert_same_bits(second, first)


def construct_what_does_not_fit(rank):
    """Message of the ValueError in each case, on this rank."""
    cases = {
        "shape": lambda: [nn.Parameter(torch.zeros(3 + rank))],
        "same size, other shape": lambda: [nn.Parameter(torch.zeros((2, 6) if rank else (6, 2)))],
        "number": lambda: [nn.Parameter(torch.zeros(3)) for _ in range(1 + rank)],
        "type": lambda: [nn.Parameter(torch.zeros(3, dtype=torch.float32 if rank else torch.float64))],
    }
    messages = {}
    for case, make in cases.items():
        try:
            SISA(make(), **SETTINGS)
            messages[case] = None
        except ValueError as error:
            messages[case] = str(error)
    return messages


def test_architectures_that_differ_by_rank_raise_value_error_on_every_rank(two_ranks):
    for messages in two_ranks(construct_what_does_not_fit):
        assert [case for case, message in messages.items() if not message] == []


def meet_gradients_that_are_not_finite(rank):
    """Rank 1 meets a NaN in the third of five steps: with "raise", with "skip"."""
    outcome = {}
    for mode in ("raise", "skip"):
        parameters = make_parameters()
        optimizer = SISA(parameters, **SETTINGS, on_nonfinite=mode)
        for step in range(5):
            before = snapshot(optimizer, parameters)
            set_gradients(parameters, 10 * step + rank)
            if step == 2 and rank == 1:
                parameters[1].grad[0] = math.nan
            try:
                optimizer.step()
            except ArithmeticError as error:
                outcome["message"] = str(error)
            if step == 2:
                assert_same_bits(snapshot(optimizer, parameters), before)
        outcome[mode] = [p.detach() for p in parameters]
    return outcome


def test_a_gradient_that_is_not_finite_on_one_rank_raises_or_skips_on_all(two_ranks):
    first, second = two_ranks(meet_gradients_that_are_not_finite)
    assert "worker 1" in first["message"], "rank 0 can tell the user which worker it was"
    assert "worker 1" in second["message"]
    for outcome in (first, second):
        assert_same_bits(outcome["skip"], first["raise"])
        assert_same_bits(outcome["raise"], first["raise"])
        assert all(p.isfinite().all() for p in outcome["skip"])


def overflow_the_sum(rank):
    """Messages that float32 holds and whose sum it does not; then the gradients that such weights have."""
    parameters = make_parameters(torch.float32)
    optimizer = PISA(parameters)
    for p in parameters:
        p.grad = torch.full_like(p, 3e38)
    optimizer.step()
    weights = [p.detach().clone() for p in parameters]
    optimizer.zero_grad()
    sum(p.square().sum() for p in parameters).backward()
    try:
        optimizer.step()
    except FloatingPointError as error:
        return weights, [optimizer.state[p]["dual"] for p in parameters], str(error)


def test_a_sum_that_overflows_is_noticed_by_the_gradients_of_the_next_step_on_every_rank(two_ranks):
    for weights, duals, message in two_ranks(overflow_the_sum):
        assert all(w.isinf().all() for w in weights)
        assert all(d.isfinite().all() for d in duals)
        assert message.startswith("non-finite gradient on worker")


def train_with_gradient_scaler(rank):
    """Six steps; in the third, rank 1's gradient overflows: scaled by GradScaler, unscaled by hand, and without it."""
    outcome = {}
    for variant in ("scaler", "scaler, unscaled by the user", "plain"):
        parameters = make_parameters(torch.float32)
        optimizer = SISA(parameters, **SETTINGS)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=variant != "plain")
        for step in range(6):
            overflow = step == 2
            if overflow and variant == "plain":
                continue
            before = snapshot(optimizer, parameters)
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(10 * step + rank)
            loss = sum((p * torch.randn(p.shape, generator=generator)).sum() for p in parameters)
            scaler.scale(loss).backward()
            if overflow and rank == 1:
                parameters[0].grad[0, 0] = math.inf
            if variant == "scaler, unscaled by the user":
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            if overflow:
                assert_same_bits(snapshot(optimizer, parameters), before)
        outcome[variant] = [p.detach() for p in parameters]
        outcome[variant, "scale"] = scaler.get_scale()
    return outcome


def test_an_overflow_on_one_rank_under_grad_scaler_skips_the_step_on_both_without_a_hang(two_ranks):
    first, second = two_ranks(train_with_gradient_scaler)
    assert second["scaler", "scale"] == 2.0**9, "the rank that overflowed lowers its scale"
    for variant in ("scaler", "scaler, unscaled by the user"):
        assert_same_bits(second[variant], first[variant])
        torch.testing.assert_close(first[variant], first["plain"], rtol=1e-6, atol=1e-6)


def save_and_resume_duals(rank):
    """A run of six steps and one resumed after three: weights and dual of this rank for each."""
    parameters = make_parameters()
    optimizer = SISA(parameters, **SETTINGS, worker_weight=1.0 + rank, penalty_growth=1.1)
    train(optimizer, parameters, [10 * s + rank for s in range(3)])
    resumed = [nn.Parameter(p.detach().clone()) for p in parameters]
    resumed_optimizer = SISA(resumed, **SETTINGS, worker_weight=1.0 + rank, penalty_growth=1.1)
    resumed_optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    results = []
    for ps, opt in ((parameters, optimizer), (resumed, resumed_optimizer)):
        train(opt, ps, [10 * s + rank for s in range(3, 6)])
        results.append(([p.detach() for p in ps], [opt.state[p]["dual"] for p in ps]))
    return results


def test_every_rank_resumes_with_its_own_dual_bit_for_bit(two_ranks):
    first, second = two_ranks(save_and_resume_duals)
    for straight, resumed in (first, second):
        assert_same_bits(resumed, straight)
    assert_same_bits(first[0][0], second[0][0])
    assert not torch.equal(first[0][1][0], second[0][1][0]), "the duals differ by worker"


def reload_in_a_subgroup(rank, num_ranks):
    """Ranks 1 and 2 are the workers; rank 0 stands by. Their weights after a step on, with and without reloading."""
    pair = dist.new_group([1, 2])
    if rank == 0:
        return None
    results = []
    for reload in (False, True):
        parameters = make_parameters()
        optimizer = SISA(parameters, **SETTINGS, process_group=pair)
        train(optimizer, parameters, [rank])
        if reload:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(optimizer, parameters, [10 + rank])
        results.append([p.detach() for p in parameters])
    return results


def test_an_optimizer_keeps_its_process_group_when_a_state_dict_is_loaded():
    _, *by_rank = run_ranks(reload_in_a_subgroup, 3)
    for straight, reloaded in by_rank:
        assert_same_bits(reloaded, straight)


def step_after_the_group_is_gone(rank, num_ranks):
    said = []
    for more in ({}, {"overlap": True}, {"compression": "int8"}):
        if not dist.is_initialized():
            return said
        parameters = make_parameters(torch.float32)
        said.append(SISA(parameters, **SETTINGS, **more))
    dist.destroy_process_group()
    errors = []
    for optimizer in said:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        try:
            for p in parameters:
                (p.sum() * 1.0).backward()
            optimizer.step()
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
    return errors


def test_a_process_group_that_is_destroyed_is_an_error_that_names_the_collective_and_the_rank():
    for rank, errors in enumerate(run_ranks(step_after_the_group_is_gone, 2)):
        assert len(errors) == 3
        for error in errors:
            assert error.startswith("ConsensusError: the consensus all-")
            assert f"failed on rank {rank} of 2" in error
