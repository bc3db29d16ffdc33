"""The virtual clock: who is done when, stale displacements, and the same run on any layout and after a kill."""

import copy
import math

import numpy as np
import pytest
import torch
from harness import run_ranks
from problems import comparable, make_trainer
from test_algorithms import SETTINGS

from pisa_dist import checkpoint
from pisa_dist.algorithms import ALGORITHMS
from pisa_dist.clock import Clock, drawn_speeds
from pisa_dist.consensus import AllReduce, InProcess
from pisa_dist.data.sampling import draw_batches
from pisa_dist.metrics import cross_entropy
from pisa_dist.participation import Availability
from pisa_dist.schedule import IDLE, Schedule
from pisa_dist.trainer import TrainingPlan

pytestmark = pytest.mark.timeout(300)


def schedule_of(clock, num_steps, **plan):
    return Schedule(TrainingPlan(**{"rounds": 100, "batch_size": 1, "clock": clock, **plan}), num_steps)


def test_three_workers_by_hand():
    """Steps of 4, 6 and 10 virtual seconds, a consensus every 4: done after 1, 2 and 3 periods."""
    schedule = schedule_of(Clock(speeds=[1.0, 0.5, 1.0], period=4.0), [4, 3, 10])
    expected = {
        1: ({0: 0}, [IDLE, 0, 0]),
        2: ({0: 1, 1: 0}, [IDLE, IDLE, 0]),
        3: ({0: 2, 2: 0}, [IDLE, 2, IDLE]),
        4: ({0: 3, 1: 2}, [IDLE, IDLE, 3]),
        5: ({0: 4}, [IDLE, 4, 3]),
        6: ({0: 5, 1: 4, 2: 3}, [IDLE, IDLE, IDLE]),
        7: ({0: 6}, [IDLE, 6, 6]),
    }
    for number, (fetched, busy_since) in expected.items():
        found = schedule.at(number)
        assert found.fetched == fetched
        assert list(found.present) == sorted(fetched)
        assert found.busy_since.tolist() == busy_since
        assert found.virtual_seconds == 4.0 * number
    assert schedule.at(7).held([1, 2]) == {6}
    assert schedule.at(5).held([0]) == set()


def test_a_worker_that_is_done_while_away_takes_part_when_it_is_back(tmp_path):
    (tmp_path / "trace.csv").write_text("worker,start,end\n0,1,100\n1,1,2\n1,4,100\n")
    availability = Availability(file=str(tmp_path / "trace.csv"))
    schedule = schedule_of(Clock(speeds=[1.0, 0.5], period=1.0), [1, 1], availability=availability)
    assert [schedule.at(number).fetched for number in range(1, 6)] == [{0: 0}, {0: 1}, {0: 2}, {0: 3, 1: 0}, {0: 4}]


@pytest.mark.parametrize(("last", "is_refused"), [(5, True), (6, False), (50, False)])
def test_a_worker_that_a_trace_takes_away_before_its_work_is_done_is_refused(tmp_path, last, is_refused):
    """Worker 1 takes three rounds and is there from the fourth on: it is done in the sixth at the earliest."""
    file = tmp_path / "trace.csv"
    file.write_text(f"worker,start,end\n0,1,100\n1,4,5\n1,{last},{last + 1}\n1,200,300\n")
    clock, availability = Clock(speeds=[1.0, 0.4], period=1.0), Availability(file=str(file))
    if not is_refused:
        schedule = schedule_of(clock, [1, 1], availability=availability)
        assert schedule.at(last).fetched == {0: last - 1, 1: 3}
        return
    words = (
        r"^`availability\.file` '.*' must have every worker when its local work is done, worker 1 takes 3 rounds of "
        r"`clock\.period` from round 4 on and is in none after 5$"
    )
    with pytest.raises(ValueError, match=words):
        schedule_of(clock, [1, 1], availability=availability)


def test_a_worker_that_the_draw_passes_over_until_it_is_too_late_is_no_mistake(tmp_path):
    """Two workers need two rounds, and are there for two: the one that is not drawn in the first never takes part."""
    file = tmp_path / "trace.csv"
    file.write_text("worker,start,end\n0,1,3\n1,1,3\n")
    clock, availability = Clock(speeds=[0.5, 0.5], period=1.0), Availability(file=str(file))
    schedule = schedule_of(clock, [1, 1], participation=0.5, rounds=2, availability=availability)
    assert [len(schedule.at(number).present) for number in (1, 2)] == [0, 1]


def test_without_a_period_a_round_lasts_as_long_as_its_slowest_participant():
    schedule = schedule_of(Clock(speeds=[1.0, 0.5, 4.0]), [4, 3, 2], participation=0.34)
    seconds = 0.0
    for number in range(1, 20):
        (worker,) = schedule.at(number).present
        seconds += [4.0, 6.0, 0.5][worker]
        assert schedule.at(number).virtual_seconds == pytest.approx(seconds)
        assert schedule.at(number).fetched == {worker: number - 1}


def test_a_duration_of_seven_periods_takes_seven_though_rounding_makes_it_more():
    assert 0.07 / 0.01 > 7
    schedule = schedule_of(Clock(speeds=[100.0], period=0.01), [7])
    assert schedule.at(7).fetched == {0: 0}


def test_rounds_of_one_pass_take_its_time_and_what_was_begun_in_one_is_finished():
    """Ten steps take 10 and 20 seconds, a pass 2 and 8; a consensus every 4; the first two rounds need a pass each."""
    schedule = Schedule(
        TrainingPlan(rounds=100, batch_size=1, clock=Clock(speeds=[1.0, 0.5], period=4.0)), [10, 10], [2, 4]
    )
    expected = {
        1: ({0: 0}, {0: 2}),
        2: ({0: 1, 1: 0}, {0: 2, 1: 4}),
        3: ({}, {}),
        5: ({0: 2}, {0: 10}),
        7: ({1: 2}, {1: 10}),
        8: ({0: 5}, {0: 10}),
    }
    for number, (fetched, num_steps) in expected.items():
        assert (schedule.at(number, 2).fetched, schedule.at(number, 2).num_steps) == (fetched, num_steps)
    # As long as the end is not known, it is as if there were none; then rounds before it stay what they were.
    assert schedule.at(3, math.inf).fetched == {0: 2}
    assert schedule.at(4, 3).fetched == {1: 2}
    assert schedule.at(4, 3).num_steps == {1: 4}
    assert schedule.at(2, 0).fetched == {}


def test_without_a_period_a_round_of_one_pass_lasts_as_long_as_the_longest_pass():
    schedule = Schedule(TrainingPlan(rounds=9, batch_size=1, clock=Clock(speeds=[1.0, 0.5])), [10, 10], [7, 2])
    assert [schedule.at(number, 2).virtual_seconds for number in range(4)] == [0.0, 7.0, 14.0, 34.0]


def test_drawn_speeds_have_median_1_and_the_spread_between_their_quartiles():
    low, median, high = np.quantile(drawn_speeds(3.0, 20000, seed=0), [0.25, 0.5, 0.75])
    assert median == pytest.approx(1.0, rel=0.03)
    assert high / low == pytest.approx(3.0, rel=0.04)
    assert (drawn_speeds(3.0, 5, seed=0) == drawn_speeds(3.0, 9, seed=0)[:5]).all()
    assert (drawn_speeds(3.0, 5, seed=1) != drawn_speeds(3.0, 5, seed=0)).all()
    assert (drawn_speeds(1.0, 5, seed=0) == 1.0).all()


def test_the_schedule_of_a_round_does_not_depend_on_what_was_asked_before():
    clock = Clock(speed_spread=4.0, period=2.0)
    settings = {"participation": 0.6, "availability": Availability(mean_up=5.0, mean_down=2.0)}
    whole = [schedule_of(clock, [2] * 10, **settings).at(number) for number in range(1, 40)]
    resumed = schedule_of(clock, [2] * 10, **settings)
    for number in (25, 26, 3, 39):
        assert resumed.at(number).fetched == whole[number - 1].fetched
        assert (resumed.at(number).busy_since == whole[number - 1].busy_since).all()
    assert any(since < number - 1 for number, each in enumerate(whole, 1) for since in each.fetched.values())


def timed(name, clock, *, rounds=7, consensus=None, num_workers=3, **plan):
    plan = {"eval_every": 1, **plan}
    return make_trainer(
        ALGORITHMS[name](**SETTINGS[name]),
        rounds=rounds,
        clock=clock,
        consensus=consensus,
        num_workers=num_workers,
        **plan,
    )


def timed_auto(clock, rounds=3):
    """Workers that are alike, ten local steps; `pisa_auto` begins with one pass."""
    plan = {"eval_every": 1, "local_steps": 10, "is_skewed": False}
    return make_trainer(ALGORITHMS["pisa_auto"](), rounds=rounds, clock=clock, **plan)


def finish(trainer):
    lines = [comparable(metrics) for _, _, metrics in trainer.run() if metrics]
    return trainer.state.weights, lines


@pytest.mark.parametrize("participation", [1.0, 0.67])
@pytest.mark.parametrize("name", ["sisa", "diloco"])
def test_with_equal_speeds_and_a_period_that_is_long_enough_the_run_is_the_one_without_a_clock(name, participation):
    plain, lines = finish(timed(name, Clock(), participation=participation))
    weights, timed_lines = finish(timed(name, Clock(speeds=[2.0] * 3, period=0.5), participation=participation))
    assert all(torch.equal(weights[key], value) for key, value in plain.items())
    assert [line.pop("virtual_seconds") for line in timed_lines] == [0.5 * number for number in range(1, 8)]
    assert timed_lines == lines


def test_the_clock_counts_the_steps_that_are_taken():
    """Shards of 34, 26 and 30 samples are 5, 4 and 4 minibatches; local steps begin after the second round."""
    trainer = timed_auto(Clock(speeds=[1.0, 0.5, 2.0]))
    steps, lines = [], []
    for _, _, metrics in trainer.run():
        steps.append(trainer.state.num_steps.tolist())
        lines.append(metrics)
    assert trainer.algorithm.one_pass_rounds(trainer.state.shared) == 1
    assert np.diff([[0, 0, 0], *steps], axis=0).tolist() == [[5, 4, 4], [10, 10, 10], [10, 10, 10]]
    assert [line["virtual_seconds"] for line in lines] == [8.0, 28.0, 48.0]
    assert [line["samples_seen"] for line in lines] == [8 * 13, 8 * 43, 8 * 73]


def test_local_steps_that_begin_while_workers_are_at_work_leave_them_theirs_before_and_after_a_resume(tmp_path):
    clock = Clock(speeds=[1.0, 0.9, 0.8], period=3.0)  # a pass takes two rounds, ten steps four or five
    whole = timed_auto(clock, rounds=16)
    steps = []
    for number, _, _ in whole.run():
        steps.append(whole.state.num_steps.tolist())
        if number in (1, 3, 5):
            with checkpoint.Checkpointer(tmp_path / str(number)) as checkpointer:
                checkpointer.save(whole)
    assert 1 <= whole.algorithm.one_pass_rounds(whole.state.shared) <= 3
    taken = np.diff([[0, 0, 0], *steps], axis=0)
    assert [sorted(set(column)) for column in taken.T.tolist()] == [[0, 5, 10], [0, 4, 10], [0, 4, 10]]
    for number in (1, 3, 5):
        resumed = timed_auto(clock, rounds=16)
        checkpoint.load(resumed, checkpoint.newest(tmp_path / str(number)))
        list(resumed.run())
        assert resumed.state.num_steps.tolist() == steps[-1]
        assert all(torch.equal(resumed.state.weights[name], value) for name, value in whole.state.weights.items())


def test_a_checkpoint_that_says_only_whether_local_steps_have_begun_still_resumes(tmp_path):
    """Earlier versions wrote no number of the round; the clock counted all steps then."""
    first = timed_auto(Clock(), rounds=4)
    list(first.run())
    key = first.state.shared["local steps"]
    assert int(key["begun"]) == 2
    key["begun"] = key["begun"].bool()
    with checkpoint.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(first)
    second = timed_auto(Clock(), rounds=6)
    checkpoint.load(second, checkpoint.newest(tmp_path))
    assert second.algorithm.one_pass_rounds(second.state.shared) == 0
    before = second.state.num_steps.clone()
    list(second.run())
    assert (second.state.num_steps - before).tolist() == [20, 20, 20]


def test_there_are_no_virtual_seconds_without_a_clock():
    _, lines = finish(timed("fedavg", Clock(), rounds=1))
    assert "virtual_seconds" not in lines[0]


SLOW = Clock(speeds=[1.0, 0.5, 0.3], period=1.0)  # done after 1, 2 and 4 periods of one step


def test_a_late_worker_sends_its_displacement_from_the_weights_that_it_fetched():
    trainer = timed("fedavg", SLOW)
    starts, alpha = [copy.deepcopy(trainer.state.weights)], trainer.worker_weight
    lr, momentum = SETTINGS["fedavg"]["lr"], SETTINGS["fedavg"]["momentum"]
    assert momentum == 0.5, "of no effect on a single step"
    schedule = Schedule(trainer.plan, [1] * 3)
    for number in range(1, 8):
        current = starts[-1]
        moves = {name: torch.zeros_like(w) for name, w in current.items()}
        fetched = schedule.at(number).fetched
        for worker, since in fetched.items():
            model, shard = copy.deepcopy(trainer.model), trainer.shards[worker]
            model.load_state_dict(starts[since])
            draw = draw_batches(len(shard), batch_size=8, local_steps=1, seed=0, worker=worker, round_number=number)
            (batch,) = draw.positions
            cross_entropy(model(shard.inputs[batch]), shard.targets[batch]).backward()
            for name, parameter in model.named_parameters():
                moves[name] -= lr * alpha[worker] * parameter.grad
        total = sum(alpha[worker] for worker in fetched)
        trainer.run_round()
        for name, w in current.items():
            torch.testing.assert_close(
                trainer.state.weights[name], w + moves[name] / total, rtol=1e-12, atol=1e-14, msg=f"round {number}"
            )
        starts.append(copy.deepcopy(trainer.state.weights))
    assert schedule.at(4).fetched == {0: 3, 1: 2, 2: 0}


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "fednova", "scaffold", "feddyn", "mifa", "diloco", "pisa_local"])
def test_every_method_measures_its_displacement_from_the_workers_own_start(name):
    """A worker whose gradient vanishes stays where it started: whatever the consensus weights are, it moves nobody."""
    trainer = timed(name, SLOW, num_workers=3, local_steps=1)
    for _ in range(3):
        trainer.run_round()
    seen = []
    kind = type(trainer.algorithm)

    class Watched(kind):
        def local_work(self, round_, state):
            result = super().local_work(round_, state)
            seen.append((list(round_.workers), round_.weights, result.primal_residual))
            return result

    stale = {key: value.clone() for key, value in trainer.state.fetched[0].items()}
    trainer.algorithm = Watched(**SETTINGS[name])
    trainer.run_round()
    ((weights, residual),) = [(weights, residual) for workers, weights, residual in seen if workers == [2]]
    assert all(torch.equal(weights[key], value) for key, value in stale.items())
    assert any(not torch.equal(trainer.state.weights[key], value) for key, value in stale.items())
    distance = sum(float((trainer.state.weights[key] - value).square().sum()) for key, value in stale.items())
    assert 0 < float(residual) < distance, "of one step, not of what the others moved meanwhile"


def timed_trajectories(consensus):
    clock = Clock(speed_spread=4.0, period=1.0)
    settings = {"num_workers": 7, "rounds": 12, "participation": 0.8, "eval_every": 3}
    return {name: finish(timed(name, clock, consensus=consensus, **settings)) for name in ("sisa", "fednova")}


def timed_on_ranks(rank, num_ranks):
    return timed_trajectories(AllReduce())


def test_the_clock_is_the_same_on_two_ranks_as_in_one_process():
    expected = timed_trajectories(InProcess())
    for found in run_ranks(timed_on_ranks, 2):
        for name, (weights, lines) in expected.items():
            for key, value in weights.items():
                torch.testing.assert_close(found[name][0][key], value, rtol=1e-10, atol=1e-12, msg=name)
            for line, other in zip(found[name][1], lines, strict=True):
                assert line == pytest.approx(other, rel=1e-9, abs=1e-12), name


def save_late(rank, num_ranks, folder):
    trainer = timed("sisa", SLOW, rounds=6, consensus=AllReduce())
    list(trainer.run())
    with checkpoint.Checkpointer(folder / "two") as checkpointer:
        checkpointer.save(trainer)
    return sorted(trainer.state.fetched)


def test_a_run_resumed_while_workers_are_at_work_goes_on_with_the_weights_that_they_fetched(tmp_path):
    first = timed("sisa", SLOW, rounds=6)
    list(first.run())
    assert sorted(first.state.fetched) == [4]
    with checkpoint.Checkpointer(tmp_path / "one") as checkpointer:
        checkpointer.save(first)
    assert run_ranks(save_late, 2, tmp_path) == [[], [4]], "a rank keeps what its own workers need"
    whole = timed("sisa", SLOW, rounds=12)
    list(whole.run())
    for folder, compare in (("one", torch.equal), ("two", torch.allclose)):
        second = timed("sisa", SLOW, rounds=12)
        checkpoint.load(second, checkpoint.newest(tmp_path / folder))
        assert sorted(second.state.fetched) == [4]
        list(second.run())
        assert all(compare(second.state.weights[name], value) for name, value in whole.state.weights.items()), folder


def test_a_resume_with_a_clock_set_anew_or_other_workers_takes_the_latest_weights_where_none_were_kept(tmp_path):
    clock = Clock(speed_spread=4.0, period=0.5)
    for folder, before, num_after in (("plain", Clock(), 5), ("fewer", clock, 3), ("more", clock, 8)):
        first = timed("sisa", before, num_workers=5, rounds=5)
        list(first.run())
        with checkpoint.Checkpointer(tmp_path / folder) as checkpointer:
            checkpointer.save(first)
        second = timed("sisa", clock, num_workers=num_after, rounds=25)
        checkpoint.load(second, checkpoint.newest(tmp_path / folder), resize="resplit")
        assert set(second.state.fetched) <= set(first.state.fetched)
        outcomes = [outcome for _, outcome, _ in second.run()]
        assert all(outcome.problem is None for outcome in outcomes)
        assert (second.state.num_participations > 0).all()


def test_a_refused_round_leaves_those_at_work_with_what_they_fetched():
    trainer = timed("fedavg", SLOW, rounds=4, on_nonfinite="skip")
    start = {name: value.clone() for name, value in trainer.state.weights.items()}
    shard = trainer.shards[0]
    shard.inputs[:] = float("nan")
    outcomes = [trainer.run_round() for _ in range(3)]
    assert all("worker 0" in outcome.problem for outcome in outcomes)
    assert all(torch.equal(trainer.state.fetched[0][name], value) for name, value in start.items())
    assert sorted(trainer.state.fetched) == [0, 2]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"speeds": [1.0, 0.0, 1.0]}, r"`clock\.speeds\[1\]` must be > 0, got 0\.0"),
        ({"speeds": [1.0, -1.0]}, r"`clock\.speeds\[1\]` must be > 0, got -1\.0"),
        ({"speed_spread": 0.5}, r"`clock\.speed_spread` must be >= 1, got 0\.5"),
        ({"speeds": [1.0], "period": 0.0}, r"`clock\.period` must be > 0, got 0\.0"),
        ({"period": 2.0}, r"`clock\.period` needs the speeds of the workers, got 2 alone"),
        ({"speeds": [1.0], "speed_spread": 2.0}, r"`clock\.speed_spread` must be null where `clock\.speeds` are given"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, words):
    with pytest.raises(ValueError, match=words):
        Clock(**settings)


def test_a_wrong_number_of_speeds_and_a_worker_that_never_finishes_are_refused():
    with pytest.raises(ValueError, match=r"`clock\.speeds` must be one number for each of 3 workers, got 2"):
        schedule_of(Clock(speeds=[1.0, 1.0]), [1, 1, 1])
    with pytest.raises(ValueError, match=r"within 5 rounds, got 1: worker 1 takes 10 virtual seconds, 10 rounds"):
        schedule_of(Clock(speeds=[1.0, 0.1], period=1.0), [1, 1], rounds=5)
