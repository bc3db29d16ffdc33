"""A multilayer perceptron: the smallest model that every data set can train."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn


class MLP(nn.Module):
    """Fully connected layers with ReLU between them, on inputs of any shape.

    Args:
        input_shape: shape of one sample without the batch dimension; it is flattened.
        num_classes: number of outputs, one logit a class.
        hidden_sizes: width of each hidden layer, every one >= 1; an empty list gives softmax regression.
    """

    def __init__(self, input_shape: Sequence[int], num_classes: int, hidden_sizes: Sequence[int] = (128, 64)) -> None:
        super().__init__()
        sizes = [math.prod(input_shape), *_checked_sizes(hidden_sizes), num_classes]
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])  # logits are not rectified

    @staticmethod
    def check_arguments(arguments: Mapping[str, Any]) -> None:
        """Refuse arguments that no data could make right, before any are read."""
        _checked_sizes(arguments.get("hidden_sizes", ()))

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits [batch, num_classes] of inputs [batch, *input_shape]."""
        logits: Tensor = self.layers(inputs)
        return logits


def _checked_sizes(hidden_sizes: object) -> list[int]:
    # A string is a sequence too, and True an int: neither is a list of widths.
    if not isinstance(hidden_sizes, Sequence) or isinstance(hidden_sizes, str):
        raise ValueError(f"`model.hidden_sizes` must be a list of whole numbers >= 1, got {hidden_sizes!r}")
    for size in hidden_sizes:
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"`model.hidden_sizes` must hold whole numbers >= 1, got {size!r}")
    return list(hidden_sizes)
