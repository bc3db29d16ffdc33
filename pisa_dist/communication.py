"""How the worker behind a drop-in optimizer talks to the others."""

import importlib.util
import os
import shutil
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pisa_dist.checks import check_choice, check_ranges, plain_number
from pisa_dist.compression import CODECS, CompressedSums
from pisa_dist.consensus import Consensus, make_consensus
from pisa_dist.faults import ON_NONFINITE

COMPRESSIONS = (None, *CODECS)
# MiB in a bucket, by measurement. A compressed sum takes two stages, and with small buckets one's first stage travels
# beside another's second: on 100 Mbit/s 2 MiB in place of 25 make a step with int8 messages 1.5 times as fast.
BUCKET_MB, COMPRESSED_BUCKET_MB = 25.0, 2.0


def _can_compile() -> bool:
    """Whether Triton is here with the C compiler that it builds its launchers with."""
    has_compiler = any(shutil.which(name) for name in (os.environ.get("CC") or "cc", "gcc", "clang"))
    return has_compiler and importlib.util.find_spec("triton") is not None


_CAN_COMPILE = _can_compile()


@dataclass(frozen=True)
class Communication:
    """Settings of one optimizer on one rank; the fields are arguments of `pisa_dist.PISA`, which explains them."""

    worker_weight: float | None = None
    process_group: dist.ProcessGroup | None = None
    on_nonfinite: str = "raise"
    overlap: bool = False
    bucket_mb: float | None = None
    compression: str | None = None
    grad_scaler: torch.amp.GradScaler | None = None
    fused: bool | None = None

    def __post_init__(self) -> None:
        check_choice("on_nonfinite", self.on_nonfinite, ON_NONFINITE)
        check_choice("compression", self.compression, COMPRESSIONS)
        given = {name: plain_number(getattr(self, name)) for name in ("worker_weight", "bucket_mb")}
        check_ranges(given, optional=tuple(given))
        vars(self).update(given)  # past the refusal to set a frozen field

    @property
    def bucket_bytes(self) -> float | None:
        """How many bytes of messages a bucket holds before it goes; None for one bucket."""
        default = BUCKET_MB if self.compression is None else COMPRESSED_BUCKET_MB
        return 2**20 * (default if self.bucket_mb is None else self.bucket_mb) if self.overlap else None

    def consensus(self) -> Consensus:
        """What sums the messages."""
        consensus = make_consensus(self.process_group)
        if self.compression is None or consensus.num_ranks == 1:
            return consensus
        return CompressedSums(CODECS[self.compression], self.process_group)

    def is_compiled(self, parameter: Tensor) -> bool:
        """Whether a parameter's step goes through torch.compile."""
        return parameter.is_cuda and _CAN_COMPILE if self.fused is None else self.fused

    def grad_scale(self, device: torch.device) -> Tensor | None:
        """The scale that the GradScaler puts on losses now, without waiting for the device; None without one."""
        if self.grad_scaler is None or not self.grad_scaler.is_enabled():
            return None
        scale: Tensor = self.grad_scaler.scale(torch.ones((), device=device))
        return scale
