"""PISA, SISA and NSISA: Algorithms 1 to 3 of arXiv 2502.10784, through the same `worker_step` as the optimizers."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pisa_dist.admm.penalty import divided_by_lr, penalty_at
from pisa_dist.admm.preconditioners import (
    COEFFICIENTS,
    PRECISIONS,
    SCHEMES,
    Identity,
    NewtonSchulz,
    Preconditioner,
    SecondMoment,
)
from pisa_dist.admm.updates import consensus_update, state_dtype
from pisa_dist.admm.worker import worker_step
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
)
from pisa_dist.checks import check_choice


@dataclass
class ADMM(Algorithm):
    """What the three methods share; a subclass names its preconditioner. Knobs as in `pisa_dist.PISA`.

    Attributes:
        penalty_factors: one positive number per worker that multiplies its penalty; None for one penalty for all.
    """

    penalty: float = 1.0
    preconditioner_scale: float = 1.0
    consensus_l2: float = 0.0
    penalty_growth: float = 1.0
    penalty_growth_interval: int = 1
    lr: float = 1.0
    penalty_factors: list[float] | None = None

    def check_run(self, *, num_workers: int, local_steps: int) -> None:  # noqa: D102 - as in Algorithm
        super().check_run(num_workers=num_workers, local_steps=local_steps)
        if self.penalty_factors is not None and len(self.penalty_factors) != num_workers:
            raise ValueError(
                f"`algorithm.penalty_factors` must be one number for each of {num_workers} workers, "
                f"got {len(self.penalty_factors)}"
            )

    @abstractmethod
    def rule(self) -> Preconditioner:
        """The rule for Q_i."""

    def penalty_at(self, round_number: int) -> float:
        """sigma of a round, for factor 1. It grows for absent workers too, so that every rank knows the sum."""
        growth, interval = self.penalty_growth, self.penalty_growth_interval
        return penalty_at(round_number, penalty=self.penalty, growth=growth, interval=interval, lr=self.lr)

    def factors(self, workers: Sequence[int]) -> Tensor:
        """Penalty factor of some workers, float64 [workers]."""
        factors = [1.0] * len(workers) if self.penalty_factors is None else [self.penalty_factors[i] for i in workers]
        return torch.tensor(factors, dtype=torch.float64)

    def init_worker_state(self, parameters: Tensors, num_workers: int) -> State:
        """Zero duals, and the preconditioner's state."""
        state: State = {}
        for name, parameter in parameters.items():
            dual = parameter.new_zeros((num_workers, *parameter.shape), dtype=state_dtype(parameter.dtype))
            rule = self.rule().for_parameter(name, parameter.shape)
            state[name] = {"dual": dual, **rule.init_state(dual)}
        return state

    def local_work(self, round_: Round, state: State) -> LocalResult:
        """One gradient at the consensus weights, then one `worker_step` per parameter."""
        gradients = round_.gradients(round_.stacked_weights(), 0)
        penalties = self.penalty_at(round_.number) * self.factors(round_.workers).to(round_.worker_weight.device)
        new_state: State = {}
        message: Tensors = {}
        displacements: Tensors = {}
        for name, weights in round_.weights.items():
            memory = dict(state[name])
            dual = memory.pop("dual")
            step = worker_step(
                dual,
                memory,
                gradients[name].to(dual.dtype),
                preconditioner=self.rule().for_parameter(name, weights.shape),
                penalty=column(penalties, dual),
                preconditioner_scale=divided_by_lr(self.preconditioner_scale, self.lr),
                worker_weight=column(round_.worker_weight, dual),
                step=round_.num_participations.double().view(-1, *[1] * weights.ndim),
                shape=weights.shape,
            )
            new_state[name] = {"dual": step.dual, **step.preconditioner_state}
            message[name] = step.message.sum(0)
            displacements[name] = step.displacement
        return LocalResult(new_state, message, squared_distance(displacements, round_.worker_weight))

    def standing_message(self, state: State, worker_weight: Tensor, round_: Round) -> Tensors:
        """An absent worker's dual keeps standing for its data: alpha_i pi_i, with u_i = 0."""
        return {name: weighted_sum(memory["dual"], worker_weight) for name, memory in state.items()}

    def consensus(self, round_: Round, message_sum: Tensors, shared: State) -> ConsensusResult:
        """`consensus_update`; sum_i alpha_i sigma_i runs over all workers and is known beforehand."""
        everyone = range(len(round_.all_worker_weights))
        penalty = self.penalty_at(round_.number) * float(round_.all_worker_weights @ self.factors(everyone))
        weights = {
            name: consensus_update(
                w.to(message_sum[name].dtype),
                message_sum[name],
                penalty_sum=penalty,
                consensus_l2=self.consensus_l2,
            ).to(w.dtype)
            for name, w in round_.weights.items()
        }
        return ConsensusResult(weights, shared, penalty)


@dataclass
class Pisa(ADMM):
    """PISA, Algorithm 1, with Q_i = I: u_i = -(pi_i + g_i) / (sigma_i + rho_i)."""

    name: str = "pisa"

    def rule(self) -> Preconditioner:  # noqa: D102 - as in ADMM
        return Identity()


@dataclass
class Sisa(ADMM):
    """SISA, Algorithm 2. Knobs as in `pisa_dist.SISA`."""

    name: str = "sisa"

    preconditioner_scale: float = 100.0
    preconditioner: str = "adam"
    second_moment_decay: float = 0.999
    eps: float = 1e-8
    preconditioner_bound: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("algorithm.preconditioner", self.preconditioner, SCHEMES)

    def rule(self) -> Preconditioner:  # noqa: D102 - as in ADMM
        return SecondMoment(self.preconditioner, self.second_moment_decay, self.eps, self.preconditioner_bound)


@dataclass
class Nsisa(ADMM):
    """NSISA, Algorithm 3. Knobs as in `pisa_dist.NSISA`."""

    name: str = "nsisa"

    penalty: float = 20.0
    momentum: float = 0.95
    newton_schulz_steps: int = 5
    newton_schulz_coefficients: str = "quintic"
    newton_schulz_precision: str = "auto"
    eps: float = 1e-8
    second_moment_decay: float = 0.999
    preconditioner_bound: float | None = None
    sisa_parameters: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("algorithm.newton_schulz_coefficients", self.newton_schulz_coefficients, tuple(COEFFICIENTS))
        check_choice("algorithm.newton_schulz_precision", self.newton_schulz_precision, PRECISIONS)

    def init_worker_state(self, parameters: Tensors, num_workers: int) -> State:  # noqa: D102 - as in ADMM
        self.rule().check_patterns(list(parameters))
        return super().init_worker_state(parameters, num_workers)

    def rule(self) -> NewtonSchulz:  # noqa: D102 - as in ADMM
        vectors = SecondMoment("adam", self.second_moment_decay, self.eps, self.preconditioner_bound)
        return NewtonSchulz(
            self.momentum,
            self.newton_schulz_steps,
            self.eps,
            vectors,
            tuple(self.sisa_parameters),
            self.newton_schulz_coefficients,
            self.newton_schulz_precision,
        )
