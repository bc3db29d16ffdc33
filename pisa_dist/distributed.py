"""Process groups, ranks and devices, and the start-up check that all ranks hold the same model."""

import hashlib
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not in its __all__

Found = TypeVar("Found")

_SECONDS_FOR_AN_ANSWER = timedelta(seconds=2)


def select_device(name: str, *, local_rank: int = 0) -> torch.device:
    """The device called `name`; "auto" is this rank's CUDA device where there is one, else the CPU.

    Raises:
        ValueError: the name is no device, or the device is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"`device` must be auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "cuda":
        count = torch.cuda.device_count()
        index = local_rank % max(count, 1) if device.index is None else device.index
        if count == 0:
            raise ValueError(f"`device` {name!r} needs a CUDA device, and this machine has none: use cpu or auto")
        if index >= count:
            raise ValueError(f"`device` must be one of the {count} CUDA devices of this machine, got {name!r}")
        return torch.device("cuda", index)
    if device.type != "cpu":
        raise ValueError(f"`device` must be auto, cpu, cuda or cuda:N, got {name!r}")
    return device


def launched_ranks() -> tuple[int, int, int]:
    """(rank, number of ranks, local rank) as torchrun or srun set them in the environment; (0, 1, 0) alone.

    Under srun the rendezvous is taken from Slurm's own variables, unless MASTER_ADDR is set.

    Raises:
        ValueError: a variable is no number, or they contradict each other; names it.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if not {"RANK", "WORLD_SIZE"} & set(os.environ):
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
        if names[0] not in os.environ or _from_environment(names[1], 1) == 1:
            return 0, 1, 0
    num_ranks = _from_environment(names[1], 1, low=1)
    rank = _from_environment(names[0], 0 if num_ranks == 1 else None, high=num_ranks - 1)
    return rank, num_ranks, _from_environment(names[2], 0)


def _from_environment(name: str, default: int | None, *, low: int = 0, high: int | None = None) -> int:
    """A whole number that a launcher put into the environment."""
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    allowed = f"an integer >= {low}" if high is None else f"an integer in [{low}, {high}]"
    number = int(text) if text is not None and re.fullmatch("[+-]?[0-9]{1,9}", text) else low - 1
    if number < low or (high is not None and number > high):
        raise ValueError(
            f"the environment's {name} must be {allowed}, got {'nothing' if text is None else repr(text)}: "
            "torchrun and srun set it; unset RANK and WORLD_SIZE to run alone"
        )
    return number


@contextmanager
def process_group(device: torch.device, *, timeout: timedelta = timedelta(minutes=10)) -> Iterator[None]:
    """Join the process group that torchrun or srun launched; do nothing alone or where one exists already.

    Objects and the ranks' errors travel by gloo; tensors of a CUDA device, which becomes this process's current one,
    by NCCL.

    Raises:
        ConnectionError: the ranks did not come together within `timeout`.
        ValueError: two ranks have the same CUDA device.
    """
    rank, num_ranks, _ = launched_ranks()
    if num_ranks == 1 or dist.is_initialized():
        yield
        return
    os.environ.setdefault("MASTER_ADDR", os.environ.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1"))
    # One port per job, so that two on one node do not meet, below those that systems give to outgoing connections.
    os.environ.setdefault("MASTER_PORT", str(15000 + _from_environment("SLURM_JOB_ID", 0) % 15000))
    _from_environment("MASTER_PORT", None, low=1, high=65535)
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    try:
        store = _store_of_this_attempt(rank, num_ranks, timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=num_ranks, timeout=timeout)
    except RuntimeError as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ConnectionError(
            f"the {num_ranks} ranks did not come together at {place} (MASTER_ADDR and MASTER_PORT; timeout_seconds is "
            f"{timeout.total_seconds():g}): {str(error).strip().splitlines()[0]}"
        ) from error
    try:
        if device.type == "cuda":
            places: list[str] = [""] * num_ranks
            name = str(torch.cuda.get_device_properties(device).uuid)
            dist.all_gather_object(places, f"{name} of {platform.node()}")
            require_own_devices(places)
        yield
    finally:
        dist.destroy_process_group()


def require_own_devices(places: Sequence[str]) -> None:
    """Refuse two ranks on one CUDA device, which NCCL cannot serve; many workers on one rank share it well.

    Args:
        places: the device of each rank, named so that no two devices have one name.

    Raises:
        ValueError: names the first two ranks that share one.
    """
    for rank, place in enumerate(places):
        if place in places[:rank]:
            raise ValueError(
                f"ranks {places.index(place)} and {rank} share the CUDA device {place}: start one process for each "
                "device, which may host many workers, or use device=cpu"
            )


def _store_of_this_attempt(rank: int, num_ranks: int, timeout: timedelta) -> TCPStore | None:
    """A new store where torchrun lends its own to one attempt after another, as torch 2.13 does; else None.

    In a store that has served before, a restarted rank finds the addresses of the ranks that are gone and calls them.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    host, key = os.environ["MASTER_ADDR"], "pisa_dist/port"
    lent = TCPStore(host, int(os.environ["MASTER_PORT"]), num_ranks, is_master=False, timeout=timeout)
    if rank == 0:
        own = TCPStore(host, 0, num_ranks, is_master=True, timeout=timeout, wait_for_workers=False)
        lent.set(key, str(own.port))
        return own
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        try:  # the port may be that of the attempt before, where nobody answers
            own = TCPStore(host, int(lent.get(key)), num_ranks, is_master=False, timeout=_SECONDS_FOR_AN_ANSWER)
        except dist.DistError:
            if time.monotonic() > deadline:
                raise
        else:
            own.set_timeout(timeout)
            return own


def on_every_rank(find: Callable[[], Found]) -> Found:
    """What this rank finds, once every rank of the default group has found its own.

    Raises:
        ValueError: one of them met a ValueError or OSError: on every rank alike, so that none is left waiting. Names
            the rank unless all met the same.
    """
    if not dist.is_initialized():
        return find()
    found: Found | None = None
    error: str | None = None
    try:
        found = find()
    except (ValueError, OSError) as failure:
        error = str(failure)
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    rank = next((rank for rank, met in enumerate(errors) if met is not None), None)
    if rank is not None:
        raise ValueError(errors[rank] if len(set(errors)) == 1 else f"rank {rank}: {errors[rank]}")
    return cast(Found, found)


def on_first_rank(find: Callable[[], Found]) -> Found:
    """What rank 0 finds, on every rank of the default group.

    Raises:
        ValueError: rank 0 met a ValueError or OSError: on every rank alike, so that none is left waiting.
    """
    if not dist.is_initialized():
        return find()
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = find()
        except (ValueError, OSError) as error:
            answer[1] = str(error)
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise ValueError(answer[1])
    found: Found = answer[0]
    return found


def require_same(description: Sequence[str], *, group: dist.ProcessGroup | None, device: torch.device) -> None:
    """Check that every rank describes its model alike, so that a mismatch is an error and never a hang.

    Args:
        description: a line per parameter or setting that must agree.
        group: the ranks that take part; None for the default group.
        device: where tensors for the group's backend must live.

    Raises:
        ValueError: on every rank, naming the first line that differs and the two ranks.
    """
    digest = hashlib.sha256("\n".join(description).encode()).digest()[:8]
    mine = torch.tensor([int.from_bytes(digest, "little", signed=True)], device=device)
    digests = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(digests, mine, group=group)
    values = [int(value) for value in digests]
    if len(set(values)) == 1:
        return
    # Every rank has seen the same digests, so every rank gets here and the second collective cannot hang.
    descriptions: list[list[str]] = [[] for _ in values]
    dist.all_gather_object(descriptions, list(description), group=group)
    other = next(rank for rank, value in enumerate(values) if value != values[0])
    first, second = descriptions[0], descriptions[other]
    length = max(len(first), len(second))
    padded = [lines + ["nothing"] * (length - len(lines)) for lines in (first, second)]
    here, there = next((a, b) for a, b in zip(*padded, strict=True) if a != b)
    raise ValueError(f"the models differ across ranks: rank 0 has {here}, rank {other} has {there}")


def broadcast_(tensors: Sequence[Tensor], *, group: dist.ProcessGroup | None) -> None:
    """Overwrite tensors by those of the group's first rank, one broadcast per floating type."""
    for dtype in sorted({t.dtype for t in tensors}, key=str):
        same = [t for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.detach().flatten() for t in same])
        dist.broadcast(flat, group_src=0, group=group)
        with torch.no_grad():
            for tensor, piece in zip(same, torch.split(flat, [t.numel() for t in same]), strict=True):
                tensor.copy_(piece.view_as(tensor))
