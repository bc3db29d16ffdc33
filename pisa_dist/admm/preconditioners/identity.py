"""Q_i = I: plain inexact stochastic ADMM."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pisa_dist.admm.preconditioners.base import Preconditioned, Preconditioner, State
from pisa_dist.admm.updates import Scalar


@dataclass(frozen=True)
class Identity(Preconditioner):
    """Q_i = I, without state: u_i = -(pi_i + g_i) / (sigma_i + rho_i)."""

    def init_state(self, dual: Tensor) -> State:  # noqa: D102 - as in the protocol
        return {}

    def precondition(  # noqa: D102 - as in the protocol
        self, state: State, dual: Tensor, gradient: Tensor, *, step: Scalar, shape: torch.Size
    ) -> Preconditioned:
        return Preconditioned(gradient, 1.0, {})
