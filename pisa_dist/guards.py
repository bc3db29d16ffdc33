"""What a run says about itself: that it diverges, before it is too late, and what took the memory that ran out."""

import statistics
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from pisa_dist.consensus import ConsensusError

ON_DIVERGENCE = ("warn", "cut", "ignore")
CUT = 0.5  # factor on lr

# Over 24 healthy runs on digits (five methods, 5 to 100 % participation, batches of 1 to 500) a residual grew at most
# 32-fold within 20 rounds but for recovery from dips, and the loss of 20 rounds never had a median above 1.1 times that
# of guessing.
WINDOW = 20
GROWTH = 100.0
ABOVE_BEFORE = 10.0
ABOVE_GUESSING = 1.5
_CONFIRMED_BY = 3
_QUANTITIES = ("primal residual", "dual residual", "loss")

_SIGNS = ("can't allocate memory", "cannot allocate memory", "not enough memory", "out of memory", "bad_alloc")


@dataclass
class ResidualWatch:
    """Says in one line when training diverges. Fed with every round's outcome; draws on nothing else.

    It speaks once about each quantity, when
    - a residual has been, for three rounds, more than 100 times its smallest value of the last 20 rounds and more
      than 10 times its largest value before them, so that recovery from a dip is no alarm; or
    - the median training loss of the last 20 rounds exceeds 1.5 times the loss of guessing, or three losses in a row
      100 times that. The first loss counts as guessing if it is larger.

    Args:
        guessing_loss: loss of a model that knows nothing; ln(number of classes) for cross-entropy.
        knobs: the method's settings, for advice; `penalty` and `lr` are named if they are there.
    """

    guessing_loss: float
    knobs: Mapping[str, Any] = field(default_factory=dict)
    _recent: dict[str, deque[float]] = field(default_factory=dict, init=False, repr=False)
    _largest_before: dict[str, float] = field(default_factory=dict, init=False, repr=False)
    _said: set[str] = field(default_factory=set, init=False, repr=False)
    _has_begun: bool = field(default=False, init=False, repr=False)

    def numbers(self) -> list[float]:
        """All that it remembers, for a checkpoint: with `recall` a resumed run speaks where the other would have."""
        kept = [self.guessing_loss, float(self._has_begun)]
        for name in _QUANTITIES:
            recent = list(self._recent.get(name, ()))
            kept += [float(name in self._said), self._largest_before.get(name, 0.0), len(recent)]
            kept += recent + [0.0] * (WINDOW - len(recent))
        return kept

    def recall(self, numbers: Sequence[float]) -> None:
        """Remember what `numbers` returned."""
        self.guessing_loss, has_begun, *rest = numbers
        self._has_begun = bool(has_begun)
        for place, name in enumerate(_QUANTITIES):
            said, before, count, *values = rest[place * (WINDOW + 3) : (place + 1) * (WINDOW + 3)]
            self._said = self._said | {name} if said else self._said - {name}
            self._largest_before[name] = before
            self._recent[name] = deque(values[: round(count)], maxlen=WINDOW)

    def forget(self) -> None:
        """Begin anew, after a cut: only what guessing costs stays."""
        self._recent.clear()
        self._largest_before.clear()
        self._said.clear()

    def feed(self, *, loss: float, primal_residual: float | None, dual_residual: float | None) -> str | None:
        """Take in a round that was not refused; what is wrong in one line, None if all is well. See also `advice`.

        Args:
            loss: training loss in this round.
            primal_residual: sqrt(sum_i alpha_i ||w_i - w||^2), None where the method has none.
            dual_residual: sigma ||w_next - w||, None where the method has none.
        """
        lines = [self._about_residual("primal residual", primal_residual)]
        lines.append(self._about_residual("dual residual", dual_residual))
        lines.append(self._about_loss(loss))
        said = [line for line in lines if line is not None]
        return "; ".join(said) or None

    def _remember(self, name: str, value: float) -> deque[float]:
        recent = self._recent.setdefault(name, deque(maxlen=WINDOW))
        if len(recent) == WINDOW:
            self._largest_before[name] = max(self._largest_before.get(name, 0.0), recent[0])
        recent.append(value)
        return recent

    def _about_residual(self, name: str, value: float | None) -> str | None:
        if value is None or value <= 0:
            return None
        recent = self._remember(name, value)
        confirmed = min(list(recent)[-_CONFIRMED_BY:])
        growth = confirmed / min(recent)
        if growth <= GROWTH or confirmed <= ABOVE_BEFORE * self._largest_before.get(name, 0.0) or name in self._said:
            return None
        self._said.add(name)
        return f"the {name} has grown {growth:.3g}-fold in {len(recent)} rounds"

    def _about_loss(self, value: float) -> str | None:
        if not self._has_begun:
            self._has_begun = True
            self.guessing_loss = max(self.guessing_loss, value)
        recent = self._remember("loss", value)
        if "loss" in self._said or len(recent) < _CONFIRMED_BY:
            return None
        median, confirmed = statistics.median(recent), min(list(recent)[-_CONFIRMED_BY:])
        if confirmed > GROWTH * self.guessing_loss:
            what = f"the training loss has been {confirmed:.3g} or more for {_CONFIRMED_BY} rounds"
        elif len(recent) == WINDOW and median > ABOVE_GUESSING * self.guessing_loss:
            what = f"the training loss of the last {WINDOW} rounds has a median of {median:.3g}"
        else:
            return None
        self._said.add("loss")
        return f"{what}, and that of guessing is {self.guessing_loss:.3g}"

    def advice(self) -> str:
        """What to set otherwise."""
        penalty, lr = (self.knobs.get(name) for name in ("penalty", "lr"))
        options = [] if penalty is None else [f"raise algorithm.penalty (now {penalty:g})"]
        options += [] if lr is None else [f"lower algorithm.lr (now {lr:g})"]
        return " or ".join(options) or "take smaller steps"


class RankError(RuntimeError):
    """One rank of several, as far as it knows alone, cannot go on in the middle of a run: wrong data, a wrong model."""


class OutOfMemory(RuntimeError):  # noqa: N818 - reads as what happened, like torch.OutOfMemoryError without its suffix
    """Memory ran out; one line that says what takes it and which settings take less."""


@dataclass(frozen=True)
class Footprint:
    """What a rank holds while it trains.

    Attributes:
        moment: what failed, such as "in round 3".
        rank, num_ranks: where.
        num_hosted: workers on this rank.
        num_parameters: trainable numbers of the model.
        bytes_per_parameter: of one of them.
        state_bytes: of all state tensors of the hosted workers.
        batch_size: samples per worker and step; None where no minibatch is in memory.
        gathered_workers: workers whose messages a robust consensus gathers; 0 for the sum.
    """

    moment: str
    rank: int
    num_ranks: int
    num_hosted: int
    num_parameters: int
    bytes_per_parameter: int
    state_bytes: int
    batch_size: int | None
    gathered_workers: int = 0

    def __str__(self) -> str:
        stack = self.num_hosted * self.num_parameters * self.bytes_per_parameter
        num_tensors = round(self.state_bytes / stack, 1) if stack else 0
        text = (
            f"{self.num_hosted} workers x {self.num_parameters:,} parameters x ({num_tensors:g} state tensors, twice "
            f"while they are updated, + gradients) take about {_human(2 * self.state_bytes + stack)}"
        )
        if self.gathered_workers:
            gathered = self.gathered_workers * self.num_parameters * self.bytes_per_parameter
            text += f", the messages of {self.gathered_workers} workers about {_human(2 * gathered)}"
        return text if self.batch_size is None else f"{text}, and activations grow with batch_size={self.batch_size}"

    def advice(self) -> str:
        """Settings that take less."""
        options = [] if self.batch_size is None else ["lower batch_size"]
        options += ["take a smaller model"] if self.num_hosted == 1 else ["launch more ranks", "lower num_workers"]
        if self.gathered_workers:
            options.append("use consensus=sum")
        *others, last = options
        return f"{', '.join(others)} or {last}" if others else last


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a device or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)


@contextmanager
def explain_out_of_memory(footprint: Callable[[], Footprint]) -> Iterator[None]:
    """Turn an allocation that failed inside, on a device or on the CPU, into one line.

    Args:
        footprint: asked only then.

    Raises:
        OutOfMemory: memory ran out.
    """
    try:
        yield
    except ConsensusError:
        raise
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        taken = footprint()
        where = taken.moment + (f" on rank {taken.rank}" if taken.num_ranks > 1 else "")
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise OutOfMemory(f"out of memory {where}: {taken}: {taken.advice()} ({reason})") from error


def _human(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} GB"
