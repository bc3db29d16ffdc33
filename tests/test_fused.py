"""The fused passes of the SISA step against the equations that everything else uses."""

import shutil

import pytest
import torch
from torch import nn

from pisa_dist import NSISA, SISA
from pisa_dist.admm.fused import COMPILED_FROM, PIECE, StepSettings, second_moment_commit_, second_moment_message
from pisa_dist.admm.fused import second_moment_step_ as step_alone_
from pisa_dist.admm.preconditioners import SecondMoment
from pisa_dist.admm.updates import consensus_update
from pisa_dist.admm.worker import worker_step

# torch.compile's own imports warn.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="skipped: needs g++")
SIZES = (1, 7, COMPILED_FROM, 2 * PIECE + 5)
RULES = {
    "adam": SecondMoment(),
    "adam bounded": SecondMoment(preconditioner_bound=0.7, second_moment_decay=0.9),
    "rmsprop": SecondMoment(scheme="rmsprop", second_moment_decay=0.95, eps=1e-3),
    "adagrad": SecondMoment(scheme="adagrad"),
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def problem(size, dtype, device):
    generator = torch.Generator().manual_seed(size)
    dual, gradient, weights, other = (
        torch.randn(size, generator=generator, dtype=torch.float64).to(device, dtype) for _ in range(4)
    )
    return dual, dual.square() / 3, gradient, weights, other


@pytest.mark.timeout(300)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
def test_fused_passes_equal_the_equations(compiled, rule, dtype, device):
    tolerance = {"rtol": 2e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-13}
    for step, size in enumerate(SIZES, start=1):
        dual, moment, gradient, weights, other = problem(size, dtype, device)
        settings = StepSettings(rule, penalty=3.0, preconditioner_scale=20.0, step=step, compiled=compiled)
        expected = worker_step(
            dual,
            {"second_moment": moment},
            gradient,
            preconditioner=rule,
            penalty=3.0,
            preconditioner_scale=20.0,
            worker_weight=0.4,
            step=step,
            shape=dual.shape,
        )
        before = [t.clone() for t in (dual, moment, gradient, weights)]
        message = torch.full_like(dual, torch.nan)
        second_moment_message(dual, moment, gradient, settings, worker_weight=0.4, out=message)
        torch.testing.assert_close(message, expected.message, **tolerance)
        for tensor, old in zip((dual, moment, gradient, weights), before, strict=True):
            assert torch.equal(tensor, old), "a message changes nothing"

        total = message + other
        moved = consensus_update(weights, total / 1.6, penalty_sum=2.5, consensus_l2=0.2)
        second_moment_commit_(
            dual, moment, gradient, weights, total, settings, weight_sum=1.6, penalty_sum=2.5, consensus_l2=0.2
        )
        torch.testing.assert_close(weights, moved, **tolerance)
        torch.testing.assert_close(dual, expected.dual, **tolerance)
        torch.testing.assert_close(moment, expected.preconditioner_state["second_moment"], **tolerance)
        assert torch.equal(gradient, before[2])

        dual, moment, _, alone, _ = problem(size, dtype, device)
        step_alone_(dual, moment, gradient, alone, settings, consensus_l2=0.2)
        weighted = expected.message / 0.4
        moved = consensus_update(before[3], weighted, penalty_sum=3.0, consensus_l2=0.2)
        torch.testing.assert_close(alone, moved, **tolerance)
        torch.testing.assert_close(dual, expected.dual, **tolerance)
        torch.testing.assert_close(moment, expected.preconditioner_state["second_moment"], **tolerance)


@needs_compiler
@pytest.mark.timeout(300)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_fused_nsisa_takes_the_same_steps(dtype):
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-13}
    ends = []
    for fused in (False, True):
        generator = torch.Generator().manual_seed(0)
        shapes = [(64, 96), (96, 64), (8, 4, 3, 3), (64,)]
        parameters = [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in shapes]
        optimizer = NSISA(
            parameters, penalty=5.0, lr=0.5, consensus_l2=0.01, newton_schulz_precision="float32", fused=fused
        )
        for _ in range(4):
            for p in parameters:
                p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype)
            optimizer.step()
        states = [value for p in parameters for value in optimizer.state[p].values()]
        ends.append([*parameters, *states])
    for plain, fused in zip(*ends, strict=True):
        torch.testing.assert_close(fused, plain, **tolerance)


@needs_compiler
@pytest.mark.timeout(300)
def test_a_fused_optimizer_trains_like_the_plain_one_with_schedules_and_bfloat16():
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        ends = []
        for fused in (False, True):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 10)).to(dtype)
            optimizer = SISA(model.parameters(), penalty=2.0, penalty_growth=1.01, consensus_l2=1e-3, fused=fused)
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
            generator = torch.Generator().manual_seed(1)
            for _ in range(15):
                inputs = torch.randn(16, 64, generator=generator).to(dtype)
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(inputs).float(), torch.arange(16) % 10).backward()
                optimizer.step()
                scheduler.step()
            ends.append(nn.utils.parameters_to_vector(model.parameters()).detach().float())
        assert (ends[0] - ends[1]).norm() <= tolerance * ends[0].norm()
