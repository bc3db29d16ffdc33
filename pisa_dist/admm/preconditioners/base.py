"""The protocol that every preconditioner follows."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from pisa_dist.admm.updates import Scalar

State = dict[str, Tensor]


class Preconditioned(NamedTuple):
    """Outcome of one preconditioner step for one parameter."""

    direction: Tensor  # takes the gradient's place in the local step; the gradient itself for SISA
    preconditioner: Scalar  # diagonal of Q_i, same shape, or one number
    state: State  # the next state


class Preconditioner(ABC):
    """Hyperparameters and rule of one Q_i; its state is passed in and out, never kept.

    State tensors have the dual's shape: the parameter's own, behind any worker dimensions.
    """

    @abstractmethod
    def init_state(self, dual: Tensor) -> State:
        """State before the first step for a parameter whose dual is `dual`; new tensors that may be kept."""

    @abstractmethod
    def precondition(
        self, state: State, dual: Tensor, gradient: Tensor, *, step: Scalar, shape: torch.Size
    ) -> Preconditioned:
        """One step for one parameter.

        Args:
            state: from `init_state` or the step before; not changed.
            dual: pi_i, shape [*workers, *shape].
            gradient: g_i, same shape, in the dual's dtype.
            step: t, how often each worker has stepped, this step included (from 1); broadcasts against `dual`.
            shape: the parameter's own shape, without worker dimensions.
        """

    def for_parameter(self, name: str | None, shape: torch.Size) -> "Preconditioner":
        """The preconditioner for one parameter: this one, unless it suits some parameters only.

        Args:
            name: the parameter's name in its model, None where it is not known.
            shape: the parameter's own shape.
        """
        return self
