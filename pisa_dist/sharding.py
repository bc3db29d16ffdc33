"""Workers that are groups of ranks: parameters that FSDP2 (`fully_shard`) has dealt among the ranks of one worker.

On a mesh of replicas x shards each replica is one worker. Every rank steps on its own shards, and its messages go to
the ranks that hold the same shards of the other workers: `process_group=mesh["replicate"].get_group()`. Only what is
orthogonalised (NSISA) is gathered, one matrix at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from pisa_dist.admm.preconditioners import NewtonSchulz, Preconditioner


def local_part(tensor: Tensor) -> Tensor:
    """This rank's shard, which shares the memory; a plain tensor is its own."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_like(parameter: Tensor, local: Tensor) -> Tensor:
    """A tensor that lies as `parameter` does and has this shard here; for a plain parameter the shard itself."""
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def shard_group(parameters: Sequence[Tensor]) -> dist.ProcessGroup | None:
    """The ranks among which a worker's parameters are dealt; None where they are not.

    Raises:
        ValueError: they are dealt over more than one dimension of a mesh.
    """
    for parameter in parameters:
        if isinstance(parameter, DTensor):
            mesh = parameter.device_mesh
            if mesh.ndim != 1:
                raise ValueError(
                    f"parameters must be sharded over one mesh dimension, got {mesh.ndim}: give fully_shard only the "
                    'shard dimension, mesh=mesh["shard"]'
                )
            return mesh.get_group()
    return None


def sum_over(group: dist.ProcessGroup | None, values: Sequence[float], device: torch.device) -> list[float]:
    """A few numbers summed over the ranks of a worker; as they are where `group` is None: it is one rank."""
    if group is None:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64).to(device)
    dist.all_reduce(total, group=group)
    summed: list[float] = total.tolist()
    return summed


def require_replicas(group: dist.ProcessGroup | None, shards: dist.ProcessGroup | None) -> None:
    """Refuse to sum different shards of one worker.

    Args:
        group: the ranks that exchange messages; None is the default group.
        shards: the ranks of this worker; None where it is one rank.

    Raises:
        ValueError: a rank is in both, besides this one.
    """
    if shards is None:
        return
    common = set(dist.get_process_group_ranks(shards)) & set(dist.get_process_group_ranks(group or dist.group.WORLD))
    if common != {dist.get_rank()}:
        raise ValueError(
            f"`process_group` must hold one rank of each worker, got ranks {sorted(common)} of one worker whose "
            'parameters are sharded: pass process_group=mesh["replicate"].get_group()'
        )


@dataclass(frozen=True)
class ShardedNewtonSchulz(NewtonSchulz):
    """`NewtonSchulz` for one sharded parameter: gathers what is orthogonalised, and keeps this rank's shard of it."""

    parameter: DTensor | None = None

    def orthogonalize(self, averaged: Tensor, *, shape: torch.Size) -> Tensor:  # noqa: D102 - as in NewtonSchulz
        if self.parameter is None:
            return super().orthogonalize(averaged, shape=shape)
        whole = sharded_like(self.parameter, averaged).full_tensor()  # type: ignore[attr-defined]
        direction = super().orthogonalize(whole, shape=shape)
        mesh = self.parameter.device_mesh
        same = DTensor.from_local(direction, mesh, [Replicate()], run_check=False)
        return same.redistribute(mesh, self.parameter.placements).to_local()


def rule_for(rule: Preconditioner, parameter: Tensor) -> Preconditioner:
    """The preconditioner's form for a parameter that may be sharded."""
    if not isinstance(parameter, DTensor) or not isinstance(rule, NewtonSchulz):
        return rule
    return ShardedNewtonSchulz(**{f.name: getattr(rule, f.name) for f in fields(rule)}, parameter=parameter)
