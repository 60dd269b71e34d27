"""What is collected in forward passes: how active channels are, and samples of feature maps.

A layer's activation is looked for where its output goes: the batch norm and activation modules that take it one
after the other, found by running the network.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Generator, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from chanopt.errors import ScheduleError

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish,
    nn.Hardtanh, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.Softplus,
)  # fmt: skip
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@dataclass
class ActivationStatistics:
    """Per layer and channel of its activation, summed over all batches seen.

    Attributes:
        samples: entries seen of each channel.
    """

    samples: dict[str, int] = field(default_factory=dict)
    _zeros: dict[str, Tensor] = field(default_factory=dict)
    _sums: dict[str, Tensor] = field(default_factory=dict)

    def apoz(self, layer: str) -> Tensor:
        """Shape (channels,): the percentage of zeros among the activations of each channel.

        Raises:
            ScheduleError: nothing was collected for this layer.
        """
        return 100 * self._of(self._zeros, layer).double() / self.samples[layer]

    def mean(self, layer: str) -> Tensor:
        """Shape (channels,): the mean activation of each channel.

        Raises:
            ScheduleError: nothing was collected for this layer.
        """
        return self._of(self._sums, layer) / self.samples[layer]

    def _of(self, table: dict[str, Tensor], layer: str) -> Tensor:
        if layer not in table:
            raise ScheduleError(
                f"expected statistics of activations of {layer}, found those of {', '.join(table) or 'no layer'}; "
                "run batches through the whole network while collecting"
            )
        return table[layer]

    def add(self, layer: str, activation: Tensor) -> None:
        """Count one batch: an activation with channels at dimension 1."""
        channels = activation.detach().transpose(0, 1).flatten(1).double()
        self.samples[layer] = self.samples.get(layer, 0) + channels.shape[1]
        for table, found in ((self._zeros, (channels == 0).sum(1)), (self._sums, channels.sum(1))):
            table[layer] = table[layer] + found if layer in table else found


@contextlib.contextmanager
def collect_activations(
    model: nn.Module, layers: Collection[str] | None = None
) -> Generator[ActivationStatistics, None, None]:
    """Collect the activations of every forward pass inside the block.

    Args:
        model: the network; only hooks are added, and taken away in the end.
        layers: conv and linear layers by name; all of them by default.

    Raises:
        ScheduleError: there is no such layer.
    """
    statistics = ActivationStatistics()
    wanted = _wanted(model, layers)
    with _watched(model) as chains:
        chains.on_end = partial(_count, statistics, wanted)
        yield statistics


def _count(statistics: ActivationStatistics, layers: Collection[str], chains: Chains) -> None:
    """Count the activations of a forward pass that has ended, when their chains have, too."""
    for layer in layers:
        if layer in chains.ends:
            statistics.add(layer, chains.ends[layer])


def _wanted(model: nn.Module, layers: Collection[str] | None) -> list[str]:
    known = [name for name, module in model.named_modules() if isinstance(module, _LAYERS)]
    unknown = sorted(set(layers or ()) - set(known))
    if unknown:
        raise ScheduleError(f"expected names of conv or linear layers, found {unknown[0]!r}; known: {known[:5]}, ...")
    return known if layers is None else list(layers)


@dataclass
class Chains:
    """The modules that take a layer's output one after the other, of the forward pass that is running.

    Attributes:
        of: per layer, the names of the batch norm and activation modules behind it.
        ends: per layer, a copy of what comes out of the last of them.
        on_end: called when a forward pass of the whole network has ended.
    """

    of: dict[str, list[str]] = field(default_factory=dict)
    ends: dict[str, Tensor] = field(default_factory=dict)
    on_end: Callable[[Chains], None] | None = None
    _owner: dict[int, str] = field(default_factory=dict)
    _alive: list[Tensor] = field(default_factory=list)

    def start(self) -> None:
        """A forward pass of the whole network begins."""
        for table in (self.of, self.ends, self._owner, self._alive):
            table.clear()

    def layer(self, name: str, output: Tensor) -> None:
        """A layer has made an output."""
        self.of[name] = []
        self._extend(name, output)

    def follow(self, name: str, operand: Tensor, output: Tensor) -> None:
        """A batch norm or an activation has taken a tensor."""
        layer = self._owner.get(id(operand))
        if layer is not None:
            self.of[layer].append(name)
            self._extend(layer, output)

    def _extend(self, layer: str, output: Tensor) -> None:
        self._alive.append(output)  # an address is only a name while the tensor lives
        self._owner[id(output)] = layer
        self.ends[layer] = output.detach().clone()

    def end(self) -> None:
        """The forward pass has ended."""
        if self.on_end is not None:
            self.on_end(self)
        self._alive.clear()
        self._owner.clear()


@contextlib.contextmanager
def _watched(model: nn.Module) -> Generator[Chains, None, None]:
    chains = Chains()
    handles = list(_hooks(model, chains))
    handles.append(model.register_forward_pre_hook(lambda module, args: chains.start(), prepend=True))
    handles.append(model.register_forward_hook(lambda module, args, output: chains.end()))
    try:
        yield chains
    finally:
        for handle in handles:
            handle.remove()


def _hooks(model: nn.Module, chains: Chains) -> Iterator[RemovableHandle]:
    for name, module in model.named_modules():
        if isinstance(module, _LAYERS):
            yield module.register_forward_hook(partial(_made, chains, name))
        elif isinstance(module, (*_NORMS, *_ACTIVATIONS)):
            yield module.register_forward_hook(partial(_taken, chains, name))


def _made(chains: Chains, name: str, module: nn.Module, args: Any, output: Any) -> None:
    chains.layer(name, output)


def _taken(chains: Chains, name: str, module: nn.Module, args: Any, output: Any) -> None:
    chains.follow(name, args[0], output)


def norm_behind(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, str]:
    """The batch norm that takes the output of each conv, by running the network once."""
    with _watched(model) as chains, torch.no_grad():
        model(*inputs)
        found = {layer: names[0] for layer, names in chains.of.items() if names}
    return {layer: name for layer, name in found.items() if isinstance(model.get_submodule(name), _NORMS)}


# -- feature maps ---------------------------------------------------------------------------------------------------


@dataclass
class FeatureMapSamples:
    """Inputs and outputs of layers at sampled positions.

    Attributes:
        inputs: per layer, shape (samples, input channels, kernel entries).
        outputs: per layer, shape (samples, output channels), without the bias.
    """

    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    outputs: dict[str, list[Tensor]] = field(default_factory=dict)

    def pairs(self, layer: str) -> tuple[Tensor, Tensor]:
        """All inputs and outputs of a layer.

        Raises:
            ScheduleError: nothing was collected for this layer.
        """
        if layer not in self.inputs:
            raise ScheduleError(
                f"expected samples of the feature maps of {layer}, found those of {', '.join(self.inputs) or 'none'}"
            )
        return torch.cat(self.inputs[layer]), torch.cat(self.outputs[layer])


@contextlib.contextmanager
def collect_feature_maps(
    model: nn.Module, layers: Collection[str], points: int = 10
) -> Generator[FeatureMapSamples, None, None]:
    """Sample what goes into and comes out of layers in every forward pass inside the block.

    Args:
        model: the network; only hooks are added, and taken away in the end.
        layers: convs (of two dimensions, one group) and linear layers by name.
        points: positions sampled in every feature map of a batch.

    Raises:
        ScheduleError: there is no such layer.
    """
    samples = FeatureMapSamples()
    handles = [
        model.get_submodule(name).register_forward_hook(partial(_sample, samples, name, points))
        for name in _wanted(model, layers)
    ]
    try:
        yield samples
    finally:
        for handle in handles:
            handle.remove()


def _sample(samples: FeatureMapSamples, name: str, points: int, module: nn.Module, args: Any, output: Any) -> None:
    columns, made = _positions(module, args[0].detach(), output.detach(), points)
    samples.inputs.setdefault(name, []).append(columns)
    samples.outputs.setdefault(name, []).append(made)


def _positions(module: nn.Module, operand: Tensor, output: Tensor, points: int) -> tuple[Tensor, Tensor]:
    if isinstance(module, nn.Linear):
        return operand.flatten(0, -2).unsqueeze(2), output.flatten(0, -2) - _bias(module)
    if not isinstance(module, nn.Conv2d) or module.groups != 1 or module.padding_mode != "zeros":
        raise ScheduleError(f"expected a two-dimensional conv of one group or a linear layer, found {module}")
    padding = module.padding if not isinstance(module.padding, str) else _same_padding(module)
    columns = functional.unfold(operand, module.kernel_size, module.dilation, padding, module.stride)
    chosen = torch.randint(columns.shape[2], (points,), device=columns.device)
    made = output.flatten(2)[:, :, chosen] - _bias(module).unsqueeze(1)
    picked = columns[:, :, chosen].transpose(1, 2).flatten(0, 1)
    return picked.view(picked.shape[0], module.in_channels, -1), made.transpose(1, 2).flatten(0, 1)


def _bias(module: nn.Module) -> Tensor:
    """Shape (output channels,): the bias; zero where there is none."""
    weight = module.get_parameter("weight")
    bias = getattr(module, "bias", None)
    return weight.new_zeros(weight.shape[0]) if bias is None else bias.detach()


def _same_padding(module: nn.Conv2d) -> tuple[int, ...]:
    if module.padding == "valid":
        return (0, 0)
    return tuple(d * (k - 1) // 2 for d, k in zip(module.dilation, module.kernel_size, strict=True))


def refit(module: nn.Module, keep: Tensor, inputs: Tensor, outputs: Tensor) -> None:
    """Set the kept columns of a layer's weight to the least-squares fit of its sampled outputs.

    Args:
        module: the layer; its weight is changed at the kept input channels.
        keep: shape (input channels,), boolean.
        inputs: shape (samples, input channels, kernel entries).
        outputs: shape (samples, output channels), without the bias.
    """
    weight = module.get_parameter("weight")
    kept = keep.bool().to(inputs.device)
    left = inputs[:, kept].flatten(1).double()
    solution = torch.linalg.lstsq(left, outputs.double(), driver=_driver(left)).solution
    with torch.no_grad():
        fitted = solution.t().reshape(weight.shape[0], int(kept.sum()), *weight.shape[2:])
        weight[:, kept.to(weight.device)] = fitted.to(weight)


def _driver(matrix: Tensor) -> str:
    """A driver that takes rank-deficient samples, where the device has one."""
    return "gelsd" if matrix.device.type == "cpu" else "gels"
