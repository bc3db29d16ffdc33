"""Distributed methods, one file each, found by name."""

import pkgutil
from importlib import import_module

from pisa_dist.algorithms.base import Algorithm

for _module in pkgutil.iter_modules(__path__, prefix=f"{__name__}."):
    import_module(_module.name)

ALGORITHMS: dict[str, type[Algorithm]] = dict(Algorithm.registry)
"""Every method by the name that `algorithm=` takes."""

__all__ = ["ALGORITHMS", "Algorithm"]
