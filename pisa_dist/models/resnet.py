"""ResNet-20 in its CIFAR form, for images of any size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from pisa_dist.checks import check_choice

NORM_GROUPS = 8  # divides every width of the network: 16, 32, 64


def _group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(NORM_GROUPS, channels)


NORMS: dict[str, Callable[[int], nn.Module]] = {"group": _group_norm, "batch": nn.BatchNorm2d}


class ResNet20(nn.Module):
    """Three stages of three residual blocks with 16, 32 and 64 channels (He et al., 2016, section 4.2).

    Shortcuts are option A of the paper: where a stage halves the image and doubles the channels, the input is
    subsampled and padded with zero channels. They have no parameters, so nothing to send.

    Args:
        input_shape: [channels, height, width], any size.
        num_classes: number of outputs, one logit a class.
        norm: "group" (8 groups, the default) or "batch". Batch norm trains on the statistics of each worker's own
            minibatch, and where the data differ from worker to worker these do. Its running statistics, which
            evaluation uses, are averaged over the present workers at each consensus and are nobody's own.
    """

    def __init__(self, input_shape: Sequence[int], num_classes: int, norm: str = "group") -> None:
        super().__init__()
        if len(input_shape) != 3:
            raise ValueError(
                f"`model` resnet20 needs images [channels, height, width], got input_shape "
                f"{list(input_shape)}; use model=mlp"
            )
        self.check_arguments({"norm": norm})
        make_norm = NORMS[norm]
        self.stem = nn.Sequential(_conv3x3(input_shape[0], 16, stride=1), make_norm(16), nn.ReLU())
        self.stages = nn.Sequential(
            *_stage(16, 16, stride=1, make_norm=make_norm),
            *_stage(16, 32, stride=2, make_norm=make_norm),
            *_stage(32, 64, stride=2, make_norm=make_norm),
        )
        self.classifier = nn.Linear(64, num_classes)

    @staticmethod
    def check_arguments(arguments: Mapping[str, Any]) -> None:
        """Refuse arguments that no data could make right, before any are read."""
        check_choice("model.norm", arguments.get("norm", "group"), tuple(NORMS))

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits [batch, num_classes] of images [batch, channels, height, width]."""
        features = self.stages(self.stem(inputs))
        logits: Tensor = self.classifier(features.mean(dim=(2, 3)))
        return logits


class _Block(nn.Module):
    """Two 3x3 convolutions and an option-A shortcut around them."""

    def __init__(self, inputs: int, outputs: int, *, stride: int, make_norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.stride = stride
        self.new_channels = outputs - inputs
        self.branch = nn.Sequential(
            _conv3x3(inputs, outputs, stride=stride),
            make_norm(outputs),
            nn.ReLU(),
            _conv3x3(outputs, outputs, stride=1),
            make_norm(outputs),
        )

    def forward(self, inputs: Tensor) -> Tensor:
        shortcut = inputs[:, :, :: self.stride, :: self.stride]
        before = self.new_channels // 2
        shortcut = functional.pad(shortcut, (0, 0, 0, 0, before, self.new_channels - before))
        return functional.relu(self.branch(inputs) + shortcut)


def _stage(inputs: int, outputs: int, *, stride: int, make_norm: Callable[[int], nn.Module]) -> list[nn.Module]:
    return [
        _Block(inputs, outputs, stride=stride, make_norm=make_norm),
        _Block(outputs, outputs, stride=1, make_norm=make_norm),
        _Block(outputs, outputs, stride=1, make_norm=make_norm),
    ]


def _conv3x3(inputs: int, outputs: int, *, stride: int) -> nn.Conv2d:
    # No bias: the norm layer that follows would subtract it again.
    convolution = nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return convolution
