"""What a module really does in one eager run: copies, multiplications in three conventions, peak memory.

Copies are seen twice, by a dispatch mode (every operator with its tensors) and by torch's profiler (every operator
that the dispatcher starts, those inside a convolution too), and compared with the plan of the arm.

A selection of channels is, for both, what the arm's own code takes of a tensor made in the run by one list of indices
along one axis other than the first, which is the batch's (or the boxes'). It keeps the number of axes. Code is the
network's own, and counts for nothing here, where the innermost module that runs is of a class of the masked network:
a detector that keeps the best boxes of each image selects no channels. A concat of slices of one tensor is a selection
too (UPSCALE's default); the profiler does not tell what a concat joins and sees no such selection.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile, record_function
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


_NETWORKS, _ARMS = "benchmarks: code of the network", "benchmarks: code of the arm"
"""What the profiler shows around the operators of a module."""


@dataclass(slots=True)
class _Origin:
    """Whose code is running: the innermost module of `running` tells.

    Attributes:
        network: the masked network; None where all code counts as the arm's.
        running: the modules that run, as ranges that the profiler shows, with whose they are.
    """

    network: nn.Module | None
    running: list[tuple[str, record_function]] = field(default_factory=list[tuple[str, record_function]])

    @property
    def is_arms(self) -> bool:
        """Whether code of the arm runs, not of the network."""
        return not self.running or self.running[-1][0] == _ARMS

    @contextmanager
    def following(self, module: nn.Module) -> Generator[None]:
        """Keep `running` true while a module is called."""
        theirs = {type(part) for part in self.network.modules()} if self.network is not None else set()
        handles: list[Any] = []
        for part in module.modules() if theirs else ():
            handles.append(part.register_forward_pre_hook(self._entering(_NETWORKS if type(part) in theirs else _ARMS)))
            handles.append(part.register_forward_hook(self._left, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _entering(self, whose: str) -> Callable[..., None]:
        def enter(*_: object) -> None:
            self.running.append((whose, record_function(whose)))
            self.running[-1][1].__enter__()

        return enter

    def _left(self, *_: object) -> None:
        self.running.pop()[1].__exit__(None, None, None)


def observe(module: nn.Module, inputs: tuple[Any, ...], network: nn.Module | None = None) -> Observed:
    """Run a module once, eagerly, and see what it does.

    Args:
        module: what is run.
        inputs: its positional arguments.
        network: the masked network, whose own selections are none of channels; None: there are no such.
    """
    origin = _Origin(network)
    watch = _Watch(module, inputs, origin)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one fused operator would hide the products of attention
    try:
        with torch.no_grad(), origin.following(module), watch:
            module(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return watch.observed()


class _Watch(TorchDispatchMode):
    """Sees every operator below autograd, with its operands and results."""

    def __init__(self, module: nn.Module, inputs: tuple[Any, ...], origin: _Origin) -> None:
        super().__init__()
        self.origin = origin
        state = [*module.parameters(), *module.buffers(), *_tensors(inputs)]
        self.state = {tensor.untyped_storage().data_ptr() for tensor in state}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
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
        axis = self._selected_axis(func, args)
        if axis is not None:
            self.copies += Copies(1, result.shape[axis], _size(result))
        elif func in _RELAYOUTS and self._is_made(args[0]):
            self._count("relayouts", result)
        elif func in _CONCATS and any(map(self._is_made, args[0])):
            self._count("concats", result)
        elif func in _PRODUCTS:
            self.macs += _PRODUCTS[func](self, args, result)

    def _selected_axis(self, func: Any, args: tuple[Any, ...]) -> int | None:
        """The axis along which an operator selects channels; None if it selects none."""
        if func not in _SELECTIONS or not self.origin.is_arms:
            return None
        operand = args[0][0] if func in _CONCATS else args[0]
        axis = _SELECTIONS[func](args)
        return axis if axis is not None and axis % operand.ndim > 0 and self._is_made(operand) else None

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


def _axis_of_index_select(args: tuple[Any, ...]) -> int | None:
    return int(args[1])


def _axis_of_index(args: tuple[Any, ...]) -> int | None:
    """The axis of `x[:, indices]`; None where several axes are indexed at once, or the list is no list."""
    lists = [(axis, indices) for axis, indices in enumerate(args[1]) if indices is not None]
    return lists[0][0] if len(lists) == 1 and lists[0][1].ndim == 1 else None


def _axis_of_runs(args: tuple[Any, ...]) -> int | None:
    """The axis of a concat that joins views of one tensor, at least two; None for a concat of several tensors."""
    parts: Sequence[Tensor] = args[0]
    one = len({part.untyped_storage().data_ptr() for part in parts}) == 1
    return (int(args[1]) if len(args) > 1 else 0) if one and len(parts) > 1 else None


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


_RELAYOUTS = frozenset({aten.clone.default, aten._to_copy.default})
_CONCATS = frozenset({aten.cat.default})
_SELECTIONS: dict[Any, Callable[[tuple[Any, ...]], int | None]] = {
    aten.index_select.default: _axis_of_index_select,
    aten.index.Tensor: _axis_of_index,
    aten.cat.default: _axis_of_runs,
}
_PRODUCTS: dict[Any, Callable[[_Watch, tuple[Any, ...], Tensor], Macs]] = {
    aten.convolution.default: _convolution,
    aten.addmm.default: _affine,
    aten.mm.default: _affine,
}


@dataclass(frozen=True, slots=True)
class Profiled:
    """What torch's profiler sees in one run.

    Attributes:
        selections, channels, selected_bytes: selections of channels by an index, and what they write.
        hidden, hidden_bytes: copies that a convolution makes of its operands by itself, and what they write.
    """

    selections: int
    channels: int
    selected_bytes: int
    hidden: int
    hidden_bytes: int

    @property
    def copies(self) -> Copies:
        """Its selections, as `Observed` has them."""
        return Copies(self.selections, self.channels, self.selected_bytes)


os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its start and stop are no news; read when the profiler is first used


def profiled(
    module: nn.Module, inputs: tuple[Any, ...], itemsize: int = 4, network: nn.Module | None = None
) -> Profiled:
    """Run a module once, eagerly, under the profiler.

    Args:
        module: what is run.
        inputs: its positional arguments.
        itemsize: bytes of an element; the profiler does not tell types.
        network: as for `observe`.
    """
    with (
        torch.no_grad(),
        _Origin(network).following(module),
        profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen,
    ):
        module(*inputs)
    events = list(seen.events() or ())
    copies = sum((_selected(event, itemsize) for event in events if _is_arms(event)), Copies())
    hidden = [math.prod(event.input_shapes[0]) for event in events if _is_hidden_copy(event)]
    return Profiled(copies.copies, copies.channels, copies.bytes, len(hidden), sum(hidden) * itemsize)


def _is_arms(event: Any) -> bool:
    """Whether an operator was called by the arm's code: what `_Origin.is_arms` says in the run itself."""
    return next((name for name in _above(event) if name in (_ARMS, _NETWORKS)), _ARMS) == _ARMS


def _selected(event: Any, itemsize: int) -> Copies:
    """What an operator selects of channels; nothing if it does not."""
    taken = _PROFILED[event.name](event) if event.name in _PROFILED else None
    if taken is None:
        return Copies()
    axis, shape = taken
    return Copies(1, shape[axis], math.prod(shape) * itemsize) if axis > 0 else Copies()


def _taken_by_index_select(event: Any) -> tuple[int, list[int]] | None:
    """The axis and the shape of the result."""
    shape = list(event.input_shapes[0])
    axis = int(event.concrete_inputs[1]) % len(shape)
    shape[axis] = math.prod(event.input_shapes[2])
    return axis, shape


def _taken_by_index(event: Any) -> tuple[int, list[int]] | None:
    """The same for `x[:, indices]`, whose lists the profiler does not show.

    What it shows is how the kernel spreads its operand over the result: every axis that an index runs along has the
    stride 0.
    """
    operand = list(event.input_shapes[0])
    spread = [child.concrete_inputs for child in event.cpu_children if child.name == "aten::as_strided"]
    if not spread:
        return None
    shape, strides = list(spread[-1][1]), list(spread[-1][2])
    axes = [axis for axis, stride in enumerate(strides) if stride == 0]
    return (axes[0], shape) if len(axes) == 1 and len(shape) == len(operand) else None


_PROFILED: dict[str, Callable[[Any], tuple[int, list[int]] | None]] = {
    "aten::index_select": _taken_by_index_select,
    "aten::index": _taken_by_index,
}


def peak_allocated(call: Callable[..., object], inputs: tuple[Any, ...]) -> int:
    """Most bytes that a call has allocated at once on the CPU, as torch's profiler tells; for compiled modules too.

    What an operator needs inside (the buffers of a convolution) counts as well, other than in `Observed`.
    """
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call(*inputs)
    results: Any = seen.profiler.kineto_results if seen.profiler else None
    events: list[Any] = list(results.events()) if results else []
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(accumulate((size for _, size in changes), initial=0))


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


__all__ = ["Macs", "Observed", "Profiled", "observe", "peak_allocated", "profiled"]
