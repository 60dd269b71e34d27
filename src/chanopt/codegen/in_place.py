"""Let activations and adds write over operands that nobody else reads: less memory touched, the same values.

Only where autograd allows it: the operand is fresh from an op whose backward does not need its own result.
"""

from __future__ import annotations

import torch
from torch import fx

aten = torch.ops.aten

_FRESH = frozenset(
    {
        *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.linear.default),
        *(aten.conv2d.padding, aten.conv_transpose2d.input, aten.batch_norm.default, aten.cat.default),
        *(aten.add.Tensor, aten.add_.Tensor, aten.addmm.default),
    }
)
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
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in _UNARY and _is_own(node.args[0], node) and _is_invertible(node):
            node.target = _UNARY[node.target]
        elif node.target is aten.add.Tensor and not node.kwargs:
            _add(node, shapes)


def _add(node: fx.Node, shapes: dict[fx.Node, tuple[tuple[int | str, ...], str]]) -> None:
    left, right = node.args
    for operand, other in ((left, right), (right, left)):
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
