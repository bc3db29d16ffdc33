"""How things are measured: alternating blocks, ratios of neighbours, bytes touched, bytes allocated."""

import gc
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Blocks = dict[str, list[list[float]]]


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def alternate(work: dict[str, Callable[[], object]], *, blocks: int, steps: int, warmup: int = 3) -> Blocks:
    """Seconds of each call, in blocks that alternate between the candidates.

    Every candidate has a block in every round; the order turns round after round, so that a drift of the machine
    favours nobody. The first call of a block is not counted: it finds the other candidate's data in the caches.
    A call takes as long as on the slowest rank.

    Returns:
        For every candidate one list a block, of `steps` times each.
    """
    times: Blocks = {name: [] for name in work}
    for name in work:
        for _ in range(warmup):
            work[name]()
    gc.collect()
    gc.disable()
    try:
        for number in range(blocks):
            for name in list(work) if number % 2 == 0 else list(reversed(work)):
                if dist.is_initialized():
                    dist.barrier()
                work[name]()
                synchronize()
                block, last = [], time.perf_counter()
                for _ in range(steps):
                    work[name]()
                    synchronize()
                    now = time.perf_counter()
                    block.append(now - last)
                    last = now
                times[name].append(block)
    finally:
        gc.enable()
    if not dist.is_initialized():
        return times
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, times)
    return {
        name: [
            [max(step) for step in zip(*block, strict=True)] for block in zip(*(t[name] for t in everyone), strict=True)
        ]
        for name in work
    }


def compare(times: Blocks, ours: str, baseline: str) -> dict[str, Any]:
    """Medians of the blocks' medians, and the median of the ratios of blocks that stood side by side."""
    medians = {name: [median(block) for block in times[name]] for name in (ours, baseline)}
    return ratios(medians[ours], medians[baseline], unit="s")


def ratios(ours: list[float], baseline: list[float], *, unit: str) -> dict[str, Any]:
    """An entry of results.json from pairs of measurements."""
    found = [a / b for a, b in zip(ours, baseline, strict=True)]
    return {
        "ours": median(ours),
        "baseline": median(baseline),
        "ratio": median(found),
        "lowest": min(found),
        "highest": max(found),
        "runs": len(found),
        "unit": unit,
        "each_run": [list(pair) for pair in zip(ours, baseline, strict=True)],
    }


class BytesTouched(TorchDispatchMode):
    """Counts the bytes of all tensors that torch's operators read and write while it is active.

    A lower bound of an implementation's memory traffic if every operator goes through its arguments once, which
    elementwise ones do. What an operator allocates is counted as written. Code that torch does not dispatch (a
    compiled kernel's inside) is counted by its arguments.
    """

    def __init__(self) -> None:
        super().__init__()
        self.read = self.written = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        schema, name = func._schema, func.overloadpacket.__name__
        for place, argument in enumerate(schema.arguments):
            value = args[place] if place < len(args) else (kwargs or {}).get(argument.name)
            size = _num_bytes(value)
            # torch's fused optimizers declare that they write gradients, but do so for a GradScaler only.
            is_mutated = argument.alias_info is not None and argument.alias_info.is_write and argument.name != "grads"
            if is_mutated:
                self.written += size
            # Views touch nothing, and what is only written over is not read.
            is_view = argument.alias_info is not None and not argument.alias_info.is_write
            overwritten = is_mutated and name in ("copy_", "_foreach_copy_", "zero_", "_foreach_zero_", "fill_")
            if not is_view and not overwritten and not argument.is_out:
                self.read += size
        if any(r.alias_info is None for r in schema.returns) and "empty" not in name:
            self.written += _num_bytes(result)
        return result


def _num_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, list | tuple):
        return sum(map(_num_bytes, value))
    return 0


def allocations(work: Callable[[], object]) -> tuple[int, int]:
    """Bytes by which torch's allocator stood higher than before while `work` ran, at most and at its end."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
        gc.collect()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        profile.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    level = peak = 0
    for _, change in changes:
        level += change
        peak = max(peak, level)
    return peak, level


def memory_bandwidth(num_elements: int, device: torch.device) -> Callable[[], object]:
    """A pass of a += b over float32 vectors: 12 bytes an element, and like an update nothing is written unread."""
    a, b = (torch.zeros(num_elements, device=device) for _ in range(2))
    return lambda: a.add_(b)
