"""What PyTorch users expect of SISA, NSISA and PISA, apart from the numbers."""

import copy
import io
import math
import pickle
from fractions import Fraction
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from reference import Reference
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, StepLR

from pisa_dist import NSISA, PISA, SISA
from pisa_dist.admm.device import multiplies_bfloat16_fast
from pisa_dist.admm.preconditioners import Identity, newton_schulz
from pisa_dist.admm.preconditioners.newton_schulz import COEFFICIENTS

SETTINGS = {"penalty": 3.0, "preconditioner_scale": 10.0}
OPTIMIZERS = {
    "SISA adam": lambda parameters, **more: SISA(parameters, **SETTINGS | more),
    "SISA rmsprop": lambda parameters, **more: SISA(parameters, **SETTINGS | {"preconditioner": "rmsprop"} | more),
    "SISA adagrad": lambda parameters, **more: SISA(parameters, **SETTINGS | {"preconditioner": "adagrad"} | more),
    "NSISA": lambda parameters, **more: NSISA(parameters, newton_schulz_precision="float32", **SETTINGS | more),
    "PISA": lambda parameters, **more: PISA(parameters, **SETTINGS | {"preconditioner": Identity()} | more),
}
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    torch.set_num_threads(1)


def make_parameters(dtype=torch.float64, seed=0):
    """A matrix, a convolution kernel, a vector and a scalar."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(4, 3), (3, 2, 2, 2), (5,), ()]
    return [nn.Parameter(torch.randn(s, dtype=torch.float64, generator=generator).to(dtype)) for s in shapes]


def set_gradients(parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape, dtype=torch.float64, generator=generator).to(p.dtype)


def train(optimizer, parameters, steps):
    """Step once for each of `steps`, the seeds of the gradients."""
    for seed in steps:
        set_gradients(parameters, seed)
        optimizer.step()
    return parameters


def snapshot(optimizer, parameters):
    return copy.deepcopy(([p.data for p in parameters], optimizer.state_dict()))


def assert_same_bits(actual, expected):
    """Tensors in nested lists and dicts, numbers and strings, all equal."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        actual, expected = list(actual.values()), list(expected.values())
    if isinstance(expected, list | tuple):
        assert len(actual) == len(expected)
        for a, e in zip(actual, expected, strict=True):
            assert_same_bits(a, e)
    elif torch.is_tensor(expected):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    else:
        assert type(actual) is type(expected)
        assert actual == expected


def reference_for(parameters, **settings):
    settings = {"worker_weights": [1.0], "penalties": [3.0], "preconditioner_scales": [10.0]} | settings
    return Reference([p.detach().numpy() for p in parameters], settings.pop("scheme", "adam"), **settings)


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


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


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

BAD_SETTINGS = [
    ("penalty", 0.0),
    ("penalty", -1.0),
    ("preconditioner_scale", -0.5),
    ("second_moment_decay", -0.1),
    ("second_moment_decay", 1.0),
    ("eps", -1e-8),
    ("preconditioner_bound", 0.0),
    ("consensus_l2", -0.25),
    ("penalty_growth", 0.99),
    ("penalty_growth_interval", 0),
    ("lr", 0.0),
    ("lr", -2.0),
    ("worker_weight", 0.0),
    ("worker_weight", -3.0),
    ("penalty", math.nan),
    ("preconditioner_scale", math.nan),
    ("second_moment_decay", math.nan),
    ("eps", math.nan),
    ("preconditioner_bound", math.nan),
    ("consensus_l2", math.nan),
    ("penalty_growth", math.nan),
    ("lr", math.nan),
    ("worker_weight", math.nan),
    ("penalty", math.inf),
    ("preconditioner", "adamax"),
    ("on_nonfinite", "ignore"),
]


@pytest.mark.parametrize(("name", "value"), BAD_SETTINGS)
def test_a_setting_out_of_range_is_refused_with_its_name_and_value(name, value):
    with pytest.raises(ValueError) as caught:
        SISA(make_parameters(), **SETTINGS | {name: value})
    assert name in str(caught.value)
    assert str(value) in str(caught.value)


NO_NUMBERS = [
    ("lr", None, "`lr` must be a number > 0, got None"),
    ("lr", "a", "`lr` must be a number > 0, got 'a'"),
    ("lr", True, "`lr` must be a number > 0, got True"),
    ("lr", 1j, "`lr` must be a number > 0, got 1j"),
    ("penalty", None, "`penalty` (sigma) must be a number > 0, got None"),
    ("penalty", torch.eye(2), "`penalty` (sigma) must be a number > 0, got tensor([[1., 0.], [0., 1.]])"),
    ("penalty", np.float32(-1.0), "`penalty` (sigma) must be > 0, got -1.0"),
    ("penalty_growth_interval", torch.tensor(2.0), "`penalty_growth_interval` must be an integer >= 1, got 2.0"),
    ("worker_weight", "a", "`worker_weight` (alpha) must be a number > 0, got 'a'"),
    ("second_moment_decay", "a", "`second_moment_decay` (beta) must be a number in [0, 1), got 'a'"),
]


@pytest.mark.parametrize(("name", "value", "words"), NO_NUMBERS)
def test_what_is_no_number_is_refused_in_one_line_with_its_name(name, value, words):
    with pytest.raises(ValueError) as caught:
        SISA(make_parameters(), **SETTINGS | {name: value})
    assert str(caught.value) == words


@pytest.mark.parametrize(
    "number",
    [np.float32, np.float64, np.array, torch.tensor, lambda x: torch.tensor([x]), Fraction],
    ids=["float32", "float64", "array", "tensor", "tensor of one", "fraction"],
)
def test_numbers_of_other_libraries_count_as_pythons_own(number):
    values = {"penalty": 2.0, "preconditioner_scale": 8.0, "eps": 0.25, "lr": 0.5, "worker_weight": 3.0}
    expected, found = make_parameters(), make_parameters()
    train(SISA(expected, penalty_growth_interval=2, penalty_growth=1.5, **values), expected, range(4))
    group = {"params": found, "penalty": number(values["penalty"])}
    given = {name: number(value) for name, value in values.items() if name != "penalty"}
    optimizer = SISA([group], penalty_growth_interval=np.int64(2), penalty_growth=number(1.5), **given)
    train(optimizer, found, range(4))
    assert_same_bits(found, expected)
    kept = [optimizer.worker_weight, *(v for k, v in optimizer.param_groups[0].items() if k not in ("params", "lr"))]
    assert {type(value) for value in kept} <= {int, float, str, type(None)}


def test_a_learning_rate_in_a_tensor_can_be_set_there():
    expected, found = make_parameters(), make_parameters()
    lr = torch.tensor(0.5)
    optimizers = SISA(expected, **SETTINGS, lr=0.5), SISA(found, **SETTINGS, lr=lr)
    train(optimizers[0], expected, [0])
    train(optimizers[1], found, [0])
    optimizers[0].param_groups[0]["lr"] = 0.25
    lr.fill_(0.25)
    train(optimizers[0], expected, [1])
    train(optimizers[1], found, [1])
    assert_same_bits(found, expected)


@pytest.mark.parametrize("value", [-0.1, 1.5, math.nan])
def test_a_momentum_out_of_range_is_refused_with_its_name_and_value(value):
    with pytest.raises(ValueError, match=rf"momentum.*{value}"):
        NSISA(make_parameters(), **SETTINGS, momentum=value)


def test_unknown_settings_are_refused():
    with pytest.raises(TypeError, match="penalti"):
        SISA(make_parameters(), **SETTINGS, penalti=1.0)


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
    by_rank = run_ranks(every_case_on_two_ranks, 2)
    return lambda case: [outcome[case.__name__] for outcome in by_rank]


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


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        ("*bias*", r"must be a list of patterns, got '\*bias\*'"),
        (["nonsense*"], r"pattern 'nonsense\*' matches no parameter, there are weight, bias"),
    ],
)
def test_patterns_that_name_nothing_are_refused(patterns, words):
    with pytest.raises(ValueError, match=words):
        NSISA(nn.Linear(2, 2).named_parameters(), sisa_parameters=patterns)


def test_patterns_need_named_parameters():
    with pytest.raises(ValueError, match=r"pass model\.named_parameters\(\)"):
        NSISA(nn.Linear(2, 2).parameters(), sisa_parameters=["*weight*"])
    optimizer = NSISA(nn.Linear(2, 2).named_parameters(), sisa_parameters=["*weight*"])
    weight = optimizer.param_groups[0]["params"][0]
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert set(optimizer.state[weight]) == {"dual", "second_moment"}


@pytest.mark.parametrize("coefficients", ["quintic", "polar_express"])
def test_matrices_of_one_shape_step_together_as_they_do_one_by_one(monkeypatch, coefficients):
    ends = []
    for devices in (set(), {"cpu"}):
        monkeypatch.setattr("pisa_dist.slots.BATCHED_ON", devices)
        generator = torch.Generator().manual_seed(0)
        shapes = [(4, 3), (4, 3), (3, 4), (3, 2, 2, 2), (3, 2, 2, 2), (5,), (4, 3)]
        parameters = [nn.Parameter(torch.randn(s, dtype=torch.float64, generator=generator)) for s in shapes]
        groups = [{"params": parameters[:-1]}, {"params": parameters[-1:], "penalty": 7.0}]
        optimizer = NSISA(groups, penalty=3.0, newton_schulz_coefficients=coefficients)
        train(optimizer, parameters, range(6))
        ends.append((parameters, [optimizer.state[p]["momentum_buffer"] for p in parameters if p.ndim > 1]))
    for one_by_one, together in zip(*([*end[0], *end[1]] for end in ends), strict=True):
        torch.testing.assert_close(together, one_by_one, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("coefficients", "steps", "low", "high"),
    [("quintic", 5, 0.4, 1.21), ("polar_express", 5, 0.84, 1.13), ("polar_express", 9, 0.99999, 1.00001)],
)
def test_newton_schulz_brings_singular_values_to_one(coefficients, steps, low, high):
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(40, 40, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(60, 60, generator=generator, dtype=torch.float64))
    values = torch.logspace(-1.5, 0, 40, dtype=torch.float64)
    matrix = left @ torch.diag(values) @ right[:40]
    found = newton_schulz(torch.stack([matrix, 0 * matrix]), steps=steps, coefficients=coefficients)
    singular = torch.linalg.svdvals(found[0])
    assert low <= singular.min() <= singular.max() <= high
    assert torch.equal(found[1], torch.zeros_like(matrix))
    tall = newton_schulz(matrix.mT, steps=steps, coefficients=coefficients)
    torch.testing.assert_close(tall.mT, found[0], rtol=1e-10, atol=1e-10)


@pytest.fixture
def bfloat16_is_fast(request, monkeypatch):
    """A CPU with or without instructions for bfloat16, as the parameter says."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: request.param, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    multiplies_bfloat16_fast.cache_clear()
    yield
    multiplies_bfloat16_fast.cache_clear()


@pytest.mark.usefixtures("bfloat16_is_fast")
@pytest.mark.parametrize("bfloat16_is_fast", [False], indirect=True)
@pytest.mark.parametrize(
    ("dtype", "precision", "tolerance"),
    [(torch.float64, "auto", 1e-12), (torch.float32, "float32", 1e-4), (torch.float32, "auto", 2e-3)],
)
@pytest.mark.parametrize("coefficients", ["quintic", "polar_express"])
@pytest.mark.parametrize("columns", [20, 31, 90])
def test_newton_schulz_applies_the_polynomials_to_the_singular_values(
    columns, coefficients, dtype, precision, tolerance
):
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(3, 20, 20, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(3, columns, columns, generator=generator, dtype=torch.float64))
    values = torch.logspace(-7, 0, 20, dtype=torch.float64)
    wide = (left * values) @ right[:, :20]
    singular = values / ((1.01 if coefficients == "polar_express" else 1) * values.square().sum().sqrt() + 1e-7)
    for step in range(5):
        a, b, c = COEFFICIENTS[coefficients][step if coefficients == "polar_express" else 0]
        singular = a * singular + b * singular**3 + c * singular**5
    expected = (left * singular) @ right[:, :20]
    for matrices, orthogonal in ((wide, expected), (wide[1].mT, expected[1].mT), (wide[0], expected[0])):
        found = newton_schulz(matrices.to(dtype), coefficients=coefficients, precision=precision)
        torch.testing.assert_close(found.double(), orthogonal, rtol=0, atol=tolerance)


@pytest.mark.usefixtures("bfloat16_is_fast")
@pytest.mark.parametrize(
    ("bfloat16_is_fast", "precision"), [(True, "bfloat16"), (False, "float32")], indirect=["bfloat16_is_fast"]
)
def test_newton_schulz_iterates_in_bfloat16_where_the_device_is_fast_in_it(precision):
    matrix = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(newton_schulz(matrix, precision="auto"), newton_schulz(matrix, precision=precision))


def test_integer_parameters_are_refused_with_compression_too():
    integer = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"real floating point, got torch\.int64"):
        SISA([integer], compression="int8")


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
