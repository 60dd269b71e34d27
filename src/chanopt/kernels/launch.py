"""From a covered call to a launched kernel: its constants, its arguments, its grid."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from chanopt.kernels.call import Call, KernelError
from chanopt.kernels.configs import Config, tiles
from chanopt.kernels.problem import Kind, Problem, batch_stride, pixel_stride


def constants(problem: Problem, config: Config) -> dict[str, Any]:
    """The compile-time arguments of a problem's kernel, by name."""
    made: dict[str, Any] = {
        "AFFINE": problem.affine,
        "PRE_ACT": problem.pre_act,
        "BIAS": problem.bias,
        "RESIDUAL": problem.residual,
        "ACT": problem.act,
        "V": problem.vector,
        "BM": config.block_m,
        "BN": config.block_n,
    }
    if problem.kind is not Kind.POINT:
        made |= {"KH": problem.kernel[0], "KW": problem.kernel[1], "G": problem.group}
    if problem.kind is not Kind.DEPTHWISE:
        made |= {"PRECISION": problem.precision, "BK": config.block_k}
    if problem.kind is Kind.CONV:
        made |= {"POINT": problem.point, "UNIT": problem.unit}
    return made


def absent(problem: Problem) -> set[str]:
    """Pointers that the kernel does not read; None is passed for them."""
    unused = {
        "bias_ptr": not problem.bias,
        "scale_ptr": not problem.affine,
        "shift_ptr": not problem.affine,
        "r_ptr": problem.residual != "add",
    }
    return {name for name, is_unused in unused.items() if is_unused}


def arguments(problem: Problem, config: Config, call: Call, out: Tensor) -> dict[str, Any]:
    """The run-time arguments of a problem's kernel, by name; strides are in units of 16 bytes."""
    made: dict[str, Any] = {
        "x_ptr": call.x,
        "w_ptr": call.weight,
        "bias_ptr": call.bias,
        "scale_ptr": call.scale,
        "shift_ptr": call.shift,
        "r_ptr": call.residual,
        "y_ptr": out,
        "groups_ptr": call.groups,
    }
    made |= _point_sizes(problem, call, out) if problem.kind is Kind.POINT else _nhwc_sizes(problem, call, out)
    if problem.kind is not Kind.DEPTHWISE:
        made["NKB"] = problem.gathered // config.block_k
    return made


def grid(problem: Problem, config: Config) -> tuple[int, ...]:
    """Programs to launch."""
    programs = tiles(problem, config)
    return (programs // problem.batch, problem.batch) if problem.kind is Kind.POINT else (programs,)


def launch(problem: Problem, config: Config, call: Call, out: Tensor, kernel: Any = None) -> Any:
    """Run the kernel of a covered call.

    Args:
        problem: what `coverage` made of the call.
        config: a tile that fits it.
        call: its tensors, on a GPU (or on a CPU under TRITON_INTERPRET=1).
        out: where the result goes; with ``problem.residual == "accumulate"`` what it holds is added first.
        kernel: an emitted kernel to run in place of the parametrised one.

    Returns:
        Triton's compiled kernel; None where nothing had to run.
    """
    if problem.pixels == 0 or problem.outputs == 0:
        return None
    values = arguments(problem, config, call, out)
    if kernel is None:
        kernel = _library()[problem.kind.value]
        values |= constants(problem, config)
    else:
        values = {name: value for name, value in values.items() if name in kernel.arg_names}
    return kernel[grid(problem, config)](**values, num_warps=config.warps, num_stages=config.stages)


def _library() -> dict[str, Any]:
    from chanopt.kernels import triton_conv

    return triton_conv.KERNELS


def _nhwc_sizes(problem: Problem, call: Call, out: Tensor) -> dict[str, int]:
    height, width = problem.out_size
    return {
        "M": problem.pixels,
        "IH": problem.height,
        "IW": problem.width,
        "OH": height,
        "OW": width,
        "XS": _units(problem, pixel_stride(call.x)),
        "YS": _units(problem, pixel_stride(out)),
        "RS": 0 if call.residual is None else _units(problem, pixel_stride(call.residual)),
        "OC": problem.outputs // problem.vector,
        "SH": problem.stride[0],
        "SW": problem.stride[1],
        "PH": problem.padding[0],
        "PW": problem.padding[1],
        "DH": problem.dilation[0],
        "DW": problem.dilation[1],
    }


def _point_sizes(problem: Problem, call: Call, out: Tensor) -> dict[str, int]:
    return {
        "P": problem.height * problem.width // problem.vector,
        "XB": _units(problem, batch_stride(call.x)),
        "YB": _units(problem, batch_stride(out)),
        "RB": 0 if call.residual is None else _units(problem, batch_stride(call.residual)),
        "OC": problem.outputs,
    }


def _units(problem: Problem, stride: int | None) -> int:
    if stride is None or stride % problem.vector:
        raise KernelError(f"expected memory in units of {problem.vector} elements; ask chanopt.kernels.coverage first")
    return stride // problem.vector
