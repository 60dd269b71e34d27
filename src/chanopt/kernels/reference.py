"""What the gathered convs mean, in ATen operators: the CPU implementation, the fallback, and the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.nn import functional as F

from chanopt.kernels.call import Call

aten = torch.ops.aten

_FORWARD = {
    "none": lambda v: v,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
}
# (gradient of the result, input of the activation) to the gradient of the input.
_BACKWARD = {
    "none": lambda g, v: g,
    "relu": lambda g, v: aten.threshold_backward(g, v, 0),
    "relu6": lambda g, v: aten.hardtanh_backward(g, v, 0.0, 6.0),
    "silu": lambda g, v: aten.silu_backward(g, v),
    "hardswish": lambda g, v: aten.hardswish_backward(g, v),
    "sigmoid": lambda g, v: aten.sigmoid_backward(g, torch.sigmoid(v)),
}


def reference(call: Call) -> Tensor:
    """The result, in the dtype of `x`.

    Half-precision networks round between the steps as eager PyTorch does; the prologue is done in float32.
    """
    return as_promised(call, activated(_linear(call, _prologue(call)), call.act))


def as_promised(call: Call, result: Tensor) -> Tensor:
    """The result with the strides that the fake kernel promises; ambiguous shapes have several contiguous strides."""
    if result.stride() == strides(result.shape, call.memory_format):
        return result
    out = torch.empty(result.shape, dtype=result.dtype, device=result.device, memory_format=call.memory_format)
    return out.copy_(result)


def strides(shape: Sequence[int], memory_format: torch.memory_format) -> tuple[int, int, int, int]:
    """The strides of a fresh tensor of this shape."""
    _, c, h, w = shape
    if memory_format == torch.channels_last:
        return h * w * c, 1, w * c, c
    return c * h * w, h * w, w, 1


def reference_out(call: Call, out: Tensor, accumulate: bool) -> None:
    """Write the result into `out`, or, if `accumulate`, into it what it holds as a residual."""
    out.copy_(reference(replace(call, residual=out) if accumulate else call))


def channels(groups: Tensor, group: int) -> Tensor:
    """(K,) the channels of `x` that are gathered."""
    if group == 1:
        return groups
    return (groups.unsqueeze(1) * group + torch.arange(group, device=groups.device, dtype=groups.dtype)).reshape(-1)


def gather(x: Tensor, index: Tensor) -> Tensor:
    """x[:, index] in the memory format of `x`; `index_select` alone always answers in NCHW."""
    if suggest_memory_format(x) == torch.channels_last:
        return x.permute(0, 2, 3, 1).index_select(3, index).permute(0, 3, 1, 2)
    return x.index_select(1, index)


def backward(call: Call, grad: Tensor, needs: dict[str, bool]) -> dict[str, Tensor | None]:
    """Gradients of the tensors of a call.

    Args:
        call: the call as it was made; what lies between is computed again.
        grad: the gradient of its result.
        needs: which of x, weight, bias, scale, shift, residual want one.
    """
    made: dict[str, Tensor | None] = {}
    taken = gather(call.x, channels(call.groups, call.group))
    affine = _affine(call, taken)
    operand = activated(affine, call.pre_act).to(call.x.dtype)
    if call.act != "none":
        grad = _BACKWARD[call.act](grad, _linear(call, operand))
    if needs["residual"] and call.residual is not None:
        made["residual"] = grad.to(call.residual.dtype)
    if needs["bias"] and call.bias is not None:
        made["bias"] = grad.sum((0, 2, 3)).to(call.bias.dtype)
    upstream = needs["x"] or needs["scale"] or needs["shift"]
    d_operand, made["weight"] = _conv_backward(call, grad, operand, upstream, needs["weight"])
    if d_operand is not None:
        made |= _prologue_backward(call, d_operand, taken, affine, needs)
    return made


def _affine(call: Call, taken: Tensor) -> Tensor:
    """The prologue before its activation, in float32 at least; the gathered channels as they are if there is none."""
    if call.scale is None or call.shift is None:
        return taken
    wide = torch.promote_types(torch.float32, taken.dtype)
    return taken.to(wide) * _per_channel(call.scale.to(wide)) + _per_channel(call.shift.to(wide))


def _prologue(call: Call) -> Tensor:
    taken = gather(call.x, channels(call.groups, call.group))
    return activated(_affine(call, taken), call.pre_act).to(call.x.dtype)


def _linear(call: Call, operand: Tensor) -> Tensor:
    """The conv with its bias, and the residual."""
    bias = None if call.bias is None else call.bias.to(operand.dtype)
    count = call.gathered if call.depthwise else 1
    made = F.conv2d(operand, call.weight, bias, call.stride, call.padding, call.dilation, count)
    return made if call.residual is None else made + call.residual.to(made.dtype)


def activated(v: Tensor, act: str) -> Tensor:
    """An activation by its name."""
    return _FORWARD[act](v)


def _per_channel(v: Tensor) -> Tensor:
    return v.reshape(-1, 1, 1)


def _conv_backward(
    call: Call, grad: Tensor, operand: Tensor, of_operand: bool, of_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    if not (of_operand or of_weight):
        return None, None
    count = call.gathered if call.depthwise else 1
    d_operand, d_weight, _ = aten.convolution_backward(
        grad,
        operand,
        call.weight,
        None,
        list(call.stride),
        list(call.padding),
        list(call.dilation),
        False,
        [0, 0],
        count,
        [of_operand, of_weight, False],
    )
    return d_operand, d_weight


def _prologue_backward(
    call: Call, grad: Tensor, taken: Tensor, affine: Tensor, needs: dict[str, bool]
) -> dict[str, Any]:
    grad = _BACKWARD[call.pre_act](grad.to(affine.dtype), affine)
    made: dict[str, Any] = {}
    if call.scale is not None and call.shift is not None:
        if needs["scale"]:
            made["scale"] = (grad * taken.to(grad.dtype)).sum((0, 2, 3)).to(call.scale.dtype)
        if needs["shift"]:
            made["shift"] = grad.sum((0, 2, 3)).to(call.shift.dtype)
        grad = grad * _per_channel(call.scale.to(grad.dtype))
    if needs["x"]:
        zeros = torch.zeros_like(call.x)
        made["x"] = zeros.index_add(1, channels(call.groups, call.group), grad.to(call.x.dtype))
    return made
