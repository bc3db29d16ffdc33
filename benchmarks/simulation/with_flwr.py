"""The problem under Flower (https://flower.ai): `FLWR_PYTHON with_flwr.py WORKERS ROUNDS`.

FedAvg, a message-based ClientApp, the Ray backend with one CPU for a client, so that it uses every core; no evaluation.
A client app is called afresh for each worker and round; its data are made once a process. Prints seconds of each round.
"""

import os
import sys

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ["PYTHONPATH"] = os.path.dirname(os.path.abspath(__file__))  # for Ray's processes

import torch
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from flwr_client import app as client_app
from flwr_client import new_net
from problem import Clock

server_app = ServerApp()
clock = Clock()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    torch.manual_seed(0)
    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_available_nodes=int(sys.argv[1]))
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(new_net().state_dict()),
        num_rounds=int(sys.argv[2]),
        evaluate_fn=lambda server_round, arrays: clock.tick(),
    )


if __name__ == "__main__":
    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server_app, client_app, num_supernodes=int(sys.argv[1]), backend_config=resources)
    clock.report()
