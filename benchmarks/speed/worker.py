"""One rank of one measurement: `worker.py TASK SPEC RESULT`; started by ranks.py, writes rank 0's result as JSON."""

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from data import random_batch, skewed_images, text_shard
from measure import BytesTouched, allocations, alternate, memory_bandwidth
from methods import Method
from models import make_model
from torch import Tensor

RANK, NUM_RANKS = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def make_method(name: str, model: str, device: str, *, seed: int = 0, settings: dict[str, Any] | None = None) -> Method:
    return Method(name, make_model(model, seed).to(device), settings)


def on(device: str, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    inputs, targets = batch
    return inputs.to(device), targets.to(device)


def step_time(
    *, model: str, methods: list[str], batch_size: int, context: int, blocks: int, steps: int, device: str = "cpu"
) -> dict[str, Any]:
    """Whole training steps of several methods in these processes, with forward and backward alone beside them."""
    made = {name: make_method(name, model, device) for name in ["compute", *methods]}
    batch = on(device, random_batch(model, batch_size, context, seed=RANK))
    work = {name: lambda method=method: method.step(*batch) for name, method in made.items()}
    parameters = sum(weight.numel() for weight in made["compute"].weights)
    if NUM_RANKS > 1:
        flat = torch.zeros(parameters, device=device)
        work["all_reduce"] = lambda: dist.all_reduce(flat)
    return {"times": alternate(work, blocks=blocks, steps=steps), "parameters": parameters}


def optimizer_only(*, model: str, methods: list[str], blocks: int, steps: int, device: str = "cpu") -> dict[str, Any]:
    """`optimizer.step()` alone on fixed gradients, with a pass over memory beside it."""
    made = {name: make_method(name, model, device) for name in methods}
    for method in made.values():
        torch.manual_seed(0)
        for weight in method.weights:
            weight.grad = 1e-3 * torch.randn_like(weight)
        method.optimize()
    work = {name: method.optimize for name, method in made.items()}
    parameters = sum(weight.numel() for weight in made[methods[0]].weights)
    work["memory"] = memory_bandwidth(2 * parameters, torch.device(device))  # as large as AdamW's four vectors
    times = alternate(work, blocks=blocks, steps=steps)
    touched = {}
    for name, method in made.items():  # after the timing: under the counter torch.compile falls back to operators
        with BytesTouched() as count:
            method.optimize()
        touched[name] = {"read": count.read, "written": count.written}
    return {"times": times, "touched": touched, "parameters": parameters}


def memory(*, model: str, methods: list[str], batch_size: int, context: int, device: str = "cpu") -> dict[str, Any]:
    """Bytes of optimizer state, of one `optimizer.step()` beyond it, and of a whole training with it."""
    found = {}
    batch = on(device, random_batch(model, batch_size, context, seed=RANK))
    for name in methods:
        network = make_model(model, 0).to(device)
        kept: list[Method] = []

        def train(name: str = name, network: torch.nn.Module = network, kept: list[Method] = kept) -> None:
            kept.append(Method(name, network))
            for _ in range(3):
                kept[0].step(*batch)

        training, resting = allocations(train)
        method = kept[0]
        method.backward(*batch)
        step, _ = allocations(method.optimize)
        found[name] = {"state": method.state_bytes(), "step": step, "training": training, "resting": resting}
    return found


def wire(*, model: str, methods: list[str], batch_size: int, context: int, steps: int) -> dict[str, Any]:
    """Bytes a rank gives to collectives in a step, and those that its own network interface sends."""
    found = {}
    batch = random_batch(model, batch_size, context, seed=RANK)
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    for name in methods:
        method = make_method(name, model, "cpu")
        method.step(*batch)
        method.step(*batch)  # DDP builds its buckets anew after the first
        dist.barrier()
        counted, before = method.count_messages(), _sent(interface)
        for _ in range(steps):
            method.step(*batch)
        dist.barrier()
        sent = None if before is None else (_sent(interface) - before) / steps
        found[name] = {"messages": counted() / steps, "interface": sent}
    return {"methods": found, "parameters": sum(weight.numel() for weight in method.weights)}


def _sent(interface: str | None) -> int | None:
    """Bytes that a network interface of this namespace has sent."""
    if interface is None:
        return None
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == interface:
            return int(numbers.split()[8])
    raise RuntimeError(f"no interface {interface}")


def link_speed(*, megabytes: int = 8) -> float:
    """Mbit/s that a rank sends in an all-reduce, for two ranks as many bytes as the buffer has."""
    buffer = torch.zeros(megabytes * 250_000)
    dist.all_reduce(buffer)
    started = time.perf_counter()
    dist.all_reduce(buffer)
    return 8 * megabytes / (time.perf_counter() - started)


def schedule(step: int, steps: int, warmup: int, decay: str) -> float:
    """Factor of every step size: linear warm-up, then constant, or a cosine to a tenth."""
    if step < warmup:
        return (step + 1) / warmup
    if decay == "constant":
        return 1.0
    done = (step - warmup) / max(1, steps - warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


def train(
    *,
    model: str,
    methods: list[dict[str, Any]],
    batch_size: int,
    context: int,
    steps: int,
    seed: int,
    warmup: int = 20,
    decay: str = "cosine",
    target: float | None = None,
    at_most: int | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Train with one method after another, each from the same weights on the same batches.

    Args:
        methods: `name` and `settings` of each.
        steps: for which step sizes are scheduled, and after which the training ends.
        target: end a method's training when the smoothed training loss is at or below this.
        at_most: end it after this many steps already.

    Returns:
        The link's speed and, for each method, the ranks' mean training loss of every step, smoothed too, the seconds
        since the start after every step, and the validation loss at the end.
    """
    shard = text_shard(RANK, NUM_RANKS, context) if model.startswith("gpt") else skewed_images(RANK, NUM_RANKS)
    validation = on(device, shard.validation)
    speed = link_speed() if NUM_RANKS > 1 else None
    runs = []
    for chosen in methods:
        method = make_method(chosen["name"], model, device, seed=seed, settings=chosen.get("settings"))
        losses, smoothed, seconds = [], [], []
        if NUM_RANKS > 1:
            dist.barrier()
        started = time.perf_counter()
        for step in range(min(steps, at_most or steps)):
            method.set_lr(schedule(step, steps, warmup, decay))
            batch = on(device, shard.batch(batch_size, seed=seed, rank=RANK, step=step))
            try:
                loss = method.step(*batch)
            except FloatingPointError:  # raised on every rank
                losses.append(math.nan)
                break
            if NUM_RANKS > 1:
                dist.all_reduce(loss)  # four bytes, for every method alike
            losses.append(loss.item() / NUM_RANKS)
            seconds.append(time.perf_counter() - started)
            smoothed.append(_smoothed(losses))
            if not math.isfinite(losses[-1]) or (target is not None and smoothed[-1] <= target):
                break
        final = math.nan
        if math.isfinite(losses[-1]):
            with torch.no_grad():
                final = method.loss(*validation).item()
        runs.append({**chosen, "losses": losses, "smoothed": smoothed, "seconds": seconds, "validation": final})
    return {"link_mbit_per_second": speed, "methods": runs}


def _smoothed(losses: list[float], window: int = 20) -> float:
    """Mean of the latest losses; infinite until there are as many as it takes."""
    return sum(losses[-window:]) / window if len(losses) >= window else math.inf


TASKS = {f.__name__: f for f in (step_time, optimizer_only, memory, wire, train)}


def main() -> None:
    task, spec, result = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    device = spec.get("device", "cpu")
    if device == "cuda":
        torch.cuda.set_device(RANK)
    if NUM_RANKS > 1:
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    found = TASKS[task](**spec)
    if RANK == 0:
        result.write_text(json.dumps(found))
    if NUM_RANKS > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
