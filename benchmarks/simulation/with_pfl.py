"""The problem under pfl (https://github.com/apple/pfl-research): `PFL_PYTHON with_pfl.py WORKERS ROUNDS`.

FedAvg on its SimulatedBackend in one process, data already tensors as its guide to fast simulation recommends, no
metrics on the workers. Prints seconds of each round.
"""

import sys

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from problem import BATCH, CLASSES, HIDDEN, LEARNING_RATE, Clock, shards


class Net(torch.nn.Sequential):
    def __init__(self):
        super().__init__(torch.nn.Linear(64, HIDDEN), torch.nn.ReLU(), torch.nn.Linear(HIDDEN, CLASSES))

    def loss(self, inputs, targets, is_eval=False):
        return torch.nn.functional.cross_entropy(self(inputs), targets)

    def metrics(self, inputs, targets, is_eval=False):
        return {}


class Ticks(TrainingProcessCallback):
    def __init__(self):
        self.clock = Clock()

    def on_train_begin(self, *, model):
        self.clock.tick()
        return Metrics()

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        self.clock.tick()
        return False, Metrics()


def main(num_workers, rounds):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    users = [(torch.from_numpy(x), torch.from_numpy(y)) for x, y in shards(num_workers)]
    dataset = FederatedDataset.from_slices(users, get_user_sampler("minimize_reuse", range(num_workers)))
    net = Net()
    model = PyTorchModel(net, torch.optim.SGD, torch.optim.SGD(net.parameters(), lr=1.0))
    backend = SimulatedBackend(training_data=dataset, val_data=None, postprocessors=[WeightByDatapoints()])
    ticks = Ticks()
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=rounds,
            evaluation_frequency=10**9,
            train_cohort_size=num_workers,
            val_cohort_size=None,
        ),
        backend,
        model,
        NNTrainHyperParams(local_num_epochs=1, local_learning_rate=LEARNING_RATE, local_batch_size=BATCH),
        NNEvalHyperParams(local_batch_size=None),
        callbacks=[ticks],
    )
    ticks.clock.report()


main(*map(int, sys.argv[1:]))
