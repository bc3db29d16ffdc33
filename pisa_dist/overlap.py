"""One iteration's messages on their way, in buckets whose order is the same on every rank.

A bucket is sent as soon as its last gradient is there, as in DistributedDataParallel, but never before the buckets that
precede it. Parameters that got no gradient (unused ones) are sent at the end, so that ranks whose graphs differ still
make the same collectives.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from pisa_dist.admm.fused import StepSettings
from pisa_dist.consensus import MessageBuffer, Sum
from pisa_dist.local import Outcome


class Used(NamedTuple):
    """A gradient as it was when its message was made."""

    parameter: Tensor
    gradient: Tensor | None
    version: int

    @classmethod
    def now(cls, parameter: Tensor) -> "Used":
        """The parameter's gradient as it is."""
        gradient = parameter.grad
        return cls(parameter, gradient, -1 if gradient is None else gradient._version)

    def is_unchanged(self) -> bool:
        """Whether the parameter still has this gradient, and nothing was written into it."""
        gradient = self.parameter.grad
        return gradient is self.gradient and (gradient is None or gradient._version == self.version)


class Sent(NamedTuple):
    """One bucket on its way: outcome of each of its steps, the sum that is being formed, and what must still hold."""

    outcomes: list[Outcome | StepSettings]
    total: Sum
    used: list[Used]

    @property
    def buffer(self) -> MessageBuffer:
        """The message; the sum over the ranks once `total` has been waited for."""
        return self.total.buffer


def make_buckets(sizes: Sequence[int], *, bucket_bytes: float | None) -> list[list[int]]:
    """Positions of each bucket's parameters, the last parameter first: backward passes go from the end to the start.

    Args:
        sizes: bytes of each parameter's message, in message order.
        bucket_bytes: a bucket is closed once it holds so many; None for one bucket, in message order.
    """
    if bucket_bytes is None:
        return [list(range(len(sizes)))]
    buckets: list[list[int]] = [[]]
    filled = 0
    for position in reversed(range(len(sizes))):
        if filled >= bucket_bytes:
            buckets.append([])
            filled = 0
        buckets[-1].append(position)
        filled += sizes[position]
    return buckets


class Flight:
    """Sends buckets in their order while gradients arrive, and waits for all of them.

    Args:
        buckets: positions in each bucket.
        send: the local step of a bucket and its collective, by the bucket's number.
    """

    def __init__(self, buckets: Sequence[Sequence[int]], send: Callable[[int], Sent]) -> None:
        self.buckets = buckets
        self.sent: list[Sent] = []
        self._send = send
        self._missing = [len(bucket) for bucket in buckets]
        self._bucket_of = {position: number for number, bucket in enumerate(buckets) for position in bucket}
        self._arrived: set[int] = set()

    def arrive(self, position: int) -> None:
        """Note that a parameter's gradient is complete, and send what can be sent.

        Raises:
            RuntimeError: it has been complete before: a second backward pass came before the step.
        """
        if position in self._arrived:
            raise RuntimeError(
                "a gradient was accumulated after overlap=True had sent it: put all backward passes of a step but the "
                "last into `with optimizer.accumulate():`, and call step() after the last"
            )
        self._arrived.add(position)
        self._missing[self._bucket_of[position]] -= 1
        while len(self.sent) < len(self.buckets) and not self._missing[len(self.sent)]:
            self._send_next()

    def land(self) -> list[Sent]:
        """Send what has not been sent, wait for all sums, and return them in order.

        Raises:
            RuntimeError: a gradient has been changed after it was sent.
            ConsensusError: another rank is gone.
        """
        while len(self.sent) < len(self.buckets):
            self._send_next()
        for sent in self.sent:
            sent.total.advance()
        for sent in self.sent:
            sent.total.wait()
        if not all(used.is_unchanged() for sent in self.sent for used in sent.used):
            raise RuntimeError(
                "a gradient was changed between backward() and step(), after overlap=True had sent it: clip or scale "
                "gradients with overlap=False"
            )
        return self.sent

    def _send_next(self) -> None:
        # A sum of two stages starts its second when the next bucket but one goes: late enough not to wait, and at the
        # same place in the order of collectives on every rank.
        if len(self.sent) >= 2:
            self.sent[-2].total.advance()
        self.sent.append(self._send(len(self.sent)))
