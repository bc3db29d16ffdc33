"""PISA with local steps and a metric penalty: communicates rarely, and duals hold what local steps would forget."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pisa_dist.admm.local_steps import InnerMoments, inner_moments, inner_rms, inner_step, metric_consensus
from pisa_dist.admm.updates import dual_update, state_dtype
from pisa_dist.algorithms.base import (
    Algorithm,
    ConsensusResult,
    LocalResult,
    Round,
    State,
    Tensors,
    squared_distance,
    weighted_sum,
    weighted_sums,
)

# Keys of a message, before the parameter's name.
MOVE, DUAL, METRIC = "displacement of ", "dual of ", "rms of "
SEEN = "weight seen"


@dataclass
class PisaLocal(Algorithm):
    """PISA, Algorithm 1, with the subproblem solved inexactly by `local_steps` AdamW-like steps.

    Beyond the paper: the penalty is sigma P, with P the mean over all workers seen so far of the RMS of their inner
    gradients, each as of when it was last present; moments are kept between rounds, the penalty is taken implicitly.
    Absent workers' duals stay in the sum, which is rescaled to the workers seen. The first round only forms P: it
    averages the displacements and leaves the duals at zero. P is formed anew in the first `metric_rounds` rounds and
    then every `metric_interval`; in other rounds a message is two parameter-sized tensors, in those three.

    Attributes:
        penalty: sigma > 0; 1/sigma is the step of the consensus in units of P, like Adam's learning rate.
        lr: step size > 0 of the inner steps.
        relaxation: kappa >= 0 in w + kappa sum_i alpha_i u_i + (sigma P)^-1 sum_i alpha_i pi_i; 1 is ADMM.
        first_moment_decay, second_moment_decay: of the inner steps, each in [0, 1).
        eps: added to the inner RMS, >= 0.
        metric_rounds: rounds at the start that form P anew, >= 1.
        metric_interval: rounds from one P to the next after those, >= 1.
    """

    name: str = "pisa_local"
    takes_local_steps = True

    penalty: float = 100.0
    lr: float = 5e-4
    relaxation: float = 1.0
    first_moment_decay: float = 0.9
    second_moment_decay: float = 0.99
    eps: float = 1e-8
    metric_rounds: int = 10
    metric_interval: int = 5

    def init_worker_state(self, parameters: Tensors, num_workers: int) -> State:  # noqa: D102 - as in Algorithm
        state: State = {}
        for name, p in parameters.items():
            zeros = p.new_zeros((num_workers, *p.shape), dtype=state_dtype(p.dtype))
            state[name] = {kind: zeros.clone() for kind in ("dual", "first_moment", "second_moment", "rms")}
        # In the type of the rest: a wider number would widen the whole message.
        return state | {SEEN: {"count": zeros.new_zeros(num_workers)}}

    def init_shared_state(self, parameters: Tensors) -> State:  # noqa: D102 - as in Algorithm
        return {n: {"metric": torch.zeros_like(p, dtype=state_dtype(p.dtype))} for n, p in parameters.items()}

    def _forms_metric(self, round_number: int) -> bool:
        return round_number <= self.metric_rounds or round_number % self.metric_interval == 0

    def local_work(self, round_: Round, state: State) -> LocalResult:  # noqa: D102 - as in Algorithm
        duals = {n: state[n]["dual"] for n in round_.weights}
        moments = {n: InnerMoments(state[n]["first_moment"], state[n]["second_moment"]) for n in round_.weights}
        metric = {n: self.penalty * kinds["metric"] for n, kinds in round_.shared.items()}
        moves = {n: torch.zeros_like(dual) for n, dual in duals.items()}
        decays = {"first_decay": self.first_moment_decay, "second_decay": self.second_moment_decay}
        for step in range(round_.num_local_steps):
            local = {n: (w + moves[n]).to(w.dtype) for n, w in round_.weights.items()}
            gradients = round_.gradients(local, step)
            for n, dual in duals.items():
                moments[n] = inner_moments(moments[n], dual, gradients[n].to(dual.dtype), **decays)
                moves[n] = inner_step(
                    moves[n],
                    moments[n],
                    lr=self.lr,
                    penalty_metric=metric[n],
                    eps=self.eps,
                    step=self._inner_steps(round_, step, dual),
                    **decays,
                )
        new_state: State = {SEEN: {"count": torch.ones_like(state[SEEN]["count"])}}
        for n, dual in duals.items():
            last = self._inner_steps(round_, round_.num_local_steps - 1, dual)
            new_state[n] = {
                "dual": dual_update(dual, moves[n], penalty=metric[n]),
                "first_moment": moments[n].first,
                "second_moment": moments[n].second,
                "rms": inner_rms(moments[n], second_decay=self.second_moment_decay, step=last),
            }
        message = {MOVE + n: s for n, s in weighted_sums(moves, round_.worker_weight).items()}
        message |= self._standing(new_state, round_.worker_weight, with_metric=self._forms_metric(round_.number))
        return LocalResult(new_state, message, squared_distance(moves, round_.worker_weight))

    def _inner_steps(self, round_: Round, step: int, like: Tensor) -> Tensor:
        """Inner steps of each present worker so far, shaped to broadcast against its stacked tensors."""
        count = round_.num_steps_before + step + 1
        return count.to(like.dtype).view(-1, *[1] * (like.ndim - 1))

    def _standing(self, state: State, worker_weight: Tensor, *, with_metric: bool) -> dict[str, Tensor]:
        """What workers stand for, present or absent: weighted duals, RMS, and the weight of those seen."""
        names = [n for n in state if n != SEEN]
        message = {DUAL + n: weighted_sum(state[n]["dual"], worker_weight) for n in names}
        if with_metric:
            message |= {METRIC + n: weighted_sum(state[n]["rms"], worker_weight) for n in names}
        return message | {SEEN: weighted_sum(state[SEEN]["count"], worker_weight)}

    def standing_message(self, state: State, worker_weight: Tensor, *, round_number: int) -> Tensors:
        """An absent worker's dual and RMS stay in the sums, once it has been seen."""
        return self._standing(state, worker_weight, with_metric=self._forms_metric(round_number))

    def consensus(self, round_: Round, message_sum: Tensors, shared: State) -> ConsensusResult:  # noqa: D102
        seen = message_sum[SEEN]
        weights, new_shared = {}, {}
        for n, w in round_.weights.items():
            metric = shared[n]["metric"]
            move, dual = message_sum[MOVE + n] / seen, message_sum[DUAL + n] / seen
            if round_.number == 1:
                weights[n] = (w + move).to(w.dtype)
            else:
                penalty_metric = self.penalty * metric
                weights[n] = metric_consensus(
                    w.to(dual.dtype), move, dual, penalty_metric=penalty_metric, relaxation=self.relaxation
                ).to(w.dtype)
            if METRIC + n in message_sum:
                metric = message_sum[METRIC + n] / seen + self.eps
            new_shared[n] = {"metric": metric}
        return ConsensusResult(weights, new_shared, self.penalty)
