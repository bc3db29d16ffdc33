"""The optimizers that several tests try, small parameters for them, and comparison bit by bit."""

import copy
import io

import pytest
import torch
from reference import Reference
from torch import nn

from pisa_dist import NSISA, PISA, SISA
from pisa_dist.admm.preconditioners import Identity

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
def one_thread():
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


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
