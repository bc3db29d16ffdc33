"""The round loop: local work of the hosted workers, one exchange with the other ranks, consensus, evaluation."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pisa_dist.algorithms.base import Algorithm, ConsensusResult, Round, State, Tensors
from pisa_dist.consensus import Consensus
from pisa_dist.data.datasets import Dataset
from pisa_dist.data.sampling import hosted_workers, num_local_steps, num_present
from pisa_dist.exchange import LocalRound, Work, make_exchange
from pisa_dist.faults import describe_weights
from pisa_dist.gradients import RoundGradients, Vectorized
from pisa_dist.guards import CUT, Footprint, ResidualWatch, explain_out_of_memory
from pisa_dist.metrics import EVALUATION_BATCH, evaluate
from pisa_dist.minibatches import Section, ShardPool, Stack
from pisa_dist.robust import check_consensus
from pisa_dist.schedule import Schedule, ScheduledRound
from pisa_dist.state import RoundOutcome, TrainingPlan, TrainingState, Wishes
from pisa_dist.vectorize import Choice, choose_path


@dataclass
class Trainer:
    """Trains one model with one method on any number of workers, hosted on any number of ranks.

    The trajectory depends on workers, seed and data, not on the layout: draws are keyed by worker and round, and ranks
    only change the order of the sum. Floating buffers, such as batch norm's running statistics, become the weighted
    average of the present workers' at each consensus; integer buffers, such as its batch counter, advance as the first
    present worker's do; booleans stay.

    Args:
        model: on its device, in training mode; its parameters and buffers give the start and are written by `export`.
        algorithm: the method.
        shards: data of the hosted workers by worker number, on the model's device.
        test: test set, on the model's device.
        shard_sizes: number of samples of every worker of the run.
        worker_weight: alpha_i of every worker, summing to 1.
        plan: what to run.
        consensus: how ranks communicate.
        wishes: asked on every rank in every round; what any rank wishes holds for all, see `RoundOutcome`.

    Attributes:
        hosted: numbers of the workers of this rank; a row of their stacked state is a place in it.
        state: all that changes.
        choice: how gradients are computed.
        schedule: who takes part in which round.
    """

    model: nn.Module
    algorithm: Algorithm
    shards: Mapping[int, Dataset]
    test: Dataset
    shard_sizes: Sequence[int]
    worker_weight: Sequence[float]
    plan: TrainingPlan
    consensus: Consensus
    wishes: Callable[[], Wishes] = Wishes
    hosted: range = field(init=False)
    state: TrainingState = field(init=False)
    choice: Choice = field(init=False)
    schedule: Schedule = field(init=False)

    def __post_init__(self) -> None:
        num_workers = len(self.shard_sizes)
        self.hosted = hosted_workers(num_workers, rank=self.consensus.rank, num_ranks=self.consensus.num_ranks)
        check_consensus(
            self.plan.consensus,
            self.plan.consensus_trim,
            num_present=num_present(num_workers, self.plan.participation),
        )
        batch = self.plan.batch_size
        steps = [
            num_local_steps(size, batch, self.plan.local_steps, self.plan.local_epochs) for size in self.shard_sizes
        ]
        self.algorithm.check_run(num_workers=num_workers, local_steps=max(steps))
        one_pass = [min(most, -(-size // batch)) for size, most in zip(self.shard_sizes, steps, strict=True)]
        self.schedule = Schedule(self.plan, steps, one_pass)
        self._alpha = torch.tensor(self.worker_weight, dtype=torch.float64)
        if self.plan.on_divergence == "cut" and "lr" not in vars(self.algorithm):
            raise ValueError(f"`on_divergence` cut needs a method with an lr, algorithm={self.algorithm.name} has none")
        self._exchange = make_exchange(
            self.plan.consensus, self.plan.consensus_trim, consensus=self.consensus, num_workers=num_workers
        )
        with explain_out_of_memory(lambda: self._footprint("at the start")):
            self.state = self._first_state()
            self._pool = ShardPool([self.shards[worker] for worker in self.hosted])
        self._device = next(iter(self.state.weights.values())).device
        self.shards = dict(zip(self.hosted, self._pool.shards, strict=True))
        self.choice = choose_path(
            self.model,
            self.state.weights,
            self.state.buffers,
            self._pool,
            vectorize=self.plan.vectorize,
            batch_size=self.plan.batch_size,
        )

    def _first_state(self) -> TrainingState:
        weights = {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}
        return TrainingState(
            weights=weights,
            buffers={n: b.detach().clone() for n, b in self.model.named_buffers()},
            shared=self.algorithm.init_shared_state(weights),
            workers=self.algorithm.init_worker_state(weights, len(self.hosted)),
            num_participations=torch.zeros(len(self.hosted), dtype=torch.int64),
            num_steps=torch.zeros(len(self.hosted), dtype=torch.int64),
            has_taken_part=torch.zeros(len(self.shard_sizes), dtype=torch.bool),
        )

    def run(self) -> Iterator[tuple[int, RoundOutcome, dict[str, float | int | None] | None]]:
        """Run the rounds that are left; yields (round, outcome, metrics), metrics None between evaluations.

        Ends early, after a round whose outcome says so, if any rank was asked to stop.

        Raises:
            FloatingPointError: a gradient was NaN or infinite, or a sum overflowed, and the plan's `on_nonfinite` is
                "raise"; the state is that of the round before.
            OutOfMemory: on this rank alone.
        """
        while self.state.round_number < self.plan.rounds:
            with torch.random.fork_rng(devices=[self._device] if self._device.type == "cuda" else []):
                started = time.perf_counter()
                outcome = self.run_round()
                is_due = self.state.round_number % self.plan.eval_every == 0
                metrics = self.evaluate(outcome) if is_due or self.state.round_number == self.plan.rounds else None
                if is_due:  # and not after the extra line of the last round, so that a longer run can go on from here
                    self.state.loss_sum, self.state.loss_rounds = 0.0, 0
                self.state.seconds += time.perf_counter() - started
            if metrics is not None:
                metrics["seconds"] = self.state.seconds
            yield self.state.round_number, outcome, metrics
            if outcome.wishes.stop:
                return

    def run_round(self) -> RoundOutcome:
        """One round: local work, one collective, consensus; none of it where nobody takes part."""
        scheduled = self._scheduled(self.state.round_number + 1)
        number, present = scheduled.number, scheduled.present
        if not present:
            self._count(scheduled, 0)
            return RoundOutcome()
        footprint = partial(self._footprint, f"in round {number}", batch_size=self.plan.batch_size)
        with torch.no_grad(), explain_out_of_memory(footprint):
            present_weight = float(self._alpha[list(present)].sum())
            works = self._works(scheduled, present_weight)
            local = LocalRound(
                works=works,
                hosted=self.hosted,
                present=present,
                present_weight=present_weight,
                absent=[row for row, worker in enumerate(self.hosted) if worker not in scheduled.fetched],
                has_taken_part=self.state.num_participations.bool().tolist(),
                standing_message=lambda rows: self.method.standing_message(
                    self._rows(rows), self._alpha_of(rows), works[0].round_
                ),
                worker_weight=self._alpha,
                buffers=self.state.buffers,
                wishes=self.wishes(),
            )
            total = self._exchange(local)
            problem, result = total.problem, None
            if problem is None:
                # What a method makes of the sum depends on no worker: any part's round will do, with today's weights.
                round_ = replace(local.works[0].round_, weights=self.state.weights)
                result = self.method.consensus(round_, total.message, self.state.shared)
                problem = describe_weights(result.weights)
            outcome = RoundOutcome(total.loss, problem=problem, wishes=total.wishes)
            if problem is not None and self.plan.on_nonfinite == "raise":
                raise FloatingPointError(f"{problem} in round {number}: the weights of round {number - 1} are kept")
            self._count(scheduled, total.num_bytes)
            if result is None or problem is not None:
                return outcome
            residuals = self._residuals(result, total.primal_square)
            self._commit(local, result, total.buffers)
        self.state.loss_sum += total.loss
        self.state.loss_rounds += 1
        warning = self._warning(total.loss, *residuals)
        return replace(
            outcome, penalty=result.penalty, primal_residual=residuals[0], dual_residual=residuals[1], warning=warning
        )

    @property
    def method(self) -> Algorithm:
        """The method as it is now: `algorithm`, with the step that is left of it after cuts."""
        factor = self.state.lr_factor
        if factor == 1.0:
            return self.algorithm
        changed: dict[str, Any] = {"lr": factor * vars(self.algorithm)["lr"]}
        return replace(self.algorithm, **changed)

    @property
    def vectorize_refusal(self) -> str | None:
        """Why gradients that were to be computed at once were not, in some round that this process ran; else None."""
        path = self.choice.path
        return path.refusals[0] if isinstance(path, Vectorized) and path.refusals else None

    def _warning(self, loss: float, primal: float | None, dual: float | None) -> str | None:
        """What the log is to say if training diverges; cuts the step where the plan wants it."""
        if self.plan.on_divergence == "ignore":
            return None
        watch = ResidualWatch(math.log(self.test.num_classes), vars(self.method))
        if self.state.watch:
            watch.recall(self.state.watch)
        problem = watch.feed(loss=loss, primal_residual=primal, dual_residual=dual)
        advice = watch.advice()
        if problem is not None and self.plan.on_divergence == "cut":
            self.state.lr_factor *= CUT
            watch.forget()
            advice = f"algorithm.lr is cut to {vars(self.method)['lr']:g}"
        self.state.watch = watch.numbers()
        return None if problem is None else f"{problem}: {advice}"

    def evaluate(self, outcome: RoundOutcome) -> dict[str, float | int | None]:
        """The metrics line of the round that `outcome` belongs to; `train_loss` is the mean since the last line."""
        state = self.state
        moment = f"in the evaluation after round {state.round_number}, {EVALUATION_BATCH:,} samples at a time"
        with explain_out_of_memory(lambda: self._footprint(moment)):
            test = evaluate(self.model, {**state.weights, **state.buffers}, self.test, consensus=self.consensus)
        train_loss = state.loss_sum / state.loss_rounds if state.loss_rounds else None
        line: dict[str, float | int | None] = {
            "round": state.round_number,
            "train_loss": train_loss,
            "test_loss": test.loss,
            "test_accuracy": test.accuracy,
            "samples_seen": state.samples_seen,
            "bytes_sent": state.bytes_sent,
            "seconds": state.seconds,
            "penalty": outcome.penalty,
            "primal_residual": outcome.primal_residual,
            "dual_residual": outcome.dual_residual,
        }
        if self.plan.clock.is_running:
            line["virtual_seconds"] = self._scheduled(state.round_number).virtual_seconds
        return line

    def export(self) -> nn.Module:
        """The model with the consensus weights and buffers in place."""
        live = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        with torch.no_grad():
            for name, value in {**self.state.weights, **self.state.buffers}.items():
                live[name].copy_(value)
        return self.model

    def _scheduled(self, number: int) -> ScheduledRound:
        """What the schedule says of a round, up to the next."""
        return self.schedule.at(number, self.algorithm.one_pass_rounds(self.state.shared))

    def _stack(self, rows: Sequence[int], num_steps: int, number: int) -> Stack:
        """Present hosted workers that take so many steps, and what they draw."""
        shards = [self.shards[worker] for worker in self.hosted]
        if not self._pool.holds(shards):  # a user has exchanged one for another
            self._pool = ShardPool(shards)
            self.shards = dict(zip(self.hosted, self._pool.shards, strict=True))
        return Stack(
            self._pool,
            rows,
            workers=self.hosted,
            batch_size=self.plan.batch_size,
            local_steps=num_steps,
            seed=self.plan.seed,
            round_number=number,
            device=self._device,
        )

    def _works(self, scheduled: ScheduledRound, present_weight: float) -> list[Work]:
        """Local work of the present hosted workers, in as many calls of the method as the exchange wants.

        The workers of a call take equally many steps from the same weights: a method needs to know of one of each only.
        """
        groups: dict[tuple[int, int], list[int]] = {}
        for row, worker in enumerate(self.hosted):
            if worker in scheduled.fetched:
                groups.setdefault((scheduled.num_steps[worker], scheduled.fetched[worker]), []).append(row)
        round_of = partial(
            Round,
            number=scheduled.number,
            num_rounds=self.plan.rounds,
            all_worker_weights=self._alpha,
            present_weight=present_weight,
            shared=self.state.shared,
            has_newcomers=not bool(self.state.has_taken_part[list(scheduled.present)].all()),
            is_summed=self.plan.consensus == "sum",
        )
        works = []
        for (num_steps, fetched), group in sorted(groups.items()) or [((1, scheduled.number - 1), [])]:
            # A resumed run whose clock has been set anew may want weights that were not kept.
            weights = self.state.fetched.get(fetched, self.state.weights)
            stack, start = self._stack(group, num_steps, scheduled.number), 0
            for part in self._exchange.parts(stack.rows, self.choice.block):
                sections = stack.sections(start, start + len(part))
                works.append(self._work(part, sections, num_steps, weights, round_of))
                start += len(part)
        return works

    def _work(
        self,
        rows: Sequence[int],
        sections: Sequence[Section],
        num_steps: int,
        weights: Tensors,
        round_of: partial[Round],
    ) -> Work:
        """Local work of some present hosted workers, in one call of the method; `round_of` has what calls share."""
        workers = [self.hosted[row] for row in rows]
        gradients = RoundGradients(
            self.choice.path,
            self._pool,
            workers=workers,
            sections=sections,
            weights=weights,
            buffers=self.state.buffers,
        )
        round_ = round_of(
            num_local_steps=num_steps,
            weights=weights,
            workers=workers,
            worker_weight=self._alpha_of(rows),
            num_participations=(self.state.num_participations[rows] + 1).to(self._device),
            num_steps_before=self.state.num_steps[rows].to(self._device),
            gradients=gradients,
        )
        return Work(rows, round_, gradients, self.method.local_work(round_, self._rows(rows)))

    def _alpha_of(self, rows: Sequence[int]) -> Tensor:
        return self._alpha[[self.hosted[row] for row in rows]].to(self._device)

    def _rows(self, rows: Sequence[int]) -> State:
        """State of some hosted workers; without a copy where they stand next to each other."""
        chosen = _as_slice(rows)
        return {name: {kind: v[chosen] for kind, v in kinds.items()} for name, kinds in self.state.workers.items()}

    def _footprint(self, moment: str, batch_size: int | None = None) -> Footprint:
        # On the device "meta" tensors have sizes and no memory: what is asked for may be what could not be had.
        parameters = {n: p.detach().to("meta") for n, p in self.model.named_parameters() if p.requires_grad}
        workers = self.algorithm.init_worker_state(parameters, len(self.hosted))
        return Footprint(
            moment=moment,
            rank=self.consensus.rank,
            num_ranks=self.consensus.num_ranks,
            num_hosted=len(self.hosted),
            num_parameters=sum(p.numel() for p in parameters.values()),
            bytes_per_parameter=max(p.element_size() for p in parameters.values()),
            state_bytes=sum(v.nbytes for kinds in workers.values() for v in kinds.values()),
            batch_size=batch_size,
            gathered_workers=len(self.shard_sizes) if self.plan.consensus != "sum" else 0,
        )

    def _count(self, scheduled: ScheduledRound, num_bytes: int) -> None:
        """Counts a round, refused or not, and keeps the weights of before it for hosted workers still at work."""
        state, batch = self.state, self.plan.batch_size
        known = {**state.fetched, state.round_number: state.weights}
        state.fetched = {number: known[number] for number in scheduled.held(self.hosted) if number in known}
        state.round_number += 1
        state.samples_seen += sum(n * min(batch, self.shard_sizes[i]) for i, n in scheduled.num_steps.items())
        state.bytes_sent += num_bytes

    def _residuals(self, result: ConsensusResult, primal_square: float | None) -> tuple[float | None, float | None]:
        """sqrt(sum_i alpha_i ||w_i - w||^2) and sigma ||w_next - w|| (Boyd et al. 2011, section 3.3)."""
        primal = None if primal_square is None else primal_square**0.5
        if result.penalty is None:
            return primal, None
        moves = [(new - old).double().square().sum() for new, old in self._pairs(result.weights)]
        return primal, result.penalty * float(torch.stack(moves).sum().sqrt())

    def _pairs(self, new: Tensors) -> Iterator[tuple[Tensor, Tensor]]:
        return ((new[name], old) for name, old in self.state.weights.items())

    def _commit(self, local: LocalRound, result: ConsensusResult, buffers: Tensors) -> None:
        state = self.state
        state.has_taken_part[list(local.present)] = True
        state.weights, state.shared = result.weights, result.shared
        for name, change in buffers.items():
            old = state.buffers[name]
            state.buffers[name] = old + (change if old.is_floating_point() else change.round()).to(old.dtype)
        for work in local.works:
            if list(work.rows) == list(range(len(self.hosted))):
                state.workers = work.result.state
            else:
                chosen = _as_slice(work.rows)
                for name, kinds in work.result.state.items():
                    for kind, value in kinds.items():
                        state.workers[name][kind][chosen] = value
            state.num_participations[work.rows] += 1
            state.num_steps[work.rows] += work.round_.num_local_steps


def _as_slice(rows: Sequence[int]) -> slice | list[int]:
    """The rows as a slice, which takes no copy, where they follow each other."""
    first = rows[0] if rows else 0
    return slice(first, first + len(rows)) if list(rows) == list(range(first, first + len(rows))) else list(rows)
