"""The cost model of docs/scaling.md: what a step of one worker costs, and what that means for many devices.

    python benchmarks/scaling.py

Prints the tables of docs/scaling.md. `--bandwidth`, `--link` and so on put in another machine.
"""

import argparse
import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Machine:
    """One device and its links; bytes and operations per second, seconds."""

    flops: float = 400e12  # bf16 dense operations that a training step reaches on an H100-class device
    memory_bandwidth: float = 2.7e12  # of 3.35e12 on paper
    link: float = 45e9  # network bandwidth of one device, of 400 Gbit/s on paper
    inner_link: float = 300e9  # between the devices of a node, of 450e9 on paper
    latency: float = 10e-6  # of one message between devices
    memory: float = 80e9


@dataclass(frozen=True)
class Job:
    """A training: model, batch, layout."""

    parameters: float = 7e9
    tokens: float = 16384.0  # of one worker in one step
    workers: int = 64
    shards: int = 1  # devices that share one worker (FSDP2)
    message_bytes: float = 4.0  # of one number on the wire: 4 float32, 2 bf16, 1.016 int8 in blocks of 256
    state_bytes: float = 16.0  # weights, gradient, dual, second moment, in float32


def compute(job: Job, machine: Machine) -> float:
    """Forward and backward pass: 6 operations a parameter and token, shared by the worker's devices."""
    return 6 * job.parameters * job.tokens / (machine.flops * job.shards)


def update(job: Job, machine: Machine, *, passes: float = 12.0) -> float:
    """SISA's step moves 12 numbers a parameter in two passes (7 where a worker is alone, as AdamW does), in float32."""
    return 4 * passes * job.parameters / (machine.memory_bandwidth * job.shards)


def ring(job: Job, machine: Machine) -> float:
    """All-reduce in a ring: 2 (R - 1)/R messages of the shard's size over each link, 2 (R - 1) latencies."""
    r, size = job.workers, job.message_bytes * job.parameters / job.shards
    return 2 * (r - 1) / r * size / machine.link + 2 * (r - 1) * machine.latency


def tree(job: Job, machine: Machine) -> float:
    """All-reduce in a double binary tree: 2 messages of the shard's size, 2 log2(R) latencies."""
    size = job.message_bytes * job.parameters / job.shards
    return 2 * size / machine.link + 2 * math.log2(max(2, job.workers)) * machine.latency


def shard_traffic(job: Job, machine: Machine) -> float:
    """FSDP2 inside a worker: weights gathered in forward and backward pass, gradients scattered, all in bf16."""
    return 3 * 2 * job.parameters * (job.shards - 1) / job.shards / machine.inner_link


def step(job: Job, machine: Machine) -> dict[str, float]:
    """Seconds of a step: its parts, their sum, and what is left where communication hides behind computing.

    The messages of a bucket travel during the rest of the backward pass, which takes two thirds of the computing.
    """
    parts = {
        "compute": compute(job, machine),
        "update": update(job, machine),
        "shards": shard_traffic(job, machine),
        "consensus": min(ring(job, machine), tree(job, machine)),
    }
    backward = parts["compute"] * 2 / 3
    visible = max(0.0, parts["shards"] - parts["compute"]) + max(0.0, parts["consensus"] - backward)
    parts["overlapped"] = parts["compute"] + parts["update"] + visible
    parts["one after the other"] = sum(parts[key] for key in ("compute", "update", "shards", "consensus"))
    return parts


def memory(job: Job) -> float:
    """Bytes on one device besides activations: weights, gradient, dual and moment, and the messages on their way."""
    return (job.state_bytes + job.message_bytes) * job.parameters / job.shards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in vars(Machine()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=value)
    machine = Machine(**vars(parser.parse_args()))
    columns = ("compute", "update", "shards", "consensus", "one after the other", "overlapped")
    head = ("devices", "workers x shards", "messages", "GB a device", *columns)
    print(f"| {' | '.join(head)} |\n|{' --- |' * len(head)}")
    for devices in (64, 1024, 16384):
        for kind, message_bytes in (("float32", 4.0), ("int8", 1.016)):
            for link in (machine.link, machine.link / 40):
                job = Job(workers=devices // 8, shards=8, tokens=8 * 16384.0, message_bytes=message_bytes)
                seconds = step(job, replace(machine, link=link))
                row = (
                    f"{devices:,}",
                    f"{job.workers:,} x {job.shards}",
                    f"{kind}, {8e-9 * link:.0f} Gbit/s",
                    f"{memory(job) / 1e9:.0f}",
                    *(f"{1e3 * seconds[key]:.0f} ms" for key in columns),
                )
                print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
