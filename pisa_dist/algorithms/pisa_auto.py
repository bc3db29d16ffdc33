"""PISA with local steps that needs no tuning: one knob, the learning rate."""

from dataclasses import dataclass

from torch import Tensor

from pisa_dist.algorithms.base import Algorithm, ConsensusResult, LocalResult, Round, State, Tensors
from pisa_dist.algorithms.pisa_local import PisaLocal

# sigma in the first and in the last round. Its inverse is the consensus step in units of the metric.
FIRST_PENALTY, LAST_PENALTY = 30.0, 280.0


@dataclass
class PisaAuto(Algorithm):
    """`pisa_local` with Muon's metric, everything but the learning rate set by what a run shows and is.

    - The scale of the gradients, which the penalty must match in the paper's form, is measured: P is made of it.
    - sigma grows geometrically from 30 in the first round to 280 in the last, whatever their number: large steps first,
      small ones in the end.
    - rho follows sigma and the number of local steps, so that a round's steps together forget about two thirds of a
      dual.

    Attributes:
        lr: factor on all steps, > 0.
    """

    name: str = "pisa_auto"
    takes_local_steps = True

    lr: float = 1.0

    def at(self, round_: Round) -> PisaLocal:
        """The method of a round."""
        progress = (round_.number - 1) / max(round_.num_rounds - 1, 1)
        return PisaLocal(penalty=FIRST_PENALTY * (LAST_PENALTY / FIRST_PENALTY) ** min(progress, 1.0), lr=self.lr)

    def init_worker_state(self, parameters: Tensors, num_workers: int) -> State:  # noqa: D102 - as in Algorithm
        return PisaLocal().init_worker_state(parameters, num_workers)

    def init_shared_state(self, parameters: Tensors) -> State:  # noqa: D102 - as in Algorithm
        return PisaLocal().init_shared_state(parameters)

    def local_work(self, round_: Round, state: State) -> LocalResult:  # noqa: D102 - as in Algorithm
        return self.at(round_).local_work(round_, state)

    def standing_message(self, state: State, worker_weight: Tensor, *, round_number: int) -> Tensors:
        """As in `PisaLocal`."""
        return PisaLocal().standing_message(state, worker_weight, round_number=round_number)

    def consensus(self, round_: Round, message_sum: Tensors, shared: State) -> ConsensusResult:  # noqa: D102
        return self.at(round_).consensus(round_, message_sum, shared)
