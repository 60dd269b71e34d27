"""Counting multiplications and additions of dot products, as the tutorial does and as it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage]

from chanopt.analysis.weights import matrix
from chanopt.api import lower
from chanopt.errors import ChanoptError
from chanopt.pruning.slices import Weighted, by_channel, effective

__all__ = ["Dots", "compute_dot_prods", "dots", "exact_counts", "tutorial_counts"]


@dataclass(frozen=True)
class Dots:
    """The dot products of one layer.

    Attributes:
        name: the layer.
        rows: shape (output channels, entries of one dot product).
        positions: how often each is computed for one sample.
        conv: whether it is a conv.
        bias: shape (output channels,), or None.
    """

    name: str
    rows: Tensor
    positions: int
    conv: bool
    bias: Tensor | None = None


def compute_dot_prods(model: nn.Module, size: tuple[int, ...], *, exact: bool = False) -> tuple[int, int, torch.Size]:
    """Multiplications, additions and output size of a model for an input of the given size.

    Only convs and linear layers count, without their biases; the batch does not.

    Args:
        model: in eval mode.
        size: sizes of the input, with the batch.
        exact: by default the tutorial's count, in which a zero in a conv saves one multiplication in all and not one
            at every position, unless the whole filter is zero; exactly, every zero saves its multiplication and
            addition at every position.
    """
    count = exact_counts if exact else tutorial_counts
    layers, output = dots(model, size)
    pairs = [count(layer) for layer in layers]
    return sum(mults for mults, _ in pairs), sum(adds for _, adds in pairs), output


def tutorial_counts(layer: Dots) -> tuple[int, int]:
    """Multiplications and additions of a layer as the tutorial counts them."""
    outs, length = layer.rows.shape
    zeros, dead = int((layer.rows == 0).sum()), int((layer.rows == 0).all(1).sum())
    if not layer.conv:
        return outs * length - zeros, (length - 1) * (outs - dead)
    alive = outs - dead
    return layer.positions * length * alive - (zeros - dead * length), layer.positions * (length - 1) * alive


def exact_counts(layer: Dots) -> tuple[int, int]:
    """Multiplications and additions of a layer that skips every zero."""
    nonzero = (layer.rows != 0).sum(1)
    return int(nonzero.sum()) * layer.positions, int((nonzero - 1).clamp(min=0).sum()) * layer.positions


def dots(model: nn.Module, size: tuple[int, ...]) -> tuple[list[Dots], torch.Size]:
    """The layers of a model in order of execution, and the size of its output.

    Args:
        model: in eval mode; of what :func:`chanopt.optimize` made, the ATen ops are read instead of modules.
        size: sizes of the input, with the batch.

    Raises:
        ChanoptError: the model's output is not one tensor.
    """
    parameter = next(iter(model.parameters()), torch.zeros(0))
    x = torch.zeros(size, dtype=parameter.dtype, device=parameter.device)
    if isinstance(model, fx.GraphModule):
        with torch.no_grad():
            return list(_of_program(model, x)), _one(model(x)).shape
    found: list[Dots] = []
    with ExitStack() as stack, torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | _ConvNd):
                stack.callback(module.register_forward_hook(_recorder(name, found)).remove)
        output = _one(model(x)).shape
    return found, output


def _one(output: Any) -> Tensor:
    if not isinstance(output, Tensor):
        raise ChanoptError(f"expected a model with one tensor as output, found a {type(output).__name__}")
    return output


def _recorder(name: str, found: list[Dots]) -> Any:
    def record(module: Weighted, given: tuple[Tensor, ...], made: Tensor) -> None:
        conv = not isinstance(module, nn.Linear)
        pixels = (given[0] if conv and module.transposed else made).shape[2:] if conv else made.shape[1:-1]
        rows = by_channel(effective(module), module, "output")
        bias = None if module.bias is None else effective(module, "bias")
        found.append(Dots(name, rows, pixels.numel(), conv, bias))

    return record


def _of_program(model: fx.GraphModule, x: Tensor) -> Iterator[Dots]:
    program = lower(model, (x,))
    for op in program.ops:
        if not op.linear:
            continue
        rows = matrix(op, program)
        value = program.values[op.result]
        positions = value.channel_bytes // getattr(torch, value.dtype).itemsize // program.batch
        bias = None if op.args[2] is None else program.weights[op.args[2].name]
        yield Dots(op.label(), rows.reshape(len(rows), -1), positions, "conv" in op.target, bias)
