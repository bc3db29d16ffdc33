"""Messages in bf16 or int8: a quarter to half of the bytes, with error feedback.

Quantised numbers cannot be added on the way, so the sum is formed as a reduce-scatter does it, in two stages: every
rank sends each other rank that one's chunk (all-to-all), sums its own chunk in float32, and sends the sum to all
(all-gather). Both stages are compressed; a rank puts as many numbers on the wire as in a ring all-reduce.

What compression leaves out of a rank's message is not lost: it is the residual, added to the rank's next message (error
feedback: Seide et al. 2014, Karimireddy et al. 2019). What the second stage leaves out of the sum of a chunk goes to
the residual of the rank that summed it, so that each parameter has one residual on each rank and no more.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pisa_dist.consensus import AllReduce, MessageBuffer, Sum


class Codec(ABC):
    """How numbers become bytes and come back.

    Attributes:
        granularity: numbers that are encoded together; every length that is encoded is a multiple of it.
    """

    granularity: int = 1

    @abstractmethod
    def encode(self, values: Tensor) -> Tensor:
        """[rows, length] of floats -> [rows, bytes] of uint8."""

    @abstractmethod
    def decode(self, encoded: Tensor, dtype: torch.dtype) -> Tensor:
        """[rows, bytes] of uint8 -> [rows, length] of `dtype`."""


class BFloat16(Codec):
    """Rounded to the nearest bfloat16: 2 bytes a number."""

    def encode(self, values: Tensor) -> Tensor:  # noqa: D102 - as in the protocol
        return values.to(torch.bfloat16).view(torch.uint8)

    def decode(self, encoded: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: D102 - as in the protocol
        return encoded.view(torch.bfloat16).to(dtype)


@dataclass(frozen=True)
class Int8(Codec):
    """Rounded to 255 levels, symmetric about zero, with one float32 scale a block: 1 + 4 / block bytes a number.

    Args:
        granularity: numbers in a block.
    """

    granularity: int = 256

    def encode(self, values: Tensor) -> Tensor:  # noqa: D102 - as in the protocol
        rows, length = values.shape
        blocks = values.float().view(rows, length // self.granularity, self.granularity)
        scales = torch.linalg.vector_norm(blocks, ord=float("inf"), dim=2).div_(127.0)
        # A block of zeros, or one whose scale is lost below the smallest float, stays zero.
        inverse = scales.reciprocal().nan_to_num_(nan=0.0, posinf=0.0)
        levels = torch.mul(blocks, inverse.unsqueeze(2)).round_().clamp_(-127, 127).to(torch.int8)
        return torch.cat([levels.view(rows, length).view(torch.uint8), scales.view(torch.uint8)], dim=1)

    def decode(self, encoded: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: D102 - as in the protocol
        length = encoded.shape[1] * self.granularity // (self.granularity + 4)
        levels, scales = torch.split(encoded, [length, encoded.shape[1] - length], dim=1)
        blocks = levels.view(torch.int8).to(dtype).view(len(encoded), -1, self.granularity)
        blocks *= scales.contiguous().view(torch.float32).unsqueeze(2)
        return blocks.view(len(encoded), length)


CODECS: dict[str, Codec] = {"bf16": BFloat16(), "int8": Int8()}


class CompressedSums(AllReduce):
    """Sums of compressed messages, in place of the all-reduce. The buffers' scalars are summed as they are.

    Args:
        codec: how numbers become bytes.
        process_group: the ranks that take part; None for the default group.
    """

    def __init__(self, codec: Codec, process_group: dist.ProcessGroup | None = None) -> None:
        super().__init__(process_group)
        self.codec = codec

    def start_sum(self, buffer: MessageBuffer) -> Sum:
        """Begin the first stage; `Sum.residual` is to be added to the next message."""
        return _CompressedSum(self, buffer)


class _CompressedSum(Sum):
    def __init__(self, consensus: CompressedSums, buffer: MessageBuffer) -> None:
        self._consensus, self._codec = consensus, consensus.codec
        num_ranks, group = consensus.num_ranks, consensus.process_group
        body, scalars = buffer.flat[: buffer.num_values], buffer.scalars
        length = -(-buffer.num_values // (num_ranks * self._codec.granularity)) * self._codec.granularity
        padded = body.new_zeros(num_ranks * length)
        padded[: buffer.num_values] = body
        chunks = padded.view(num_ranks, length)
        encoded = self._codec.encode(chunks)
        self._residual = chunks.sub_(self._codec.decode(encoded, body.dtype))
        super().__init__(buffer, num_bytes=encoded.numel() + scalars.numel() * scalars.element_size())
        self.residual = padded[: buffer.num_values]
        self._received = torch.empty_like(encoded)
        with consensus.explained("all-to-all", encoded):
            self._stage = dist.all_to_all_single(self._received, encoded, group=group, async_op=True)
            self._scalars = dist.all_reduce(scalars, group=group, async_op=True) if scalars.numel() else None
        self._encoded = encoded  # in use until the stage is over
        self._is_advanced = False

    def advance(self) -> None:
        if self._is_advanced:
            return
        self._is_advanced = True
        consensus, dtype = self._consensus, self.buffer.flat.dtype
        with consensus.explained("all-to-all", self._encoded):
            self._stage.wait()
        chunk = self._codec.decode(self._received, dtype).sum(0, keepdim=True)
        self._encoded = self._codec.encode(chunk)
        self._residual[consensus.rank] += chunk.sub_(self._codec.decode(self._encoded, dtype))[0]
        self._received = self._encoded.new_empty((consensus.num_ranks, self._encoded.shape[1]))
        with consensus.explained("all-gather", self._encoded):
            received = list(self._received.unbind())
            self._stage = dist.all_gather(received, self._encoded[0], group=consensus.process_group, async_op=True)

    def wait(self) -> None:
        self.advance()
        with self._consensus.explained("all-gather", self._encoded):
            self._stage.wait()
            if self._scalars is not None:
                self._scalars.wait()
        decoded = self._codec.decode(self._received, self.buffer.flat.dtype)
        self.buffer.flat[: self.buffer.num_values] = decoded.view(-1)[: self.buffer.num_values]
