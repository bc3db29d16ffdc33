"""PISA, SISA and NSISA as drop-in `torch.optim.Optimizer`s: one worker per rank, one all-reduce per step or round."""

import inspect
from abc import ABCMeta
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from pisa_dist.admm.preconditioners import Identity, NewtonSchulz, Preconditioner, SecondMoment
from pisa_dist.communication import Communication
from pisa_dist.optim_base import ADMMOptimizer
from pisa_dist.optim_local import LocalPISA, asks_for_local_steps
from pisa_dist.slots import ParamGroup


class PISA(ADMMOptimizer, metaclass=ABCMeta):
    """Preconditioned inexact stochastic ADMM (Algorithm 1 of arXiv 2502.10784) with any preconditioner.

    Every rank is one worker: its gradients stay local, so no DDP wrapper is needed. `step()` takes the local step,
    sums primal-plus-dual terms with one all-reduce and leaves the next consensus weights in the parameters. At
    construction rank 0's weights are copied to all ranks; the process group must exist by then.

    Two knobs matter: 1/penalty is the long-run step size, and
    preconditioner_scale * Q / (penalty + preconditioner_scale * Q) the momentum. A parameter without a gradient
    counts as one whose gradient is zero.

    Args:
        params: parameters, named parameters or parameter groups; the float settings may differ by group.
        preconditioner: the rule for Q_i; None is the identity.
        penalty: sigma_i > 0, gradient per weight. None: 1, or 100 with local steps or a metric.
        preconditioner_scale: rho_i >= 0, gradient per weight and unit of Q. None: 1, or penalty times local_steps with
            local steps or a metric.
        consensus_l2: lambda >= 0, gradient per weight; the same on every rank.
        penalty_growth: 1/gamma_i >= 1, factor on the penalty.
        penalty_growth_interval: steps from one growth to the next, >= 1.
        lr: > 0, divides penalty and preconditioner_scale; the knob for `torch.optim.lr_scheduler`.
        worker_weight: alpha_i > 0, such as this worker's number of samples; normalised over the workers.
            None on every rank weights all alike.
        process_group: the ranks that are workers; None is the default group, or one worker where there is none.
        on_nonfinite: what a NaN or infinite gradient on any rank does, on every rank: "raise" FloatingPointError,
            or "skip" the step. Weights and state stay as they were either way. Gradients alone are looked at, because
            messages would take another pass over memory: where a sum of finite messages or NSISA's momentum overflows
            (float32: gradients times worker_weight near 1e38), the step stands with weights that are not finite, and
            is first noticed by the gradients after it, which "skip" then skips for ever.
        overlap: send messages while the backward pass is still running, in several buckets; the same numbers. Between
            backward() and step() gradients and settings must then stay as they are (no clipping), and all backward
            passes of a step but the last belong into `with optimizer.accumulate():`.
        bucket_mb: with overlap, a bucket goes once it holds so many MiB of messages, before compression, > 0. None: 25,
            or 2 with compression, whose two stages then overlap.
        compression: "bf16" or "int8" messages (half or a quarter of the bytes) with error feedback; None sends them as
            they are. One more tensor of state per parameter, what compression has left out so far.
        grad_scaler: with overlap under AMP, the GradScaler, whose scale is in the gradients.
        fused: make one kernel of SISA's step with torch.compile, which takes seconds at the first step and a C++
            compiler (CPU) or Triton (CUDA). None: on CUDA where Triton and a C compiler are installed, not on the
            CPU.
        local_steps: calls of `step` from one consensus to the next; None: 1, or 20 with a metric. With more than one,
            or with a metric, the optimizer is a `LocalPISA`, which counts as a `PISA` too: further arguments and
            behaviour are that class's, and there is no preconditioner, consensus_l2, overlap, compression, grad_scaler
            or fused.
        metric: "none", "adam", "muon" or "kron"; None is "none" with one local step and "muon" with more.

    Raises:
        ValueError: a setting out of range, or ranks whose parameters differ in shape, type or number.
    """

    def __new__(cls, *args: Any, **settings: Any) -> Any:
        """A `LocalPISA` where the settings ask for local steps or a metric, as `pathlib.Path` is one of its forms."""
        return LocalPISA.of(*args, **settings) if asks_for_local_steps(settings) else super().__new__(cls)

    def __init__(
        self,
        params: Iterable[Any],
        *,
        preconditioner: Preconditioner | None = None,
        penalty: float | None = None,
        preconditioner_scale: float | None = None,
        consensus_l2: float = 0.0,
        penalty_growth: float = 1.0,
        penalty_growth_interval: int = 1,
        lr: float = 1.0,
        worker_weight: float | None = None,
        process_group: dist.ProcessGroup | None = None,
        on_nonfinite: str = "raise",
        overlap: bool = False,
        bucket_mb: float | None = None,
        compression: str | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        fused: bool | None = None,
        local_steps: int | None = None,
        metric: str | None = None,
    ) -> None:
        self._preconditioner = preconditioner or Identity()
        defaults = {
            "penalty": 1.0 if penalty is None else penalty,
            "preconditioner_scale": 1.0 if preconditioner_scale is None else preconditioner_scale,
            "consensus_l2": consensus_l2,
            "penalty_growth": penalty_growth,
            "penalty_growth_interval": penalty_growth_interval,
            "lr": lr,
        }
        communication = Communication(
            worker_weight, process_group, on_nonfinite, overlap, bucket_mb, compression, grad_scaler, fused
        )
        super().__init__(params, defaults, communication)

    def _check_group(self, settings: ParamGroup) -> None:
        if asks_for_local_steps(settings):
            raise ValueError(
                "`local_steps` and `metric` in a parameter group need local_steps > 1 or a metric for PISA itself"
            )
        super()._check_group(settings)

    def _group_preconditioner(self, group: ParamGroup) -> Preconditioner:
        return self._preconditioner


PISA.register(LocalPISA)  # `isinstance` takes both forms for a PISA
# What `help` and `inspect` show in place of the arguments of `__new__`, which are those of both forms.
_parameters = list(inspect.signature(PISA.__init__).parameters.values())[1:]
PISA.__signature__ = inspect.Signature(_parameters)  # type: ignore[attr-defined]


class SISA(ADMMOptimizer):
    """Second-moment-based inexact stochastic ADMM (Algorithm 2 of arXiv 2502.10784).

    Q_i = diag(sqrt(m_i)) + eps, m_i the second moment of pi_i + g_i. State per parameter: dual and second moment,
    as much as AdamW's. Arguments that are not listed are those of `PISA`.

    Args:
        params: parameters, named parameters or parameter groups; every setting of this list may differ by group.
        penalty: sigma_i > 0; 1/penalty is the long-run step size.
        preconditioner_scale: rho_i >= 0; rho Q / (sigma + rho Q) is the momentum.
        preconditioner: scheme of the second moment: "adam", "rmsprop" or "adagrad".
        second_moment_decay: beta in [0, 1).
        eps: added to sqrt(m_i), >= 0.
        preconditioner_bound: eta_i > 0 clips |pi_i + g_i| in the second moment; None for no bound.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        penalty: float = 1.0,
        preconditioner_scale: float = 100.0,
        preconditioner: str = "adam",
        second_moment_decay: float = 0.999,
        eps: float = 1e-8,
        preconditioner_bound: float | None = None,
        consensus_l2: float = 0.0,
        penalty_growth: float = 1.0,
        penalty_growth_interval: int = 1,
        lr: float = 1.0,
        worker_weight: float | None = None,
        process_group: dist.ProcessGroup | None = None,
        on_nonfinite: str = "raise",
        overlap: bool = False,
        bucket_mb: float | None = None,
        compression: str | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        fused: bool | None = None,
    ) -> None:
        defaults = {
            "penalty": penalty,
            "preconditioner_scale": preconditioner_scale,
            "preconditioner": preconditioner,
            "second_moment_decay": second_moment_decay,
            "eps": eps,
            "preconditioner_bound": preconditioner_bound,
            "consensus_l2": consensus_l2,
            "penalty_growth": penalty_growth,
            "penalty_growth_interval": penalty_growth_interval,
            "lr": lr,
        }
        communication = Communication(
            worker_weight, process_group, on_nonfinite, overlap, bucket_mb, compression, grad_scaler, fused
        )
        super().__init__(params, defaults, communication)

    def _group_preconditioner(self, group: ParamGroup) -> Preconditioner:
        return SecondMoment(
            scheme=group["preconditioner"],
            second_moment_decay=group["second_moment_decay"],
            eps=group["eps"],
            preconditioner_bound=group["preconditioner_bound"],
        )


class NSISA(ADMMOptimizer):
    """Newton-Schulz-based inexact stochastic ADMM (Algorithm 3 of arXiv 2502.10784).

    Matrices, and convolutions flattened to matrices, step along the orthogonalised momentum; vectors, scalars,
    parameter groups with `orthogonalize=False` and the names in `sisa_parameters` take the SISA (adam) step.
    Arguments that are not listed are those of `PISA`.

    Args:
        params: as in `SISA`; pass `model.named_parameters()` to use `sisa_parameters`.
        penalty: sigma_i > 0; 1/penalty is the long-run step size along orthogonal directions.
        preconditioner_scale: rho_i >= 0.
        momentum: mu in [0, 1).
        newton_schulz_steps: iterations, >= 1.
        newton_schulz_coefficients: "quintic" (Muon's) or "polar_express" (nearer to orthogonal at the same cost).
        newton_schulz_precision: "bfloat16" (float32 matrices are iterated in it, as Muon's are), "float32", or "auto":
            the faster of the two on this device.
        eps: added to the diagonal of Q_i, >= 0.
        second_moment_decay: beta in [0, 1) of the SISA step.
        preconditioner_bound: eta_i > 0 of the SISA step; None for no bound.
        sisa_parameters: shell patterns of parameter names that take the SISA step, such as "*embedding*".
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        penalty: float = 20.0,
        preconditioner_scale: float = 1.0,
        momentum: float = 0.95,
        newton_schulz_steps: int = 5,
        newton_schulz_coefficients: str = "quintic",
        newton_schulz_precision: str = "auto",
        eps: float = 1e-8,
        second_moment_decay: float = 0.999,
        preconditioner_bound: float | None = None,
        sisa_parameters: Iterable[str] = (),
        consensus_l2: float = 0.0,
        penalty_growth: float = 1.0,
        penalty_growth_interval: int = 1,
        lr: float = 1.0,
        worker_weight: float | None = None,
        process_group: dist.ProcessGroup | None = None,
        on_nonfinite: str = "raise",
        overlap: bool = False,
        bucket_mb: float | None = None,
        compression: str | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        fused: bool | None = None,
    ) -> None:
        if isinstance(sisa_parameters, str):
            raise ValueError(
                f"`sisa_parameters` must be a list of patterns, got {sisa_parameters!r}: use [{sisa_parameters!r}]"
            )
        sisa_parameters = tuple(sisa_parameters)
        defaults = {
            "penalty": penalty,
            "preconditioner_scale": preconditioner_scale,
            "momentum": momentum,
            "newton_schulz_steps": newton_schulz_steps,
            "newton_schulz_coefficients": newton_schulz_coefficients,
            "newton_schulz_precision": newton_schulz_precision,
            "eps": eps,
            "second_moment_decay": second_moment_decay,
            "preconditioner_bound": preconditioner_bound,
            "sisa_parameters": sisa_parameters,
            "orthogonalize": True,
            "consensus_l2": consensus_l2,
            "penalty_growth": penalty_growth,
            "penalty_growth_interval": penalty_growth_interval,
            "lr": lr,
        }
        communication = Communication(
            worker_weight, process_group, on_nonfinite, overlap, bucket_mb, compression, grad_scaler, fused
        )
        super().__init__(params, defaults, communication)
        names = [name for group in self.param_groups for name in group.get("param_names", [])]
        NewtonSchulz(sisa_parameters=sisa_parameters).check_patterns(names)

    def _group_preconditioner(self, group: ParamGroup) -> Preconditioner:
        vectors = SecondMoment(
            second_moment_decay=group["second_moment_decay"],
            eps=group["eps"],
            preconditioner_bound=group["preconditioner_bound"],
        )
        if not group["orthogonalize"]:
            return vectors
        return NewtonSchulz(
            momentum=group["momentum"],
            newton_schulz_steps=group["newton_schulz_steps"],
            newton_schulz_coefficients=group["newton_schulz_coefficients"],
            newton_schulz_precision=group["newton_schulz_precision"],
            eps=group["eps"],
            vectors=vectors,
            sisa_parameters=tuple(group["sisa_parameters"]),
        )
