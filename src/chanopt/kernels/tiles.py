"""The tiles of a module's kernels: measured where it runs, pinned in its graph, and so in its plan and its files."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from chanopt.errors import ChanoptError
from chanopt.kernels.call import KernelError
from chanopt.kernels.configs import Tile, tile_of
from chanopt.kernels.op import call_of
from chanopt.kernels.problem import Covered, Problem, coverage
from chanopt.kernels.tuner import Choice, Tuner, default_path

_KERNEL = torch.ops.chanopt.gather_conv2d.default
_CONFIG = 13
"""The argument of the operator that names a tile."""


def tune(
    module: nn.Module,
    inputs: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    tuner: Tuner | None = None,
) -> dict[str, Choice]:
    """Measure the tiles that each kernel of an optimised module may have, and pin the fastest in its graph.

    Where cuDNN was faster than all of them, after a copy or with zeros in the weight, that is pinned instead. The
    module then computes the same bits wherever the tile fits, whatever a heuristic would take there.
    :class:`chanopt.Plan` keeps the tiles, and what ``chanopt.save`` and torch.export write has them. A kernel that no
    covered call reaches, or that nobody could measure (without a GPU), stays with the heuristic.

    Args:
        module: what :func:`chanopt.optimize` made, on the device that it will run on; changed.
        inputs: example inputs, of the batch and sizes that matter.
        kwargs: keyword inputs, likewise.
        tuner: keeps what was measured; by default in the user's cache folder, by device and versions.

    Returns:
        By node of the graph, what was chosen and how long every candidate took.

    Raises:
        ChanoptError: the module has no graph.
    """
    if not isinstance(module, fx.GraphModule):
        raise ChanoptError(f"expected a module made by chanopt.optimize, found a {type(module).__name__}")
    if not _kernels(module):
        return {}
    given = inspect.signature(module.forward).bind(*inputs, **(kwargs or {}))
    given.apply_defaults()
    watched = _Watched(module)
    with torch.no_grad():
        watched.run(*given.arguments.values())
    tuner = tuner or Tuner(default_path(), _gpu(module))
    choices = {name: tuner.choose(problem) for name, problem in watched.problems.items()}
    pin(module, {name: choice.tile for name, choice in choices.items() if choice.measured and choice.tile})
    return choices


def pinned(module: fx.GraphModule) -> dict[str, Tile]:
    """The tiles that are pinned in a module, by node of its graph."""
    found = {node.name: node.args[_CONFIG] for node in _kernels(module) if len(node.args) > _CONFIG}
    return {name: tile_of(list(config)) for name, config in found.items() if config is not None}  # type: ignore[arg-type]


def pin(module: fx.GraphModule, chosen: Mapping[str, Tile]) -> None:
    """Pin tiles, by node of the graph; other kernels keep theirs.

    Raises:
        KernelError: a node is not there, or is no kernel.
    """
    kernels = {node.name: node for node in _kernels(module)}
    for name, config in chosen.items():
        if name not in kernels:
            raise KernelError(f"expected the tile of one of the kernels {sorted(kernels)}, found one of {name!r}")
        node = kernels[name]
        defaults = [argument.default_value for argument in _KERNEL._schema.arguments]  # pyright: ignore[reportPrivateUsage]
        node.args = (*node.args[:_CONFIG], *defaults[len(node.args) : _CONFIG], config.to_list())
    if chosen:
        module.recompile()


class _Watched(fx.Interpreter):
    """Runs a module and notes which problem each of its kernels has."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.problems: dict[str, Problem] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run a node; a kernel's arguments are noted first."""
        if n.target is _KERNEL:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            covered = coverage(call_of(*args, **kwargs)[0])
            if isinstance(covered, Covered):
                self.problems[n.name] = covered.problem
        return super().run_node(n)


def _kernels(module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in module.graph.nodes if node.op == "call_function" and node.target is _KERNEL]


def _gpu(module: fx.GraphModule) -> torch.device | None:
    devices = {tensor.device for tensor in (*module.parameters(), *module.buffers())}
    return next((device for device in devices if device.type == "cuda"), None)
