"""Which graphs a compiled module or function runs, so that it can be asked for its reports.

torch.compile hands a backend one graph at a time and does not say for whom; and one graph serves every module of a
class, its weights being inputs. So graphs are found by the weights that they were optimised for, and those of a
function also by the object that carries the options of torch.compile: it calls the backend, and the function leads to
it.
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from torch import nn

from chanopt.errors import ChanoptError
from chanopt.report import Report

_CARRIER = "_TorchCompileWrapper"
_NEAR = 8  # frames between torch.compile's carrier and the backend: one in torch 2.11 to 2.13


class CompiledGraph(Protocol):
    """What a backend made of one of Dynamo's graphs.

    Attributes:
        number: graphs are listed in this order.
        owner: the call of torch.compile that it was made for.
    """

    number: int
    owner: Any

    def reports(self) -> Mapping[frozenset[int], Report]:
        """A report for every set of weights (their ids) that the graph was optimised for."""
        ...


_GRAPHS: weakref.WeakSet[CompiledGraph] = weakref.WeakSet()


def caller() -> Any | None:
    """What stands for the call of torch.compile on whose behalf a backend runs now; None where there is none."""
    frame = inspect.currentframe()
    for _ in range(_NEAR):
        frame = frame.f_back if frame is not None else None
        owner = frame.f_locals.get("self") if frame is not None else None
        if type(owner).__name__ == _CARRIER:
            return owner
    return None


def enter(graph: CompiledGraph) -> None:
    """Remember a graph for as long as Dynamo does."""
    _GRAPHS.add(graph)


def graphs(compiled: Any) -> tuple[CompiledGraph, ...]:
    """The graphs that chanopt made for a compiled module or function, in the order in which they were compiled.

    Those that Dynamo has dropped (``torch.compiler.reset()``) are left out.
    """
    return tuple(graph for graph, _ in _found(compiled))


def reports(compiled: Any) -> tuple[Report, ...] | None:
    """The reports of :func:`graphs`; None if ``compiled`` is no compiled module or function.

    Raises:
        ChanoptError: no graph was optimised, or none yet.
    """
    if _owner(compiled) is None:
        return None
    found = tuple(report for _, report in _found(compiled))
    if not found:
        raise ChanoptError(
            "expected a function compiled with backend='chanopt' and called, found no optimised graph of it; call it "
            "once, in eval mode and under torch.no_grad() or torch.inference_mode(); where it runs as it is, a warning "
            "has said why"
        )
    return found


def _found(compiled: Any) -> list[tuple[CompiledGraph, Report]]:
    owner = _owner(compiled)
    held = {id(tensor) for module in _modules(compiled) for tensor in (*module.parameters(), *module.buffers())}
    return [
        (graph, report)
        for graph in sorted(_GRAPHS, key=lambda graph: graph.number)
        for weights, report in graph.reports().items()
        if weights & held or (graph.owner is owner and owner is not None and not held)
    ]


def _owner(compiled: Any) -> Any | None:
    for callback in _callbacks(compiled):
        while hasattr(callback, "_torchdynamo_orig_backend"):
            callback = callback._torchdynamo_orig_backend
        if type(callback).__name__ == _CARRIER:
            return callback
    return None


def _callbacks(compiled: Any) -> Iterator[Any]:
    """What Dynamo calls for a compiled thing: of an OptimizedModule, of ``module.compile()``, of a function."""
    context = getattr(compiled, "dynamo_ctx", None)
    if context is not None:
        yield context.callback
        return
    function = getattr(compiled, "_compiled_call_impl", None) if isinstance(compiled, nn.Module) else compiled
    yield from _cells(function)


def _modules(compiled: Any) -> list[nn.Module]:
    """The modules that a compiled thing is, or that a compiled function is a method of or closes over."""
    if isinstance(compiled, nn.Module):
        return [compiled]
    inner = inspect.unwrap(compiled) if callable(compiled) else compiled
    inner = getattr(inner, "_torchdynamo_orig_callable", inner)
    names = getattr(getattr(inner, "__code__", None), "co_names", ())
    reached = [getattr(inner, "__self__", None), *_cells(inner)]
    reached += [inner.__globals__.get(name) for name in names]
    return [value for value in reached if isinstance(value, nn.Module)]


def _cells(function: Any) -> Iterator[Any]:
    """What a function closes over."""
    for cell in getattr(function, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # an empty cell
            yield cell.cell_contents
