"""What a Flower client does; a module of its own, because Ray's processes import it by name."""

from functools import cache

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from problem import BATCH, CLASSES, HIDDEN, LEARNING_RATE, shards

app = ClientApp()


def new_net():
    return torch.nn.Sequential(torch.nn.Linear(64, HIDDEN), torch.nn.ReLU(), torch.nn.Linear(HIDDEN, CLASSES))


@cache
def data_of(num_workers):
    torch.set_num_threads(1)
    return [(torch.from_numpy(x), torch.from_numpy(y)) for x, y in shards(num_workers)]


@app.train()
def train(message: Message, context: Context) -> Message:
    shard = data_of(int(context.node_config["num-partitions"]))[int(context.node_config["partition-id"])]
    net = new_net()
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    optimizer = torch.optim.SGD(net.parameters(), lr=LEARNING_RATE)
    torch.nn.functional.cross_entropy(net(shard[0]), shard[1]).backward()
    optimizer.step()
    content = {"arrays": ArrayRecord(net.state_dict()), "metrics": MetricRecord({"num-examples": BATCH})}
    return Message(content=RecordDict(content), reply_to=message)
