"""Workers that are away: traces, the on/off process, and rounds in which nobody is there."""

import copy
import time

import numpy as np
import pytest
import torch
from harness import run_ranks
from problems import comparable, make_trainer
from test_algorithms import SETTINGS

from pisa_dist import checkpoint
from pisa_dist.algorithms import ALGORITHMS
from pisa_dist.consensus import AllReduce, InProcess
from pisa_dist.data.sampling import draw_participants
from pisa_dist.participation import Availability, OnOff, Trace
from pisa_dist.schedule import Schedule
from pisa_dist.trainer import TrainingPlan

pytestmark = pytest.mark.timeout(300)

TRACE = """worker,start,end
0,1,3
 1, 2, 5
0,6,7

2,1,2
2,8,9
"""
AVAILABLE = [[0, 2], [0, 1], [1], [1], [], [0], [], [2]]


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    return str(path)


def schedule_of(num_workers, **plan):
    return Schedule(TrainingPlan(**{"rounds": 1000, "batch_size": 1, **plan}), [1] * num_workers)


def test_a_worker_is_available_from_the_start_of_its_interval_up_to_but_without_its_end(trace):
    found = Trace(trace, num_workers=3, rounds=8)
    assert [np.flatnonzero(found.at(number)).tolist() for number in range(1, 9)] == AVAILABLE


def test_all_available_workers_take_part_and_in_some_rounds_nobody(trace):
    schedule = schedule_of(3, rounds=8, availability=Availability(file=trace))
    assert [list(schedule.at(number).present) for number in range(1, 9)] == AVAILABLE
    assert list(schedule.at(2).present) == [0, 1], "what was asked before does not matter"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "must begin with the line worker,start,end, got ''"),
        ("worker,from,to\n0,1,2", "must begin with the line worker,start,end, got 'worker,from,to'"),
        ("worker,start,end\n0,1,9\n1,1", "line 3: must be worker,start,end in whole numbers .* got '1,1'"),
        ("worker,start,end\n0,1,x", "line 2: must be worker,start,end in whole numbers .* got '0,1,x'"),
        ("worker,start,end\n0,1.5,2", "line 2: .* got '0,1.5,2'"),
        ("worker,start,end\n0,0,2", "line 2: .* 1 <= start < end, got '0,0,2'"),
        ("worker,start,end\n0,3,3", "line 2: .* 1 <= start < end, got '0,3,3'"),
        (f"worker,start,end\n0,1,{10**30}", "line 2: .* 1 <= start < end"),
        ("worker,start,end\n0,1,9\n3,1,9", r"line 3: worker must be in \[0, 2\], the run's workers, got 3"),
        ("worker,start,end\n0,1,9\n1,9,11\n2,1,9", "every worker in some round from 1 to 8, worker 1 is in none"),
    ],
)
def test_a_bad_trace_is_refused_in_one_line_that_says_where(text, words, tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"^`availability.file` .*{words}") as error:
        Trace(str(path), num_workers=3, rounds=8)
    assert "\n" not in str(error.value)


def test_a_trace_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`availability\.file` .*no\.csv' must be a CSV file that can be read"):
        Trace(str(tmp_path / "no.csv"), num_workers=3, rounds=8)


def test_times_up_and_down_have_their_means_and_the_first_round_is_like_any_other():
    presence = OnOff(6.0, 3.0, num_workers=2000, seed=0)
    up = np.array([presence.at(number) for number in range(1, 201)])
    share = up.mean(axis=1)
    # 2000 workers: one standard deviation of a round's share is 0.0105.
    assert share[0] == pytest.approx(2 / 3, abs=0.04)
    assert share.mean() == pytest.approx(2 / 3, abs=0.01)
    leaves, returns = up[:-1] & ~up[1:], ~up[:-1] & up[1:]
    assert up[:-1].sum() / leaves.sum() == pytest.approx(6.0, rel=0.03)
    assert (~up[:-1]).sum() / returns.sum() == pytest.approx(3.0, rel=0.03)


def test_the_process_is_a_function_of_seed_worker_and_round():
    whole = OnOff(4.0, 2.0, num_workers=20, seed=3)
    rounds = {number: whole.at(number).copy() for number in range(1, 50)}
    resumed = OnOff(4.0, 2.0, num_workers=20, seed=3)
    assert all((resumed.at(number) == rounds[number]).all() for number in (30, 31, 7, 49))
    fewer = OnOff(4.0, 2.0, num_workers=5, seed=3)
    assert (fewer.at(30) == rounds[30][:5]).all()
    assert (OnOff(4.0, 2.0, num_workers=20, seed=4).at(30) != rounds[30]).any()


def test_participation_draws_among_the_available_and_one_at_least():
    availability = Availability(mean_up=2.0, mean_down=4.0)
    schedule = schedule_of(10, participation=0.3, availability=availability)
    presence = OnOff(2.0, 4.0, num_workers=10, seed=0)
    counts = set()
    for number in range(1, 200):
        available = np.flatnonzero(presence.at(number)).tolist()
        present = schedule.at(number).present
        assert set(present) <= set(available)
        assert len(present) == (max(1, round(0.3 * len(available))) if available else 0)
        counts.add(len(present))
    assert {0, 1, 2} <= counts


def test_a_run_in_which_nobody_ever_takes_part_is_refused_and_one_with_a_single_participant_is_not():
    rare = Availability(mean_up=1.0, mean_down=2000.0)
    presence = OnOff(1.0, 2000.0, num_workers=3, seed=0)
    first = next(number for number in range(1, 10**5) if presence.at(number).any())
    assert 1 < first < 1000
    assert schedule_of(3, rounds=first, availability=rare).at(first).present
    words = (
        rf"^`availability\.mean_down` must let some worker take part within {first - 1} rounds, got 2000\.0: none of 3"
    )
    with pytest.raises(ValueError, match=words):
        schedule_of(3, rounds=first - 1, availability=rare)


def test_an_empty_run_of_a_thousand_workers_and_rounds_is_refused_at_once():
    started = time.perf_counter()
    with pytest.raises(ValueError, match="none of 1000 workers"):
        schedule_of(1000, rounds=1000, availability=Availability(mean_up=1.0, mean_down=1e9))
    assert time.perf_counter() - started < 3


def test_with_everyone_available_the_draw_is_the_one_without_availability():
    for number in range(1, 30):
        expected = draw_participants(10, 0.3, seed=1, round_number=number)
        assert schedule_of(10, participation=0.3, seed=1).at(number).present == expected
        assert draw_participants(10, 0.3, seed=1, round_number=number, among=np.arange(10)) == expected


def trained(consensus, availability, *, rounds=8, name="sisa", **plan):
    settings = {"penalty": 2.0} if name == "sisa" else {"lr": 0.1}
    plan = {"eval_every": 1, **plan}
    trainer = make_trainer(
        ALGORITHMS[name](**settings), rounds=rounds, consensus=consensus, availability=availability, **plan
    )
    return trainer, [metrics for _, _, metrics in trainer.run() if metrics]


def test_in_a_round_without_workers_only_the_round_is_counted(trace):
    trainer, _ = trained(InProcess(), Availability(file=trace), rounds=8)
    trainer = make_trainer(trainer.algorithm, rounds=8, availability=Availability(file=trace), eval_every=1)
    states, outcomes = [], []
    for number, outcome, metrics in trainer.run():
        states.append(copy.deepcopy(trainer.state))
        outcomes.append((number, outcome.train_loss is None, metrics["train_loss"] is None))
    assert outcomes == [(number, number in (5, 7), number in (5, 7)) for number in range(1, 9)]
    before, after = states[3], states[4]
    assert all(torch.equal(after.weights[name], value) for name, value in before.weights.items())
    assert torch.equal(after.workers["0.weight"]["dual"], before.workers["0.weight"]["dual"])
    assert (after.samples_seen, after.bytes_sent) == (before.samples_seen, before.bytes_sent)
    assert trainer.state.num_participations.tolist() == [3, 3, 2]


@pytest.mark.parametrize("name", SETTINGS)
def test_every_method_copes_with_a_first_round_without_workers(name, tmp_path):
    (tmp_path / "late.csv").write_text("worker,start,end\n0,3,9\n1,2,9\n2,4,9\n")
    trainer = make_trainer(
        ALGORITHMS[name](**SETTINGS[name]), rounds=6, availability=Availability(file=str(tmp_path / "late.csv"))
    )
    list(trainer.run())
    assert trainer.state.num_participations.tolist() == [4, 5, 3]


def away_on_ranks(rank, num_ranks, file):
    return {
        case: trained(AllReduce(), availability, participation=0.7, rounds=8)[1]
        for case, availability in cases(file).items()
    }


def cases(file):
    return {"trace": Availability(file=file), "process": Availability(mean_up=2.0, mean_down=2.0)}


def test_availability_is_the_same_on_two_ranks_as_in_one_process(trace):
    for found in run_ranks(away_on_ranks, 2, trace):
        for case, availability in cases(trace).items():
            _, expected = trained(InProcess(), availability, participation=0.7, rounds=8)
            for line, other in zip(found[case], expected, strict=True):
                assert comparable(line) == pytest.approx(comparable(other), rel=1e-9, abs=1e-12), case


def test_a_run_resumed_in_the_middle_meets_the_same_workers(tmp_path):
    availability = Availability(mean_up=2.0, mean_down=2.0)
    first, _ = trained(InProcess(), availability, rounds=9)
    with checkpoint.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(first)
    second = make_trainer(first.algorithm, rounds=20, availability=availability)
    checkpoint.load(second, checkpoint.newest(tmp_path))
    list(second.run())
    whole, _ = trained(InProcess(), availability, rounds=20)
    assert all(torch.equal(second.state.weights[name], value) for name, value in whole.state.weights.items())
    assert torch.equal(second.state.num_participations, whole.state.num_participations)


def test_a_robust_consensus_is_refused_where_the_number_of_participants_varies():
    availability = Availability(mean_up=2.0, mean_down=2.0)
    with pytest.raises(ValueError, match=r"`consensus` must be sum with availability, got 'median'"):
        TrainingPlan(rounds=1, batch_size=8, consensus="median", availability=availability)
