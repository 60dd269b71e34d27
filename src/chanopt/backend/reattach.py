"""From Dynamo's graph back to a module: the lifted parameters under their names, everything else an input.

Dynamo hands a backend a flat graph whose parameters and buffers are inputs among the user's, each with the expression
by which the user's code reaches it: ``L['self']._modules['layer1']._parameters['weight']``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.fx.traceback import preserve_node_meta

from chanopt.errors import CaptureError

_OWNED = re.compile(r"\._(?:parameters|buffers)\[")
_ROOT = re.compile(r"^(.*?)(?=\._(?:modules|parameters|buffers)\[)")
_STEP = re.compile(r"\._(?:modules|parameters|buffers)\[(['\"])(.*?)\1\]")
_INDEX = re.compile(r"\[['\"]?([^\]'\"]*)['\"]?\]")
_WORD = re.compile(r"[A-Za-z_]\w*")
Autocast = tuple[str, torch.dtype] | None
_HELD = "chanopt.held"  # no module of the user's can have this name: PyTorch allows no dots
_KEPT_META = ("nn_module_stack", "stack_trace", "source_fn_stack")


@dataclass(frozen=True)
class Fragment:
    """One of Dynamo's graphs as a module of its own.

    Attributes:
        module: holds the parameters and buffers, which are the user's own, and takes the tensors that are left.
        user: which of the graph's inputs those are.
        names: the names of the parameters and buffers, in the order of the graph's inputs.
        numbers: the inputs that are numbers and were written into the module, with their values.
        examples: the tensors that the module takes.
        sizes: per tensor the dimensions of any size, as torch.export is told.
    """

    module: nn.Module
    user: tuple[int, ...]
    names: tuple[str, ...]
    numbers: tuple[tuple[int, int | float], ...]
    examples: tuple[torch.Tensor, ...]
    sizes: tuple[dict[int, Any], ...]


class Attached(nn.Module):
    """A graph over its own parameters. Names of layers and source lines of the graph go along when it is traced."""

    def __init__(self, autocast: Autocast = None) -> None:
        super().__init__()
        vars(self)[_HELD] = (fx.Graph(), autocast)

    @property
    def chanopt_graph(self) -> fx.Graph:
        """The graph that is run."""
        return vars(self)[_HELD][0]

    def forward(self, *inputs: torch.Tensor) -> Any:
        """Run the graph, under the autocast that it was captured under."""
        graph, autocast = vars(self)[_HELD]
        interpreter = fx.Interpreter(self, graph=graph)  # pyright: ignore[reportArgumentType]
        with preserve_node_meta():
            if autocast is None:
                return interpreter.run(*inputs)
            with torch.autocast(autocast[0], dtype=autocast[1], cache_enabled=False):
                return interpreter.run(*inputs)


def reattach(graph: fx.GraphModule, examples: Sequence[Any], autocast: Autocast = None) -> Fragment:
    """Give a graph of Dynamo's its parameters back.

    Args:
        graph: as Dynamo hands it to a backend; not modified.
        examples: an example per input: parameters, tensors, symbolic integers.
        autocast: device and type of the autocast that the graph is called under, which is no part of it: it is written
            into the module.

    Raises:
        CaptureError: the graph has an input that is neither tensor nor number, or a tensor without values.
    """
    return _Reattaching(graph, examples, autocast).fragment()


def drop_own_lines(graph: fx.GraphModule) -> None:
    """Forget the source lines of an exported graph that are in this file: of some modules Dynamo keeps none."""
    for node in graph.graph.nodes:
        if __file__ in (node.meta.get("stack_trace") or ""):
            node.meta["stack_trace"] = ""


def owned(graph: fx.GraphModule) -> tuple[int, ...]:
    """Which inputs of a graph of Dynamo's are parameters and buffers of a module."""
    return tuple(number for number, node in enumerate(_placeholders(graph)) if _OWNED.search(_source(node)))


def number_of(example: Any) -> int | float:
    """The value of an input that is a number: a Python one, a symbolic size, or a float packed into a tensor."""
    if isinstance(example, torch.Tensor):
        return example.item()
    return example if isinstance(example, int) else example.node.hint


def _placeholders(graph: fx.GraphModule) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if node.op == "placeholder"]


def _source(node: fx.Node) -> str:
    """The expression by which the user's code reaches an input; "" for one that Dynamo made up."""
    source = getattr(node, "_dynamo_source", None)
    return getattr(source, "name", "") or ""


class _Reattaching:
    """The state of one conversion."""

    def __init__(self, graph: fx.GraphModule, examples: Sequence[Any], autocast: Autocast) -> None:
        self.graph = graph
        self.inputs = list(zip(_placeholders(graph), examples, strict=True))
        self.roots = _roots([_source(graph_input) for graph_input, _ in self.inputs])
        self.module = Attached(autocast)
        self.env: dict[fx.Node, Any] = {}

    def fragment(self) -> Fragment:
        kept = owned(self.graph)
        user, numbers = self._classified(kept)
        for position in user:
            node = self.inputs[position][0]
            self.env[node] = self._made.placeholder(node.name)
        sizes = self._sizes(user)
        baked = [(position, value) for position, value in numbers if self._bake(position, value, sizes)]
        names = tuple(self._attach(*self.inputs[position]) for position in kept)
        for node in self.graph.graph.nodes:
            if node not in self.env:
                self.env[node] = self._copied(node)
        tensors = tuple(self.inputs[position][1].detach() for position in user)
        shapes = tuple(self._open(self.inputs[position][0]) for position in user)
        return Fragment(self.module.eval(), tuple(user), names, tuple(baked), tensors, shapes)

    @property
    def _made(self) -> fx.Graph:
        return self.module.chanopt_graph

    def _classified(self, kept: tuple[int, ...]) -> tuple[list[int], list[tuple[int, int | float]]]:
        """The inputs that stay, and those that are numbers, with their values."""
        user: list[int] = []
        numbers: list[tuple[int, int | float]] = []
        for position, (node, example) in enumerate(self.inputs):
            _require_values(node, example)
            if isinstance(example, torch.SymInt | int) or _is_number(node, example):
                numbers.append((position, number_of(example)))
            elif position not in kept:
                user.append(position)
        return user, numbers

    def _sizes(self, user: list[int]) -> dict[Any, tuple[fx.Node, int]]:
        """Where each symbolic size can be read off: by symbol, an input and a dimension of it."""
        found: dict[Any, tuple[fx.Node, int]] = {}
        for position in user:
            node = self.inputs[position][0]
            for axis, size in enumerate(_fake(node).shape):
                if isinstance(size, torch.SymInt) and not is_concrete_int(size):
                    found.setdefault(size.node.expr, (node, axis))
        return found

    def _bake(self, position: int, value: int | float, sizes: dict[Any, tuple[fx.Node, int]]) -> bool:
        """Replace a number: by a size that an input has, else by its value. True if the value was written in."""
        node = self.inputs[position][0]
        traced = node.meta["example_value"]
        if isinstance(traced, torch.SymInt) and traced.node.expr in sizes:
            source, axis = sizes[traced.node.expr]
            self.env[node] = self._made.call_method("size", (self.env[source], axis))
            return False
        self.env[node] = value
        if isinstance(traced, torch.Tensor):
            self.env |= dict.fromkeys(node.users, value)
        return not (isinstance(traced, torch.SymInt) and is_concrete_int(traced))

    def _attach(self, node: fx.Node, tensor: torch.Tensor) -> str:
        """Register a parameter or buffer under the name it has in the user's module."""
        name = self._name(_source(node))
        owner: nn.Module = self.module
        *path, leaf = name.split(".")
        for part in path:
            if part not in dict(owner.named_children()):
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(leaf, tensor)
        else:
            owner.register_buffer(leaf, tensor)
        self.env[node] = self._made.get_attr(name)
        return name

    def _name(self, source: str) -> str:
        root = _ROOT.match(source)
        assert root is not None  # only what ``_OWNED`` finds comes here
        steps = [step for _, step in _STEP.findall(source)]
        return ".".join([*filter(None, [self.roots[root[1]]]), *steps])

    def _copied(self, node: fx.Node) -> fx.Node:
        if node.op == "call_module":
            raise CaptureError(
                f"expected Dynamo to open every module, found a call of {node.target}; "
                "leave torch._dynamo.config.inline_inbuilt_nn_modules as it is"
            )
        if node.op == "get_attr":
            return self._constant(node)
        made = self._made.node_copy(node, lambda old: self.env[old])
        made.meta = {key: node.meta[key] for key in _KEPT_META if key in node.meta}
        stack = made.meta.get("nn_module_stack")
        if stack:
            made.meta["nn_module_stack"] = {key: (self._layer(path), kind) for key, (path, kind) in stack.items()}
        return made

    def _constant(self, node: fx.Node) -> fx.Node:
        """A tensor or a graph (of a branch, of a loop) that Dynamo's graph holds itself."""
        held: Any = self.graph
        for part in str(node.target).split("."):
            held = getattr(held, part)
        name = f"dynamo_{str(node.target).replace('.', '_')}"
        if isinstance(held, nn.Module):
            self.module.add_module(name, held)
        else:
            self.module.register_buffer(name, held)
        return self._made.get_attr(name)

    def _layer(self, path: str) -> str:
        """A layer's name out of the path by which the user's code reaches it: ``L['self'].layer1[0].conv1``."""
        root = max((root for root in self.roots if path.startswith(root)), key=len, default=None)
        rest = _INDEX.sub(r".\1", path if root is None else path[len(root) :]).replace("._modules.", ".")
        return ".".join(filter(None, [self.roots.get(root or "", ""), rest.strip(".")]))

    def _open(self, node: fx.Node) -> dict[int, Any]:
        sizes = enumerate(_fake(node).shape)
        return {axis: Dim.DYNAMIC for axis, s in sizes if isinstance(s, torch.SymInt) and not is_concrete_int(s)}


def _fake(node: fx.Node) -> torch.Tensor:
    """An input with symbolic sizes, as Dynamo traced it."""
    return node.meta["example_value"]


def _require_values(node: fx.Node, example: Any) -> None:
    if not isinstance(example, torch.Tensor | torch.SymInt | int):
        raise CaptureError(f"expected tensors and numbers as inputs, found a {type(example).__name__} in {node.name}")
    if isinstance(example, torch._subclasses.FakeTensor) or getattr(example, "is_meta", False):  # pyright: ignore[reportPrivateUsage]
        raise CaptureError(f"expected tensors with values, found that {node.name} has none (a fake or meta tensor)")


def _is_number(node: fx.Node, example: torch.Tensor) -> bool:
    """Whether an input is a Python float that Dynamo packed into a tensor: all that is done to it is to unpack it."""
    scalar = example.ndim == 0 and example.dtype == torch.float64 and example.device.type == "cpu"
    return scalar and all(user.op == "call_method" and user.target == "item" for user in node.users)


def _roots(sources: list[str]) -> dict[str, str]:
    """A prefix per module whose parameters the graph reads; "" if there is only one such module."""
    found = dict.fromkeys(root[1] for source in sources if _OWNED.search(source) and (root := _ROOT.match(source)))
    if len(found) <= 1:
        return dict.fromkeys(found, "")
    prefixes: dict[str, str] = {}
    for root in found:
        word = (_WORD.findall(root) or ["module"])[-1]
        taken = set(prefixes.values())
        prefixes[root] = next(name for name in (word, *(f"{word}_{n}" for n in range(len(found)))) if name not in taken)
    return prefixes
