"""Messages sent during the backward pass, and compressed ones: the same optimizer, on real ranks."""

import copy

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from torch import nn
from torch.utils.checkpoint import checkpoint

from pisa_dist import NSISA, PISA, SISA
from pisa_dist.communication import Communication
from pisa_dist.compression import CODECS
from pisa_dist.overlap import make_buckets

pytestmark = pytest.mark.timeout(300)
SMALL = 2e-4  # MiB: several buckets for the nets below


class Net(nn.Module):
    """Tied weights, a checkpointed block, a parameter that only some passes use."""

    def __init__(self, dtype):
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.block = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 6))
        self.sometimes = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)
        self.to(dtype)

    def forward(self, x, *, uses_all=True):
        x = torch.tanh(self.inner(torch.tanh(self.inner(x))))
        x = x + checkpoint(self.block, x, use_reentrant=False)
        if uses_all:
            x = x + self.sometimes(x)
        return self.head(x)


def net(dtype=torch.float64, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net(dtype)


def batch(rank, step, dtype=torch.float64):
    generator = torch.Generator().manual_seed(100 * rank + step)
    x = torch.randn(8, 6, generator=generator, dtype=torch.float64).to(dtype) + 0.3 * rank
    return x, torch.randint(3, (8,), generator=generator)


MAKE = {
    "sisa": lambda model, **more: SISA(model.parameters(), penalty=3.0, preconditioner_scale=10.0, **more),
    "nsisa": lambda model, **more: NSISA(model.parameters(), penalty=20.0, **more),
    "pisa": lambda model, **more: PISA(model.parameters(), penalty=5.0, **more),
}


def trained(rank, name, *, steps=12, dtype=torch.float64, passes=1, compiled=False, unused=None, **more):
    """Weights after some steps; `passes` backward passes a step; on rank `unused` a parameter gets no gradient."""
    model = net(dtype)
    optimizer = MAKE[name](model, **more)
    forward = torch.compile(model, backend="aot_eager") if compiled else model
    for step in range(steps):
        optimizer.zero_grad()
        with optimizer.accumulate():
            for extra in range(1, passes):
                x, y = batch(rank, 1000 * extra + step, dtype)
                nn.functional.cross_entropy(forward(x), y).backward()
        x, y = batch(rank, step, dtype)
        nn.functional.cross_entropy(forward(x, uses_all=rank != unused), y).backward()
        optimizer.step()
    return nn.utils.parameters_to_vector(model.parameters()).detach(), optimizer.bytes_sent


CASES = {
    "sisa": {},
    "nsisa": {},
    "pisa": {},
    "accumulation": {"passes": 3},
    "unused on one rank": {"unused": 1},
    "compiled": {"compiled": True, "steps": 4},
    "worker weights": {"consensus_l2": 0.1},
}


def plain_and_overlapped(rank, num_ranks):
    found = {}
    for case, more in CASES.items():
        name = case if case in MAKE else "sisa"
        for dtype in (torch.float32, torch.float64):
            more = {**more, "dtype": dtype}
            if case == "worker weights":
                more["worker_weight"] = 1.0 + rank
            plain, sent = trained(rank, name, **more)
            overlapped, sent_too = trained(rank, name, overlap=True, bucket_mb=SMALL, **more)
            found[case, dtype] = plain, overlapped, sent, sent_too
    return found


@pytest.fixture(scope="module")
def two_ranks():
    return run_ranks(plain_and_overlapped, 2)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_overlapped_equals_plain(two_ranks, case, dtype):
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    ends = [rank[case, dtype] for rank in two_ranks]
    for plain, overlapped, sent, sent_too in ends:
        assert (plain - net(dtype).head.weight.sum()).norm() > 0.1
        assert (overlapped - plain).norm() <= tolerance * plain.norm()
        assert sent == sent_too > 0
    assert torch.equal(ends[0][1], ends[1][1]), "ranks hold the same weights"


def collectives_of(rank, num_ranks):
    """Sizes of the all-reduces of a step, with unused parameters on one rank, by the order in which they were made."""
    sizes, real = [], dist.all_reduce

    def counted(tensor, *args, **kwargs):
        sizes.append(tensor.numel())
        return real(tensor, *args, **kwargs)

    model = net()
    optimizer = SISA(model.parameters(), overlap=True, bucket_mb=SMALL)
    dist.all_reduce = counted
    try:
        x, y = batch(rank, 0)
        nn.functional.cross_entropy(model(x, uses_all=rank != 1), y).backward()
        before_step = len(sizes)
        optimizer.step()
    finally:
        dist.all_reduce = real
    return sizes, before_step, sum(p.numel() for p in model.parameters())


def test_messages_go_during_the_backward_pass_in_one_order_on_every_rank():
    (first, early, numel), (second, early_too, _) = run_ranks(collectives_of, 2)
    assert first == second
    assert len(first) > 3
    assert numel < sum(first) <= numel + 8, "every parameter once, and a few scalars"
    assert early == len(first), "with all gradients there, everything has gone before step()"
    assert early_too < early, "what has no gradient goes in step()"


def misuse(rank, num_ranks):
    said = {}

    def attempt(name, act, **more):
        model = net()
        optimizer = SISA(model.parameters(), overlap=True, bucket_mb=SMALL, **more)
        x, y = batch(rank, 0)
        try:
            act(model, optimizer, lambda: nn.functional.cross_entropy(model(x), y).backward())
        except (RuntimeError, FloatingPointError) as error:
            said[name] = f"{type(error).__name__}: {error}"

    def twice(model, optimizer, backward):
        backward()
        backward()

    def clip(model, optimizer, backward):
        backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()

    def change_lr(model, optimizer, backward):
        backward()
        optimizer.param_groups[0]["lr"] = 0.5
        optimizer.step()

    def poison(model, optimizer, backward):
        if rank == 1:
            with torch.no_grad():
                model.head.bias.fill_(float("nan"))
        backward()
        optimizer.step()

    for act in (twice, clip, change_lr, poison):
        attempt(act.__name__, act)
    attempt("skipped", poison, on_nonfinite="skip")
    # After every error a fresh start works.
    model = net()
    optimizer = SISA(model.parameters(), overlap=True)
    nn.functional.cross_entropy(model(batch(rank, 0)[0]), batch(rank, 0)[1]).backward()
    optimizer.step()
    return said


def test_misuse_is_one_clear_error_on_every_rank_and_never_a_hang():
    for said in run_ranks(misuse, 2):
        assert "accumulate()" in said["twice"]
        assert "clip" in said["clip"]
        assert "change them after step()" in said["change_lr"]
        assert "non-finite gradient on worker 1" in said["poison"]
        assert "step refused" in said["poison"]
        assert "skipped" not in said


def amp(rank, num_ranks):
    """Three steps with a GradScaler, the second with an overflow on rank 1 alone; weights after each."""
    ends = {}
    for overlap in (False, True):
        model = net(torch.float32)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        optimizer = SISA(model.parameters(), penalty=3.0, overlap=overlap, bucket_mb=SMALL, grad_scaler=scaler)
        weights = []
        for step in range(3):
            optimizer.zero_grad()
            x, y = batch(rank, step, torch.float32)
            if step == 1 and rank == 1:
                x = x * float("inf")
            loss = nn.functional.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            weights.append(nn.utils.parameters_to_vector(model.parameters()).detach())
        ends[overlap] = weights
    return ends


def test_a_grad_scaler_scales_and_skips_overlapped_steps_alike_on_all_ranks():
    first, second = run_ranks(amp, 2)
    for plain, overlapped in zip(first[False], first[True], strict=True):
        assert (plain - overlapped).norm() <= 1e-6 * plain.norm()
    assert torch.equal(first[True][0], first[True][1]), "the step with the overflow is skipped"
    assert not torch.equal(first[True][1], first[True][2])
    assert all(torch.equal(a, b) for a, b in zip(first[True], second[True], strict=True))


def test_buckets_go_from_the_last_parameter_to_the_first():
    assert make_buckets([4, 4, 4, 4, 4], bucket_bytes=8) == [[4, 3], [2, 1], [0]]
    assert make_buckets([4, 40, 4], bucket_bytes=8) == [[2, 1], [0]]
    assert make_buckets([4, 4], bucket_bytes=None) == [[0, 1]]


def test_one_worker_alone_may_overlap_and_compress_too():
    ends = []
    for more in ({}, {"overlap": True, "bucket_mb": SMALL}, {"compression": "int8"}):
        weights, sent = trained(0, "sisa", **more)
        ends.append(weights)
        assert sent == 0
    assert (ends[1] - ends[0]).norm() <= 1e-12 * ends[0].norm()
    assert torch.equal(ends[2], ends[0]), "nothing is sent, so nothing is rounded"


def test_a_dropped_optimizer_no_longer_listens():
    model = net()
    SISA(model.parameters(), overlap=True)
    optimizer = SISA(model.parameters(), penalty=3.0)
    x, y = batch(0, 0)
    for _ in range(2):  # twice without a step: only an overlapping optimizer minds
        nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()


def test_a_copy_of_an_overlapping_optimizer_trains_its_own_model():
    model = net()
    optimizer = SISA(model.parameters(), penalty=3.0, overlap=True, bucket_mb=SMALL)
    x, y = batch(0, 0)
    other_model, other = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (other_model, other)):
        nn.functional.cross_entropy(m(x), y).backward()
        o.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other_model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("settings", "megabytes"),
    [({}, 25), ({"compression": "int8"}, 2), ({"compression": "bf16", "bucket_mb": 7.5}, 7.5), ({"bucket_mb": 3}, 3)],
)
def test_a_bucket_is_smaller_where_compressed_sums_take_two_stages_unless_its_size_is_given(settings, megabytes):
    assert Communication(overlap=True, **settings).bucket_bytes == megabytes * 2**20
    assert Communication(**settings).bucket_bytes is None


@pytest.mark.parametrize(
    ("setting", "words"), [({"bucket_mb": 0}, "bucket_mb"), ({"compression": "fp4"}, "compression")]
)
def test_settings_out_of_range_are_refused(setting, words):
    with pytest.raises(ValueError, match=words):
        SISA(net().parameters(), overlap=True, **setting)


# Compression


@pytest.mark.parametrize("name", CODECS)
def test_a_code_keeps_numbers_to_its_precision_and_zero_and_tiny_blocks(name):
    codec = CODECS[name]
    values = torch.randn(3, 1024, generator=torch.Generator().manual_seed(0))
    values[1, :256] = 0
    values[2, :256] = 1e-44  # a block whose scale is no float any more
    encoded = codec.encode(values)
    assert encoded.dtype == torch.uint8
    assert encoded.numel() <= {"bf16": 0.5, "int8": 0.27}[name] * values.numel() * 4
    decoded = codec.decode(encoded, torch.float32)
    step = values.abs().view(3, -1, 256).amax(2, keepdim=True) / 127
    bound = {"bf16": values.abs() * 2**-8, "int8": (step / 2).expand(3, 4, 256).reshape(3, 1024) * 1.001}[name]
    assert ((decoded - values).abs() <= bound + 1e-38).all()
    assert torch.equal(decoded[1, :256], values[1, :256])


def compressed_sums(rank, num_ranks, name):
    """Sums of many messages of odd length with error feedback, and the exact sums."""
    from pisa_dist.compression import CompressedSums
    from pisa_dist.consensus import MessageBuffer

    consensus = CompressedSums(CODECS[name])
    generator = torch.Generator().manual_seed(rank)
    residual = torch.zeros(1003)
    total, exact = torch.zeros(1003), torch.zeros(1003)
    for _ in range(20):
        message = torch.randn(1003, generator=generator) * 10.0 ** torch.arange(1003).remainder(5).sub(2)
        exact += message
        buffer = MessageBuffer(
            [torch.Size([1000]), torch.Size([3])], 2, dtype=torch.float32, device=torch.device("cpu")
        )
        buffer.flat[:1003] = message + residual
        buffer.scalars.copy_(torch.tensor([1.0, float(rank)]))
        pending = consensus.start_sum(buffer)
        pending.advance()
        pending.wait()
        residual = pending.residual.clone()
        total += buffer.flat[:1003]
        assert buffer.scalars.tolist() == [num_ranks, num_ranks * (num_ranks - 1) / 2]
    left = residual.clone()
    dist.all_reduce(left)
    dist.all_reduce(exact)
    return total, exact, left, pending.num_bytes


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_with_error_feedback_nothing_is_lost_what_is_not_sent_stays_in_the_residuals(name, num_ranks):
    ranks = run_ranks(compressed_sums, num_ranks, name)
    total, exact, left, num_bytes = ranks[0]
    assert all(torch.equal(rank[0], total) for rank in ranks), "every rank has the same sum"
    torch.testing.assert_close(total + left, exact, rtol=1e-5, atol=1e-3)
    assert (total - exact).norm() > 0
    assert left.norm() < 0.1 * exact.norm()
    assert num_bytes < {"bf16": 0.56, "int8": 0.4}[name] * 4 * 1003, "padding included"


def compressed_training(rank, num_ranks):
    ends = {}
    for compression in (None, "bf16", "int8"):
        for overlap in (False, True):
            more = {"overlap": overlap, "bucket_mb": SMALL} if overlap else {}
            ends[compression, overlap] = trained(
                rank, "sisa", steps=300, dtype=torch.float32, compression=compression, **more
            )
    model, x, y = net(torch.float32), *batch(rank, 0, torch.float32)
    optimizer = SISA(model.parameters(), penalty=3.0, compression="int8", on_nonfinite="skip")
    states = []
    for step in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x * (float("nan") if step == 1 and rank else 1.0)), y).backward()
        optimizer.step()
        states.append([optimizer.state[p]["residual"].clone() for p in model.parameters()])
    again = net(torch.float32)
    reloaded = SISA(again.parameters(), penalty=3.0, compression="int8")
    again.load_state_dict(model.state_dict())
    reloaded.load_state_dict(optimizer.state_dict())
    for m, o in ((model, optimizer), (again, reloaded)):
        m.zero_grad()
        nn.functional.cross_entropy(m(x), y).backward()
        o.step()
    is_same = all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    return ends, states, is_same


def test_compressed_training_stays_near_and_its_residuals_are_state():
    ranks = run_ranks(compressed_training, 2)
    ends, states, is_same = ranks[0]
    exact, exact_bytes = ends[None, False]
    start = nn.utils.parameters_to_vector(net(torch.float32).parameters()).detach()
    for compression in ("bf16", "int8"):
        for overlap in (False, True):
            weights, _ = ends[compression, overlap]
            assert torch.equal(weights, ranks[1][0][compression, overlap][0])
            assert 0 < (weights - exact).norm() < 0.05 * (exact - start).norm()
    assert ends["bf16", False][1] < 0.8 * exact_bytes, "small nets pay for padding"
    for before, after in zip(states[0], states[1], strict=True):
        assert torch.equal(before, after), "a refused step leaves the residuals as they were"
    assert is_same, "a reloaded state goes on bit for bit"
