"""Numbers from the host to a device without waiting for it."""

from collections.abc import Sequence

import torch
from torch import Tensor


def on_device(numbers: Sequence[float], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of a few numbers on a device.

    A plain copy to CUDA would wait for all that the device has been given to do; from pinned memory it queues behind.
    """
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=dtype, device=device)
    return torch.tensor(numbers, dtype=dtype, pin_memory=True).to(device, non_blocking=True)
