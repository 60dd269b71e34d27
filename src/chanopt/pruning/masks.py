"""Masks that live in the model: re-parametrisations of weights, and of batch norms beside them.

A mask is put on a parameter with ``torch.nn.utils.parametrize``: the parameter itself stays what the optimiser has,
the layer computes with its masked value. Three kinds differ in what happens to the masked entries (SMCP, ECCV 2022,
section 3): *hard* ones get no gradient, *permanent* ones are also zeroed for good, *soft* ones keep learning through a
straight-through gradient and may come back. :func:`chanopt.optimize` takes models with live masks as they are.
"""

# torch keeps parameters, buffers and hooks of a module in dicts that have no public name.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from chanopt.api import Mask
from chanopt.errors import MaskError
from chanopt.pruning.slices import by_channel, effective, element_mask, original, weighted

__all__ = [
    "DECAY",
    "Hard",
    "Permanent",
    "Rescale",
    "Scale",
    "Soft",
    "WeightMask",
    "apply",
    "attach",
    "bake",
    "current",
    "decay",
    "decay_hook",
    "load_state_dict",
    "masked",
    "norm_scale",
    "read",
    "rescale",
    "set_mask",
]

DECAY = 2e-4
"""SMCP's rate of the decay of pruned weights (SR-STE)."""


class WeightMask(nn.Module):
    """A mask on one parameter; subclasses say what becomes of what is masked.

    Attributes:
        mask: bool, shape of the parameter: which entries are kept.
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask.bool())
        self.register_buffer("kind", torch.tensor(_KINDS.index(type(self)), dtype=torch.uint8))

    def forward(self, weight: Tensor) -> Tensor:
        """The masked parameter. A masked entry is zero even where the stored one is not finite."""
        return torch.where(self.mask, weight, torch.zeros_like(weight))

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What is stored when the masked parameter is assigned: the value as it is."""
        return weight

    def take(self, mask: Tensor, stored: Tensor) -> None:
        """Take another mask, of any shape that expands to the parameter's; ``stored`` is the parameter."""
        self.mask.copy_(mask.to(self.mask.device).expand_as(self.mask))


class Hard(WeightMask):
    """Masked entries get no gradient, and come back with their old value when they are unmasked."""


class Permanent(WeightMask):
    """Masked entries get no gradient and are zeroed where they are stored: unmasking leaves zeros."""

    def take(self, mask: Tensor, stored: Tensor) -> None:
        """Take another mask; what was masked before stays masked."""
        super().take(self.mask & mask.to(self.mask.device), stored)
        with torch.no_grad():
            stored.mul_(self.mask)


class Soft(WeightMask):
    """Masked entries go on learning: the gradient passes straight through, as if nothing were masked."""

    def forward(self, weight: Tensor) -> Tensor:
        """The masked parameter, with the gradient of what is not masked."""
        if not torch.is_grad_enabled():
            return super().forward(weight)
        return cast(Tensor, _Straight.apply(weight, self.mask))


class _Straight(torch.autograd.Function):
    """Masked forwards, as if nothing were masked backwards."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, weight, torch.zeros_like(weight))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


_KINDS: tuple[type[WeightMask], ...] = (Hard, Permanent, Soft)
_NAMES: dict[str, type[WeightMask]] = {"hard": Hard, "permanent": Permanent, "soft": Soft}


def attach(module: nn.Module, kind: type[WeightMask] = Hard, name: str = "weight") -> WeightMask:
    """Put a mask on a parameter of a module; the mask starts as (parameter != 0). A live mask is returned as it is.

    A mask of ``torch.nn.utils.prune`` is taken over.

    Raises:
        MaskError: the module has no such parameter, or a live mask of another kind.
    """
    live = masked(module, name)
    if live is not None:
        if type(live) is not kind:
            raise MaskError(
                f"expected a {kind.__name__} mask on {type(module).__name__}.{name}, found a {type(live).__name__} "
                "one; bake it first (chanopt.pruning.masks.bake)"
            )
        return live
    adopted = _adopt(module, name)
    stored = original(module, name)
    mask = kind((stored != 0) if adopted is None else adopted & (stored != 0 if kind is Permanent else True))
    if kind is Permanent:
        with torch.no_grad():
            stored.mul_(mask.mask)
    _register(module, name, mask)
    return mask


def _register(module: nn.Module, name: str, part: nn.Module) -> None:
    """Parametrise, in the mode the module is in: a new part in train mode would make the whole model look so."""
    _own_class(module)
    parametrize.register_parametrization(module, name, part)
    cast(nn.Module, module.parametrizations).train(module.training)


def _own_class(module: nn.Module) -> None:
    """Give a parametrised module a class of its own.

    torch keeps the parametrised names as properties of a class made for the module, and copy.deepcopy shares that
    class: to add or remove a name in a copy would add or remove it in what it was copied from.
    """
    if parametrize.is_parametrized(module):
        kind = type(module)
        names = {key: value for key, value in vars(kind).items() if key not in ("__dict__", "__weakref__")}
        cast(Any, module).__class__ = type(kind.__name__, kind.__bases__, names)


def _adopt(module: nn.Module, name: str) -> Tensor | None:
    """Turn a mask of torch.nn.utils.prune into a plain parameter and its mask."""
    stored, mask = module._parameters.get(f"{name}_orig"), module._buffers.get(f"{name}_mask")
    if stored is None or mask is None:
        return None
    for key, hook in list(module._forward_pre_hooks.items()):
        if getattr(hook, "_tensor_name", None) == name:
            del module._forward_pre_hooks[key]
    del module._parameters[f"{name}_orig"], module._buffers[f"{name}_mask"]
    vars(module).pop(name, None)
    module.register_parameter(name, stored)
    return mask.bool()


def masked(module: nn.Module, name: str = "weight") -> WeightMask | None:
    """The live mask of a parameter, or None."""
    if not parametrize.is_parametrized(module, name):
        return None
    chain = cast(Any, module.parametrizations)[name]
    return next((part for part in chain if isinstance(part, WeightMask)), None)


def current(module: nn.Module, name: str = "weight") -> Tensor:
    """The mask of a parameter, bool, of its shape: a live one, one of torch.nn.utils.prune, or where it is not zero."""
    live = masked(module, name)
    if live is not None:
        return live.mask
    other = module._buffers.get(f"{name}_mask")
    return other.bool() if other is not None else effective(module, name) != 0


def set_mask(module: nn.Module, mask: Tensor, name: str = "weight") -> None:
    """Change the live mask of a parameter.

    Args:
        module: the layer.
        mask: of any shape that expands to the parameter's; nonzero is kept.
        name: the parameter.

    Raises:
        MaskError: the shape does not expand, or the parameter has no live mask and the mask drops something.
    """
    stored, live = original(module, name), masked(module, name)
    try:
        wide = mask.bool().expand(stored.shape)
    except RuntimeError as error:
        raise MaskError(
            f"expected a mask that expands to {tuple(stored.shape)}, found {tuple(mask.shape)}: {error}"
        ) from error
    if live is not None:
        live.take(wide, stored)
    elif not bool(wide.all()):
        raise MaskError(
            f"expected {type(module).__name__}.{name} to have a live mask, found none: only a mask that keeps all can "
            "be set; attach one first (chanopt.pruning.masks.attach)"
        )


def bake(model: nn.Module) -> nn.Module:
    """Write every live mask and batch-norm scale of a model into its parameters and remove them; returns the model.

    The parameters stay the same objects, so an optimiser goes on with them; nothing protects the zeros any more.
    """
    for module in model.modules():
        for name in [name for name, part in _live(module) if isinstance(part, WeightMask | Scale)]:
            _own_class(module)
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    return model


def _live(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The parametrisations of a module: the parameter's name and each part of its chain."""
    if not parametrize.is_parametrized(module):
        return
    for name, chain in list(cast(nn.ModuleDict, module.parametrizations).items()):
        for part in cast(Any, chain):
            yield name, part


# -- masks of whole channels ------------------------------------------------------------------------------------------


def apply(model: nn.Module, masks: Mapping[str, Mask], how: str = "zeros") -> nn.Module:
    """Put masks by module name into a model, in place; returns the model.

    What a mask of before has dropped stays dropped: masks add up, live ones as zeros do. :func:`set_mask` replaces one.

    Args:
        model: the model.
        masks: as :func:`chanopt.pruning.prune` returns them, and as :func:`chanopt.optimize` takes them.
        how: ``zeros`` writes zeros; ``hard``, ``permanent`` and ``soft`` put live masks on weight and bias.

    Raises:
        MaskError: no such layer, or a channel out of range.
    """
    if how != "zeros" and how not in _NAMES:
        raise MaskError(f"expected one of zeros, {', '.join(_NAMES)}, found {how!r}")
    for name, mask in masks.items():
        module = weighted(model, name)
        keep = element_mask(module, mask.inputs, mask.outputs)
        _put(module, "weight", keep, how)
        if mask.outputs is not None and module.bias is not None:
            flags = torch.zeros(len(module.bias), dtype=torch.bool)
            flags[sorted(int(channel) for channel in mask.outputs)] = True
            _put(module, "bias", flags, how)
    return model


def _put(module: nn.Module, name: str, keep: Tensor, how: str) -> None:
    if how == "zeros":
        stored = original(module, name)
        with torch.no_grad():
            stored.mul_(keep.to(stored.device))
        return
    own = masked(module, name) is not None or f"{name}_mask" in module._buffers
    before = current(module, name) if own else None
    attach(module, _NAMES[how], name)
    set_mask(module, keep if before is None else keep.to(before.device) & before, name)


def read(model: nn.Module) -> dict[str, Mask]:
    """The masks that a model has: of live masks, of ``torch.nn.utils.prune``, or of zeros written by hand.

    An input channel whose weights are all zero is dropped, and so is an output channel whose bias is zero too (with a
    bias it is a constant, which is not the same function). Layers without any are left out.
    """
    found: dict[str, Mask] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | _ConvNd) or not _has_weight(module):
            continue
        weight = effective(module)
        alive = (by_channel(weight, module, "output") != 0).any(1)
        if module.bias is not None:
            alive |= effective(module, "bias") != 0
        kept = (_kept((by_channel(weight, module, "input") != 0).any(1)), _kept(alive))
        if kept != (None, None):
            found[name] = Mask(*kept)
    return found


def _has_weight(module: nn.Module) -> bool:
    return isinstance(getattr(module, "weight", None), Tensor)


def _kept(alive: Tensor) -> tuple[int, ...] | None:
    return None if bool(alive.all()) else tuple(alive.nonzero().flatten().tolist())


def load_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Load the state of a masked model into one that may not have the masks yet; returns the model.

    Raises:
        RuntimeError: as ``model.load_state_dict``.
        MaskError: a mask of a module that does not exist.
    """
    modules = dict(model.named_modules())
    for key, value in state.items():
        owner, found, rest = key.rpartition("parametrizations.")
        name, _, leaf = rest.partition(".")
        if not found or leaf not in ("0.kind", "0.scale"):
            continue
        module = modules.get(owner.rstrip("."))
        if module is None:
            raise MaskError(f"expected a module {owner.rstrip('.')!r} for a mask, found none in this model")
        if leaf == "0.scale":
            _scale_of(module)
        else:
            attach(module, _KINDS[int(value)], name)
    model.load_state_dict(dict(state))
    return model


# -- decay of what is pruned ------------------------------------------------------------------------------------------


def decay(model: nn.Module, rate: float = DECAY) -> None:
    """Add ``rate * w`` to the gradient of every masked entry, before an optimiser's step.

    Sparse-refined straight-through estimation (Zhou et al., ICLR 2021, section 4.3): pruned weights are drawn to zero
    instead of drifting while they are not seen. Parameters without a gradient are left alone.
    """
    for module in model.modules():
        for name, part in _live(module):
            stored = original(module, name) if isinstance(part, WeightMask) else None
            if stored is not None and stored.grad is not None and isinstance(part, WeightMask):
                stored.grad.add_(stored.detach() * ~part.mask, alpha=rate)


def decay_hook(model: nn.Module, rate: float = DECAY) -> Callable[..., None]:
    """:func:`decay` as a hook: ``optimizer.register_step_pre_hook(decay_hook(model))``."""

    def hook(*_: Any) -> None:
        decay(model, rate)

    return hook


# -- batch norm -------------------------------------------------------------------------------------------------------


class _Scaled(torch.autograd.Function):
    """s * gamma, whose gradient is divided by s: the step that gamma takes is what it would be without the scale."""

    @staticmethod
    def forward(ctx: Any, gamma: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return gamma * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        safe = torch.where(scale != 0, scale, torch.ones_like(scale))
        return torch.where(scale != 0, grads[0] / safe, torch.zeros_like(grads[0])), None


class Scale(nn.Module):
    """The scale of a batch norm's weight after its conv has lost inputs (SMCP, section 3.4).

    Attributes:
        scale: one number.
    """

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def forward(self, gamma: Tensor) -> Tensor:
        """The scaled weight."""
        scale = self.scale.to(gamma.dtype)
        if not torch.is_grad_enabled():
            return gamma * scale
        return cast(Tensor, _Scaled.apply(gamma, scale))

    def right_inverse(self, gamma: Tensor) -> Tensor:
        """What is stored when the weight is assigned: the value as it is."""
        return gamma


class Rescale(enum.Enum):
    """How a batch norm is scaled when the inputs of the conv before it change."""

    SKIP = "skip"
    BINARY = "binary"
    PRUNE_FRACTION = "prune_fraction"
    IMPORTANCE_FRACTION = "importance_fraction"


def norm_scale(kind: Rescale, kept: Tensor, importance: Tensor | None = None) -> float | None:
    """The scale for a conv whose inputs are kept as given; None where nothing is to change.

    Args:
        kind: see :class:`Rescale`.
        kept: bool, shape (input channels,).
        importance: shape (input channels,), for :attr:`Rescale.IMPORTANCE_FRACTION`.

    Raises:
        MaskError: the importance is missing or of another length.
    """
    if kind is Rescale.SKIP:
        return None
    if not bool(kept.any()):
        return 0.0
    if kind is Rescale.BINARY:
        return 1.0
    if kind is Rescale.PRUNE_FRACTION:
        return float(kept.double().mean())
    if importance is None or len(importance) != len(kept):
        raise MaskError(f"expected an importance for each of {len(kept)} input channels, found another number or none")
    total = float(importance.double().sum())
    return float(importance.double()[kept].sum()) / total if total else 0.0


def rescale(
    norm: nn.Module, kind: Rescale, kept: Tensor, importance: Tensor | None = None, *, changed: bool = True
) -> None:
    """Scale a batch norm for the mask of the conv before it.

    Args:
        norm: the batch norm.
        kind: see :class:`Rescale`.
        kept: bool, shape (input channels of the conv,).
        importance: shape (input channels of the conv,).
        changed: whether the conv's input mask has changed; if not, the scale stays.

    Raises:
        MaskError: as :func:`norm_scale`, or the module is no batch norm with a weight.
    """
    scale = norm_scale(kind, kept, importance) if changed else None
    if scale is not None:
        _scale_of(norm).scale.fill_(scale)


def _scale_of(norm: nn.Module) -> Scale:
    """The scale of a batch norm, put there if there is none."""
    if not isinstance(norm, _BatchNorm) or not _has_weight(norm):
        raise MaskError(f"expected a batch norm with a weight to scale, found a {type(norm).__name__}")
    live = next((part for name, part in _live(norm) if name == "weight" and isinstance(part, Scale)), None)
    if live is None:
        live = Scale().to(norm.weight.device)
        _register(norm, "weight", live)
    return live
