"""Workers that are groups of ranks (FSDP2): two replicas of two shards equal two workers that are one rank each."""

import io

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from pisa_dist import NSISA, SISA

pytestmark = pytest.mark.timeout(300)


def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # Five rows on two shards: unequal shards, and a bias of one element leaves a rank without any.
        layers = [nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3), nn.Linear(3, 1)]
        return nn.Sequential(*layers).double()


def loss_of(model, worker, step, part=slice(None)):
    generator = torch.Generator().manual_seed(100 * worker + step)
    x = torch.randn(8, 6, generator=generator, dtype=torch.float64) + 0.3 * worker
    y = torch.randn(8, 1, generator=generator, dtype=torch.float64)
    return (model(x[part]) - y[part]).square().mean()


MAKE = {
    "sisa": lambda model, **more: SISA(model.parameters(), penalty=3.0, preconditioner_scale=10.0, **more),
    "nsisa": lambda model, **more: NSISA(model.parameters(), penalty=20.0, **more),
}
CASES = {
    "sisa": ("sisa", {}),
    "nsisa": ("nsisa", {}),
    "overlapped": ("sisa", {"overlap": True, "bucket_mb": 2e-4}),
    "weights": ("sisa", {"consensus_l2": 0.1}),
    "clipped": ("sisa", {}),
}


def train(model, optimizer, worker, *, clip, part=slice(None), steps=8):
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, worker, step, part).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()


def unsharded(rank, num_ranks):
    ends = {}
    for case, (name, more) in CASES.items():
        model = net()
        weight = {"worker_weight": 1.0 + rank} if case == "weights" else {}
        optimizer = MAKE[name](model, **more, **weight)
        train(model, optimizer, rank, clip=case == "clipped")
        duals = [optimizer.state[p]["dual"].clone() for p in model.parameters()]
        ends[case] = [p.detach().clone() for p in model.parameters()], duals
    return ends


def sharded_model(mesh, **policy):
    model = net()
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh["shard"], **policy)
    return fully_shard(model, mesh=mesh["shard"], **policy)


def sharded(rank, num_ranks):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    worker, shard = mesh.get_coordinate()
    # The two ranks of a worker see halves of its batch, as under FSDP; the mean of their gradients is the batch's.
    part = slice(4 * shard, 4 * shard + 4)
    replicas = mesh["replicate"].get_group()
    found = {}
    for case, (name, more) in CASES.items():
        model = sharded_model(mesh)
        weight = {"worker_weight": 1.0 + worker} if case == "weights" else {}
        optimizer = MAKE[name](model, process_group=replicas, **more, **weight)
        train(model, optimizer, worker, clip=case == "clipped", part=part)
        state = [optimizer.state[p]["dual"] for p in model.parameters()]
        assert all(isinstance(dual, DTensor) for dual in state)
        found[case] = [p.full_tensor().detach() for p in model.parameters()], [d.full_tensor() for d in state], worker

    found["said"] = said = {}
    try:
        SISA(sharded_model(mesh).parameters())
    except ValueError as error:
        said["default group"] = str(error)
    model = sharded_model(mesh)
    optimizer = MAKE["sisa"](model, process_group=replicas)
    before = [p.full_tensor().detach().clone() for p in model.parameters()]
    loss_of(model, worker, 0).backward()
    if rank == 3:  # one shard of one worker
        model[0].weight.grad.to_local().fill_(float("nan"))
    try:
        optimizer.step()
    except FloatingPointError as error:
        said["poisoned"] = str(error)
    after = [p.full_tensor().detach() for p in model.parameters()]
    found["unchanged"] = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))

    # Saved and loaded: goes on as if nothing had happened.
    optimizer.zero_grad()
    train(model, optimizer, worker, clip=False, part=part, steps=3)
    stream = io.BytesIO()
    torch.save(optimizer.state_dict(), stream)
    stream.seek(0)
    again = sharded_model(mesh)
    again.load_state_dict(model.state_dict())
    reloaded = MAKE["sisa"](again, process_group=replicas)
    reloaded.load_state_dict(torch.load(stream, weights_only=False))
    for m, o in ((model, optimizer), (again, reloaded)):
        train(m, o, worker, clip=False, part=part, steps=2)
    found["resumed"] = all(
        torch.equal(a.to_local(), b.to_local()) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )

    # All shards refuse alike after parameters that are not sharded have joined, too.
    reloaded.add_param_group({"params": [nn.Parameter(torch.ones(2, dtype=torch.float64))]})
    if rank == 3:
        again[0].weight.grad.to_local().fill_(float("nan"))
    try:
        reloaded.step()
    except FloatingPointError as error:
        said["poisoned beside plain parameters"] = str(error)

    # bf16 in the forward and backward pass, float32 weights, state and messages.
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    low = sharded_model(mesh, mp_policy=policy).float()
    optimizer = MAKE["sisa"](low, process_group=replicas)
    first = None
    for _ in range(30):
        optimizer.zero_grad()
        loss = (low(torch.ones(4, 6)) - 0.7).float().square().mean()
        loss.backward()
        optimizer.step()
        first = first or float(loss)
    found["mixed"] = first, float(loss), {str(optimizer.state[p]["dual"].dtype) for p in low.parameters()}
    dist.barrier()
    return found


@pytest.fixture(scope="module")
def both():
    return run_ranks(unsharded, 2), run_ranks(sharded, 4)


@pytest.mark.parametrize("case", CASES)
def test_two_replicas_of_two_shards_equal_two_workers(both, case):
    plain, dealt = both
    start = [p.detach() for p in net().parameters()]
    for rank in dealt:
        weights, duals, worker = rank[case]
        for mine, theirs, old in zip(weights, plain[worker][case][0], start, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
            assert not torch.equal(mine, old)
        for mine, theirs in zip(duals, plain[worker][case][1], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    assert not torch.equal(plain[0][case][1][0], plain[1][case][1][0]), "each worker has its own dual"


def test_the_default_group_is_refused_because_it_would_sum_different_shards(both):
    for rank in both[1]:
        assert 'process_group=mesh["replicate"].get_group()' in rank["said"]["default group"]


def test_a_bad_shard_makes_every_shard_of_every_worker_refuse(both):
    for rank in both[1]:
        for case in ("poisoned", "poisoned beside plain parameters"):
            assert "non-finite gradient on worker 1" in rank["said"].get(case, "nothing")
        assert rank["unchanged"]


def test_sharded_state_is_saved_and_loaded_like_any_other(both):
    assert all(rank["resumed"] for rank in both[1])


def test_a_mixed_precision_policy_trains_with_state_in_float32(both):
    for rank in both[1]:
        first, last, dtypes = rank["mixed"]
        assert last < 0.2 * first
        assert dtypes == {"torch.float32"}
