"""Builds a model from a dotted name and keyword arguments, with a check that needs no data."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

FROM_DATA = ("input_shape", "num_classes")  # known once the data are loaded, and filled in then

_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def check_model(target: str, arguments: Mapping[str, Any]) -> None:
    """Refuse a model that cannot be built, before any data are read.

    Args:
        target: dotted path of a callable that returns a module, "package.module.Name".
        arguments: keyword arguments for it; `input_shape` and `num_classes` may be left out.

    Raises:
        ValueError: the target cannot be imported or called, an argument is not one of its own, or one that
            it needs is missing. The message names `model._target_` or `model.<argument>`.
    """
    parameters = _parameters(_resolve(target))
    named = {name: parameter for name, parameter in parameters.items() if parameter.kind in _BY_NAME}
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    for name in arguments:
        if name not in named and not takes_any:
            accepted = ", ".join(named) or "no arguments"
            raise ValueError(f"`model.{name}` is not an argument of {target}, which takes {accepted}")
    for name, parameter in named.items():
        if parameter.default is parameter.empty and name not in arguments and name not in FROM_DATA:
            raise ValueError(f"`model.{name}` must be given: {target} has no default for it")
    # What the package's own models can say of their arguments without knowing the data.
    check_arguments = getattr(_resolve(target), "check_arguments", None)
    if check_arguments is not None:
        check_arguments(arguments)


def build_model(
    target: str, arguments: Mapping[str, Any], *, input_shape: Sequence[int], num_classes: int, seed: int
) -> nn.Module:
    """A new model on the CPU whose initial weights depend on `seed` alone.

    The global random state is left as it was, so every rank draws the same weights whatever it drew before.

    Args:
        target: dotted path of a callable that returns a module.
        arguments: keyword arguments for it.
        input_shape: shape of one sample; passed on if the callable has an argument of that name and
            `arguments` has not.
        num_classes: number of classes; passed on likewise.
        seed: any integer that torch takes as a seed.

    Returns:
        The module, in training mode: one that comes in evaluation mode as a whole, as from a `from_pretrained`, is put
        into it; one of which some modules come in training mode is left as it is, so that a part may stay in
        evaluation mode.

    Raises:
        ValueError: as `check_model`; or the callable refuses its arguments, or returns something that is not
            a module with a trainable floating-point parameter.
    """
    check_model(target, arguments)
    build = _resolve(target)
    known = {"input_shape": tuple(input_shape), "num_classes": num_classes}
    parameters = _parameters(build)
    supplied = {name: value for name, value in known.items() if name in parameters}

    # Only the CPU generator is seeded: torch.manual_seed would also move the generators of GPUs, which
    # fork_rng restores only at the price of a context on each of them.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        try:
            model = build(**(supplied | dict(arguments)))
        except (TypeError, RuntimeError) as error:
            raise ValueError(f"`model._target_` {target} cannot be built: {error}") from error

    if not isinstance(model, nn.Module):
        raise ValueError(f"`model._target_` {target} must return a torch.nn.Module, got {type(model).__name__}")
    if not any(weight.requires_grad and weight.is_floating_point() for weight in model.parameters()):
        raise ValueError(f"`model._target_` {target} returned a module without a trainable parameter")
    if not any(module.training for module in model.modules()):
        model.train()
    return model


def _resolve(target: str) -> Callable[..., Any]:
    try:
        found = pkgutil.resolve_name(target)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"`model._target_` {target!r} cannot be imported: {error}") from error
    if not callable(found):
        raise ValueError(f"`model._target_` {target!r} is a {type(found).__name__}, not a class or function")
    return found  # type: ignore[no-any-return]  # resolve_name returns Any


def _parameters(build: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(build).parameters
    except ValueError:  # some builtins do not tell; calling them is then the only check
        return {"arguments": inspect.Parameter("arguments", inspect.Parameter.VAR_KEYWORD)}
