"""Gradients that are NaN or infinite: found locally, known to all ranks after the one all-reduce, refused by all."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ON_NONFINITE = ("raise", "skip")
NUM_FAULT_SCALARS = 3


@dataclass(frozen=True)
class Fault:
    """The first non-finite gradient that a rank has seen in an iteration."""

    worker: int
    parameter: int

    @staticmethod
    def find(gradients: Sequence[Tensor], *, worker: int) -> "Fault | None":
        """The fault in one worker's gradients, None where all numbers are finite. Waits for the device once."""
        filled = [g for g in gradients if g.numel()]
        if not filled:
            return None
        norms = torch._foreach_norm(filled, ord=float("inf"))
        if bool(torch.stack([norm.isfinite() for norm in norms]).all()):
            return None
        parameter = next(i for i, g in enumerate(gradients) if not bool(g.isfinite().all()))
        return Fault(worker, parameter)


def fault_scalars(fault: Fault | None) -> list[float]:
    """What rides in the message: count, worker, parameter; their sums name a lone culprit on every rank."""
    return [0.0, 0.0, 0.0] if fault is None else [1.0, float(fault.worker), float(fault.parameter)]


def describe_faults(sums: Sequence[float], own: Fault | None, parameter_names: Sequence[str]) -> str | None:
    """One line about the iteration's faults, None where there were none.

    Args:
        sums: the fault scalars summed over all ranks.
        own: this rank's fault.
        parameter_names: name of each parameter in message order.
    """
    count = round(sums[0])
    if count == 0:
        return None
    known = own if own is not None else Fault(round(sums[1]), round(sums[2])) if count == 1 else None
    if known is None:
        return f"non-finite gradients on {count} ranks, each of which names its worker and parameter"
    others = f" (and on {count - 1} other ranks)" if count > 1 else ""
    return f"non-finite gradient on worker {known.worker} in {parameter_names[known.parameter]}{others}"
