"""Whether two modules compute the same function: float64, fresh inputs, relative error."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from chanopt.errors import VerifyError

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Relative error that rounding may cause when weights of a dtype are folded, summed and rounded back to it."""


def verify(
    model: nn.Module,
    fast: nn.Module,
    example_inputs: Any,
    kwargs: Mapping[str, Any] | None = None,
    *,
    tolerance: float | None = None,
    trials: int = 2,
    seed: int = 0,
) -> float:
    """Compare two modules in float64 on the example inputs and on fresh ones like them.

    Args:
        model: the reference; not modified.
        fast: the module to check; not modified.
        example_inputs: positional inputs.
        kwargs: keyword inputs.
        tolerance: greatest ``max|a - b| / max|a|`` allowed, per output; by default 1e-10 where the weights are
            float64, 1e-4 where they are float32 (:data:`TOLERANCES`).
        trials: how many fresh inputs to try besides the example.
        seed: of the fresh inputs.

    Returns:
        The greatest relative error seen.

    Raises:
        VerifyError: an output, or an input that is written into, is past the tolerance, not finite where the reference
            is, or of another shape.
    """
    if trials < 0:
        raise VerifyError(f"expected a number of fresh inputs, found trials={trials}")
    args = tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,)
    allowed = _tolerance(fast) if tolerance is None else tolerance
    reference, candidate = double(model), double(fast)
    generator = torch.Generator().manual_seed(seed)
    worst = 0.0
    for trial in range(1 + trials):
        inputs = pytree.tree_map(lambda leaf, trial=trial: _like(leaf, generator, trial), (args, dict(kwargs or {})))
        with torch.no_grad():
            expected, found = (_called(module, *inputs) for module in (reference, candidate))
        for what, a, b in zip(("output", "input"), expected, found, strict=True):
            worst = max(worst, _compared(what, a, b, allowed, trial))
    return worst


def _called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, list[torch.Tensor]]:
    """The module's outputs on copies of the inputs, and what these hold then: a model may write into them."""
    own = pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
    outputs = module(*own[0], **own[1])
    return outputs, [leaf for leaf in pytree.tree_leaves(own) if isinstance(leaf, torch.Tensor)]


def _tolerance(module: nn.Module) -> float:
    return max((TOLERANCES.get(p.dtype, 0.0) for p in module.parameters()), default=TOLERANCES[torch.float64])


def copied(module: nn.Module) -> nn.Module:
    """A deep copy; tensors that forward hooks left behind (torch.nn.utils.prune) are copied as data."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        for tensor in vars(part).values():
            if isinstance(tensor, torch.Tensor) and not tensor.is_leaf:
                memo[id(tensor)] = tensor.detach().clone()
    with warnings.catch_warnings():  # torch warns of its own pytree specs when a GraphModule is copied
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        return copy.deepcopy(module, memo)


def double(module: nn.Module) -> nn.Module:
    """A float64 copy on the CPU."""
    return copied(module).cpu().double()


def _like(leaf: Any, generator: torch.Generator, trial: int) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    if not leaf.is_floating_point():
        return leaf.detach().cpu()
    example = leaf.detach().cpu().double()
    if trial == 0:
        return example
    spread = example.std() if example.numel() > 1 and float(example.std()) > 0 else torch.ones(())
    noise = torch.randn(example.shape, generator=generator, dtype=torch.float64)
    fresh = torch.empty_like(example)  # keeps channels_last
    return fresh.copy_(noise * spread + example.mean())


def _compared(what: str, expected: Any, found: Any, tolerance: float, trial: int) -> float:
    reference, spec = pytree.tree_flatten(expected)
    outputs, found_spec = pytree.tree_flatten(found)
    if len(reference) != len(outputs):
        raise VerifyError(f"expected {what}s of structure {spec}, found {found_spec}")
    worst = 0.0
    for number, (a, b) in enumerate(zip(reference, outputs, strict=True)):
        if not isinstance(a, torch.Tensor):
            if a != b:
                raise VerifyError(f"expected {what} {number} to be {a!r}, found {b!r}")
            continue
        worst = max(worst, _error(f"{what} {number}", a, b, tolerance, trial))
    return worst


def _error(what: str, a: torch.Tensor, b: torch.Tensor, tolerance: float, trial: int) -> float:
    if a.shape != b.shape:
        raise VerifyError(f"expected {what} of shape {tuple(a.shape)}, found {tuple(b.shape)}")
    if a.numel() == 0:
        return 0.0
    if not a.is_floating_point():
        error = float((a != b).double().mean())
    else:
        scale = float(a.abs().nan_to_num(posinf=0.0).max()) or 1.0  # of the finite entries
        same = (a == b) | (a.isnan() & b.isnan())
        error = float(torch.where(same, 0.0, (a - b).abs()).max()) / scale
    if not error <= tolerance:
        which = "the example inputs" if trial == 0 else f"fresh inputs {trial}"
        raise VerifyError(
            f"expected {what} within a relative error of {tolerance:g} on {which}, found {error:.3g}; "
            "if the inputs have a fixed meaning (one-hot, sizes), pass trials=0"
        )
    return error
