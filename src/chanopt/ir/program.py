"""The channel-flow IR: Program, Value, Op, Read, Param (docs/ir.md has the grammar and the rules)."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from chanopt.errors import IRError
from chanopt.ir.index_map import IndexMap, Layout


class Kind(enum.Enum):
    """What an op does to channels (docs/ir.md has a line on each)."""

    SOURCE = "source"
    SINK = "sink"
    MIX = "mix"
    MAP = "map"
    JOIN = "join"
    CONCAT = "concat"
    SPLIT = "split"
    REINDEX = "reindex"
    GROUPED = "grouped"
    STATISTIC = "statistic"
    BARRIER = "barrier"


class Access(enum.Enum):
    """How an op takes the channels of one operand."""

    FLOW = "flow"  # result channel i comes from operand channel index[i]
    SET = "set"  # the op consumes a set of channels, in whatever order they lie
    ALL = "all"  # every logical channel in its logical order


class How(enum.Enum):
    """How the dialect computes an op, where it has more than one way."""

    OWN = "own"  # the operator that the op stands for, on one range or on gathered channels
    PRODUCT = "product"  # a matrix product over strided memory
    RUNS = "runs"  # a sum of such products, one for each range that is read: nothing is copied
    FUSED = "fused"  # a kernel that gathers while it loads, in whole groups of channels
    INLINED = "inlined"  # within the kernel of the fused conv beside it


class Marker(enum.Enum):
    """A number in an op's arguments that is only known once the channels are cut."""

    CHANNELS = "$C"  # physical channels of the result
    GROUPS = "$G"  # groups of a grouped op


@dataclass(frozen=True, slots=True)
class Value:
    """One tensor of the program.

    Attributes:
        name: SSA name.
        dtype: the element type's name, e.g. ``float32``; ``int`` for a symbolic size.
        shape: logical sizes; a symbolic size is a string.
        axis: the channel axis, or None where the tensor has none that is known.
        layout: which channels exist and in which order; None when ``axis`` is None.
        channel_bytes: bytes of one channel for one inference of the example inputs.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    axis: int | None = None
    layout: Layout | None = None
    channel_bytes: int = 0

    @property
    def live(self) -> Layout:
        """The layout of a value that has a channel axis.

        Raises:
            IRError: the value has none.
        """
        if self.layout is None:
            raise IRError(f"expected %{self.name} to have a channel axis, found none")
        return self.layout


@dataclass(frozen=True, slots=True)
class Read:
    """One operand of an op.

    Attributes:
        value: name of the value read.
        access: see :class:`Access`.
        index: FLOW: the operand channel of each logical result channel (``fan`` entries each; ``ABSENT`` where the
            result channel does not come from this operand). SET: the logical operand channels that are consumed.
            ALL: empty.
        fan: FLOW: how many operand channels make one result channel (r*r for a pixel shuffle by r).
    """

    value: str
    access: Access
    index: IndexMap = field(default_factory=lambda: IndexMap(()))
    fan: int = 1


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter operand: a tensor of ``Program.weights``.

    Attributes:
        name: key in ``Program.weights``.
        out: the dimension that follows the result's channels, or None.
        inn: the dimension that follows the channels of the op's first read, or None.
        buffer: whether it is a buffer rather than a trainable parameter.
    """

    name: str
    out: int | None = None
    inn: int | None = None
    buffer: bool = False


Arg = Any  # Read | Param | Marker | literal | tuple of Arg: the argument tree of an op


@dataclass(frozen=True)
class Op:
    """One operation.

    Attributes:
        kind: what it does to channels.
        target: the operator it stands for, in the dialect's words, e.g. ``aten.conv2d.default``.
        args: positional arguments: reads, parameters, markers, literals, tuples of these.
        kwargs: keyword arguments as sorted pairs.
        result: name of the value it makes ("" for the sink).
        groups: GROUPED and STATISTIC: number of groups.
        block: the result exists in whole blocks of this many logical channels (49 after flattening 7x7, 2 after a
            depthwise conv with multiplier 2), each made of one operand channel.
        linear: ``args[:3]`` are (read, weight, bias or None) and the op is linear in the read.
        border: a constant channel other than zero does not give a constant contribution (zero padding, transposed
            conv, a padded average).
        how: in which of its ways it is computed.
        layer: the user's module, e.g. ``layer1.0.conv1``.
        source: the user's source line.
    """

    kind: Kind
    target: str
    args: tuple[Arg, ...]
    kwargs: tuple[tuple[str, Arg], ...] = ()
    result: str = ""
    groups: int = 1
    block: int = 1
    linear: bool = False
    border: bool = False
    how: How = How.OWN
    layer: str = ""
    source: str = ""

    def __iter__(self) -> Iterator[Read | Param]:
        return (leaf for leaf in leaves((self.args, self.kwargs)) if isinstance(leaf, Read | Param))

    @cached_property
    def reads(self) -> tuple[Read, ...]:
        """The value operands, in argument order."""
        return tuple(leaf for leaf in self if isinstance(leaf, Read))

    @cached_property
    def params(self) -> tuple[Param, ...]:
        """The parameter operands, in argument order."""
        return tuple(leaf for leaf in self if isinstance(leaf, Param))

    def map_args(self, change: Callable[[Any], Any]) -> Op:
        """The same op with ``change`` applied to every leaf of its arguments."""
        args, kwargs = map_leaves(self.args, change), map_leaves(self.kwargs, change)
        return self if (args, kwargs) == (self.args, self.kwargs) else replace(self, args=args, kwargs=kwargs)

    def label(self) -> str:
        """How messages name this op: its layer, else its result."""
        return self.layer or (f"%{self.result}" if self.result else self.target)


def leaves(tree: Arg) -> Iterator[Any]:
    """The leaves of an argument tree, left to right."""
    if isinstance(tree, tuple):
        for item in tree:
            yield from leaves(item)
    else:
        yield tree


def map_leaves(tree: Arg, change: Callable[[Any], Any]) -> Arg:
    """An argument tree with ``change`` applied to every leaf."""
    return tuple(map_leaves(item, change) for item in tree) if isinstance(tree, tuple) else change(tree)


@dataclass(frozen=True, slots=True)
class Refusal:
    """An operator that chanopt leaves as it is: nothing about its operands' channels may change.

    Attributes:
        op: the operator, e.g. ``aten.argmax.default``.
        layer: the user's module.
        source: the user's source line.
        reason: why.
    """

    op: str
    layer: str
    source: str
    reason: str


@dataclass(frozen=True, slots=True)
class Interface:
    """How the user calls the model: pytree structures of inputs and outputs, in torch's JSON form."""

    inputs: str
    outputs: str
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Window:
    """How a conv moves over its operand, a number for each of its dimensions.

    Attributes:
        kernel, stride, dilation: of the conv.
        padding: zeros on each side; where it is asked for so much that the size stays ("same"), on the first.
        lopsided: whether the last side of some dimension has one more.
        transposed: whether it is the operand that is spread over the result.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    lopsided: bool = False
    transposed: bool = False


class Dialect(Protocol):
    """What a program's targets mean. The frontend attaches one; the IR itself knows no operator."""

    @property
    def hints(self) -> Mapping[str, int]:
        """The sizes that symbolic sizes, and values that are sizes, had when the model was traced."""
        ...

    def emit(self, program: Program) -> nn.Module:
        """Build the module that computes ``program``."""
        ...

    def evaluate(self, op: Op, program: Program, operands: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Run one op on given tensors that hold all logical channels."""
        ...

    def is_product(self, op: Op) -> bool:
        """Whether a zero in one operand makes the result zero."""
        ...

    def is_neutral(self, op: Op, operand: int, values: npt.NDArray[np.float64]) -> bool:
        """Whether these constants in the given operand of a binary op leave the other operand unchanged."""
        ...

    def zero_factors(self, op: Op, program: Program) -> npt.NDArray[np.bool_] | None:
        """Shape (channels,): result channels that a zero in a parameter makes independent of the operands."""
        ...

    def affine(self, op: Op, program: Program) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]] | None:
        """(scale, shift) if the op is ``x * scale + shift`` per channel of its one read; float64, shape (channels,)."""
        ...

    def window(self, op: Op, program: Program) -> Window | None:
        """How a conv, also a transposed one, moves over its operand; None for another op."""
        ...

    def activation(self, op: Op) -> str:
        """What the kernels call this activation (``chanopt.kernels.ACTIVATIONS``); "" for another op."""
        ...

    def is_sum(self, op: Op) -> bool:
        """Whether the result is the sum of two operands."""
        ...


@dataclass(frozen=True)
class Program:
    """A model as channel flow: an SSA list of ops over values.

    Attributes:
        ops: in execution order; sources first, one sink last.
        values: every value by name.
        weights: parameters and buffers by name, never cut: what is cut is what ``to_module`` makes of them.
        interface: how the user calls the model.
        batch: example batch size, for figures.
        refusals: operators without a rule.
        channels_last: whether the example inputs were laid out channels last.
        target: what choices are made for: "cpu" or "cuda", with ":inductor" where that compiles the result.
        costs: seconds of a conv by the way it reads, for the passes; None for the analytic model. Not part of equality.
        dialect: what the targets mean; not part of equality.
    """

    ops: tuple[Op, ...]
    values: Mapping[str, Value]
    weights: Mapping[str, torch.Tensor] = field(compare=False, repr=False)
    interface: Interface = field(default_factory=lambda: Interface("", ""))
    batch: int = 1
    refusals: tuple[Refusal, ...] = ()
    channels_last: bool = False
    target: str = "cpu"
    dialect: Dialect | None = field(default=None, compare=False, repr=False)
    costs: Callable[..., float] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", MappingProxyType(dict(self.values)))
        object.__setattr__(self, "weights", MappingProxyType(dict(self.weights)))

    def __str__(self) -> str:
        from chanopt.ir.text import write

        return write(self)

    def verify(self) -> None:
        """Check every rule of the IR (listed in :func:`chanopt.ir.verify.verify`).

        Raises:
            IRError: the first rule that does not hold, with the op and its source line.
        """
        from chanopt.ir.verify import verify

        verify(self)

    def to_module(self) -> nn.Module:
        """The ``torch.fx.GraphModule`` that computes this program, with the channels physically cut.

        Raises:
            IRError: the program was parsed from text and has no weights or no dialect.
        """
        return self.known_dialect.emit(self)

    @property
    def known_dialect(self) -> Dialect:
        """The dialect.

        Raises:
            IRError: the program was parsed from text and has none.
        """
        if self.dialect is None:
            raise IRError("expected a program with a dialect, found one parsed from text alone; see Program.bind")
        return self.dialect

    def bind(self, like: Program) -> Program:
        """The same program with the weights and the dialect of another, e.g. after parsing its text."""
        return replace(self, weights=like.weights, dialect=like.dialect)

    def traced(self, value: str) -> tuple[int, ...]:
        """The sizes that a value had when the model was traced; 1 for a symbolic one of which that is not known."""
        hints = self.dialect.hints if self.dialect is not None else {}
        return tuple(hints.get(s, 1) if isinstance(s, str) else s for s in self.values[value].shape)

    def producer(self, value: str) -> Op:
        """The op that makes a value."""
        return next(op for op in self.ops if op.result == value)

    def uses(self) -> dict[str, list[tuple[Op, Read]]]:
        """Who reads each value, in execution order."""
        users: dict[str, list[tuple[Op, Read]]] = {name: [] for name in self.values}
        for op in self.ops:
            for read in op.reads:
                users[read.value].append((op, read))
        return users

    def evolve(
        self,
        *,
        ops: Iterable[Op] | None = None,
        values: Mapping[str, Value] | None = None,
        weights: Mapping[str, torch.Tensor] | None = None,
    ) -> Program:
        """A program with other ops, and with values and weights replaced by name; what nobody uses is dropped."""
        new_ops = tuple(self.ops if ops is None else ops)
        made = {op.result for op in new_ops}
        named = {param.name for op in new_ops for param in op.params}
        return replace(
            self,
            ops=new_ops,
            values={k: v for k, v in {**self.values, **(values or {})}.items() if k in made},
            weights={k: v for k, v in {**self.weights, **(weights or {})}.items() if k in named},
        )
