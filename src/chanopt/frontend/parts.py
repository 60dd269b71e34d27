"""Models that torch.export cannot capture as a whole: find the parts that it can."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from chanopt.compare import copied
from chanopt.errors import CaptureError
from chanopt.ir import Refusal
from chanopt.report.report import Report, merged

Call = tuple[tuple[Any, ...], dict[str, Any]]
Optimize = Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any]], tuple[nn.Module, Report]]


def optimize_parts(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    optimize: Optimize,
    error: CaptureError,
) -> tuple[nn.Module, Report]:
    """A copy of a model with every largest part that can be captured replaced by its optimised form.

    A part is replaced where it was called once, or always with inputs of the same sizes, in a run of the model on the
    example inputs; its other callers would find it made for other sizes. What stays is named in the refusals.

    Args:
        model: a module in eval mode.
        args: example inputs.
        kwargs: example keyword inputs.
        optimize: makes the optimised form of a part and its report.
        error: why the whole could not be captured.

    Raises:
        CaptureError: the model does not run on the example inputs.
    """
    whole = copied(model)
    calls = _recorded(model, args, kwargs)
    reports: dict[str, Report] = {}
    refusals = [Refusal(type(model).__name__, "", "", str(error))]
    todo = [(name, child, whole) for name, child in whole.named_children()]
    while todo:
        name, module, owner = todo.pop(0)
        if not any(True for _ in module.parameters()):
            continue
        try:
            fast, report = optimize(module, *_same_call(calls.get(name, []), name))
        except CaptureError as reason:
            children = [(f"{name}.{child}", part, module) for child, part in module.named_children()]
            todo += children
            if not children:
                refusals.append(Refusal(type(module).__name__, name, "", str(reason)))
            continue
        _keep_attributes(fast, module)
        setattr(owner, name.rpartition(".")[2], fast)
        reports[name] = report
    return whole, merged(type(model).__name__, reports, tuple(refusals))


def _keep_attributes(fast: nn.Module, module: nn.Module) -> None:
    """Give the optimised part the plain attributes of the part, which the code around it may read (``conv.stride``)."""
    for name, value in vars(module).items():
        if not name.startswith("_") and not isinstance(value, torch.Tensor) and not hasattr(fast, name):
            setattr(fast, name, value)


def _recorded(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, list[Call]]:
    """What every submodule is called with in a run of a copy on copies of the inputs: a forward may write into both."""
    probe = copied(model)
    calls: dict[nn.Module, list[Call]] = {}

    def record(module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        calls.setdefault(module, []).append((inputs, keywords))

    for part in probe.modules():
        part.register_forward_pre_hook(record, with_kwargs=True)
    own = pytree.tree_map_only(torch.Tensor, torch.clone, (args, dict(kwargs)))
    try:
        with torch.no_grad():
            probe(*own[0], **own[1])
    except Exception as error:
        raise CaptureError(
            f"expected {type(model).__name__} to run on the example inputs, found {type(error).__name__}: {error}"
        ) from error
    return {name: calls.get(part, []) for name, part in probe.named_modules(remove_duplicate=False)}


def _same_call(calls: list[Call], name: str) -> Call:
    if not calls:
        raise CaptureError(f"expected {name} to be called in forward, found no call")
    if len({str(_sizes(call)) for call in calls}) > 1:
        raise CaptureError(f"expected {name} to be called with inputs of one size, found several")
    return calls[0]


def _sizes(call: Any) -> Any:
    return pytree.tree_map(lambda leaf: tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else type(leaf), call)
