"""A user's own data and model: tokens reach an embedding as integers, a model that does not fit is refused."""

import pytest
import torch
from torch import nn

from pisa_dist.metrics import require_logits
from pisa_dist.runner import load_data, trainer_alone
from pisa_dist.train import compose_config

pytestmark = pytest.mark.timeout(300)

MODULE = """
import numpy as np
from torch import nn


def load(num=600, words=40, length=6):
    random = np.random.default_rng(0)
    classes = random.integers(4, size=num)
    topic = 10 * classes[:, None] + random.integers(10, size=(num, length))  # ten words belong to each class
    tokens = np.where(random.random((num, length)) < 0.5, topic, random.integers(words, size=(num, length)))
    tokens = tokens.astype(np.int16)
    return (tokens[200:], classes[200:]), (tokens[:200], classes[:200])


class Net(nn.Module):
    def __init__(self, num_classes, words=40):
        super().__init__()
        self.embedding, self.head = nn.Embedding(words, 8), nn.Linear(8, num_classes)

    def forward(self, tokens):
        return self.head(self.embedding(tokens).mean(1))


class TooSmall(Net):
    def __init__(self):
        super().__init__(num_classes=3)
"""


@pytest.fixture
def overrides(tmp_path, monkeypatch):
    (tmp_path / "own_texts.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return [
        *("data=custom", "data._target_=own_texts.load", "data.keep_integers=true"),
        *("model=custom", "model._target_=own_texts.Net", "dtype=float64", "num_workers=4", "batch_size=20"),
    ]


def train(overrides):
    config = compose_config(overrides)
    trainer = trainer_alone(config, load_data(config))
    accuracies = [metrics["test_accuracy"] for _, _, metrics in trainer.run() if metrics]
    return trainer, accuracies[-1]


@pytest.mark.parametrize("algorithm", ["sisa", "pisa_auto"])
def test_texts_are_classified_through_an_embedding_with_and_without_vmap(overrides, algorithm):
    extra = ["split=label_k", f"algorithm={algorithm}", "rounds=60"]
    one, accuracy = train([*overrides, *extra, "vectorize=false"])
    assert one.test.inputs.dtype == torch.int64
    assert accuracy > 0.6, "a guess is right in a quarter"
    other, _ = train([*overrides, *extra, "vectorize=true"])
    for name, value in one.state.weights.items():
        torch.testing.assert_close(other.state.weights[name], value, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            "data.keep_integers=false",
            r"own_texts\.Net does not fit data=custom: the model cannot take .*float64: Runtime",
        ),
        (
            "model._target_=own_texts.TooSmall",
            r"TooSmall does not fit .* logits of shape \[n, 4\].* got \[1, 3\] for one",
        ),
        ("model=mlp", r"MLP does not fit data=custom: the model cannot take inputs of shape \(6,\) and torch\.int64"),
    ],
)
def test_a_model_that_does_not_fit_the_data_is_refused_before_the_first_round(overrides, change, words):
    changed = [item for item in overrides if not (change == "model=mlp" and item.startswith("model"))]
    config = compose_config([*changed, change])
    with pytest.raises(ValueError, match=words):
        trainer_alone(config, load_data(config))


def test_trying_a_model_leaves_its_buffers_modes_and_random_state_what_they_were(overrides):
    config = compose_config(overrides)
    train_set = load_data(config).train
    model = nn.Sequential(
        nn.Embedding(40, 8), nn.Flatten(), nn.BatchNorm1d(48), nn.Dropout(), nn.Linear(48, 4)
    ).double()
    model[2].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    require_logits(model, train_set)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model] == [True, True, False, True, True]
