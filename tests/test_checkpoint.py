"""Checkpoints: by worker, resumed on any number of ranks, refused where they do not fit."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from harness import run_ranks
from problems import comparable, make_trainer, small_net

from pisa_dist import checkpoint
from pisa_dist.algorithms import ALGORITHMS
from pisa_dist.consensus import AllReduce, InProcess

pytestmark = pytest.mark.timeout(600)

SETTINGS = {
    "sisa": {"penalty": 2.0, "penalty_growth": 1.01},
    "nsisa": {"penalty": 10.0},
    # A bias before batch norm has no gradient but rounding, which Adam and a metric would divide by their eps of 1e-8.
    "synchronous": {"lr": 0.01, "optimizer_options": {"eps": 1e-3}},
    "fedavg": {"lr": 0.1},
    "pisa_auto": {},
}


def new_trainer(name, consensus, rounds, **plan):
    net = small_net(batch_norm=name != "pisa_auto", dropout=0.2)
    algorithm = ALGORITHMS[name](**SETTINGS.get(name, {}))
    if algorithm.takes_local_steps:
        plan = {"local_steps": 2, **plan}
    plan = {"participation": 0.6, "eval_every": 2, **plan}
    return make_trainer(algorithm, num_workers=5, rounds=rounds, consensus=consensus, model=net, **plan)


def after_three(name, consensus):
    """A trainer of eight rounds that has done three: `pisa_auto` goes by their number."""
    trainer = new_trainer(name, consensus, 8)
    list(itertools.islice(trainer.run(), 3))
    return trainer


def finish(trainer):
    lines = [comparable(metrics) for _, _, metrics in trainer.run() if metrics]
    return trainer.state.weights, trainer.state.buffers, lines


def save(trainer, directory, **options):
    checkpointer = checkpoint.Checkpointer(directory, **options)
    checkpointer.save(trainer)
    assert checkpointer.close()
    return checkpoint.complete(directory)[0]


def save_after_three(rank, num_ranks, folder):
    for name in SETTINGS:
        trainer = after_three(name, AllReduce() if num_ranks > 1 else InProcess())
        save(trainer, Path(folder) / str(num_ranks) / name)


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


@pytest.mark.parametrize("name", ALGORITHMS)
def test_on_one_layout_the_resumed_run_is_the_uninterrupted_one_bit_for_bit(name, tmp_path):
    save(after_three(name, InProcess()), tmp_path)
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
    path = save(trainer, tmp_path)
    other = new_trainer("sisa", InProcess(), 4)
    checkpoint.load(other, path)
    duals = other.state.workers["0.weight"]["dual"]
    assert torch.equal(duals, trainer.state.workers["0.weight"]["dual"])
    assert len({tuple(dual.flatten().tolist()) for dual in duals}) == 5


def test_an_unfinished_checkpoint_is_never_picked(tmp_path):
    trainer = new_trainer("fedavg", InProcess(), 2)
    list(trainer.run())
    path = save(trainer, tmp_path / "checkpoints")
    half = tmp_path / "checkpoints" / "round_000009.unfinished"
    half.mkdir()
    (half / "contents.json").write_text("{}")
    assert checkpoint.newest(tmp_path) == path
    assert checkpoint.newest(tmp_path / "checkpoints") == path
    assert checkpoint.newest(tmp_path / "nothing") is None


def flip_a_byte(path):
    file = max(path.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def truncate(path):
    file = max(path.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-100])


DAMAGES = {
    "a flipped byte": (flip_a_byte, "its checksum differs"),
    "a truncated file": (truncate, "its checksum differs"),
    "a missing file": (lambda path: max(path.glob("*.distcp")).unlink(), "is missing"),
    "no metadata": (lambda path: (path / ".metadata").unlink(), "is missing"),
    "no checksums": (lambda path: (path / "checksums.json").unlink(), "cannot be read"),
    "garbage for checksums": (lambda path: (path / "checksums.json").write_text("{"), "cannot be read"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_falls_back_to_the_one_before_with_a_warning(kind, tmp_path, capsys):
    hurt, words = DAMAGES[kind]
    trainer = new_trainer("sisa", InProcess(), 4)
    paths = []
    for _ in range(2):
        trainer.run_round()
        paths.append(save(trainer, tmp_path))
    assert checkpoint.newest(tmp_path) == paths[1]
    hurt(paths[1])
    assert checkpoint.newest(tmp_path) == paths[0]
    warning = capsys.readouterr().err
    assert warning.startswith(f"warning: checkpoint {paths[1]} is passed over: ")
    assert words in warning
    with pytest.raises(ValueError, match=f"is damaged: .*{words}"):
        checkpoint.find(paths[1])


def test_only_the_last_few_are_kept(tmp_path):
    trainer = new_trainer("sisa", InProcess(), 9)
    for _ in range(5):
        trainer.run_round()
        save(trainer, tmp_path, keep_last=2)
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["round_000005", "round_000004"]
    save(trainer, tmp_path, keep_last=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round_000004", "round_000005"]


def test_what_is_saved_is_the_state_at_that_round_though_training_goes_on(tmp_path):
    trainer = new_trainer("sisa", InProcess(), 9)
    checkpointer = checkpoint.Checkpointer(tmp_path)
    trainer.run_round()
    expected = trainer.state.workers["0.weight"]["dual"].clone()
    checkpointer.save(trainer)
    for _ in range(3):
        trainer.run_round()
    assert checkpointer.close()
    other = new_trainer("sisa", InProcess(), 9)
    checkpoint.load(other, checkpoint.newest(tmp_path))
    assert torch.equal(other.state.workers["0.weight"]["dual"], expected)


def test_a_checkpoint_that_cannot_be_written_is_a_warning_and_the_older_ones_stay(tmp_path, monkeypatch, capsys):
    trainer = new_trainer("sisa", InProcess(), 9)
    path = save(trainer, tmp_path)

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_distributed", fail)
    trainer.run_round()
    checkpointer = checkpoint.Checkpointer(tmp_path)
    checkpointer.save(trainer)
    assert not checkpointer.close()
    assert "checkpoint not written, training goes on: [Errno 28] No space left on device" in capsys.readouterr().err
    assert checkpoint.newest(tmp_path) == path
    assert [p.name for p in tmp_path.iterdir()] == ["round_000000"]


@pytest.mark.parametrize(("num_after", "policy"), [(3, "resplit"), (8, "resplit"), (3, "drop")])
def test_another_number_of_workers_keeps_the_sum_of_the_duals_or_drops_the_removed_ones(num_after, policy, tmp_path):
    before = new_trainer("sisa", InProcess(), 4, participation=1.0)
    list(before.run())
    path = save(before, tmp_path)
    settings = ALGORITHMS["sisa"](**SETTINGS["sisa"])
    net = small_net(batch_norm=True, dropout=0.2)
    after = make_trainer(settings, num_workers=num_after, rounds=8, model=net)
    with pytest.raises(ValueError, match=f"its num_workers is 5, this run's is {num_after}"):
        checkpoint.load(after, path)
    checkpoint.load(after, path, resize=policy)
    for name, kinds in after.state.workers.items():
        old, new = before.state.workers[name]["dual"], kinds["dual"]
        old_sum = torch.tensordot(torch.tensor(before.worker_weight, dtype=torch.float64), old, dims=1)
        new_sum = torch.tensordot(torch.tensor(after.worker_weight, dtype=torch.float64), new, dims=1)
        if policy == "drop":
            assert torch.equal(new, old[:num_after])
        else:
            torch.testing.assert_close(new_sum, old_sum, rtol=1e-12, atol=1e-14)
        assert torch.equal(kinds["second_moment"][:3], before.state.workers[name]["second_moment"][:3])
    assert after.state.num_participations.tolist() == ([4] * min(5, num_after) + [0] * max(0, num_after - 5))
    list(after.run())
    assert after.state.round_number == 8


@pytest.mark.parametrize("num_after", [3, 8])
@pytest.mark.parametrize("name", ["pisa_local", "pisa_auto"])
def test_where_duals_are_averaged_over_the_workers_seen_another_number_of_workers_keeps_their_mean(
    name, num_after, tmp_path
):
    def trainer_of(num_workers, model):
        settings = ALGORITHMS[name]()
        return make_trainer(
            settings, num_workers=num_workers, rounds=2, participation=0.5, local_steps=2, model=model, batch_size=2
        )

    def mean_of_seen(trainer):
        seen = trainer.state.num_participations > 0
        weight = torch.tensor(trainer.worker_weight, dtype=torch.float64) * seen
        duals = {n: kinds["dual"] for n, kinds in trainer.state.workers.items() if "dual" in kinds}
        return {n: torch.tensordot(weight, dual.double(), dims=1) / weight.sum() for n, dual in duals.items()}, seen

    before = trainer_of(5, small_net())
    before.run_round()
    path = save(before, tmp_path)
    after = trainer_of(num_after, small_net())
    checkpoint.load(after, path, resize="resplit")
    expected, _ = mean_of_seen(before)
    found, seen = mean_of_seen(after)
    assert 0 < seen.sum() < num_after
    for parameter, mean in found.items():
        torch.testing.assert_close(mean, expected[parameter], rtol=1e-6, atol=1e-7)
        assert not after.state.workers[parameter]["dual"][~seen].any()


class Quadratic(torch.nn.Module):
    """Logits whose cross-entropy is strictly convex in the weights, so that the minimiser is unique."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))

    def forward(self, inputs):
        return inputs @ self.weight.T


@pytest.mark.parametrize("num_after", [2, 6])
def test_after_workers_leave_or_join_the_fixed_point_is_still_the_minimiser(num_after, tmp_path):
    algorithm = ALGORITHMS["pisa"](penalty=10.0, preconditioner_scale=1.0, consensus_l2=0.5)

    def trainer_of(num_workers, rounds):
        return make_trainer(
            algorithm, num_workers=num_workers, rounds=rounds, model=Quadratic(), batch_size=1000, eval_every=1000
        )

    first = trainer_of(4, 40)
    list(first.run())
    second = trainer_of(num_after, 1200)
    checkpoint.load(second, save(first, tmp_path), resize="resplit")
    list(second.run())
    undisturbed = trainer_of(num_after, 1200)
    list(undisturbed.run())
    weight = second.state.weights["weight"].requires_grad_()
    inputs = torch.cat([shard.inputs for shard in second.shards.values()])
    targets = torch.cat([shard.targets for shard in second.shards.values()])
    loss = torch.nn.functional.cross_entropy(inputs @ weight.T, targets) + 0.25 * weight.square().sum()
    (gradient,) = torch.autograd.grad(loss, weight)
    assert gradient.norm() < 1e-10
    torch.testing.assert_close(weight.detach(), undisturbed.state.weights["weight"], rtol=1e-9, atol=1e-9)


def test_inspect_shows_round_workers_duals_and_their_sum(tmp_path, capsys):
    trainer = new_trainer("sisa", InProcess(), 4, participation=1.0)
    list(trainer.run())
    path = save(trainer, tmp_path / "checkpoints")
    assert checkpoint.main(["inspect", str(tmp_path)]) == 0
    page = capsys.readouterr().out
    assert str(path) in page
    assert "round            4" in page
    norm = sum(k["dual"][2].square().sum() for k in trainer.state.workers.values()).sqrt().item()
    assert f"     2  0.2000   {norm:.6g}" in page
    alpha = torch.tensor(trainer.worker_weight, dtype=torch.float64)
    sums = [torch.tensordot(alpha, k["dual"], dims=1).square().sum() for k in trainer.state.workers.values()]
    assert f"norm of sum_i alpha_i pi_i: {sum(sums).sqrt().item():.6g}" in page
    flip_a_byte(path)
    assert checkpoint.main(["inspect", str(path)]) == 0
    assert "its checksum differs" in capsys.readouterr().out
    assert checkpoint.main(["inspect", str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"algorithm": "fedavg"}, "its algorithm is fedavg, this run's is sisa: set algorithm"),
        ({"num_workers": 7}, "its num_workers is 7, this run's is 5: set num_workers to that, or allow the change"),
        ({"seed": 7}, "its seed is 7, this run's is 0: set seed to that"),
        ({"shard_sizes": [1, 2]}, r"its shard_sizes is \[1, 2\], this run's is .*: set data and split"),
        ({"format": 99}, "its format is 99, this run's is 2: use the version of pisa_dist that wrote it"),
        (
            {"tensors": {"0.weight": [[8, 9], "torch.float64"]}},
            r"its tensors is 0\.weight \[\[8, 9\].*0\.weight \[\[8, 4\]",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_saying_what_was_found_and_expected(change, words, tmp_path):
    trainer = new_trainer("sisa", InProcess(), 2)
    path = save(trainer, tmp_path)
    contents = json.loads((path / "contents.json").read_text())
    (path / "contents.json").write_text(json.dumps({**contents, **change}))
    with pytest.raises(ValueError, match=words):
        checkpoint.load(trainer, path)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a checkpoint"):
        checkpoint.load(new_trainer("sisa", InProcess(), 2), tmp_path)
