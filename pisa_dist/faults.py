"""Gradients that are NaN or infinite: found locally, known to all ranks after the one all-reduce, refused by all.

So are sums and weights that overflow although every gradient is finite; those every rank sees for itself.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pisa_dist.admm.device import on_device

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
        if not gradients:
            return None
        first = float(first_bad(gradients, range(len(gradients))))
        return Fault(worker, int(first)) if math.isfinite(first) else None


def largest(tensors: Sequence[Tensor]) -> Tensor:
    """A number for each tensor that is finite exactly where all of its own are; none of them may be empty."""
    if tensors[0].device.type != "cpu":
        return torch.stack(torch._foreach_norm(list(tensors), ord=float("inf")))
    # On the CPU the largest magnitude takes 20 times as long as the Euclidean norm, whose square may overflow; the two
    # extremes lie between.
    norms = torch.stack(torch._foreach_norm(list(tensors)))
    if bool(norms.isfinite().all()):
        return norms
    return torch.stack([torch.stack(tensor.aminmax()).abs_().amax() for tensor in tensors])


def first_bad(gradients: Sequence[Tensor], positions: Sequence[int]) -> Tensor:
    """Lowest position of a gradient with a NaN or infinity, +inf where there is none; does not wait for the device.

    Args:
        gradients: some of a worker's gradients.
        positions: number of each parameter in message order.

    Returns:
        A float64 scalar on the gradients' device.
    """
    filled = [(g, position) for g, position in zip(gradients, positions, strict=True) if g.numel()]
    device = gradients[0].device
    none = torch.full((), math.inf, dtype=torch.float64, device=device)
    if not filled:
        return none
    norms = largest([g for g, _ in filled])
    numbers = on_device([position for _, position in filled], dtype=torch.float64, device=device)
    return torch.where(norms.isfinite(), none, numbers).amin()


def fault_tensor(found: Sequence[Tensor], *, worker: int) -> Tensor:
    """`fault_scalars` of what `first_bad` found, float64 [3] on the device, without waiting for it."""
    first = torch.stack(list(found)).amin()
    is_bad = first.isfinite()
    return torch.stack([is_bad.double(), is_bad * float(worker), torch.where(is_bad, first, 0.0)])


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


def describe_overflow(total: Tensor, loss: float) -> str | None:
    """One line if what came out of the consensus is not finite, where no gradient was to blame.

    Args:
        total: everything that came out, in one flat buffer; read once, without a copy.
        loss: the training loss, which came with it.
    """
    if not math.isfinite(loss):
        return f"the training loss is {loss} although every gradient is finite"
    if not bool(largest([total])[0].isfinite()):
        return f"the sum of the workers' messages overflowed {_name(total.dtype)} although every gradient is finite"
    return None


def describe_weights(weights: Mapping[str, Tensor]) -> str | None:
    """One line if a finite sum has led to weights that are not finite, naming the first parameter."""
    fault = Fault.find(list(weights.values()), worker=0)
    if fault is None:
        return None
    name = list(weights)[fault.parameter]
    return f"{name} overflowed {_name(weights[name].dtype)} although the sum of the workers' messages is finite"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
