"""Gradients of all workers at once equal those of one after the other; what vmap cannot serve takes the other path."""

import copy
import math
from contextlib import nullcontext
from itertools import pairwise

import numpy as np
import pytest
import torch
from harness import run_ranks
from problems import blobs, comparable, make_trainer, small_net
from test_algorithms import SETTINGS
from torch import nn
from torch.nn import functional

from pisa_dist import checkpoint
from pisa_dist.algorithms import ALGORITHMS
from pisa_dist.consensus import AllReduce, InProcess
from pisa_dist.data.datasets import Dataset
from pisa_dist.data.sampling import draw_batches, draw_many
from pisa_dist.faults import Fault
from pisa_dist.gradients import Sequential, Vectorized
from pisa_dist.metrics import cross_entropies, cross_entropy
from pisa_dist.minibatches import ShardPool, Stack
from pisa_dist.models import CNN, MLP
from pisa_dist.trainer import Trainer, TrainingPlan
from pisa_dist.vectorize import choose_path

pytestmark = pytest.mark.timeout(300)

TOLERANCES = {torch.float64: {"rtol": 1e-12, "atol": 1e-12}, torch.float32: {"rtol": 1e-5, "atol": 1e-5}}


def uneven(dataset, cuts):
    """Shards between the cuts: some smaller than a minibatch, in no order of size."""
    return {i: dataset.select(list(range(a, b))) for i, (a, b) in enumerate(pairwise(cuts))}


def uneven_trainer(name, vectorize, *, model=None, dtype=torch.float64, rounds=6, consensus=None, **plan):
    """Nine workers with 3 to 20 samples each, minibatches of 8; batch norm, whose buffers change too."""
    data = blobs(num_samples=100, dtype=dtype).select(torch.randperm(100, generator=torch.Generator().manual_seed(1)))
    cuts = [0, 5, 20, 40, 43, 51, 60, 80, 92, 100]
    consensus = consensus or InProcess()
    shards = uneven(data, cuts)
    sizes = [len(shard) for shard in shards.values()]
    algorithm = ALGORITHMS[name](**SETTINGS[name])
    if name == "synchronous":  # rounding alone moves a bias before batch norm, which Adam would divide by its eps
        algorithm = ALGORITHMS[name](lr=0.01, optimizer_options={"eps": 1e-3})
    trainer = make_trainer(algorithm, num_workers=9, dtype=dtype, consensus=consensus)
    return Trainer(
        model=small_net(dtype=dtype) if model is None else model,
        algorithm=algorithm,
        shards={i: shards[i] for i in trainer.hosted},
        test=blobs(seed=1, dtype=dtype),
        shard_sizes=sizes,
        worker_weight=[size / 100 for size in sizes],
        plan=TrainingPlan(rounds=rounds, batch_size=8, eval_every=2, vectorize=vectorize, **plan),
        consensus=consensus,
    )


def finish(trainer):
    lines = [comparable(metrics) for _, _, metrics in trainer.run() if metrics]
    state = trainer.state
    duals = {f"{name}/{kind}": v for name, kinds in state.workers.items() for kind, v in kinds.items()}
    return {**state.weights, **state.buffers, **duals}, lines


def assert_equal_runs(found, expected, *, state_factor=1.0, **tolerance):
    assert found[0].keys() == expected[0].keys()
    for name, value in expected[0].items():
        factor = state_factor if "/" in name else 1.0
        bounds = {key: factor * bound for key, bound in tolerance.items()}
        torch.testing.assert_close(found[0][name], value, **bounds, msg=lambda text, name=name: f"{name}: {text}")
    for line, reference in zip(found[1], expected[1], strict=True):
        assert line == pytest.approx(reference, rel=10 * tolerance["rtol"], abs=10 * tolerance["atol"])


# Equality


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("participation", [1.0, 0.6])
@pytest.mark.parametrize("name", SETTINGS)
def test_all_workers_at_once_equal_one_after_the_other(name, participation, dtype):
    steps = 3 if ALGORITHMS[name].takes_local_steps else 1
    settings = {"dtype": dtype, "participation": participation, "local_steps": steps}
    at_once = uneven_trainer(name, "true", **settings)
    one_by_one = uneven_trainer(name, "false", **settings)
    assert isinstance(at_once.choice.path, Vectorized)
    assert isinstance(one_by_one.choice.path, Sequential)
    found, expected = finish(at_once), finish(one_by_one)
    # Newton-Schulz steps multiply rounding where a matrix is nearly singular.
    assert_equal_runs(found, expected, state_factor=10.0 if name == "nsisa" else 1.0, **TOLERANCES[dtype])
    assert at_once.vectorize_refusal is None, "every call went through vmap"
    if dtype == torch.float32:
        assert any(not torch.equal(found[0][n], v) for n, v in expected[0].items()), "two ways round differently"


def test_batch_norm_buffers_of_all_workers_at_once_equal_those_of_one_after_the_other():
    runs = [
        uneven_trainer("fedavg", vectorize, model=small_net(batch_norm=True), local_steps=2)
        for vectorize in ("true", "false")
    ]
    assert isinstance(runs[0].choice.path, Vectorized)
    found, expected = finish(runs[0]), finish(runs[1])
    assert_equal_runs(found, expected, rtol=1e-11, atol=1e-12)
    assert expected[0]["1.num_batches_tracked"].item() == 12
    assert runs[0].vectorize_refusal is None


@pytest.mark.parametrize("model", ["mlp", "cnn", "embedding"])
def test_models_of_every_kind_agree(model):
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(10, (96,), generator=generator)
    if model == "embedding":
        net = nn.Sequential(nn.Embedding(20, 6), nn.LayerNorm(6), nn.Flatten(), nn.Linear(30, 10)).double()
        inputs = torch.randint(20, (96, 5), generator=generator)
    else:
        net = (MLP if model == "mlp" else CNN)((1, 16, 16), 10).double()
        inputs = torch.randn(96, 1, 16, 16, dtype=torch.float64, generator=generator)
    data = Dataset(inputs, targets, 10)

    def run(vectorize):
        return finish(
            Trainer(
                model=copy.deepcopy(net),
                algorithm=ALGORITHMS["fedavg"](lr=0.05),
                shards={i: data.select(list(range(24 * i, 24 * (i + 1)))) for i in range(4)},
                test=data,
                shard_sizes=[24] * 4,
                worker_weight=[0.25] * 4,
                plan=TrainingPlan(rounds=2, batch_size=8, local_steps=2, vectorize=vectorize),
                consensus=InProcess(),
            )
        )

    assert_equal_runs(run("true"), run("false"), **TOLERANCES[torch.float64])


def test_a_parameter_that_the_loss_does_not_reach_has_a_zero_gradient():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.spare = small_net(), nn.Parameter(torch.ones(2, dtype=torch.float64))

        def forward(self, inputs):
            return self.net(inputs)

    trainer = uneven_trainer("sisa", "true", model=Unused())
    list(trainer.run())
    assert trainer.vectorize_refusal is None
    assert torch.equal(trainer.state.weights["spare"], torch.ones(2, dtype=torch.float64))


def test_ignored_targets_count_in_neither_loss():
    logits = torch.randn(3, 4, 5, 7, dtype=torch.float64)
    targets = torch.randint(7, (3, 4, 5))
    targets[0, :, 2:] = -100
    targets[2, 1] = -100
    expected = torch.stack([cross_entropy(a, b) for a, b in zip(logits, targets, strict=True)])
    torch.testing.assert_close(cross_entropies(logits, targets), expected, rtol=1e-13, atol=1e-13)


def test_blocks_of_workers_equal_all_of_them_in_one():
    whole = uneven_trainer("nsisa", "true", participation=0.8)
    cut = uneven_trainer("nsisa", "true", participation=0.8)
    cut.choice = cut.choice._replace(block=3)
    assert_equal_runs(finish(cut), finish(whole), **TOLERANCES[torch.float64])


def runs_on_ranks(rank, num_ranks):
    return {
        name: finish(
            uneven_trainer(
                name,
                "true",
                consensus=AllReduce(),
                model=small_net(batch_norm=True),
                participation=0.7,
                local_steps=steps,
            )
        )
        for name, steps in (("sisa", 1), ("scaffold", 2))
    }


def test_two_ranks_at_once_equal_one_process_one_after_the_other():
    by_rank = run_ranks(runs_on_ranks, 2)
    for name, steps in (("sisa", 1), ("scaffold", 2)):
        one = uneven_trainer(name, "false", model=small_net(batch_norm=True), participation=0.7, local_steps=steps)
        expected = finish(one)
        for found in by_rank:
            for key in {**one.state.weights, **one.state.buffers}:
                torch.testing.assert_close(found[name][0][key], expected[0][key], rtol=1e-10, atol=1e-12)


# Which path


def test_dropout_takes_the_other_path_and_draws_the_same():
    refused = uneven_trainer("fedavg", "true", model=small_net(dropout=0.5))
    assert isinstance(refused.choice.path, Sequential)
    assert "random" in refused.choice.reason
    expected = uneven_trainer("fedavg", "false", model=small_net(dropout=0.5))
    found = finish(refused), finish(expected)
    assert all(torch.equal(found[0][0][name], value) for name, value in found[1][0].items())


class DecidesByData(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.calls = small_net(), 0

    def forward(self, inputs):
        self.calls += 1
        return self.net(inputs) if inputs.sum() > 0 else -self.net(inputs)


class HidesABuffer(nn.Module):
    """Adds up in a buffer what vmap cannot see: a number, and so the same for all workers."""

    def __init__(self):
        super().__init__()
        self.net = small_net()
        self.register_buffer("total", torch.zeros((), dtype=torch.float64))

    def forward(self, inputs):
        self.total.fill_(float(inputs.detach().flatten()[0]) if not is_batched(inputs) else 1.0)
        return self.net(inputs)


def is_batched(tensor):
    return torch._C._functorch.is_batchedtensor(tensor)


@pytest.mark.parametrize(
    ("model", "words"),
    [(DecidesByData, "data-dependent control flow"), (HidesABuffer, "its buffers under vmap differ")],
)
def test_a_model_that_vmap_cannot_serve_takes_the_other_path_and_says_why(model, words):
    net = model()
    trainer = uneven_trainer("sisa", "true", model=net)
    assert isinstance(trainer.choice.path, Sequential)
    assert words in trainer.choice.reason
    assert getattr(net, "calls", 0) == 0, "a copy was tried"
    assert trainer.run_round().problem is None


class RandomLater(nn.Module):
    """Dropout from the third call on: vmap refuses in the middle of a run."""

    def __init__(self):
        super().__init__()
        self.net, self.rounds = small_net(), 0

    def forward(self, inputs):
        return functional.dropout(self.net(inputs), 0.5, self.training and self.rounds >= 2)


def test_a_call_that_vmap_refuses_after_all_goes_through_the_other_path_alone():
    nets = [RandomLater(), RandomLater()]
    trainers = [uneven_trainer("fedavg", v, model=n) for v, n in zip(("true", "false"), nets, strict=True)]
    assert isinstance(trainers[0].choice.path, Vectorized)
    for number in range(5):
        for trainer, net in zip(trainers, nets, strict=True):
            net.rounds = number
            is_first = trainer is trainers[0] and number == 2
            # Once: a further warning would be an error.
            with pytest.warns(UserWarning, match="^vectorize: .*random") if is_first else nullcontext() as said:
                trainer.run_round()
            if is_first:
                assert len(said) == 1
                assert "\n" not in str(said[0].message)
        assert (trainers[0].vectorize_refusal is None) == (number < 2)
        assert trainers[1].vectorize_refusal is None
    assert "random" in trainers[0].vectorize_refusal
    for name, value in trainers[1].state.weights.items():
        torch.testing.assert_close(trainers[0].state.weights[name], value, **TOLERANCES[torch.float64])


class FailsLater(RandomLater):
    def forward(self, inputs):
        if self.rounds:
            raise RuntimeError("of the model's own")
        return self.net(inputs)


def test_a_model_that_fails_by_itself_is_no_refusal():
    net = FailsLater()
    trainer = uneven_trainer("fedavg", "true", model=net)
    net.rounds = 1
    with pytest.raises(RuntimeError, match="of the model's own"):
        trainer.run_round()
    assert trainer.vectorize_refusal is None


def choice_for(model, inputs, vectorize="auto", num_workers=5, batch_size=32):
    pool = ShardPool([Dataset(inputs, torch.zeros(len(inputs), dtype=torch.int64), 10)] * num_workers)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return choose_path(model, weights, dict(model.named_buffers()), pool, vectorize=vectorize, batch_size=batch_size)


def test_the_rule_takes_small_models_at_once_and_large_ones_one_after_the_other():
    torch.manual_seed(0)  # two equal inputs of a maximum, to rounding, and one path may take the other's gradient
    images = torch.randn(32, 3, 32, 32)
    assert choice_for(MLP((3, 32, 32), 10, [32]), images).reason is None
    assert "megaflops" in choice_for(CNN((3, 32, 32), 10), images).reason
    assert choice_for(CNN((3, 32, 32), 10), images[:4], batch_size=4).reason is None
    assert "bytes" in choice_for(MLP((3, 32, 32), 10, [512, 512]), images).reason
    assert isinstance(choice_for(CNN((3, 32, 32), 10), images, "true").path, Vectorized)
    assert choice_for(MLP((3, 32, 32), 10, [32]), images, num_workers=1).reason == "there is one worker in this process"
    assert choice_for(MLP((3, 32, 32), 10, [32]), images, "false").reason == "vectorize=false"


def test_a_block_bounds_what_workers_take():
    small = choice_for(MLP((64,), 10, [64]), torch.randn(32, 64))
    larger = choice_for(MLP((64,), 10, [256]), torch.randn(32, 64))
    activations = choice_for(MLP((64,), 10, [64]), torch.randn(512, 64), batch_size=512)
    assert small.block > larger.block >= 4
    assert small.block > activations.block >= 4
    model_bytes = 4 * (64 * 64 + 64 + 64 * 10 + 10)
    assert small.block * 8 * model_bytes < 32 * 2**20 < 2 * small.block * 8 * model_bytes


def test_a_choice_leaves_the_random_state_and_the_gradients_of_the_model_alone():
    state, net = torch.random.get_rng_state(), small_net(dropout=0.5)
    uneven_trainer("sisa", "true", model=net)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.grad is None for p in net.parameters())


def test_a_run_that_is_resumed_takes_the_same_path_bit_for_bit(tmp_path):
    first = uneven_trainer("sisa", "auto", rounds=3, participation=0.7)
    list(first.run())
    checkpointer = checkpoint.Checkpointer(tmp_path)
    checkpointer.save(first)
    checkpointer.close()
    second = uneven_trainer("sisa", "auto", rounds=6, participation=0.7)
    checkpoint.load(second, checkpoint.newest(tmp_path))
    whole = uneven_trainer("sisa", "auto", rounds=6, participation=0.7)
    assert isinstance(whole.choice.path, Vectorized)
    resumed, expected = finish(second), finish(whole)
    assert all(torch.equal(resumed[0][name], value) for name, value in expected[0].items())


# Faults


class NaNFor(nn.Module):
    """NaN in one parameter's gradient for a worker whose first feature is large."""

    def __init__(self):
        super().__init__()
        self.net = small_net()

    def forward(self, inputs):
        scale = torch.where(inputs[:, 0].amax() > 100, math.nan, 1.0)
        hidden = torch.tanh(functional.linear(inputs, self.net[0].weight, self.net[0].bias))
        return functional.linear(hidden, self.net[2].weight) + self.net[2].bias * scale


@pytest.mark.parametrize("block", [2, 100])
def test_a_fault_names_the_worker_and_the_parameter_whatever_the_block(block):
    for vectorize in ("true", "false"):
        trainer = uneven_trainer("sisa", vectorize, model=NaNFor())
        assert isinstance(trainer.choice.path, Vectorized if vectorize == "true" else Sequential)
        trainer.choice = trainer.choice._replace(block=block)
        shard = trainer.shards[4]
        inputs = shard.inputs.clone()
        inputs[:, 0] = 1000.0
        trainer.shards[4] = Dataset(inputs, shard.targets, 3)
        with pytest.raises(FloatingPointError, match=r"non-finite gradient on worker 4 in net\.0\.weight in round 1"):
            trainer.run_round()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_gradients_whose_norm_overflows_are_no_fault(dtype):
    large = torch.full((4,), 3e38, dtype=dtype)
    assert Fault.find([torch.ones(2), large], worker=3) is None
    large[2] = math.inf
    assert Fault.find([torch.ones(2), large], worker=3) == Fault(3, 1)


# Draws


def draws(**changes):
    key = {"size": 8, "local_steps": 2, "seed": 5, "round_number": 3}
    sizes = np.array([8, 9, 20, 63, 64, 65, 1000])
    return sizes, draw_many(sizes, workers=np.arange(7), **{**key, **changes})


def test_a_workers_draw_depends_on_no_other_worker():
    sizes, together = draws()
    for worker, size in enumerate(sizes):
        alone = draw_batches(int(size), batch_size=8, local_steps=2, seed=5, worker=worker, round_number=3)
        assert np.array_equal(alone.positions.numpy(), together.positions[worker])
        assert alone.torch_seeds == together.torch_seeds[worker].tolist()


def test_minibatches_repeat_no_sample_before_all_are_used():
    for steps in (1, 2, 7, 40):
        sizes, drawn = draws(local_steps=steps)
        for size, positions in zip(sizes, drawn.positions, strict=True):
            counts = np.bincount(positions.ravel(), minlength=size)
            assert len(counts) == size
            assert counts.max() - counts.min() <= 1


def test_positions_are_drawn_until_enough_of_them_differ():
    workers = np.arange(20_000)
    drawn = draw_many(np.full(20_000, 8), size=2, local_steps=1, seed=0, workers=workers, round_number=1)
    first, second = drawn.positions[:, 0].T
    assert (first != second).all()
    assert drawn.positions.max() < 8


def test_every_order_and_every_pair_is_drawn_equally_often():
    rounds = 6000
    orders, pairs, firsts = {}, np.zeros((40, 40)), np.zeros(40)
    for number in range(rounds):
        small = draw_many(
            np.array([3]), size=1, local_steps=3, seed=0, workers=np.array([number % 7]), round_number=number
        )
        order = tuple(small.positions.ravel())
        orders[order] = orders.get(order, 0) + 1
        large = draw_many(np.array([40]), size=4, local_steps=1, seed=0, workers=np.array([1]), round_number=number)
        chosen = large.positions.ravel()
        pairs[np.ix_(chosen, chosen)] += 1
        firsts[chosen[0]] += 1
    expected = rounds / 6
    assert len(orders) == 6
    assert sum((n - expected) ** 2 / expected for n in orders.values()) < 25  # chi-square, 5 degrees: p < 2e-4
    of_pairs, expected = pairs[np.triu_indices(40, 1)], rounds * 6 / 780
    assert ((of_pairs - expected) ** 2 / expected).sum() < 950  # 779 degrees: 4.3 standard deviations
    assert ((firsts - rounds / 40) ** 2 / (rounds / 40)).sum() < 80  # 39 degrees


def test_streams_of_neighbouring_keys_do_not_follow_each_other():
    words = []
    for change in ({}, {"seed": 6}, {"round_number": 4}):
        words.append(draws(**change)[1].torch_seeds)
    seeds = np.concatenate([w.ravel() for w in words])
    assert len(set(seeds.tolist())) == seeds.size
    bits = np.unpackbits(seeds.astype(">i8").view(np.uint8).reshape(-1, 8), axis=1)[:, 1:]
    assert abs(bits.mean() - 0.5) < 4 * 0.5 / bits.size**0.5


def test_the_stack_puts_minibatches_of_one_size_together_and_points_at_the_workers_own_samples():
    shards = [Dataset(torch.full((n, 1), float(i)), torch.full((n,), i), 9) for i, n in enumerate([3, 9, 5, 12, 3])]
    pool = ShardPool(shards)
    stack = Stack(
        pool,
        [0, 1, 3, 4],
        workers=range(10, 15),
        batch_size=8,
        local_steps=2,
        seed=0,
        round_number=1,
        device=torch.device("cpu"),
    )
    assert stack.rows == [1, 3, 0, 4]
    assert [(s.rows, tuple(s.indices.shape)) for s in stack.sections(0, 4)] == [
        (slice(0, 2), (2, 2, 8)),
        (slice(2, 4), (2, 2, 3)),
    ]
    assert [(s.rows, len(s.indices)) for s in stack.sections(1, 3)] == [(slice(0, 1), 1), (slice(1, 2), 1)]
    for place, row in enumerate(stack.rows):
        (section,) = stack.sections(place, place + 1)
        inputs, targets = pool.gather(section.indices)
        assert inputs.eq(row).all()
        assert targets.eq(row).all()
        draw = draw_batches(len(shards[row]), batch_size=8, local_steps=2, seed=0, worker=10 + row, round_number=1)
        assert torch.equal(section.indices[0], draw.positions + int(pool.starts[row]))
