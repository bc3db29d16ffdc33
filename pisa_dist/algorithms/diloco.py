"""DiLoCo: local AdamW steps, then an outer Nesterov step on the averaged displacement."""

from dataclasses import dataclass

from pisa_dist.algorithms.base import (
    Algorithm,
    ConsensusResult,
    LocalResult,
    Round,
    State,
    Tensors,
    column,
    in_state_dtype,
    shared_state,
    squared_distance,
    stacked_state,
    weighted_sums,
)


@dataclass
class DiLoCo(Algorithm):
    """DiLoCo (Douillard et al., 2023, arXiv 2311.08105).

    Each present worker takes `local_steps` steps of AdamW from the consensus weights and keeps its moments from round
    to round. With the mean displacement d = sum_i alpha_i (w_i - w) / sum_i alpha_i over the present workers,
        m <- outer_momentum m - d,   w <- w - outer_lr (outer_momentum m - d)
    With outer_lr = 1 and outer_momentum = 0 it averages the local weights.

    Attributes:
        lr: inner step size > 0.
        first_moment_decay, second_moment_decay: beta_1 and beta_2 of AdamW, each in [0, 1).
        eps: AdamW's, >= 0.
        weight_decay: AdamW's, >= 0.
        outer_lr: > 0.
        outer_momentum: in [0, 1).
    """

    name: str = "diloco"
    takes_local_steps = True

    lr: float = 1e-3
    first_moment_decay: float = 0.9
    second_moment_decay: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    outer_lr: float = 0.7
    outer_momentum: float = 0.9

    def init_worker_state(self, parameters: Tensors, num_workers: int) -> State:  # noqa: D102 - as in Algorithm
        return stacked_state(parameters, num_workers, "exp_avg", "exp_avg_sq")

    def init_shared_state(self, parameters: Tensors) -> State:  # noqa: D102 - as in Algorithm
        return shared_state(parameters, "momentum_buffer")

    def local_work(self, round_: Round, state: State) -> LocalResult:
        """AdamW (Loshchilov, Hutter, ICLR 2019); a worker's step count goes on from its earlier rounds."""
        first, second = self.first_moment_decay, self.second_moment_decay
        start = in_state_dtype(round_.stacked_weights())
        local, memory = start, state
        for step in range(round_.num_local_steps):
            count = round_.num_steps_before + step + 1
            gradients = round_.gradients_at(local, step)
            memory = {
                n: {
                    "exp_avg": first * kinds["exp_avg"] + (1 - first) * gradients[n],
                    "exp_avg_sq": second * kinds["exp_avg_sq"] + (1 - second) * gradients[n].square(),
                }
                for n, kinds in memory.items()
            }
            new: Tensors = {}
            for n, w in local.items():
                mean = memory[n]["exp_avg"] / column(1 - first ** count.double(), w)
                scale = (memory[n]["exp_avg_sq"] / column(1 - second ** count.double(), w)).sqrt() + self.eps
                new[n] = (1 - self.lr * self.weight_decay) * w - self.lr * mean / scale
            local = new
        moves = {n: w - start[n] for n, w in local.items()}
        message = weighted_sums(moves, round_.worker_weight)
        return LocalResult(memory, message, squared_distance(moves, round_.worker_weight))

    def consensus(self, round_: Round, message_sum: Tensors, shared: State) -> ConsensusResult:  # noqa: D102
        weights, new_shared = {}, {}
        for n, w in round_.weights.items():
            buffer = shared[n]["momentum_buffer"]
            descent = -message_sum[n].to(buffer.dtype) / round_.present_weight
            momentum = self.outer_momentum * buffer + descent
            weights[n] = (w - self.outer_lr * (self.outer_momentum * momentum + descent)).to(w.dtype)
            new_shared[n] = {"momentum_buffer": momentum}
        return ConsensusResult(weights, new_shared)
