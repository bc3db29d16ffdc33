"""The LeNet-style network of the NIID-Bench study, for images of 16 x 16 and larger."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

SMALLEST_SIDE = 16  # two rounds of "5x5 without padding, then halve" leave 1 x 1 of it


class CNN(nn.Module):
    """Two 5x5 convolutions (6 and 16 channels) and three linear layers (120, 84, classes).

    The network behind NIID-Bench's published numbers (Li, Diao, Chen, He: "Federated learning on
    non-IID data silos", ICDE 2022), so that runs compare with them. It has no normalisation layer and
    no buffers: its parameters are all that workers have to agree on.

    Args:
        input_shape: [channels, height, width], both sides >= 16.
        num_classes: number of outputs, one logit a class.
    """

    def __init__(self, input_shape: Sequence[int], num_classes: int) -> None:
        super().__init__()
        if len(input_shape) != 3 or min(input_shape[1:]) < SMALLEST_SIDE:
            raise ValueError(
                f"`model` cnn needs images [channels, height, width] of {SMALLEST_SIDE} x {SMALLEST_SIDE} or "
                f"more, got input_shape {list(input_shape)}; use model=mlp (any shape) or model=resnet20 "
                "(any image)"
            )
        channels, height, width = input_shape
        self.features = nn.Sequential(
            nn.Conv2d(channels, 6, kernel_size=5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, kernel_size=5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.classifier = nn.Sequential(
            nn.Linear(16 * _side_after_features(height) * _side_after_features(width), 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Linear(84, num_classes),
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits [batch, num_classes] of images [batch, channels, height, width]."""
        logits: Tensor = self.classifier(self.features(inputs))
        return logits


def _side_after_features(side: int) -> int:
    return ((side - 4) // 2 - 4) // 2
