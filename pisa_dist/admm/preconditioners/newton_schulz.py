"""NSISA's preconditioner: momentum orthogonalised by Newton-Schulz iterations."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from pisa_dist.admm.device import multiplies_bfloat16_fast
from pisa_dist.admm.preconditioners.base import Preconditioned, Preconditioner, State
from pisa_dist.admm.preconditioners.second_moment import SecondMoment
from pisa_dist.admm.updates import Scalar
from pisa_dist.checks import check_choice, check_ranges

# Coefficients (a, b, c) of each iteration; the last stands for all that follow. What singular values from 0.001 to 1
# become after five: 0.47 to 1.20 (quintic; Jordan et al., "Muon", 2024) and 0.87 to 1.12 (Polar Express; Amsel et al.,
# arXiv 2505.16932).
Coefficients = tuple[float, float, float]
COEFFICIENTS: dict[str, tuple[Coefficients, ...]] = {
    "quintic": ((3.4445, -4.7750, 2.0315),),
    "polar_express": (
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
        (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
        (1.875, -1.25, 0.375),
    ),
}
PRECISIONS = ("auto", "bfloat16", "float32")
# Polar Express needs singular values of 1 at most, rounding included.
_MARGIN = {"quintic": 1.0, "polar_express": 1.01}
# How many times wider than high a matrix must be for the iterations on its Gram matrix to have fewer operations: with n
# iterations 2 r + 4 n - 3 cubes of the height in place of n (2 r + 1), whatever n.
_WIDE = 1.5
# Keeps the zero matrix at zero instead of dividing by its norm.
SMALLEST_NORM = 1e-7


def newton_schulz(
    matrices: Tensor, *, steps: int = 5, coefficients: str = "quintic", precision: str = "float32"
) -> Tensor:
    """Approximate nearest orthogonal matrix (the polar factor U V' of M = U S V').

    Starting from X = M / ||M||_F, `steps` times
        X <- a X + (b A + c A A) X,   A = X X',
    on the transpose where that makes A the smaller Gram matrix.

    Args:
        matrices: shape [..., rows, columns], floating point; the leading dimensions are batched.
        steps: number of iterations, >= 1.
        coefficients: a key of `COEFFICIENTS`.
        precision: of the iterations for float32 matrices; other types are iterated as they are. "bfloat16" is what
            Muon does; the result is that approximate anyway. "auto" does so where it is faster: on GPUs and CPUs that
            have instructions for it, several times. Elsewhere "auto" takes float32 and, for matrices more than 1.5
            times as wide as high, iterates on A alone and multiplies X once, by the product of the polynomials: nearly
            half the time where X is four times as wide, with rounding errors of up to 1e-3.

    Returns:
        Tensor of the same shape and dtype.
    """
    table = COEFFICIENTS[coefficients]
    tall = matrices.shape[-2] > matrices.shape[-1]
    x: Tensor = matrices.mT if tall else matrices
    x = x / (_MARGIN[coefficients] * torch.linalg.matrix_norm(x, keepdim=True) + SMALLEST_NORM)
    is_halved = precision == "bfloat16" or (precision == "auto" and multiplies_bfloat16_fast(x.device.type))
    if is_halved and x.dtype == torch.float32:
        x = x.bfloat16()
    if x.ndim > 2:
        x = x.reshape(-1, *x.shape[-2:])
    is_wide = x.shape[-1] > _WIDE * x.shape[-2]
    iterate = _iterate_gram if is_wide and precision == "auto" and x.dtype == torch.float32 else _iterate
    x = iterate(x, [table[min(step, len(table) - 1)] for step in range(steps)])
    return (x.mT if tall else x).to(matrices.dtype).reshape(matrices.shape)


def _iterate(x: Tensor, schedule: Sequence[Coefficients]) -> Tensor:
    """The iterations as they are written: two products of the size of X in each."""
    add_product = torch.addmm if x.ndim == 2 else torch.baddbmm
    for a, b, c in schedule:
        gram = x @ x.mT
        polynomial = add_product(gram, gram, gram, beta=b, alpha=c)
        x = add_product(x, polynomial, x, beta=a)
    return x


def _iterate_gram(x: Tensor, schedule: Sequence[Coefficients]) -> Tensor:
    """The same on the Gram matrix alone: two products of the size of X in all.

    With p_k = a I + b A + c A A, which commutes with A, an iteration is X <- p_k X and A <- p_k A p_k. So the result is
    (p_n ... p_1) X. Rounding errors of A grow with the iterations where its eigenvalues are small. In float32 they come
    to 1e-3 at most, far below the 0.1 to 0.5 by which five iterations miss the polar factor; bfloat16 would not do.
    """
    add_product = torch.addmm if x.ndim == 2 else torch.baddbmm
    gram, factor = x @ x.mT, None
    for step, (a, b, c) in enumerate(schedule, start=1):
        polynomial = add_product(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        factor = polynomial if factor is None else polynomial @ factor
        if step < len(schedule):
            gram = polynomial @ gram @ polynomial
    return x if factor is None else factor @ x


def momentum_update(momentum_buffer: Tensor, gradient: Tensor, *, momentum: float) -> Tensor:
    """b_i <- mu b_i + g_i (NSISA, Algorithm 3)."""
    return momentum * momentum_buffer + gradient


def nesterov_momentum(momentum_buffer: Tensor, gradient: Tensor, *, momentum: float) -> Tensor:
    """g_i + mu b_i, what is orthogonalised (NSISA, Algorithm 3); b_i after its update."""
    return gradient + momentum * momentum_buffer


def orthogonal_direction(matrices: Tensor, *, steps: int, coefficients: str, precision: str) -> Tensor:
    """o_i = NewtonSchulz(M), scaled by sqrt(max(1, rows / columns)) (NSISA, Algorithm 3).

    Args:
        matrices: M = g_i + mu b_i, shape [..., rows, columns].
        steps, coefficients, precision: of `newton_schulz`.
    """
    rows, columns = matrices.shape[-2:]
    scale: float = max(1.0, rows / columns) ** 0.5
    return scale * newton_schulz(matrices, steps=steps, coefficients=coefficients, precision=precision)


@dataclass(frozen=True)
class NewtonSchulz(Preconditioner):
    """o_i in the gradient's place and Q_i = diag(|pi_i + o_i|) + eps (NSISA, Algorithm 3).

    Convolutions [out, in, height, width] are flattened to matrices [out, in * height * width]. Vectors, scalars
    and the parameters named in `sisa_parameters` take the step of `vectors` instead. Where pi_i + o_i is exactly
    zero the paper perturbs it by eps^t to keep Q_i positive; eps in Q_i does so already, and the step stays zero.

    Args:
        momentum: mu in [0, 1).
        newton_schulz_steps: iterations, >= 1.
        newton_schulz_coefficients: "quintic" (Muon's) or "polar_express" (nearer to orthogonal at the same cost).
        newton_schulz_precision: "bfloat16" (float32 matrices are iterated in it), "float32", or "auto": the faster.
        eps: added to the diagonal, >= 0.
        vectors: preconditioner of what is not orthogonalised.
        sisa_parameters: shell patterns of parameter names, such as "*embedding*", that take the step of `vectors`.
    """

    momentum: float = 0.95
    newton_schulz_steps: int = 5
    eps: float = 1e-8
    vectors: Preconditioner = field(default_factory=SecondMoment)
    sisa_parameters: tuple[str, ...] = ()
    newton_schulz_coefficients: str = "quintic"
    newton_schulz_precision: str = "auto"

    def __post_init__(self) -> None:
        check_ranges(vars(self))
        check_choice("newton_schulz_coefficients", self.newton_schulz_coefficients, tuple(COEFFICIENTS))
        check_choice("newton_schulz_precision", self.newton_schulz_precision, PRECISIONS)

    def check_patterns(self, names: Sequence[str | None]) -> None:
        """Refuse patterns in `sisa_parameters` that name nothing: the head would be orthogonalised in silence.

        Args:
            names: of all parameters; None where they are not known.

        Raises:
            ValueError: names the first pattern that matches no parameter.
        """
        known = [name for name in names if name is not None]
        for pattern in self.sisa_parameters:
            if not any(fnmatchcase(name, pattern) for name in known):
                found = ", ".join(known) or "parameters without names: pass model.named_parameters()"
                raise ValueError(f"`sisa_parameters` pattern {pattern!r} matches no parameter, there are {found}")

    def init_state(self, dual: Tensor) -> State:  # noqa: D102 - as in the protocol
        return {"momentum_buffer": torch.zeros_like(dual)}

    def precondition(  # noqa: D102 - as in the protocol
        self, state: State, dual: Tensor, gradient: Tensor, *, step: Scalar, shape: torch.Size
    ) -> Preconditioned:
        buffer = momentum_update(state["momentum_buffer"], gradient, momentum=self.momentum)
        averaged = nesterov_momentum(buffer, gradient, momentum=self.momentum)
        direction = self.orthogonalize(averaged, shape=shape)
        return Preconditioned(direction, (dual + direction).abs().add_(self.eps), {"momentum_buffer": buffer})

    def orthogonalize(self, averaged: Tensor, *, shape: torch.Size) -> Tensor:
        """o_i of a parameter of this shape, behind any worker dimensions; convolutions count as matrices."""
        workers = averaged.shape[: averaged.ndim - len(shape)]
        matrices = averaged.reshape(*workers, shape[0], shape[1:].numel())
        return orthogonal_direction(
            matrices,
            steps=self.newton_schulz_steps,
            coefficients=self.newton_schulz_coefficients,
            precision=self.newton_schulz_precision,
        ).reshape(averaged.shape)

    def for_parameter(self, name: str | None, shape: torch.Size) -> Preconditioner:
        """This preconditioner for matrices and convolutions, `vectors` for the rest and what the user named."""
        named = name is not None and any(fnmatchcase(name, pattern) for pattern in self.sisa_parameters)
        return self.vectors if named or len(shape) < 2 else self
