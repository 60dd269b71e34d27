"""What a module really does in one eager run: copies, multiplications in three conventions, peak memory.

Copies are seen twice, by a dispatch mode (every operator with its tensors) and by torch's profiler (every operator
that the dispatcher starts, those inside a convolution too), and compared with the plan of the arm.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.arms import Copies

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Macs:
    """Multiplications of convolutions and of linear layers with stored weights, for the example inputs.

    Attributes:
        dense: output size x weights that an output reads, zeros too (Distiller's summaries: volume of the output
            x input channels x kernel / groups).
        exact: one for every weight other than zero at every output position.
        flux: as the Flux pruning tutorial counts them (compute_dot_prods of its count_macs.jl): filters that are
            zero count nothing, other zeros are subtracted once instead of once per position.
        flux_adds: the additions that it counts beside them.
    """

    dense: int = 0
    exact: int = 0
    flux: int = 0
    flux_adds: int = 0

    def __add__(self, other: Macs) -> Macs:
        return Macs(
            self.dense + other.dense,
            self.exact + other.exact,
            self.flux + other.flux,
            self.flux_adds + other.flux_adds,
        )


@dataclass(frozen=True, slots=True)
class Observed:
    """One eager run.

    Attributes:
        copies: selections of channels that materialise memory.
        relayouts, relayout_bytes: changes of memory format or element type, and clones.
        concats, concat_bytes: concatenations and what they write.
        macs: multiplications.
        peak_bytes: most bytes alive at once in what the run makes (inputs and parameters apart).
    """

    copies: Copies
    relayouts: int
    relayout_bytes: int
    concats: int
    concat_bytes: int
    macs: Macs
    peak_bytes: int


def observe(module: nn.Module, inputs: tuple[Any, ...]) -> Observed:
    """Run a module once, eagerly, and see what it does."""
    watch = _Watch(module, inputs)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one fused operator would hide the products of attention
    try:
        with torch.no_grad(), watch:
            module(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return watch.observed()


class _Watch(TorchDispatchMode):
    """Sees every operator below autograd, with its operands and results."""

    def __init__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        super().__init__()
        state = [*module.parameters(), *module.buffers(), *_tensors(inputs)]
        self.state = {tensor.untyped_storage().data_ptr() for tensor in state}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.selected: list[Tensor] = []
        self.copies = Copies()
        self.counts = {"relayouts": 0, "concats": 0}
        self.bytes = {"relayouts": 0, "concats": 0}
        self.macs = Macs()
        self.peak = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self._one(func, args, result)
        for tensor in _tensors(result):
            self._hold(tensor)
        return result

    def _one(self, func: Any, args: tuple[Any, ...], result: Tensor) -> None:
        if func in _SELECTIONS and self._is_made(args[0]):
            axis = _selected_axis(args[0], result)
            if axis is not None:
                self.copies += Copies(1, result.shape[axis], _size(result))
        elif func in _RELAYOUTS and self._is_made(args[0]):
            self._count("relayouts", result)
        elif func in _CONCATS and any(map(self._is_made, args[0])):
            self._count("concats", result)
        elif func in _PRODUCTS:
            self.macs += _PRODUCTS[func](self, args, result)

    def _count(self, what: str, result: Tensor) -> None:
        self.counts[what] += 1
        self.bytes[what] += _size(result)

    def _is_made(self, tensor: Tensor) -> bool:
        """Whether a floating-point tensor was made in this run, neither an input nor a parameter."""
        return tensor.is_floating_point() and not self.is_stored(tensor)

    def is_stored(self, tensor: Tensor) -> bool:
        """Whether a tensor is a parameter or an input, or a view of one."""
        return tensor.untyped_storage().data_ptr() in self.state

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self.state:
            return
        self.alive = {key: held for key, held in self.alive.items() if not held[0].expired()}
        held = StorageWeakRef(storage)
        self.alive[held.cdata] = (held, storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))

    def observed(self) -> Observed:
        return Observed(
            self.copies,
            self.counts["relayouts"],
            self.bytes["relayouts"],
            self.counts["concats"],
            self.bytes["concats"],
            self.macs,
            self.peak,
        )


def _tensors(tree: object) -> Iterator[Tensor]:
    return (leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor))


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _selected_axis(operand: Tensor, result: Tensor) -> int | None:
    """The axis along which a selection took part of a tensor; None if it is none (rows of boxes, say).

    A selection of as many entries as there are is one of channels too: in another order.
    """
    if operand.ndim != result.ndim or operand.ndim < 2:
        return None
    different = [axis for axis in range(operand.ndim) if operand.shape[axis] != result.shape[axis]]
    if len(different) > 1 or different == [0]:
        return None
    return different[0] if different else 1


def _convolution(watch: _Watch, args: tuple[Any, ...], result: Tensor) -> Macs:
    operand, weight, transposed = args[0], args[1], bool(args[6])
    spread = operand if transposed else result
    positions = spread.shape[0] * math.prod(spread.shape[2:])
    filters = weight.transpose(0, 1) if transposed else weight
    return _counted(filters.reshape(filters.shape[0], -1), positions, per_position=False)


def _affine(watch: _Watch, args: tuple[Any, ...], result: Tensor) -> Macs:
    """`addmm(bias, x, w)` or `mm(x, w)`, of which one factor is a stored weight."""
    left, right = args[-2:]
    if watch.is_stored(right):
        return _counted(right.t(), left.shape[0], per_position=True)
    return _counted(left, right.shape[1], per_position=True) if watch.is_stored(left) else Macs()


def _counted(filters: Tensor, positions: int, *, per_position: bool) -> Macs:
    """Count the products of filters, shape (outputs, weights of an output), at a number of positions.

    A linear layer at several positions is that layer several times; a convolution is one (see `Macs.flux`).
    """
    outputs, size = filters.shape
    zeros = int((filters == 0).sum())
    dead = int((filters == 0).all(1).sum())
    dense = positions * outputs * size
    spread = positions if per_position else 1
    return Macs(
        dense=dense,
        exact=positions * (outputs * size - zeros),
        flux=dense - dead * positions * size - spread * (zeros - dead * size),
        flux_adds=positions * (size - 1) * (outputs - dead),
    )


_SELECTIONS = frozenset({aten.index_select.default, aten.index.Tensor})
_RELAYOUTS = frozenset({aten.clone.default, aten._to_copy.default})
_CONCATS = frozenset({aten.cat.default})
_PRODUCTS: dict[Any, Callable[[_Watch, tuple[Any, ...], Tensor], Macs]] = {
    aten.convolution.default: _convolution,
    aten.addmm.default: _affine,
    aten.mm.default: _affine,
}


@dataclass(frozen=True, slots=True)
class Profiled:
    """What torch's profiler sees in one run.

    Attributes:
        selections, selected_bytes: calls of `index_select`, and what they write.
        hidden, hidden_bytes: copies that a convolution makes of its operands by itself, and what they write.
    """

    selections: int
    selected_bytes: int
    hidden: int
    hidden_bytes: int


os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its start and stop are no news; read when the profiler is first used


def profiled(module: nn.Module, inputs: tuple[Any, ...], itemsize: int = 4) -> Profiled:
    """Run a module once, eagerly, under the profiler.

    Args:
        module: what is run.
        inputs: its positional arguments.
        itemsize: bytes of an element; the profiler does not tell types.
    """
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        module(*inputs)
    events = list(seen.events() or ())
    selected = [_selected_elements(event) for event in events if event.name == "aten::index_select"]
    hidden = [math.prod(event.input_shapes[0]) for event in events if _is_hidden_copy(event)]
    return Profiled(len(selected), sum(selected) * itemsize, len(hidden), sum(hidden) * itemsize)


def _selected_elements(event: Any) -> int:
    shape, indices = list(event.input_shapes[0]), event.input_shapes[2]
    shape[int(event.concrete_inputs[1])] = math.prod(indices)
    return math.prod(shape)


def _is_hidden_copy(event: Any) -> bool:
    """Whether a copy makes an operand of a convolution contiguous."""
    if event.name != "aten::copy_":
        return False
    above = list(_above(event))
    return any(re.match(_CONVOLUTION, name) for name in above) and bool({"aten::contiguous", "aten::clone"} & {*above})


_CONVOLUTION = r"aten::(_?conv|mkldnn_conv|thnn_conv)"


def _above(event: Any) -> Iterator[str]:
    parent = event.cpu_parent
    while parent is not None:
        yield parent.name
        parent = parent.cpu_parent


__all__ = ["Macs", "Observed", "Profiled", "observe", "profiled"]
