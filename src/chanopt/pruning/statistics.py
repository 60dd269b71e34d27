"""What feature maps say about channels: rank, share of activity, mean. Collected by hooks, on any device."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from chanopt.errors import MaskError
from chanopt.pruning.modes import in_eval
from chanopt.pruning.slices import Side, channels, weighted

__all__ = ["ActivationMean", "Activity", "Rank", "Statistic", "collect"]


class Statistic(Protocol):
    """A number per channel of one batch of feature maps."""

    def __call__(self, maps: Tensor) -> Tensor:
        """From maps of shape (batch, channels, *pixels), float64, the sum over the batch: shape (channels,).

        Of a linear layer pixels are its tokens, and there may be none: shape (batch, channels).
        """
        ...


@dataclass(frozen=True)
class Rank:
    """The rank of a channel's feature map (HRank, Lin et al., CVPR 2020); maps need two dimensions or more."""

    def __call__(self, maps: Tensor) -> Tensor:
        """As :meth:`Statistic.__call__`.

        Raises:
            MaskError: the maps have fewer than two dimensions.
        """
        if maps.ndim < 4:
            raise MaskError(f"expected feature maps of two dimensions for their rank, found {maps.ndim - 2}")
        return torch.linalg.matrix_rank(maps.flatten(2, -2)).double().sum(0)


@dataclass(frozen=True)
class Activity:
    """The share of pixels that are not zero after the activation: one minus APoZ (Hu et al., 2016)."""

    activation: Callable[[Tensor], Tensor] = torch.relu

    def __call__(self, maps: Tensor) -> Tensor:
        """As :meth:`Statistic.__call__`."""
        return _pixels((self.activation(maps) != 0).double()).mean(2).sum(0)


@dataclass(frozen=True)
class ActivationMean:
    """The mean after the activation (Molchanov et al., ICLR 2017, section 2.2)."""

    activation: Callable[[Tensor], Tensor] = torch.relu

    def __call__(self, maps: Tensor) -> Tensor:
        """As :meth:`Statistic.__call__`."""
        return _pixels(self.activation(maps)).mean(2).sum(0)


def _pixels(maps: Tensor) -> Tensor:
    """Shape (batch, channels, pixels); a linear layer without tokens has one pixel."""
    return maps.reshape(*maps.shape[:2], -1)


def collect(
    model: nn.Module,
    batches: Iterable[Any],
    statistic: Statistic,
    *,
    layers: Sequence[str],
    side: Side = "output",
    at: Mapping[str, str] | None = None,
    cache: str | Path | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """The mean of a statistic over all samples, for every layer; give it to :class:`importance.Collected`.

    Args:
        model: the model; run in eval mode (and put back as it was), without gradients, on the device of its parameters.
        batches: batches of inputs: a tensor, or a tuple of positional inputs.
        statistic: see :class:`Statistic`.
        layers: names of conv and linear layers.
        side: whether their inputs or their outputs are looked at.
        at: of the output side, the module whose output is looked at instead, e.g. the layer's batch norm.
        cache: a file; where it exists the result is read from it and the model is not run. It knows the statistic, the
            side, ``at`` and the layers; one file for each model and data is up to you.
        progress: whether to show a bar.

    Returns:
        By layer, float64, shape (channels,), on the CPU.

    Raises:
        MaskError: no such layer, a layer that was not run, or a cache of something else.
    """
    places = {name: (at or {}).get(name, name) for name in layers}
    about = {"statistic": _described(statistic), "side": side}
    if cache is not None and Path(cache).exists():
        return _cached(Path(cache), about, places)
    sums = _Sums(statistic)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with ExitStack() as stack, torch.no_grad(), in_eval(model):
        for name, place in places.items():
            stack.callback(sums.watch(model, name, side, place).remove)
        for batch in tqdm(batches, desc="statistics", disable=not progress):
            model(*(_to(item, device) for item in (batch if isinstance(batch, tuple | list) else (batch,))))
    means = {name: sums.mean(name) for name in layers}
    if cache is not None:
        torch.save({"about": about, "places": places, "means": means}, cache)
    return means


def _described(statistic: Statistic) -> str:
    """A text that tells statistics apart; of functions the name, for their address changes from run to run."""
    if not is_dataclass(statistic):
        return getattr(statistic, "__qualname__", type(statistic).__qualname__)
    values = {part.name: getattr(statistic, part.name) for part in fields(statistic)}
    told = [f"{name}={getattr(value, '__qualname__', None) or repr(value)}" for name, value in values.items()]
    return f"{type(statistic).__qualname__}({', '.join(told)})"


def _cached(cache: Path, about: Mapping[str, str], places: Mapping[str, str]) -> dict[str, Tensor]:
    try:
        found = torch.load(cache, weights_only=True)
        held, told, means = found["about"], found["places"], found["means"]
    except (OSError, RuntimeError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise MaskError(f"expected statistics in {cache}, found another file; delete it") from error
    if held != about:
        raise MaskError(f"expected {_listed(about)} in {cache}, found {_listed(held)}; delete the file or name another")
    missing = [name for name, place in places.items() if told.get(name) != place]
    if missing:
        raise MaskError(f"expected statistics of {missing[:5]} in {cache}, found other layers; delete the file")
    return {name: means[name] for name in places}


def _listed(about: Mapping[str, str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in about.items())


def _to(item: Any, device: torch.device) -> Any:
    return item.to(device) if isinstance(item, Tensor) else item


class _Sums:
    """Sums of a statistic per layer, with the number of samples behind them."""

    def __init__(self, statistic: Statistic) -> None:
        self.statistic = statistic
        self.sums: dict[str, Tensor] = {}
        self.samples: dict[str, int] = {}

    def watch(self, model: nn.Module, name: str, side: Side, place: str) -> Any:
        """A hook that takes the feature maps of one layer; its handle."""
        layer = weighted(model, name)
        count = channels(layer, side)
        last = isinstance(layer, nn.Linear)
        if side == "input":
            return layer.register_forward_pre_hook(lambda _, given: self.take(name, given[0], count, last))
        module = model.get_submodule(place)
        return module.register_forward_hook(lambda *call: self.take(name, call[-1], count, last))

    def take(self, name: str, maps: Tensor, count: int, last: bool) -> None:
        """Add one batch of maps; a linear layer has its channels last."""
        table = maps.detach().double()
        table = table.unsqueeze(0) if last and table.ndim == 1 else table  # one sample without a batch
        table = table.movedim(-1, 1) if last and table.ndim > 2 else table
        if table.shape[1] != count:
            raise MaskError(f"expected {count} channels in the feature maps of {name}, found {table.shape[1]}")
        value = self.statistic(table).cpu()
        self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.samples[name] = self.samples.get(name, 0) + len(table)

    def mean(self, name: str) -> Tensor:
        """The mean over all samples of one layer."""
        if name not in self.sums:
            raise MaskError(f"expected {name} to be run on the batches, found that it was not")
        return self.sums[name] / self.samples[name]
