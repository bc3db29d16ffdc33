"""What PyTorch users expect of SISA, NSISA and PISA, apart from the numbers."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from optimizers import (
    OPTIMIZERS,
    SETTINGS,
    assert_same_bits,
    every_optimizer,
    make_parameters,
    reference_for,
    set_gradients,
    snapshot,
    through_a_file,
    train,
)
from optimizers import one_thread as one_thread  # a fixture
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, StepLR

from pisa_dist import SISA

# Parameter groups


def test_each_parameter_group_uses_its_own_penalty_lr_and_scale():
    first, second = make_parameters(), make_parameters(seed=1)
    expected = [
        reference_for(first, penalties=[2.0], preconditioner_scales=[10.0]),
        reference_for(second, penalties=[7.0], preconditioner_scales=[1.0]),
    ]
    groups = [{"params": first}, {"params": second, "penalty": 7.0, "preconditioner_scale": 1.0, "lr": 0.3}]
    optimizer = SISA(groups, penalty=2.0, preconditioner_scale=10.0, lr=1.0)
    for seed in range(10):
        set_gradients(first + second, seed)
        for parameters, reference, lr in zip((first, second), expected, (1.0, 0.3), strict=True):
            reference.step([[p.grad.numpy() for p in parameters]], lr=lr)
        optimizer.step()
    for parameters, reference in zip((first, second), expected, strict=True):
        for p, w in zip(parameters, reference.weights, strict=True):
            np.testing.assert_allclose(p.detach().numpy(), w, rtol=1e-12, atol=1e-14)


def test_a_group_added_during_training_starts_like_a_fresh_optimizer():
    early, late, alone = make_parameters(), make_parameters(seed=1), make_parameters(seed=1)
    optimizer = SISA(early, **SETTINGS)
    train(optimizer, early, range(5))
    optimizer.add_param_group({"params": late})
    for seed in range(5, 10):
        set_gradients(early, seed + 100)
        set_gradients(late, seed)
        optimizer.step()
    torch.testing.assert_close(late, train(SISA(alone, **SETTINGS), alone, range(5, 10)), rtol=1e-12, atol=1e-14)


def test_a_bad_value_in_a_group_is_refused_like_one_in_the_constructor():
    with pytest.raises(ValueError, match=r"penalty.*-1"):
        SISA([{"params": make_parameters(), "penalty": -1.0}], **SETTINGS)
    optimizer = SISA(make_parameters(), **SETTINGS)
    with pytest.raises(ValueError, match=r"penalty.*-1"):
        optimizer.add_param_group({"params": make_parameters(), "penalty": -1.0})


def test_named_parameters_are_accepted_as_in_torch():
    model, twin = nn.Linear(3, 2), nn.Linear(3, 2)
    twin.load_state_dict(model.state_dict())
    train(SISA(model.named_parameters(), **SETTINGS), list(model.parameters()), range(3))
    train(SISA(twin.parameters(), **SETTINGS), list(twin.parameters()), range(3))
    assert_same_bits(list(model.parameters()), list(twin.parameters()))


# Saving and copying


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("carry", [copy.deepcopy, through_a_file])
def test_a_reloaded_state_dict_continues_bit_for_bit(make, dtype, carry):
    parameters = make_parameters(dtype)
    optimizer = make(parameters, penalty_growth=1.1, penalty_growth_interval=2)
    train(optimizer, parameters, range(5))
    resumed = [nn.Parameter(p.detach().clone()) for p in parameters]
    resumed_optimizer = make(resumed, penalty=99.0)  # the saved settings win
    resumed_optimizer.load_state_dict(carry(optimizer.state_dict()))
    train(optimizer, parameters, range(5, 10))
    train(resumed_optimizer, resumed, range(5, 10))
    assert_same_bits(resumed, parameters)
    assert_same_bits(resumed_optimizer.state_dict(), optimizer.state_dict())


@every_optimizer
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_a_copied_optimizer_continues_bit_for_bit_and_leaves_the_original_alone(make, duplicate):
    parameters = make_parameters()
    optimizer = make(parameters, penalty_growth=1.1)
    train(optimizer, parameters, range(3))
    other_optimizer, others = duplicate((optimizer, parameters))
    before = snapshot(optimizer, parameters)
    train(other_optimizer, others, range(3, 6))
    assert_same_bits(snapshot(optimizer, parameters), before)
    assert_same_bits(others, train(optimizer, parameters, range(3, 6)))


@every_optimizer
def test_the_state_is_no_more_than_two_tensors_a_parameter_like_adamw(make):
    parameters = make_parameters()
    optimizer = make(parameters)
    train(optimizer, parameters, range(2))
    for p in parameters:
        sizes = [v.numel() for v in optimizer.state[p].values() if torch.is_tensor(v)]
        assert sum(n for n in sizes if n == p.numel() and n > 1) <= 2 * p.numel()


# Gradients and closures


@every_optimizer
def test_a_closure_is_evaluated_once_with_gradients_enabled_and_its_loss_returned(make):
    parameters, calls = make_parameters(), []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = sum((p**2).sum() for p in parameters)
        loss.backward()
        return loss

    optimizer = make(parameters)
    start = sum((p.detach() ** 2).sum() for p in parameters)
    loss = optimizer.step(closure)
    assert calls == [True]
    assert loss.item() == start.item()
    assert optimizer.step(closure).item() != start.item()
    assert optimizer.step() is None


@every_optimizer
def test_a_missing_gradient_counts_as_zero_and_the_dual_still_moves_the_parameter(make):
    with_none, with_zero = make_parameters(), make_parameters()
    for parameters, missing in ((with_none, None), (with_zero, torch.zeros(4, 3, dtype=torch.float64))):
        optimizer = make(parameters, consensus_l2=0.1)
        train(optimizer, parameters, range(2))
        before = parameters[0].detach().clone()
        set_gradients(parameters, 2)
        parameters[0].grad = missing
        optimizer.step()
    assert_same_bits(with_none, with_zero)
    assert not torch.equal(with_none[0], before)


@every_optimizer
def test_the_gradient_is_left_as_it_was(make):
    parameters = make_parameters()
    optimizer = make(parameters)
    set_gradients(parameters, 0)
    gradients = [p.grad.clone() for p in parameters]
    optimizer.step()
    assert_same_bits([p.grad for p in parameters], gradients)
    optimizer.zero_grad()
    assert all(p.grad is None for p in parameters)


@every_optimizer
def test_accumulated_gradients_equal_one_gradient_of_the_whole_batch(make):
    torch.manual_seed(0)
    inputs, accumulated = torch.randn(8, 3, dtype=torch.float64), nn.Linear(3, 4, dtype=torch.float64)
    whole = copy.deepcopy(accumulated)
    optimizers = make(accumulated.parameters()), make(whole.parameters())
    for _ in range(5):
        for optimizer in optimizers:
            optimizer.zero_grad()
        for half in inputs.chunk(2):
            (accumulated(half).square().mean() / 2).backward()
        whole(inputs).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(list(accumulated.parameters()), list(whole.parameters()), rtol=1e-10, atol=1e-12)


def test_a_sparse_gradient_counts_as_its_dense_equal():
    tables = []
    for is_sparse in (True, False):
        torch.manual_seed(0)
        embedding = nn.Embedding(4, 2, sparse=is_sparse)
        optimizer = SISA(embedding.parameters(), **SETTINGS)
        for index in (1, 3):
            optimizer.zero_grad()
            embedding(torch.tensor([index, index])).square().sum().backward()
            optimizer.step()
        tables.append(embedding.weight.detach())
    assert torch.equal(*tables)


def test_complex_parameters_are_refused_by_name():
    with pytest.raises((ValueError, TypeError), match="complex"):
        SISA([nn.Parameter(torch.zeros(2, dtype=torch.complex64))], **SETTINGS)


@every_optimizer
def test_the_memory_format_of_parameter_and_gradient_does_not_matter(make):
    plain = [nn.Parameter(torch.randn(4, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))]
    channels_last = [nn.Parameter(plain[0].detach().clone().to(memory_format=torch.channels_last))]
    transposed = [nn.Parameter(plain[0].detach().permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0))]
    for parameters in (plain, channels_last, transposed):
        train(make(parameters), parameters, range(4))
    torch.testing.assert_close(channels_last[0], plain[0], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(transposed[0], plain[0], rtol=1e-12, atol=1e-14)


# Learning-rate schedulers

SCHEDULERS = {
    "StepLR": lambda optimizer: StepLR(optimizer, step_size=3, gamma=0.5),
    "CosineAnnealingLR": lambda optimizer: CosineAnnealingLR(optimizer, T_max=12),
    "LambdaLR": lambda optimizer: LambdaLR(optimizer, lambda t: (1 + t) / 4),
}


@pytest.mark.parametrize("make_scheduler", SCHEDULERS.values(), ids=SCHEDULERS.keys())
@pytest.mark.parametrize("scheme", ["adam", "nsisa"])
def test_a_scheduler_of_torch_acts_as_dividing_penalty_and_scale_by_lr_predicts(make_scheduler, scheme):
    parameters = make_parameters()
    reference = reference_for(parameters, scheme=scheme, consensus_l2=0.2)
    optimizer = OPTIMIZERS["NSISA" if scheme == "nsisa" else "SISA adam"](parameters, consensus_l2=0.2)
    scheduler, rates = make_scheduler(optimizer), []
    for seed in range(10):
        set_gradients(parameters, seed)
        rates.append(optimizer.param_groups[0]["lr"])
        reference.step([[p.grad.numpy() for p in parameters]], lr=rates[-1])
        optimizer.step()
        scheduler.step()
    assert len(set(rates)) >= 4
    for p, w in zip(parameters, reference.weights, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), w, rtol=1e-11, atol=1e-13)


@every_optimizer
def test_a_schedule_that_passes_through_lr_zero_stands_still_there_and_goes_on_afterwards(make):
    parameters = make_parameters()
    optimizer = make(parameters, consensus_l2=0.1)
    scheduler = LambdaLR(optimizer, lambda t: min(1.0, t / 3))  # a warm-up as in transformers: the first lr is 0
    start = [p.detach().clone() for p in parameters]
    train(optimizer, parameters, [0])
    torch.testing.assert_close([p.detach() for p in parameters], start, rtol=1e-12, atol=1e-12)
    scheduler.step()
    train(optimizer, parameters, [1])
    assert all(p.isfinite().all() and not torch.equal(p, s) for p, s in zip(parameters, start, strict=True))


# Gradients that are not finite


@every_optimizer
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_raises_naming_worker_and_parameter_and_changes_nothing(make, bad):
    parameters = make_parameters()
    optimizer = make(parameters)
    train(optimizer, parameters, range(2))
    before = snapshot(optimizer, parameters)
    set_gradients(parameters, 2)
    parameters[2].grad[1] = bad
    with pytest.raises(ArithmeticError, match=r"(?s)(worker 0.*parameter|parameter.*worker 0)") as caught:
        optimizer.step()
    assert "2" in str(caught.value), "which parameter"
    assert_same_bits(snapshot(optimizer, parameters), before)


def test_the_error_about_a_gradient_that_is_not_finite_uses_the_name_when_it_is_known():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = SISA(model.named_parameters(), **SETTINGS)
    set_gradients(list(model.parameters()), 0)
    model[1].weight.grad[0, 0] = math.nan
    with pytest.raises(ArithmeticError, match=r"1\.weight"):
        optimizer.step()


@every_optimizer
def test_skipping_leaves_no_trace_of_a_gradient_that_is_not_finite(make):
    skipping, undisturbed = make_parameters(), make_parameters()
    optimizer = make(skipping, on_nonfinite="skip", penalty_growth=1.2)
    train(optimizer, skipping, range(2))
    before = snapshot(optimizer, skipping)
    set_gradients(skipping, 77)
    skipping[0].grad[0, 0] = math.nan
    optimizer.step()
    assert_same_bits(snapshot(optimizer, skipping), before)
    train(optimizer, skipping, range(2, 4))
    train(make(undisturbed, on_nonfinite="skip", penalty_growth=1.2), undisturbed, range(4))
    assert_same_bits(skipping, undisturbed)


@every_optimizer
def test_a_large_but_finite_gradient_is_not_taken_for_an_infinite_one(make):
    parameters = make_parameters()
    optimizer = make(parameters)
    set_gradients(parameters, 0)
    parameters[0].grad[0, 0] = 1e60  # more than float32 holds
    optimizer.step()
    assert all(p.isfinite().all() for p in parameters)


# Precision


@every_optimizer
def test_float32_follows_float64(make):
    single, double = make_parameters(torch.float32), make_parameters()
    train(make(single), single, range(10))
    train(make(double), double, range(10))
    for s, d in zip(single, double, strict=True):
        assert s.dtype is torch.float32
        assert (s - d).norm() <= 1e-4 * d.norm()


@every_optimizer
def test_bfloat16_parameters_keep_their_type_and_have_float32_state(make):
    half, double = make_parameters(torch.bfloat16), make_parameters()
    optimizer = make(half)
    train(optimizer, half, range(10))
    train(make(double), double, range(10))
    for h, d in zip(half, double, strict=True):
        assert h.dtype is torch.bfloat16
        assert optimizer.state[h]["dual"].dtype is torch.float32
        assert {v.dtype for v in optimizer.state[h].values() if torch.is_tensor(v)} == {torch.float32}
        assert (h - d).norm() <= 0.1 * d.norm()


# Range checks
