"""Let activations and adds write over operands that nobody else reads: less memory touched, the same values.

Only where autograd allows it: the operand is fresh from an op whose backward does not need its own result.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet

import torch
from torch import fx

import chanopt.kernels  # noqa: F401  # pyright: ignore[reportUnusedImport]
from chanopt.codegen.torch_names import OpOverload

aten = torch.ops.aten

_FRESH = frozenset(
    {
        *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.linear.default),
        *(aten.conv2d.padding, aten.conv_transpose2d.input, aten.batch_norm.default, aten.cat.default),
        *(aten.add.Tensor, aten.add_.Tensor, aten.addmm.default),
    }
)
_NARROWED = frozenset(
    {
        *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.linear.default, aten.addmm.default),
        *(aten.conv2d.padding, aten.conv_transpose2d.input, aten.matmul.default, aten.bmm.default),
        torch.ops.chanopt.gather_conv2d.default,
    }
)
_WIDENED = frozenset(
    {aten.softmax.int, aten.log_softmax.int, aten.layer_norm.default, aten.group_norm.default, aten.pow.Tensor_Scalar}
    | {aten.exp.default, aten.log.default, aten.rsqrt.default, aten.sum.dim_IntList, aten.cumsum.default}
)
"""Operators that autocast computes in float32, on one device or another."""
_VIEWS = frozenset({aten.permute.default, aten.unflatten.int})
_UNARY = {
    aten.relu.default: aten.relu_.default,
    aten.silu.default: aten.silu_.default,
    aten.hardswish.default: aten.hardswish_.default,
    aten.hardsigmoid.default: aten.hardsigmoid_.default,
    aten.hardtanh.default: aten.hardtanh_.default,
    aten.leaky_relu.default: aten.leaky_relu_.default,
    aten.elu.default: aten.elu_.default,
    aten.sigmoid.default: aten.sigmoid_.default,
    aten.relu6.default: aten.relu6_.default,
}


def write_in_place(graph: fx.Graph, shapes: dict[fx.Node, tuple[tuple[int | str, ...], str]]) -> None:
    """Replace ops by their in-place forms where their operand is fresh and theirs alone.

    Args:
        graph: an emitted graph; changed.
        shapes: sizes and dtype of the nodes that stand for values: an add may only write over an operand of its own
            size and type.
    """
    narrowed = _narrowed(graph)
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in _UNARY and _is_own(node.args[0], node) and _is_invertible(node):
            node.target = _UNARY[node.target]
        elif node.target is aten.add.Tensor and not node.kwargs:
            _add(node, shapes, narrowed)


def _narrowed(graph: fx.Graph) -> set[fx.Node]:
    """What autocast makes narrower: convs and matrix products, and what is computed of these alone."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "call_function" and node.target not in _WIDENED:
            operands = [operand for operand in node.all_input_nodes if _is_computed(operand)]
            if node.target in _NARROWED or (operands and all(operand in found for operand in operands)):
                found.add(node)
    return found


def _is_computed(node: fx.Node) -> bool:
    """Whether a node is a tensor that depends on the inputs, and no parameter or size."""
    sizes = node.target is aten.sym_size.int or not isinstance(node.target, OpOverload)
    return node.op == "placeholder" or (node.op == "call_function" and not sizes)


def _add(
    node: fx.Node, shapes: dict[fx.Node, tuple[tuple[int | str, ...], str]], narrowed: AbstractSet[fx.Node]
) -> None:
    left, right = node.args
    for operand, other in ((left, right), (right, left)):
        if operand in narrowed and other not in narrowed:
            continue  # under autocast the sum is wider than this operand
        same = isinstance(operand, fx.Node) and operand in shapes and shapes[operand] == shapes.get(node)
        if same and isinstance(other, fx.Node) and other is not operand and _is_own(operand, node):
            node.target, node.args = aten.add_.Tensor, (operand, other)
            return


def _is_invertible(node: fx.Node) -> bool:
    """Whether autograd can undo the in-place form: leaky_relu_ and elu_ refuse negative slopes."""
    slopes = node.args[1:2] if node.target in (aten.leaky_relu.default, aten.elu.default) else ()
    return all(isinstance(slope, int | float) and slope >= 0 for slope in slopes)


def _is_own(operand: object, user: fx.Node) -> bool:
    if not isinstance(operand, fx.Node) or set(operand.users) != {user}:
        return False
    return operand.target in _FRESH or (operand.target in _VIEWS and _is_own(operand.args[0], operand))
