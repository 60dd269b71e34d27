"""Making an exported graph functional without tracing it again.

torch.export records in-place operators as the model has them. `ExportedProgram.run_decompositions({})` removes them and
takes composite views apart, for which it traces the whole program twice more: two thirds of what capturing takes. In
most networks an in-place operator writes over a tensor whose memory nothing else shares; there its out-of-place form,
read by all that come later, is the same function, and a walk over the graph tells.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram, default_decompositions
from torch.fx.node import map_aggregate

from chanopt.codegen.torch_names import (
    OpOverload,
    PyTreeCodeGen,
    is_composite,
    is_kept,
    is_mutable,
    parameters,
    pytree_info,
    results,
)


def _operators(names: str) -> frozenset[str]:
    return frozenset(f"aten.{name}" if "." in name else f"aten.{name}.default" for name in names.split())


_FRESH = _operators(
    """
    conv1d conv2d conv3d conv1d.padding conv2d.padding conv3d.padding conv_transpose1d conv_transpose2d.input
    conv_transpose3d.input linear matmul batch_norm instance_norm group_norm layer_norm max_pool1d max_pool2d max_pool3d
    avg_pool1d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d relu6 softmax.int log_softmax.int
    upsample_nearest1d.vec upsample_linear1d.vec upsample_nearest2d.vec upsample_bilinear2d.vec upsample_bicubic2d.vec
    upsample_nearest3d.vec upsample_trilinear3d.vec
    """
)
"""Composites that always answer memory of their own; of the others this is not known."""

_LOWERED = _operators("batch_norm flatten.using_ints reshape contiguous chunk to.dtype")
"""Composites that torch takes apart, as they may answer their operand's memory, and that lowering takes whole."""

_SAME = _operators("alias detach detach_")
"""Answer their operand, outside autograd."""

_CONVERSIONS = _operators("to.dtype type_as")
"""Answer their operand if it has the type already, else a copy."""

_DROPOUTS = _operators("dropout dropout_ feature_dropout feature_dropout_ alpha_dropout alpha_dropout_")
"""Answer their operand where `train`, their third argument, is off."""


def out_of_place(module: fx.GraphModule) -> fx.GraphModule | None:
    """The same function by a graph without in-place operators; None where a walk cannot tell that it is the same.

    Args:
        module: as exported, of ATen operators. It must not be used afterwards.
    """
    graph = module.graph
    for node in list(graph.nodes):
        if _is_idle(node, module):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    place = {node: number for number, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        if not isinstance(node.target, OpOverload):
            if not _is_plain(node):
                return None
            continue
        if is_mutable(node.target):
            if not _replace(node, place, module):
                return None
        elif is_composite(node.target) and not (is_kept(node.target) or str(node.target) in _LOWERED):
            return None
    module.graph = _named_anew(graph)
    return module


def retraced(exported: ExportedProgram) -> ExportedProgram:
    """The same by two more traces of torch's: an empty decomposition table functionalises and keeps composites whole.

    torch 2.13 takes what is answered by a composite that it keeps for new memory. `einsum` may answer its operand's, so
    it is taken apart where anything is written in place; and what does answer its operand is an alias for the time of
    the trace.
    """
    nodes, einsum = exported.graph.nodes, torch.ops.aten.einsum.default
    writes = any(isinstance(node.target, OpOverload) and is_mutable(node.target) for node in nodes)
    table: dict[Any, Any] = {einsum: default_decompositions()[einsum]} if writes else {}
    idle = [(node, node.target, node.args) for node in nodes if _is_idle(node, exported.graph_module)]
    try:
        for node, _, (operand, *_) in idle:
            node.target, node.args = torch.ops.aten.alias.default, (operand,)
        return exported.run_decompositions(table)
    finally:
        for node, target, args in idle:
            node.target, node.args = target, args


def _is_idle(node: fx.Node, module: fx.GraphModule) -> bool:
    """Whether a call answers its operand: outside autograd, or off, or as a conversion to the type that this has."""
    name = str(node.target)
    if name not in _CONVERSIONS:
        return name in _SAME or (name in _DROPOUTS and node.args[2:] == (False,))
    if len(node.args) > 2 or node.kwargs:
        return False
    given: list[Any] = [_example(arg, module) if isinstance(arg, fx.Node) else arg for arg in node.args]
    operand, wanted = given
    return _type(operand) == (_type(wanted) if isinstance(wanted, Tensor) else (wanted, operand.device, operand.layout))


def _type(tensor: Any) -> tuple[Any, ...]:
    return tensor.dtype, tensor.device, tensor.layout


def _is_plain(node: fx.Node) -> bool:
    """Whether a call that is no operator takes one of several results, or computes with sizes."""
    sizes = torch.SymInt | torch.SymBool | torch.SymFloat | int | float
    return node.op == "call_function" and (node.target is operator.getitem or isinstance(node.meta.get("val"), sizes))


def _replace(node: fx.Node, place: dict[fx.Node, int], module: fx.GraphModule) -> bool:
    """Put the out-of-place form in the place of an in-place operator; False, and nothing done, if that may differ."""
    written, form = node.args[0], _form(node.target)
    if form is None or not isinstance(written, fx.Node) or not _is_own(written, node):
        return False
    if not _answers_the_same(form, node, module):
        return False
    with node.graph.inserting_before(node):
        made = node.graph.call_function(form, node.args, node.kwargs)
    made.meta = node.meta
    place[made] = place[node]
    node.replace_all_uses_with(made)
    written.replace_all_uses_with(made, delete_user_cb=lambda user: place[user] > place[made])
    node.graph.erase_node(node)
    return True


def _form(target: Any) -> OpOverload | None:
    """``aten.relu.default`` for ``aten.relu_.default``; None if there is none with the same parameters."""
    namespace, name, overload = str(target).split(".")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    form = getattr(packet, overload, None)
    if not name.endswith("_") or not isinstance(form, OpOverload) or is_mutable(form) or not is_kept(form):
        return None
    first, *others = parameters(target)
    if not first.is_write or any(other.is_write for other in others) or len(results(target)) != 1:
        return None
    return form if [p.name for p in parameters(form)][1:] == [other.name for other in others] else None


def _is_own(tensor: fx.Node, writer: fx.Node) -> bool:
    """Whether only `writer`, and what reads the tensor itself, can see what is written into it.

    Its memory is made by the operator that answers it, or is that of such a tensor that nothing else reads; and
    nothing else that reads it may answer its memory.
    """
    if any(_may_share(user) for user in tensor.users if user is not writer and user.op != "output"):
        return False
    if tensor.op != "call_function" or not isinstance(tensor.target, OpOverload):
        return False
    if not _may_share(tensor):
        return True
    operands = [node for node in tensor.all_input_nodes if isinstance(node.meta.get("val"), Tensor)]
    return len(operands) == 1 and len(operands[0].users) == 1 and _is_own(operands[0], tensor)


def _may_share(node: fx.Node) -> bool:
    """Whether a call may answer memory of its operands."""
    if not isinstance(node.target, OpOverload):
        return True
    if is_composite(node.target):
        return str(node.target) not in _FRESH
    return any(result.alias_info is not None for result in results(node.target))


def _answers_the_same(form: OpOverload, node: fx.Node, module: fx.GraphModule) -> bool:
    """Whether the result has the size and type of what is written over: additions promote, comparisons are bool."""

    def like(arg: Any) -> Any:
        if isinstance(arg, fx.Node):
            arg = _example(arg, module)
        if isinstance(arg, Tensor):
            return torch.empty(tuple(map(like, arg.shape)), dtype=arg.dtype, device="meta")
        return arg.node.hint if isinstance(arg, torch.SymInt | torch.SymFloat) else arg

    try:
        made = form(*map_aggregate(node.args, like), **map_aggregate(node.kwargs, like))
    # An operator without a kernel for shapes alone, a size that depends on data: the walk cannot tell.
    except Exception:  # noqa: BLE001
        return False
    wanted = like(node.args[0])
    return isinstance(made, Tensor) and (made.shape, made.dtype) == (wanted.shape, wanted.dtype)


def _example(node: fx.Node, module: fx.GraphModule) -> Any:
    """What a node answered when it was traced."""
    return operator.attrgetter(str(node.target))(module) if node.op == "get_attr" else node.meta["val"]


def _named_anew(graph: fx.Graph) -> fx.Graph:
    """The graph with its calls named by their operators, in order, as a trace names them."""
    made, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in graph.nodes:
        name = node.name
        if isinstance(node.target, OpOverload) and not isinstance(node.meta.get("val"), torch.SymInt):
            name = str(node.target).split(".")[1]
        args, kwargs = (fx.map_arg(given, copies.__getitem__) for given in (node.args, node.kwargs))
        copies[node] = made.create_node(node.op, node.target, args, kwargs, name, node.type)
        copies[node].meta = node.meta
    made.set_codegen(PyTreeCodeGen(pytree_info(graph)))
    return made
