"""Ranks from the environment, devices, and the start-up check across ranks."""

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks

from pisa_dist.admm.penalty import LARGEST_PENALTY, divided_by_lr, grown_penalty
from pisa_dist.consensus import AllReduce, ConsensusError, InProcess, MessageBuffer, make_consensus
from pisa_dist.data.sampling import draw_batches, draw_participants, hosted_workers, num_present
from pisa_dist.distributed import launched_ranks, require_same, select_device
from pisa_dist.faults import Fault, describe_faults, fault_scalars

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, (3, 8, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1, 0)),
        ({"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "6", "SLURM_LOCALID": "2"}, (5, 6, 2)),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, (0, 1, 0)),
        ({"RANK": "1", "WORLD_SIZE": "2", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "9"}, (1, 2, 0)),
    ],
)
def test_ranks_come_from_torchrun_or_else_from_slurm(environment, expected, monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launched_ranks() == expected


def test_devices_are_selected_by_name_or_refused(monkeypatch):
    assert select_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert select_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert select_device("auto", local_rank=3) == torch.device("cuda", 1)
    assert select_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="one of the 2 CUDA devices"):
        select_device("cuda:7")
    for name in ("tpu", "meta", ""):
        with pytest.raises(ValueError, match="`device` must be auto, cpu, cuda or cuda:N"):
            select_device(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="needs a CUDA device, and this machine has none"):
        select_device("cuda")


def differ(rank, num_ranks):
    same = ["a", "b"]
    require_same(same, group=None, device=torch.device("cpu"))
    messages = []
    for mine in (["a", "c"], ["a", "b", "d"], ["a"]):
        with pytest.raises(ValueError, match="differ across ranks") as caught:
            require_same(mine if rank == 2 else same, group=None, device=torch.device("cpu"))
        messages.append(str(caught.value))
    group = dist.new_group([0, 1])
    if rank == 2:
        with pytest.raises(ValueError, match="`process_group` must contain this rank"):
            make_consensus(group)
    else:
        assert make_consensus(group).num_ranks == 2
    return messages


def test_ranks_that_differ_are_told_apart_on_every_rank_and_strangers_to_a_group_are_refused():
    for messages in run_ranks(differ, 3):
        assert messages == [
            "the models differ across ranks: rank 0 has b, rank 2 has c",
            "the models differ across ranks: rank 0 has nothing, rank 2 has d",
            "the models differ across ranks: rank 0 has b, rank 2 has nothing",
        ]


def lose_a_rank(rank, num_ranks):
    consensus = AllReduce()
    if rank == 1:
        return None
    with pytest.raises(ConsensusError, match="all-reduce of 4 numbers failed on rank 0 of 2") as caught:
        consensus.sum_(torch.zeros(4))
    return str(caught.value)


def test_a_rank_that_is_gone_is_an_error_that_names_collective_and_rank():
    message, _ = run_ranks(lose_a_rank, 2)
    assert "another rank has stopped" in message


def test_one_process_needs_no_group():
    assert isinstance(make_consensus(), InProcess)
    with pytest.raises(ValueError, match="is not initialised"):
        make_consensus(object())


def test_a_message_is_one_buffer_in_the_widest_type():
    tensors = [torch.ones(2, 3), torch.full((), 2.0, dtype=torch.float64)]
    total = InProcess().sum_message(tensors, [5.0, 7.0])
    assert total.flat.dtype == torch.float64
    assert total.num_bytes == 8 * 9
    assert total.flat.tolist() == [1.0] * 6 + [2.0, 5.0, 7.0]
    assert total.tensors[0].shape == (2, 3)
    assert InProcess().sum_message([torch.ones(1, dtype=torch.bfloat16)], []).flat.dtype == torch.float32
    views = MessageBuffer([torch.Size([2])], 0, dtype=torch.float32, device=torch.device("cpu"))
    views.tensors[0].fill_(3.0)
    assert views.flat.tolist() == [3.0, 3.0]


def test_faults_are_named_where_one_worker_has_one_and_counted_where_several_have():
    names = ["a", "b", "c"]
    fine = [torch.ones(2), torch.zeros(0), torch.ones(1)]
    assert Fault.find(fine, worker=4) is None
    assert Fault.find([torch.zeros(0)], worker=4) is None
    fault = Fault.find([*fine[:2], torch.tensor([float("nan")])], worker=4)
    assert fault == Fault(4, 2)
    assert describe_faults(fault_scalars(None), None, names) is None
    assert describe_faults(fault_scalars(fault), None, names) == "non-finite gradient on worker 4 in c"
    both = [a + b for a, b in zip(fault_scalars(fault), fault_scalars(Fault(1, 0)), strict=True)]
    assert "on 2 ranks, each of which names" in describe_faults(both, None, names)
    assert describe_faults(both, fault, names) == "non-finite gradient on worker 4 in c (and on 1 other ranks)"


def test_the_penalty_grows_from_the_second_step_at_the_interval_and_never_overflows():
    assert [grown_penalty(2.0, step=t, growth=3.0) for t in (1, 2, 3)] == [2.0, 6.0, 18.0]
    assert [grown_penalty(2.0, step=t, growth=3.0, interval=2) for t in (1, 2, 3, 4, 5)] == [2.0, 2.0, 6.0, 6.0, 18.0]
    assert grown_penalty(2.0, step=10**7) == 2.0
    assert grown_penalty(2.0, step=10**7, growth=1.5) == LARGEST_PENALTY
    assert grown_penalty(2.0, step=200, growth=1.5) == LARGEST_PENALTY
    assert divided_by_lr(3.0, 0.5) == 6.0
    assert divided_by_lr(3.0, 0.0) == pytest.approx(3e30)


def test_hosted_workers_cover_every_worker_once_in_blocks_that_differ_by_at_most_one():
    for num_workers in (1, 5, 10, 17):
        for num_ranks in range(1, num_workers + 1):
            blocks = [hosted_workers(num_workers, rank=r, num_ranks=num_ranks) for r in range(num_ranks)]
            assert [w for block in blocks for w in block] == list(range(num_workers))
            assert max(map(len, blocks)) - min(map(len, blocks)) <= 1
    with pytest.raises(ValueError, match="got 2 workers on 3 ranks: raise num_workers or launch at most 2"):
        hosted_workers(2, rank=0, num_ranks=3)


def test_draws_are_keyed_by_worker_and_round_and_repeat_no_sample_before_all_are_used():
    first = draw_batches(10, batch_size=4, local_steps=2, seed=0, worker=1, round_number=3)
    again = draw_batches(10, batch_size=4, local_steps=2, seed=0, worker=1, round_number=3)
    assert torch.equal(first.positions, again.positions)
    assert first.torch_seeds == again.torch_seeds
    assert first.positions.flatten().unique().numel() == 8
    for key in ({"worker": 2}, {"round_number": 4}, {"seed": 1}):
        other = draw_batches(
            10, **{"batch_size": 4, "local_steps": 2, "seed": 0, "worker": 1, "round_number": 3, **key}
        )
        assert not torch.equal(first.positions, other.positions)
    many = draw_batches(10, batch_size=5, local_steps=6, seed=0, worker=1, round_number=3)
    assert many.positions.flatten().bincount().tolist() == [3] * 10
    whole = draw_batches(3, batch_size=100, local_steps=2, seed=0, worker=0, round_number=1)
    assert sorted(whole.positions[0].tolist()) == [0, 1, 2]


def test_participants_are_drawn_without_bias_and_nobody_is_an_error():
    assert list(draw_participants(5, 1.0, seed=0, round_number=1)) == [0, 1, 2, 3, 4]
    counts = torch.zeros(10)
    for round_number in range(2000):
        drawn = draw_participants(10, 0.3, seed=0, round_number=round_number)
        assert len(set(drawn)) == 3
        counts[drawn] += 1
    assert (counts - 600).abs().max() < 100  # about five standard deviations
    with pytest.raises(ValueError, match=r"`participation` must select at least one of 10 workers, got 0\.04"):
        num_present(10, 0.04)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["pisa", "sisa", "nsisa", "synchronous", "fedavg"])
def test_training_on_cuda_equals_training_on_the_cpu(name):
    from problems import make_trainer, small_net

    from pisa_dist.algorithms import ALGORITHMS

    weights = {}
    for device in ("cpu", "cuda"):
        trainer = make_trainer(ALGORITHMS[name](), model=small_net(batch_norm=True).to(device), rounds=10)
        list(trainer.run())
        weights[device] = trainer.state.weights
    for key, value in weights["cpu"].items():
        torch.testing.assert_close(weights["cuda"][key].cpu(), value, rtol=1e-8, atol=1e-10)
