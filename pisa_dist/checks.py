"""Range checks whose errors name key, symbol, range and value; each knob is declared once."""

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from textwrap import shorten
from typing import Any, NamedTuple


class Range(NamedTuple):
    """Values that a knob may take: `low` to `high`, the ends included where the flag says so."""

    low: float
    high: float = math.inf
    low_included: bool = True
    high_included: bool = False
    symbol: str = ""
    integer: bool = False

    def __contains__(self, value: Any) -> bool:
        if not _is_number(value) or not math.isfinite(value):
            return False
        if self.integer and not isinstance(value, Integral):
            return False
        above: bool = value >= self.low if self.low_included else value > self.low
        below: bool = value <= self.high if self.high_included else value < self.high
        return above and below

    def __str__(self) -> str:
        kind = "an integer " if self.integer else ""
        low, high = (int(end) if math.isfinite(end) and end == int(end) else end for end in (self.low, self.high))
        if high == math.inf:
            return f"{kind}{'>=' if self.low_included else '>'} {low}"
        opening, closing = "(["[self.low_included], ")]"[self.high_included]
        return f"{kind}in {opening}{low}, {high}{closing}"


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _positive(symbol: str = "") -> Range:
    return Range(0.0, low_included=False, symbol=symbol)


def _count(low: int = 1) -> Range:
    return Range(low, integer=True)


RANGES: dict[str, Range] = {
    "penalty": _positive("sigma"),
    "preconditioner_scale": Range(0.0, symbol="rho"),
    "second_moment_decay": Range(0.0, 1.0, symbol="beta"),
    "momentum": Range(0.0, 1.0, symbol="mu"),
    "eps": Range(0.0),
    "preconditioner_bound": _positive("eta"),
    "consensus_l2": Range(0.0, symbol="lambda"),
    "penalty_factors": _positive(),
    "penalty_growth": Range(1.0, symbol="1/gamma"),
    "penalty_growth_interval": _count(),
    "newton_schulz_steps": _count(),
    "lr": _positive(),
    "weight_decay": Range(0.0),
    "worker_weight": _positive("alpha"),
    "bucket_mb": _positive(),
    "proximal": Range(0.0, symbol="mu"),
    "server_lr": _positive(),
    "option": Range(1, 2, high_included=True, integer=True),
    "regularization": _positive("alpha"),
    "first_moment_decay": Range(0.0, 1.0, symbol="beta_1"),
    "outer_lr": _positive(),
    "outer_momentum": Range(0.0, 1.0),
    "relaxation": Range(0.0, symbol="kappa"),
    "metric_rounds": _count(),
    "metric_interval": _count(),
    "num_workers": _count(),
    "rounds": _count(),
    "batch_size": _count(),
    "local_steps": Range(1, 1_000_000, high_included=True, integer=True),
    "local_epochs": _positive(),
    "consensus_trim": Range(0.0, 0.5),
    "participation": Range(0.0, 1.0, low_included=False, high_included=True),
    "mean_up": Range(1.0),
    "mean_down": Range(1.0),
    "speeds": _positive(),
    "speed_spread": Range(1.0),
    "period": _positive(),
    "seed": Range(0, 2**32 - 1, high_included=True, integer=True),
    "eval_every": _count(),
    "every": _count(0),
    "every_seconds": Range(0.0),
    "keep_last": _count(),
    "max_seconds": _positive(),
    "timeout_seconds": Range(1.0),
    "num_train": _count(),
    "validation_fraction": Range(0.0, 1.0),
    "labels_per_worker": _count(),
    "dirichlet_concentration": Range(0.0, 1e6, low_included=False, high_included=True),
    "noise_level": Range(0.0),
}


def check_ranges(values: Mapping[str, Any], *, prefix: str = "", optional: Sequence[str] = ()) -> None:
    """Refuse the first value that lies outside its knob's range.

    Args:
        values: value of each knob by its name, or a list of values; names without a declared range are passed over.
        prefix: where the knobs stand in the configuration, such as "algorithm."; empty for a Python call.
        optional: knobs that may be None.

    Raises:
        ValueError: "`algorithm.penalty` (sigma) must be > 0, got -1.0" or "`lr` must be a number > 0, got None".
    """
    for name, value in values.items():
        if name not in RANGES or (value is None and name in optional):
            continue
        allowed = RANGES[name]
        items = {f"{name}[{i}]": item for i, item in enumerate(value)} if isinstance(value, list) else {name: value}
        for key, item in items.items():
            if item not in allowed:
                symbol = f" ({allowed.symbol})" if allowed.symbol else ""
                kind = "" if _is_number(item) or allowed.integer else "a number "
                shown = shorten(repr(item), 100, placeholder=" ...")  # a tensor's has several lines
                raise ValueError(f"`{prefix}{key}`{symbol} must be {kind}{allowed}, got {shown}")


def plain_number(value: Any) -> Any:
    """A number as Python's own int or float, such as numpy's or one in a tensor of one element; else `value` itself."""
    if hasattr(value, "item") and math.prod(value.shape) == 1:
        value = value.item()
    if not _is_number(value):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def check_choice(key: str, value: object, choices: Sequence[str | None]) -> None:
    """Refuse a value that is not one of the names in `choices`.

    Raises:
        ValueError: "`on_nonfinite` must be one of raise, skip, got 'ignore'".
    """
    if value not in choices:
        raise ValueError(f"`{key}` must be one of {', '.join(map(str, choices))}, got {value!r}")
