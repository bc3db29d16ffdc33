"""Metrics of the consensus: P in w <- w + kappa sum_i alpha_i u_i + (sigma P)^-1 sum_i alpha_i pi_i.

Every rank can apply P to what the all-reduce has returned, so it costs no byte and is computed once and not per worker.
At the fixed point sum_i alpha_i pi_i = 0, and so is the step, whatever P is: the fixed point stays exact. The steps of
the diagonal metric shrink on the way there. Those of Muon's and of the Kronecker metric keep their length: with a
constant sigma the weights stay about a step, 1/sigma, away, and come to rest as sigma grows.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pisa_dist.admm.preconditioners.base import State
from pisa_dist.admm.preconditioners.newton_schulz import newton_schulz

# Root mean square of an orthogonalised step's entries: that of AdamW's in the course of training, so that one step
# size suits both (Liu et al., "Muon is scalable for LLM training", arXiv 2502.16982).
_RMS_OF_ADAM = 0.2


class MetricStep(NamedTuple):
    """P^-1 times the mean dual, and the metric's next state."""

    direction: Tensor
    state: State


class Metric(ABC):
    """A rule for P. It is a value; its state, the same on every rank, goes in and comes out."""

    def init_state(self, parameter: Tensor) -> State:
        """State before the first consensus; none by default."""
        return {}

    def uses_diagonal(self, shape: torch.Size) -> bool:
        """Whether `solve` looks at the diagonal for a parameter of this shape."""
        return True

    @abstractmethod
    def solve(self, mean_dual: Tensor, diagonal: Tensor, state: State) -> MetricStep:
        """P^-1 Pi for one parameter. Changes none of its inputs.

        Args:
            mean_dual: Pi = sum_i alpha_i pi_i, of the parameter's shape, in units of the gradient.
            diagonal: mean of the workers' root mean square gradients, same shape, >= 0.
            state: what the last call (or `init_state`) returned.

        Returns:
            The direction in units of P: entries of about one and less, as those of Adam's step before its learning
            rate.
        """


def solve_diagonal(mean_dual: Tensor, diagonal: Tensor) -> Tensor:
    """Pi / max(P, |Pi|), elementwise; zero where both are.

    A mean of gradients is no larger than their root mean square. Where it is, P is older than the gradients: a worker
    that was never seen before uses what no other did, such as a unit that is dead for all other classes.
    """
    largest = torch.maximum(diagonal, mean_dual.abs())
    return (mean_dual / largest).masked_fill_(largest == 0, 0.0)


@dataclass(frozen=True)
class DiagonalMetric(Metric):
    """P = diag(mean over the workers of the RMS of their gradients): Adam's scale."""

    def solve(self, mean_dual: Tensor, diagonal: Tensor, state: State) -> MetricStep:  # noqa: D102 - as in Metric
        return MetricStep(solve_diagonal(mean_dual, diagonal), state)


@dataclass(frozen=True)
class MuonMetric(Metric):
    """P^-1 Pi is Pi orthogonalised by Newton-Schulz iterations, 0.2 sqrt(max(rows, columns)) U V', as in Muon.

    Convolutions are flattened to matrices [out, in * height * width]; vectors and scalars take the diagonal metric.

    Args:
        steps: Newton-Schulz iterations, >= 1.
    """

    steps: int = 5

    def uses_diagonal(self, shape: torch.Size) -> bool:  # noqa: D102 - as in Metric
        return len(shape) < 2

    def solve(self, mean_dual: Tensor, diagonal: Tensor, state: State) -> MetricStep:  # noqa: D102 - as in Metric
        if self.uses_diagonal(mean_dual.shape):
            return MetricStep(solve_diagonal(mean_dual, diagonal), state)
        matrix = mean_dual.flatten(1)
        scale = _RMS_OF_ADAM * max(matrix.shape) ** 0.5
        return MetricStep(scale * newton_schulz(matrix, steps=self.steps).view_as(mean_dual), state)


@dataclass(frozen=True)
class KroneckerMetric(Metric):
    """P is a Kronecker product of averages over the rounds, as in Shampoo (Gupta, Koren, Singer, ICML 2018).

        L <- beta L + (1 - beta) Pi Pi',   R <- beta R + (1 - beta) Pi' Pi
        P^-1 Pi = 0.2 sqrt(max(rows, columns)) L^-1/4 Pi R^-1/4
    both bias-corrected. With beta = 0 that is U V', the exact form of what Muon's metric approximates. Of a side longer
    than `largest_side` no average is kept: it takes the identity, and the other one the power -1/2. Where both are
    longer, and for vectors and scalars, the metric is diagonal.

    Args:
        decay: beta in [0, 1).
        largest_side: rows or columns, >= 1; an eigendecomposition costs their cube.
        eps: smallest eigenvalue that counts, as a share of the largest, > 0.
    """

    decay: float = 0.9
    largest_side: int = 1024
    eps: float = 1e-7

    def _sides(self, shape: torch.Size) -> dict[str, int]:
        if len(shape) < 2:
            return {}
        sides = {"left": shape[0], "right": shape[1:].numel()}
        return {name: size for name, size in sides.items() if size <= self.largest_side}

    def uses_diagonal(self, shape: torch.Size) -> bool:  # noqa: D102 - as in Metric
        return not self._sides(shape)

    def init_state(self, parameter: Tensor) -> State:  # noqa: D102 - as in Metric
        sides = self._sides(parameter.shape)
        if not sides:
            return {}
        state = {name: parameter.new_zeros(size, size) for name, size in sides.items()}
        return state | {"correction": parameter.new_zeros(())}

    def solve(self, mean_dual: Tensor, diagonal: Tensor, state: State) -> MetricStep:  # noqa: D102 - as in Metric
        if not state:
            return MetricStep(solve_diagonal(mean_dual, diagonal), state)
        matrix = solved = mean_dual.flatten(1)
        correction = torch.lerp(torch.ones_like(state["correction"]), state["correction"], self.decay)
        new_state = {"correction": correction}
        power = -0.25 if "left" in state and "right" in state else -0.5
        if "left" in state:
            new_state["left"] = torch.lerp(matrix @ matrix.mT, state["left"], self.decay)
            solved = matrix_power(new_state["left"] / correction, power, eps=self.eps) @ solved
        if "right" in state:
            new_state["right"] = torch.lerp(matrix.mT @ matrix, state["right"], self.decay)
            solved = solved @ matrix_power(new_state["right"] / correction, power, eps=self.eps)
        scale = _RMS_OF_ADAM * max(matrix.shape) ** 0.5
        return MetricStep(scale * solved.view_as(mean_dual), new_state)


def matrix_power(matrix: Tensor, power: float, *, eps: float) -> Tensor:
    """A symmetric positive semidefinite matrix to a negative power, zero where its eigenvalues vanish.

    Args:
        matrix: shape [n, n].
        power: < 0.
        eps: eigenvalues below this share of the largest count as zero.
    """
    values, vectors = torch.linalg.eigh(matrix)
    threshold = eps * values[-1]
    powers = torch.where(values > threshold, values.clamp_min(torch.finfo(values.dtype).tiny) ** power, 0.0)
    power_of_matrix: Tensor = (vectors * powers) @ vectors.mT
    return power_of_matrix


METRICS: dict[str, Metric | None] = {
    "none": None,
    "adam": DiagonalMetric(),
    "muon": MuonMetric(),
    "kron": KroneckerMetric(),
}
"""By the name that `algorithm.metric` takes; none is P = I, the paper's penalty."""
