"""The functions users call: optimize, lower, explain, verify."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from chanopt.compare import verify
from chanopt.errors import CaptureError, ChanoptError, PassError
from chanopt.frontend import RULES, Captured, capture, lower_captured
from chanopt.frontend.compiled import reports
from chanopt.frontend.masks import Mask, apply_masks
from chanopt.frontend.parts import optimize_parts
from chanopt.ir import Program
from chanopt.passes import DEFAULT, Pass, Pipeline
from chanopt.report import Report
from chanopt.report.build import build
from chanopt.report.graphs import figures, together
from chanopt.saving.plan import REPORT, attach, made_by
from chanopt.target import Target

_LOG = logging.getLogger(__name__)

Passes = Pass | Sequence[Pass]
Model = nn.Module | ExportedProgram | Captured


def lower(
    model: Model,
    example_inputs: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    masks: Mapping[str, Mask] | None = None,
    strict: bool = False,
) -> Program:
    """Capture a model and lower it to the channel-flow IR. The model is not modified.

    Args:
        model: a module in eval mode, an exported program, or what :func:`capture` made of a module (the inputs are
            then known; a pruner that tries many masks on one module captures it once).
        example_inputs: positional inputs, any pytree of tensors. The batch becomes dynamic where the model allows it.
        kwargs: keyword inputs.
        masks: masks by module name, over the zeros already in the weights.
        strict: refuse operators whose effect on channels is unknown instead of keeping their operands whole.

    Raises:
        CaptureError: the model is in train mode, or torch.export cannot capture it.
        LoweringError: in strict mode, at the first unknown operator.
        MaskError: a mask for a module or channel that does not exist.
        ChanoptError: a weight is NaN or infinite.
    """
    _check_call(model, kwargs, DEFAULT)
    return _lowered(_captured(model, _tuple(example_inputs), kwargs), masks, strict)


def optimize(
    model: Model,
    example_inputs: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    masks: Mapping[str, Mask] | None = None,
    target: Target | Literal["auto", "cpu", "cuda"] = "auto",
    pipeline: Passes = DEFAULT,
    strict: bool = False,
) -> nn.Module:
    """The same function with the dead channels physically gone. The model is not modified.

    Args:
        model: as for :func:`lower`.
        example_inputs: as for :func:`lower`.
        kwargs: as for :func:`lower`.
        masks: as for :func:`lower`.
        target: what choices are made for: a device, or a :class:`chanopt.Target` (docs/targets.md); "auto" is where
            the model's parameters are. The order of channels minimises bytes (for CUDA, channels last: touched blocks
            of channels); the target also says how a conv reads what is no range, and how a pool is run.
        pipeline: passes to run.
        strict: as for :func:`lower`.

    Returns:
        A ``torch.fx.GraphModule`` of ordinary ATen ops, its parameters under their original names; :func:`explain`
        tells what was done. Of a model that torch.export cannot capture as a whole (a detector with data-dependent
        parts), a copy in which the parts that can be captured are optimised; the report names the rest.

    Raises:
        CaptureError, LoweringError, MaskError, ChanoptError: as :func:`lower`.
        PassError: the pipeline is in an impossible order.
    """
    _check_call(model, kwargs, pipeline)
    aimed = _target(target)
    inputs = _tuple(example_inputs)
    started = time.perf_counter()
    try:
        captured = _captured(model, inputs, kwargs)
        module = _optimized(captured, masks, aimed, pipeline, strict, time.perf_counter() - started)
        level = logging.DEBUG if isinstance(model, Captured) else logging.INFO
        _LOG.log(level, "%s: %s", captured.name, figures(explain(module)))
        return module
    except CaptureError as error:
        whole = isinstance(model, nn.Module) and not any(part.training for part in model.modules())
        if strict or masks or not whole:
            raise
        assert isinstance(model, nn.Module)
        return _in_parts(model, inputs, kwargs, aimed, pipeline, error)


def explain(module: nn.Module | Callable[..., Any]) -> Report:
    """The report of an optimised module, or of what ``torch.compile(..., backend="chanopt")`` made of a function.

    Args:
        module: made by :func:`optimize`, or a compiled module or function after its first call. The report of the
            latter is the sum over its graphs, and iterating it gives theirs; of what was compiled anew, for other
            sizes or types, the last counts.

    Raises:
        ChanoptError: the module was not made by chanopt, or nothing has been compiled yet.
    """
    compiled = reports(module)
    if compiled is not None:
        return together(compiled)
    report = module.meta.get(REPORT) if isinstance(module, fx.GraphModule) else getattr(module, "chanopt_report", None)
    if not isinstance(report, Report):
        raise ChanoptError(
            f"expected a module made by chanopt.optimize, found a {type(module).__name__} without a report"
        )
    return report


def _target(target: Any) -> Target:
    if isinstance(target, Target):
        return target
    if not isinstance(target, str):
        raise ChanoptError(f"expected a target by name or a chanopt.Target, found {target!r}")
    return Target.parse(target)


def _tuple(inputs: Any) -> tuple[Any, ...]:
    """Example inputs as a tuple; a lone tensor is one input."""
    return tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)


def _check_call(model: Any, kwargs: Any, pipeline: Any) -> None:
    """Refuse what is no model, no keyword inputs or no pass, before anything else is tried."""
    if not isinstance(model, nn.Module | ExportedProgram | Captured):
        raise ChanoptError(f"expected a torch.nn.Module to optimise, found a {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            "expected an ordinary module, found TorchScript, which torch.export cannot capture; give its source"
        )
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise ChanoptError(f"expected keyword inputs as a dict, found a {type(kwargs).__name__}")
    steps = [pipeline] if isinstance(pipeline, Pass) else pipeline
    if not isinstance(steps, Sequence) or not all(isinstance(step, Pass) for step in steps):
        raise PassError(f"expected a pipeline of passes, such as chanopt.passes.DEFAULT, found {pipeline!r}")


def _captured(model: Model, inputs: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> Captured:
    return model if isinstance(model, Captured) else capture(model, inputs, kwargs)


def _lowered(captured: Captured, masks: Mapping[str, Mask] | None, strict: bool) -> Program:
    program = lower_captured(captured, RULES, strict=strict)
    if masks:
        program = apply_masks(program, masks, captured.modules)
    _require_finite(program)
    return program


def _require_finite(program: Program) -> None:
    used = {param.name for op in program.ops for param in op.params if not param.buffer or op.linear}
    for name in sorted(used):
        tensor = program.weights[name]
        if tensor.is_meta:
            raise ChanoptError(f"expected weights with values, found {name} on the meta device; load the model first")
        # A sum is not finite if an entry is not, and ten times as fast to make; it may overflow without one.
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.sum()) or torch.isfinite(tensor).all()):
            wrong = int((~torch.isfinite(tensor)).sum())
            raise ChanoptError(
                f"expected finite weights, found {wrong} NaN or infinite entries in {name}; "
                "a zero next to them would not be zero in the masked model"
            )


def _optimized(
    captured: Captured,
    masks: Mapping[str, Mask] | None,
    target: Target,
    pipeline: Passes,
    strict: bool,
    spent: float,
) -> fx.GraphModule:
    started = time.perf_counter()
    before = _lowered(captured, masks, strict)
    before = replace(before, target=str(target.on(before.target)), costs=target.cost)
    run = pipeline if isinstance(pipeline, Pass) else Pipeline(tuple(pipeline))
    result = run(before)
    module = result.program.to_module()
    assert isinstance(module, fx.GraphModule)
    seconds = {"capture": spent, "optimize": time.perf_counter() - started, **result.seconds}
    report = build(captured.name, before, result.program, result.notes, seconds)
    attach(module, made_by(captured, result.program, report))
    return module


def _in_parts(
    model: nn.Module,
    inputs: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    target: Target,
    pipeline: Passes,
    error: CaptureError,
) -> nn.Module:
    """Optimise what can be captured of a model that cannot be captured as a whole."""

    def part(module: nn.Module, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> tuple[nn.Module, Report]:
        started = time.perf_counter()
        captured = capture(module, args, keywords)
        fast = _optimized(captured, None, target, pipeline, False, time.perf_counter() - started)
        return fast, explain(fast)

    whole, report = optimize_parts(model, inputs, dict(kwargs or {}), part, error)
    whole.chanopt_report = replace(report, model=type(model).__name__)  # type: ignore[assignment]
    return whole


__all__ = ["Captured", "Mask", "Target", "capture", "explain", "lower", "optimize", "verify"]
