"""The operators: `chanopt::gather_conv2d`, its depthwise sibling, and both writing into memory that exists.

Importing this module registers them; it does not need triton. On CUDA a Triton kernel runs if one covers the call
(:func:`chanopt.kernels.coverage`), everywhere else ATen. They are opaque to torch.export, Inductor and AOTInductor; a
program that holds them runs where `chanopt.kernels` has been imported.

The operators are defined on a raw library, whose calls cost a few microseconds; `torch.library.custom_op` costs 55.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from chanopt.kernels.call import Call, expect_out, pair
from chanopt.kernels.configs import Config, Rival, Tile, fits, heuristic, tile_of
from chanopt.kernels.emit import emitted
from chanopt.kernels.launch import launch
from chanopt.kernels.problem import Problem, Reason, coverage
from chanopt.kernels.reference import activated, backward, reference, reference_out
from chanopt.kernels.rivals import by_rival

_LOG = logging.getLogger(__name__)

_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor groups, int group=1, int[2] stride=1, int[2] padding=0, "
    "int[2] dilation=1, Tensor? scale=None, Tensor? shift=None, str pre_act='none', Tensor? residual=None, "
    "str act='none', int[]? config=None"
)
_TENSORS = ("x", "weight", "bias", "groups", "scale", "shift", "residual")
# What autograd sees: the positions of `_ARGUMENTS`.
_POSITIONS = {"x": 0, "weight": 1, "bias": 2, "scale": 8, "shift": 9, "residual": 11}
_COUNT = 14

_LIBRARY = torch.library.Library("chanopt", "DEF")
# Results promise exact strides, so their inputs must arrive with those that they were traced with.
_TAGS = (torch.Tag.pt2_compliant_tag, getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order))


def gather_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: Tensor,
    group: int = 1,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    pre_act: str = "none",
    residual: Tensor | None = None,
    act: str = "none",
    config: Sequence[int] | None = None,
) -> Tensor:
    """``act(conv2d(pre_act(x[:, channels] * scale + shift), weight, bias) + residual)`` without copying the channels.

    The prologue comes before the padding: what is padded is zero, not ``pre_act(shift)``. The result has the memory
    format of `x`. For the argument shapes see :class:`Call`; for making `groups` and `weight`,
    :func:`chanopt.kernels.pack`. Entries of `groups` must lie in `x`; on CUDA nobody checks.

    The operands are those of `Call`. `config` is a tile as :meth:`Config.to_list` gives it, for CUDA, or [1] for cuDNN
    after a copy, [2] for cuDNN with zeros in the weight, or None for the heuristic's tile; another one rounds
    differently, so a plan should name it (:func:`chanopt.kernels.tune`).

    Raises:
        KernelError: shapes or names do not fit together.

    >>> x, w = torch.randn(2, 16, 5, 5), torch.randn(4, 8, 3, 3)
    >>> y = gather_conv2d(x, w, None, torch.tensor([1]), group=8, padding=1, act="relu")
    >>> torch.equal(y, torch.relu(torch.conv2d(x[:, 8:], w, padding=1)))
    True
    """
    return torch.ops.chanopt.gather_conv2d(
        x, weight, bias, groups, group, pair(stride), pair(padding), pair(dilation), scale, shift, pre_act, residual,
        act, config,
    )  # fmt: skip


def call_of(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: Tensor,
    group: int = 1,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    pre_act: str = "none",
    residual: Tensor | None = None,
    act: str = "none",
    config: Sequence[int] | None = None,
) -> tuple[Call, Tile | None]:
    """The arguments as one value. The dispatcher leaves out what equals a default, so they stand here again."""
    made = Call(
        x, weight, bias, groups, group, pair(stride), pair(padding), pair(dilation), scale, shift, pre_act, residual,
        act,
    )  # fmt: skip
    return made, None if config is None else tile_of(list(config))


def _arguments(call: Call, config: Tile | None) -> tuple[Any, ...]:
    return (
        call.x, call.weight, call.bias, call.groups, call.group, call.stride, call.padding, call.dilation, call.scale,
        call.shift, call.pre_act, call.residual, call.act, None if config is None else config.to_list(),
    )  # fmt: skip


def run_on_cuda(call: Call, config: Tile | None, out: Tensor | None = None, accumulate: bool = False) -> Tensor:
    """The result by a Triton kernel if one covers the call, else by ATen (the log says why).

    Args:
        call: its tensors, on a GPU.
        config: a tile, or a way without one; a tile that does not fit the call is replaced by the heuristic's.
        out: where the result goes, if not to a tensor of its own.
        accumulate: whether what `out` holds is added before the activation.
    """
    made = _runnable(call, out, accumulate)
    if isinstance(made, Reason):
        _tell(made.text)
        return _by_aten(call, out, accumulate)
    if isinstance(config, Rival):
        result = by_rival(replace(call, residual=out) if accumulate else call, config)
        return result if out is None else out.copy_(result)
    if out is None:
        out = torch.empty(call.output_shape, dtype=call.x.dtype, device=call.x.device, memory_format=call.memory_format)
    tile = _tile(made, config, call.x.device)
    launch(made, tile, call, out, emitted(made, tile))
    return out


def _runnable(call: Call, out: Tensor | None, accumulate: bool) -> Problem | Reason:
    made = coverage(call, out, accumulate)
    if isinstance(made, Reason):
        return made
    return made.problem if _has_triton() else Reason("triton is not installed")


def _by_aten(call: Call, out: Tensor | None, accumulate: bool) -> Tensor:
    if out is None:
        return reference(call)
    reference_out(call, out, accumulate)
    return out


def _tile(problem: Problem, config: Config | None, device: torch.device) -> Config:
    capability, multiprocessors = _machine(device)
    if config is not None and fits(problem, config, capability):
        return config
    return heuristic(problem, capability, multiprocessors)


@lru_cache
def _machine(device: torch.device) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)
    return properties.major * 10 + properties.minor, properties.multi_processor_count


@lru_cache
def _has_triton() -> bool:
    try:
        import triton  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError:
        return False
    return True


@lru_cache
def _tell(reason: str) -> None:
    """Log a reason once."""
    _LOG.info("gather_conv2d runs in ATen: %s", reason)


def _register(name: str, depthwise: bool) -> None:
    _LIBRARY.define(f"{name}({_ARGUMENTS}) -> Tensor", tags=_TAGS)
    _LIBRARY.define(f"{name}_into(Tensor(a!) out, {_ARGUMENTS}, bool accumulate=False) -> ()", tags=_TAGS)

    def parse(args: Any, kwargs: Any) -> tuple[Call, Tile | None]:
        call, config = call_of(*args, **kwargs)
        return replace(call, depthwise=depthwise).check(), config

    _register_functional(name, parse)
    _register_into(f"{name}_into", parse)
    torch.library.register_autograd(
        f"chanopt::{name}", _backward, setup_context=_setup_context(depthwise), lib=_LIBRARY
    )
    _register_flops(name, first=0)
    _register_flops(f"{name}_into", first=1)


Parse = Callable[[Any, Any], tuple[Call, Tile | None]]


def _register_functional(name: str, parse: Parse) -> None:
    def by_aten(*args: Any, **kwargs: Any) -> Tensor:
        return reference(parse(args, kwargs)[0])

    def by_triton(*args: Any, **kwargs: Any) -> Tensor:
        return run_on_cuda(*parse(args, kwargs))

    def fake(*args: Any, **kwargs: Any) -> Tensor:
        call, _ = parse(args, kwargs)
        return call.x.new_empty(call.output_shape).to(memory_format=call.memory_format)

    def autocast(device: str) -> Callable[..., Tensor]:
        def cast(*args: Any, **kwargs: Any) -> Tensor:
            call, config = parse(args, kwargs)
            own = under_autocast(call, device)
            with _without_autocast(device):
                made = getattr(torch.ops.chanopt, name)(*_arguments(own, config))
            apart = own.residual is None and call.residual is not None
            return activated(made + call.residual, call.act) if apart else made

        return cast

    _LIBRARY.impl(name, by_aten, "CPU")
    _LIBRARY.impl(name, by_triton, "CUDA")
    _LIBRARY.impl(name, autocast("cpu"), "AutocastCPU")
    _LIBRARY.impl(name, autocast("cuda"), "AutocastCUDA")
    torch.library.register_fake(f"chanopt::{name}", fake, lib=_LIBRARY)


def _register_into(name: str, parse: Parse) -> None:
    def split(out: Tensor, args: Any, kwargs: Any) -> tuple[Call, Tile | None, bool]:
        # `accumulate` comes last; the dispatcher passes all arguments before the last that is not a default.
        accumulate = kwargs.pop("accumulate", args[_COUNT] if len(args) > _COUNT else False)
        call, config = parse(args[:_COUNT], kwargs)
        expect_out(out, call)
        return call, config, accumulate

    def by_aten(out: Tensor, *args: Any, **kwargs: Any) -> None:
        call, _, accumulate = split(out, args, kwargs)
        reference_out(call, out, accumulate)

    def by_triton(out: Tensor, *args: Any, **kwargs: Any) -> None:
        call, config, accumulate = split(out, args, kwargs)
        run_on_cuda(call, config, out, accumulate)

    def fake(out: Tensor, *args: Any, **kwargs: Any) -> None:
        split(out, args, kwargs)

    def autocast(device: str) -> Callable[..., None]:
        def cast(out: Tensor, *args: Any, **kwargs: Any) -> None:
            accumulate = kwargs.pop("accumulate", args[_COUNT] if len(args) > _COUNT else False)
            call, config = parse(args[:_COUNT], kwargs)
            call = _cast(call, out.dtype)
            with _without_autocast(device):
                getattr(torch.ops.chanopt, name)(out, *_arguments(call, config), accumulate)

        return cast

    _LIBRARY.impl(name, by_aten, "CPU")
    _LIBRARY.impl(name, by_triton, "CUDA")
    _LIBRARY.impl(name, autocast("cpu"), "AutocastCPU")
    _LIBRARY.impl(name, autocast("cuda"), "AutocastCUDA")
    torch.library.register_fake(f"chanopt::{name}", fake, lib=_LIBRARY)


def under_autocast(call: Call, device: str) -> Call:
    """What autocast makes of a call, on a type of device: where it is on, else the call itself.

    A sum with something wider is as wide, and so comes after it, with the activation: in eager PyTorch it would be an
    op of its own.
    """
    if not torch.is_autocast_enabled(device):
        return call
    dtype, residual = torch.get_autocast_dtype(device), call.residual
    wider = residual is not None and torch.promote_types(residual.dtype, dtype) != dtype
    return _cast(replace(call, residual=None, act="none") if wider else call, dtype)


def _cast(call: Call, dtype: torch.dtype) -> Call:
    """The call with what is multiplied in another dtype; bias, scale and shift stay in float32."""

    def cast(t: Tensor | None) -> Any:
        return t if t is None or t.dtype == torch.float64 else t.to(dtype)

    return replace(call, x=cast(call.x), weight=cast(call.weight), residual=cast(call.residual))


def _without_autocast(device: str) -> Any:
    # As torch.library.register_autocast does, which would cast bias, scale and shift as well.
    dispatch: Any = getattr(torch, "_C")  # noqa: B009
    key = dispatch.DispatchKey.AutocastCPU if device == "cpu" else dispatch.DispatchKey.AutocastCUDA
    return getattr(dispatch, "_ExcludeDispatchKeyGuard")(dispatch.DispatchKeySet(key))  # noqa: B009


def _setup_context(depthwise: bool) -> Callable[[Any, Any, Any], None]:
    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        call, _ = call_of(*inputs)
        ctx.save_for_backward(*(getattr(call, name) for name in _TENSORS))
        # The dispatcher leaves out trailing defaults; autograd wants a gradient for what it passed.
        ctx.count = len(inputs)
        ctx.rest = (call.group, call.stride, call.padding, call.dilation, call.pre_act, call.act, depthwise)

    return setup


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tensors = dict(zip(_TENSORS, ctx.saved_tensors, strict=True))
    group, stride, padding, dilation, pre_act, act, depthwise = ctx.rest
    call = Call(
        **tensors, group=group, stride=stride, padding=padding, dilation=dilation, pre_act=pre_act, act=act,
        depthwise=depthwise,
    )  # fmt: skip
    wanted = dict(enumerate(ctx.needs_input_grad))
    made = backward(call, grad, {name: wanted.get(position, False) for name, position in _POSITIONS.items()})
    at = {_POSITIONS[name]: gradient for name, gradient in made.items()}
    return tuple(at.get(position) for position in range(ctx.count))


def _register_flops(name: str, first: int) -> None:
    """Count the multiplications of the conv on the gathered channels, as torch counts those of a conv."""

    def flops(*shapes: Any, out_shape: Any = None, out_val: Any = None, **kwargs: Any) -> int:
        x, weight, stride, padding, dilation = _geometry(shapes[first:], kwargs)
        sizes = zip(x[2:], weight[2:], stride, padding, dilation, strict=True)
        out = [(size + 2 * pad - dil * (k - 1) - 1) // step + 1 for size, k, step, pad, dil in sizes]
        return conv_flop_count([x[0], weight[1], *x[2:]], list(weight), [x[0], weight[0], *out], transposed=False)

    register_flop_formula([getattr(torch.ops.chanopt, name)])(flops)


def _geometry(shapes: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """(x, weight, stride, padding, dilation) among the arguments, tensors being shapes."""
    given = dict(enumerate(shapes))
    defaults = {5: ("stride", 1), 6: ("padding", 0), 7: ("dilation", 1)}
    return (
        given.get(0, kwargs.get("x")),
        given.get(1, kwargs.get("weight")),
        *(pair(given.get(position, kwargs.get(name, value))) for position, (name, value) in defaults.items()),
    )


_register("gather_conv2d", depthwise=False)
_register("gather_depthwise_conv2d", depthwise=True)
