"""Do two modules compute the same function? In float64, and on outputs that say something."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Model = Callable[..., Any]

SENSITIVITY = 1e-3
"""Least spread across samples, as a part of the largest value, that makes an output worth comparing."""


def outputs(model: Model, inputs: tuple[Any, ...]) -> list[Tensor]:
    """The tensors a model returns for these inputs, in pytree order, without gradients."""
    return [tensor for _, tensor in named_outputs(model, inputs)]


def named_outputs(model: Model, inputs: tuple[Any, ...]) -> list[tuple[str, Tensor]]:
    """The same with the path of each, such as "['out']"; the only output of a plain model is "output"."""
    with torch.no_grad():
        flat, _ = pytree.tree_flatten_with_path(model(*inputs))
    return [(pytree.keystr(path) or "output", leaf) for path, leaf in flat if isinstance(leaf, Tensor)]


def to_double(value: Any) -> Any:
    """Every floating tensor of a pytree in float64."""
    return pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, value)


def double_copy(model: Model) -> Model:
    """A float64 copy of a module, plain tensor attributes included; other callables come back as they are."""
    if not isinstance(model, nn.Module):
        return model
    twin = copy.deepcopy(model).double()
    for module in twin.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, Tensor) and value.is_floating_point():
                setattr(module, name, value.double())
    return twin


def spread(output: Tensor) -> float:
    """Standard deviation across samples, root mean square over positions, relative to the largest value.

    Axis 0 is the samples. An integer or boolean output gives the part of positions that differ between
    samples. One sample, or no axis, has no spread: 0.
    """
    if output.ndim == 0 or output.shape[0] < 2 or output.numel() == 0:
        return 0.0
    if not output.is_floating_point():
        return (output != output[:1]).any(0).double().mean().item()
    scale = output.abs().max().item()
    if scale == 0:
        return 0.0
    return output.double().std(0).square().mean().sqrt().item() / scale


def assert_sensitive(
    tensors: list[Tensor],
    *,
    floor: float = SENSITIVITY,
    allow_constant: bool | Literal["some"] = False,
) -> None:
    """Fail unless every output is finite and its `spread` across samples is above `floor`.

    Two models that both return a constant are equal whatever was done to them; untrained networks in eval
    mode often do. `allow_constant="some"` asks that at least one output varies, `True` only
    that all are finite.

    Raises:
        AssertionError: which output is not finite, or too even, with its spread.
    """
    assert tensors, "the model returned no tensor: nothing to compare"
    for index, tensor in enumerate(tensors):
        assert bool(torch.isfinite(tensor).all()), f"output {index} of shape {tuple(tensor.shape)} is not finite"
    if allow_constant is True:
        return
    spreads = [spread(tensor) for tensor in tensors]
    least = max(spreads) if allow_constant == "some" else min(spreads)
    figures = ", ".join(f"{value:.1e}" for value in spreads)
    assert least > floor, (
        f"outputs hardly differ between samples (spread {figures}, expected above {floor:.0e}): comparing "
        "them proves nothing; calibrate the model, give it a batch of at least 2, or pass allow_constant"
    )


def difference(reference: Tensor, output: Tensor) -> float:
    """Largest absolute difference relative to the largest reference value; inf if shapes or kinds disagree.

    Integer and boolean tensors are compared exactly: 0 or inf.
    """
    if reference.shape != output.shape or reference.is_floating_point() != output.is_floating_point():
        return float("inf")
    if not reference.is_floating_point():
        return 0.0 if torch.equal(reference, output) else float("inf")
    if reference.numel() == 0:
        return 0.0
    scale = reference.abs().max().item() or 1.0
    error = (reference.double() - output.double()).abs().max().item() / scale
    return error if error == error else float("inf")


def assert_same_function(
    model: Model,
    other: Model,
    inputs: tuple[Any, ...],
    tol: float = 1e-10,
    *,
    allow_constant: bool | Literal["some"] = False,
    double: bool = True,
) -> None:
    """Fail unless `other` returns what `model` returns, to `tol` of the largest value of each output.

    Both run in float64 on copies (`double=False` runs them as they are, on the inputs as they are). The
    reference must vary between samples, see `assert_sensitive`.

    Raises:
        AssertionError: the paths of the outputs that differ, each with shapes and error.
    """
    if double:
        model, other, inputs = double_copy(model), double_copy(other), to_double(inputs)
    reference = named_outputs(model, _fresh(inputs))
    found = named_outputs(other, _fresh(inputs))
    expected_paths, found_paths = [path for path, _ in reference], [path for path, _ in found]
    assert expected_paths == found_paths, f"expected outputs {expected_paths}, found {found_paths}"
    wrong = [
        f"{path}: error {error:.2e}, expected {_describe(left)}, found {_describe(right)}"
        for (path, left), (_, right) in zip(reference, found, strict=True)
        if (error := difference(left, right)) > tol
    ]
    assert not wrong, f"{len(wrong)} of {len(reference)} outputs differ by more than {tol:.0e}:\n  " + "\n  ".join(
        wrong
    )
    assert_sensitive([tensor for _, tensor in reference], allow_constant=allow_constant)


def _fresh(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copies, so that a model which writes into its input does not spoil the other's."""
    return pytree.tree_map_only(Tensor, lambda t: t.clone(), inputs)


def _describe(tensor: Tensor) -> str:
    kind = str(tensor.dtype).removeprefix("torch.")
    return f"{kind}{list(tensor.shape)}"
