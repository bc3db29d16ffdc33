"""Data sets from a function of the user's, and what is refused of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pisa_dist.data.datasets import custom

Refused = Callable[[type[Exception], Callable[[], object]], str]


class Pairs(torch.utils.data.Dataset[Any]):
    """A map-style data set."""

    def __init__(self, pairs: list[Any]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Any:
        return self.pairs[index]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], str]:
    """Make a function or value importable and return its dotted path."""
    (tmp_path / "user_package").mkdir()
    (tmp_path / "user_package" / "__init__.py").write_text("")
    (tmp_path / "user_package" / "module.py").write_text("value = None\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    def put(value: Any) -> str:
        monkeypatch.setattr("user_package.module.value", value)
        return "user_package.module.value"

    return put


ARRAYS = (np.arange(12, dtype=np.float64).reshape(3, 2, 2), np.array([0, 4, 1], dtype=np.uint8))
READ_ONLY = np.arange(12.0).reshape(3, 2, 2)
READ_ONLY.setflags(write=False)


@pytest.mark.parametrize(
    "part",
    [
        ARRAYS,
        (READ_ONLY, [0, 4, 1]),
        (ARRAYS[0][::-1][::-1], torch.tensor([0, 4, 1], dtype=torch.int32)),
        (torch.arange(12).view(3, 2, 2), torch.tensor([0, 4, 1])),
        (ARRAYS[0].astype(np.uint8).tolist(), (0, 4, 1)),
        torch.utils.data.TensorDataset(torch.arange(12.0).view(3, 2, 2), torch.tensor([0, 4, 1])),
        Pairs(list(zip(*ARRAYS, strict=True))),
        Pairs([[image.tolist(), int(label)] for image, label in zip(*ARRAYS, strict=True)]),
        list(zip(*ARRAYS, strict=True)),
    ],
)
def test_a_users_function_may_return_arrays_tensors_or_map_style_sets(part: Any, install: Callable[[Any], str]) -> None:
    received = []

    def load(size: int, *, name: str = "") -> Any:
        received.append((size, name))
        return part, (np.zeros((1, 2, 2)), np.array([2]))

    train, test = custom(install(load), {"size": 3, "name": "x"})
    assert received == [(3, "x")]
    assert torch.equal(train.inputs, torch.arange(12.0).view(3, 2, 2))
    assert train.targets.tolist() == [0, 4, 1]
    assert (train.inputs.dtype, train.targets.dtype) == (torch.float32, torch.int64)
    assert (train.num_classes, test.num_classes) == (5, 5)
    assert test.input_shape == train.input_shape == (2, 2)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(np.uint8, torch.int64), (np.int32, torch.int64), (np.float64, torch.float32), (np.bool_, torch.float32)],
)
def test_integers_are_kept_where_that_is_asked_for(dtype: Any, expected: Any, install: Callable[[Any], str]) -> None:
    part = (np.array([[0, 1, 1], [1, 0, 1]], dtype=dtype), np.array([0, 1]))
    train, test = custom(install(lambda: (part, part)), {}, keep_integers=True)
    assert (train.inputs.dtype, test.inputs.dtype) == (expected, expected)
    assert train.inputs.tolist() == [[0, 1, 1], [1, 0, 1]]


def test_integers_in_one_part_alone_are_refused(install: Callable[[Any], str], refused: Refused) -> None:
    target = install(lambda: ((np.ones((2, 3), dtype=int), np.array([0, 1])), GOOD))
    message = refused(ValueError, lambda: custom(target, {}, keep_integers=True))
    assert "test set: expected torch.int64 inputs as in train, found torch.float32" in message


GOOD = (np.zeros((2, 3)), np.array([0, 1]))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ((np.zeros((2, 3)), np.array([0.0, 1.0])), "expected integer targets, found torch.float64"),
        ((np.zeros((2, 3)), np.array([True, False])), "expected integer targets, found torch.bool"),
        ((np.zeros((2, 3)), np.array([0, 1j])), "expected integer targets, found torch.complex128"),
        ((np.zeros((2, 3)), np.zeros((2, 1), dtype=int)), "expected targets of shape [n], n >= 1, found [2, 1]"),
        ((np.zeros((0, 3)), np.zeros(0, dtype=int)), "expected targets of shape [n], n >= 1, found [0]"),
        ((np.zeros(2), np.array([0, 1])), "expected real inputs of shape [n, ...], found torch.float64 of shape [2]"),
        ((np.zeros((2, 3), dtype=complex), np.array([0, 1])), "expected real inputs"),
        ((np.zeros((3, 3)), np.array([0, 1])), "found 3 inputs but 2 targets"),
        ((np.zeros((2, 4)), np.array([0, 1])), "(4,)"),
        ((np.zeros((2, 3)), np.array([0, -2])), "label of sample 1 must be in 0..1, got -2"),
        ((np.full((2, 3), np.nan), np.array([0, 1])), "sample 0 has a NaN or infinite feature"),
        ((np.full((2, 3), 1e300), np.array([0, 1])), "sample 0 has a NaN or infinite feature"),
        ((np.zeros((2, 3)), ["a", "b"]), "targets: expected numbers in an array or tensor, found list"),
        (([[1.0], [1.0, 2.0]], [0, 1]), "inputs: expected numbers in an array or tensor, found list"),
        ((None, [0, 1]), "inputs: expected numbers in an array or tensor, found NoneType"),
        ((np.zeros((2, 3)),), "expected (inputs, targets), found a tuple of 1"),
        ({"inputs": 0}, "expected (inputs, targets) or a map-style data set, found dict"),
        (5, "expected (inputs, targets) or a map-style data set, found int"),
        (np.zeros((2, 2)), "expected (input, target) at sample 0, found ndarray"),
        (Pairs([]), "expected at least one sample, found none"),
        (Pairs([(np.zeros(3), 0), (np.zeros(3),)]), "expected (input, target) at sample 1, found tuple"),
        (Pairs([(np.zeros(3), 0), (np.zeros(2), 1)]), "expected input of sample 1 to have shape [3] as at sample 0"),
        (Pairs([(np.zeros(3), 0.5), (np.zeros(3), 1.5)]), "expected integer targets, found torch.float64"),
        (Pairs([(np.zeros(3), [0, 1]), (np.zeros(3), [1, 0])]), "expected targets of shape [n], n >= 1, found [2, 2]"),
        (Pairs([(object(), 0)]), "input of sample 0: expected numbers in an array or tensor, found object"),
    ],
)
@pytest.mark.parametrize("position", [0, 1])
def test_what_a_users_function_returns_is_checked(
    refused: Refused, part: Any, message: str, position: int, install: Callable[[Any], str]
) -> None:
    if message == "(4,)":
        message = "expected inputs of (4,) as in train" if position == 0 else "in train, found (4,)"
        name = "test"
    else:
        name = ("train", "test")[position]
    pair = (part, GOOD) if position == 0 else (GOOD, part)
    target = install(lambda: pair)
    found = refused(ValueError, lambda: custom(target, {}))
    assert found.startswith(f"`data._target_` {target}, {name} set")
    assert message in found


def test_only_negative_labels_are_refused_too(refused: Refused, install: Callable[[Any], str]) -> None:
    target = install(lambda: ((np.zeros((1, 3)), [-1]), (np.zeros((1, 3)), [-1])))
    assert "label of sample 0 must be in 0..0, got -1" in refused(ValueError, lambda: custom(target, {}))


@pytest.mark.parametrize("result", [None, (GOOD,), (GOOD, GOOD, GOOD), GOOD[0]])
def test_a_users_function_that_returns_no_pair_is_refused(
    refused: Refused, result: Any, install: Callable[[Any], str]
) -> None:
    target = install(lambda: result)
    assert "must return (train, test), got" in refused(ValueError, lambda: custom(target, {}))


@pytest.mark.parametrize("target", ["", "no_such_module_here.load", "os.no_such_function", "os..path", "3x"])
def test_a_target_that_cannot_be_imported_names_the_key(refused: Refused, target: str) -> None:
    message = refused(ValueError, lambda: custom(target, {}))
    assert message.startswith(f"`data._target_` must name a function to import, got {target!r}: ")


def test_a_target_that_is_not_a_function_or_takes_other_arguments_is_refused(
    refused: Refused, install: Callable[[Any], str]
) -> None:
    assert "`data._target_` must name a function, got" in refused(ValueError, lambda: custom(install(3), {}))
    target = install(lambda size: (GOOD, GOOD))
    for arguments in ({}, {"sise": 1}, {"size": 1, "more": 2}):
        message = refused(ValueError, lambda arguments=arguments: custom(target, arguments))
        assert message.startswith(f"the arguments do not fit `data._target_` {target}: ")


def test_an_error_inside_a_users_function_is_shown_as_it_is(install: Callable[[Any], str]) -> None:
    def load() -> None:
        raise TypeError("from the user's code")

    with pytest.raises(TypeError, match=r"^from the user's code$"):
        custom(install(load), {})
