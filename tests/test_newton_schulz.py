"""Newton-Schulz iterations: the polynomials applied to singular values, in one matrix or many, in either precision."""

import pytest
import torch
from optimizers import one_thread as one_thread  # a fixture
from optimizers import train
from torch import nn

from pisa_dist import NSISA
from pisa_dist.admm.device import multiplies_bfloat16_fast
from pisa_dist.admm.preconditioners import newton_schulz
from pisa_dist.admm.preconditioners.newton_schulz import COEFFICIENTS


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
