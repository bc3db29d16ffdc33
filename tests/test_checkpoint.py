"""Checkpoints: by worker, resumed on any number of ranks, refused where they do not fit."""

import json
from pathlib import Path

import pytest
import torch
from harness import run_ranks
from problems import comparable, make_trainer, small_net

from pisa_dist import checkpoint
from pisa_dist.algorithms import ALGORITHMS
from pisa_dist.consensus import AllReduce, InProcess

pytestmark = pytest.mark.timeout(120)

SETTINGS = {
    "sisa": {"penalty": 2.0, "penalty_growth": 1.01},
    "nsisa": {"penalty": 10.0},
    # A bias before batch norm has no gradient but rounding, which Adam would divide by its default eps of 1e-8.
    "synchronous": {"lr": 0.01, "optimizer_options": {"eps": 1e-3}},
    "fedavg": {"lr": 0.1},
}


def new_trainer(name, consensus, rounds, **plan):
    net = small_net(batch_norm=True, dropout=0.2)
    plan = {"participation": 0.6, "eval_every": 2, **plan}
    return make_trainer(
        ALGORITHMS[name](**SETTINGS[name]), num_workers=5, rounds=rounds, consensus=consensus, model=net, **plan
    )


def finish(trainer):
    lines = [comparable(metrics) for _, _, metrics in trainer.run() if metrics]
    return trainer.state.weights, trainer.state.buffers, lines


def save_after_three(rank, num_ranks, folder):
    for name in SETTINGS:
        trainer = new_trainer(name, AllReduce() if num_ranks > 1 else InProcess(), 3)
        list(trainer.run())
        checkpoint.save(trainer, Path(folder) / str(num_ranks) / name)


def resume_all(rank, num_ranks, folder):
    results = {}
    for saved_on in (1, 2, 3, 4):
        for name in SETTINGS:
            trainer = new_trainer(name, AllReduce() if num_ranks > 1 else InProcess(), 8)
            checkpoint.load(trainer, checkpoint.newest(Path(folder) / str(saved_on) / name))
            results[saved_on, name] = finish(trainer)
    return results


def test_saved_on_any_number_of_ranks_and_resumed_on_any_other_the_run_goes_on(tmp_path):
    for num_ranks in (1, 2, 3, 4):
        run_ranks(save_after_three, num_ranks, str(tmp_path))
    expected = {name: finish(new_trainer(name, InProcess(), 8)) for name in SETTINGS}
    for num_ranks in (1, 2, 3, 4):
        for (saved_on, name), found in run_ranks(resume_all, num_ranks, str(tmp_path))[0].items():
            case = f"{name}, saved on {saved_on}, resumed on {num_ranks}"
            for mine, theirs in zip(found[:2], expected[name][:2], strict=True):
                for key in theirs:
                    torch.testing.assert_close(mine[key], theirs[key], rtol=1e-10, atol=1e-12, msg=case)
            for line, reference in zip(found[2], expected[name][2][1:], strict=True):
                assert line == pytest.approx(reference, rel=1e-9, abs=1e-12), case


@pytest.mark.parametrize("name", SETTINGS)
def test_on_one_layout_the_resumed_run_is_the_uninterrupted_one_bit_for_bit(name, tmp_path):
    first = new_trainer(name, InProcess(), 3)
    list(first.run())
    checkpoint.save(first, tmp_path)
    second = new_trainer(name, InProcess(), 8)
    checkpoint.load(second, checkpoint.newest(tmp_path))
    whole = new_trainer(name, InProcess(), 8)
    resumed, expected = finish(second), finish(whole)
    assert all(torch.equal(resumed[0][key], value) for key, value in expected[0].items())
    assert resumed[2] == expected[2][1:]
    for parameter, kinds in whole.state.workers.items():
        assert all(torch.equal(second.state.workers[parameter][kind], value) for kind, value in kinds.items())


def test_every_workers_dual_has_its_own_place(tmp_path):
    trainer = new_trainer("sisa", InProcess(), 4, participation=1.0)
    list(trainer.run())
    path = checkpoint.save(trainer, tmp_path)
    other = new_trainer("sisa", InProcess(), 4)
    checkpoint.load(other, path)
    duals = other.state.workers["0.weight"]["dual"]
    assert torch.equal(duals, trainer.state.workers["0.weight"]["dual"])
    assert len({tuple(dual.flatten().tolist()) for dual in duals}) == 5


def test_an_unfinished_checkpoint_is_never_picked(tmp_path):
    trainer = new_trainer("fedavg", InProcess(), 2)
    list(trainer.run())
    path = checkpoint.save(trainer, tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "round_000009.unfinished").mkdir()
    assert checkpoint.newest(tmp_path) == path
    assert checkpoint.newest(tmp_path / "checkpoints") == path
    assert checkpoint.newest(tmp_path / "nothing") is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"algorithm": "fedavg"}, "its algorithm is fedavg, this run's is sisa"),
        ({"num_workers": 7}, "its num_workers is 7, this run's is 5"),
        ({"format": 99}, "its format is 99, this run's is 1"),
        (
            {"tensors": {"0.weight": [[8, 9], "torch.float64"]}},
            r"its tensors is 0\.weight \[\[8, 9\].*0\.weight \[\[8, 4\]",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_saying_what_was_found_and_expected(change, words, tmp_path):
    trainer = new_trainer("sisa", InProcess(), 2)
    path = checkpoint.save(trainer, tmp_path)
    contents = json.loads((path / "contents.json").read_text())
    (path / "contents.json").write_text(json.dumps({**contents, **change}))
    with pytest.raises(ValueError, match=words):
        checkpoint.load(trainer, path)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a checkpoint"):
        checkpoint.load(new_trainer("sisa", InProcess(), 2), tmp_path)
