"""What a device is good at, and what it costs besides arithmetic: waiting for it, asking the system for memory."""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor


def on_device(numbers: Sequence[float], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of a few numbers on a device.

    A plain copy to CUDA would wait for all that the device has been given to do; from pinned memory it queues behind.
    """
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=dtype, device=device)
    return torch.tensor(numbers, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def keep_freed_memory() -> None:
    """Let glibc keep up to 64 MiB of freed memory instead of asking the kernel again for each step's tensors.

    Freeing an allocation raises its threshold for giving memory back to twice that size (mallopt(3)), 32 MiB at most;
    the page faults that this saves are a fifth of a round of 1,000 small workers, and of an optimizer's step. The
    memory itself is never touched.
    """
    memory = torch.empty(31 * 2**20, dtype=torch.uint8)
    del memory


@cache
def multiplies_bfloat16_fast(device_type: str) -> bool:
    """Whether matrix products in bfloat16 are faster than in float32 on this kind of device.

    A CPU without instructions for them (AVX-512 BF16 or AMX) takes 8 to 16 times as long as in float32.
    """
    if device_type == "cpu":
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, check, lambda: False)() for check in checks)
    return device_type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
