"""Concats without copies: what is joined is written where the concat would put it, one memory for all that begin alike.

Only for graphs with convs that gather while they load (``chanopt::gather_conv2d``), which can write into a slice of
memory and read one: on a CPU, operators that write into slices were no quicker than others and a concat, and Inductor,
given this form, copies as much as before. Counts of channels are read off the graph, not taken from the program: so
copies, edited graphs and graphs out of files have rooms as well.

A room is the memory of one concat, and of every other that joins the same tensors and fewer: DenseNet's layers each
join what all before them have made, and copy it once instead of once a layer (Pleiss et al., Memory-Efficient
Implementation of DenseNets, 2017, share memory so for training).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from itertools import accumulate, pairwise
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx

from chanopt.codegen.torch_names import OpOverload, is_mutable, parameters
from chanopt.kernels import GROUP
from chanopt.kernels.op import call_of

aten = torch.ops.aten
_CONV = torch.ops.chanopt.gather_conv2d.default

_OUT: dict[Any, tuple[Any, tuple[Any, ...]]] = {
    # relu has no form of its own that writes elsewhere, and is this one inside.
    aten.relu.default: (aten.clamp_min.out, (0,)),
    aten.relu_.default: (aten.clamp_min.out, (0,)),
    aten.relu6_.default: (aten.hardtanh.out, (0, 6)),
    aten.hardtanh_.default: (aten.hardtanh.out, ()),
    aten.silu_.default: (aten.silu.out, ()),
    aten.hardswish_.default: (aten.hardswish.out, ()),
    aten.hardsigmoid_.default: (aten.hardsigmoid.out, ()),
    aten.sigmoid_.default: (aten.sigmoid.out, ()),
    aten.leaky_relu_.default: (aten.leaky_relu.out, ()),
    aten.elu_.default: (aten.elu.out, ()),
    aten.add_.Tensor: (aten.add.out, ()),
}
"""By operator, the form that writes elsewhere, and the arguments that it wants besides. The result is as large as the
first operand."""
_CHANNELWISE = frozenset({*_OUT, aten.batch_norm.default, aten.max_pool2d.default, aten.avg_pool2d.default})
"""Operators whose result has the channels of their first operand."""
_MOST = 1024
"""Pieces of a room: concats of concats of the same could come to any number."""
_BROADCAST = frozenset({aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor})
"""Operators whose result has the channels of an operand that has more than one."""


@dataclass
class _Room:
    """Concats that share memory.

    Attributes:
        cats: by concat, how many of the pieces it joins; the longest comes first and joins all.
        pieces: what is joined.
        ends: where each piece begins, in channels, and where the last ends.
        own: the pieces that are made for this place alone, by operators that can write there.
    """

    cats: dict[fx.Node, int]
    pieces: tuple[fx.Node, ...]
    ends: tuple[int, ...]
    own: frozenset[fx.Node] = frozenset()


def write_into_rooms(module: fx.GraphModule) -> fx.Graph | None:
    """The module's graph with concats written by those who make what is joined; None if no copy is saved so.

    It computes the same, in channels last bit for bit, and cannot be differentiated. It raises :class:`UnfitError` for
    inputs at whose sizes, or types, what is joined does not fit together.
    """
    convs = module.graph.find_nodes(op="call_function", target=_CONV)
    if not convs or any(_tensor(module, node) is None for node in module.graph.find_nodes(op="get_attr")):
        return None
    graph = deepcopy(module.graph)
    channels = _channels(module, graph)
    rooms = _rooms(graph, channels)
    for room in rooms:
        _write(room, graph)
    return graph if rooms else None


def _rooms(graph: fx.Graph, channels: Mapping[fx.Node, int]) -> list[_Room]:
    """The rooms that save a copy."""
    cats = _pieces(graph)
    known = [node for node, pieces in cats.items() if all(piece in channels for piece in pieces)]
    rooms: list[_Room] = []
    for node in sorted(known, key=lambda node: -len(cats[node])):
        room = next((room for room in rooms if _fits(node, cats[node], room)), None)
        if room is None:
            ends = accumulate((channels[piece] for piece in cats[node]), initial=0)
            room = _Room({}, cats[node], tuple(ends))
            rooms.append(room)
        room.cats[node] = len(cats[node])
    wanted = Counter(piece for room in rooms for piece in room.pieces)
    for room in rooms:
        spans = zip(room.pieces, pairwise(room.ends), strict=True)
        room.own = frozenset(piece for piece, span in spans if wanted[piece] == 1 and _writes(piece, span, room))
    return [room for room in rooms if _saves(room) and _has_kernel(room)]


def _fits(node: fx.Node, pieces: tuple[fx.Node, ...], room: _Room) -> bool:
    """Whether a concat can be the first channels of a room.

    Whoever reads it must take a slice as it lies, and who reads all of the room must not write there.
    """
    if room.pieces[: len(pieces)] != pieces or room.ends[-1] % GROUP or _is_written(next(iter(room.cats))):
        return False
    if any(_is_overwritten(piece) for piece in pieces):
        return False
    return all(_takes_slice(user, room) for user in node.users)


def _writes(piece: fx.Node, span: tuple[int, int], room: _Room) -> bool:
    """Whether a piece is for a room alone, and what makes it can write there: a kernel, where whole groups end."""
    if not set(piece.users) <= set(room.cats):
        return False
    if piece.target is _CONV:
        return not any(end % GROUP for end in (*span, room.ends[-1]))
    if piece.target not in _OUT:
        return False
    # What is written over may be read by others, but not if it is no longer written over.
    operand: Any = piece.args[0]
    return piece.target is aten.relu.default or len(operand.users) == 1


def _channels(module: fx.GraphModule, graph: fx.Graph) -> dict[fx.Node, int]:
    """Channels of the images whose number the graph itself tells: from the convs on."""
    found: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if node.op != "call_function" or not node.args:
            continue
        first = node.args[0]
        if node.target in (_CONV, aten.conv2d.default):
            weight = _tensor(module, node.args[1])
            if weight is not None:
                found[node] = weight.shape[0]
        elif node.target in _CHANNELWISE and first in found:
            found[node] = found[first]
        elif node.target in _BROADCAST and (wide := [found[arg] for arg in node.args if found.get(arg, 1) > 1]):
            found[node] = wide[0]
        elif node.target is aten.slice.Tensor and first in found and node.args[1:2] == (1,) and not node.kwargs:
            start, stop, step = (*node.args[2:], None, None, None)[:3]
            if all(bound is None or isinstance(bound, int) for bound in (start, stop, step)):
                found[node] = len(range(found[first])[start:stop:step])
        elif _is_concat(node) and all(piece in found for piece in first):
            found[node] = sum(found[piece] for piece in first)
    return found


def _tensor(module: fx.GraphModule, node: Any) -> Tensor | None:
    """The tensor of the module that a node stands for; None if it is computed, or gone."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    try:
        return attrgetter(str(node.target))(module)
    except AttributeError:
        return None


def _is_concat(node: fx.Node) -> bool:
    return node.target is aten.cat.default and node.args[1:] == (1,)


def _pieces(graph: fx.Graph) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """By concat, what it joins, and what concats among that do; those that come to very many are left out."""
    found: dict[fx.Node, tuple[fx.Node, ...]] = {}
    for node in graph.nodes:
        if _is_concat(node):
            pieces = tuple(part for piece in node.args[0] for part in found.get(piece, (piece,)))
            written = any(_is_written(piece) for piece in node.args[0] if piece in found)
            if len(pieces) <= _MOST and not written and not any(_is_concat(piece) for piece in pieces):
                found[node] = pieces
    return found


def _saves(room: _Room) -> bool:
    """Whether a room saves copies: one concat is one launch, and every piece that is copied another."""
    return len(room.cats) > 1 or len(room.pieces) - len(room.own) <= 1 <= len(room.own)


def _has_kernel(room: _Room) -> bool:
    """Whether a kernel makes or reads what is there; if so, these are images, and their second axis channels."""
    beside = {*room.pieces, *(user for cat in room.cats for user in cat.users)}
    return any(node.target is _CONV for node in beside)


def _takes_slice(user: fx.Node, room: _Room) -> bool:
    return user in room.cats or user.target is _CONV


def _is_written(node: fx.Node) -> bool:
    """Whether anybody writes into a value, or sees its memory and might."""
    seen = [user.target for user in node.users if isinstance(user.target, OpOverload)]
    return any(parameter.alias_info is not None for operator in seen for parameter in parameters(operator))


def _is_overwritten(node: fx.Node) -> bool:
    return any(isinstance(user.target, OpOverload) and is_mutable(user.target) for user in node.users)


def _write(room: _Room, graph: fx.Graph) -> None:
    """Replace the concats of a room by its memory."""
    place = {node: number for number, node in enumerate(graph.nodes)}
    cats = sorted(room.cats, key=lambda cat: place[cat])
    # What cannot be written where it is made is copied as soon as a concat wants it.
    at = [
        piece if piece in room.own else next(cat for cat in cats if room.cats[cat] > number)
        for number, piece in enumerate(room.pieces)
    ]
    earliest = min(range(len(at)), key=lambda number: place[at[number]])
    with graph.inserting_before(at[earliest]):
        memory = _memory(room.pieces[earliest], room, graph)
    for number, (piece, before) in enumerate(zip(room.pieces, at, strict=True)):
        with graph.inserting_before(before):
            goal = graph.call_function(aten.slice.Tensor, (memory, 1, *room.ends[number : number + 2]))
            _put(piece, goal, room, graph)
    for cat in reversed(cats):
        if cat.users:
            with graph.inserting_before(cat):
                part = (memory, 1, 0, room.ends[room.cats[cat]])
                whole = room.cats[cat] == len(room.pieces)
                cat.replace_all_uses_with(memory if whole else graph.call_function(aten.slice.Tensor, part))
        graph.erase_node(cat)
    for piece in room.own:
        graph.erase_node(piece)


def _memory(piece: fx.Node, room: _Room, graph: fx.Graph) -> fx.Node:
    """The memory of a room, as large as the piece that is written first."""
    if piece in room.own and piece.target is _CONV:
        return graph.call_function(room_of_conv, (room.ends[-1], *piece.args))
    return graph.call_function(room_like, (room.ends[-1], piece.args[0] if piece in room.own else piece))


def _put(piece: fx.Node, goal: fx.Node, room: _Room, graph: fx.Graph) -> None:
    """Write a piece to its place."""
    if piece not in room.own:
        graph.call_function(require_fit, (goal, piece))
        graph.call_function(aten.copy_.default, (goal, piece))
    elif piece.target is _CONV:
        graph.call_function(require_conv_fits, (goal, *piece.args))
        graph.call_function(torch.ops.chanopt.gather_conv2d_into.default, (goal, *piece.args), piece.kwargs)
    else:
        form, more = _OUT[piece.target]
        graph.call_function(require_fit, (goal, piece.args[0]))
        graph.call_function(form, (*piece.args, *more), {**piece.kwargs, "out": goal})


class UnfitError(Exception):
    """What is joined is not of one size or one type, or no image: the concat knows what to do, or to say."""


def room_like(channels: int, image: Tensor) -> Tensor:
    """Memory for so many channels of an image's size, channels last; nothing is in it yet."""
    if image.ndim != 4:
        raise UnfitError
    return _empty((image.shape[0], channels, *image.shape[2:]), image)


def room_of_conv(channels: int, *operands: Any) -> Tensor:
    """Memory for so many channels of the size of a conv's result; `operands` are those of ``gather_conv2d``."""
    call, _ = call_of(*operands)
    return _empty((call.output_shape[0], channels, *call.output_shape[2:]), call.x)


def require_fit(goal: Tensor, piece: Tensor) -> None:
    """Raise UnfitError unless a piece has the size and the type of its place: a copy would spread or convert it."""
    if goal.shape != piece.shape or goal.dtype != piece.dtype:
        raise UnfitError


def require_conv_fits(goal: Tensor, *operands: Any) -> None:
    """The same of a conv's result."""
    call, _ = call_of(*operands)
    if goal.shape != call.output_shape or goal.dtype != call.x.dtype:
        raise UnfitError


def _empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
