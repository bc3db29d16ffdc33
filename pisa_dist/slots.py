"""Which parameters train, in which order their messages go, and which take their step together."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from pisa_dist.admm.packing import PACKED_BELOW, packs
from pisa_dist.admm.penalty import penalty_at
from pisa_dist.admm.preconditioners import NewtonSchulz, Preconditioner, SecondMoment
from pisa_dist.sharding import local_part, rule_for

ParamGroup = dict[str, Any]
BATCHED_ON = {"cuda"}  # kinds of device


def group_penalty(group: ParamGroup, step: int, lr: float) -> float:
    """sigma of a parameter group in a step, or a round, counted from 1."""
    growth, interval = group["penalty_growth"], group["penalty_growth_interval"]
    return penalty_at(step, penalty=group["penalty"], growth=growth, interval=interval, lr=lr)


class Slot(NamedTuple):
    """One trainable parameter, in message order."""

    parameter: Tensor
    name: str
    group: int
    preconditioner: Preconditioner
    is_compiled: bool

    @property
    def weights(self) -> Tensor:
        """What of the parameter lies on this rank: all of it, unless it is sharded."""
        return local_part(self.parameter)


class Bucket(NamedTuple):
    """Slots whose messages go together.

    Attributes:
        positions: of the slots in message order.
        slots: in the bucket's order.
        together: places in `slots` of those that take their step together, for each step.
    """

    positions: list[int]
    slots: list[Slot]
    together: list[list[int]]

    @classmethod
    def of(cls, slots: Sequence[Slot], positions: Sequence[int]) -> "Bucket":
        """The bucket of the slots at these positions."""
        own = [slots[position] for position in positions]
        return cls(list(positions), own, _together(own))


def _together(slots: Sequence[Slot]) -> list[list[int]]:
    """Places of the slots that take their step together: small ones in packs, and what is orthogonalised on CUDA."""
    alone: list[list[int]] = []
    stacked: dict[Any, list[int]] = {}
    small: dict[Any, list[int]] = {}
    for place, slot in enumerate(slots):
        weights, rule = slot.weights, slot.preconditioner
        alike = (rule, slot.group, weights.dtype, weights.device)
        if type(rule) is NewtonSchulz and weights.device.type in BATCHED_ON:
            stacked.setdefault((*alike, weights.shape), []).append(place)
        elif isinstance(rule, SecondMoment) and weights.numel() < PACKED_BELOW:
            small.setdefault(alike, []).append(place)
        else:
            alone.append([place])
    packed = [
        [places[i] for i in pack]
        for places in small.values()
        for pack in packs([slots[place].weights.numel() for place in places])
    ]
    return [*alone, *stacked.values(), *packed]


class Trainable(NamedTuple):
    """A parameter that trains: its name where the user has given one, what errors call it, and its group's number."""

    parameter: Tensor
    name: str | None
    label: str
    group: int


def trainable(groups: Sequence[ParamGroup]) -> list[Trainable]:
    """The parameters of all groups that train, in message order."""
    found: list[Trainable] = []
    for index, group in enumerate(groups):
        names = group.get("param_names") or [None] * len(group["params"])
        for parameter, name in zip(group["params"], names, strict=True):
            if parameter.requires_grad:
                label = name or f"parameter {len(found)} of shape {tuple(parameter.shape)}"
                found.append(Trainable(parameter, name, label, index))
    return found


def make_slots(
    groups: Sequence[ParamGroup], rules: Sequence[Preconditioner], is_compiled: Callable[[Tensor], bool]
) -> list[Slot]:
    """The trainable parameters of all groups, each with its form of the group's rule."""
    slots: list[Slot] = []
    for parameter, name, label, group in trainable(groups):
        rule = rule_for(rules[group].for_parameter(name, parameter.shape), parameter)
        slots.append(Slot(parameter, label, group, rule, is_compiled(parameter)))
    return slots


def fingerprint(groups: Sequence[ParamGroup], rules: Sequence[Preconditioner]) -> list[Any]:
    """All that the slots of these groups depend on, to be compared while the parameters live."""
    return [
        (
            rule,
            tuple(group.get("param_names") or ()),
            [(id(p), p.dtype, p.device) for p in group["params"] if p.requires_grad],
        )
        for group, rule in zip(groups, rules, strict=True)
    ]
