"""Small parameters that take their step end to end, and the plan that says which do."""

import pytest
import torch
from harness import run_ranks
from torch import nn

from pisa_dist import NSISA, SISA
from pisa_dist.admm.packing import PACK, PACKED_BELOW, pack, packs, unpack_

SHAPES = [(), (7,), (0,), (3, 4), (2, 3, 2, 2), (200, 50), (64, 100), (64, 90), (PACKED_BELOW - 1,)] + 5 * [(90, 90)]


def test_packs_hold_every_tensor_once_in_order_and_no_more_numbers_than_they_may():
    sizes = [0, 0, *range(1, PACKED_BELOW, 500), 0]
    found = packs(sizes)
    assert [place for places in found for place in places] == list(range(len(sizes)))
    assert len(found) > 1
    assert all(0 < sum(sizes[place] for place in places) <= PACK for places in found)
    assert packs([]) == []


def test_unpacking_writes_to_any_layout_and_type():
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(s, generator=generator) for s in SHAPES]
    flat = pack(tensors)
    assert flat.shape == (sum(t.numel() for t in tensors),)
    for make in (torch.empty_like, lambda t: torch.empty(t.shape[::-1]).permute(list(reversed(range(t.ndim))))):
        others = [make(t) for t in tensors]
        unpack_(flat, others)
        assert all(torch.equal(a, b) for a, b in zip(others, tensors, strict=True))
    doubles = [t.double() for t in tensors]
    unpack_(-flat, doubles)
    assert all(torch.equal(a, -b.double()) for a, b in zip(doubles, tensors, strict=True))


def trained(make, *, dtype=torch.float32, memory_format=torch.contiguous_format):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(s, generator=generator).to(dtype) for s in SHAPES]
    values = [v.to(memory_format=memory_format) if v.ndim == 4 else v for v in values]
    parameters = [nn.Parameter(v) for v in values]
    optimizer = make([{"params": parameters[::2]}, {"params": parameters[1::2], "penalty": 4.0}])
    for _ in range(4):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator).to(p)
        parameters[1].grad = None
        optimizer.step()
    return [t.clone() for p in parameters for t in (p.detach(), *optimizer.state[p].values())], optimizer


@pytest.mark.parametrize("make", [SISA, NSISA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_parameters_take_the_same_step_in_packs_as_one_by_one(monkeypatch, make, dtype, memory_format):
    together, optimizer = trained(make, dtype=dtype, memory_format=memory_format)
    assert any(len(places) > 1 for bucket in optimizer._plan.buckets for places in bucket.together)
    monkeypatch.setattr("pisa_dist.slots.PACKED_BELOW", -1)
    one_by_one, optimizer = trained(make, dtype=dtype, memory_format=memory_format)
    assert all(len(places) == 1 for bucket in optimizer._plan.buckets for places in bucket.together)
    for a, b in zip(together, one_by_one, strict=True):
        torch.testing.assert_close(a, b)


def test_the_plan_is_kept_until_what_it_depends_on_changes():
    layers = nn.Linear(3, 4), nn.Linear(4, 2)
    parameters = [p for layer in layers for p in layer.parameters()]
    optimizer = SISA(parameters)

    def plan_after(change):
        change()
        for p in parameters:
            p.grad = torch.ones_like(p)
        optimizer.step()
        return optimizer._plan

    first = plan_after(lambda: None)
    assert plan_after(lambda: optimizer.param_groups[0].update(lr=0.1, penalty=3.0)) is first
    second = plan_after(lambda: optimizer.param_groups[0].update(eps=0.5))
    assert second is not first
    assert {slot.preconditioner.eps for slot in second.slots} == {0.5}
    third = plan_after(lambda: parameters[0].requires_grad_(False))
    assert third.slots[0].parameter is parameters[1]
    assert len(plan_after(lambda: parameters[0].requires_grad_(True)).slots) == 4


DTYPES = (torch.float64, torch.float32, torch.bfloat16)
ACROSS_TYPES = {
    "sisa": lambda parameters: SISA(parameters, penalty=3.0, preconditioner_scale=10.0),
    "nsisa": lambda parameters: NSISA(parameters, newton_schulz_precision="float32"),
    "overlapped": lambda parameters: SISA(parameters, overlap=True),
    "compressed": lambda parameters: SISA(parameters, compression="bf16"),
}


def train_across_types(rank, num_ranks):
    """Start and end of vectors and matrices of three types in one optimizer, and of each type in an optimizer alone."""
    found = {}
    for name, make in ACROSS_TYPES.items():
        generator = torch.Generator().manual_seed(0)
        start = [torch.randn(s, generator=generator).to(d) for d in DTYPES for s in ((7,), (4, 3), (5,), (4, 3))]
        mixed, alone = ([nn.Parameter(t.clone()) for t in start] for _ in range(2))
        for parameters in (mixed, *(alone[i : i + 4] for i in range(0, 12, 4))):
            optimizer = make(parameters)
            for step in range(4):
                optimizer.zero_grad()
                generator = torch.Generator().manual_seed(10 * step + rank)
                pulls = 3 * torch.randn(4, generator=generator).tolist()
                sum((p * x).sum().double() for p, x in zip(parameters, pulls, strict=False)).backward()
                optimizer.step()
        found[name] = [[t.detach() for t in tensors] for tensors in (start, mixed, alone)]
    return found


@pytest.fixture(scope="module")
def across_types():
    return run_ranks(train_across_types, 2)


@pytest.mark.parametrize("name", ACROSS_TYPES)
def test_parameters_of_several_types_train_together_as_they_do_apart(across_types, name):
    tolerances = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2e-2}
    for rank in across_types:
        for old, together, apart in zip(*rank[name], strict=True):
            assert not torch.equal(together, old), "it has trained"
            tolerance = tolerances[old.dtype] if name != "compressed" else 2e-2
            torch.testing.assert_close(together, apart, rtol=tolerance, atol=tolerance)


def test_matrices_of_several_types_are_not_stacked(monkeypatch):
    monkeypatch.setattr("pisa_dist.slots.BATCHED_ON", {"cpu"})
    parameters = [nn.Parameter(torch.ones(4, 3, dtype=dtype)) for dtype in (*DTYPES, torch.float32)]
    optimizer = NSISA(parameters)
    assert optimizer._plan.buckets[0].together == [[0], [1, 3], [2]]
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    duals = [optimizer.state[p]["dual"].dtype for p in parameters]
    assert duals == [torch.float64, torch.float32, torch.float32, torch.float32]
