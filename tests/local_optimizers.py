"""PISA with local steps as a drop-in optimizer, on the trainer's data: what several tests need."""

import torch
from problems import blobs, make_trainer, small_net
from torch import nn

from pisa_dist import PISA
from pisa_dist.algorithms import ALGORITHMS
from pisa_dist.data.sampling import draw_batches
from pisa_dist.metrics import cross_entropy

STEPS = 4

CASES = {  # settings of trainer and optimizer alike
    "none": {"metric": "none", "penalty": 3.0, "preconditioner_scale": 5.0, "relaxation": 0.6},
    "adam": {"metric": "adam", "penalty": 50.0, "metric_rounds": 2, "metric_interval": 3, "eps": 1e-6},
    "adam, all else": {
        "metric": "adam",
        "penalty": 40.0,
        "preconditioner_scale": 90.0,
        "relaxation": 0.7,
        "lr": 0.5,
        "penalty_growth": 1.1,
        "penalty_growth_interval": 2,
        "first_moment_decay": 0.5,
        "second_moment_decay": 0.9,
    },
    "muon": {"metric": "muon", "metric_rounds": 3},
    "muon, enlarged": {"metric": "muon", "metric_rounds": 3, "enlarge_batch": True},
    "none, enlarged": {"metric": "none", "penalty": 5.0, "enlarge_batch": True},
    "kron": {"metric": "kron", "metric_rounds": 3},
}


def train_on_shard(optimizer, model, shard, *, rounds, worker=0, skip=0):
    """Step on the minibatches that the trainer draws for this worker, but the first `skip`; yields after every step."""
    for step in range(skip, rounds * STEPS):
        number, place = divmod(step, STEPS)
        draw = draw_batches(len(shard), batch_size=8, local_steps=STEPS, seed=0, worker=worker, round_number=number + 1)
        batch = draw.positions[place]
        optimizer.zero_grad()
        cross_entropy(model(shard.inputs[batch]), shard.targets[batch]).backward()
        optimizer.step()
        yield


def finish(steps):
    for _ in steps:
        pass


def flat(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def trainers_weights(case, *, num_workers, rounds):
    """Weights after each round, flattened."""
    algorithm = ALGORITHMS["pisa_local"](**CASES[case])
    trainer = make_trainer(algorithm, num_workers=num_workers, rounds=rounds, local_steps=STEPS)
    found = []
    for _ in range(rounds):
        trainer.run_round()
        found.append(torch.cat([w.flatten() for w in trainer.state.weights.values()]))
    return trainer, torch.stack(found)


SIZES = (49, 41)  # of the two workers' shards in `make_trainer`


def shard_of(rank):
    return blobs().select(list(range(rank * SIZES[0], SIZES[0] + rank * SIZES[1])))


def make_net(rank, **settings):
    model = small_net(seed=rank)  # rank 0's weights become those of all
    settings = {"local_steps": STEPS, "worker_weight": SIZES[rank], **settings}
    return model, PISA(model.parameters(), **settings)
