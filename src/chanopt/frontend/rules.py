"""The table of op rules: one entry per ATen operator, saying what it does to channels.

A rule takes the lowering and a :class:`~chanopt.frontend.lower.Call`, appends ops and returns the result, or a
:class:`~chanopt.frontend.lower.Refused` with the reason, which makes the call a barrier. To support a new operator,
add one line to ``RULES`` (docs/writing_passes.md, "Adding an op").
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from chanopt.codegen.operators import resolve
from chanopt.frontend.lower import Call, Const, Lowering, Moved, Refused, Rule, Scalar
from chanopt.frontend.rearrange import Rearranged, addresses, classify
from chanopt.ir import Access, Arg, IndexMap, Kind, Marker, Read, Value

Made = Value | Const | Moved | Refused


def flow(value: Value, index: IndexMap | None = None, fan: int = 1) -> Read:
    """A read through which channels flow; by default channel i to channel i."""
    return Read(value.name, Access.FLOW, IndexMap.identity(len(value.live)) if index is None else index, fan)


def take_all(value: Value) -> Read:
    """A read that consumes all channels, in whatever order they lie."""
    return Read(value.name, Access.SET, IndexMap.identity(value.live.channels))


# -- mixes ----------------------------------------------------------------------------------------------------------


def convolution(low: Lowering, call: Call) -> Made:
    """A conv of any dimension: a mix, a depthwise map, or a grouped mix."""
    x, weight, bias, stride, padding, dilation, groups = call.args
    if not isinstance(weight, Const):
        return Refused("its weight is computed at run time")
    spatial = weight.tensor.ndim - 2
    x = low.channels_along(x, len(call.shape) - spatial - 1)
    kernel = weight.tensor.shape[2:]
    border = any(size > 1 for size in kernel) if padding == "same" else padding != "valid" and any(padding)
    rest = (stride, padding, dilation)
    return _linear_in(low, call, x, weight, bias, groups, rest, border)


def _linear_in(
    low: Lowering,
    call: Call,
    x: Value,
    weight: Const,
    bias: Any,
    groups: int,
    rest: tuple[Any, ...],
    border: bool,
) -> Value:
    axis, channels = x.axis, x.live.channels
    out_bias = low.param(bias, 0) if isinstance(bias, Const) else None
    tail = tuple(low.literal(arg) for arg in rest)
    if groups == 1:
        args = (take_all(x), low.param(weight, 0, 1), out_bias, *tail, 1)
        return low.add(call, Kind.MIX, args, axis, linear=True, border=border)
    if groups == channels:
        multiplier = weight.tensor.shape[0] // channels
        index = IndexMap(np.repeat(np.arange(channels), multiplier))
        args = (flow(x, index), low.param(weight, 0), out_bias, *tail, Marker.GROUPS)
        return low.add(call, Kind.MAP, args, axis, linear=True, border=border, block=multiplier)
    args = (take_all(x), low.param(weight, 0, 1), out_bias, *tail, Marker.GROUPS)
    return low.add(call, Kind.GROUPED, args, axis, linear=True, border=border, groups=groups)


def transposed_convolution(low: Lowering, call: Call) -> Made:
    """A transposed conv: a mix, or a depthwise map; a pixel sees a varying number of taps, so constants do not fold."""
    x, weight, bias, stride, padding, output_padding, groups, dilation = call.args
    if not isinstance(weight, Const):
        return Refused("its weight is computed at run time")
    x = low.channels_along(x, len(call.shape) - weight.tensor.ndim + 1)
    out_bias = low.param(bias, 0) if isinstance(bias, Const) else None
    before = (low.literal(stride), low.literal(padding), low.literal(output_padding))
    if groups == 1:
        args = (take_all(x), low.param(weight, 1, 0), out_bias, *before, 1, low.literal(dilation))
        return low.add(call, Kind.MIX, args, x.axis, linear=True, border=True)
    if groups == x.live.channels and weight.tensor.shape[1] == 1:
        args = (flow(x), low.param(weight, 0), out_bias, *before, Marker.GROUPS, low.literal(dilation))
        return low.add(call, Kind.MAP, args, x.axis, linear=True, border=True)
    return Refused("transposed convs in groups that are not depthwise keep their channels")


def linear(low: Lowering, call: Call) -> Made:
    """A linear layer over the last axis."""
    x, weight, bias = call.args
    if not isinstance(weight, Const):
        return Refused("its weight is computed at run time")
    x = low.channels_along(x, len(low.tensor(x).shape) - 1)
    out_bias = low.param(bias, 0) if isinstance(bias, Const) else None
    args = (take_all(x), low.param(weight, 0, 1), out_bias)
    return low.add(call, Kind.MIX, args, len(call.shape) - 1, linear=True)


def product(low: Lowering, call: Call) -> Made:
    """``x @ W`` with a parameter W of two dimensions is a linear layer."""
    x, weight = call.args
    if not (isinstance(weight, Const) and weight.tensor.ndim == 2 and not isinstance(x, Const)):
        return Refused("a product of two activations reads whole rows")
    return linear(low, replace(call, target="aten.linear.default", args=(x, weight.transposed(), None)))


def bias_product(low: Lowering, call: Call) -> Made:
    """``bias + x @ W`` with parameters is a linear layer."""
    bias, x, weight = call.args
    plain = all(call.kwargs.get(name, 1) == 1 for name in ("alpha", "beta"))
    if not (isinstance(weight, Const) and isinstance(bias, Const) and bias.tensor.ndim == 1 and plain):
        return Refused("a product of two activations reads whole rows")
    return linear(low, replace(call, target="aten.linear.default", args=(x, weight.transposed(), bias), kwargs={}))


# -- maps and joins -------------------------------------------------------------------------------------------------


def pointwise(low: Lowering, call: Call) -> Made:
    """Element by element with broadcasting: a map of one channelled operand, a join of several."""
    operands = [low.tensor(arg) for arg in call.args if isinstance(arg, Value | Moved)]
    axis = _common_axis(operands, call.hint)
    if axis is None:
        return low.add(call, Kind.BARRIER, tuple(low.literal(arg) for arg in call.args), None)
    args = tuple(_broadcast(low, arg, axis, call.hint) for arg in call.args)
    flows = sum(isinstance(arg, Read) and arg.access is Access.FLOW for arg in args)
    return low.add(call, Kind.JOIN if flows > 1 else Kind.MAP, args, axis)


def _common_axis(operands: list[Value], shape: tuple[int, ...]) -> int | None:
    """The result axis along which the first channelled operand of full width has its channels."""
    for value in operands:
        if value.axis is None:
            continue
        axis = value.axis + len(shape) - len(value.shape)
        if value.live.channels == shape[axis]:
            return axis
    return None


def _broadcast(low: Lowering, arg: Any, axis: int, shape: tuple[int, ...]) -> Arg:
    if isinstance(arg, Const):
        dim = axis - (len(shape) - arg.tensor.ndim)
        along = dim >= 0 and arg.tensor.shape[dim] == shape[axis]
        return low.param(arg, dim if along else None)
    if not isinstance(arg, Value | Moved):
        return low.literal(arg)
    value = low.tensor(arg)
    dim = axis - (len(shape) - len(value.shape))
    if dim < 0 or (value.shape[dim] == 1 and shape[axis] != 1):
        return Read(value.name, Access.ALL)
    return flow(low.channels_along(value, dim))


def glu(low: Lowering, call: Call) -> Made:
    """A gated linear unit: half of the channels, times the sigmoid of the other half."""
    x, dim = call.args
    half = call.hint[dim]
    halves = [replace(call, target="aten.slice.Tensor", args=(x, dim, k * half, k * half + half, 1)) for k in (0, 1)]
    value, gate = (low.call(part) for part in halves)
    gate = low.call(replace(call, target="aten.sigmoid.default", args=(gate,)))
    return low.call(replace(call, target="aten.mul.Tensor", args=(value, gate)))


def prelu(low: Lowering, call: Call) -> Made:
    """PReLU: one slope per channel of axis 1, or one for all."""
    x, slope = call.args
    if not isinstance(slope, Const):
        return Refused("its slope is computed at run time")
    x = low.channels_along(x, min(1, len(call.shape) - 1))
    shared = slope.tensor.numel() == 1
    return low.add(call, Kind.MAP, (flow(x), low.param(slope, None if shared else 0)), x.axis)


def batch_norm(low: Lowering, call: Call) -> Made:
    """Batch norm with stored statistics: a map with four parameters per channel."""
    x, weight, bias, mean, variance, training, *rest = call.args
    if training or not isinstance(mean, Const):
        return Refused("batch statistics are computed at run time")
    x = low.channels_along(x, 1)
    params = tuple(low.param(p, 0) if isinstance(p, Const) else p for p in (weight, bias, mean, variance))
    # Exported without cuDNN (as a CPU build of torch has it) a norm is to use it on a GPU all the same.
    return low.add(call, Kind.MAP, (flow(x), *params, False, *rest[:2], True), 1)


def instance_norm(low: Lowering, call: Call) -> Made:
    """Instance norm: each channel has statistics of its own, so it is a map."""
    x, weight, bias, mean, variance, use_input_stats, *rest = call.args
    x = low.channels_along(x, 1)
    if not use_input_stats and isinstance(mean, Const):
        params = tuple(low.param(p, 0) if isinstance(p, Const) else p for p in (weight, bias, mean, variance))
        return low.add(call, Kind.MAP, (flow(x), *params, False, *rest), 1)
    params = tuple(low.param(p, 0) if isinstance(p, Const) else None for p in (weight, bias))
    return low.add(call, Kind.MAP, (flow(x), *params, None, None, True, *rest), 1)


def spatial(dims: int) -> Rule:
    """An op on the last ``dims`` axes of each channel alone: pools, resizes."""

    def rule(low: Lowering, call: Call) -> Made:
        x = low.channels_along(call.args[0], len(call.shape) - dims - 1)
        args = (flow(x), *(low.literal(arg) for arg in call.args[1:]))
        return low.add(call, Kind.MAP, args, x.axis, border=_averages_border(call))

    return rule


def _averages_border(call: Call) -> bool:
    """Whether an average pool has windows over the edge that it does not divide by the pixels they really hold."""
    if not call.target.startswith("aten.avg_pool"):
        return False
    padding, ceil_mode, count_padding, *divisor = call.args[3:]
    over_edge = bool(ceil_mode) or any(padding if isinstance(padding, list | tuple) else [padding])
    return over_edge and (bool(count_padding) or divisor not in ([], [None]))


def pad(low: Lowering, call: Call) -> Made:
    """Padding of spatial axes is a map; of the channel axis, a barrier."""
    x, amounts = low.tensor(call.args[0]), call.args[1]
    if x.axis is None:
        x = low.channels_along(x, _default_axis(len(call.shape)))
    assert x.axis is not None
    beyond = len(call.shape) - 1 - x.axis
    if any(amounts[2 * beyond : 2 * beyond + 2]):
        return Refused("it pads the channel axis")
    return low.add(call, Kind.MAP, (flow(x), *(low.literal(arg) for arg in call.args[1:])), x.axis)


def _default_axis(ndim: int) -> int:
    return 1 if ndim > 2 else ndim - 1


# -- statistics over channels -----------------------------------------------------------------------------------------


def group_norm(low: Lowering, call: Call) -> Made:
    """Group norm: statistics over the channels of a group, whose number may not change."""
    x, groups, weight, bias, *rest = call.args
    x = low.channels_along(x, 1)
    params = tuple(low.param(p, 0) if isinstance(p, Const) else p for p in (weight, bias))
    return low.add(call, Kind.STATISTIC, (flow(x), Marker.GROUPS, *params, *rest), 1, groups=groups)


def layer_norm(low: Lowering, call: Call) -> Made:
    """Layer norm: a statistic where the channel axis is among the normalised ones, else a map."""
    x, sizes, weight, bias, *rest = call.args
    x = low.tensor(x)
    if x.axis is None:
        x = low.channels_along(x, len(call.shape) - 1)
    assert x.axis is not None
    dim = x.axis - (len(call.shape) - len(sizes))
    params = tuple(low.param(p, dim if dim >= 0 else None) if isinstance(p, Const) else p for p in (weight, bias))
    kind = Kind.STATISTIC if dim >= 0 else Kind.MAP
    return low.add(call, kind, (flow(x), low.literal(sizes), *params, *rest), x.axis)


def along(dim_argument: int = 1) -> Rule:
    """An op along one axis, such as softmax: a statistic if that is the channel axis, else a map."""

    def rule(low: Lowering, call: Call) -> Made:
        x = low.tensor(call.args[0])
        dim = call.args[dim_argument] % len(call.shape)
        if x.axis is None:
            return low.barrier(call, None)
        kind = Kind.STATISTIC if dim == x.axis else Kind.MAP
        return low.add(call, kind, (flow(x), *(low.literal(arg) for arg in call.args[1:])), x.axis)

    return rule


def reduction(dim_argument: int, keepdim_argument: int | None) -> Rule:
    """A reduction: over spatial axes a map; over the channel axis it takes all channels in any order."""

    def rule(low: Lowering, call: Call) -> Made:
        x = low.tensor(call.args[0])
        if x.axis is None:
            return low.barrier(call, None)
        ndim = len(x.shape)
        given = call.args[dim_argument]
        dims = {d % ndim for d in ([given] if isinstance(given, int) else given or range(ndim))}
        rest = tuple(low.literal(arg) for arg in call.args[1:])
        if x.axis in dims:
            return low.add(call, Kind.STATISTIC, (take_all(x), *rest), None)
        kept = call.kwargs.get("keepdim", False) if keepdim_argument is None else call.args[keepdim_argument]
        axis = x.axis if kept else x.axis - sum(d < x.axis for d in dims)
        return low.add(call, Kind.MAP, (flow(x), *rest), axis)

    return rule


# -- concat and rearrangement -----------------------------------------------------------------------------------------


def concat(low: Lowering, call: Call) -> Made:
    """Concat along the channel axis: blocks side by side; along another axis: a join."""
    tensors, given = call.args
    if any(isinstance(t, Const) for t in tensors):
        return Refused("it concatenates a parameter")
    dim: int = given % len(call.shape)
    values = [low.tensor(t) for t in tensors if not _is_empty(t)]
    if len({value.dtype for value in values}) > 1:
        return Refused("it concatenates tensors of different types")
    axes = {value.axis for value in values} - {None}
    if dim not in axes and len(axes) == 1:
        axis = axes.pop()
        assert axis is not None
        reads = tuple(flow(low.channels_along(value, axis)) for value in values)
        return low.add(call, Kind.JOIN, (reads, dim), axis)
    values = [low.channels_along(value, dim) for value in values]
    widths = [value.live.channels for value in values]
    reads = tuple(
        flow(value, IndexMap(_placed(sum(widths[:position]), width, sum(widths))))
        for position, (value, width) in enumerate(zip(values, widths, strict=True))
    )
    return low.add(call, Kind.CONCAT, (reads, dim), dim)


def _placed(start: int, width: int, total: int) -> np.ndarray:
    index = np.full(total, IndexMap.ABSENT, dtype=np.int64)
    index[start : start + width] = np.arange(width)
    return index


def _is_empty(arg: Any) -> bool:
    return isinstance(arg, Value) and arg.shape == (0,)


def rearrangement(low: Lowering, call: Call) -> Made:
    """Any op that only moves elements: what it does to channels is read off element numbers (rearrange.py)."""
    operand, *rest = call.args
    if not isinstance(operand, Value | Moved):
        return Refused("an operand is not a tensor of the graph")
    base = operand.base if isinstance(operand, Moved) else operand
    if base.axis is None or base.layout is None:
        return low.add(call, Kind.BARRIER, (low.literal(operand), *(low.literal(arg) for arg in rest)), None)
    shape = tuple(low.size_hint(size) for size in base.shape)
    before = operand.numbers if isinstance(operand, Moved) else addresses(shape)
    numbers = resolve(call.target)(before, *(_plain(arg) for arg in rest), **call.kwargs).contiguous()
    calls = (*(operand.calls if isinstance(operand, Moved) else ()), call)
    allowed = [axis for axis, size in enumerate(call.shape) if isinstance(size, int)]
    found = classify(numbers, shape, base.axis, allowed)
    if found is None or not (found.pure or (len(calls) == 1 and _takes_all(found, base))):
        return Moved(base, calls, numbers)
    return _moved(low, call, base, found)


def squeeze(low: Lowering, call: Call) -> Made:
    """A rearrangement that names the axes it takes away: a channel axis that is cut down to one must stay."""
    operand, *rest = call.args
    if not isinstance(operand, Value | Moved):
        return rearrangement(low, call)
    sizes = operand.numbers.shape if isinstance(operand, Moved) else [low.size_hint(size) for size in operand.shape]
    given = rest[0] if rest else range(len(sizes))
    axes = {axis % max(1, len(sizes)) for axis in ([given] if isinstance(given, int) else given)}
    named = tuple(axis for axis, size in enumerate(sizes) if size == 1 and axis in axes)
    return rearrangement(low, replace(call, target="aten.squeeze.dims", args=(operand, named)))


def _takes_all(found: Rearranged, base: Value) -> bool:
    """Whether the op takes every channel in order, so that it means the same on fewer of them."""
    return IndexMap(found.index.array[:: found.block]).is_identity(base.live.channels)


def _moved(low: Lowering, call: Call, base: Value, found: Rearranged) -> Made:
    same = found.index.is_identity(base.live.channels)
    if found.pure and same:
        return base
    if found.pure:
        ascending = bool((np.diff(found.index.array) > 0).all())
        kind = Kind.SPLIT if ascending else Kind.REINDEX
        return low.add(call, kind, (flow(base, found.index),), found.axis, target="alias", kwargs=())
    kind = Kind.MAP if same else Kind.REINDEX
    args = (flow(base, found.index), *_sized(low, call, found.axis))
    return low.add(call, kind, args, found.axis, block=found.block)


def _sized(low: Lowering, call: Call, axis: int) -> tuple[Arg, ...]:
    """The arguments of a shape op, with the size of the channel axis left open."""
    if call.target not in _TAKES_SIZES:
        return tuple(low.literal(arg) for arg in call.args[1:])
    sizes = [low.literal(size) for size in call.args[1]]
    if sizes[axis] != -1:
        sizes[axis] = Marker.CHANNELS
    return (tuple(sizes), *(low.literal(arg) for arg in call.args[2:]))


_TAKES_SIZES = frozenset(f"aten.{name}.default" for name in ("reshape", "expand", "broadcast_to"))


def _plain(arg: Any) -> Any:
    if isinstance(arg, Scalar):
        return arg.hint
    if isinstance(arg, Const):
        return arg.tensor
    return [_plain(item) for item in arg] if isinstance(arg, list | tuple) else arg


def pixel_shuffle(low: Lowering, call: Call) -> Made:
    """Pixel shuffle by r: each result channel is woven from r*r operand channels."""
    x, factor = call.args
    x = low.channels_along(x, len(call.shape) - 3)
    read = flow(x, fan=factor * factor)
    return low.add(call, Kind.REINDEX, (read, factor), x.axis)


def unchanged(low: Lowering, call: Call) -> Made:
    """Clones, dropout in eval: the operand itself."""
    return call.args[0]


def selection(low: Lowering, call: Call) -> Made:
    """Indexing by constants along one axis, as ``x[:, idx]`` or ``index_select``."""
    if any(isinstance(arg, Value | Moved) for arg in _leaves(call.args[1:])):
        return Refused("it indexes by computed numbers")
    return rearrangement(low, call)


def _leaves(args: Any) -> list[Any]:
    return [leaf for arg in args for leaf in (_leaves(arg) if isinstance(arg, list | tuple) else [arg])]


def _entries(names: str, rule: Rule, overload: str = "default") -> dict[str, Rule]:
    return {f"aten.{name}" if "." in name else f"aten.{name}.{overload}": rule for name in names.split()}


_POINTWISE = """
    relu relu6 sigmoid silu gelu tanh hardswish hardsigmoid hardtanh leaky_relu elu selu celu mish softplus
    log_sigmoid abs neg exp exp2 log log1p log2 sqrt rsqrt square sin cos erf floor ceil round sign reciprocal clamp
    clamp_min clamp_max maximum minimum isnan isinf logical_not logical_and logical_or hardshrink softshrink.default
    threshold rrelu_with_noise addcmul addcdiv atan2 fmod.Tensor remainder.Tensor bitwise_not expm1
    add.Tensor add.Scalar sub.Tensor sub.Scalar rsub.Scalar rsub.Tensor mul.Tensor mul.Scalar div.Tensor div.Scalar
    div.Tensor_mode pow.Tensor_Scalar pow.Tensor_Tensor clamp.Tensor where.self where.ScalarOther where.ScalarSelf
    where.Scalar gt.Scalar ge.Scalar lt.Scalar le.Scalar eq.Scalar ne.Scalar gt.Tensor ge.Tensor lt.Tensor le.Tensor
    eq.Tensor ne.Tensor masked_fill.Scalar lerp.Scalar lerp.Tensor _to_copy to.dtype nan_to_num fill.Scalar
    zeros_like ones_like full_like logit floor_divide round.decimals trunc frac sgn tan asin acos atan sinh cosh
    xlogy.Tensor hypot heaviside bitwise_and.Tensor bitwise_or.Tensor
"""
_POOLS = "max_pool{0} avg_pool{0} adaptive_avg_pool{0}"
_RESIZES = {
    1: "upsample_nearest1d.vec upsample_linear1d.vec upsample_nearest1d upsample_linear1d "
    "_upsample_nearest_exact1d.vec",
    2: "upsample_nearest2d.vec upsample_bilinear2d.vec upsample_bicubic2d.vec upsample_nearest2d upsample_bilinear2d "
    "upsample_bicubic2d _upsample_nearest_exact2d.vec _upsample_bilinear2d_aa.vec _upsample_bicubic2d_aa.vec",
    3: "upsample_nearest3d.vec upsample_trilinear3d.vec upsample_nearest3d upsample_trilinear3d",
}
_PADS = """
    constant_pad_nd pad reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
    replication_pad3d
"""
_REARRANGEMENTS = """
    reshape permute transpose.int t unsqueeze flatten.using_ints
    unflatten.int expand broadcast_to slice.Tensor select.int narrow flip roll repeat repeat_interleave.self_int
    movedim.int movedim.intlist swapaxes pixel_unshuffle channel_shuffle native_channel_shuffle rot90 tile
"""

RULES: dict[str, Rule] = {
    **_entries("conv1d conv2d conv3d conv1d.padding conv2d.padding conv3d.padding", convolution),
    **_entries("conv_transpose1d conv_transpose2d.input conv_transpose3d.input", transposed_convolution),
    "aten.linear.default": linear,
    **_entries("matmul mm", product),
    "aten.addmm.default": bias_product,
    **_entries(_POINTWISE, pointwise),
    "aten.prelu.default": prelu,
    "aten.batch_norm.default": batch_norm,
    "aten.instance_norm.default": instance_norm,
    "aten.group_norm.default": group_norm,
    "aten.layer_norm.default": layer_norm,
    **_entries("softmax.int log_softmax.int _softmax _log_softmax", along()),
    **_entries("mean.dim sum.dim_IntList amax amin", reduction(1, 2)),
    **_entries("var.correction std.correction", reduction(1, None)),
    **_entries("var.dim std.dim", reduction(1, 3)),
    "aten.glu.default": glu,
    "aten.linalg_vector_norm.default": reduction(2, 3),
    **{k: r for n in (1, 2, 3) for k, r in _entries(_POOLS.format(f"{n}d"), spatial(n)).items()},
    **{k: r for n, names in _RESIZES.items() for k, r in _entries(names, spatial(n)).items()},
    **_entries(_PADS, pad),
    "aten.cat.default": concat,
    **_entries(_REARRANGEMENTS, rearrangement),
    **_entries("squeeze squeeze.dim squeeze.dims", squeeze),
    **_entries("index_select index.Tensor", selection),
    "aten.pixel_shuffle.default": pixel_shuffle,
    **_entries("clone alias detach contiguous lift_fresh_copy dropout feature_dropout alpha_dropout", unchanged),
}
