"""What ranks exchange in a round, in one collective: the sum of all messages, or every worker's for a robust rule."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from pisa_dist.algorithms.base import LocalResult, Round, Tensors, weighted_sum
from pisa_dist.consensus import Consensus, MessageBuffer, widest
from pisa_dist.data.sampling import hosted_workers
from pisa_dist.faults import Fault, describe_faults, describe_overflow, fault_scalars
from pisa_dist.gradients import RoundGradients
from pisa_dist.robust import robust_rule
from pisa_dist.state import Wishes


class Work(NamedTuple):
    """The local work of some present workers of this rank, done in one call of the method."""

    rows: Sequence[int]
    round_: Round
    gradients: RoundGradients
    result: LocalResult


@dataclass(frozen=True)
class LocalRound:
    """All that this rank brings to the exchange of a round.

    Attributes:
        works: the present workers of this rank, cut as `Exchange.parts` says.
        hosted: worker of each row.
        present: the present workers of all ranks, in increasing order.
        present_weight: sum of their alpha_i.
        absent: rows of hosted workers that are absent.
        has_taken_part: whether the worker of a row ever took part before.
        standing_message: the method's, for some rows.
        worker_weight: alpha_i of all workers, float64 on the CPU.
        buffers: the consensus buffers.
        wishes: of this rank.
    """

    works: Sequence[Work]
    hosted: range
    present: Sequence[int]
    present_weight: float
    absent: Sequence[int]
    has_taken_part: Sequence[bool]
    standing_message: Callable[[Sequence[int]], Tensors]
    worker_weight: Tensor
    buffers: Tensors
    wishes: Wishes

    @property
    def message_names(self) -> list[str]:
        """Keys of the method's message."""
        return list(self.works[0].result.message)

    @property
    def fault(self) -> Fault | None:
        """The first non-finite gradient on this rank."""
        return next((work.gradients.fault for work in self.works if work.gradients.fault is not None), None)

    def scalars(self) -> list[float]:
        """Faults, weighted training loss and wishes; every rank wants their sums over the ranks."""
        loss = 0.0
        for work in self.works:
            loss += float(work.gradients.loss_sums @ work.round_.worker_weight) / work.round_.num_local_steps
        return [*fault_scalars(self.fault), loss, *map(float, self.wishes)]

    def contribution(self, work: Work, *, counting_worker: int | None = None) -> list[Tensor]:
        """What some workers add to the sums over all: message, changes of the buffers, squared primal residual.

        Args:
            work: of these workers.
            counting_worker: the one whose integer buffers count; None for the weighted average, as for floats.
        """
        shares = work.round_.worker_weight / self.present_weight
        integer_shares = shares
        if counting_worker is not None:
            is_counting = [float(worker == counting_worker) for worker in work.round_.workers]
            integer_shares = torch.tensor(is_counting, dtype=shares.dtype, device=shares.device)
        tensors = list(work.result.message.values())
        for name, old in exchanged_buffers(self.buffers).items():
            change = _difference(work.gradients.buffers[name], old)
            if old.is_floating_point():
                tensors.append(weighted_sum(change, shares))
            else:
                tensors.append(weighted_sum(change.float(), integer_shares))
        primal = work.result.primal_residual
        tensors.append(torch.zeros_like(tensors[0].sum()) if primal is None else primal.to(widest(tensors)))
        return tensors

    def sums(self, *, counting_worker: int) -> list[Tensor]:
        """`contribution` of all present workers of this rank."""
        first, *others = self.works
        tensors = self.contribution(first, counting_worker=counting_worker)
        for work in others:
            added = self.contribution(work, counting_worker=counting_worker)
            tensors = [total + tensor for total, tensor in zip(tensors, added, strict=True)]
        return tensors


class Exchanged(NamedTuple):
    """What every rank knows after the collective, the same on each.

    Attributes:
        message: what the method's `consensus` takes.
        buffers: change of each buffer that is exchanged.
        loss: training loss, averaged over the present workers.
        primal_square: sum_i alpha_i ||w_i - w||^2, None where it has no meaning.
        wishes: what any rank wishes.
        num_bytes: of all workers' messages.
        problem: why the round must be refused, None if it need not.
    """

    message: Tensors
    buffers: Tensors
    loss: float
    primal_square: float | None
    wishes: Wishes
    num_bytes: int
    problem: str | None


class Exchange(ABC):
    """How the workers' messages become what the method's `consensus` takes; one collective a round."""

    @abstractmethod
    def parts(self, rows: Sequence[int], block: int) -> list[Sequence[int]]:
        """The present rows of this rank, cut into those that the method works on in one call; never no part.

        Args:
            rows: in stacking order.
            block: how many may be worked on at once.
        """

    @abstractmethod
    def __call__(self, local: LocalRound) -> Exchanged:
        """The exchange; every rank calls it."""


@dataclass(frozen=True)
class SumExchange(Exchange):
    """The method itself: one all-reduce of one parameter-sized buffer, in which all that a rank hosts is summed."""

    consensus: Consensus

    def parts(self, rows: Sequence[int], block: int) -> list[Sequence[int]]:
        """As few and as equal parts as possible."""
        count = max(1, -(-len(rows) // block))
        cuts = [len(rows) * part // count for part in range(count + 1)]
        return [rows[start:end] for start, end in pairwise(cuts)]

    def __call__(self, local: LocalRound) -> Exchanged:
        """The sum over all workers; each participant sends one buffer."""
        tensors = local.sums(counting_worker=local.present[0])
        if local.absent:
            names = local.message_names
            for name, value in local.standing_message(local.absent).items():
                position = names.index(name)
                tensors[position] = tensors[position] + value
        total = self.consensus.sum_message(tensors, local.scalars())
        return _outcome(local, total, total.scalars.tolist(), num_bytes=total.num_bytes * len(local.present))


@dataclass(frozen=True)
class RobustExchange(Exchange):
    """One all-gather of every worker's own message, then a rule that survives some of them being garbage.

    With x_i what worker i adds to a sum, divided by its weight alpha_i, the method's `consensus` gets
        (sum_i alpha_i) rule(x_1, x_2, ...)
    coordinate by coordinate in place of sum_i alpha_i x_i: the same if all workers agree. In the rule workers count
    alike, whatever their alpha_i. Where the method keeps a standing message (the dual) for absent workers, those that
    have taken part before are asked too. Buffers and the primal residual go the same way.

    A worker's row takes as many bytes as a rank's whole message otherwise, and every rank receives and holds the rows
    of all workers: traffic and memory grow with their number.

    Args:
        consensus: how ranks communicate.
        rule: [workers, coordinates] -> [coordinates].
        num_workers: of the run.
    """

    consensus: Consensus
    rule: Callable[[Tensor], Tensor]
    num_workers: int

    def parts(self, rows: Sequence[int], block: int) -> list[Sequence[int]]:
        """One row a call; where nobody is present, one call for nobody, which tells the shapes."""
        return [[row] for row in rows] or [[]]

    def __call__(self, local: LocalRound) -> Exchanged:
        """Every worker's row on every rank, in one all-gather, and the rule."""
        standing_names = local.standing_message([]).keys()
        senders = range(self.num_workers) if standing_names else local.present
        template, scalars = local.contribution(local.works[0]), local.scalars()
        sizes = [t.numel() for t in template]
        # Ranks gather buffers of one size: those that host fewer senders pad.
        counts = [sum(worker in block for worker in senders) for block in self._blocks()]
        own = template[0].new_zeros((max(counts), sum(sizes) + 1 + len(scalars)), dtype=widest(template))
        self._fill(own, sizes, local, keeps_absent=bool(standing_names))
        own[0, -len(scalars) :] = torch.tensor(scalars, dtype=own.dtype)
        gathered = self.consensus.gather(own)
        table = torch.cat([rows[:count] for rows, count in zip(gathered, counts, strict=True)])
        *columns, has_message, _ = torch.split(table, [*sizes, 1, len(scalars)], dim=1)
        is_heard = has_message.squeeze(1) > 0
        is_present = torch.isin(torch.tensor(senders), torch.tensor(local.present))
        heard_weight = float(local.worker_weight[list(senders)][is_heard.cpu()].sum())
        total = MessageBuffer([t.shape for t in template], 0, dtype=own.dtype, device=own.device)
        names = dict(enumerate(local.message_names))
        for position, (tensor, rows) in enumerate(zip(total.tensors, columns, strict=True)):
            everyone = names.get(position) in standing_names
            weight, chosen = (heard_weight, is_heard) if everyone else (local.present_weight, is_present)
            tensor.copy_((weight * self.rule(rows[chosen.to(rows.device)])).view(tensor.shape))
        sums = gathered[:, 0, -len(scalars) :].sum(0).tolist()
        row_bytes = own.shape[1] * own.element_size()
        return _outcome(local, total, sums, num_bytes=row_bytes * int(is_heard.sum()))

    def _blocks(self) -> list[range]:
        num_ranks = self.consensus.num_ranks
        return [hosted_workers(self.num_workers, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]

    def _fill(self, own: Tensor, sizes: Sequence[int], local: LocalRound, *, keeps_absent: bool) -> None:
        """Write this rank's rows in worker order: x_i, then 1 where the worker has anything to say."""
        works = {work.rows[0]: work for work in local.works if work.rows}
        rows = sorted([*works, *local.absent]) if keeps_absent else sorted(works)
        for slot, row in enumerate(rows):
            alpha = float(local.worker_weight[local.hosted[row]])
            *pieces, flag = torch.split(own[slot], [*sizes, own.shape[1] - sum(sizes)])
            if row in works:
                tensors = dict(enumerate(local.contribution(works[row])))
            elif local.has_taken_part[row]:
                tensors = {local.message_names.index(n): v for n, v in local.standing_message([row]).items()}
            else:
                continue
            for position, tensor in tensors.items():
                torch.div(tensor.flatten(), alpha, out=pieces[position])
            flag[0] = 1.0


def make_exchange(kind: str, trim: float, *, consensus: Consensus, num_workers: int) -> Exchange:
    """The exchange that `consensus` and `consensus_trim` stand for, as `robust.check_consensus` accepts them."""
    if kind == "sum":
        return SumExchange(consensus)
    return RobustExchange(consensus, robust_rule(kind, trim), num_workers)


def exchanged_buffers(buffers: Tensors) -> Tensors:
    """Buffers that training changes: all but booleans."""
    return {name: buffer for name, buffer in buffers.items() if buffer.dtype != torch.bool}


def _difference(new: Tensor, old: Tensor) -> Tensor:
    """new - old; zero where they are equal, infinities included (-inf - -inf would be NaN: a causal mask is one)."""
    return (new - old).masked_fill_(new == old, 0)


def _outcome(local: LocalRound, total: MessageBuffer, scalars: Sequence[float], *, num_bytes: int) -> Exchanged:
    """Take apart `total`, which holds what `LocalRound.contribution` lists, and the summed scalars."""
    *faults, loss, num_stopping, num_saving = scalars
    tensors = iter(total.tensors)
    return Exchanged(
        message={name: next(tensors) for name in local.message_names},
        buffers={name: next(tensors) for name in exchanged_buffers(local.buffers)},
        loss=loss / local.present_weight,
        primal_square=None if local.works[0].result.primal_residual is None else float(next(tensors)),
        wishes=Wishes(num_stopping > 0, num_saving > 0),
        num_bytes=num_bytes,
        problem=describe_faults(faults, local.fault, list(local.works[0].round_.weights))
        or describe_overflow(total.flat, loss),
    )
