"""The round loop: local work of the hosted workers, one sum over the ranks, consensus, evaluation."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from pisa_dist.admm.updates import state_dtype
from pisa_dist.algorithms.base import Algorithm, ConsensusResult, LocalResult, Round, State, Tensors
from pisa_dist.consensus import Consensus
from pisa_dist.data.datasets import Dataset
from pisa_dist.data.sampling import draw_batches, draw_participants, hosted_workers, num_present
from pisa_dist.faults import NUM_FAULT_SCALARS, describe_faults, fault_scalars
from pisa_dist.gradients import Participant, RoundGradients
from pisa_dist.metrics import evaluate


@dataclass
class TrainingState:
    """All that a round depends on, besides configuration and data.

    Attributes:
        weights: trainable parameters by name, the same on every rank.
        buffers: the model's buffers by name, the same on every rank.
        shared: the method's shared state, the same on every rank.
        workers: the method's state of the hosted workers, stacked in worker order.
        num_participations: rounds that each hosted worker has taken part in, int64 [hosted].
        round_number: rounds done.
        samples_seen: samples that all workers have drawn so far.
        bytes_sent: bytes of the messages that all participants have sent so far; a worker counts as a sender wherever
            it is hosted, so that the number does not depend on the layout.
        seconds: time spent in rounds and evaluations, over all sessions of the run.
        loss_sum, loss_rounds: training loss since the last evaluation.
    """

    weights: Tensors
    buffers: Tensors
    shared: State
    workers: State
    num_participations: Tensor
    round_number: int = 0
    samples_seen: int = 0
    bytes_sent: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    loss_rounds: int = 0


@dataclass(frozen=True)
class TrainingPlan:
    """What to run, in the command line's names and units."""

    rounds: int
    batch_size: int
    local_steps: int = 1
    participation: float = 1.0
    seed: int = 0
    eval_every: int = 10
    on_nonfinite: str = "raise"


@dataclass(frozen=True)
class RoundOutcome:
    """What the log wants to know of one round."""

    train_loss: float
    penalty: float | None = None
    primal_residual: float | None = None
    dual_residual: float | None = None
    problem: str | None = None
    stopped: bool = False


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
        consensus: how ranks sum.
        stop_requested: asked on every rank in every round; once it is true on any, all stop after that round.
    """

    model: nn.Module
    algorithm: Algorithm
    shards: Mapping[int, Dataset]
    test: Dataset
    shard_sizes: Sequence[int]
    worker_weight: Sequence[float]
    plan: TrainingPlan
    consensus: Consensus
    stop_requested: Callable[[], bool] = lambda: False
    hosted: range = field(init=False)
    state: TrainingState = field(init=False)

    def __post_init__(self) -> None:
        num_workers = len(self.shard_sizes)
        self.hosted = hosted_workers(num_workers, rank=self.consensus.rank, num_ranks=self.consensus.num_ranks)
        num_present(num_workers, self.plan.participation)
        self.algorithm.check_run(num_workers=num_workers, local_steps=self.plan.local_steps)
        weights = {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}
        self.state = TrainingState(
            weights=weights,
            buffers={n: b.detach().clone() for n, b in self.model.named_buffers()},
            shared=self.algorithm.init_shared_state(weights),
            workers=self.algorithm.init_worker_state(weights, len(self.hosted)),
            num_participations=torch.zeros(len(self.hosted), dtype=torch.int64),
        )
        self._alpha = torch.tensor(self.worker_weight, dtype=torch.float64)
        self._device = next(iter(weights.values())).device

    def run(self) -> Iterator[tuple[int, RoundOutcome, dict[str, float | int | None] | None]]:
        """Run the rounds that are left; yields (round, outcome, metrics), metrics None between evaluations.

        Ends early, after a round whose outcome says so, if any rank was asked to stop.

        Raises:
            FloatingPointError: a gradient was NaN or infinite and the plan's `on_nonfinite` is "raise"; the state is
                that of the round before.
        """
        while self.state.round_number < self.plan.rounds:
            with torch.random.fork_rng(devices=[self._device] if self._device.type == "cuda" else []):
                started = time.perf_counter()
                outcome = self.run_round()
                is_due = self.state.round_number % self.plan.eval_every == 0
                is_last = self.state.round_number == self.plan.rounds
                metrics = self.evaluate(outcome) if is_due or is_last else None
                if is_due:  # and not after the extra line of the last round, so that a longer run can go on from here
                    self.state.loss_sum, self.state.loss_rounds = 0.0, 0
                self.state.seconds += time.perf_counter() - started
            if metrics is not None:
                metrics["seconds"] = self.state.seconds
            yield self.state.round_number, outcome, metrics
            if outcome.stopped:
                return

    def run_round(self) -> RoundOutcome:
        """One round: local work, one sum over all ranks, consensus."""
        number = self.state.round_number + 1
        present = draw_participants(
            len(self.shard_sizes), self.plan.participation, seed=self.plan.seed, round_number=number
        )
        present_set = set(present)
        rows = [row for row, worker in enumerate(self.hosted) if worker in present_set]
        gradients = RoundGradients(self.model, self._participants(rows, number), self.state.weights, self.state.buffers)
        round_ = Round(
            number=number,
            num_local_steps=self.plan.local_steps,
            weights=self.state.weights,
            workers=[self.hosted[row] for row in rows],
            worker_weight=self._alpha_of(rows),
            all_worker_weights=self._alpha,
            present_weight=float(self._alpha[list(present)].sum()),
            num_participations=(self.state.num_participations[rows] + 1).to(self._device),
            gradients=gradients,
        )
        with torch.no_grad():
            local = self.algorithm.local_work(round_, self._rows(rows))
            message, buffer_message = self._message(local, rows), self._buffer_message(round_, gradients, present[0])
            scalars = self._scalars(local, gradients, round_)
            total = self.consensus.sum_message([*message.values(), *buffer_message.values()], scalars)
            sums = total.scalars.tolist()
            problem = describe_faults(sums[:NUM_FAULT_SCALARS], gradients.fault, list(self.state.weights))
            loss_sum, primal_square, num_stopping = sums[NUM_FAULT_SCALARS:]
            outcome = RoundOutcome(loss_sum / round_.present_weight, problem=problem, stopped=num_stopping > 0)
            if problem is not None and self.plan.on_nonfinite == "raise":
                raise FloatingPointError(f"{problem} in round {number}: the weights of round {number - 1} are kept")
            self._count(present, total.num_bytes)
            if problem is not None:
                return outcome
            split = len(message)
            result = self.algorithm.consensus(
                round_, dict(zip(message, total.tensors[:split], strict=True)), self.state.shared
            )
            residuals = self._residuals(result, primal_square if local.primal_residual is not None else None)
            self._commit(rows, local, result, dict(zip(buffer_message, total.tensors[split:], strict=True)))
        self.state.loss_sum += outcome.train_loss
        self.state.loss_rounds += 1
        return replace(outcome, penalty=result.penalty, primal_residual=residuals[0], dual_residual=residuals[1])

    def evaluate(self, outcome: RoundOutcome) -> dict[str, float | int | None]:
        """The metrics line of the round that `outcome` belongs to; `train_loss` is the mean since the last line."""
        state = self.state
        test = evaluate(self.model, {**state.weights, **state.buffers}, self.test, consensus=self.consensus)
        train_loss = state.loss_sum / state.loss_rounds if state.loss_rounds else None
        return {
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

    def export(self) -> nn.Module:
        """The model with the consensus weights and buffers in place."""
        live = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        with torch.no_grad():
            for name, value in {**self.state.weights, **self.state.buffers}.items():
                live[name].copy_(value)
        return self.model

    def _participants(self, rows: Sequence[int], number: int) -> list[Participant]:
        participants = []
        for worker in (self.hosted[row] for row in rows):
            draw = draw_batches(
                self.shard_sizes[worker],
                batch_size=self.plan.batch_size,
                local_steps=self.plan.local_steps,
                seed=self.plan.seed,
                worker=worker,
                round_number=number,
            )
            positions = draw.positions.to(self._device)
            participants.append(Participant(worker, self.shards[worker], draw._replace(positions=positions)))
        return participants

    def _alpha_of(self, rows: Sequence[int]) -> Tensor:
        return self._alpha[[self.hosted[row] for row in rows]].to(self._device)

    def _rows(self, rows: Sequence[int]) -> State:
        """State of some hosted workers; without a copy where it is all of them."""
        if len(rows) == len(self.hosted):
            return self.state.workers
        return {name: {kind: v[rows] for kind, v in kinds.items()} for name, kinds in self.state.workers.items()}

    def _message(self, local: LocalResult, rows: Sequence[int]) -> Tensors:
        message = dict(local.message)
        absent = sorted(set(range(len(self.hosted))).difference(rows))
        if absent:
            standing = self.algorithm.standing_message(self._rows(absent), self._alpha_of(absent))
            for name, value in standing.items():
                message[name] = message[name] + value
        return message

    def _buffer_message(self, round_: Round, gradients: RoundGradients, first_present: int) -> Tensors:
        """Change of each buffer: weighted over the workers for floats, the first present worker's for integers."""
        shares = (round_.worker_weight / round_.present_weight).tolist()
        message = {}
        for name, old in self.state.buffers.items():
            if old.dtype == torch.bool:
                continue
            is_average = old.is_floating_point()
            change = torch.zeros_like(old, dtype=state_dtype(old.dtype) if is_average else torch.float32)
            for worker, share, buffers in zip(gradients.workers, shares, gradients.buffers, strict=True):
                factor = share if is_average else float(worker == first_present)
                change += factor * (buffers[name] - old).to(change.dtype)
            message[name] = change
        return message

    def _scalars(self, local: LocalResult, gradients: RoundGradients, round_: Round) -> list[float]:
        mean_losses = gradients.loss_sums / self.plan.local_steps
        loss = float(mean_losses @ round_.worker_weight.cpu())
        primal = 0.0 if local.primal_residual is None else float(local.primal_residual)
        return [*fault_scalars(gradients.fault), loss, primal, float(self.stop_requested())]

    def _count(self, present: Sequence[int], num_bytes: int) -> None:
        batch = self.plan.batch_size
        self.state.round_number += 1
        self.state.samples_seen += self.plan.local_steps * sum(min(batch, self.shard_sizes[i]) for i in present)
        self.state.bytes_sent += num_bytes * len(present)

    def _residuals(self, result: ConsensusResult, primal_square: float | None) -> tuple[float | None, float | None]:
        """sqrt(sum_i alpha_i ||w_i - w||^2) and sigma ||w_next - w|| (Boyd et al. 2011, section 3.3)."""
        primal = None if primal_square is None else primal_square**0.5
        if result.penalty is None:
            return primal, None
        moves = [(new - old).double().square().sum() for new, old in self._pairs(result.weights)]
        return primal, result.penalty * float(torch.stack(moves).sum().sqrt())

    def _pairs(self, new: Tensors) -> Iterator[tuple[Tensor, Tensor]]:
        return ((new[name], old) for name, old in self.state.weights.items())

    def _commit(self, rows: Sequence[int], local: LocalResult, result: ConsensusResult, buffers: Tensors) -> None:
        state = self.state
        state.weights, state.shared = result.weights, result.shared
        for name, change in buffers.items():
            old = state.buffers[name]
            state.buffers[name] = old + (change if old.is_floating_point() else change.round()).to(old.dtype)
        if len(rows) == len(self.hosted):
            state.workers = local.state
        else:
            for name, kinds in local.state.items():
                for kind, value in kinds.items():
                    state.workers[name][kind][rows] = value
        state.num_participations[rows] += 1
