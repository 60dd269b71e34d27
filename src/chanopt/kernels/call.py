"""What one gathered conv computes: the arguments of the ops as one value, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from chanopt.errors import ChanoptError

# Names of activations, in the epilogue and in the prologue.
ACTIVATIONS = ("none", "relu", "relu6", "silu", "hardswish", "sigmoid")


class KernelError(ChanoptError, ValueError):
    """Arguments of a gathered conv that contradict each other, or a kernel that cannot be built."""


@dataclass(frozen=True, slots=True)
class Call:
    """``act(conv2d(pre_act(x[:, channels] * scale + shift), weight) + bias + residual)``.

    Attributes:
        x: (N, C, H, W).
        weight: (O, K, kh, kw), or (K, 1, kh, kw) if `depthwise`; K is ``len(groups) * group``.
        bias: (O,), or None.
        groups: integers, (K / group,). Gathered channel j is ``groups[j // group] * group + j % group`` of `x`.
        group: channels in a group; 1 makes `groups` a list of channels.
        stride, padding, dilation: of the conv, (height, width). Padding comes after the prologue.
        scale, shift: (K,) each, by gathered channel; both or neither.
        pre_act, act: one of ACTIVATIONS.
        residual: (N, O, H_out, W_out) added before `act`, or None.
        depthwise: whether each gathered channel is convolved with its own filter.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    groups: Tensor
    group: int = 1
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    scale: Tensor | None = None
    shift: Tensor | None = None
    pre_act: str = "none"
    residual: Tensor | None = None
    act: str = "none"
    depthwise: bool = False

    @property
    def gathered(self) -> int:
        """K, the number of gathered channels."""
        return self.groups.shape[0] * self.group

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        """(N, O, H_out, W_out)."""
        height, width = (
            (size + 2 * pad - dil * (k - 1) - 1) // step + 1
            for size, k, step, pad, dil in zip(
                self.x.shape[2:], self.weight.shape[2:], self.stride, self.padding, self.dilation, strict=True
            )
        )
        return self.x.shape[0], self.weight.shape[0], height, width

    @property
    def memory_format(self) -> torch.memory_format:
        """The memory format of the result: that of `x`."""
        return suggest_memory_format(self.x)

    def check(self) -> Call:
        """The call itself, if its parts fit together.

        Raises:
            KernelError: names the argument, what was expected and what was found.
        """
        _expect(self.x.dim() == 4, f"expected x of shape (N, C, H, W), found {self.x.dim()} dimensions")
        _expect(self.weight.dim() == 4, f"expected a weight of 4 dimensions, found {self.weight.dim()}")
        _expect(
            self.groups.dim() == 1 and not self.groups.is_floating_point(),
            "expected groups as one list of integers; see chanopt.kernels.pack",
        )
        _expect(self.group >= 1, f"expected groups of at least one channel, found group={self.group}")
        rows = (self.gathered, 1) if self.depthwise else (self.weight.shape[0], self.gathered)
        _expect(
            tuple(self.weight.shape[:2]) == rows,
            f"expected a weight of shape {(*rows, 'kh', 'kw')} for {self.groups.shape[0]} groups of {self.group}, "
            f"found {tuple(self.weight.shape)}",
        )
        _expect_vector("bias", self.bias, self.weight.shape[0])
        _expect_vector("scale", self.scale, self.gathered)
        _expect_vector("shift", self.shift, self.gathered)
        _expect((self.scale is None) == (self.shift is None), "expected scale and shift together, found one of them")
        for name, act in (("pre_act", self.pre_act), ("act", self.act)):
            _expect(act in ACTIVATIONS, f"expected {name} to be one of {', '.join(ACTIVATIONS)}, found {act!r}")
        if self.residual is not None:
            _expect_shape("residual", self.residual, self.output_shape)
        return self


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of one or two integers, as ATen takes them."""
    if isinstance(value, int):
        return value, value
    if len(value) == 1:
        return value[0], value[0]
    _expect(len(value) == 2, f"expected one or two integers, found {list(value)}")
    return value[0], value[1]


def expect_out(out: Tensor, call: Call) -> None:
    """Check the tensor that an out-variant writes to.

    Raises:
        KernelError: it has another shape, dtype or device than the result.
    """
    _expect_shape("out", out, call.output_shape)
    _expect(
        (out.dtype, out.device) == (call.x.dtype, call.x.device),
        f"expected out in {call.x.dtype} on {call.x.device}, found {out.dtype} on {out.device}",
    )


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise KernelError(f"gather_conv2d: {otherwise}")


def _expect_vector(name: str, vector: Tensor | None, size: int) -> None:
    if vector is not None:
        _expect_shape(name, vector, (size,))


def _expect_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    _expect(tuple(tensor.shape) == shape, f"expected {name} of shape {shape}, found {tuple(tensor.shape)}")
