"""PISA with local steps and a metric penalty: communicates rarely, and duals hold what local steps would forget."""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pisa_dist.admm.local_round import (
    first_dual,
    is_forming_metric,
    local_scale,
    local_solver,
    metric_consensus,
    newcomers_displacement,
)
from pisa_dist.admm.local_steps import AdaptiveSolver, LocalSolver
from pisa_dist.admm.metrics import METRICS
from pisa_dist.admm.penalty import penalty_at
from pisa_dist.admm.updates import consensus_update, dual_update, state_dtype, worker_message
from pisa_dist.algorithms.base import (
    Algorithm,
    ConsensusResult,
    LocalResult,
    Round,
    State,
    Tensors,
    column,
    squared_distance,
    weighted_sum,
    weighted_sums,
)
from pisa_dist.checks import check_choice

# Keys of a message, before the parameter's name.
PULL, DUAL, METRIC = "pull of ", "dual of ", "rms of "
# Steps that a worker has taken so far; a worker without any is not seen yet.
SEEN = "weight seen"
# Of the shared state: whether P is formed for every parameter, and whether the sum of the duals is that of all workers.
KNOWN = "what is known"


@dataclass
class PisaLocal(Algorithm):
    """PISA, Algorithm 1, with the subproblem solved inexactly by `local_steps` preconditioned steps.

    Beyond the paper, with a metric P in the penalty, sigma P in the place of sigma:
        u_i  <- local_steps steps on F_i(w + u) + <pi_i, u> + (sigma/2) u' P u, from u = 0
        pi_i <- pi_i + sigma P u_i
        w    <- w + kappa sum_i alpha_i u_i + (sigma P)^-1 sum_i alpha_i pi_i
    over the workers seen so far, whose alpha_i are scaled to sum to 1; an absent worker counts with u_i = 0 and its
    dual. A worker that takes part for the first time has no dual yet: pi_i becomes minus the mean of its gradients, and
    after the first round, in which P is unknown, its u_i does not count. In the local steps P is diagonal, the mean
    over all workers seen of the RMS of their gradients, each as of when it was last present; in the consensus it is
    what `metric` says. The diagonal is formed anew in the first `metric_rounds` rounds and then every
    `metric_interval`.

    The sum of the duals takes the same step as every dual, with sum_i alpha_i u_i, so that a message is one tensor of
    the model's size; where a new worker is present it is two, since its dual comes otherwise, and in the rounds that
    form P one more.

    With `enlarge_batch` a worker stays at w instead, u_i = 0, and pi_i becomes minus the mean of its gradients there:
    one step of a larger batch, of the `local_steps` minibatches, or of one pass over its data if that is less. It is
    the limit rho -> 0 of the equations with kappa = 0. The mean dual is then the mean of all workers' last gradients.
    It does not drift where the workers pull apart, and goes less far where they agree. A message is one tensor; P is
    formed only where the consensus looks at its diagonal, with metric=muon for vectors.

    With metric=none P = I and the steps are plain ones; nothing is scaled to the workers seen and a message is one
    tensor. With one local step that is `algorithm=pisa`, the paper's step.

    Attributes:
        metric: none, adam, muon or kron, see `pisa_dist.admm.metrics`.
        penalty: sigma > 0; with a metric 1/sigma is the step of the consensus in units of P, like Adam's learning rate.
        preconditioner_scale: rho > 0, 1/rho is the learning rate of the local steps; None for sigma times their number,
            so that it grows with sigma and a round forgets the same share of a dual whatever their number is.
        relaxation: kappa >= 0; 1 is ADMM, 0 moves along the duals alone.
        enlarge_batch: one step of all a round's minibatches together, in place of local steps.
        lr: divides sigma and rho, > 0: a factor on all steps.
        penalty_growth: 1/gamma >= 1, factor on sigma every `penalty_growth_interval` rounds.
        first_moment_decay, second_moment_decay: of the local steps, each in [0, 1); unused with metric=none.
        eps: added to the RMS of the gradients, >= 0.
        metric_rounds: rounds at the start that form P anew, >= 1.
        metric_interval: rounds from one P to the next after those, >= 1.
    """

    name: str = "pisa_local"
    takes_local_steps = True
    may_be_none = ("preconditioner_scale",)

    metric: str = "muon"
    penalty: float = 100.0
    preconditioner_scale: float | None = None
    relaxation: float = 1.0
    enlarge_batch: bool = False
    lr: float = 1.0
    penalty_growth: float = 1.0
    penalty_growth_interval: int = 1
    first_moment_decay: float = 0.9
    second_moment_decay: float = 0.99
    eps: float = 1e-8
    metric_rounds: int = 10
    metric_interval: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("algorithm.metric", self.metric, tuple(METRICS))
        if self.preconditioner_scale == 0:
            raise ValueError("`algorithm.preconditioner_scale` (rho) must be > 0 or null for local steps, got 0")

    @property
    def dual_counts_if(self) -> str | None:  # noqa: D102 - as in Algorithm
        return None if self.metric == "none" else f"{SEEN}/steps"

    def without_sums(self, shared: State) -> State:  # noqa: D102 - as in Algorithm
        return shared | {KNOWN: shared[KNOWN] | {"dual_sum": torch.tensor(False)}} if KNOWN in shared else shared

    def one_pass_rounds(self, shared: State) -> float:  # noqa: D102 - as in Algorithm
        return math.inf if self.enlarge_batch else 0

    def solver(self) -> LocalSolver:
        """The rule of the local steps."""
        return local_solver(
            self.metric,
            first_moment_decay=self.first_moment_decay,
            second_moment_decay=self.second_moment_decay,
            eps=self.eps,
        )

    def penalty_at(self, round_number: int) -> float:
        """sigma of a round. It grows for absent workers too."""
        growth, interval = self.penalty_growth, self.penalty_growth_interval
        return penalty_at(round_number, penalty=self.penalty, growth=growth, interval=interval, lr=self.lr)

    def scale_at(self, round_number: int, local_steps: int) -> float:
        """rho of a round for workers that take so many steps."""
        penalty = self.penalty_at(round_number)
        return local_scale(self.preconditioner_scale, penalty=penalty, local_steps=local_steps, lr=self.lr)

    def init_worker_state(self, parameters: Tensors, num_workers: int) -> State:  # noqa: D102 - as in Algorithm
        state: State = {}
        for name, p in parameters.items():
            dual = p.new_zeros((num_workers, *p.shape), dtype=state_dtype(p.dtype))
            state[name] = {"dual": dual, **self.solver().init_state(dual)}
        # In the type of the rest: a wider number would widen the whole message.
        return state | {SEEN: {"steps": dual.new_zeros(num_workers)}}

    def init_shared_state(self, parameters: Tensors) -> State:  # noqa: D102 - as in Algorithm
        rule, shared = METRICS[self.metric], {}
        if rule is None:
            return {}
        for name, p in parameters.items():
            zeros = torch.zeros_like(p, dtype=state_dtype(p.dtype))
            shared[name] = {"metric": zeros, "dual_sum": zeros.clone(), **rule.init_state(zeros)}
        return shared | {KNOWN: {"metric": torch.tensor(False), "dual_sum": torch.tensor(False)}}

    def local_work(self, round_: Round, state: State) -> LocalResult:  # noqa: D102 - as in Algorithm
        return self._one_step(round_, state) if self.enlarge_batch else self._local_steps(round_, state)

    def _one_step(self, round_: Round, state: State) -> LocalResult:
        """All gradients at w; the moments see them too, so that local steps may follow in a later round."""
        solver, weights = self.solver(), round_.stacked_weights()
        duals = {n: state[n]["dual"] for n in round_.weights}
        memory = {n: {k: v for k, v in state[n].items() if k != "dual"} for n in round_.weights}
        sums = {n: torch.zeros_like(dual) for n, dual in duals.items()}
        for step in range(round_.num_local_steps):
            gradients = round_.gradients(weights, step)
            for n, dual in duals.items():
                gradient, count = gradients[n].to(dual.dtype), column(round_.num_steps_before + step + 1, dual)
                memory[n] = solver.direction(dual, gradient, memory[n], count=count).state
                sums[n] += gradient
        new_state = self._seen(round_, state)
        for n, total in sums.items():
            new_state[n] = {"dual": first_dual(total, round_.num_local_steps), **memory[n]}
        return LocalResult(new_state, self.standing_message(new_state, round_.worker_weight, round_))

    def _seen(self, round_: Round, state: State) -> State:
        steps = round_.num_steps_before + round_.num_local_steps
        return {SEEN: {"steps": steps.to(state[SEEN]["steps"])}}

    def _local_steps(self, round_: Round, state: State) -> LocalResult:
        solver, penalty = self.solver(), self.penalty_at(round_.number)
        pulls = {n: penalty * round_.shared[n]["metric"] if n in round_.shared else penalty for n in round_.weights}
        duals = {n: state[n]["dual"] for n in round_.weights}
        memory = {n: {k: v for k, v in state[n].items() if k != "dual"} for n in round_.weights}
        moves = {n: torch.zeros_like(dual) for n, dual in duals.items()}
        has_newcomers = self.metric != "none" and bool((round_.num_steps_before == 0).any())
        sums = dict(moves)
        for step in range(round_.num_local_steps):
            local = {n: (w + moves[n]).to(w.dtype) for n, w in round_.weights.items()}
            gradients = round_.gradients(local, step)
            for n, dual in duals.items():
                gradient = gradients[n].to(dual.dtype)
                moves[n], memory[n] = solver.step(
                    moves[n],
                    dual,
                    gradient,
                    memory[n],
                    penalty_metric=pulls[n],
                    preconditioner_scale=self.scale_at(round_.number, round_.num_local_steps),
                    count=column(round_.num_steps_before + step + 1, dual),
                )
                if has_newcomers:
                    sums[n] = sums[n] + gradient
        new_state = self._seen(round_, state)
        for n, dual in duals.items():
            new_state[n] = {"dual": dual_update(dual, moves[n], penalty=pulls[n]), **memory[n]}
        residual = squared_distance(moves, round_.worker_weight)
        if self.metric == "none":
            message = self._plain_message(new_state, moves, round_.worker_weight, penalty)
            return LocalResult(new_state, message, residual)
        if has_newcomers:
            for n, dual in duals.items():
                is_new = column(round_.num_steps_before == 0, dual).bool()
                first = first_dual(sums[n], round_.num_local_steps)
                new_state[n]["dual"] = torch.where(is_new, first, new_state[n]["dual"])
                moves[n] = torch.where(is_new, newcomers_displacement(moves[n], round_.shared[n]["metric"]), moves[n])
        message = {PULL + n: penalty * s for n, s in weighted_sums(moves, round_.worker_weight).items()}
        message |= self._standing(new_state, round_.worker_weight, round_)
        return LocalResult(new_state, message, residual)

    def _plain_message(self, state: State, moves: Tensors, worker_weight: Tensor, penalty: float) -> Tensors:
        """`worker_message` of every worker, summed: with P = I one tensor holds dual and displacement."""
        return {
            DUAL + n: worker_message(
                state[n]["dual"], move, penalty=self.relaxation * penalty, worker_weight=column(worker_weight, move)
            ).sum(0)
            for n, move in moves.items()
        }

    def standing_message(self, state: State, worker_weight: Tensor, round_: Round) -> Tensors:
        """An absent worker's dual stays in the sums, and its RMS once it has been seen."""
        if self.metric == "none":
            return {DUAL + n: weighted_sum(kinds["dual"], worker_weight) for n, kinds in state.items() if n != SEEN}
        return self._standing(state, worker_weight, round_)

    def _standing(self, state: State, worker_weight: Tensor, round_: Round) -> Tensors:
        """What workers stand for, present or absent: duals and RMS where needed, and the weight of those seen."""
        steps = state[SEEN]["steps"]
        message: Tensors = {}
        if not self._knows_dual_sum(round_):
            message |= {DUAL + n: weighted_sum(state[n]["dual"], worker_weight) for n in round_.weights}
        names = self._forming_metric(round_)
        message |= {METRIC + n: weighted_sum(self._rms(state[n], steps), worker_weight) for n in names}
        return message | {SEEN: weighted_sum((steps > 0).to(steps.dtype), worker_weight)}

    def _knows_dual_sum(self, round_: Round) -> bool:
        """Whether the next sum of the duals follows from the last one and the displacements."""
        follows = round_.is_summed and not round_.has_newcomers and not self.enlarge_batch
        return follows and bool(round_.shared[KNOWN]["dual_sum"])

    def _forming_metric(self, round_: Round) -> list[str]:
        """Parameters whose P is formed in this round."""
        rule = METRICS[self.metric]
        if rule is None:
            return []
        form = partial(
            is_forming_metric,
            round_.number,
            rule=rule,
            is_formed=bool(round_.shared[KNOWN]["metric"]),
            enlarge_batch=self.enlarge_batch,
            metric_rounds=self.metric_rounds,
            metric_interval=self.metric_interval,
        )
        return [n for n, w in round_.weights.items() if form(shape=w.shape)]

    def _rms(self, memory: dict[str, Tensor], steps: Tensor) -> Tensor:
        """RMS of each worker's gradients; zero for one that has not been seen."""
        solver = AdaptiveSolver(self.first_moment_decay, self.second_moment_decay, self.eps)
        return solver.rms(memory, count=column(steps.clamp_min(1), memory["dual"]))

    def consensus(self, round_: Round, message_sum: Tensors, shared: State) -> ConsensusResult:  # noqa: D102
        penalty = self.penalty_at(round_.number)
        rule = METRICS[self.metric]
        if rule is None:
            sums = {n: message_sum[DUAL + n] for n in round_.weights}
            weights = {
                n: consensus_update(w.to(sums[n].dtype), sums[n], penalty_sum=penalty).to(w.dtype)
                for n, w in round_.weights.items()
            }
            return ConsensusResult(weights, shared, penalty)
        weights, new_shared = {}, {}
        for n, w in round_.weights.items():
            metric, dual_sum = shared[n]["metric"], message_sum.get(DUAL + n)
            if dual_sum is None:
                dual_sum = dual_update(shared[n]["dual_sum"], message_sum[PULL + n], penalty=metric)
            weights[n], metric, memory = metric_consensus(
                w,
                message_sum.get(PULL + n),
                dual_sum,
                message_sum.get(METRIC + n),
                seen=message_sum[SEEN],
                rule=rule,
                metric=metric,
                metric_state={kind: value for kind, value in shared[n].items() if kind not in ("metric", "dual_sum")},
                penalty=penalty,
                relaxation=self.relaxation,
                eps=self.eps,
            )
            new_shared[n] = {"metric": metric, "dual_sum": dual_sum, **memory}
        is_formed = all(METRIC + n in message_sum for n in round_.weights)
        new_shared[KNOWN] = {
            "metric": shared[KNOWN]["metric"] | is_formed,
            "dual_sum": torch.tensor(round_.is_summed),
        }
        return ConsensusResult(weights, new_shared, penalty)
