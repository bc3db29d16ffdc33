"""Robust consensus: trimmed mean and median against workers that send garbage, the same on every layout of ranks."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from problems import comparable, make_trainer, small_net
from torch import nn

from pisa_dist.algorithms import ALGORITHMS
from pisa_dist.algorithms.fedavg import FedAvg
from pisa_dist.algorithms.pisa import Sisa
from pisa_dist.consensus import AllReduce, InProcess
from pisa_dist.data.datasets import Dataset
from pisa_dist.robust import check_consensus, coordinate_median, num_trimmed, robust_rule, trimmed_mean

pytestmark = pytest.mark.timeout(300)

RULES = ("sum", "trimmed", "median")
NAN, INF = float("nan"), float("inf")


# The pure functions


def test_the_trimmed_mean_cuts_the_same_number_of_values_at_each_end_of_each_coordinate():
    messages = torch.tensor([[1.0, -50.0], [2.0, 3.0], [3.0, 4.0], [4.0, 5.0], [1e6, 6.0]], dtype=torch.float64)
    assert trimmed_mean(messages, 0.2).tolist() == [3.0, 4.0]
    assert trimmed_mean(messages, 0.4).tolist() == [3.0, 4.0]
    assert trimmed_mean(messages, 0.0).tolist() == messages.mean(0).tolist()
    assert messages[4, 0] == 1e6, "the input is unchanged"


def test_the_median_of_an_even_number_is_the_mean_of_the_two_in_the_middle():
    messages = torch.tensor([[4.0], [1.0], [2.0], [100.0]])
    assert coordinate_median(messages).tolist() == [3.0]
    assert coordinate_median(messages[:3]).tolist() == [2.0]
    assert coordinate_median(messages[:1]).tolist() == [4.0]


@pytest.mark.parametrize("garbage", [NAN, INF, -INF])
def test_both_rules_withstand_a_message_of_nan_or_infinity(garbage):
    messages = torch.tensor([[1.0, 2.0], [1.0, 2.0], [garbage, garbage], [1.0, 2.0], [1.0, 2.0]])
    assert trimmed_mean(messages, 0.1).tolist() == [1.0, 2.0]
    assert coordinate_median(messages).tolist() == [1.0, 2.0]


def test_the_median_withstands_four_of_nine_and_the_trimmed_mean_as_many_as_it_cuts():
    generator = torch.Generator().manual_seed(0)
    good = torch.randn(5, 7, generator=generator)
    messages = torch.cat([good, 1e6 * torch.randn(4, 7, generator=generator)])
    low, high = good.amin(0), good.amax(0)
    for found in (coordinate_median(messages), trimmed_mean(messages, 0.45)):
        assert bool(((low <= found) & (found <= high)).all())
    assert trimmed_mean(messages, 0.2).abs().max() > 1e3


@pytest.mark.parametrize(
    ("num_messages", "trim", "count"),
    [(10, 0.1, 1), (10, 0.3, 3), (100, 0.29, 29), (3, 0.01, 1), (19, 0.1, 1), (12, 0.499999, 5), (5, 0.0, 0)],
)
def test_the_share_is_rounded_down_but_one_message_at_each_end_is_always_cut(num_messages, trim, count):
    assert num_trimmed(num_messages, trim) == count


def test_a_share_that_leaves_nobody_is_refused():
    with pytest.raises(ValueError, match=r"`consensus_trim` must be in \[0, 0.5\), got 0.5"):
        num_trimmed(3, 0.5)
    with pytest.raises(ValueError, match=r"cuts 1 of 2 workers' messages at each end, which leaves nobody"):
        trimmed_mean(torch.ones(2, 3), 0.1)


@pytest.mark.parametrize("kind", ["trimmed", "median"])
def test_long_messages_are_worked_on_in_pieces_without_a_difference(kind, monkeypatch):
    messages = torch.randn(5, 1000, generator=torch.Generator().manual_seed(0))
    whole = robust_rule(kind, 0.2)(messages)
    monkeypatch.setattr("pisa_dist.robust._CHUNK", 64)
    assert torch.equal(robust_rule(kind, 0.2)(messages), whole)


def test_bad_settings_are_refused_naming_key_value_and_range():
    check_consensus("sum", 0.1, num_present=1)
    check_consensus("trimmed", 0.0, num_present=2)
    with pytest.raises(ValueError, match="`consensus` must be one of sum, trimmed, median, got 'mean'"):
        check_consensus("mean", 0.1, num_present=10)
    with pytest.raises(ValueError, match=r"`consensus_trim` must be in \[0, 0.5\), got -0.1"):
        check_consensus("trimmed", -0.1, num_present=10)
    for kind in ("trimmed", "median"):
        with pytest.raises(ValueError, match=f"`consensus`={kind} needs at least 3 workers in a round.* got 2"):
            check_consensus(kind, 0.1, num_present=2)
    with pytest.raises(ValueError, match="got 1: raise num_workers or participation"):
        with_rule(make_trainer(ALGORITHMS["sisa"](), num_workers=10, participation=0.1), "median")


# Training with a worker that sends garbage

BAD = 2
METHODS = {"sisa": Sisa(penalty=2.0, preconditioner_scale=3.0), "fedavg": FedAvg(lr=0.1)}


def with_rule(trainer, rule, trim=0.1):
    return replace(trainer, plan=replace(trainer.plan, consensus=rule, consensus_trim=trim))


def garbage_sender(method):
    """The method, but one worker's message is noise a thousand times as large, however workers are stacked."""

    class Garbage(type(method)):
        def local_work(self, round_, state):
            result = super().local_work(round_, state)
            if BAD in round_.workers:
                alpha = float(round_.all_worker_weights[BAD])
                generator = torch.Generator().manual_seed(round_.number)
                for value in result.message.values():
                    value += 1e3 * alpha * torch.randn(value.shape, generator=generator, dtype=value.dtype)
            return result

    return Garbage(**vars(method))


def easier(dataset):
    """Classes further apart, so that a model that is trained is right almost always."""
    return Dataset(dataset.inputs + 4 * nn.functional.one_hot(dataset.targets, 4), dataset.targets, 3)


def final_accuracy(method, rule, **plan):
    trainer = make_trainer(method, num_workers=9, rounds=60, eval_every=60, is_skewed=False, **plan)
    shards = {worker: easier(shard) for worker, shard in trainer.shards.items()}
    trainer = with_rule(replace(trainer, shards=shards, test=easier(trainer.test)), rule)
    return [metrics for _, _, metrics in trainer.run() if metrics][-1]["test_accuracy"]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("participation", [1.0, 0.7])
def test_a_worker_that_sends_noise_destroys_the_sum_and_not_the_robust_rules(name, participation):
    method, bad = METHODS[name], garbage_sender(METHODS[name])
    clean = final_accuracy(method, "sum", participation=participation)
    assert clean > 0.95
    assert final_accuracy(bad, "sum", participation=participation) < 0.7
    for rule in ("trimmed", "median"):
        assert final_accuracy(bad, rule, participation=participation) > clean - 0.04, rule


def trajectory(method, rule, *, consensus=None, trim=0.1, rounds=8, prepare=None, **plan):
    plan = {"num_workers": 7, "batch_size": 6, **plan}
    trainer = with_rule(make_trainer(method, rounds=rounds, consensus=consensus or InProcess(), **plan), rule, trim)
    if prepare is not None:
        prepare(trainer)
    lines = [comparable(metrics) for _, _, metrics in trainer.run() if metrics]
    return trainer.state.weights, trainer.state.buffers, lines


@pytest.mark.parametrize("name", ["sisa", "pisa", "nsisa", "fedavg", "synchronous"])
def test_where_all_workers_are_alike_the_three_rules_agree(name):
    def make_alike(trainer):
        trainer.shards = dict.fromkeys(trainer.shards, trainer.shards[1])
        trainer.shard_sizes = [len(trainer.shards[1])] * 7

    results = [trajectory(ALGORITHMS[name](), rule, prepare=make_alike, batch_size=100) for rule in RULES]
    for found in results[1:]:
        for key, expected in results[0][0].items():
            torch.testing.assert_close(found[0][key], expected, rtol=1e-8, atol=1e-10)


def test_nothing_cut_and_equal_weights_is_the_sum():
    def same_weight(trainer):
        trainer._alpha = torch.full((7,), 1 / 7, dtype=torch.float64)

    for name in METHODS:
        plan = {"prepare": same_weight, "participation": 0.6}
        summed = trajectory(METHODS[name], "sum", **plan)
        uncut = trajectory(METHODS[name], "trimmed", trim=0.0, **plan)
        for key, expected in summed[0].items():
            torch.testing.assert_close(uncut[0][key], expected, rtol=1e-10, atol=1e-12)
        for line, expected in zip(uncut[2], summed[2], strict=True):
            same = ("train_loss", "test_loss", "samples_seen", "primal_residual", "dual_residual", "penalty")
            assert {k: line[k] for k in same if k in line} == pytest.approx({k: expected[k] for k in same if k in line})


LAYOUT_CASES = {
    "sisa, trimmed, some absent": ("sisa", "trimmed", {"participation": 0.5}),
    "nsisa, median": ("nsisa", "median", {}),
    "fedavg, trimmed, some absent": ("fedavg", "trimmed", {"participation": 0.45, "local_steps": 2}),
    "synchronous, median": ("synchronous", "median", {}),
}


def layout_case(case, consensus):
    name, rule, plan = LAYOUT_CASES[case]
    method = ALGORITHMS[name](**{"synchronous": {"lr": 0.01}}.get(name, {}))
    net = small_net(batch_norm=True, dropout=0.2)
    return trajectory(method, rule, consensus=consensus, model=net, trim=0.2, **plan)


def all_layout_cases(rank, num_ranks):
    calls = []
    gather = dist.all_gather

    def counted(*args, **kwargs):
        calls.append(1)
        return gather(*args, **kwargs)

    dist.all_gather = counted
    return {case: layout_case(case, AllReduce()) for case in LAYOUT_CASES}, len(calls)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_seven_workers_on_any_number_of_ranks_equal_one_process_with_one_gather_a_round(num_ranks):
    by_rank = run_ranks(all_layout_cases, num_ranks)
    assert {num_calls for _, num_calls in by_rank} == {8 * len(LAYOUT_CASES)}
    for case in LAYOUT_CASES:
        expected = layout_case(case, InProcess())
        for rank, (found, _) in enumerate(by_rank):
            weights, buffers, lines = found[case]
            for mine, theirs in ((weights, expected[0]), (buffers, expected[1])):
                for key in theirs:
                    torch.testing.assert_close(mine[key], theirs[key], rtol=1e-10, atol=1e-12, msg=f"{case} {rank}")
            for line, reference in zip(lines, expected[2], strict=True):
                assert line == pytest.approx(reference, rel=1e-9, abs=1e-12), case


def test_an_absent_worker_is_asked_for_its_dual_once_it_has_taken_part():
    trainer = with_rule(make_trainer(METHODS["sisa"], num_workers=7, participation=0.5), "median")
    trainer.run_round()
    width = sum(w.numel() for w in trainer.state.weights.values()) + 8
    assert trainer.state.bytes_sent == 4 * 8 * width, "four present workers and nobody seen before"
    first = trainer.state.num_participations.bool()
    duals = trainer.state.workers["0.weight"]["dual"].clone()
    weights = trainer.state.weights["0.weight"]
    trainer.run_round()
    present = trainer.state.num_participations > first.int()
    heard = first | present
    assert trainer.state.bytes_sent == (4 + int(heard.sum())) * 8 * width
    after = trainer.state.workers["0.weight"]["dual"]
    messages = torch.where(present[:, None, None], 2 * after - duals, duals)[heard]
    expected = weights + trainer._alpha[heard].sum() * coordinate_median(messages) / 2.0
    torch.testing.assert_close(trainer.state.weights["0.weight"], expected, rtol=1e-10, atol=1e-12)


def test_a_nan_gradient_is_refused_under_a_robust_rule_as_under_the_sum():
    trainer = with_rule(make_trainer(METHODS["sisa"], num_workers=5), "median")
    trainer.shards[BAD] = Dataset(trainer.shards[BAD].inputs * NAN, trainer.shards[BAD].targets, 3)
    before = trainer.state.weights["0.weight"].clone()
    with pytest.raises(FloatingPointError, match=r"non-finite gradient on worker 2 in 0\.weight in round 1"):
        trainer.run_round()
    assert torch.equal(trainer.state.weights["0.weight"], before)
