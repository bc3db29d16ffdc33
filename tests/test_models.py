"""The models have the published shapes, and the registry builds anything importable, reproducibly."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

from pisa_dist.models import CNN, MLP, ResNet20, build_model, check_model

MLP_TARGET = "pisa_dist.models.MLP"
SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32)]


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3), requires_grad=False)


class NeedsWidth(nn.Linear):
    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__(width, num_classes)


def anything(**options: Any) -> nn.Module:
    return nn.Linear(options["width"], 2)


def pretrained() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 4), nn.Dropout(), nn.Linear(4, 2)).eval()


def with_frozen_backbone() -> nn.Module:
    return nn.Sequential(pretrained(), nn.Linear(2, 2))


def not_a_model() -> OrderedDict[str, int]:
    return OrderedDict()


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("shape", [*SHAPES, (300,)])
def test_mlp_gives_one_logit_per_class_for_inputs_of_any_shape(shape: tuple[int, ...]) -> None:
    assert MLP(shape, 7)(torch.randn(4, *shape)).shape == (4, 7)


def test_mlp_has_the_layers_that_hidden_sizes_name() -> None:
    assert count(MLP([2, 3], 4, hidden_sizes=[5])) == (6 * 5 + 5) + (5 * 4 + 4)
    assert count(MLP([2, 3], 4, hidden_sizes=[])) == 6 * 4 + 4


def test_mlp_does_not_rectify_its_logits() -> None:
    assert (MLP([20], 10)(torch.randn(50, 20)) < 0).any()


@pytest.mark.parametrize("sizes", [[0], [64, -1], [64.0], [True], ["64"], 64, "64", None])
def test_mlp_refuses_hidden_sizes_that_are_no_widths(sizes: Any) -> None:
    with pytest.raises(ValueError, match=r"`model\.hidden_sizes` must .* whole numbers >= 1, got"):
        MLP([8], 2, hidden_sizes=sizes)


@pytest.mark.parametrize(
    ("shape", "flattened"), [((1, 28, 28), 256), ((3, 32, 32), 400), ((1, 16, 16), 16), ((1, 17, 30), 64)]
)
def test_cnn_has_the_parameters_of_the_niid_bench_network(shape: tuple[int, ...], flattened: int) -> None:
    model = CNN(shape, 10)
    convolutions = (25 * shape[0] * 6 + 6) + (25 * 6 * 16 + 16)
    linear = (flattened * 120 + 120) + (120 * 84 + 84) + (84 * 10 + 10)
    assert count(model) == convolutions + linear
    assert model(torch.randn(2, *shape)).shape == (2, 10)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 15, 28), (1, 28, 15), (784,), (1, 2, 28, 28)])
def test_cnn_refuses_what_is_too_small_or_no_image_and_names_models_that_take_it(
    shape: tuple[int, ...],
) -> None:
    with pytest.raises(ValueError, match=r"`model` cnn .* got input_shape \[.*model=mlp .*model=resnet20"):
        CNN(shape, 10)


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("shape", SHAPES)
def test_resnet20_trains_on_every_image_size(shape: tuple[int, ...], norm: str) -> None:
    model = ResNet20(shape, 10, norm=norm)
    logits = model(torch.randn(2, *shape))
    assert logits.shape == (2, 10)
    logits.square().sum().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in model.parameters())


def test_resnet20_has_the_published_depth_and_size() -> None:
    model = ResNet20([3, 32, 32], 10, norm="batch")
    weighted = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert len(weighted) == 20
    assert count(model) == 269_722  # He et al. give 0.27M; option A shortcuts add nothing


def test_resnet20_with_group_norm_has_no_buffers_for_workers_to_disagree_about() -> None:
    assert not list(ResNet20([1, 8, 8], 10).buffers())


def test_resnet20_shortcut_keeps_the_input_between_zero_channels() -> None:
    block = ResNet20([1, 8, 8], 10).stages[3]
    for parameter in block.parameters():
        nn.init.zeros_(parameter)  # the branch is silent, the shortcut is all that is left
    inputs = torch.rand(2, 16, 8, 8)
    output = block(inputs)
    torch.testing.assert_close(output[:, 8:24], inputs[:, :, ::2, ::2], rtol=0, atol=0)
    assert not output[:, :8].any()
    assert not output[:, 24:].any()


def test_resnet20_refuses_unknown_norms_and_flat_inputs() -> None:
    with pytest.raises(ValueError, match=r"`model\.norm` must be one of group, batch, got 'layer'"):
        ResNet20([1, 8, 8], 10, norm="layer")
    with pytest.raises(ValueError, match=r"`model` resnet20 .* got input_shape \[64\]; use model=mlp"):
        ResNet20([64], 10)


@pytest.mark.parametrize("name", ["MLP", "CNN", "ResNet20"])
def test_registry_supplies_shape_and_classes_from_the_data(name: str) -> None:
    model = build_model(f"pisa_dist.models.{name}", {}, input_shape=[1, 28, 28], num_classes=6, seed=0)
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 6)


def test_arguments_win_over_what_the_data_say() -> None:
    model = build_model(MLP_TARGET, {"num_classes": 3, "hidden_sizes": [4]}, input_shape=[8], num_classes=10, seed=0)
    assert model(torch.randn(2, 8)).shape == (2, 3)


def test_registry_builds_modules_that_know_nothing_of_this_package() -> None:
    model = build_model(
        "torch.nn.Linear", {"in_features": 8, "out_features": 2}, input_shape=[8], num_classes=2, seed=0
    )
    assert isinstance(model, nn.Linear)


def test_a_model_that_comes_in_evaluation_mode_as_a_whole_is_put_into_training_mode() -> None:
    model = build_model(f"{__name__}.pretrained", {}, input_shape=[8], num_classes=2, seed=0)
    assert all(module.training for module in model.modules())


def test_a_part_that_comes_in_evaluation_mode_stays_in_it() -> None:
    model = build_model(f"{__name__}.with_frozen_backbone", {}, input_shape=[8], num_classes=2, seed=0)
    assert [module.training for module in model.children()] == [False, True]
    assert model.training


def test_initial_weights_depend_on_the_seed_alone() -> None:
    def weights(seed: int) -> torch.Tensor:
        model = build_model(MLP_TARGET, {}, input_shape=[8], num_classes=2, seed=seed)
        return nn.utils.parameters_to_vector(model.parameters())

    first = weights(1)
    torch.rand(17)
    torch.testing.assert_close(weights(1), first, rtol=0, atol=0)
    assert not torch.equal(weights(2), first)


def test_building_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    build_model(MLP_TARGET, {}, input_shape=[8], num_classes=2, seed=3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "target", ["pisa_dist.models.Missing", "no_such_package.Model", "no dots: here", "", "torch.pi"]
)
def test_targets_that_cannot_be_imported_or_called_are_refused(target: str) -> None:
    with pytest.raises(ValueError, match=r"`model\._target_` "):
        check_model(target, {})


def test_an_unknown_argument_is_refused_with_the_names_that_are_taken() -> None:
    with pytest.raises(ValueError, match=r"`model\.widths` .* takes input_shape, num_classes, hidden_sizes"):
        check_model(MLP_TARGET, {"widths": [3]})
    with pytest.raises(ValueError, match=r"`model\.width` .* takes no arguments"):
        check_model(f"{__name__}.not_a_model", {"width": 3})


def test_an_argument_without_default_must_be_given() -> None:
    with pytest.raises(ValueError, match=r"`model\.width` must be given: .*NeedsWidth has no default"):
        check_model(f"{__name__}.NeedsWidth", {})
    check_model(f"{__name__}.NeedsWidth", {"width": 8})


def test_callables_with_keyword_arguments_of_any_name_accept_anything() -> None:
    check_model(f"{__name__}.anything", {"width": 3, "depth": 9})
    model = build_model(f"{__name__}.anything", {"width": 3}, input_shape=[8], num_classes=10, seed=0)
    assert model(torch.randn(4, 3)).shape == (4, 2)


def test_callables_without_a_signature_are_left_to_the_call() -> None:
    check_model("builtins.dict", {"width": 3})
    with pytest.raises(ValueError, match=r"`model\._target_` .* must return a torch\.nn\.Module, got dict"):
        build_model("builtins.dict", {"width": 3}, input_shape=[8], num_classes=2, seed=0)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (f"{__name__}.not_a_model", r"must return a torch\.nn\.Module, got OrderedDict"),
        (f"{__name__}.Frozen", "without a trainable parameter"),
        ("torch.nn.ReLU", "without a trainable parameter"),
    ],
)
def test_what_cannot_be_trained_is_refused(target: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(target, {}, input_shape=[8], num_classes=2, seed=0)


def test_a_failing_constructor_is_the_users_mistake() -> None:
    with pytest.raises(ValueError, match=r"`model\._target_` torch\.nn\.Linear cannot be built: .*negative"):
        build_model("torch.nn.Linear", {"in_features": -1, "out_features": 2}, input_shape=[8], num_classes=2, seed=0)


def test_a_list_from_yaml_is_accepted_and_a_bad_one_refused_by_name() -> None:
    arguments = {"hidden_sizes": [5, 0]}
    with pytest.raises(ValueError, match=r"`model\.hidden_sizes` .* got 0"):
        build_model(MLP_TARGET, arguments, input_shape=[8], num_classes=2, seed=0)
