"""The networks that are timed and trained: an MLP, the NIID-Bench CNN and a GPT of 10.7 million parameters."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from pisa_dist.models.cnn import CNN
from pisa_dist.models.mlp import MLP

VOCABULARY = 65  # distinct characters of Tiny Shakespeare
IMAGE = (3, 32, 32)


class Block(nn.Module):
    """Causal self-attention and a perceptron, each on a normalised residual stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.projection = nn.Linear(width, width, bias=False)
        self.before_perceptron = nn.LayerNorm(width)
        self.perceptron = nn.Sequential(
            nn.Linear(width, 4 * width, bias=False), nn.GELU(), nn.Linear(4 * width, width, bias=False)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        batch, length, width = hidden.shape
        parts = self.query_key_value(self.before_attention(hidden)).view(batch, length, 3, self.heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.projection(mixed.transpose(1, 2).reshape(batch, length, width))
        return hidden + self.perceptron(self.before_perceptron(hidden))


class GPT(nn.Module):
    """Decoder in the form of GPT-2 without dropout; logits of every next character."""

    def __init__(self, context: int = 128, width: int = 384, layers: int = 6, heads: int = 6) -> None:
        super().__init__()
        self.characters = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.before_head = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                # As GPT-2: what is added to the residual stream starts smaller the more layers there are.
                adds = name.endswith(("projection.weight", "perceptron.2.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5 if adds else 0.02)

    def forward(self, characters: Tensor) -> Tensor:
        """Logits [batch, length, vocabulary] of characters [batch, length]."""
        positions = torch.arange(characters.shape[1], device=characters.device)
        hidden = self.characters(characters) + self.positions(positions)
        return self.head(self.before_head(self.blocks(hidden)))


MODELS = {
    "mlp": lambda: MLP((784,), 10, hidden_sizes=[512, 512]),
    "cnn": lambda: CNN(IMAGE, 10),
    "gpt": GPT,
    "gpt_small": partial(GPT, width=128, layers=4, heads=4),  # for tuning
}


def make_model(name: str, seed: int) -> nn.Module:
    """A new model on the CPU whose weights depend on the seed alone."""
    torch.manual_seed(seed)
    return MODELS[name]()


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Hidden matrices and convolutions, which Muon and NSISA orthogonalise, and the rest.

    The rest is what Muon's authors leave to AdamW: vectors, embeddings and the last layer.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    *_, last = [p for p in model.parameters() if p.ndim >= 2]
    hidden, rest = [], []
    for parameter in model.parameters():
        is_hidden = parameter.ndim >= 2 and id(parameter) not in embeddings and parameter is not last
        (hidden if is_hidden else rest).append(parameter)
    return hidden, rest
