"""What is compared: a model, its optimizer, and the way its ranks agree, behind one `step`."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from models import split_parameters
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from pisa_dist import NSISA, SISA

# Step sizes come from tune.py (table in README.md); they matter to losses, not to the time of a step.
DEFAULTS: dict[str, dict[str, Any]] = {
    "compute": {},
    "adamw_foreach": {"lr": 1e-3},
    "adamw_fused": {"lr": 1e-3},
    "muon": {"lr": 0.02, "rest": {"lr": 1e-3}},
    "sisa": {"penalty": 1.0, "preconditioner_scale": 100.0},
    "nsisa": {"penalty": 20.0, "preconditioner_scale": 1.0, "momentum": 0.95, "rest": {"penalty": 1.0}},
}
OWN = {"sisa": SISA, "nsisa": NSISA}


def parse(name: str) -> tuple[str, dict[str, Any]]:
    """Method and keywords of a name such as "sisa+overlap+int8"."""
    method, *options = name.split("+")
    keywords = {
        "overlap": {"overlap": True},
        "reducer": {"overlap": True},
        "fused": {"fused": True},
        "bf16": {"compression": "bf16"},
        "int8": {"compression": "int8"},
    }
    return method, {key: value for option in options for key, value in keywords[option].items()}


def send_by_reducer(model: nn.Module, optimizer: torch.optim.Optimizer) -> DistributedDataParallel:
    """The model in DDP whose communication hook sends the optimizer's messages, as an alternative to its own hooks.

    The reducer says when a bucket of gradients is complete; the gradients stay what they are.
    """
    for hook in optimizer._hooks:
        hook.remove()
    optimizer._hooks = []
    position = {id(slot.parameter): number for number, slot in enumerate(optimizer._plan.slots)}

    def send(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        for parameter in bucket.parameters():
            optimizer._gradient_arrived(position[id(parameter)])
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True, bucket_cap_mb=25)
    wrapped.register_comm_hook(None, send)
    return wrapped


class Method:
    """A model with its optimizers; `step` trains it on one batch, as a user's loop would.

    Args:
        name: a key of DEFAULTS, with "+overlap", "+fused", "+bf16" or "+int8" behind it. "+reducer" is overlap whose
            messages DDP's reducer sends off, by a communication hook, in place of our hooks on the parameters.
        model: its weights are this method's alone.
        settings: override DEFAULTS. `rest` holds those of vectors, embeddings and the last layer; without it ours
            have one parameter group.
    """

    def __init__(self, name: str, model: nn.Module, settings: dict[str, Any] | None = None) -> None:
        self.name, keywords = parse(name)
        self.model = model
        self.weights = list(model.parameters())
        chosen = {**DEFAULTS[self.name], **(settings or {})}
        rest = chosen.pop("rest", {})
        is_ours = self.name in OWN
        if is_ours:
            self.optimizers = [self._ours(chosen, rest, keywords)]
            if "+reducer" in name:
                self.model = send_by_reducer(self.model, self.optimizers[0])
        else:
            self.optimizers = self._torchs(chosen, rest)
            if dist.is_initialized() and dist.get_world_size() > 1 and self.name != "compute":
                self.model = DistributedDataParallel(model, gradient_as_bucket_view=True)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["initial_lr"] = group["lr"]

    def _ours(self, chosen: dict[str, Any], rest: dict[str, Any], keywords: dict[str, Any]) -> torch.optim.Optimizer:
        hidden, others = split_parameters(self.model)
        groups: list[dict[str, Any]] = [{"params": hidden}, {"params": others, **rest}]
        if self.name == "nsisa":
            groups[1]["orthogonalize"] = False
        elif not rest:
            groups = [{"params": self.weights}]
        return OWN[self.name](groups, **chosen, **keywords)

    def _torchs(self, chosen: dict[str, Any], rest: dict[str, Any]) -> list[torch.optim.Optimizer]:
        if self.name == "compute":
            return []
        if self.name.startswith("adamw"):
            variant = {"fused": self.name == "adamw_fused", "foreach": self.name == "adamw_foreach"}
            return [torch.optim.AdamW(self.weights, weight_decay=0.0, **variant, **chosen)]
        hidden, others = split_parameters(self.model)
        matrices = [p for p in hidden if p.ndim == 2]  # torch's Muon refuses convolutions
        others += [p for p in hidden if p.ndim != 2]
        adamw = torch.optim.AdamW(others, weight_decay=0.0, fused=True, **rest)
        return [torch.optim.Muon(matrices, weight_decay=0.0, **chosen), adamw]

    def set_lr(self, factor: float) -> None:
        """Multiply every step size by a schedule's factor."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(self.model(inputs).flatten(0, -2), targets.flatten())

    def backward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Loss of a batch, with gradients where the optimizers expect them."""
        for weight in self.weights:
            weight.grad = None
        loss = self.loss(inputs, targets)
        loss.backward()
        return loss.detach()

    def optimize(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Train on one batch; returns this rank's loss."""
        loss = self.backward(inputs, targets)
        self.optimize()
        return loss

    def state_bytes(self) -> int:
        """Bytes of all tensors in the optimizers' state."""
        states = [state for optimizer in self.optimizers for state in optimizer.state.values()]
        tensors = [value for state in states for value in state.values() if isinstance(value, Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def count_messages(self) -> Callable[[], int]:
        """Start counting the bytes that this rank gives to collectives while training; returns the counter."""
        if self.name in OWN:
            (optimizer,) = self.optimizers
            before = optimizer.bytes_sent
            return lambda: optimizer.bytes_sent - before
        counted = 0

        def count(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
            nonlocal counted
            buffer = bucket.buffer()
            counted += buffer.numel() * buffer.element_size()
            buffer.div_(dist.get_world_size())
            return dist.all_reduce(buffer, async_op=True).get_future().then(lambda future: future.value()[0])

        self.model.register_comm_hook(None, count)
        return lambda: counted
