"""How ranks exchange messages: in one process, or with one collective on one flat buffer."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class ConsensusError(RuntimeError):
    """A collective failed: a rank has stopped, or does not answer within the process group's timeout."""


class MessageBuffer:
    """One flat buffer that holds a message: a tensor per parameter and a few scalars behind them.

    Everything that ranks exchange in an iteration lies in it, so that one collective suffices.

    Args:
        shapes: shape of each tensor of the message.
        num_scalars: number of scalars behind the tensors.
        dtype: floating type of the whole buffer.
        device: where it lives.
    """

    def __init__(
        self, shapes: Sequence[torch.Size], num_scalars: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        sizes = [shape.numel() for shape in shapes]
        self.flat = torch.zeros(sum(sizes) + num_scalars, dtype=dtype, device=device)
        *pieces, self.scalars = torch.split(self.flat, [*sizes, num_scalars])
        self.tensors: list[Tensor] = [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]

    @property
    def num_bytes(self) -> int:
        """Bytes that one sender puts on the wire, before the collective's own factor."""
        return self.flat.numel() * self.flat.element_size()


class Consensus(ABC):
    """Sums or gathers what the ranks hold. The only place from which a training iteration communicates."""

    num_ranks: int = 1
    rank: int = 0

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
        dtype = torch.float32
        for tensor in tensors:
            dtype = torch.promote_types(dtype, tensor.dtype)
        buffer = MessageBuffer([t.shape for t in tensors], len(scalars), dtype=dtype, device=tensors[0].device)
        torch._foreach_copy_(buffer.tensors, list(tensors))
        buffer.scalars.copy_(torch.tensor(scalars, dtype=dtype))
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
        try:
            dist.all_reduce(buffer, group=self.process_group)
        except RuntimeError as error:
            raise self._failed("all-reduce", buffer, error) from error

    def gather(self, buffer: Tensor) -> Tensor:
        """All-gather over the ranks of the process group.

        Raises:
            ConsensusError: as in `sum_`.
        """
        gathered = buffer.new_empty((self.num_ranks, *buffer.shape))
        try:
            dist.all_gather(list(gathered.unbind()), buffer, group=self.process_group)
        except RuntimeError as error:
            raise self._failed("all-gather", buffer, error) from error
        return gathered

    def _failed(self, collective: str, buffer: Tensor, error: RuntimeError) -> ConsensusError:
        return ConsensusError(
            f"the consensus {collective} of {buffer.numel()} numbers failed on rank {self.rank} of "
            f"{self.num_ranks}: another rank has stopped, does not answer, or makes another number of steps ({error})"
        )


def make_consensus(process_group: dist.ProcessGroup | None = None) -> Consensus:
    """`AllReduce` over the process group where there is more than one rank, else `InProcess`."""
    if not (dist.is_available() and dist.is_initialized()):
        if process_group is not None:
            raise ValueError("`process_group` was given, but torch.distributed is not initialised")
        return InProcess()
    if dist.get_rank(process_group) < 0:
        raise ValueError(f"`process_group` must contain this rank, global rank {dist.get_rank()} is not in it")
    return AllReduce(process_group) if dist.get_world_size(process_group) > 1 else InProcess()
