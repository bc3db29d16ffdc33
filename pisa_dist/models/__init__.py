"""Small networks and the registry that builds any importable model."""

from pisa_dist.models.cnn import CNN
from pisa_dist.models.mlp import MLP
from pisa_dist.models.registry import build_model, check_model
from pisa_dist.models.resnet import ResNet20

__all__ = ["CNN", "MLP", "ResNet20", "build_model", "check_model"]
