"""Feature noise is a property of (seed, worker, sample), with the strength that its worker has."""

import math
import time
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pisa_dist.data.noise import add_feature_noise

SETTINGS: dict[str, Any] = {"worker": 2, "num_workers": 4, "noise_level": 0.3, "seed": 5}


def noise_of(indices: list[int], shape: tuple[int, ...] = (1, 3, 5), **changes: Any) -> torch.Tensor:
    return add_feature_noise(torch.zeros(len(indices), *shape), indices, **{**SETTINGS, **changes})


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=20))
def test_noise_of_a_sample_does_not_depend_on_the_others_or_their_order(indices: list[int]) -> None:
    together = noise_of(indices)
    for row, index in enumerate(indices):
        assert torch.equal(together[row : row + 1], noise_of([index]))
    assert torch.equal(together.flip(0), noise_of(indices[::-1]))


def test_noise_is_the_documented_philox_stream() -> None:
    stream = np.random.Philox(key=[5, 2], counter=[0, 17, 0, int.from_bytes(b"noise", "big")])
    expected = 0.3 * 2 / 3 * np.random.Generator(stream).standard_normal(15, dtype=np.float32)
    np.testing.assert_allclose(noise_of([17]).flatten().numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("worker", range(4))
def test_the_standard_deviation_grows_linearly_with_the_worker(worker: int) -> None:
    noise = noise_of(list(range(400)), (100,), worker=worker)
    deviation = 0.3 * worker / 3
    # 40,000 draws: five standard errors of the deviation and of the mean.
    assert float(noise.std()) == pytest.approx(deviation, abs=5 * deviation / math.sqrt(80_000))
    assert abs(float(noise.mean())) <= 5 * deviation / math.sqrt(40_000)


def test_samples_workers_and_seeds_have_independent_noise() -> None:
    base = noise_of([1, 2], (2000,))
    others = [base[1], noise_of([1], (2000,), worker=1)[0] * 2, noise_of([1], (2000,), seed=6)[0]]
    for other in others:
        correlation = torch.corrcoef(torch.stack([base[0], other]))[0, 1]
        assert abs(float(correlation)) < 5 / math.sqrt(2000)


def test_noise_is_added_to_a_copy_that_keeps_dtype_and_shape() -> None:
    inputs = torch.arange(12, dtype=torch.float64).view(2, 2, 3)
    noisy = add_feature_noise(inputs, [3, 4], **SETTINGS)
    assert torch.equal(inputs, torch.arange(12, dtype=torch.float64).view(2, 2, 3))
    assert noisy.dtype == torch.float64
    assert noisy.shape == inputs.shape
    torch.testing.assert_close(noisy - inputs, noise_of([3, 4], (2, 3)).double())


@pytest.mark.parametrize("changes", [{"worker": 0}, {"noise_level": 0.0}, {"worker": 0, "num_workers": 1}])
def test_the_first_worker_one_worker_and_level_zero_get_a_copy_without_noise(changes: dict[str, Any]) -> None:
    inputs = torch.ones(2, 3)
    clean = add_feature_noise(inputs, [0, 1], **{**SETTINGS, **changes})
    assert torch.equal(clean, inputs)
    assert clean.data_ptr() != inputs.data_ptr()


def test_no_samples_have_no_noise() -> None:
    assert noise_of([]).shape == (0, 1, 3, 5)


def test_noise_does_not_touch_global_random_state() -> None:
    before = (np.random.get_state()[1].tobytes(), torch.get_rng_state().tolist())
    noise_of([0, 1])
    assert before == (np.random.get_state()[1].tobytes(), torch.get_rng_state().tolist())


def test_ten_thousand_images_take_less_than_two_seconds() -> None:
    start = time.process_time()
    noise_of(list(range(10_000)), (784,))
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise_level": -0.1}, r"^`split.noise_level` must be >= 0 and finite, got -0.1$"),
        ({"noise_level": math.nan}, "^`split.noise_level` must be"),
        ({"noise_level": math.inf}, "^`split.noise_level` must be"),
        ({"worker": 4}, r"^worker must be in 0\.\.3, got 4$"),
        ({"worker": -1}, r"^worker must be in 0\.\.3, got -1$"),
        ({"seed": -1}, "^`seed` must be in"),
        ({"seed": 2**64}, "^`seed` must be in"),
    ],
)
def test_a_setting_outside_its_range_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        noise_of([0], **changes)


@pytest.mark.parametrize(
    ("inputs", "indices", "message"),
    [
        (torch.zeros(2, 3), [0], "^inputs and indices must have one length, got 2 and 1$"),
        (torch.zeros(1, 3, dtype=torch.uint8), [0], "^inputs must be floating point to take noise, got torch.uint8$"),
        (torch.zeros(1, 3), [-1], "^indices must be >= 0, got -1$"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs: torch.Tensor, indices: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        add_feature_noise(inputs, indices, **SETTINGS)
