"""How much a network suffers from pruning one layer at a time (Han et al., 2015, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from tqdm.auto import tqdm

from chanopt.compare import copied
from chanopt.errors import ScheduleError
from chanopt.pruning.distiller.components import Moment, Names, Pruner, Sight
from chanopt.pruning.distiller.elements import SparsityLevelParameterPruner
from chanopt.pruning.distiller.ranked import L1RankedStructureParameterPruner
from chanopt.pruning.distiller.summaries import write_csv

Measured = tuple[float, float, float]
"""Top-1 accuracy, top-5 accuracy, loss."""

Sensitivities = dict[str, dict[float, Measured]]
"""By parameter name and sparsity."""

Structure = Literal["element", "filter", "channel"]
_GROUPS = {"filter": "Filters", "channel": "Channels"}
_DIMS = {"element": (2, 4), "filter": (4,), "channel": (4,)}


def perform_sensitivity_analysis(
    model: nn.Module,
    parameters: Iterable[str],
    sparsities: Iterable[float],
    evaluate: Callable[[nn.Module], Measured],
    group: Structure = "element",
    *,
    progress: bool = True,
) -> Sensitivities:
    """Prune one parameter to one sparsity, measure, and put it back; for all of both.

    Args:
        model: a trained network; not changed.
        parameters: names; those of other than two or four dimensions (four for structures) are left out.
        sparsities: fractions.
        evaluate: measures a network.
        group: what is pruned.
        progress: whether to show a progress bar.

    Raises:
        ScheduleError: no such parameter, or no such group.
    """
    if group not in _DIMS:
        raise ScheduleError(f"expected group to be element, filter or channel, found {group!r}")
    trial = copied(model)
    weights = dict(trial.named_parameters())
    names = [name for name in map(Names(tuple(weights)).find, parameters) if weights[name].dim() in _DIMS[group]]
    found: Sensitivities = {name: {} for name in names}
    levels = [float(level) for level in sparsities]
    for name, level in tqdm([(n, s) for n in names for s in levels], desc="sensitivity", disable=not progress):
        before = weights[name].detach().clone()
        with torch.no_grad():
            for mask in _pruner(name, level, group).masks(Sight(trial, weights, {}, Moment(0, (0,), 1))).values():
                weights[name].mul_(mask)
            found[name][level] = evaluate(trial)
            weights[name].copy_(before)
    return found


def _pruner(name: str, level: float, group: Structure) -> Pruner:
    if group == "element":
        return SparsityLevelParameterPruner(levels={name: level})
    return L1RankedStructureParameterPruner(weights=[name], group_type=_GROUPS[group], desired_sparsity=level)


def sensitivities_to_csv(sensitivities: Mapping[str, Mapping[float, Measured]], path: str | Path) -> None:
    """Write a line for every parameter and sparsity: parameter, sparsity, top1, top5, loss."""
    write_csv(
        [
            {"parameter": name, "sparsity": level, **dict(zip(("top1", "top5", "loss"), measured, strict=True))}
            for name, levels in sensitivities.items()
            for level, measured in levels.items()
        ],
        path,
    )


def sensitivities_to_png(sensitivities: Mapping[str, Mapping[float, Measured]], path: str | Path) -> None:
    """Draw top-5 accuracy over sparsity, a line a parameter.

    Raises:
        ScheduleError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ScheduleError("expected matplotlib for a picture, found none; pip install 'chanopt[report]'") from error
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, levels in sensitivities.items():
        axes.plot(list(levels), [measured[1] for measured in levels.values()], marker="o", label=name)
    axes.set(xlabel="sparsity", ylabel="top-5 accuracy", title="Sensitivity to pruning")
    if sensitivities:
        axes.legend(fontsize="small")
    figure.savefig(path)
