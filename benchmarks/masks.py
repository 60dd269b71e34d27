"""The mask protocol of the benchmarks: zeros written into a model's weights, layer by layer.

It is that of the survey of UPSCALE's exporter: every ungrouped 2-d convolution chooses its own channels,
whatever its neighbours choose.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from benchmarks import zoo

Side = Literal["input", "output", "both"]
Criterion = Literal["l2", "random"]


@dataclass(frozen=True, slots=True)
class Setting:
    """Which side of each layer is masked, and which fraction of its channels."""

    side: Side
    amount: float

    def __str__(self) -> str:
        return f"{self.side} {self.amount:.0%}"


@dataclass(frozen=True, slots=True)
class Masked:
    """The channels of one layer that were zeroed, in ascending order; those not named are kept."""

    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()


@torch.no_grad()
def mask(
    model: nn.Module, side: Side, amount: float, *, criterion: Criterion = "l2", seed: int = 0
) -> dict[str, Masked]:
    """Zero `int(amount * channels)` channels of every ungrouped `nn.Conv2d`, in place.

    Args:
        model: changed in place.
        side: "input" zeroes weight columns `W[:, i]` of every such layer that does not read the image (that
            has not three input channels); "output" zeroes rows `W[o]` and their biases, of every layer. A
            batch norm behind it stays as it is, so a dead output is in general a constant other than zero.
            "both" does both, the columns and rows being chosen from the weights as they came.
        amount: fraction of the channels, in [0, 1).
        criterion: "l2" zeroes the channels of least Euclidean norm, "random" any.
        seed: for "random".

    Returns:
        What was zeroed, by module name; layers with nothing zeroed are left out.

    Raises:
        ValueError: `amount` is outside [0, 1).
    """
    if not 0 <= amount < 1:
        raise ValueError(f"amount must be a fraction of the channels in [0, 1), got {amount}")
    generator = torch.Generator().manual_seed(seed)
    chosen: dict[str, Masked] = {}
    for name, layer in maskable(model):
        inputs, outputs = layer.weight.transpose(0, 1), layer.weight
        take_inputs = side != "output" and layer.in_channels != 3
        masked = Masked(
            inputs=_least(inputs, amount, criterion, generator) if take_inputs else (),
            outputs=_least(outputs, amount, criterion, generator) if side != "input" else (),
        )
        if masked.inputs or masked.outputs:
            chosen[name] = masked
            _zero(layer, masked)
    return chosen


def build_masked(name: str, setting: Setting, resolution: int | None = None) -> nn.Module:
    """A network of the zoo, masked by norm, in float32 and eval mode.

    Without half their weights, networks that do not normalise compute almost a constant. A pruner would have
    fine-tuned them; here the network is settled again (`benchmarks.zoo.settle`), which does not move the
    masks.

    Raises:
        KeyError: there is no such network.
        ValueError: the setting's amount is outside [0, 1).
    """
    model = zoo.build(name, resolution=resolution)
    mask(model, setting.side, setting.amount)
    with zoo.seeded(0):
        zoo.settle(model, zoo.calibration_inputs(name, resolution or zoo.entry(name).resolution, seed=1))
    return model


def maskable(model: nn.Module) -> Iterator[tuple[str, nn.Conv2d]]:
    """The layers that `mask` considers, with their names: every ungrouped `nn.Conv2d`."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.groups == 1:
            yield name, module


def _least(channels: Tensor, amount: float, criterion: Criterion, generator: torch.Generator) -> tuple[int, ...]:
    count = int(amount * len(channels))
    if criterion == "random":
        picked = torch.randperm(len(channels), generator=generator)[:count]
    else:
        picked = channels.flatten(1).norm(dim=1).argsort(stable=True)[:count]
    return tuple(sorted(picked.tolist()))


def _zero(layer: nn.Conv2d, masked: Masked) -> None:
    layer.weight[:, list(masked.inputs)] = 0.0
    layer.weight[list(masked.outputs)] = 0.0
    if layer.bias is not None:
        layer.bias[list(masked.outputs)] = 0.0
