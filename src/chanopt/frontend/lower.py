"""Lowering: from an ATen graph to the channel-flow IR, one table of op rules (rules.py)."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from chanopt.codegen.aten import AtenDialect
from chanopt.codegen.operators import resolve
from chanopt.codegen.torch_names import OpOverload, parameters, pytree_info
from chanopt.errors import CaptureError, IRError, LoweringError
from chanopt.frontend.capture import Captured, first_line
from chanopt.frontend.trace_names import layer_of, source_of
from chanopt.ir import (
    Access,
    Arg,
    Interface,
    Kind,
    Layout,
    Op,
    Param,
    Program,
    Read,
    Refusal,
    Value,
    map_leaves,
)
from chanopt.ir.edit import as_trained, is_frozen


@dataclass(frozen=True, eq=False)
class Const:
    """A parameter, buffer or folded constant."""

    name: str
    tensor: torch.Tensor
    buffer: bool = False

    def transposed(self) -> Const:
        """A matrix with rows and columns exchanged, under a name of its own."""
        return Const(f"{self.name}_T", as_trained(self.tensor.t().contiguous(), self.tensor), self.buffer)


@dataclass(frozen=True, eq=False)
class Scalar:
    """A symbolic size and its value for the traced example."""

    value: str
    hint: int


@dataclass(frozen=True, eq=False)
class Moved:
    """A rearranged tensor whose channels no longer lie along one axis: a view that splits them, say.

    Nothing has been emitted for it: a later shape op may bring the channels together again.
    """

    base: Value
    calls: tuple[Call, ...]
    numbers: torch.Tensor


@dataclass(frozen=True, eq=False)
class Call:
    """One ATen call, its operands already lowered, defaults filled in.

    Attributes:
        target: the operator, e.g. ``aten.conv2d.default``.
        args: positional arguments: Value, Const, Scalar, Moved, literals, tuples of these.
        kwargs: keyword-only arguments that were given.
        name: name for the result.
        shape: sizes of the result; symbolic ones as text.
        hint: sizes of the result for the traced example.
        dtype: element type of the result.
        layer: the user's module.
        source: the user's source line.
    """

    target: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    name: str
    shape: tuple[int | str, ...]
    hint: tuple[int, ...]
    dtype: torch.dtype
    layer: str
    source: str


@dataclass(frozen=True)
class Refused:
    """A rule's answer when it cannot tell what happens to the channels."""

    reason: str


Rule = Callable[["Lowering", Call], "Value | Const | Moved | Refused"]


@dataclass
class Lowering:
    """The state of one lowering: what each graph node became, and the program built so far."""

    rules: Mapping[str, Rule]
    batch: int
    strict: bool = False
    env: dict[fx.Node, Any] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)
    values: dict[str, Value] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    refusals: list[Refusal] = field(default_factory=list)
    aliases: dict[tuple[str, int], Value] = field(default_factory=dict)
    sources: dict[str, Scalar] = field(default_factory=dict)
    hints: dict[str, int] = field(default_factory=dict)
    symbol: str = ""

    # -- building -------------------------------------------------------------------------------------------------

    def fresh(self, name: str) -> str:
        """A value name that is not taken."""
        count, unique = 1, name
        while unique in self.values:
            count, unique = count + 1, f"{name}_{count}"
        return unique

    def add(self, call: Call, kind: Kind, args: tuple[Arg, ...], axis: int | None, **extra: Any) -> Value:
        """Append an op and return its result."""
        value = self._value(self.fresh(call.name), call, axis)
        target = extra.pop("target", call.target)
        kwargs = tuple(sorted((key, self.literal(arg)) for key, arg in call.kwargs.items()))
        op = Op(
            kind,
            target,
            args,
            extra.pop("kwargs", kwargs),
            value.name,
            layer=call.layer,
            source=call.source,
            **extra,
        )
        self.ops.append(op)
        self.values[value.name] = value
        return value

    def _value(self, name: str, call: Call, axis: int | None) -> Value:
        dtype = str(call.dtype).removeprefix("torch.")
        self.hints |= {s: hint for s, hint in zip(call.shape, call.hint, strict=True) if isinstance(s, str)}
        if axis is None:
            return Value(name, dtype, call.shape)
        sizes = list(map(self._for_example, call.shape, call.hint))
        numel = math.prod(sizes[:axis]) * math.prod(sizes[axis + 1 :])
        return Value(name, dtype, call.shape, axis, Layout.identity(call.hint[axis]), numel * call.dtype.itemsize)

    def _for_example(self, size: int | str, hint: int) -> int:
        """A size for the example's batch: the trace is of another one, which a reshape may have moved anywhere."""
        if isinstance(size, int) or set(_SYMBOL.findall(size)) != {self.symbol}:
            return hint
        traced = self.hints[self.symbol]
        return hint // traced * self.batch if hint % traced == 0 else hint

    def literal(self, arg: Any) -> Arg:
        """An argument as it stands in the IR: whole reads of values, parameters, literals."""
        if isinstance(arg, Moved):
            arg = self.settle(arg)
        if isinstance(arg, Value):
            return Read(arg.name, Access.ALL)
        if isinstance(arg, Const):
            return self.param(arg)
        if isinstance(arg, Scalar):
            return Read(arg.value, Access.ALL)
        if isinstance(arg, list | tuple):
            return tuple(self.literal(item) for item in arg)
        return arg

    def param(self, const: Const, out: int | None = None, inn: int | None = None) -> Param:
        """A parameter operand; the tensor becomes one of the program's weights.

        Folded weights may be named alike (under autocast torch.export tells no layers): the later one is numbered.
        """
        count, name = 0, const.name
        while name in self.weights and not _same(self.weights[name], const.tensor):
            count, name = count + 1, f"{const.name}_{count + 1}"
        self.weights[name] = const.tensor
        return Param(name, out, inn, const.buffer)

    def tensor(self, arg: Any) -> Value:
        """An operand as a value; a rearrangement that is still open is emitted as it stands."""
        value = self.settle(arg) if isinstance(arg, Moved) else arg
        if not isinstance(value, Value):
            raise _NotATensor
        return value

    def channels_along(self, arg: Any, axis: int) -> Value:
        """The operand seen with its channels along ``axis``.

        Where its channels are known to lie elsewhere, or not known, all of it is pinned and channels start anew.
        """
        value = self.tensor(arg)
        if value.axis == axis:
            return value
        key = (value.name, axis)
        if key not in self.aliases:
            hint = tuple(self.size_hint(size) for size in value.shape)
            dtype = getattr(torch, value.dtype)
            made = self._producer(value.name)
            call = Call("alias", (), {}, f"{value.name}_c", value.shape, hint, dtype, made.layer, made.source)
            self.aliases[key] = self.add(call, Kind.BARRIER, (Read(value.name, Access.ALL),), axis)
        return self.aliases[key]

    def size_hint(self, size: int | str) -> int:
        """A size of a value; of a symbolic one, what it was when the model was traced."""
        return size if isinstance(size, int) else self.hints[size]

    def _producer(self, name: str) -> Op:
        return next(op for op in reversed(self.ops) if op.result == name)

    def barrier(self, call: Call, reason: str | None) -> Value:
        """Keep a call as it is; with a reason it is named in the refusals.

        Raises:
            LoweringError: in strict mode.
        """
        if reason is not None:
            self._refuse(call, reason)
        args = tuple(self.literal(arg) for arg in call.args)
        return self.add(call, Kind.BARRIER, args, None)

    def _refuse(self, call: Call, reason: str) -> None:
        refusal = Refusal(call.target, call.layer, call.source, reason)
        if self.strict:
            raise LoweringError(
                f"expected an operator with a channel rule, found {call.target} "
                f"in layer {call.layer or '-'}: {reason}\n"
                f"  from: {call.source or 'unknown source line'}\n"
                "  remedy: add a rule (docs/writing_passes.md), or lower with strict=False to keep its operands whole"
            )
        self.refusals.append(refusal)

    def settle(self, moved: Moved) -> Value:
        """Emit an open rearrangement op by op, pinning its operand."""
        value = moved.base
        for call in moved.calls:
            value = self.barrier(replace(call, args=(value, *call.args[1:])), "its channels do not lie along one axis")
        return value

    # -- the graph ------------------------------------------------------------------------------------------------

    def node(self, node: fx.Node, graph: fx.GraphModule) -> None:
        """Lower one graph node."""
        if node.op == "placeholder":
            self.env[node] = self._placeholder(node)
        elif node.op == "get_attr":
            self.env[node] = _attribute(graph, str(node.target))
        elif node.op == "call_function":
            self.env[node] = self._function(node)
        elif node.op == "output":
            args = tuple(self.literal(self._operand(arg)) for arg in _flat(node.args[0]))
            self.ops.append(Op(Kind.SINK, "output", args))

    def _placeholder(self, node: fx.Node) -> Any:
        example = node.meta.get("val")
        if not isinstance(example, torch.Tensor):
            self.ops.append(Op(Kind.SOURCE, "input", (str(node.target),), result=node.name))
            self.values[node.name] = Value(node.name, "object", ())
            return example
        call = _call(node, "input", (str(node.target),), {})
        value = self.add(call, Kind.SOURCE, call.args, None)
        if not self.symbol and call.shape and isinstance(call.shape[0], str):
            self.symbol = call.shape[0]  # the batch
        for axis, (size, hint) in enumerate(zip(call.shape, call.hint, strict=True)):
            if isinstance(size, str) and size not in self.sources:
                self.sources[size] = self._size(value, axis, hint)
        return value

    def _size(self, value: Value, axis: int, hint: int) -> Scalar:
        name = self.fresh(f"{value.name}_size")
        self.values[name] = Value(name, "int", ())
        self.ops.append(Op(Kind.BARRIER, "aten.sym_size.int", (Read(value.name, Access.ALL), axis), result=name))
        self.hints[name] = hint
        return Scalar(name, hint)

    def _operand(self, arg: Any) -> Any:
        return map_aggregate(arg, lambda a: self.env[a] if isinstance(a, fx.Node) else a)

    def _function(self, node: fx.Node) -> Any:
        if node.target is operator.getitem:
            return self._item(node)
        args, kwargs = _filled(node, self._operand(node.args), dict(self._operand(node.kwargs)))
        target = _SPELLINGS.get(name := _target_name(node.target), name)
        example = node.meta.get("val")
        if isinstance(example, torch.SymInt | int):
            return self._symbol(node, target, args, example)
        folded = _fold(node, args, kwargs)
        if folded is not None:
            return folded
        if not isinstance(example, torch.Tensor):
            return self._several(node, target, args, kwargs)
        return self.call(_call(node, target, args, kwargs))

    def call(self, call: Call) -> Any:
        """Apply the rule of a call's operator; without one, or where the rule refuses, it becomes a barrier."""
        rule = self.rules.get(call.target)
        if rule is None:
            return self.barrier(call, "no channel rule for this operator" if _touches(call) else None)
        if call.dtype.is_complex:
            return self.barrier(call, "it computes with complex numbers")
        try:
            made = rule(self, call)
        except _NotATensor:
            made = Refused("an operand is not a tensor of the graph")
        return self.barrier(call, made.reason) if isinstance(made, Refused) else made

    def _symbol(self, node: fx.Node, target: str, args: tuple[Any, ...], example: torch.SymInt | int) -> Any:
        if isinstance(example, int):
            return example
        text = str(example)
        if text not in self.sources:
            name = self.fresh(node.name)
            self.values[name] = Value(name, "int", ())
            self.ops.append(Op(Kind.BARRIER, target, tuple(self.literal(arg) for arg in args), result=name))
            self.sources[text] = Scalar(name, _hint(example))
            self.hints[name] = _hint(example)
        return self.sources[text]

    def _several(self, node: fx.Node, target: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """A call with several results: a tuple of lowered results, or one opaque value for ``getitem`` to take from."""
        examples: Any = node.meta.get("val")
        split = _SEVERAL.get(target)
        singles = split(args, examples) if split is not None else []
        if singles and all(singles[_taken(user)] is not None for user in node.users):
            return tuple(
                None if made is None else self.call(_call(node, made[0], made[1], {}, example=example))
                for made, example in zip(singles, examples, strict=True)
            )
        call = Call(target, args, kwargs, node.name, (), (), torch.float32, layer_of(node), source_of(node))
        value = self.barrier(call, "no channel rule for this operator" if _touches(call) else None)
        self.values[value.name] = replace(value, dtype="tuple")
        return self.values[value.name]

    def _item(self, node: fx.Node) -> Any:
        source, index = self._operand(node.args)
        if isinstance(source, tuple | list):
            return source[index]
        return self.barrier(_call(node, "operator.getitem", (source, index), {}), None)


class _NotATensor(Exception):
    """A rule asked for a tensor of the graph and met a parameter or a number."""


def lower_captured(captured: Captured, rules: Mapping[str, Rule], *, strict: bool) -> Program:
    """The channel-flow program of a captured model.

    Raises:
        LoweringError: with ``strict``, at the first operator whose effect on channels is unknown.
        CaptureError: the graph has a size that depends on data, an operator that is no function of tensors, or an
            output of a structure that cannot be written down.
    """
    lowering = Lowering(rules, captured.batch, strict)
    graph = captured.graph.graph
    for node in _live(graph):
        lowering.node(node, captured.graph)
    info = pytree_info(graph)
    assert info.out_spec is not None  # torch.export records the structure of the outputs
    interface = Interface(_written(info.in_spec), _written(info.out_spec), tuple(info.orig_args))
    plain = _plain_symbols(lowering.values)
    values = {n: replace(v, shape=tuple(map(plain, v.shape))) for n, v in lowering.values.items()}
    program = Program(
        tuple(lowering.ops),
        values,
        dict(lowering.weights),
        interface,
        captured.batch,
        tuple(dict.fromkeys(lowering.refusals)),
        captured.channels_last,
        next((tensor.device.type for tensor in lowering.weights.values()), "cpu"),
        AtenDialect({str(plain(text)): hint for text, hint in lowering.hints.items()}),
    )
    _require_operators(program)
    return without_dead_ops(program)


def _written(spec: pytree.TreeSpec) -> str:
    try:
        return pytree.treespec_dumps(spec)
    except NotImplementedError as error:
        raise CaptureError(f"expected inputs and outputs of a known structure, found: {first_line(error)}") from error


def _require_operators(program: Program) -> None:
    for op in program.ops:
        if op.kind in (Kind.SOURCE, Kind.SINK) or op.target == "alias":
            continue
        try:
            resolve(op.target)
        except IRError as error:
            raise CaptureError(
                f"expected operators on tensors, found {op.target} in layer {op.layer or '-'}"
            ) from error


def _plain_symbols(values: Mapping[str, Value]) -> Callable[[int | str], int | str]:
    """Sizes in ``b`` rather than in torch's ``s77``, where one symbol (the batch) is all there is."""
    found = {symbol for v in values.values() for s in v.shape if isinstance(s, str) for symbol in _SYMBOL.findall(s)}
    if len(found) != 1:
        return lambda size: size
    return lambda size: _SYMBOL.sub("b", size) if isinstance(size, str) else size


_SYMBOL = re.compile(r"\bs\d+\b")


def without_dead_ops(program: Program) -> Program:
    """Drop ops whose results nobody reads (sources stay: they are the user's)."""
    needed: set[str] = set()
    kept: list[Op] = []
    for op in reversed(program.ops):
        if op.kind in (Kind.SOURCE, Kind.SINK) or op.result in needed:
            kept.append(op)
            needed.update(read.value for read in op.reads)
    return program.evolve(ops=reversed(kept))


def _live(graph: fx.Graph) -> Iterable[fx.Node]:
    """The nodes the output needs (auxiliary heads in eval are dead), in order; every placeholder."""
    needed: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op in ("output", "placeholder") or node in needed:
            needed.add(node)
            needed.update(node.all_input_nodes)
    return [node for node in graph.nodes if node in needed]


def _call(
    node: fx.Node,
    target: str,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    example: torch.Tensor | None = None,
) -> Call:
    tensor = node.meta["val"] if example is None else example
    shape = tuple(size if isinstance(size, int) else str(size) for size in tensor.shape)
    hint = tuple(_hint(size) for size in tensor.shape)
    name = target.split(".")[1] if example is not None else node.name
    return Call(target, args, kwargs, name, shape, hint, tensor.dtype, layer_of(node), source_of(node))


def _hint(size: int | torch.SymInt) -> int:
    if isinstance(size, int):
        return size
    if size.node.hint is None:
        raise CaptureError(
            f"expected sizes that follow from those of the inputs, found one that depends on data: {size}"
        )
    return int(size.node.hint)


# One spelling for ops that differ only in what they ask of memory: clones are dropped, so a view may need a copy.
_SPELLINGS = {
    "aten.view.default": "aten.reshape.default",
    "aten._unsafe_view.default": "aten.reshape.default",
}


def _target_name(target: Any) -> str:
    if isinstance(target, OpOverload):
        return str(target)
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__name__', target)}".removeprefix("_")


def _filled(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments by position with defaults filled in; what is keyword-only stays so."""
    if not isinstance(node.target, OpOverload):
        return tuple(args), kwargs
    filled: list[Any] = list(args)
    for argument in parameters(node.target)[len(filled) :]:
        if argument.kwarg_only:
            continue
        filled.append(kwargs.pop(argument.name, argument.default_value))
    return tuple(filled), kwargs


def _fold(node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Const | tuple[Const, ...] | None:
    """Evaluate a call on parameters alone (frozen batch norm, weight standardisation, prune masks)."""
    leaves = pytree.tree_leaves((args, dict(kwargs)), is_leaf=lambda x: isinstance(x, Const | Value | Scalar | Moved))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Const)]
    other = any(isinstance(leaf, Value | Scalar | Moved) for leaf in leaves)
    target = node.target
    if other or not isinstance(target, OpOverload) or torch.Tag.nondeterministic_seeded in target.tags:
        return None
    if not tensors and any(isinstance(leaf, torch.SymInt) for leaf in leaves):
        return None

    def real(arg: Any) -> Any:
        return arg.tensor if isinstance(arg, Const) else arg

    with torch.no_grad():
        made = target(*pytree.tree_map(real, args), **pytree.tree_map(real, dict(kwargs)))
    name, trained = _folded_name(node), [const.tensor for const in tensors if not const.buffer]

    def const(name: str, item: torch.Tensor) -> Const:
        # What is computed of frozen parameters alone is frozen, as its own weight would be without a mask on it.
        frozen = trained and all(map(is_frozen, trained))
        return Const(name, as_trained(item, trained[0]) if frozen else item, not trained)

    if isinstance(made, torch.Tensor):
        return const(name, made)
    return tuple(const(f"{name}.{k}", item) for k, item in enumerate(made)) if made is not None else None


def _folded_name(node: fx.Node) -> str:
    """A folded weight takes the name the module gives it: ``conv.weight`` for ``weight_orig * weight_mask``."""
    layer = layer_of(node)
    user = next(iter(node.users), None)
    while user is not None and user.op == "call_function" and _position(user, node) not in (1, 2):
        node, user = user, next(iter(user.users), None)
    role = {1: "weight", 2: "bias"}.get(_position(user, node) if user is not None else 0)
    if user is None or role is None or str(user.target).removeprefix("aten.").split(".")[0] not in _WEIGHTED:
        return f"{layer}.{node.name}".lstrip(".")
    return f"{layer_of(user)}.{role}".lstrip(".")


_WEIGHTED = frozenset(
    {"conv1d", "conv2d", "conv3d", "linear", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
)


def _taken(item: fx.Node) -> int:
    """Which result of several a ``getitem`` takes."""
    index: Any = item.args[1]
    return index


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are one; a transposed view of a square weight begins where the weight does."""
    return one is other or _memory(one) == _memory(other)


def _memory(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _position(user: fx.Node, node: fx.Node) -> int:
    return user.args.index(node) if node in user.args else 0


def _attribute(graph: fx.GraphModule, name: str) -> Const:
    owner: Any = graph
    for part in name.split("."):
        owner = getattr(owner, part)
    if not isinstance(owner, torch.Tensor):
        raise CaptureError(
            f"expected {name} to be a tensor, found a {type(owner).__name__}; "
            "control flow inside the model is not supported"
        )
    return Const(name, as_trained(owner.detach(), owner), not isinstance(owner, torch.nn.Parameter))


def _touches(call: Call) -> bool:
    """Whether a call reads a tensor of at least two dimensions, so that keeping it whole costs something."""
    found: list[bool] = []
    map_leaves(tuple(call.args), lambda arg: found.append(isinstance(arg, Value | Moved)))
    return any(found) and any(
        len(arg.shape) > 1 if isinstance(arg, Value) else True
        for arg in pytree.tree_leaves(call.args, is_leaf=lambda x: isinstance(x, Value | Moved))
        if isinstance(arg, Value | Moved)
    )


def _flat(tree: Any) -> list[Any]:
    return list(tree) if isinstance(tree, list | tuple) else [tree]


def _batch_norm(args: tuple[Any, ...], examples: Any) -> list[tuple[str, tuple[Any, ...]] | None]:
    x, weight, bias, mean, variance, momentum, eps = args
    first = ("aten.batch_norm.default", (x, weight, bias, mean, variance, False, momentum, eps, True))
    return [first, *[None] * (len(examples) - 1)]


def _split(args: tuple[Any, ...], examples: Any) -> list[tuple[str, tuple[Any, ...]] | None]:
    x, _, dim = args
    made: list[tuple[str, tuple[Any, ...]] | None] = []
    start = 0
    for example in examples:
        size = _hint(example.shape[dim])
        made.append(("aten.slice.Tensor", (x, dim, start, start + size, 1)))
        start += size
    return made


def _unbind(args: tuple[Any, ...], examples: Any) -> list[tuple[str, tuple[Any, ...]] | None]:
    return [("aten.select.int", (args[0], args[1], position)) for position in range(len(examples))]


def _max_pool(args: tuple[Any, ...], examples: Any) -> list[tuple[str, tuple[Any, ...]] | None]:
    return [("aten.max_pool2d.default", args), None]


def _layer_norm(args: tuple[Any, ...], examples: Any) -> list[tuple[str, tuple[Any, ...]] | None]:
    return [("aten.layer_norm.default", (*args, True)), *[None] * (len(examples) - 1)]


# Calls with several results, as calls with one: (target, args) per result, None for a result that is never used.
_SEVERAL: dict[str, Callable[[tuple[Any, ...], Any], list[tuple[str, tuple[Any, ...]] | None]]] = {
    "aten._native_batch_norm_legit_no_training.default": _batch_norm,
    "aten.native_layer_norm.default": _layer_norm,
    "aten.max_pool2d_with_indices.default": _max_pool,
    "aten.split.Tensor": _split,
    "aten.split_with_sizes.default": _split,
    "aten.chunk.default": _split,
    "aten.unbind.int": _unbind,
}
