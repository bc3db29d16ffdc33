"""The trainer: the same trajectory on every layout, the same equations as the optimizer, refused rounds, buffers."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from problems import blobs, comparable, make_trainer, small_net
from torch import nn

from pisa_dist import NSISA, PISA, SISA
from pisa_dist.algorithms import ALGORITHMS
from pisa_dist.consensus import AllReduce, InProcess
from pisa_dist.data.datasets import Dataset
from pisa_dist.data.sampling import draw_batches
from pisa_dist.metrics import cross_entropy, evaluate
from pisa_dist.state import Wishes
from pisa_dist.trainer import TrainingPlan

pytestmark = pytest.mark.timeout(300)

LAYOUT_CASES = {
    "sisa": ("sisa", {"penalty": 2.0, "preconditioner_scale": 3.0, "penalty_growth": 1.01, "consensus_l2": 1e-3}, {}),
    "nsisa": ("nsisa", {"penalty": 10.0}, {}),
    "pisa, some workers absent": ("pisa", {"penalty": 4.0}, {"participation": 0.4}),
    "fedavg, local steps": ("fedavg", {"lr": 0.1, "momentum": 0.5}, {"local_steps": 3, "participation": 0.5}),
    "synchronous": ("synchronous", {"lr": 0.01}, {}),
    "pisa_auto, some workers absent": ("pisa_auto", {}, {"local_steps": 3, "participation": 0.5}),
    "pisa_local": ("pisa_local", {"metric": "adam"}, {"local_steps": 3, "participation": 0.5}),
    "scaffold": ("scaffold", {"lr": 0.05}, {"local_steps": 3, "participation": 0.5}),
    "feddyn": ("feddyn", {"lr": 0.05}, {"local_steps": 3, "participation": 0.5}),
    "mifa": ("mifa", {"lr": 0.05}, {"local_steps": 3, "participation": 0.5}),
}


def trajectory(consensus, case, *, num_workers=10, model=None):
    """Weights, buffers and metrics after 12 rounds."""
    name, settings, plan = LAYOUT_CASES[case]
    trainer = make_trainer(
        ALGORITHMS[name](**settings), num_workers=num_workers, rounds=12, consensus=consensus, model=model, **plan
    )
    lines = [comparable(metrics) for _, _, metrics in trainer.run() if metrics]
    return trainer.state.weights, trainer.state.buffers, lines


def all_trajectories_on_ranks(rank, num_ranks):
    results = {case: trajectory(AllReduce(), case) for case in LAYOUT_CASES}
    net = small_net(batch_norm=True, dropout=0.3)
    results["batch norm and dropout"] = trajectory(AllReduce(), "sisa", model=net)
    return results


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ten_workers_on_any_number_of_ranks_equal_one_process(num_ranks):
    by_rank = run_ranks(all_trajectories_on_ranks, num_ranks)
    for case, found in by_rank[0].items():
        with_norm = case not in LAYOUT_CASES
        net = small_net(batch_norm=True, dropout=0.3) if with_norm else None
        expected = trajectory(InProcess(), "sisa" if with_norm else case, model=net)
        for mine, theirs in zip(found[:2], expected[:2], strict=True):
            for name in theirs:
                torch.testing.assert_close(mine[name], theirs[name], rtol=1e-10, atol=1e-12, msg=f"{case}: {name}")
        for line, reference in zip(found[2], expected[2], strict=True):
            assert line == pytest.approx(reference, rel=1e-9, abs=1e-12), case
        for other in by_rank[1:]:
            assert all(torch.equal(other[case][0][name], found[0][name]) for name in found[0]), "ranks drifted apart"


OPTIMIZERS = {
    "sisa": (SISA, {"penalty": 2.0, "preconditioner_scale": 30.0, "penalty_growth": 1.01}),
    "nsisa": (NSISA, {"penalty": 10.0, "consensus_l2": 1e-3}),
    "pisa": (PISA, {"penalty": 3.0, "penalty_growth": 1.1, "penalty_growth_interval": 3}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_worker_in_the_trainer_equals_the_drop_in_optimizer(name):
    kind, settings = OPTIMIZERS[name]
    trainer = make_trainer(ALGORITHMS[name](**settings), num_workers=1, rounds=20)
    model = copy.deepcopy(trainer.model)
    optimizer = kind(model.parameters(), **settings)
    shard = trainer.shards[0]
    for number in range(1, 21):
        draw = draw_batches(len(shard), batch_size=8, local_steps=1, seed=0, worker=0, round_number=number)
        batch = draw.positions[0]
        optimizer.zero_grad()
        cross_entropy(model(shard.inputs[batch]), shard.targets[batch]).backward()
        optimizer.step()
        trainer.run_round()
    for parameter_name, parameter in model.named_parameters():
        torch.testing.assert_close(trainer.state.weights[parameter_name], parameter.detach(), rtol=1e-12, atol=1e-14)


def test_absent_workers_keep_dual_and_preconditioner_and_stand_in_the_sum():
    trainer = make_trainer(ALGORITHMS["sisa"](penalty=2.0), num_workers=5, rounds=3, participation=0.4)
    trainer.run_round()
    present = trainer.state.num_participations.bool()
    assert present.sum() == 2
    duals = trainer.state.workers["0.weight"]["dual"]
    assert duals[present].abs().amax(dim=(1, 2)).gt(0).all()
    assert duals[~present].eq(0).all()
    before, weights = copy.deepcopy(trainer.state.workers), trainer.state.weights
    trainer.run_round()
    absent = trainer.state.num_participations == present.int()
    moved = trainer.state.workers
    for name, kinds in before.items():
        for kind, value in kinds.items():
            assert torch.equal(moved[name][kind][absent], value[absent])
    # Delta form by hand: sum of alpha (pi + sigma u) over everyone; sigma u is the change of the dual.
    alpha = trainer._alpha
    for name in weights:
        old, new = before[name]["dual"], moved[name]["dual"]
        total = torch.tensordot(alpha, new + (new - old), dims=1)
        torch.testing.assert_close(trainer.state.weights[name], weights[name] + total / 2.0, rtol=1e-12, atol=1e-14)


def test_participants_are_the_nearest_number_and_change_from_round_to_round():
    trainer = make_trainer(ALGORITHMS["pisa"](penalty=4.0), num_workers=10, rounds=40, participation=0.3)
    counts, samples = [], 0
    for _ in range(40):
        before = trainer.state.num_participations.clone()
        trainer.run_round()
        took_part = (trainer.state.num_participations - before).bool()
        counts.append(int(took_part.sum()))
        samples += sum(min(8, trainer.shard_sizes[worker]) for worker in took_part.nonzero().flatten())
    assert set(counts) == {3}
    assert trainer.state.num_participations.min() >= 3
    assert trainer.state.samples_seen == samples


def test_a_buffer_with_infinities_such_as_a_causal_mask_stays_as_it_is():
    model = small_net()
    mask = torch.full((3, 3), float("-inf"), dtype=torch.float64).triu(1)
    model.register_buffer("mask", mask.clone())
    trainer = make_trainer(ALGORITHMS["sisa"](penalty=4.0), model=model)
    outcome = trainer.run_round()
    assert outcome.problem is None
    assert torch.equal(trainer.state.buffers["mask"], mask)


def test_batch_norm_statistics_are_the_weighted_average_and_the_counter_advances():
    trainer = make_trainer(ALGORITHMS["fedavg"](lr=0.1), model=small_net(batch_norm=True), local_steps=2)
    start = {name: value.clone() for name, value in trainer.state.buffers.items()}
    weights = {name: value.clone() for name, value in trainer.state.weights.items()}
    model = copy.deepcopy(trainer.model)
    trainer.run_round()
    expected = torch.zeros_like(start["1.running_mean"])
    for worker, shard in trainer.shards.items():
        model.load_state_dict({**weights, **start})
        draw = draw_batches(len(shard), batch_size=8, local_steps=2, seed=0, worker=worker, round_number=1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for batch in draw.positions:
            optimizer.zero_grad()
            cross_entropy(model(shard.inputs[batch]), shard.targets[batch]).backward()
            optimizer.step()
        expected += trainer.worker_weight[worker] * model[1].running_mean
    torch.testing.assert_close(trainer.state.buffers["1.running_mean"], expected, rtol=1e-12, atol=1e-14)
    assert trainer.state.buffers["1.num_batches_tracked"].item() == 2
    assert trainer.model[1].num_batches_tracked.item() == 0, "the model given is not written before export"
    assert trainer.export()[1].num_batches_tracked.item() == 2


class Poisoned(nn.Module):
    """Turns NaN for samples of class 2, that is on the last worker."""

    def __init__(self, from_call=0):
        super().__init__()
        self.net = small_net()
        self.calls, self.from_call = 0, from_call

    def forward(self, inputs):
        self.calls += self.training
        is_last = bool(torch.isin(inputs, blobs().inputs[60:]).all())
        factor = float("nan") if is_last and self.calls > self.from_call else 1.0
        return self.net(inputs) * factor


def refuse_on_ranks(rank, num_ranks):
    trainer = make_trainer(ALGORITHMS["sisa"](penalty=2.0), model=Poisoned(), consensus=AllReduce())
    before = copy.deepcopy(trainer.state)
    with pytest.raises(FloatingPointError) as caught:
        trainer.run_round()
    same = all(torch.equal(before.weights[n], w) for n, w in trainer.state.weights.items())
    return (
        str(caught.value),
        same,
        torch.equal(before.workers["net.0.weight"]["dual"], trainer.state.workers["net.0.weight"]["dual"]),
    )


def test_a_nan_gradient_is_refused_on_every_rank_naming_worker_and_parameter():
    for message, kept_weights, kept_duals in run_ranks(refuse_on_ranks, 2):
        assert message.startswith("non-finite gradient on worker 2 in net.0.weight")
        assert "round 1" in message
        assert kept_weights
        assert kept_duals


def test_skipping_leaves_weights_and_duals_and_goes_on():
    trainer = make_trainer(
        ALGORITHMS["sisa"](penalty=2.0), model=Poisoned(from_call=6), rounds=4, on_nonfinite="skip", eval_every=1
    )
    outcomes, weights = [], []
    for _, outcome, _ in trainer.run():
        outcomes.append(outcome.problem)
        weights.append(trainer.state.weights["net.0.weight"].clone())
    assert outcomes[:2] == [None, None]
    assert all("worker 2" in problem for problem in outcomes[2:])
    assert torch.equal(weights[1], weights[3])
    assert not torch.equal(weights[0], weights[1])


def test_bytes_are_those_of_one_message_per_participant():
    trainer = make_trainer(ALGORITHMS["sisa"](), num_workers=4, rounds=2, participation=0.5, dtype=torch.float32)
    trainer.run_round()
    numel = sum(p.numel() for p in trainer.model.parameters())
    assert trainer.state.bytes_sent == 2 * 4 * (numel + 7)


def count_collectives(rank, num_ranks):
    calls = []
    original = dist.all_reduce

    def counted(tensor, *args, **kwargs):
        calls.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    dist.all_reduce = counted
    trainer = make_trainer(ALGORITHMS["nsisa"](), num_workers=5, consensus=AllReduce())
    for _ in range(3):
        trainer.run_round()
    return calls, sum(p.numel() for p in trainer.model.parameters())


def test_a_round_is_one_all_reduce_of_one_parameter_sized_buffer():
    for calls, numel in run_ranks(count_collectives, 2):
        assert calls == [numel + 7] * 3


def test_float32_workers_train_in_float32_and_bfloat16_weights_keep_float32_duals():
    trainer = make_trainer(ALGORITHMS["sisa"](penalty=2.0), rounds=3, dtype=torch.bfloat16)
    trainer.run_round()
    assert trainer.state.weights["0.weight"].dtype == torch.bfloat16
    assert trainer.state.workers["0.weight"]["dual"].dtype == torch.float32
    assert trainer.state.workers["0.weight"]["second_moment"].dtype == torch.float32


def wish_on_one_rank(rank, num_ranks):
    trainer = make_trainer(ALGORITHMS["sisa"](), rounds=10, consensus=AllReduce())
    trainer.wishes = lambda: Wishes(
        stop=rank == 1 and trainer.state.round_number == 3, save=rank == 0 and trainer.state.round_number == 1
    )
    return [(number, *outcome.wishes) for number, outcome, _ in trainer.run()]


def test_what_one_rank_wishes_all_learn_in_the_same_round_and_stop_after_it_if_asked_to():
    for rounds in run_ranks(wish_on_one_rank, 2):
        assert rounds == [(1, False, False), (2, False, True), (3, False, False), (4, True, False)]


def test_frozen_parameters_stay_out_of_the_message_and_unchanged():
    model = small_net()
    model[0].weight.requires_grad_(False)
    frozen = model[0].weight.detach().clone()
    trainer = make_trainer(ALGORITHMS["sisa"](consensus_l2=0.1), model=model)
    trainer.run_round()
    assert "0.weight" not in trainer.state.weights
    assert torch.equal(trainer.export()[0].weight, frozen)


def test_tied_weights_are_one_parameter():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    model[2].weight = model[0].weight
    trainer = make_trainer(ALGORITHMS["sisa"](penalty=5.0), model=model)
    trainer.run_round()
    assert set(trainer.state.weights) == {"0.weight", "0.bias", "2.bias"}
    exported = trainer.export()
    assert exported[0].weight is exported[2].weight


def test_the_global_random_state_is_left_alone():
    trainer = make_trainer(ALGORITHMS["sisa"](), model=small_net(dropout=0.5), rounds=2)
    state = torch.random.get_rng_state()
    list(trainer.run())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_same_seed_repeats_the_run_and_another_does_not():
    def final(seed):
        trainer = make_trainer(ALGORITHMS["sisa"](), model=small_net(dropout=0.5), rounds=5, seed=seed)
        list(trainer.run())
        return trainer.state.weights["0.weight"]

    assert torch.equal(final(3), final(3))
    assert not torch.equal(final(3), final(4))


def test_evaluation_counts_every_sample_once_whatever_the_slices():
    class Slice(InProcess):
        def __init__(self, rank):
            self.rank, self.num_ranks, self.sums = rank, 4, None

        def sum_(self, buffer):
            self.sums = buffer.clone()

    model, test = small_net(), blobs(num_samples=91)
    whole = evaluate(model, {}, test, consensus=InProcess())
    slices = [Slice(rank) for rank in range(4)]
    for each in slices:
        evaluate(model, {}, test, consensus=each)
    total = torch.stack([each.sums for each in slices]).sum(0)
    assert total[2] == 91
    assert (total[0] / 91).item() == pytest.approx(whole.loss, rel=1e-12)
    assert (total[1] / 91).item() == whole.accuracy


def test_an_evaluation_leaves_out_the_targets_that_are_to_be_ignored():
    model, test = small_net(), blobs()
    part = test.select(range(50))
    targets = test.targets.clone()
    targets[50:] = -100
    found = evaluate(model, {}, Dataset(test.inputs, targets, test.num_classes), consensus=InProcess())
    assert found == pytest.approx(evaluate(model, {}, part, consensus=InProcess()), rel=1e-12)


@pytest.mark.parametrize("fails", [False, True])
def test_an_evaluation_leaves_every_module_in_the_mode_that_it_was_in(fails):
    model, test = small_net(batch_norm=True, dropout=0.5), blobs()
    model[1].eval()
    tensors = {"0.weight": torch.zeros(8, 5, dtype=torch.float64)} if fails else {}
    with pytest.raises(RuntimeError) if fails else nullcontext():
        evaluate(model, tensors, test, consensus=InProcess())
    assert [module.training for module in model] == [True, False, True, True, True]
    assert model.training


def test_a_backbone_kept_in_evaluation_mode_trains_alike_however_often_it_is_evaluated():
    def final(eval_every):
        model = small_net(batch_norm=True)
        model[1].eval()
        trainer = make_trainer(ALGORITHMS["fedavg"](lr=0.1), model=model, rounds=4, eval_every=eval_every)
        list(trainer.run())
        return {**trainer.state.weights, **trainer.state.buffers}

    often, once = final(1), final(4)
    assert all(torch.equal(often[name], value) for name, value in once.items())
    assert often["1.num_batches_tracked"] == 0


def test_more_local_steps_are_refused_where_the_method_communicates_after_each_gradient():
    with pytest.raises(ValueError, match=r"`local_steps` must be 1 for algorithm=sisa.*got 2"):
        make_trainer(ALGORITHMS["sisa"](), local_steps=2)


def test_a_plan_has_the_command_lines_defaults():
    plan = TrainingPlan(rounds=1, batch_size=1)
    assert (plan.local_steps, plan.participation, plan.seed, plan.on_nonfinite) == (1, 1.0, 0, "raise")
