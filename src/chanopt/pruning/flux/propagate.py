"""Following zeros through a model, and cutting what they leave without effect."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage]

from chanopt.analysis.constants import Values, constants
from chanopt.analysis.demand import Demand, demand
from chanopt.analysis.weights import kernel_sums
from chanopt.api import capture, lower, verify
from chanopt.errors import ChanoptError
from chanopt.ir import Kind, Op, Param, Program
from chanopt.pruning import masks
from chanopt.pruning.slices import by_channel, element_mask

__all__ = ["desaturate", "merge_conv_bn", "prune_propagate", "rebn", "resize"]

Flags: TypeAlias = "npt.NDArray[np.bool_]"
Tensors: TypeAlias = "Mapping[str, nn.Parameter]"
Use: TypeAlias = "tuple[Op, Param]"


def prune_propagate(model: nn.Module, example_inputs: tuple[Any, ...]) -> nn.Module:
    """A copy of a model with zeros wherever zeros leave a weight without effect; the function stays the same.

    Forwards: a channel that is zero whatever the input makes the weights that multiply it zero; one that is another
    constant goes into the bias of its reader, where it has one and does not see a border. Backwards: a channel that no
    weight multiplies makes its filter, its bias and its batch norm's channel zero. Until nothing changes. The facts are
    the compiler's, so residual and concatenating models are followed too, and batch norms and biases are believed only
    where they are constant. A parameter that is used several times loses only what none of its uses needs.

    Args:
        model: in eval mode; live masks are kept (written in) first.
        example_inputs: as for :func:`chanopt.lower`.

    Raises:
        CaptureError, ChanoptError: as :func:`chanopt.lower`.
        VerifyError: the copy would not compute what the model does.
    """
    spread = masks.bake(copy.deepcopy(model))
    captured = capture(spread, example_inputs)  # holds the parameters themselves: lowered again, it sees the zeros
    program = lower(captured)
    tensors = dict(spread.named_parameters(remove_duplicate=False))
    while _forward(program, tensors) | _backward(program, tensors):
        program = lower(captured)
    verify(model, spread, example_inputs, trials=1)
    return spread


def _uses(program: Program, tensors: Tensors) -> list[tuple[nn.Parameter, list[Use]]]:
    """Every parameter of the model with all its uses, whatever names it has."""
    found: dict[int, tuple[nn.Parameter, list[Use]]] = {}
    for op in program.ops:
        for param in op.params:
            tensor = tensors.get(param.name)
            if tensor is not None:
                found.setdefault(id(tensor), (tensor, []))[1].append((op, param))
    return list(found.values())


def _zero(tensor: nn.Parameter, gone: Tensor) -> bool:
    """Zero entries of a parameter; whether any was not zero."""
    gone = gone.to(tensor.device)
    if not bool(tensor.detach()[gone].any()):
        return False
    with torch.no_grad():
        tensor[gone] = 0
    return True


def _along(flags: Flags, axis: int, tensor: Tensor) -> Tensor:
    """Flags of the slices of one axis as flags of all entries."""
    shape = [1] * tensor.ndim
    shape[axis] = len(flags)
    return torch.from_numpy(flags).reshape(shape).expand(tensor.shape)


# -- forwards ---------------------------------------------------------------------------------------------------------


def _forward(program: Program, tensors: Tensors) -> bool:
    """Zero the weights of constant channels; whether anything changed."""
    known = constants(program)
    uses = _uses(program, tensors)
    users = {id(tensor): {op.result for op, _ in where} for tensor, where in uses}
    changed = False
    for weight, where in uses:
        ops = [op for op, param in where if op.linear and param is op.args[1]]
        if len(ops) == len(where):
            changed |= _absorb(weight, ops, known, program, tensors, users)
    return changed


def _absorb(
    weight: nn.Parameter,
    ops: list[Op],
    known: Mapping[str, Values],
    program: Program,
    tensors: Tensors,
    users: Mapping[int, set[str]],
) -> bool:
    """Zero what multiplies constants at every use of a weight, after moving what they give into the biases."""
    given = [known[op.reads[0].value] for op in ops]
    biases = {id(bias): (bias, op) for op in ops if (bias := _bias(op, tensors)) is not None}
    folded = np.zeros(1, np.bool_)  # of whatever number of channels
    if _foldable(ops, tensors, users):
        agreed = np.all([values == given[0] for values in given], axis=0)  # one bias cannot hold two constants
        folded = agreed & (given[0] != 0)
    for bias, op in biases.values() if folded.any() else ():
        moved = kernel_sums(op, program)[:, folded] @ given[0][folded]
        with torch.no_grad():
            bias.add_(torch.from_numpy(moved).to(bias))
    parts = [_multiplying(op, (values == 0) | folded, weight) for op, values in zip(ops, given, strict=True)]
    return _zero(weight, torch.stack(parts).all(0))


def _bias(op: Op, tensors: Tensors) -> nn.Parameter | None:
    return tensors.get(op.args[2].name) if isinstance(op.args[2], Param) else None


def _foldable(ops: list[Op], tensors: Tensors, users: Mapping[int, set[str]]) -> bool:
    """Whether what a constant gives can go into the biases of all these uses of a weight, and reaches nobody else."""
    results = {op.result for op in ops}
    if len({(op.args[1].out, op.args[1].inn) for op in ops}) > 1:
        return False
    for op in ops:
        bias = _bias(op, tensors)
        if bias is None or op.border or op.kind is not Kind.MIX or not users[id(bias)] <= results:
            return False
    return True


def _multiplying(op: Op, gone: Flags, weight: Tensor) -> Tensor:
    """The entries of a weight that multiply these channels at one use."""
    param = cast(Param, op.args[1])
    if param.inn is None:  # depthwise: row o multiplies channel index[o]
        return _along(gone[op.reads[0].index.array], param.out or 0, weight)
    if op.kind is Kind.MIX:
        return _along(gone, param.inn, weight)
    rows = weight.shape[0] // op.groups
    table = torch.from_numpy(gone.reshape(op.groups, -1)).repeat_interleave(rows, 0)
    return table.reshape(*table.shape, *[1] * (weight.ndim - 2)).expand(weight.shape)


# -- backwards --------------------------------------------------------------------------------------------------------


def _backward(program: Program, tensors: Tensors) -> bool:
    """Zero what makes channels that nobody needs; whether anything changed."""
    wanted = demand(program)
    changed = False
    for tensor, where in _uses(program, tensors):
        parts = [_making(op, param, wanted, tensor) for op, param in where]
        idle = [part for part in parts if part is not None]
        if len(idle) == len(parts):
            changed |= _zero(tensor, torch.stack(idle).all(0))
    return changed


def _making(op: Op, param: Param, wanted: Demand, tensor: Tensor) -> Tensor | None:
    """The entries of a parameter that make channels nobody needs at one use; None where that is not known."""
    norm = "batch_norm" in op.target
    if param.out is None or op.result not in wanted.live or not (norm or op.linear):
        return None
    return _along(~wanted.live[op.result], param.out, tensor)


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
