"""Turning a user's module into one ATen graph (torch.export, non-strict, functionalised, composites kept whole)."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram, ShapesCollection, export
from torch.export.graph_signature import OutputKind
from torch.utils import _pytree as pytree

from chanopt.errors import CaptureError
from chanopt.frontend.out_of_place import out_of_place, retraced

_LOG = logging.getLogger(__name__)
_MOST = 65535  # batch norm on CUDA guards on a batch of at most this


@dataclass(frozen=True)
class Captured:
    """A captured model. Its graph holds the model's own parameters: in-place changes of them are seen.

    Attributes:
        name: class name of the model.
        graph: functional ATen graph with parameters as ``get_attr`` nodes under their original names.
        batch: example batch size.
        dynamic: whether the graph takes any batch size.
        channels_last: whether a four-dimensional example input was laid out channels last.
        modules: the names of the model's modules.
    """

    name: str
    graph: fx.GraphModule
    batch: int
    dynamic: bool
    channels_last: bool
    modules: tuple[str, ...] = ()


def capture(
    model: nn.Module | ExportedProgram,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
) -> Captured:
    """Capture a model with a dynamic batch where it allows one, else with the example's sizes.

    Args:
        model: a module in eval mode, or an already exported program (taken as it is).
        args: example inputs, any pytree of tensors and constants.
        kwargs: example keyword inputs.

    Raises:
        CaptureError: the model is in train mode, or torch.export cannot capture it.
    """
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs or {})) if isinstance(leaf, torch.Tensor)]
    batch = next((t.shape[0] for t in tensors if t.ndim), 1)
    channels_last = any(_is_channels_last(t) for t in tensors)
    if batch == 0:
        raise CaptureError("expected example inputs with at least one image, found a batch of none")
    if isinstance(model, ExportedProgram):
        return Captured("ExportedProgram", _functional(model), batch, bool(model.range_constraints), channels_last)
    _require_eval(model)
    with _untouched(model), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported, dynamic = _export(model, args, dict(kwargs or {}), batch)
        graph = _functional(exported)
    return Captured(
        type(model).__name__,
        graph,
        batch,
        dynamic,
        channels_last,
        tuple(name for name, _ in model.named_modules()),
    )


def _require_eval(model: nn.Module) -> None:
    training = [name or type(model).__name__ for name, module in model.named_modules() if module.training]
    if training:
        raise CaptureError(
            f"expected a model in eval mode, found {len(training)} modules in train mode (first: {training[0]}); "
            "call model.eval() first: batch statistics and dropout change what channels mean"
        )


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], batch: int
) -> tuple[ExportedProgram, bool]:
    """Try a dynamic batch on inputs of at least two dimensions, then on all inputs, then none."""
    for least in (2, 1):
        shares = _batch_sharing(args, kwargs, batch, least)
        if not shares or (least == 1 and shares == _batch_sharing(args, kwargs, batch, 2)):
            continue
        try:
            return _attempt(model, partial(_export_dynamic, model, args, kwargs, shares)), True
        except CaptureError as error:
            _LOG.info("no dynamic batch for %s: %s", type(model).__name__, first_line(error.__cause__ or error))
    return _attempt(model, partial(export, model, args, kwargs, strict=False)), False


def _attempt(model: nn.Module, make: Callable[[], ExportedProgram]) -> ExportedProgram:
    """One way to export a model; torch.export fails in many ways, and each only says "not like this"."""
    try:
        return make()
    except Exception as error:
        raise CaptureError(
            f"expected torch.export to capture {type(model).__name__}, "
            f"found {type(error).__name__}: {first_line(error)}"
        ) from error


def _batch_sharing(args: tuple[Any, ...], kwargs: dict[str, Any], batch: int, least: int) -> set[int]:
    """The ids of input tensors of at least ``least`` dimensions whose first size is the batch."""
    leaves = pytree.tree_leaves((args, kwargs))
    return {id(x) for x in leaves if isinstance(x, torch.Tensor) and x.ndim >= least and x.shape[0] == batch}


def _export_dynamic(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shares: set[int]
) -> ExportedProgram:
    """Export with one symbolic batch; the example needs a batch of two, for 0 and 1 are special to torch.export."""
    dim = Dim("batch", min=1, max=_MOST)
    shapes = ShapesCollection()

    def widen(leaf: Any) -> Any:
        if id(leaf) not in shares:
            return leaf
        wide = (
            torch.cat([leaf, leaf]) if leaf.shape[0] == 1 else leaf.detach().clone(memory_format=torch.preserve_format)
        )
        shapes[wide] = {0: dim}
        return wide

    wide_args, wide_kwargs = pytree.tree_map(widen, (args, kwargs))
    spec = shapes.dynamic_shapes(model, wide_args, wide_kwargs)
    return export(model, wide_args, wide_kwargs, dynamic_shapes=spec, strict=False)


def _functional(exported: ExportedProgram) -> fx.GraphModule:
    """The graph without in-place operators: by a walk over it, or, where that cannot tell what they do, by torch."""
    try:
        module = out_of_place(exported.module(check_guards=False))
        if module is not None:
            return module
        functional = retraced(exported)
        module = functional.module(check_guards=False)
    except Exception as error:
        raise CaptureError(
            f"expected torch.export to make the graph functional, found {type(error).__name__}: {first_line(error)}"
        ) from error
    _require_pure(functional)
    assert isinstance(module, fx.GraphModule)
    return module


def _require_pure(functional: ExportedProgram) -> None:
    """The lowered program writes nothing. What a forward writes into its state or inputs, others may read."""
    written: dict[OutputKind, list[str]] = {}
    for spec in functional.graph_signature.output_specs:
        written.setdefault(spec.kind, []).append(str(spec.target))
    state = sorted(written.get(OutputKind.BUFFER_MUTATION, []) + written.get(OutputKind.PARAMETER_MUTATION, []))
    if state:
        raise CaptureError(
            f"expected a model that changes no state in its forward, found that it writes {state[:3]}; "
            "call model.eval(), or take the state out of the forward"
        )
    if inputs := written.get(OutputKind.USER_INPUT_MUTATION):
        raise CaptureError(
            f"expected a forward that leaves its inputs as they are, found that it writes into {inputs[:3]}; "
            "let its first operators not be in place"
        )


def _is_channels_last(tensor: torch.Tensor) -> bool:
    return (
        tensor.ndim == 4
        and tensor.shape[1] > 1
        and tensor.is_contiguous(memory_format=torch.channels_last)
        and not tensor.is_contiguous()
    )


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Generator[None, None, None]:
    """Put back the attributes that are set while tracing, to tensors without values.

    Forward hooks (torch.nn.utils.prune) set them, and a forward that keeps its features.
    """
    kept = [(module, dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes in kept:
            for name in vars(module).keys() - attributes.keys():
                del vars(module)[name]
            vars(module).update(attributes)


def first_line(error: BaseException) -> str:
    """The beginning of an error's message: torch's are pages long."""
    return (str(error).strip().splitlines() or [""])[0][:200]
