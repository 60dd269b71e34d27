"""Which graphs a compiled module or function runs, so that it can be asked for its reports.

torch.compile hands a backend one graph at a time and does not say for whom; and one graph serves every module of a
class, its weights being inputs. So with everything that a backend makes of a graph, it notes the object that carries
the options of torch.compile: it stands on the stack in every call, and the compiled thing leads to it.
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn
from torch._guards import CompileContext

from chanopt.errors import ChanoptError
from chanopt.report import Report

_CARRIER = "_TorchCompileWrapper"


@dataclass(frozen=True, slots=True)
class Made:
    """What a backend made of a graph for one set of weights.

    Attributes:
        owner: the call of torch.compile on whose behalf (see :func:`caller`).
        code: of the function that Dynamo was entered by (see :func:`entered`).
        weights: the ids of the weights.
        order: the greater, the later.
        report: what was done.
    """

    owner: Any
    code: Any
    weights: frozenset[int]
    order: int
    report: Report


class CompiledGraph(Protocol):
    """What a backend made of one of Dynamo's graphs.

    Attributes:
        number: graphs are listed in this order.
        frame: which piece of code Dynamo compiled; the same for one that it compiled anew, for other sizes or types.
    """

    number: int
    frame: Any

    def made(self) -> Sequence[Made]:
        """What there is now, for every set of weights that the graph was optimised for."""
        ...


_GRAPHS: weakref.WeakSet[CompiledGraph] = weakref.WeakSet()


def caller() -> Any | None:
    """What stands for the call of torch.compile on whose behalf a backend runs now; None where there is none.

    While Dynamo compiles it is called itself; later it is what the function leads to that Dynamo was entered by.
    """
    return next((found for names in _stack() if (found := _carrier(names.get("self"))) is not None), None)


def entered() -> Any | None:
    """The code that torch.compile was called for and that runs now; for modules it is the same for all."""
    found = (names["fn"] for names in _stack() if "fn" in names and _carrier(names.get("self")) is not None)
    return getattr(next(found, None), "__code__", None)


def _stack() -> Iterator[dict[str, Any]]:
    """The local names of every function on the stack, from the innermost."""
    at = inspect.currentframe()
    while at is not None:
        yield at.f_locals
        at = at.f_back


def frame() -> Any:
    """What Dynamo compiles now: equal for the same piece of code, and for nothing else."""
    compiling = CompileContext.current_compile_id()
    return object() if compiling is None else compiling.frame_id


def enter(graph: CompiledGraph) -> None:
    """Remember a graph for as long as Dynamo does."""
    _GRAPHS.add(graph)


def graphs(compiled: Any) -> tuple[CompiledGraph, ...]:
    """The graphs that chanopt made for a compiled module or function, in the order in which they were compiled.

    Of one piece of code that Dynamo has compiled several times for the same weights, the last. Graphs that Dynamo has
    dropped (``torch.compiler.reset()``) are left out.
    """
    return tuple(graph for graph, _ in _found(compiled))


def reports(compiled: Any) -> tuple[Report, ...] | None:
    """The reports of :func:`graphs`; None if ``compiled`` is no compiled module or function.

    Raises:
        ChanoptError: no graph was optimised, or none yet.
    """
    if _owner(compiled) is None:
        return None
    found = tuple(made.report for _, made in _found(compiled))
    if not found:
        raise ChanoptError(
            "expected a function compiled with backend='chanopt' and called, found no optimised graph of it; call it "
            "once, in eval mode and under torch.no_grad() or torch.inference_mode(). Where a graph runs as it is, a "
            f"warning has said why{_unseen(compiled)}"
        )
    return found


def _unseen(compiled: Any) -> str:
    """What to do where PyTorch makes no graph, of which it gives no warning."""
    if not isinstance(compiled, nn.Sequential | nn.ModuleList | nn.ModuleDict) or hasattr(compiled, "dynamo_ctx"):
        return ""
    return f"; but PyTorch makes no graph of {type(compiled).__name__}.compile(): use torch.compile(module)"


def _found(compiled: Any) -> list[tuple[CompiledGraph, Made]]:
    owner = _owner(compiled)
    if owner is None:
        return []
    held = {id(tensor) for module in _modules(compiled) for tensor in (*module.parameters(), *module.buffers())}
    every = [(graph, made) for graph in _GRAPHS for made in graph.made()]
    own = [pair for pair in every if pair[1].owner is owner]
    if isinstance(compiled, nn.Module):
        own = [pair for pair in own if pair[1].weights <= held] or own
    if not own:  # two calls of torch.compile with equal options share what Dynamo compiled
        code = _code(compiled)
        equal = [pair for pair in every if pair[1].owner == owner and pair[1].code is code]
        own = [pair for pair in equal if pair[1].weights <= held]
    return sorted(_newest(own), key=lambda pair: pair[0].number)


def _code(compiled: Any) -> Any | None:
    """What :func:`entered` finds when a compiled thing is called."""
    called = compiled
    if isinstance(compiled, nn.Module):
        called = compiled.forward if hasattr(compiled, "dynamo_ctx") else getattr(compiled, "_compiled_call_impl", None)
    return getattr(getattr(called, "__wrapped__", None), "__code__", None)


def _newest(found: Iterable[tuple[CompiledGraph, Made]]) -> list[tuple[CompiledGraph, Made]]:
    """Of one piece of code that reads the same weights, the last that was made."""
    kept: list[tuple[CompiledGraph, Made]] = []
    for graph, made in sorted(found, key=lambda pair: -pair[1].order):
        again = [later.weights for other, later in kept if graph.frame == other.frame]
        if not any(made.weights <= later or made.weights >= later for later in again):
            kept.append((graph, made))
    return kept


def _owner(compiled: Any) -> Any | None:
    return next((found for callback in _callbacks(compiled) if (found := _unwrapped(callback)) is not None), None)


def _carrier(context: Any) -> Any | None:
    """What carries the options, if this is it, or a context of Dynamo's that leads to it."""
    if type(context).__name__ == _CARRIER:
        return context
    is_context = type(context).__module__.startswith("torch._dynamo.")
    return _unwrapped(getattr(context, "callback", None)) if is_context else None


def _unwrapped(callback: Any) -> Any | None:
    while hasattr(callback, "_torchdynamo_orig_backend"):
        callback = callback._torchdynamo_orig_backend
    return callback if type(callback).__name__ == _CARRIER else None


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
