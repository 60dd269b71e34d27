"""How a program becomes a ``torch.fx.GraphModule``: op by op, with the channels physically cut."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from chanopt.codegen.in_place import write_in_place
from chanopt.codegen.module import ChanoptModule
from chanopt.codegen.operators import real_args, resolve
from chanopt.codegen.torch_names import OpOverload, PyTreeCodeGen, PyTreeInfo
from chanopt.ir import (
    Beside,
    Form,
    Fusing,
    How,
    IndexMap,
    Kind,
    Marker,
    Op,
    Param,
    PhysicalRead,
    Program,
    Read,
    physical_read,
    physical_reads,
)
from chanopt.ir.edit import is_frozen
from chanopt.kernels import GROUP, Packed, pack

aten = torch.ops.aten


def emit(program: Program) -> fx.GraphModule:
    """Build a GraphModule of ordinary ATen ops, with the channels cut and parameters under their names."""
    return _Emitter(program).module()


class _Emitter:
    """One emission: a graph being built, its parameters, and the reads already made."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.nodes: dict[str, fx.Node] = {}
        self.made: dict[tuple[str, IndexMap], fx.Node] = {}
        self.names: dict[str, list[tuple[Any, str]]] = {}
        self.given: set[str] = set()
        self.named = {param.name for op in program.ops for param in op.params}
        self.owners = {name[: dot.start()] for name in self.named for dot in re.finditer(r"\.", name)}
        """Names of modules: a tensor of that name would stand in their way."""
        self.shapes: dict[fx.Node, tuple[tuple[int | str, ...], str]] = {}
        self.ends: dict[str, Op] = {}
        """By the last op that its kernel does, a conv whose kernel does more after it."""

    @cached_property
    def fusing(self) -> Fusing:
        """What stands beside fused convs."""
        return Fusing(self.program)

    def module(self) -> fx.GraphModule:
        interface = self.program.interface
        info = PyTreeInfo(
            list(interface.arguments),
            pytree.treespec_loads(interface.inputs),
            pytree.treespec_loads(interface.outputs),
        )
        for op in self.program.ops:
            self.op(op)
        write_in_place(self.graph, self.shapes)
        self.guard_batch()
        self.graph.set_codegen(PyTreeCodeGen(info))
        module = ChanoptModule(self.root, self.graph, class_name="ChanoptModule")
        module.graph.lint()
        return module.eval()

    def guard_batch(self) -> None:
        """A graph of one batch size takes no other: what it computes would be something else, without a word."""
        sources = [self.program.values[op.result] for op in self.program.ops if op.kind is Kind.SOURCE]
        if any(isinstance(size, str) for value in sources for size in value.shape):
            return
        batch = self.program.batch
        last = next(reversed(self.graph.find_nodes(op="placeholder")), None)
        if last is None:
            return
        with self.graph.inserting_before(last.next):
            for value in sources:
                if len(value.shape) < 2 or value.shape[0] != batch:
                    continue
                size = self.graph.call_function(aten.sym_size.int, (self.nodes[value.name], 0))
                same = self.graph.call_function(operator.eq, (size, batch))
                told = f"expected a batch of {batch}: the model was captured with this one, its code fixes the size"
                self.graph.call_function(torch._assert, (same, told))  # pyright: ignore[reportPrivateUsage]

    def op(self, op: Op) -> None:
        if op.kind is Kind.SOURCE:
            self.nodes[op.result] = self.graph.placeholder(str(op.args[0]))
        elif op.kind is Kind.SINK:
            self.graph.output(self.outputs(op))
        elif op.target == "alias":
            self.nodes[op.result] = self.operand(op, op.reads[0])
        elif op.kind is Kind.CONCAT:
            self.nodes[op.result] = self.concat(op)
        elif op.how is How.INLINED:
            if op.result in self.ends:
                conv = self.ends[op.result]
                self.nodes[op.result] = self.seen(conv, self.fused(conv))
        elif op.how is How.FUSED and (after := self.fusing.inlined(op).after):
            self.ends[after[-1].result] = op
        elif op.how is not How.OWN:
            self.nodes[op.result] = self.seen(op, _WAYS[op.how](self, op))
        else:
            self.nodes[op.result] = self.call(op)

    def outputs(self, op: Op) -> tuple[Any, ...]:
        """What the module returns: the caller may write over it.

        So what lies in the memory of a weight, of an input or of another output is copied: a weight may have been
        folded from what was computed at every call, and on the way here the user's own copies were dropped.
        """
        made: list[Any] = []
        for arg in op.args:
            node = self.arg(op, arg, {})
            if self.is_tensor(arg) and (_memory_of(node).op in ("get_attr", "placeholder") or node in made):
                node = self.graph.call_function(aten.clone.default, (node,))
            made.append(node)
        return tuple(made)

    def is_tensor(self, arg: Any) -> bool:
        """Whether an argument is one at run time, and no size, number or constant of the example call."""
        if isinstance(arg, Read):
            return self.program.values[arg.value].dtype not in ("int", "object")
        return isinstance(arg, Param)

    def call(self, op: Op) -> fx.Node:
        reads = {id(read): self.operand(op, read) for read in op.reads}
        args, kwargs = real_args(op, lambda arg: self.arg(op, arg, reads))
        node = self.graph.create_node("call_function", resolve(op.target), tuple(args), kwargs, op.result)
        return self.seen(op, node)

    def seen(self, op: Op, node: fx.Node) -> fx.Node:
        """Note what a node stands for."""
        node.meta["chanopt"] = {"layer": op.layer, "source": op.source}
        value = self.program.values[op.result]
        sizes = [len(value.layout) if value.layout and axis == value.axis else s for axis, s in enumerate(value.shape)]
        self.shapes[node] = (tuple(sizes), value.dtype)
        return node

    # -- a 1x1 conv as a matrix product, and a conv that gathers while it loads ------------------------------------

    def product(self, op: Op) -> fx.Node:
        """A 1x1 conv, channels last, over all pixels at once: ATen's would copy what is not contiguous."""
        weight, bias = self.weights(op)
        rows = self.rows(self.operand(op, op.reads[0]))
        return self.image(self.graph.call_function(aten.linear.default, (rows, weight, bias)), op)

    def by_runs(self, op: Op) -> fx.Node:
        """A 1x1 conv, channels last, as the sum of one product for each range of channels."""
        read, (weight, bias) = op.reads[0], self.weights(op)
        rows, made, column = self.rows(self.nodes[read.value]), None, 0
        for start, stop in physical_read(op, read, self.program).positions.runs():
            taken = self.graph.call_function(aten.slice.Tensor, (rows, 1, start, stop))
            part = self.graph.call_function(aten.slice.Tensor, (weight, 1, column, column + stop - start))
            column += stop - start
            if made is None:
                made = self.graph.call_function(aten.linear.default, (taken, part, bias))
            else:
                turned = self.graph.call_function(aten.t.default, (part,))
                made = self.graph.call_function(aten.addmm.default, (made, taken, turned))
        assert made is not None  # something is read
        return self.image(made, op)

    def fused(self, op: Op) -> fx.Node:
        """A conv that gathers whole groups of channels while it loads; zero columns fill the groups up.

        With it what its kernel does besides: the node stands for the last of those ops.
        """
        beside, weight, bias = self.fusing.inlined(op), op.args[1], op.args[2]
        value, positions, channels = self.fusing.gathered(op, beside.before)
        scale = shift = None
        if beside.before:
            scale, shift = self.scales(beside.before[0], channels)
        tensor, key = self.cut(op, weight)
        columns = len(self.program.values[value].live)
        packed = pack(positions.tolist(), tensor, columns, group=GROUP, scale=scale, shift=shift)
        wide = self.register(weight.name, packed.weight, buffer=weight.buffer, key=(key, positions))
        groups = self.add(f"{value}_groups", packed.groups, buffer=True, key=(positions, GROUP))
        operands = (self.nodes[value], wide, None if bias is None else self.param(op, bias), groups, GROUP)
        window = self.program.known_dialect.window(op, self.program)
        assert window is not None  # a conv
        sizes = [list(window.stride), list(window.padding), list(window.dilation)]
        more = self.besides(op, beside, packed) if beside.ops else ()
        name = beside.after[-1].result if beside.after else op.result
        call = torch.ops.chanopt.gather_conv2d.default
        return self.graph.create_node("call_function", call, (*operands, *sizes, *more), {}, name)

    def scales(self, op: Op, channels: IndexMap) -> list[torch.Tensor]:
        """(scale, shift) of channels of an affine op, in float64."""
        made = self.program.known_dialect.affine(op, self.program)
        assert made is not None  # ``Fusing`` has asked
        return [torch.from_numpy(numbers[channels.array]) for numbers in made]

    def besides(self, op: Op, beside: Beside, packed: Packed) -> tuple[Any, ...]:
        """The last arguments of a fused conv: scale, shift, pre_act, residual, act."""
        dialect, scale, shift, residual = self.program.known_dialect, None, None, None
        if packed.scale is not None and packed.shift is not None:
            name = beside.before[0].result
            scale = self.add(f"{name}_scale", packed.scale, buffer=False, key=op.result)
            shift = self.add(f"{name}_shift", packed.shift, buffer=False, key=op.result)
        for after in beside.after:
            if dialect.is_sum(after):
                other = next(read for read in after.reads if read.value != op.result)
                residual = self.operand(after, other)
        acts = [dialect.activation(ops[-1]) if ops else "" for ops in (beside.before, beside.after)]
        return scale, shift, acts[0] or "none", residual, acts[1] or "none"

    def weights(self, op: Op) -> tuple[fx.Node, fx.Node | None]:
        """The weight of a 1x1 conv as a matrix, and its bias."""
        matrix = self.graph.call_function(aten.flatten.using_ints, (self.param(op, op.args[1]), 1))
        return matrix, None if op.args[2] is None else self.param(op, op.args[2])

    def rows(self, image: fx.Node) -> fx.Node:
        """Pixels of all images by channels, of an image that lies channels last: a view."""
        last = self.graph.call_function(aten.permute.default, (image, [0, 2, 3, 1]))
        return self.graph.call_function(aten.flatten.using_ints, (last, 0, 2))

    def image(self, rows: fx.Node, op: Op) -> fx.Node:
        """What :meth:`rows` did, undone, for the result of an op on as many pixels as it reads."""
        value = op.reads[0].value
        sizes = [-1, self.size(value, 2), self.size(value, 3)]
        last = self.graph.call_function(aten.unflatten.int, (rows, 0, sizes))
        return self.graph.create_node("call_function", aten.permute.default, (last, [0, 3, 1, 2]), {}, op.result)

    def concat(self, op: Op) -> fx.Node:
        pieces = [self.take(read.value, physical) for read, physical in physical_reads(op, self.program)]
        if len(pieces) == 1:
            return pieces[0]
        return self.graph.create_node("call_function", aten.cat.default, (pieces, op.args[1]), {}, op.result)

    def operand(self, op: Op, read: Read) -> fx.Node:
        if self.program.values[read.value].layout is None:
            return self.nodes[read.value]
        return self.take(read.value, physical_read(op, read, self.program))

    def take(self, value: str, physical: PhysicalRead) -> fx.Node:
        """The node that holds the positions read; one read of the same positions serves all."""
        key = (value, physical.positions)
        if physical.form is Form.WHOLE:
            return self.nodes[value]
        if key not in self.made:
            self.made[key] = (
                self.range(value, physical) if physical.form is Form.RANGE else self.gather(value, physical)
            )
        return self.made[key]

    def range(self, value: str, physical: PhysicalRead) -> fx.Node:
        start, stop = physical.positions.runs()[0]
        return self.graph.call_function(aten.slice.Tensor, (self.nodes[value], self.axis(value), start, stop))

    def gather(self, value: str, physical: PhysicalRead) -> fx.Node:
        name = f"{value}_channels"
        index = self.add(name, torch.from_numpy(physical.positions.array.copy()), buffer=True, key=physical.positions)
        node, axis, rank = self.nodes[value], self.axis(value), len(self.program.values[value].shape)
        if self.program.channels_last and rank == 4 and axis == 1:
            last = self.graph.call_function(aten.permute.default, (node, [0, 2, 3, 1]))
            sizes = [self.size(value, 2), self.size(value, 3)]
            return self.graph.call_function(aten.permute.default, (self.pick(last, sizes, index), [0, 3, 1, 2]))
        if rank > 2 and axis == rank - 1:
            return self.pick(node, [self.size(value, other) for other in range(1, axis)], index)
        return self.graph.call_function(aten.index_select.default, (node, axis, index))

    def pick(self, node: fx.Node, sizes: list[fx.Node], index: fx.Node) -> fx.Node:
        """Channels of a tensor that has them on its last axis, behind the batch and the given sizes.

        On a CPU index_select on the last of two axes is as fast as a copy, and on the last of more many times slower
        (benchmarks/reads.py).
        """
        rows = self.graph.call_function(aten.flatten.using_ints, (node, 0, len(sizes)))
        taken = self.graph.call_function(aten.index_select.default, (rows, 1, index))
        return self.graph.call_function(aten.unflatten.int, (taken, 0, [-1, *sizes]))

    def size(self, value: str, axis: int) -> fx.Node:
        """A size of a value, at run time: a fully convolutional model takes images of other sizes."""
        return self.graph.call_function(aten.sym_size.int, (self.nodes[value], axis))

    def axis(self, value: str) -> int:
        axis = self.program.values[value].axis
        assert axis is not None  # only channelled values are cut
        return axis

    def arg(self, op: Op, arg: Any, reads: Mapping[int, fx.Node]) -> Any:
        if isinstance(arg, Read):
            return reads[id(arg)] if id(arg) in reads else self.operand(op, arg)
        if isinstance(arg, Param):
            return self.param(op, arg)
        if arg is Marker.CHANNELS:
            return len(self.program.values[op.result].live)
        if arg is Marker.GROUPS:
            return self.groups(op)
        return arg

    def groups(self, op: Op) -> int:
        result = self.program.values[op.result].live
        if op.kind is Kind.MAP:
            return len(result) // op.block
        return len(np.unique(result.live.array * op.groups // result.channels))

    def param(self, op: Op, param: Param) -> fx.Node:
        tensor, key = self.cut(op, param)
        return self.register(param.name, tensor, buffer=param.buffer, key=key)

    def cut(self, op: Op, param: Param) -> tuple[torch.Tensor, Any]:
        """A parameter as an op takes it, and what tells it from others of the same tensor."""
        rows = self.program.values[op.result].live.live if param.out is not None else None
        columns = None
        if param.inn is not None:
            columns = physical_read(op, op.reads[0], self.program).channels
        tensor = cut(self.program.weights[param.name], param, rows, columns, op, self.program)
        return tensor, (param.out, param.inn, rows, columns, op.groups if columns is not None else 1)

    def add(self, name: str, tensor: torch.Tensor, *, buffer: bool, key: Any) -> fx.Node:
        """Register a tensor that the user knows nothing of: no name of theirs is taken."""
        while name in self.named or name in self.owners:
            name += "_"
        return self.register(name, tensor, buffer=buffer, key=key)

    def register(self, name: str, tensor: torch.Tensor, *, buffer: bool, key: Any) -> fx.Node:
        """Register a tensor under its name; a second cut of the same tensor gets a name of its own."""
        known = self.names.setdefault(name, [])
        for other, full in known:
            if other == key:
                return self.graph.get_attr(full)
        count, full = len(known), f"{name}_{len(known)}" if known else name
        while full in self.given or full in self.owners or (full in self.named and full != name):
            count, full = count + 1, f"{name}_{count + 1}"
        known.append((key, full))
        self.given.add(full)
        owner = self.root
        *path, leaf = full.split(".")
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        if buffer or not tensor.is_floating_point():
            owner.register_buffer(leaf, tensor)
        else:
            frozen = is_frozen(self.program.weights.get(name))
            owner.register_parameter(leaf, nn.Parameter(tensor, requires_grad=not frozen))
        return self.graph.get_attr(full)


def _memory_of(node: fx.Node) -> fx.Node:
    """The node in whose memory a node's result lies, or may lie (``reshape``): views are followed back."""
    while isinstance(node.target, OpOverload):
        returns = node.target._schema.returns  # pyright: ignore[reportPrivateUsage]
        if not returns or returns[0].alias_info is None or not isinstance(node.args[0], fx.Node):
            break
        node = node.args[0]
    return node


_WAYS: dict[How, Callable[[_Emitter, Op], fx.Node]] = {
    How.PRODUCT: _Emitter.product,
    How.RUNS: _Emitter.by_runs,
    How.FUSED: _Emitter.fused,
}
"""How the ways of computing a conv are emitted."""


def cut(
    tensor: torch.Tensor,
    param: Param,
    rows: IndexMap | None,
    columns: IndexMap | None,
    op: Op,
    program: Program,
) -> torch.Tensor:
    """A parameter cut to the result channels and the operand channels that are left, in physical order; a copy."""
    last = tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if last else torch.contiguous_format
    if rows is not None and param.out is not None and not rows.is_identity(tensor.shape[param.out]):
        tensor = tensor.index_select(param.out, torch.from_numpy(rows.array.copy()))
    if columns is not None and param.inn is not None and op.kind is Kind.GROUPED and rows is not None:
        tensor = _cut_grouped(tensor, rows, columns, op, program)
    elif columns is not None and param.inn is not None and not columns.is_identity(tensor.shape[param.inn]):
        tensor = tensor.index_select(param.inn, torch.from_numpy(columns.array.copy()))
    return tensor.detach().clone(memory_format=memory_format)


def _cut_grouped(tensor: torch.Tensor, rows: IndexMap, columns: IndexMap, op: Op, program: Program) -> torch.Tensor:
    """Rows already cut: give each row the columns of its own group that are read."""
    width = program.values[op.reads[0].value].live.channels // op.groups
    height = program.values[op.result].live.channels // op.groups
    per_group: dict[int, list[int]] = {}
    for channel in columns:
        per_group.setdefault(channel // width, []).append(channel % width)
    taken = np.array([per_group[row // height] for row in rows], dtype=np.int64)
    index = torch.from_numpy(taken).reshape(*taken.shape, *[1] * (tensor.ndim - 2))
    return tensor.gather(1, index.expand(*taken.shape, *tensor.shape[2:]))
