"""Which kernel covers a call, and what of the call a kernel and a tuner need to know."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from chanopt.kernels.call import Call
from chanopt.kernels.tables import BLOCK

# Elements in 16 bytes: what one thread loads and stores at a time.
VECTOR = {torch.float32: 4, torch.float16: 8, torch.bfloat16: 8}
_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
DTYPES = {name: dtype for dtype, name in _NAMES.items()}
# Kernels compute addresses in 32 bits, and one bit stands for a tap row.
_MAX_ELEMENTS = 2**31
_MAX_TAPS = 31
# Images are the second axis of the grid, of which CUDA allows so many.
_MAX_IMAGES = 65535


class Kind(str, Enum):
    """The kernels of triton_conv, by name."""

    CONV = "conv_nhwc"
    DEPTHWISE = "depthwise_nhwc"
    POINT = "point_nchw"


@dataclass(frozen=True, slots=True)
class Problem:
    """A gathered conv without its data: what a binary is specialised on, and the sizes that a tile is chosen by.

    Attributes:
        kind: the kernel.
        dtype: of x, weight and result: "fp32", "fp16" or "bf16".
        batch, height, width: of `x`.
        gathered: K, the channels that are read, filling ones included.
        channels: C of `x`; 0 where nobody asks what the alternatives to a gather cost.
        outputs: O.
        kernel, stride, padding, dilation: of the conv.
        group: channels in a group of the table.
        affine, pre_act: the prologue.
        bias: whether there is one.
        residual: "none", "add", or "accumulate" (onto what the result's memory holds).
        act: the epilogue's activation.
        precision: of float32 products: "tf32" or "ieee". Half precision ignores it.
    """

    kind: Kind
    dtype: str
    batch: int
    height: int
    width: int
    gathered: int
    outputs: int
    channels: int = 0
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    group: int = 8
    affine: bool = False
    pre_act: str = "none"
    bias: bool = True
    residual: str = "none"
    act: str = "none"
    precision: str = "tf32"

    @property
    def vector(self) -> int:
        """Elements in 16 bytes."""
        return VECTOR[DTYPES[self.dtype]]

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return DTYPES[self.dtype].itemsize

    @property
    def out_size(self) -> tuple[int, int]:
        """(height, width) of the result."""
        height, width = (
            (size + 2 * pad - dil * (k - 1) - 1) // step + 1
            for size, k, step, pad, dil in zip(
                (self.height, self.width), self.kernel, self.stride, self.padding, self.dilation, strict=True
            )
        )
        return height, width

    @property
    def pixels(self) -> int:
        """Pixels of the result, over the batch."""
        height, width = self.out_size
        return self.batch * height * width

    @property
    def point(self) -> bool:
        """Whether every tap lies inside the image."""
        return self.kernel == (1, 1) and self.padding == (0, 0)

    @property
    def unit(self) -> bool:
        """Whether result pixel m reads pixel m."""
        return self.point and self.stride == (1, 1)

    @property
    def prologue(self) -> bool:
        """Whether anything is done to `x` before the conv."""
        return self.affine or self.pre_act != "none"

    def to_json(self) -> dict[str, Any]:
        """The fields, as JSON values."""
        return asdict(self) | {"kind": self.kind.value}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Problem:
        """A problem out of :meth:`to_json`."""
        known: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in data.items()}
        known["kind"] = Kind(data["kind"])
        return cls(**known)


@dataclass(frozen=True, slots=True)
class Covered:
    """A kernel computes this call."""

    problem: Problem

    def __bool__(self) -> bool:
        """A call that is covered counts as true."""
        return True


@dataclass(frozen=True, slots=True)
class Reason:
    """No kernel computes this call, and why; ATen does."""

    text: str

    def __bool__(self) -> bool:
        """A call that is not covered counts as false."""
        return False

    def __str__(self) -> str:
        return self.text


def coverage(call: Call, out: Tensor | None = None, accumulate: bool = False) -> Covered | Reason:
    """Whether a Triton kernel covers a call, whatever device its tensors are on (fake and meta tensors will do).

    Args:
        call: a checked call.
        out: where the result goes, if not to a tensor of its own.
        accumulate: whether it is added onto what `out` holds.
    """
    if call.x.dtype not in VECTOR:
        return Reason(f"{call.x.dtype} has no kernel; float32, float16 and bfloat16 have")
    if call.weight.dtype != call.x.dtype:
        return Reason(f"x is {call.x.dtype} but the weight {call.weight.dtype}")
    if call.residual is not None and accumulate:
        return Reason("a residual and accumulation at once")
    if call.residual is not None and call.residual.dtype != call.x.dtype:
        return Reason(f"x is {call.x.dtype} but the residual {call.residual.dtype}")
    nchw = call.memory_format == torch.contiguous_format
    reason = (_nchw_reason if nchw else _nhwc_reason)(call, out)
    if reason is not None:
        return Reason(reason)
    kind = Kind.POINT if nchw else Kind.DEPTHWISE if call.depthwise else Kind.CONV
    return Covered(_problem(call, kind, accumulate))


def pixel_stride(t: Tensor) -> int | None:
    """Elements from a pixel to the next in channels-last memory, which may be a slice of more channels; else None."""
    n, c, h, w = t.shape
    spans = [(size, stride, span) for size, stride, span in zip((w, h, n), _outer(t), (1, w, w * h), strict=True)]
    unit = next((stride // span for size, stride, span in spans if size > 1), c)
    regular = all(stride == unit * span for size, stride, span in spans if size > 1)
    return unit if regular and unit >= c and (c == 1 or t.stride(1) == 1) else None


def batch_stride(t: Tensor) -> int | None:
    """Elements from an image to the next in NCHW memory, which may be a slice of more channels; else None."""
    n, c, h, w = t.shape
    inner = zip((w, h, c), (t.stride(3), t.stride(2), t.stride(1)), (1, w, w * h), strict=True)
    regular = all(stride == expected for size, stride, expected in inner if size > 1)
    unit = t.stride(0) if n > 1 else c * h * w
    return unit if regular and unit >= c * h * w else None


def float32_precision() -> str:
    """How torch multiplies float32 numbers in convs now: "tf32" or "ieee"."""
    setting: Any = torch.backends.cudnn
    return "tf32" if setting.conv.fp32_precision == "tf32" else "ieee"


def _outer(t: Tensor) -> tuple[int, int, int]:
    return t.stride(3), t.stride(2), t.stride(0)


def _problem(call: Call, kind: Kind, accumulate: bool) -> Problem:
    _, _, height, width = call.x.shape
    return Problem(
        kind=kind,
        dtype=_NAMES[call.x.dtype],
        batch=call.x.shape[0],
        height=height,
        width=width,
        gathered=call.gathered,
        outputs=call.weight.shape[0],
        channels=call.x.shape[1],
        kernel=(call.weight.shape[2], call.weight.shape[3]),
        stride=call.stride,
        padding=call.padding,
        dilation=call.dilation,
        group=call.group,
        affine=call.scale is not None,
        pre_act=call.pre_act,
        bias=call.bias is not None,
        residual="accumulate" if accumulate else "none" if call.residual is None else "add",
        act=call.act,
        precision=float32_precision() if call.x.dtype == torch.float32 else "tf32",
    )


def _nhwc_reason(call: Call, out: Tensor | None) -> str | None:
    vector = VECTOR[call.x.dtype]
    if call.group % vector or call.group > BLOCK or call.group & (call.group - 1):
        return f"groups of {call.group} channels; channels last needs {vector}, or a power of two up to {BLOCK} above"
    if not call.depthwise and call.gathered % BLOCK:
        return f"{call.gathered} gathered channels, not a multiple of {BLOCK}; chanopt.kernels.pack rounds up"
    if call.weight.shape[0] % vector:
        return f"{call.weight.shape[0]} output channels, not a multiple of {vector}"
    if max(call.weight.shape[2:]) > _MAX_TAPS:
        return f"a kernel of {tuple(call.weight.shape[2:])}, more than {_MAX_TAPS} taps wide"
    if not _weight_is_packed(call):
        return "a weight whose memory is not channels last; chanopt.kernels.pack lays it out"
    return _memory_reason(call, out, pixel_stride, vector)


def _nchw_reason(call: Call, out: Tensor | None) -> str | None:
    vector = VECTOR[call.x.dtype]
    if call.depthwise or tuple(call.weight.shape[2:]) != (1, 1):
        return "NCHW memory and a kernel that is not 1x1; channels last has a kernel"
    if call.stride != (1, 1) or call.padding != (0, 0):
        return "NCHW memory and a 1x1 with stride or padding; channels last has a kernel"
    if call.x.shape[2] * call.x.shape[3] % vector:
        return f"NCHW memory and {call.x.shape[2] * call.x.shape[3]} pixels, not a multiple of {vector}"
    if call.group != 1:
        return f"NCHW memory and groups of {call.group} channels; NCHW takes single channels (group=1)"
    if call.gathered % BLOCK:
        return f"{call.gathered} gathered channels, not a multiple of {BLOCK}; chanopt.kernels.pack rounds up"
    if call.x.shape[0] > _MAX_IMAGES:
        return f"NCHW memory and {call.x.shape[0]} images, more than {_MAX_IMAGES}"
    if not call.weight.reshape(call.weight.shape[:2]).is_contiguous():
        return "a weight whose memory is not contiguous"
    return _memory_reason(call, out, batch_stride, vector)


def _weight_is_packed(call: Call) -> bool:
    if call.depthwise:
        return call.weight.permute(2, 3, 0, 1).is_contiguous()
    return call.weight.permute(0, 2, 3, 1).is_contiguous()


def _memory_reason(call: Call, out: Tensor | None, step: Callable[[Tensor], int | None], vector: int) -> str | None:
    operands = {"x": call.x, "the residual": call.residual, "the result's memory": out}
    for name, tensor in operands.items():
        if tensor is None:
            continue
        unit = step(tensor)
        if unit is None:
            return f"{name} has another memory format than x, or is no slice of channels"
        if unit % vector or tensor.storage_offset() % vector:
            return f"{name} is a slice whose ends are not multiples of {vector} channels"
        if tensor.shape[0] * _image(tensor, unit) >= _MAX_ELEMENTS:
            return f"{name} spans 2^31 elements or more"
    if math.prod(call.output_shape) >= _MAX_ELEMENTS or call.weight.numel() >= _MAX_ELEMENTS:
        return "a result or a weight of 2^31 elements or more"
    lists = (call.bias, call.scale, call.shift, call.groups)
    if any(each is not None and not each.is_contiguous() for each in lists):
        return "a bias, scale, shift or table that is not contiguous"
    if call.groups.dtype != torch.int32:
        return f"a table of {call.groups.dtype}; the kernels read int32"
    return None


def _image(t: Tensor, unit: int) -> int:
    """Elements that an image spans in memory, given its pixel or its batch stride."""
    return max(unit, unit * t.shape[2] * t.shape[3] if t.stride(1) == 1 else unit)
