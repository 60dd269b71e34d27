"""``save`` and ``load``: an optimised module as one ``.pt2`` file without pickle."""

from __future__ import annotations

import logging
import re
import sys
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.utils import _pytree as pytree

from chanopt.errors import ChanoptError, LoadError
from chanopt.ir import Kind, Op, Program
from chanopt.report import Report
from chanopt.saving import archive
from chanopt.saving.harmless import require_harmless
from chanopt.saving.plan import Plan

_LOG = logging.getLogger(__name__)
_MOST = 65535  # batch norm on CUDA guards on a batch of at most this


def save(module: nn.Module, path: str | Path, *, exported: ExportedProgram | None = None) -> Path:
    """Write an optimised module to one ``.pt2`` file: weights, plan and report, without pickle.

    :func:`load` gives it back; ``torch.export.load`` reads the same file where there is no chanopt.

    Args:
        module: what :func:`chanopt.optimize`, :func:`load` or ``apply_plan`` made, fine-tuned or not, on whatever
            device and in whatever floating type. It is not modified.
        path: where the file goes; ``.pt2`` is the suffix that torch expects.
        exported: the same module as ``torch.export`` has exported it. By default it is exported here, with the sizes
            open that the model had open when it was optimised.

    Returns:
        The path.

    Raises:
        ChanoptError: the module was not made by chanopt, was optimised in parts (save each part), its graph was changed
            since, has no values (the meta device), or torch cannot export it; or the path is none, or in no folder.
        OSError: the file cannot be written.
    """
    target = _file(path)
    plan = Plan.of(module)
    assert isinstance(module, fx.GraphModule)  # only these have plans
    _require_writable(target)
    _require_values(module)
    _require_unchanged(module, plan)
    require_harmless(plan.program)
    exported = export(module, plan) if exported is None else exported
    if set(exported.state_dict) != set(module.state_dict()):
        raise ChanoptError("expected an export of the module to save, found one with other parameters")
    archive.write(target, exported, plan.to_json(), plan.report.to_json(), _version())
    return target


def load(path: str | Path, *, device: str | torch.device = "cpu") -> fx.GraphModule:
    """Read a file that :func:`save` wrote. Nothing in it is executed or unpickled.

    Args:
        path: the file.
        device: where the tensors go.

    Returns:
        A ``torch.fx.GraphModule`` in eval mode that computes, byte for byte, what the saved one did; parameters under
        their names, trainable as they were. :func:`chanopt.explain` gives its report.

    Raises:
        LoadError: the file is not chanopt's, is cut short or changed, or comes from a newer version.
        ChanoptError: the path is none, or this machine has no such device.
        OSError: the file is there and cannot be read.
    """
    _require_device(device)
    source = _file(path)
    found = archive.read(source)
    plan = Plan.from_json(found.plan)
    if _report(found.report, source) != plan.report:
        raise LoadError(f"expected one report in {source}, found that its plan has another; save it again")
    module = plan.module()
    _fill(module, found, source)
    return module.to(device)


def read_report(path: str | Path) -> Report:
    """The report of a file that :func:`save` wrote, without making the module.

    Raises:
        LoadError: as :func:`load`.
    """
    source = _file(path)
    return _report(archive.report_of(source), source)


def is_saved(path: str | Path) -> bool:
    """Whether a file is one that :func:`save` wrote, in this version of the format or another."""
    return archive.is_ours(_file(path))


def _file(path: Any) -> Path:
    if not isinstance(path, str | PathLike):
        raise ChanoptError(
            f"expected the path of a file, found a {type(path).__name__}; chanopt writes and reads files"
        )
    return Path(path)


def _require_writable(path: Path) -> None:
    if not path.name or path.is_dir():
        raise ChanoptError(f"expected the path of a file to write, found the folder {path}; give the file a name")
    if not path.parent.is_dir():
        raise ChanoptError(f"expected a folder to write {path.name} into, found no folder {path.parent}; make it first")


def _require_values(module: fx.GraphModule) -> None:
    empty = [name for name, tensor in module.state_dict().items() if tensor.is_meta]
    if empty:
        raise ChanoptError(
            f"expected weights with values to save, found {empty[0]} on the meta device; load a state dict first"
        )


def _require_device(device: Any) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:  # torch says it in all these ways
        first = (str(error).strip().splitlines() or [""])[0]
        raise ChanoptError(f"expected a device of this machine, found {str(device)!r} ({first})") from error


def _report(text: str, path: Path) -> Report:
    try:
        return Report.from_json(text)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise LoadError(
            f"expected a report in {path}, found something else ({type(error).__name__}: {error}); save it again"
        ) from error


def _fill(module: fx.GraphModule, found: archive.Archive, path: Path) -> None:
    blank = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    saved = {name: tuple(tensor.shape) for name, tensor in found.tensors.items()}
    if blank != saved:
        name = min(name for name in {*blank, *saved} if blank.get(name) != saved.get(name))
        raise LoadError(
            f"expected the tensors that the plan in {path} describes, found {name} of sizes {saved.get(name)} "
            f"instead of {blank.get(name)}; save it again"
        )
    module.load_state_dict(dict(found.tensors), assign=True)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in found.trainable)


def _require_unchanged(module: fx.GraphModule, plan: Plan) -> None:
    """A plan rebuilds what ``optimize`` made; a graph that was edited since it would silently lose the edits."""
    blank = plan.module()
    shapes = [{name: tensor.shape for name, tensor in part.state_dict().items()} for part in (module, blank)]
    if module.code != blank.code or shapes[0] != shapes[1]:
        raise ChanoptError(
            "expected a module as chanopt made it, found that its graph or the sizes of its tensors were changed since"
            "; torch.export.export and torch.export.save keep a graph of your own"
        )


def export(module: fx.GraphModule, plan: Plan) -> ExportedProgram:
    """Export an optimised module with the sizes open that its program leaves open.

    Raises:
        ChanoptError: torch.export refuses; its first line says why.
    """
    refused: Exception | None = None
    for bounds in ({"min": 1, "max": _MOST}, {"min": 2}, None):
        args, kwargs, shapes = _examples(module, plan.program, bounds)
        try:
            spec = shapes.dynamic_shapes(module, args, kwargs)
            return torch.export.export(module, args, kwargs, dynamic_shapes=spec, strict=False)
        except Exception as error:  # noqa: BLE001  torch.export fails in many ways; each only says "not like this"
            _LOG.info("no export with sizes of %s: %s", bounds, error)
            refused = refused or error
    first = (str(refused).strip().splitlines() or [""])[0][:200]
    raise ChanoptError(
        f"expected torch.export to export the optimised {plan.architecture.name}, found {type(refused).__name__}: "
        f"{first}; its state dict and chanopt.Plan.of(module).to_json() hold the same"
    ) from refused


def _examples(
    module: fx.GraphModule, program: Program, bounds: dict[str, int] | None
) -> tuple[tuple[Any, ...], dict[str, Any], ShapesCollection]:
    """Inputs as they were when the model was optimised, of zeros, and which of their sizes are open."""
    shapes, dims = ShapesCollection(), dict[str, Any]()
    leaves: list[Any] = []
    for op in program.ops:
        if op.kind is not Kind.SOURCE:
            continue
        tensor = _example(op, program, module)
        leaves.append(tensor)
        names = enumerate(program.values[op.result].shape)
        open_sizes = {axis: _dim(size, dims, bounds) for axis, size in names if isinstance(size, str)}
        if open_sizes and bounds is not None:
            shapes[tensor] = open_sizes
    args, kwargs = pytree.tree_unflatten(leaves, pytree.treespec_loads(program.interface.inputs))
    return tuple(args), dict(kwargs), shapes


def _example(op: Op, program: Program, module: fx.GraphModule) -> torch.Tensor | None:
    value = program.values[op.result]
    if value.dtype == "object":
        return None  # a constant of the example call: it is in the graph, and its input is not read
    floating = [tensor for tensor in module.state_dict().values() if tensor.is_floating_point()]
    tensor = torch.zeros(program.traced(value.name), dtype=getattr(torch, value.dtype))
    if floating:  # the module may have been moved, or made half as wide, since
        dtype = floating[0].dtype if tensor.is_floating_point() else tensor.dtype
        tensor = tensor.to(floating[0].device, dtype)
    return tensor.to(memory_format=torch.channels_last) if program.channels_last and tensor.ndim == 4 else tensor


def _dim(size: str, dims: dict[str, Any], bounds: dict[str, int] | None) -> Any:
    """One dimension for one symbol, so that equal sizes stay equal; what is computed from others, torch finds out."""
    if bounds is None or not re.fullmatch(r"[A-Za-z_]\w*", size):
        return Dim.AUTO
    return dims.setdefault(size, Dim(size, **bounds))


def _version() -> str:
    return sys.modules[__name__.partition(".")[0]].__version__  # the package itself stands above this part
