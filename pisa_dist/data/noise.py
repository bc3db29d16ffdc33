"""Feature skew: Gaussian noise whose strength grows from worker to worker."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# Last word of the Philox counter: keeps this stream apart from others keyed by the same seed and worker.
_STREAM = 0x6E6F697365


def add_feature_noise(
    inputs: Tensor, indices: Sequence[int], *, worker: int, num_workers: int, noise_level: float, seed: int
) -> Tensor:
    """Features of one worker's samples with that worker's noise.

    Worker i of m adds independent Gaussian noise of standard deviation noise_level * i / (m - 1) to each
    feature (none for one worker), as in NIID-Bench's noise-based feature skew. A sample's noise is
    numpy's Philox stream with key (seed, worker) and counter (0, index, 0, a constant): it does
    not depend on the other samples, their order or the time of access, and so is a property of the data.

    Args:
        inputs: features of the samples, float, shape [k, ...]; unchanged.
        indices: their k indices in the training set, each >= 0.
        worker: i, in 0..m-1.
        num_workers: m >= 1.
        noise_level: standard deviation at the last worker, >= 0, in units of the features.
        seed: in 0..2**64 - 1.

    Returns:
        A new tensor of the shape, dtype and device of `inputs`.

    Raises:
        ValueError: a setting is outside its range, or `inputs` and `indices` differ in length.
    """
    if not (math.isfinite(noise_level) and noise_level >= 0):
        raise ValueError(f"`split.noise_level` must be >= 0 and finite, got {noise_level}")
    if not 0 <= worker < num_workers:
        raise ValueError(f"worker must be in 0..{num_workers - 1}, got {worker}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"`seed` must be in 0..{2**64 - 1}, got {seed}")
    if not inputs.is_floating_point():
        raise ValueError(f"inputs must be floating point to take noise, got {inputs.dtype}")
    if len(inputs) != len(indices):
        raise ValueError(f"inputs and indices must have one length, got {len(inputs)} and {len(indices)}")
    if len(indices) and min(indices) < 0:
        raise ValueError(f"indices must be >= 0, got {min(indices)}")
    deviation = noise_level * worker / (num_workers - 1) if num_workers > 1 else 0.0
    if deviation == 0.0:
        return inputs.clone()
    noise = np.empty((len(indices), inputs[0].numel() if len(indices) else 0), dtype=np.float32)
    for row, index in zip(noise, indices, strict=True):
        stream = np.random.Philox(key=[seed, worker], counter=[0, int(index), 0, _STREAM])
        np.random.Generator(stream).standard_normal(dtype=np.float32, out=row)
    return inputs + deviation * torch.from_numpy(noise).view(inputs.shape).to(inputs)
