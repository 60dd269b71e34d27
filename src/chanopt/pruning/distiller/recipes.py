"""Thinning recipes: what to cut out of which tensor, and which numbers of which module change.

A recipe can be written as JSON, kept with a checkpoint, and replayed on the dense network, optimizer state included.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from chanopt.errors import LoadError, ScheduleError
from chanopt.pruning.distiller.scheduler import CompressionScheduler, ParameterMasker

_FORMAT = "chanopt thinning recipe"
_CHECKPOINT = "chanopt thinned checkpoint"
_VERSION = 1


@dataclass(frozen=True, slots=True)
class Directive:
    """Keep entries of one dimension of a tensor.

    Attributes:
        dim: the dimension.
        index: what is kept, ascending.
        view: if given, the tensor is seen in this shape while it is cut (a linear layer behind h x w pixels: its
            columns by channel, row and column of pixels).
        flat: and gets this shape afterwards.
    """

    dim: int
    index: tuple[int, ...]
    view: tuple[int, ...] | None = None
    flat: tuple[int, ...] | None = None

    def cut(self, tensor: Tensor) -> Tensor:
        """The entries of a tensor that are kept."""
        seen = tensor if self.view is None else tensor.reshape(self.view)
        kept = seen.index_select(self.dim, torch.tensor(self.index, device=tensor.device))
        return kept if self.flat is None else kept.reshape(self.flat)

    def fits(self, tensor: Tensor) -> bool:
        """Whether a tensor can be cut so."""
        shape = tuple(tensor.shape) if self.view is None else self.view
        return math.prod(shape) == tensor.numel() and self.dim < len(shape) and max(self.index) < shape[self.dim]

    def to_list(self) -> list[Any]:
        """``[dim, index]`` or ``[dim, index, view, flat]``."""
        short = [self.dim, list(self.index)]
        return short if self.view is None or self.flat is None else [*short, list(self.view), list(self.flat)]

    @classmethod
    def from_list(cls, parts: list[Any]) -> Directive:
        """What :meth:`to_list` writes."""
        dim, index, *shapes = parts
        return cls(int(dim), tuple(map(int, index)), *(tuple(map(int, shape)) for shape in shapes))


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to thin a network.

    Attributes:
        modules: by module name, attributes and their new numbers (``out_channels: 5``) or, for the buffers of a batch
            norm, what is kept of them.
        parameters: by parameter name, what is kept, one directive after the other.
    """

    modules: Mapping[str, Mapping[str, int | Directive]] = field(default_factory=dict)
    parameters: Mapping[str, tuple[Directive, ...]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.modules or self.parameters)

    def to_json(self) -> str:
        """The text that :meth:`from_json` reads."""
        modules = {
            name: {key: item.to_list() if isinstance(item, Directive) else item for key, item in attributes.items()}
            for name, attributes in self.modules.items()
        }
        parameters = {name: [one.to_list() for one in directives] for name, directives in self.parameters.items()}
        return json.dumps({"format": _FORMAT, "version": _VERSION, "modules": modules, "parameters": parameters})

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Read a recipe.

        Raises:
            LoadError: the text is no recipe, or one of a newer version.
        """
        try:
            data = json.loads(text)
            _require_format(data, _FORMAT)
            modules = {
                name: {k: Directive.from_list(v) if isinstance(v, list) else int(v) for k, v in attributes.items()}
                for name, attributes in data["modules"].items()
            }
            parameters = {n: tuple(map(Directive.from_list, found)) for n, found in data["parameters"].items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise LoadError(f"expected the JSON text of a thinning recipe, found {text[:40]!r}...") from error
        return cls(modules, parameters)


def _require_format(data: Any, expected: str) -> None:
    found = data.get("format") if isinstance(data, Mapping) else None
    if not isinstance(data, Mapping) or found != expected:
        raise LoadError(f"expected a {expected}, found {found or type(data).__name__!r}")
    if data.get("version", 0) > _VERSION:
        raise LoadError(
            f"expected a {expected} of version {_VERSION} or older, found {data['version']}; update chanopt"
        )


# -- applying -----------------------------------------------------------------------------------------------------


def apply_recipe(
    model: nn.Module,
    recipe: Recipe,
    optimizer: Optimizer | None = None,
    masks: Mapping[str, ParameterMasker] | None = None,
) -> None:
    """Cut a network in place. Its parameters stay the same objects, so its optimizer goes on with them.

    Args:
        model: the network; nothing is changed if the recipe is for another one.
        recipe: what to cut.
        optimizer: its state is cut along wherever it has a tensor of the parameter's shape (SGD's momentum, Adam's
            moments); gradients are, too.
        masks: maskers by parameter name, cut along.

    Raises:
        LoadError: the recipe is not for this network.
    """
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    _require_fitting(recipe, modules, parameters)
    for name, attributes in recipe.modules.items():
        for key, item in attributes.items():
            new = item.cut(getattr(modules[name], key)) if isinstance(item, Directive) else item
            setattr(modules[name], key, new)
    for name, directives in recipe.parameters.items():
        for directive in directives:
            _cut(parameters[name], directive, optimizer, masks[name] if masks else None)
    model.__dict__.setdefault("thinning_recipes", []).append(recipe)


def _require_fitting(recipe: Recipe, modules: Mapping[str, nn.Module], parameters: Mapping[str, Tensor]) -> None:
    for name, attributes in recipe.modules.items():
        for key, item in attributes.items():
            found = getattr(modules.get(name), key, None)
            if found is None or (isinstance(item, Directive) and not item.fits(found)):
                raise LoadError(
                    f"expected a module {name!r} whose {key} can be cut as the recipe says, found {found!r}"
                )
    for name, directives in recipe.parameters.items():
        if name not in parameters or not directives[0].fits(parameters[name]):
            found = tuple(parameters[name].shape) if name in parameters else None
            raise LoadError(
                f"expected a parameter {name!r} that can be cut as the recipe says, found shape {found}; "
                "is the network thinned already?"
            )


def _cut(
    parameter: nn.Parameter, directive: Directive, optimizer: Optimizer | None, masker: ParameterMasker | None
) -> None:
    shape = parameter.shape
    if masker is not None and masker.mask is not None:
        masker.mask = directive.cut(masker.mask)
    state = optimizer.state.get(parameter, {}) if optimizer is not None else {}
    for key, item in list(state.items()):
        if isinstance(item, Tensor) and item.shape == shape and item.dim():
            state[key] = directive.cut(item)
    gradient = parameter.grad
    parameter.grad = None  # a gradient must have the parameter's shape at every moment
    _reshape(parameter, directive.cut(parameter.data))
    if gradient is not None:
        parameter.grad = directive.cut(gradient)


def _reshape(parameter: nn.Parameter, data: Tensor) -> None:
    """Give a parameter data of another shape, also while a graph of it lives (the last loss of a training loop).

    Autograd remembers the old shape as long as such a graph does, unless the type changes in between.
    """
    parameter.data = data.to(torch.float32 if data.dtype == torch.float64 else torch.float64)
    parameter.data = data


def recipes_of(model: nn.Module) -> list[Recipe]:
    """The recipes that were applied to a network, in order."""
    return list(model.__dict__.get("thinning_recipes", []))


# -- checkpoints --------------------------------------------------------------------------------------------------


def save_checkpoint(
    path: str | Path,
    model: nn.Module,
    scheduler: CompressionScheduler | None = None,
    optimizer: Optimizer | None = None,
    epoch: int = 0,
) -> None:
    """Save a network, thinned or not, with its recipes, masks and optimizer."""
    torch.save(
        {
            "format": _CHECKPOINT,
            "version": _VERSION,
            "epoch": epoch,
            "recipes": [recipe.to_json() for recipe in recipes_of(model)],
            "model": model.state_dict(),
            "masks": None if scheduler is None else scheduler.state_dict(),
            "optimizer": None if optimizer is None else optimizer.state_dict(),
        },
        path,
    )


def load_checkpoint(
    path: str | Path,
    model: nn.Module,
    scheduler: CompressionScheduler | None = None,
    optimizer: Optimizer | None = None,
) -> int:
    """Load a checkpoint into a dense network: thin it by its recipes, then load the weights. Nothing is executed.

    Returns:
        The epoch that was saved.

    Raises:
        LoadError: the file is no such checkpoint, or not of this network.
        ScheduleError: the scheduler is for another network.
    """
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise LoadError(f"expected a checkpoint in {path}, found {type(error).__name__}") from error
    _require_format(data, _CHECKPOINT)
    if scheduler is not None and scheduler.model is not model:
        raise ScheduleError("expected the scheduler of the network that is loaded, found that of another")
    for text in data["recipes"]:
        apply_recipe(model, Recipe.from_json(text), optimizer, scheduler.masks if scheduler else None)
    try:
        model.load_state_dict(data["model"])
    except RuntimeError as error:
        raise LoadError(
            f"expected a checkpoint of {type(model).__name__}, found {' '.join(str(error).split())[:200]}"
        ) from error
    if scheduler is not None and data["masks"] is not None:
        scheduler.load_state_dict(data["masks"])
    if optimizer is not None and data["optimizer"] is not None:
        optimizer.load_state_dict(data["optimizer"])
    return int(data["epoch"])
