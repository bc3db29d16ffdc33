"""Guard rails: divergence is said in time and never on healthy runs; memory and overflow end in one line."""

import copy
import math
import re
from dataclasses import replace

import pytest
import torch
from harness import run_ranks
from problems import make_trainer, small_net
from test_algorithms import SETTINGS
from torch import nn

import pisa_dist.trainer
from pisa_dist.algorithms import ALGORITHMS
from pisa_dist.algorithms.pisa import Pisa
from pisa_dist.checkpoint import Checkpointer, load, newest
from pisa_dist.consensus import AllReduce, ConsensusError
from pisa_dist.data.datasets import digits
from pisa_dist.data.splits import label_k
from pisa_dist.gradients import RoundGradients
from pisa_dist.guards import Footprint, OutOfMemory, ResidualWatch, explain_out_of_memory
from pisa_dist.models import build_model

pytestmark = pytest.mark.timeout(300)


# Divergence


def warnings_of(values, *, losses=None, knobs=None):
    """(round, warning) for a sequence of primal residuals."""
    watch = ResidualWatch(math.log(10), knobs or {})
    losses = losses if losses is not None else [1.0] * len(values)
    found = []
    for number, (value, loss) in enumerate(zip(values, losses, strict=True), 1):
        line = watch.feed(loss=loss, primal_residual=value, dual_residual=None)
        if line is not None:
            found.append((number, f"{line}: {watch.advice()}"))
        # As if the run were stopped and resumed here.
        again = ResidualWatch(math.log(10), knobs or {})
        again.recall(watch.numbers())
        watch = again
    return found


def test_a_residual_that_doubles_every_round_is_noticed_once_with_advice():
    found = warnings_of([0.1 * 2**i for i in range(60)], knobs={"penalty": 0.05, "lr": 1.0, "name": "sisa"})
    expected = (
        "the primal residual has grown 128-fold in 10 rounds: raise algorithm.penalty (now 0.05) "
        "or lower algorithm.lr (now 1)"
    )
    assert found == [(10, expected)]


def test_slow_growth_a_spike_and_recovery_from_a_dip_are_no_alarm():
    assert not warnings_of([1.2**i for i in range(100)])
    assert not warnings_of([1.0] * 30 + [1e4, 1e6] + [1.0] * 30)
    assert not warnings_of([1.0] * 30 + [1e-5] * 15 + [5.0] * 30)
    assert not warnings_of([0.0] * 5 + [1.0] * 40)


def test_the_loss_counts_as_diverged_when_guessing_would_be_better_for_twenty_rounds():
    def found(losses):
        return warnings_of([None] * len(losses), losses=losses, knobs={"lr": 3.0})

    ((number, line),) = found([2.4] + [2.0] * 30 + [4.0] * 30)
    assert 40 <= number <= 51
    assert line.endswith("of guessing is 2.4: lower algorithm.lr (now 3)")
    assert found([2.3, 4000.0, 5000.0, 6000.0])[0][0] == 4, "an explosion is said after three rounds"
    assert not found([0.01] * 30 + [3.0] * 60), "worse than before, but hardly worse than guessing"
    assert not found([40.0 * 0.99**i for i in range(200)]), "a model that starts out worse than guessing"


def test_a_method_without_knobs_gets_advice_too():
    assert warnings_of([10.0**i for i in range(9)])[0][1].endswith(": take smaller steps")


def digits_trainer(algorithm, **plan):
    """The shipped experiments' setting: ten workers with one digit each, an MLP; the rounds in which losses jump."""
    train, test = digits()
    parts = label_k(train.targets, 10, seed=0, labels_per_worker=1)
    sizes = [len(part) for part in parts]
    model = build_model(
        "pisa_dist.models.MLP", {"hidden_sizes": [128, 64]}, input_shape=train.input_shape, num_classes=10, seed=0
    )
    template = make_trainer(algorithm, num_workers=10)
    return replace(
        template,
        model=model,
        shards={worker: train.select(part) for worker, part in enumerate(parts)},
        test=test,
        shard_sizes=sizes,
        worker_weight=[size / sum(sizes) for size in sizes],
        plan=replace(template.plan, **{"rounds": 60, "batch_size": 50, "eval_every": 200, **plan}),
    )


HEALTHY = {
    "digits_label1": ("sisa", {"penalty": 1.0, "preconditioner_scale": 30.0, "penalty_growth": 1.005}, {}),
    "digits_label1_fedavg": ("fedavg", {"lr": 0.3}, {"batch_size": 10, "local_steps": 5}),
    "digits_label1_adamw": ("synchronous", {"optimizer": "AdamW", "lr": 0.01}, {}),
    "nsisa": ("nsisa", {"penalty": 20.0}, {}),
}


@pytest.mark.parametrize("case", HEALTHY)
def test_the_shipped_experiments_raise_no_alarm(case):
    name, settings, plan = HEALTHY[case]
    trainer = digits_trainer(ALGORITHMS[name](**settings), **plan)
    assert [outcome.warning for _, outcome, _ in trainer.run() if outcome.warning] == []


def test_a_penalty_that_is_far_too_small_is_noticed_while_the_loss_is_a_number():
    settings = {**HEALTHY["digits_label1"][1], "penalty": 0.05}
    for _, outcome, _ in digits_trainer(ALGORITHMS["sisa"](**settings), rounds=200).run():
        assert math.isfinite(outcome.train_loss)
        if outcome.warning:
            break
    assert "raise algorithm.penalty (now 0.05) or lower algorithm.lr (now 1)" in outcome.warning
    assert "training loss of the last 20 rounds" in outcome.warning


def exploding_trainer(**plan):
    """Linear layers in a row: steps that are too long grow faster than exponentially."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    algorithm = ALGORITHMS["pisa"](penalty=1.5, preconditioner_scale=0.0)
    return make_trainer(algorithm, model=model, dtype=torch.float32, num_workers=5, rounds=20, **plan)


def test_the_alarm_comes_before_the_overflow_and_can_be_turned_off():
    outcomes = [outcome for _, outcome, _ in exploding_trainer(on_nonfinite="skip").run()]
    first_warning = next(number for number, outcome in enumerate(outcomes) if outcome.warning)
    first_problem = next(number for number, outcome in enumerate(outcomes) if outcome.problem)
    assert first_warning < first_problem
    assert "primal residual has grown" in outcomes[first_warning].warning
    ignored = exploding_trainer(on_nonfinite="skip", on_divergence="ignore")
    assert not any(outcome.warning for _, outcome, _ in ignored.run())


def test_a_cut_halves_the_step_until_training_is_stable_and_survives_a_checkpoint(tmp_path):
    settings = {**HEALTHY["digits_label1"][1], "penalty": 0.02}

    def trained(on_divergence, *, rounds, resume=None):
        trainer = digits_trainer(ALGORITHMS["sisa"](**settings), rounds=rounds, on_divergence=on_divergence)
        if resume is not None:
            load(trainer, newest(resume))
        return trainer, [outcome for _, outcome, _ in trainer.run()]

    def end(outcomes):
        return sum(outcome.train_loss for outcome in outcomes[-10:]) / 10

    cut, outcomes = trained("cut", rounds=110)
    said = [outcome.warning for outcome in outcomes if outcome.warning]
    assert len(said) == 2
    assert said[0].endswith("algorithm.lr is cut to 0.5")
    assert said[1].endswith("algorithm.lr is cut to 0.25")
    assert cut.state.lr_factor == 0.25
    assert cut.algorithm.lr == 1.0, "what was configured stays"
    warned, others = trained("warn", rounds=110)
    assert warned.state.lr_factor == 1.0
    assert end(outcomes) < 0.2 * end(others)
    # Stopped within what the watch remembers, before the first cut and after it.
    first = next(number for number, outcome in enumerate(outcomes, start=1) if outcome.warning)
    for stop in (first - 1, first + 3):
        part, _ = trained("cut", rounds=stop)
        with Checkpointer(tmp_path / str(stop)) as checkpointer:
            checkpointer.save(part)
        rest, later = trained("cut", rounds=110, resume=tmp_path / str(stop))
        assert [outcome.warning for outcome in later] == [outcome.warning for outcome in outcomes[stop:]]
        assert rest.state.lr_factor == cut.state.lr_factor
        assert all(torch.equal(rest.state.weights[n], w) for n, w in cut.state.weights.items())


# Sums and weights that overflow


class Shouting(Pisa):
    """Sends a finite message of a given size."""

    size = 3e38

    def local_work(self, round_, state):
        result = super().local_work(round_, state)
        return result._replace(message={n: torch.full_like(m, self.size) for n, m in result.message.items()})


class ShoutingLess(Shouting):
    size = 1e30


class HiddenTarget(nn.Module):
    """Gives class 0 no chance at all: the loss is infinite, every gradient finite."""

    def __init__(self):
        super().__init__()
        self.net = small_net(dtype=torch.float32)

    def forward(self, inputs):
        hidden = torch.tensor([True, False, False])
        return self.net(inputs).masked_fill(hidden, -math.inf)


def overflowing_trainer(case, consensus=None, **plan):
    plan = {"dtype": torch.float32, "consensus": consensus, "num_workers": 4, **plan}
    if case == "sum":
        return make_trainer(Shouting(name="pisa"), **plan)
    if case == "message":
        return make_trainer(ALGORITHMS["fedavg"](lr=3e38), **plan)
    if case == "weights":
        return make_trainer(ShoutingLess(name="pisa", penalty=1e-10), **plan)
    return make_trainer(ALGORITHMS["sisa"](), model=HiddenTarget(), **plan)


OVERFLOWS = {
    "sum": "the sum of the workers' messages overflowed float32 although every gradient is finite",
    "message": "the sum of the workers' messages overflowed float32 although every gradient is finite",
    "weights": "0.weight overflowed float32 although the sum of the workers' messages is finite",
    "loss": "the training loss is inf although every gradient is finite",
}


def refused_on_ranks(rank, num_ranks):
    found = {}
    for case in OVERFLOWS:
        trainer = overflowing_trainer(case, AllReduce())
        before = copy.deepcopy(trainer.state)
        with pytest.raises(FloatingPointError) as caught:
            trainer.run_round()
        is_kept = all(torch.equal(before.weights[n], w) for n, w in trainer.state.weights.items()) and all(
            torch.equal(before.workers[n][kind], value)
            for n, kinds in trainer.state.workers.items()
            for kind, value in kinds.items()
        )
        found[case] = str(caught.value), is_kept and trainer.state.round_number == 0
    return found


def test_an_overflow_is_refused_alike_on_every_rank_and_changes_nothing():
    first, second = run_ranks(refused_on_ranks, 2)
    assert first == second
    for case, text in OVERFLOWS.items():
        message, is_kept = first[case]
        assert text in message
        assert message.endswith("in round 1: the weights of round 0 are kept")
        assert is_kept, case


@pytest.mark.parametrize("case", ["message", "weights", "loss"])
def test_rounds_that_overflow_can_be_skipped_and_the_weights_stay_finite(case):
    trainer = overflowing_trainer(case, rounds=3, eval_every=1, on_nonfinite="skip")
    before = {name: w.clone() for name, w in trainer.state.weights.items()}
    problems = [outcome.problem for _, outcome, _ in trainer.run()]
    assert problems == [OVERFLOWS[case]] * 3
    assert all(torch.equal(trainer.state.weights[name], w) for name, w in before.items())


class ShoutingWorker(Pisa):
    """One worker's message overflows; its gradients are finite."""

    def local_work(self, round_, state):
        result = super().local_work(round_, state)
        if 1 in round_.workers:
            result = result._replace(message={n: m + math.inf for n, m in result.message.items()})
        return result


def test_one_worker_that_overflows_is_outvoted_by_a_robust_consensus_and_refused_by_the_sum():
    trainer = make_trainer(ShoutingWorker(name="pisa", penalty=4.0), num_workers=5)
    with pytest.raises(FloatingPointError, match="the sum of the workers' messages overflowed float64"):
        trainer.run_round()
    for rule in ("trimmed", "median"):
        robust = replace(trainer, plan=replace(trainer.plan, consensus=rule))
        assert robust.run_round().problem is None
        assert all(bool(w.isfinite().all()) for w in robust.state.weights.values())


# Memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of ..."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_memory_that_runs_out_in_a_round_is_one_line_that_says_what_takes_it(error, monkeypatch):
    def fail(self, local_weights, step):
        raise error

    trainer = make_trainer(ALGORITHMS["sisa"](), num_workers=5)
    before = copy.deepcopy(trainer.state)
    monkeypatch.setattr(RoundGradients, "__call__", fail)
    with pytest.raises(OutOfMemory) as caught:
        trainer.run_round()
    message = str(caught.value)
    assert message.startswith("out of memory in round 1: 5 workers x 67 parameters x (2 state tensors, twice while")
    assert "batch_size=8: lower batch_size, launch more ranks or lower num_workers" in message
    assert "\n" not in message
    assert caught.value.__cause__ is error
    assert trainer.state.round_number == 0
    assert torch.equal(trainer.state.weights["0.weight"], before.weights["0.weight"])


@pytest.mark.parametrize("name", SETTINGS)
def test_memory_that_does_not_suffice_for_the_workers_state_is_one_line_too(name, monkeypatch):
    kind = ALGORITHMS[name]
    original = kind.init_worker_state

    def fail(self, parameters, num_workers):
        if next(iter(parameters.values())).device.type != "meta":
            raise MemoryError
        return original(self, parameters, num_workers)

    tensors = {"sisa": 2, "feddyn": 1, "diloco": 2, "fedavg": 0}
    monkeypatch.setattr(kind, "init_worker_state", fail)
    with pytest.raises(OutOfMemory) as caught:
        make_trainer(kind(**SETTINGS[name]), num_workers=5)
    message = str(caught.value)
    words = rf"out of memory at the start: 5 workers x 67 parameters x \({tensors.get(name, '.*')} state tensors, .*"
    assert re.fullmatch(words + r"take about .*B: launch more ranks or lower num_workers \(MemoryError\)", message)


def test_memory_that_runs_out_in_an_evaluation_is_one_line_too(monkeypatch):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    trainer = make_trainer(ALGORITHMS["sisa"](), num_workers=1, eval_every=2)
    monkeypatch.setattr(pisa_dist.trainer, "evaluate", fail)
    with pytest.raises(OutOfMemory) as caught:
        list(trainer.run())
    message = str(caught.value)
    assert message.startswith("out of memory in the evaluation after round 2, 1,024 samples at a time: 1 workers x 67")
    assert message.endswith(": take a smaller model (CUDA out of memory.)")


def test_what_the_allocator_of_this_torch_says_is_understood():
    footprint = Footprint("in round 3", 1, 4, 1, 10**9, 4, 8 * 10**9, 64, gathered_workers=10)
    with pytest.raises(OutOfMemory) as caught, explain_out_of_memory(lambda: footprint):
        torch.empty(10**15)
    message = str(caught.value)
    assert message.startswith("out of memory in round 3 on rank 1: 1 workers x 1,000,000,000 parameters")
    assert "take about 20 GB, the messages of 10 workers about 80 GB" in message
    assert "lower batch_size, take a smaller model or use consensus=sum" in message


@pytest.mark.parametrize(
    "error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ConsensusError("Cannot allocate memory")]
)
def test_another_error_passes_as_it_is(error):
    with pytest.raises(RuntimeError) as caught, explain_out_of_memory(lambda: pytest.fail("asked")):
        raise error
    assert caught.value is error
