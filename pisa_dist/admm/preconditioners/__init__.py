"""Preconditioners Q_i behind one small protocol."""

from pisa_dist.admm.preconditioners.base import Preconditioned, Preconditioner, State
from pisa_dist.admm.preconditioners.identity import Identity
from pisa_dist.admm.preconditioners.newton_schulz import COEFFICIENTS, PRECISIONS, NewtonSchulz, newton_schulz
from pisa_dist.admm.preconditioners.second_moment import SCHEMES, SecondMoment

__all__ = [
    "COEFFICIENTS",
    "PRECISIONS",
    "SCHEMES",
    "Identity",
    "NewtonSchulz",
    "Preconditioned",
    "Preconditioner",
    "SecondMoment",
    "State",
    "newton_schulz",
]
