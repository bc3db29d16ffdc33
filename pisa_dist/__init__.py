"""PISA, the Preconditioned Inexact Stochastic ADMM, on torch.distributed.

Zhou, Wang, Luo, Zhu, Li: "Preconditioned inexact stochastic ADMM for deep models", Nature Machine Intelligence
2026 (doi 10.1038/s42256-026-01182-3, arXiv 2502.10784).
"""

from pisa_dist.optim import NSISA, PISA, SISA
from pisa_dist.optim_local import LocalPISA

__version__ = "0.1.0"
__all__ = ["NSISA", "PISA", "SISA", "LocalPISA", "__version__"]
