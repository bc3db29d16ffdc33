"""`local_epochs`: workers whose shards differ take unequal numbers of steps, and everything counts them right."""

import copy

import pytest
import torch
from harness import run_ranks
from problems import comparable, make_trainer

from pisa_dist import checkpoint
from pisa_dist.algorithms import ALGORITHMS
from pisa_dist.consensus import AllReduce, InProcess
from pisa_dist.data.sampling import draw_batches, num_local_steps
from pisa_dist.metrics import cross_entropy
from pisa_dist.snapshot import flatten, restore
from pisa_dist.trainer import TrainingPlan

pytestmark = pytest.mark.timeout(300)

# Shards of 34, 26 and 30 samples; batches of 8.
EPOCHS, STEPS = 0.5, [3, 2, 2]


def unequal_trainer(name="fedavg", *, rounds=6, num_workers=3, consensus=None, **plan):
    algorithm = ALGORITHMS[name](lr=0.1) if name != "diloco" else ALGORITHMS[name](lr=0.01)
    plan = {"local_epochs": EPOCHS, "eval_every": 2, **plan}
    return make_trainer(algorithm, num_workers=num_workers, rounds=rounds, consensus=consensus, **plan)


@pytest.mark.parametrize(
    ("size", "batch", "epochs", "steps"),
    [(34, 8, 0.5, 3), (100, 10, 1.0, 10), (101, 10, 1.0, 11), (3, 8, 1.0, 1), (5, 8, 0.01, 1), (100, 1, 0.07, 7)],
)
def test_a_worker_takes_as_many_steps_as_its_passes_need_and_one_at_least(size, batch, epochs, steps):
    assert num_local_steps(size, batch, 1, epochs) == steps


@pytest.mark.parametrize("vectorize", ["true", "false"])
def test_a_round_equals_each_workers_own_steps_and_the_loss_is_the_mean_over_them(vectorize):
    trainer = unequal_trainer(vectorize=vectorize)
    expected = {name: torch.zeros_like(w) for name, w in trainer.state.weights.items()}
    loss_mean = 0.0
    for worker, steps in enumerate(STEPS):
        model, shard = copy.deepcopy(trainer.model), trainer.shards[worker]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        draw = draw_batches(len(shard), batch_size=8, local_steps=steps, seed=0, worker=worker, round_number=1)
        for batch in draw.positions:
            optimizer.zero_grad()
            loss = cross_entropy(model(shard.inputs[batch]), shard.targets[batch])
            loss.backward()
            optimizer.step()
            loss_mean += trainer.worker_weight[worker] * loss.item() / steps
        for name, parameter in model.named_parameters():
            expected[name] += trainer.worker_weight[worker] * parameter.detach()
    outcome = trainer.run_round()
    for name, value in expected.items():
        torch.testing.assert_close(trainer.state.weights[name], value, rtol=1e-11, atol=1e-13)
    assert outcome.train_loss == pytest.approx(loss_mean, rel=1e-11)
    assert trainer.state.num_steps.tolist() == STEPS
    assert trainer.state.samples_seen == 8 * sum(STEPS)


def unequal_trajectories(consensus):
    results = {}
    for name in ("diloco", "fednova"):
        trainer = unequal_trainer(name, num_workers=7, participation=0.6, consensus=consensus)
        lines = [comparable(metrics) for _, _, metrics in trainer.run() if metrics]
        results[name] = trainer.state.weights, lines
    return results


def unequal_on_ranks(rank, num_ranks):
    return unequal_trajectories(AllReduce())


def test_unequal_steps_on_two_ranks_equal_one_process():
    expected = unequal_trajectories(InProcess())
    for found in run_ranks(unequal_on_ranks, 2):
        for name, (weights, lines) in expected.items():
            for key, value in weights.items():
                torch.testing.assert_close(found[name][0][key], value, rtol=1e-10, atol=1e-12, msg=name)
            for line, other in zip(found[name][1], lines, strict=True):
                assert line == pytest.approx(other, rel=1e-9)


def test_a_resumed_run_knows_how_many_steps_each_worker_has_taken(tmp_path):
    first = unequal_trainer("diloco", rounds=3, participation=0.67)
    list(first.run())
    with checkpoint.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(first)
    second, whole = (unequal_trainer("diloco", participation=0.67) for _ in range(2))
    checkpoint.load(second, checkpoint.newest(tmp_path))
    assert torch.equal(second.state.num_steps, first.state.num_steps)
    assert second.state.num_steps.tolist() != (second.state.num_participations * 2).tolist()
    list(second.run())
    list(whole.run())
    assert all(torch.equal(second.state.weights[name], value) for name, value in whole.state.weights.items())


def test_a_checkpoint_from_before_steps_were_counted_is_read_with_those_of_its_rounds():
    trainer = make_trainer(ALGORITHMS["diloco"](), local_steps=4, participation=0.67)
    for _ in range(4):
        trainer.run_round()
    flat = {key: value for key, value in flatten(trainer.state, trainer.hosted).items() if "num_steps" not in key}
    assert torch.equal(restore(flat, trainer).num_steps, trainer.state.num_steps)
    assert len(set(trainer.state.num_steps.tolist())) > 1


def test_steps_and_passes_at_once_are_refused():
    with pytest.raises(ValueError, match=r"`local_steps` must be 1 where `local_epochs` .*local_steps=3 .*epochs=0\.5"):
        TrainingPlan(rounds=1, batch_size=8, local_steps=3, local_epochs=0.5)


def test_unequal_steps_are_refused_where_the_method_communicates_after_each_gradient():
    with pytest.raises(ValueError, match=r"`local_steps` must be 1 for algorithm=synchronous.*got 3"):
        unequal_trainer("synchronous")


def test_more_steps_than_a_round_can_draw_are_refused():
    with pytest.raises(ValueError, match=r"`local_epochs` must take at most 1000000 steps in a round, got 1e\+06"):
        unequal_trainer(local_epochs=1e6)
