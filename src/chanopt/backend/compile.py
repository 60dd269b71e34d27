"""One of Dynamo's graphs: whether it can be optimised, and if so by the road that :func:`chanopt.optimize` takes.

A graph is only replaced where that is known to be right. In every other case it is run as Dynamo gave it, with one
warning a compiled function that says why.
"""

from __future__ import annotations

import inspect
import logging
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._guards import CompileContext
from torch._inductor import config as inductor_config
from torch._subclasses import FakeTensor

from chanopt.backend.inductor import compile_whole, device_of
from chanopt.backend.options import Options
from chanopt.backend.reattach import owned
from chanopt.backend.slim import SlimGraph
from chanopt.errors import ChanoptError
from chanopt.frontend.compiled import caller, enter

_LOG = logging.getLogger(__name__)
_WARNED = "_chanopt_warned"
_ROOT = re.compile(r"^[LG]\[['\"]\w+['\"]\]\.?")


def compile_graph(graph: fx.GraphModule, examples: Sequence[Any], options: Options) -> Callable[..., Any]:
    """Compile one graph of Dynamo's.

    Args:
        graph: as Dynamo hands it to a backend.
        examples: an example per input.
        options: what the user asked for.

    Returns:
        What takes the graph's inputs and returns its outputs.

    Raises:
        ChanoptError: in strict mode, where the graph cannot be optimised.
    """
    name = f"graph {CompileContext.current_compile_id() or '?'}"
    options.require_folder()
    reason = _unfit(graph, examples)
    if reason is not None:
        _tell(name, reason)
        return _whole(graph, examples, options)
    made = SlimGraph(name, graph, examples, options)
    try:
        made.build(examples)
    except ChanoptError as error:
        if options.strict:
            raise
        if _all_finite(graph, examples):
            _tell(name, _Reason("refused", str(error)))
            return _whole(graph, examples, options)
        _tell(name, _Reason("refused", f"{error}; it is tried again once its weights have changed"))
        made.run_otherwise(_whole(graph, examples, options))
    enter(made)
    return made


def _whole(graph: fx.GraphModule, examples: Sequence[Any], options: Options) -> Callable[..., Any]:
    """The graph as it is, compiled if the slim one would be."""
    if options.compiler == "eager":
        return graph.forward
    return compile_whole(graph, examples, options.patches(device_of(examples)))


def _all_finite(graph: fx.GraphModule, examples: Sequence[Any]) -> bool:
    """Whether the weights could be those of a trained model: others may yet be loaded into what has NaN now."""
    weights = [examples[position] for position in owned(graph)]
    return all(bool(torch.isfinite(weight).all()) for weight in weights if not _is_valueless(weight))


def _is_valueless(weight: Any) -> bool:
    return isinstance(weight, FakeTensor) or weight.is_meta or weight.layout is not torch.strided


@dataclass(frozen=True, slots=True)
class _Reason:
    """Why a graph runs as it is. Users are warned once per compiled function and kind; what is quiet is only logged."""

    kind: str
    text: str
    quiet: bool = False


def _unfit(graph: fx.GraphModule, examples: Sequence[Any]) -> _Reason | None:
    """What speaks against optimising a graph, before anything is tried."""
    if not owned(graph):
        if inductor_config.freezing and not torch.is_grad_enabled():
            return _Reason("freezing", _HIDDEN)
        return _Reason("weights", "it reads no parameter or buffer of a module", quiet=True)
    layer = _training(graph)
    if layer is not None:
        return _Reason("train", f"{layer} is in train mode; call model.eval() to have it optimised")
    if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in examples):
        remedy = "call the model under torch.no_grad() or torch.inference_mode() to have it optimised"
        return _Reason("grad", f"gradients are asked for; {remedy}")
    return None


_HIDDEN = (
    "torch._inductor.config.freezing (or TORCHINDUCTOR_FREEZING) is set for the whole process, and Dynamo then hides "
    "the weights from backends; leave it off, backend 'chanopt' freezes by itself"
)


def _training(graph: fx.GraphModule) -> str | None:
    """The first layer that computes as in training: dropout, or a batch norm that updates its statistics."""
    for node in graph.graph.nodes:
        if node.op == "call_function" and inspect.isfunction(node.target) and _trains(node):
            stack = node.meta.get("nn_module_stack") or {}
            path = next((path for path, _ in reversed(stack.values())), "")
            return _ROOT.sub("", path) or node.target.__name__
    return None


def _trains(node: fx.Node) -> bool:
    """Whether a call of a torch.nn.functional has its argument ``training`` set.

    A batch norm without running statistics has it set in eval mode, too.
    """
    try:
        given = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):
        return False
    given.apply_defaults()
    return given.arguments.get("training") is True and given.arguments.get("running_mean", node) is not None


def _tell(name: str, reason: _Reason) -> None:
    """Say why a graph runs as it is."""
    text = f"backend 'chanopt' runs {name} as it is: {reason.text}"
    _LOG.info("%s", text)
    owner = caller()
    told: set[str] = vars(owner).setdefault(_WARNED, set()) if owner is not None else set()
    if reason.quiet or reason.kind in told:
        return
    told.add(reason.kind)
    warnings.warn(text, UserWarning, stacklevel=2)
