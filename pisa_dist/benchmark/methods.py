"""The methods of the heterogeneity benchmark and the settings that each is tuned over. A new one is one entry."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pisa_dist.benchmark.protocols import LOCAL, ONE_STEP, Protocol

Setting = tuple[str, ...]


@dataclass(frozen=True)
class Method:
    """A method with its overrides.

    Attributes:
        label: what tables and figures call it.
        overrides: what it is, in every protocol and cell.
        settings: what it may be tuned over, in order, see `to_try`; a single one is taken as it is.
        kind: LOCAL or ONE_STEP: how it spends a round.
        ours: whether it belongs to PISA's family, whose members do not count as each other's rivals.
        settings_in: settings for single protocols or models, in place of `settings`; a protocol's come first.
    """

    label: str
    overrides: Setting
    settings: Sequence[Setting] = ((),)
    kind: str = LOCAL
    ours: bool = False
    settings_in: Mapping[str, Sequence[Setting]] = field(default_factory=dict)

    def settings_for(self, protocol: Protocol, dataset: str) -> list[Setting]:
        """What it may be tuned over in this protocol, on this data set."""
        names = (protocol.name, protocol.models[dataset])
        chosen = next((self.settings_in[name] for name in names if name in self.settings_in), self.settings)
        return [tuple(setting) for setting in chosen]


# Settings on either side of the first three, tried only if the best one so far lies next to them.
BEYOND = 2


def to_try(settings: Sequence[Setting], accuracies: Mapping[Setting, float]) -> list[Setting]:
    """Which settings tuning still needs: the middle ones, then the neighbours of the best as long as one is untried.

    So a method is tuned over three settings, and over at most two more where its best one is at an end.

    Args:
        settings: from one end of a range to the other.
        accuracies: of those that were tried.
    """
    first = settings[BEYOND:-BEYOND] or settings
    if untried := [setting for setting in first if setting not in accuracies]:
        return untried
    place = settings.index(best(settings, accuracies))
    return [setting for setting in settings[max(0, place - 1) : place + 2] if setting not in accuracies]


def best(settings: Sequence[Setting], accuracies: Mapping[Setting, float]) -> Setting:
    """Of the settings that were tried the most accurate one, of equals the first."""
    return max((setting for setting in settings if setting in accuracies), key=lambda setting: accuracies[setting])


def _range(key: str, *values: float, also: Setting = ()) -> list[Setting]:
    return [(f"algorithm.{key}={value:g}", *also) for value in values]


def _lr(*values: float, also: Setting = ()) -> list[Setting]:
    return _range("lr", *values, also=also)


def _local_sgd(name: str, label: str, *, momentum: bool = False) -> Method:
    """Local SGD; NIID-Bench gives it lr .01 and momentum .9, which is a long-run step of .1.

    Elsewhere, on the MLP with 100 samples a step: on Fashion-MNIST with one class per worker .03 is best and .01 worse,
    iid .1 and .3 are equal.
    """
    mlp, cnn = _lr(0.003, 0.01, 0.03, 0.1, 0.3, 1, 3), _lr(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1)
    niid = _lr(0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, also=("algorithm.momentum=0.9",)) if momentum else mlp
    return Method(label, (f"algorithm={name}",), mlp, settings_in={"niid": niid, "cnn": cnn})


def _synchronous(optimizer: str, mlp: Sequence[float], cnn: Sequence[float], *options: str) -> Method:
    """A torch optimizer on the averaged gradient, with the learning rates that it is tuned over on each model."""
    extra = tuple(f"+algorithm.optimizer_options.{option}" for option in options)
    overrides = ("algorithm=synchronous", f"algorithm.optimizer={optimizer}", *extra)
    return Method(f"synchronous {optimizer}", overrides, _lr(*mlp), kind=ONE_STEP, settings_in={"cnn": _lr(*cnn)})


ADAMW = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
ADAMW_CNN = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)
SGD = (0.003, 0.01, 0.03, 0.1, 0.3, 1, 3)
# Muon takes the matrices only; convolutions and biases take AdamW at the same lr, so a CNN wants a smaller one.
MUON = (0.0125, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8)
MUON_CNN = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)

METHODS: dict[str, Method] = {
    "pisa": Method("PISA, untuned", ("algorithm=pisa_auto",), ours=True),
    "pisa_constant": Method("PISA, constant penalty", ("algorithm=pisa_local",), ours=True),
    "pisa_tuned": Method("PISA, tuned", ("algorithm=pisa_auto",), _lr(0.125, 0.25, 0.5, 1, 2, 4, 8), ours=True),
    "sisa": Method(
        "SISA",
        ("algorithm=sisa",),
        _range("penalty", 0.03125, 0.125, 0.5, 2, 8, 32, 128),
        kind=ONE_STEP,
        ours=True,
    ),
    "synchronous_adamw": _synchronous("AdamW", ADAMW, ADAMW_CNN),
    "synchronous_sgd": _synchronous("SGD", SGD, SGD, "momentum=0.9"),
    "synchronous_muon": _synchronous("Muon", MUON, MUON_CNN),
    "fedavg": _local_sgd("fedavg", "FedAvg", momentum=True),
    "fedprox": _local_sgd("fedprox", "FedProx", momentum=True),
    "scaffold": _local_sgd("scaffold", "SCAFFOLD"),
    "fednova": _local_sgd("fednova", "FedNova", momentum=True),
    "feddyn": _local_sgd("feddyn", "FedDyn"),
    "mifa": _local_sgd("mifa", "MIFA"),
    "diloco": Method("DiLoCo", ("algorithm=diloco",), _lr(0.00001, 0.00003, 0.0001, 0.0003, 0.001, 0.003, 0.01)),
}


def check_methods(names: Sequence[str]) -> None:
    """Refuse a name that is not in the table.

    Raises:
        ValueError: one line that lists the known ones.
    """
    for name in names:
        if name not in METHODS:
            raise ValueError(f"--method must be of {', '.join(METHODS)}, got {name!r}")


def label(name: str) -> str:
    """What a method is called; its name for one that is no longer in the table."""
    return METHODS[name].label if name in METHODS else name


def is_ours(name: str) -> bool:
    """Whether a method belongs to PISA's family."""
    return name in METHODS and METHODS[name].ours
