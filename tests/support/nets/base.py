"""What every family of micro nets is written with: the registry, the parts, and random statistics."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

Inputs = Callable[[int, torch.dtype, int], tuple[Any, ...]]
"""(batch, dtype, seed) -> the positional arguments of the net; equal seeds give equal values."""


@dataclass(frozen=True, slots=True)
class Micro:
    """One small network with one feature.

    `build()` gives the same module in eval mode every time, float32, with random statistics. `fixed_batch` is
    the only batch the net takes (None: any batch, also a symbolic one). `batch_first` is False where axis 0
    of an output is not the batch, so outputs cannot be compared across samples.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Inputs
    note: str
    fixed_batch: int | None = None
    batch_first: bool = True


MICRO: dict[str, Micro] = {}

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

AnyModule = Any
"""A module whose attributes are read: torch declares them all as `Tensor | Module`."""


class Parts(nn.Module):
    """Named parts and one expression over them; modules, parameters, and other tensors as buffers."""

    def __init__(self, body: Callable[..., Any], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.body = body
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
                continue
            setattr(self, name, part)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


class Net(Parts):
    """A net of one argument: `Net(lambda n, x: n.b(n.a(x)), a=..., b=...)`.

    `forward` names its argument, as users do: torch.export spells dynamic shapes otherwise for `*args`.
    """

    def forward(self, x: Any) -> Any:
        return self.body(self, x)


class Net2(Parts):
    """A net of two arguments."""

    def forward(self, x: Any, y: Any) -> Any:
        return self.body(self, x, y)


def tensors(*shapes: tuple[int, ...]) -> Inputs:
    """Inputs of these shapes (without the batch axis), standard normal."""

    def make(batch: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
        source = torch.Generator().manual_seed(seed)
        drawn = [torch.randn((batch, *shape), generator=source, dtype=torch.float64) for shape in shapes]
        return tuple(tensor.to(dtype) for tensor in drawn)

    return make


def image(channels: int = 3, size: int = 8, width: int | None = None) -> Inputs:
    """One (N, channels, size, width or size) input, standard normal."""
    return tensors((channels, size, size if width is None else width))


def add(
    name: str,
    make: Callable[[], nn.Module],
    note: str,
    inputs: Inputs | None = None,
    *,
    fixed_batch: int | None = None,
    batch_first: bool = True,
) -> None:
    """Enter a net into the registry; a name is taken once."""
    if name in MICRO:
        raise ValueError(f"micro net {name!r} is defined twice; give the second one another name")
    seed = zlib.crc32(name.encode())

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return randomise(make()).eval()

    MICRO[name] = Micro(name, build, inputs or image(), note, fixed_batch, batch_first)


def micro(
    note: str, inputs: Inputs | None = None, *, fixed_batch: int | None = None, batch_first: bool = True
) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    """Decorator: enter the decorated builder into the registry under its own name."""

    def enter(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        add(make.__name__, make, note, inputs, fixed_batch=fixed_batch, batch_first=batch_first)
        return make

    return enter


def conv(inputs: int, outputs: int, kernel: int = 1, **options: Any) -> nn.Conv2d:
    """A 2-D convolution that keeps H and W (stride 1, odd kernel) unless `padding` says otherwise."""
    options.setdefault("padding", kernel // 2)
    return nn.Conv2d(inputs, outputs, kernel, **options)


def conv_bn_relu(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Sequential:
    """Convolution without bias, batch norm, ReLU: the block most networks are made of."""
    return nn.Sequential(conv(inputs, outputs, kernel, bias=False, **options), nn.BatchNorm2d(outputs), nn.ReLU())


def parameter(*shape: int, low: float = 0.5, high: float = 1.5) -> nn.Parameter:
    """A bare parameter, uniform in [low, high), with a random sign."""
    sign = torch.randint(0, 2, shape) * 2 - 1
    return nn.Parameter(torch.empty(shape).uniform_(low, high) * sign)


def randomise(model: nn.Module) -> nn.Module:
    """Give every weight, bias, norm and running statistic a random value of order one (from the global RNG).

    Fresh modules hide errors: biases near zero, gamma 1, beta 0, mean 0 and variance 1 make a wrong slice of
    the statistics invisible.
    """
    for module in model.modules():
        if isinstance(module, (*CONVS, nn.Linear)):
            _randomise_mix(module)
        elif isinstance(module, nn.PReLU):
            nn.init.uniform_(module.weight, 0.05, 0.5)
        else:
            _randomise_norm(module)
    return model


def _randomise_mix(module: AnyModule) -> None:
    fan_in = module.weight[0].numel()
    if getattr(module, "transposed", False):
        fan_in = module.weight[:, 0].numel() // max(1, module.groups)
    if not nn.utils.parametrize.is_parametrized(module):
        nn.init.normal_(module.weight, std=fan_in**-0.5 * 1.3)
    if module.bias is not None:
        nn.init.normal_(module.bias, std=0.4)


def _randomise_norm(module: AnyModule) -> None:
    """Also finds norms by their buffers and parameters, whatever class they are."""
    if isinstance(getattr(module, "running_mean", None), Tensor):
        nn.init.normal_(module.running_mean, std=0.4)
        nn.init.uniform_(module.running_var, 0.5, 1.5)
    if not any(hasattr(module, mark) for mark in ("running_mean", "num_groups", "normalized_shape")):
        return
    if getattr(module, "weight", None) is not None:
        nn.init.uniform_(module.weight, 0.5, 1.5)
    if getattr(module, "bias", None) is not None:
        nn.init.normal_(module.bias, std=0.4)
