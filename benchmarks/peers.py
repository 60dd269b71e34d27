"""UPSCALE's exporter, run side by side on the same masks (Wan et al., ICML 2023; package `apple-upscale`).

It finds masked input channels as all-zero weight columns, orders each segment's channels greedily, cuts the
weights in place and wraps every consumer that still needs a selection into `Sequential(Subselect, layer)`. A
selection that is a range is a view; any other copies its channels.
"""

from __future__ import annotations

import copy
import importlib
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Mode = Literal["index", "runs", "no_reorder", "baseline"]

_FLOAT32_BYTES = 4


class PeerError(Exception):
    """UPSCALE could not export a model; the message is its own error, with the type."""


@dataclass(frozen=True, slots=True)
class Counts:
    """What an exported model's selections do in one inference. Bytes are those of float32.

    Attributes:
        n_subselect: layers behind a selection.
        n_noop_view: selections of the whole arriving tensor.
        n_strict_view: selections of a proper range of it.
        n_copies: selections that copy.
        channels_copied: channels that those copy.
        bytes_copied: bytes that those copy, over the batch of the example inputs.
    """

    n_subselect: int = 0
    n_noop_view: int = 0
    n_strict_view: int = 0
    n_copies: int = 0
    channels_copied: int = 0
    bytes_copied: int = 0

    def __add__(self, other: Counts) -> Counts:
        mine, theirs = asdict(self), asdict(other)
        return Counts(**{name: mine[name] + theirs[name] for name in mine})


@dataclass(frozen=True, slots=True)
class Export:
    """An exported model.

    Attributes:
        module: the exported copy.
        counts: its selections.
        parameters: number of its parameters.
        parameters_used: those of modules that ran; leaves out the auxiliary heads of networks that have them.
        seconds: time of tracing, computing and pruning together.
    """

    module: nn.Module
    counts: Counts
    parameters: int
    parameters_used: int
    seconds: float


def export(model: nn.Module, inputs: tuple[Any, ...], mode: Mode = "index") -> Export:
    """Export a masked model with UPSCALE; the model is left as it is.

    Args:
        model: float32, in eval mode, with zeros where it is masked.
        inputs: its positional arguments, tensors only. UPSCALE counts for one image, so let the batch be 1.
        mode: how copies are made, and what is ordered.
            "index": `x[:, indices]` (its `is_not_ane=True`).
            "runs": concatenation of maximal runs (its default).
            "no_reorder": like "index", without reordering producers and consumers.
            "baseline": like "no_reorder", and ranges are copied as well. The paper's reference.

    Raises:
        PeerError: UPSCALE raised.
        ImportError: `apple-upscale` is not installed.
    """
    manager_class = importlib.import_module("upscale").PruningManager
    module = copy.deepcopy(model)
    reorder = mode in ("index", "runs")
    start = time.perf_counter()
    try:
        manager = manager_class(module).compute(list(inputs), reorder_producer=reorder, reorder_consumer=reorder)
        manager.prune(is_not_ane=mode != "runs", baseline=mode == "baseline")
        seconds = time.perf_counter() - start
        counts, used = _observe(module, inputs, baseline=mode == "baseline")
    # It checks little itself: a model out of its reach ends in whatever error comes first.
    except Exception as error:
        raise PeerError(f"{type(error).__name__}: {error}") from error
    total = sum(parameter.numel() for parameter in module.parameters())
    return Export(module, counts, total, used, seconds)


def parameters_used(model: nn.Module, inputs: tuple[Any, ...]) -> int:
    """Number of parameters of the modules that run when `model` is called on `inputs`."""
    return _observe(model, inputs, baseline=False)[1]


@torch.no_grad()
def _observe(module: nn.Module, inputs: tuple[Any, ...], *, baseline: bool) -> tuple[Counts, int]:
    """Selections made, and parameters of the modules called, in one forward pass."""
    counted: list[Counts] = []
    called: dict[int, int] = {}

    def on_call(child: nn.Module, arguments: tuple[Any, ...], output: object) -> None:
        called.update({id(p): p.numel() for p in child.parameters(recurse=False)})
        if type(child).__name__ == "Subselect" and isinstance(output, Tensor):
            counted.append(_count(vars(child), arguments[0], output, baseline=baseline))

    with _hooked(module, on_call):
        module(*inputs)
    return sum(counted, Counts()), sum(called.values())


@contextmanager
def _hooked(module: nn.Module, hook: Any) -> Generator[None]:
    handles: list[RemovableHandle] = [child.register_forward_hook(hook) for child in module.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _count(selection: dict[str, Any], arriving: Tensor, taken: Tensor, *, baseline: bool) -> Counts:
    indices = selection["indices"]
    if baseline or not isinstance(indices, range):
        return Counts(1, 0, 0, 1, len(indices), taken.numel() * _FLOAT32_BYTES)
    whole = len(indices) == arriving.shape[selection["axis"]]
    return Counts(1, int(whole), int(not whole))
