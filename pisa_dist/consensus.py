"""How ranks exchange messages: in one process, or with one collective on one flat buffer."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from pisa_dist.admm.device import on_device


class ConsensusError(RuntimeError):
    """A collective failed: a rank has stopped, or does not answer within the process group's timeout."""


def widest(tensors: Sequence[Tensor]) -> torch.dtype:
    """The type that a message of these tensors has: the widest among theirs, float32 at least."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


class MessageBuffer:
    """One flat buffer that holds a message: a tensor per parameter and a few scalars behind them.

    Everything that ranks exchange in an iteration lies in it, so that one collective suffices.

    Args:
        shapes: shape of each tensor of the message.
        num_scalars: number of scalars behind the tensors.
        dtype: floating type of the whole buffer.
        device: where it lives.

    Attributes:
        flat: the whole buffer, not filled.
        num_values: numbers in it before the scalars.
        tensors: views of it, one per shape.
        scalars: view of the scalars.
    """

    def __init__(
        self, shapes: Sequence[torch.Size], num_scalars: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        sizes = [shape.numel() for shape in shapes]
        self.num_values = sum(sizes)
        self.flat = torch.empty(sum(sizes) + num_scalars, dtype=dtype, device=device)
        *pieces, self.scalars = torch.split(self.flat, [*sizes, num_scalars])
        self.tensors: list[Tensor] = [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]

    @property
    def num_bytes(self) -> int:
        """Bytes that one sender puts on the wire, before the collective's own factor."""
        return self.flat.numel() * self.flat.element_size()


class Sum:
    """A sum of message buffers over the ranks that is being formed; this one is there already.

    Attributes:
        buffer: this rank's message, which `wait` replaces by the sum.
        residual: what compression has left out of this rank's message, in the buffer's order without its scalars; None
            where nothing is left out. Complete after `wait`.
        num_bytes: bytes that this rank puts on the wire, before the collective's own factor.
    """

    def __init__(self, buffer: MessageBuffer, *, num_bytes: int = 0) -> None:
        self.buffer = buffer
        self.residual: Tensor | None = None
        self.num_bytes = num_bytes

    def advance(self) -> None:
        """Start the second of two stages, at the same place in the order of collectives on every rank; waits for the
        first. Does nothing where there is one stage.
        """

    def wait(self) -> None:
        """Wait until the sum is in the buffer.

        Raises:
            ConsensusError: another rank is gone, or the process group's timeout has passed.
        """


class Consensus(ABC):
    """Sums or gathers what the ranks hold. The only place from which a training iteration communicates."""

    num_ranks: int = 1
    rank: int = 0

    def start_sum(self, buffer: MessageBuffer) -> Sum:
        """Begin to sum a message over all ranks, in place; every rank must call it in the same order."""
        return Sum(buffer)

    @abstractmethod
    def sum_(self, buffer: Tensor) -> None:
        """Replace `buffer` by its sum over all ranks, in place; every rank must call it with the same shape."""

    @abstractmethod
    def gather(self, buffer: Tensor) -> Tensor:
        """What every rank holds, by rank: [*shape] -> [num_ranks, *shape]; every rank must call it with the same shape.

        A rank receives num_ranks times the bytes of its own buffer.
        """

    def sum_message(self, tensors: Sequence[Tensor], scalars: Sequence[float]) -> MessageBuffer:
        """Sum a message over all ranks, in one collective.

        Args:
            tensors: the message, in an order that is the same on every rank; copied, not changed.
            scalars: numbers that ride along, in the precision of the tensors.

        Returns:
            The buffer with the sums, in the widest type among the tensors, float32 at least.
        """
        dtype = widest(tensors)
        buffer = MessageBuffer([t.shape for t in tensors], len(scalars), dtype=dtype, device=tensors[0].device)
        torch._foreach_copy_(buffer.tensors, list(tensors))
        buffer.scalars.copy_(on_device(scalars, dtype=dtype, device=buffer.flat.device))
        self.sum_(buffer.flat)
        return buffer


class InProcess(Consensus):
    """All workers live in this process: the sum is there already."""

    def sum_(self, buffer: Tensor) -> None:
        """Nothing to add: there is one rank."""

    def gather(self, buffer: Tensor) -> Tensor:
        """The one rank's own, without a copy."""
        return buffer.unsqueeze(0)


class AllReduce(Consensus):
    """One `torch.distributed.all_reduce` over a process group.

    Args:
        process_group: the ranks that take part; None for the default group.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        self.process_group = process_group
        self.num_ranks = dist.get_world_size(process_group)
        self.rank = dist.get_rank(process_group)

    def sum_(self, buffer: Tensor) -> None:
        """Sum over the ranks of the process group.

        Raises:
            ConsensusError: naming collective and rank when another rank is gone or the group's timeout has passed.
        """
        with self.explained("all-reduce", buffer):
            dist.all_reduce(buffer, group=self.process_group)

    def start_sum(self, buffer: MessageBuffer) -> Sum:
        """Begin one all-reduce of the whole buffer."""
        return _AllReduceSum(self, buffer)

    def gather(self, buffer: Tensor) -> Tensor:
        """All-gather over the ranks of the process group.

        Raises:
            ConsensusError: as in `sum_`.
        """
        gathered = buffer.new_empty((self.num_ranks, *buffer.shape))
        with self.explained("all-gather", buffer):
            dist.all_gather(list(gathered.unbind()), buffer, group=self.process_group)
        return gathered

    @contextmanager
    def explained(self, collective: str, buffer: Tensor) -> Iterator[None]:
        """Turn the library's errors about a collective into a ConsensusError that names it and this rank."""
        try:
            yield
        except (RuntimeError, ValueError) as error:  # ValueError: the process group has been destroyed
            raise ConsensusError(
                f"the consensus {collective} of {buffer.numel()} numbers failed on rank {self.rank} of "
                f"{self.num_ranks}: another rank has stopped, does not answer, or makes another number of steps "
                f"({error})"
            ) from error


class _AllReduceSum(Sum):
    def __init__(self, consensus: AllReduce, buffer: MessageBuffer) -> None:
        super().__init__(buffer, num_bytes=buffer.num_bytes)
        self._consensus = consensus
        with consensus.explained("all-reduce", buffer.flat):
            self._work = dist.all_reduce(buffer.flat, group=consensus.process_group, async_op=True)

    def wait(self) -> None:
        with self._consensus.explained("all-reduce", self.buffer.flat):
            self._work.wait()


def make_consensus(process_group: dist.ProcessGroup | None = None) -> Consensus:
    """`AllReduce` over the process group where there is more than one rank, else `InProcess`."""
    if not (dist.is_available() and dist.is_initialized()):
        if process_group is not None:
            raise ValueError("`process_group` was given, but torch.distributed is not initialised")
        return InProcess()
    if dist.get_rank(process_group) < 0:
        raise ValueError(f"`process_group` must contain this rank, global rank {dist.get_rank()} is not in it")
    return AllReduce(process_group) if dist.get_world_size(process_group) > 1 else InProcess()
