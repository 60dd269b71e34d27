"""Following zeros through a model, and cutting what they leave without effect."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage]

from chanopt.analysis.constants import constants
from chanopt.analysis.demand import demand
from chanopt.analysis.weights import kernel_sums
from chanopt.api import capture, lower
from chanopt.errors import ChanoptError
from chanopt.ir import Kind, Op, Param, Program
from chanopt.pruning import masks
from chanopt.pruning.slices import by_channel, element_mask

__all__ = ["desaturate", "merge_conv_bn", "prune_propagate", "rebn", "resize"]

Flags = npt.NDArray[np.bool_]


def prune_propagate(model: nn.Module, example_inputs: tuple[Any, ...]) -> nn.Module:
    """A copy of a model with zeros wherever zeros leave a weight without effect; the function stays the same.

    Forwards: a channel that is zero whatever the input makes the weights that multiply it zero; one that is another
    constant goes into the bias of its reader, where it has one and does not see a border. Backwards: a channel that no
    weight multiplies makes its filter, its bias and its batch norm's channel zero. Until nothing changes. The facts are
    the compiler's, so residual and concatenating models are followed too, and batch norms and biases are believed only
    where they are constant.

    Args:
        model: in eval mode; live masks are kept (written in) first.
        example_inputs: as for :func:`chanopt.lower`.

    Raises:
        CaptureError, ChanoptError: as :func:`chanopt.lower`.
    """
    spread = masks.bake(copy.deepcopy(model))
    captured = capture(spread, example_inputs)  # holds the parameters themselves: lowered again, it sees the zeros
    program = lower(captured)
    tensors = dict(spread.named_parameters())
    while _forward(program, tensors) | _backward(program, tensors):
        program = lower(captured)
    return spread


def _forward(program: Program, tensors: dict[str, nn.Parameter]) -> bool:
    """Zero the weights of constant channels; whether anything changed."""
    known = constants(program)
    changed = False
    for op in program.ops:
        if op.linear and _weight(op) in tensors:
            changed |= _absorb(op, known[op.reads[0].value], program, tensors)
    return changed


def _absorb(op: Op, known: npt.NDArray[np.float64], program: Program, tensors: dict[str, nn.Parameter]) -> bool:
    """Zero the columns of constant channels of one layer, after moving what they give into the bias."""
    bias = op.args[2].name if isinstance(op.args[2], Param) else None
    foldable = bias in tensors and not op.border and op.kind is Kind.MIX
    gone = (known == 0) | (~np.isnan(known) if foldable else False)
    weight = tensors[_weight(op)]
    param = cast(Param, op.args[1])
    if param.inn is None:  # depthwise: row o multiplies channel index[o]
        return _zero(weight, param.out or 0, gone[op.reads[0].index.array])
    if op.kind is not Kind.MIX:
        return _zero_groups(op, weight, gone)
    given = np.nan_to_num(known)
    if foldable and bias is not None and (given[gone] != 0).any():
        moved = kernel_sums(op, program)[:, gone] @ given[gone]
        with torch.no_grad():
            tensors[bias].add_(torch.from_numpy(moved).to(tensors[bias]))
    return _zero(weight, param.inn, gone)


def _zero_groups(op: Op, weight: nn.Parameter, gone: Flags) -> bool:
    """Zero the columns of a grouped conv, group by group."""
    changed = False
    rows = weight.shape[0] // op.groups
    for group, part in enumerate(gone.reshape(op.groups, -1)):
        block = weight.detach()[group * rows : (group + 1) * rows]
        changed |= _zero(block, 1, part)
    return changed


def _backward(program: Program, tensors: dict[str, nn.Parameter]) -> bool:
    """Zero what makes channels that nobody needs; whether anything changed."""
    wanted = demand(program)
    changed = False
    for op in program.ops:
        if op.result not in wanted.live:
            continue
        idle = ~wanted.live[op.result]
        norm = "batch_norm" in op.target
        for param in op.params[:2] if op.linear or norm else ():
            if param.out is not None and param.name in tensors:
                changed |= _zero(tensors[param.name], param.out, idle)
    return changed


def _weight(op: Op) -> str:
    return cast(Param, op.args[1]).name


def _zero(tensor: Tensor, axis: int, gone: Flags) -> bool:
    """Zero slices of a tensor; whether any was not zero."""
    index = torch.from_numpy(np.flatnonzero(gone)).to(tensor.device)
    if not len(index) or not bool(tensor.detach().index_select(axis, index).any()):
        return False
    with torch.no_grad():
        tensor.index_fill_(axis, index, 0)
    return True


# -- resizing ---------------------------------------------------------------------------------------------------------


def resize(model: nn.Module) -> nn.Module:
    """A copy of the tutorial's model in which pointwise, depthwise, pointwise convs have lost their dead channels.

    As in the tutorial, only what lies between two pointwise convs is cut; the batch norms keep the statistics of the
    channels that stay, so the function is the same (the tutorial makes new ones). A channel goes only if its filter is
    zero and the second pointwise conv does not multiply it. :func:`chanopt.optimize` cuts everywhere, in any model.

    Args:
        model: a Sequential whose first child is a Sequential of convs, batch norms and activations.

    Raises:
        ChanoptError: another kind of model.
    """
    sized = masks.bake(copy.deepcopy(model))
    backbone = next(iter(sized.children()), None)
    if not isinstance(backbone, nn.Sequential):
        raise ChanoptError(
            f"expected a Sequential whose first child is a Sequential, found a {type(model).__name__}; "
            "chanopt.optimize resizes any model"
        )
    for first, middle, last, norms in _trios(backbone):
        dead = (by_channel(first.weight, first, "output") == 0).all(1)
        dead &= (by_channel(last.weight, last, "input") == 0).all(1)
        _cut(first, middle, last, norms, (~dead).nonzero().flatten())
    return sized


def _trios(backbone: nn.Sequential) -> Iterator[tuple[_ConvNd, _ConvNd, _ConvNd, list[_BatchNorm]]]:
    """Pointwise, depthwise, pointwise convs in a row, and the batch norms between them."""
    layers = list(backbone)
    places = [place for place, layer in enumerate(layers) if isinstance(layer, _ConvNd)]
    for start, middle, end in zip(places, places[1:], places[2:], strict=False):
        one, two, three = (cast(_ConvNd, layers[place]) for place in (start, middle, end))
        between = layers[start + 1 : middle] + layers[middle + 1 : end]
        pointwise = all(conv.groups == 1 and set(conv.kernel_size) == {1} for conv in (one, three))
        if pointwise and two.groups == two.in_channels == two.out_channels:
            yield one, two, three, [layer for layer in between if isinstance(layer, _BatchNorm)]


def _cut(first: _ConvNd, middle: _ConvNd, last: _ConvNd, norms: list[_BatchNorm], keep: Tensor) -> None:
    if not len(keep):
        return
    for tensor in ("weight", "bias"):
        _select(first, tensor, 0, keep)
        _select(middle, tensor, 0, keep)
    _select(last, "weight", 1, keep)
    for norm in norms:
        for tensor in ("weight", "bias", "running_mean", "running_var"):
            _select(norm, tensor, 0, keep)
        norm.num_features = len(keep)
    first.out_channels = middle.in_channels = middle.out_channels = middle.groups = last.in_channels = len(keep)


def _select(module: nn.Module, name: str, axis: int, keep: Tensor) -> None:
    tensor = getattr(module, name)
    if tensor is None:
        return
    part = tensor.detach().index_select(axis, keep.to(tensor.device))
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(name, nn.Parameter(part, tensor.requires_grad))
    else:
        module.register_buffer(name, part)


# -- batch norms and values -------------------------------------------------------------------------------------------


def desaturate(model: nn.Module) -> nn.Module:
    """A copy of a model with all parameters clamped to [-1, 1]."""
    clamped = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in clamped.parameters():
            parameter.clamp_(-1, 1)
    return clamped


def merge_conv_bn(model: nn.Module, *, exact: bool = True) -> nn.Module:
    """A copy of a model whose batch norms behind convs in a Sequential have gone into these.

    Args:
        model: the model.
        exact: with the batch norm's epsilon; the tutorial divides by sqrt(var) alone.
    """
    merged = masks.bake(copy.deepcopy(model))
    for chain in [module for module in merged.modules() if isinstance(module, nn.Sequential)]:
        layers = list(chain)
        for place in range(len(layers) - 2, -1, -1):
            conv, norm = layers[place], layers[place + 1]
            if isinstance(conv, _ConvNd) and isinstance(norm, _BatchNorm) and norm.running_var is not None:
                _merge(conv, norm, norm.eps if exact else 0.0)
                del layers[place + 1]
        _refill(chain, layers)
    return merged


def _merge(conv: _ConvNd, norm: _BatchNorm, eps: float) -> None:
    mean, var = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    gamma = norm.weight if norm.affine else torch.ones_like(mean)
    beta = norm.bias if norm.affine else torch.zeros_like(mean)
    scale = (gamma / torch.sqrt(var + eps)).detach()
    before = conv.bias.detach() if conv.bias is not None else torch.zeros_like(mean)
    with torch.no_grad():
        per_output = _spread(scale, conv)
        conv.weight.mul_(per_output)
    conv.bias = nn.Parameter(((before - mean) * scale + beta).detach())


def _spread(scale: Tensor, conv: _ConvNd) -> Tensor:
    """One number per output channel in the shape of the weight."""
    table = torch.zeros_like(conv.weight)
    for channel, value in enumerate(scale.tolist()):
        table[element_mask(conv, outputs=[channel]).to(table.device)] = value
    return table


def rebn(model: nn.Module) -> nn.Module:
    """A copy of a model with a new batch norm behind every conv in a Sequential."""
    made = copy.deepcopy(model)
    for chain in [module for module in made.modules() if isinstance(module, nn.Sequential)]:
        layers: list[nn.Module] = []
        for layer in chain:
            layers.append(layer)
            if isinstance(layer, _ConvNd):
                layers.append(_NORMS[len(layer.kernel_size)](layer.out_channels).train(layer.training))
        _refill(chain, layers)
    return made


_NORMS: dict[int, type[_BatchNorm]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def _refill(chain: nn.Sequential, layers: list[nn.Module]) -> None:
    if len(layers) == len(chain):
        return
    for name in list(chain._modules):  # pyright: ignore[reportPrivateUsage]
        del chain._modules[name]  # pyright: ignore[reportPrivateUsage]
    for number, layer in enumerate(layers):
        chain.add_module(str(number), layer)
