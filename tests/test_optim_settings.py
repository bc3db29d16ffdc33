"""Settings of the optimizers: what is refused in one line, and what counts as a number."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from optimizers import (
    SETTINGS,
    assert_same_bits,
    make_parameters,
    train,
)
from optimizers import one_thread as one_thread  # a fixture
from torch import nn

from pisa_dist import NSISA, SISA

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


def test_integer_parameters_are_refused_with_compression_too():
    integer = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"real floating point, got torch\.int64"):
        SISA([integer], compression="int8")
