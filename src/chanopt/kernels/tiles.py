"""The tiles of a module's kernels: measured where it runs, pinned in its graph, and so in its plan and its files."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from chanopt.errors import ChanoptError
from chanopt.kernels.call import KernelError
from chanopt.kernels.configs import Tile, tile_of
from chanopt.kernels.op import call_of, under_autocast
from chanopt.kernels.problem import Covered, Problem, coverage
from chanopt.kernels.tuner import Choice, Tuner, default_path

_KERNEL = torch.ops.chanopt.gather_conv2d.default
_ARGUMENTS = _KERNEL._schema.arguments  # pyright: ignore[reportPrivateUsage]
_CONFIG = next(position for position, argument in enumerate(_ARGUMENTS) if argument.name == "config")


def tune(
    module: nn.Module,
    inputs: Sequence[Any] | Tensor,
    kwargs: Mapping[str, Any] | None = None,
    *,
    tuner: Tuner | None = None,
) -> dict[str, Choice]:
    """Measure the tiles that each gathering conv of an optimised module may have, and pin the fastest in its graph.

    Where cuDNN was faster than all of them, after a copy or with zeros in the weight, that is pinned instead.
    :class:`chanopt.Plan` keeps what is pinned, and what ``chanopt.save`` and torch.export write has it. A tile runs
    wherever it fits, the heuristic's elsewhere. A conv that no kernel covers, or that nobody could measure (without a
    GPU), stays as it is. What is measured is the graph: of a concat without copies (docs/targets.md) a conv alone.

    Args:
        module: what :func:`chanopt.optimize` made, on the device that it will run on; changed.
        inputs: example inputs, of the batch and sizes that matter; under autocast, if it will run so.
        kwargs: keyword inputs, likewise.
        tuner: keeps what was measured; by default in the user's cache folder, by device and versions.

    Returns:
        By node of the graph, what was chosen and how long every candidate took.

    Raises:
        ChanoptError: the module has no graph; one that was optimised in parts has one in each part.
        TypeError: the inputs are not those of the module.
    """
    if not isinstance(module, fx.GraphModule):
        parts = [name for name, part in module.named_modules() if name and isinstance(part, fx.GraphModule)]
        told = f", optimised in parts; tune these, one by one: {', '.join(parts)}" if parts else ""
        raise ChanoptError(f"expected a module made by chanopt.optimize, found a {type(module).__name__}{told}")
    if not _kernels(module):
        return {}
    inputs = (inputs,) if isinstance(inputs, Tensor) else inputs
    given = inspect.signature(module.forward).bind(*inputs, **(kwargs or {}))
    watched = _Watched(module)
    with torch.no_grad():
        watched.run(*given.arguments.values())
    tuner = tuner or Tuner(default_path(), _gpu(module))
    choices = {name: tuner.choose(problem) for name, problem in watched.problems.items()}
    pin(module, {name: choice.tile for name, choice in choices.items() if choice.measured})
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
        defaults = [argument.default_value for argument in _ARGUMENTS[len(node.args) : _CONFIG]]
        node.args = (*node.args[:_CONFIG], *defaults, config.to_list())
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
            call, _ = call_of(*args, **kwargs)
            covered = coverage(under_autocast(call, call.x.device.type))
            if isinstance(covered, Covered):
                self.problems[n.name] = covered.problem
        return super().run_node(n)


def _kernels(module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in module.graph.nodes if node.op == "call_function" and node.target is _KERNEL]


def _gpu(module: fx.GraphModule) -> torch.device | None:
    devices = {tensor.device for tensor in (*module.parameters(), *module.buffers())}
    return next((device for device in devices if device.type == "cuda"), None)
