"""OrderChannels, case by case (the numbers are those of its docstring)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chanopt.analysis.figures import figures
from chanopt.errors import PassError
from chanopt.ir import Form, Kind, Program, physical_reads
from chanopt.passes import FoldAffine, FoldConstants, OrderChannels
from chanopt.passes.order_channels import SEGMENTS
from tests.support.masks import MODES, mask_randomly
from tests.support.micro import MICRO
from tests.support.nets.base import Net, conv, image, randomise
from tests.support.passes import assert_leaves, assert_rewrites, kill, of_kind, passes_before, prepared, width
from tests.support.random_nets import random_net

BEFORE = passes_before(OrderChannels)


def fan(*sets: list[int], kernels: tuple[int, ...] = ()) -> Any:
    """One producer of eight channels and a reader for each set of channels it keeps, called b0, b1, ..."""

    def body(n: Net, x: Tensor) -> tuple[Tensor, ...]:
        t = n.a(x).relu()
        return tuple(n.get_submodule(f"b{i}")(t) for i in range(len(sets)))

    sizes = kernels or (1,) * len(sets)
    net: Any = randomise(Net(body, a=conv(3, 8, 3), **{f"b{i}": conv(8, 4, sizes[i]) for i in range(len(sets))})).eval()
    for number, kept in enumerate(sets):
        kill(net.get_submodule(f"b{number}"), inputs=[c for c in range(8) if c not in kept])
    return net


def solved(notes: Any, segment: str = "a") -> tuple[float, float, bool]:
    """Objective, bound and whether it is proven, of the segment that a layer begins."""
    (solution,) = [ordered.solution for ordered in notes[SEGMENTS] if ordered.segment.name == segment]
    return solution.objective, solution.bound, solution.optimal


# -- it fires ---------------------------------------------------------------------------------------------------------


def test_case_1_two_readers_of_crossing_sets_read_ranges() -> None:
    net = fan([0, 2, 4, 6], [4, 5, 6, 7])
    result = assert_rewrites(
        OrderChannels(),
        net,
        image(),
        before=BEFORE,
        widths={"a": (3, 6), "b0": (4, 4), "b1": (4, 4)},
        forms={"b0": Form.RANGE, "b1": Form.RANGE},
    )
    assert result.figures["copies"] == (1, 0)
    assert solved(result.notes) == (0, 0, True)
    module = result.program.to_module()
    assert not any(node.target is torch.ops.aten.index_select.default for node in module.graph.nodes)


def test_case_1_the_reader_of_least_bytes_gathers_where_no_order_serves_all() -> None:
    """Three pairwise crossing sets: two can be ranges; the third, of fewest channels, is copied."""
    net = fan([0, 1, 2, 3, 4], [2, 3, 4, 5, 6], [0, 3, 6, 7])
    result = assert_rewrites(
        OrderChannels(), net, image(), before=BEFORE, forms={"b0": Form.RANGE, "b1": Form.RANGE, "b2": Form.GATHER}
    )
    size = next(v.channel_bytes for v in result.program.values.values() if v.layout is not None and v.name == "relu")
    assert solved(result.notes) == (4 * size, 4 * size, True)
    after = figures(result.program)
    assert (after.copies, after.gathered_channels, after.copied_bytes) == (1, 4, 4 * size)


def test_case_1_the_input_keeps_its_order() -> None:
    """Sources are pinned: a reader of channels 0 and 2 gathers, whatever the solver would like."""
    net: Any = randomise(Net(lambda n, x: n.a(x), a=conv(3, 4))).eval()
    kill(net.a, inputs=[1])
    program = assert_leaves(OrderChannels(), net, image(), before=BEFORE)
    assert figures(program).gathered_channels == 2


def test_case_1_the_output_keeps_its_order() -> None:
    net: Any = randomise(Net(lambda n, x: (t := n.a(x), n.b(t)), a=conv(3, 8), b=conv(8, 4))).eval()
    kill(net.b, inputs=[1, 2, 5])
    program = assert_leaves(OrderChannels(), net, image(), before=BEFORE)
    assert figures(program).gathered_channels == 5


def stream(*kept: list[int]) -> Any:
    """A stream t = a(x) that grows by t + b[i](t.relu()); each b[i] reads what `kept` says, head the last."""

    def body(n: Net, x: Tensor) -> Tensor:
        t = n.a(x)
        for i in range(len(kept) - 1):
            t = t + n.get_submodule(f"b{i}")(t.relu())
        return n.head(t.relu())

    parts = {f"b{i}": conv(8, 8) for i in range(len(kept) - 1)}
    net: Any = randomise(Net(body, a=conv(3, 8, 3), **parts, head=conv(8, 6))).eval()
    for name, keep in zip([*parts, "head"], kept, strict=True):
        kill(net.get_submodule(name), inputs=[c for c in range(8) if c not in keep])
    return net


def test_case_2_a_later_value_of_a_residual_chain_is_cut_where_it_is_a_range() -> None:
    net = stream([0, 2, 4, 6], [1, 3, 4, 6])
    result = assert_rewrites(
        OrderChannels(),
        net,
        image(),
        before=BEFORE,
        widths={"a": (3, 6), "b0": (4, 4), "head": (4, 6)},
        forms={"b0": Form.WHOLE, "head": Form.WHOLE},  # the maps before them read the ranges
    )
    assert figures(result.program).copies == 0


def test_case_2_what_no_order_serves_is_made_wider_or_gathered_and_proven_least() -> None:
    net = stream([0, 2, 4, 6], [0, 1, 4, 5], [2, 3, 4, 7], [1, 3, 5, 6])
    before = figures(prepared(net, image(), BEFORE))
    result = assert_rewrites(OrderChannels(), net, image(), before=BEFORE)
    after = figures(result.program)
    assert after.copied_bytes < before.copied_bytes
    objective, bound, optimal = solved(result.notes)
    assert optimal
    assert bound == objective == after.copied_bytes


def test_case_3_a_gather_stands_inside_a_concat() -> None:
    net = MICRO["dense_middle"].build()
    kill(net.head, inputs=[0, 3, 9, 14, 18])
    kill(net.b, inputs=[1, 2, 9])
    kill(net.c, inputs=[5, 7, 8])
    result = assert_rewrites(OrderChannels(), net, image(), before=BEFORE)
    for op in of_kind(result.program, Kind.CONCAT):
        readers = [user for user, _ in result.program.uses()[op.result]]
        assert readers
    after, before = figures(result.program), figures(prepared(net, image(), BEFORE))
    assert after.copied_bytes <= before.copied_bytes


def test_case_3_a_gather_stands_below_a_pool_where_it_moves_less() -> None:
    """Of b0, b1 and the pooled head one must gather: the pooled one, a quarter of the bytes."""

    def body(n: Net, x: Tensor) -> tuple[Tensor, ...]:
        t = n.a(x).relu()
        return n.b(t), n.c(t), n.d(nn.functional.max_pool2d(t, 2))

    net: Any = randomise(Net(body, a=conv(3, 8, 3), b=conv(8, 4), c=conv(8, 4), d=conv(8, 4))).eval()
    for name, kept in (("b", [0, 1, 2, 3]), ("c", [2, 3, 4, 5]), ("d", [0, 2, 5, 6, 7])):
        kill(net.get_submodule(name), inputs=[c for c in range(8) if c not in kept])
    result = assert_rewrites(OrderChannels(), net, image(), before=BEFORE)
    objective, _, optimal = solved(result.notes)
    quarter = 5 * 2 * 16 * 8 // 2  # five channels of 4 x 4 pixels in float64, one inference
    assert optimal
    assert objective <= quarter * 2
    gathers = [
        (op.label(), physical)
        for op in result.program.ops
        for _, physical in physical_reads(op, result.program)
        if physical.form is Form.GATHER
    ]
    assert [(label, len(physical.positions)) for label, physical in gathers] == [("d", 5)], result.program


@pytest.mark.parametrize(
    ("name", "reader", "lost"),
    [
        ("channel_shuffle", "b", [0, 2, 3, 7]),
        ("shuffle_join", "c", [1, 4, 6]),
        ("pixel_unshuffle", "2", []),
        ("cat_two", "c", [0, 3, 5, 9]),
        ("slices_overlap", "b", [0, 3]),
    ],
)
def test_reads_behind_moves_of_channels_cost_no_copy(name: str, reader: str, lost: list[int]) -> None:
    net = MICRO[name].build()
    if lost:
        kill(net.get_submodule(reader), inputs=lost)
    program = prepared(net, image(), (*BEFORE, OrderChannels()))
    assert figures(program).copies == 0
    assert OrderChannels()(program).program is program


# -- it leaves alone --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["two_convs", "batch_norm", "residual_post", "dense_block", "identity", "squeeze_excite"]
)
def test_leaves_a_model_without_masks(name: str) -> None:
    assert_leaves(OrderChannels(), MICRO[name].build(), MICRO[name].inputs, before=BEFORE)


def test_leaves_a_chain_whose_readers_take_all_that_is_made() -> None:
    net = fan([0, 2, 4, 6])
    program = assert_leaves(OrderChannels(), net, image(), before=BEFORE)
    assert width(program, "a") == (3, 4)


# -- it refuses -------------------------------------------------------------------------------------------------------


def test_refuses_a_program_that_was_not_trimmed() -> None:
    net = fan([0, 2, 4, 6], [4, 5, 6, 7])
    message = (
        r"pass order_channels required that every op reads only what its result needs, "
        r"found b0 reading channels of %relu that it has no weight for; run DropDead first"
    )
    with pytest.raises(PassError, match=message):
        OrderChannels()(prepared(net, image(), (FoldAffine(), FoldConstants())))


def test_stops_at_its_time_limit_with_a_bound_that_is_not_above_what_it_found() -> None:
    sets = [torch.randperm(64, generator=torch.Generator().manual_seed(i))[:32].tolist() for i in range(12)]

    def body(n: Net, x: Tensor) -> tuple[Tensor, ...]:
        t = n.a(x).relu()
        return tuple(n.get_submodule(f"b{i}")(t) for i in range(len(sets)))

    net: Any = randomise(Net(body, a=conv(3, 64), **{f"b{i}": conv(64, 2) for i in range(len(sets))})).eval()
    for number, kept in enumerate(sets):
        kill(net.get_submodule(f"b{number}"), inputs=[c for c in range(64) if c not in kept])
    program = prepared(net, image(3, 2), BEFORE)
    result = OrderChannels(time_limit=0.0)(program)
    objective, bound, optimal = solved(result.notes)
    assert bound <= objective
    assert optimal == (bound == objective)
    result.program.verify()
    best, lower, proven = solved(OrderChannels()(program).notes)
    assert proven
    assert bound <= lower == best <= objective


def blocks_and_plain(*sets: list[int], **readers: list[int]) -> Any:
    """Two filters a channel of a depthwise conv, added to a plain conv, and the readers of the sum: s0, s1, ..."""

    def body(n: Net, x: Tensor) -> tuple[Tensor, ...]:
        t = n.a(x)
        wide = n.m(t) + n.p(t)
        return n.r(t), *(n.get_submodule(f"s{i}")(wide) for i in range(len(sets)))

    parts = {"a": conv(3, 4), "m": nn.Conv2d(4, 8, 3, padding=1, groups=4), "p": conv(4, 8), "r": conv(4, 2)}
    net: Any = randomise(Net(body, **parts, **{f"s{i}": conv(8, 2) for i in range(len(sets))})).eval()
    for name, kept in readers.items():
        kill(net.get_submodule(name), inputs=[c for c in range(4) if c not in kept])
    for number, kept in enumerate(sets):
        kill(net.get_submodule(f"s{number}"), inputs=[c for c in range(8) if c not in kept])
    return net


def test_case_4_channels_that_are_added_to_blocks_move_in_blocks() -> None:
    """Ranges for both readers of ``a``; only the reader of a half of every block gathers, as it must."""
    net = blocks_and_plain([0, 2, 4, 6], list(range(8)), p=[1, 2], r=[0, 3])
    forms = {"m": Form.WHOLE, "p": Form.RANGE, "r": Form.RANGE, "s0": Form.GATHER, "s1": Form.WHOLE}
    assert_rewrites(OrderChannels(), net, image(), before=BEFORE, forms=forms)


def test_case_4_blocks_stay_where_they_are_if_so_less_is_gathered() -> None:
    """Three nested readers of parts of blocks: with an order of its own, one copy of the sum serves all."""
    net = blocks_and_plain([1, 2, 5], [1, 2, 5, 6], [1, 2, 4, 5, 6], p=[0, 1, 2], r=[0, 1])
    result = assert_rewrites(OrderChannels(), net, image(), before=BEFORE)
    paid, bound = (sum(getattr(o.solution, what) for o in result.notes[SEGMENTS]) for what in ("objective", "bound"))
    size = next(v.channel_bytes for v in result.program.values.values() if v.name == "conv2d_1")
    assert figures(result.program).copied_bytes == paid == bound == 5 * size


# -- it means the same ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_means_the_same(mode: Any) -> None:
    """On a random net; where nothing is left to order, the same program comes back."""
    seed = 40 + MODES.index(mode)
    net, inputs = random_net(seed)
    mask_randomly(net, seed, mode=mode)
    program: Program = prepared(net, inputs, BEFORE)
    if OrderChannels()(program).modified:
        assert_rewrites(OrderChannels(), net, inputs, before=BEFORE, allow_constant=True)
    else:
        assert_leaves(OrderChannels(), net, inputs, before=BEFORE)


def concats_behind_a_pool(*sets: list[int]) -> Any:
    """A concat of three blocks of four, a pool of it and four more channels in a second concat, and its readers."""

    def body(n: Net, x: Tensor) -> tuple[Tensor, ...]:
        first = torch.cat([n.p0(x), n.p1(x), n.p2(x)], 1)
        second = torch.cat([nn.functional.max_pool2d(first, 2), n.q(x)], 1)
        return (n.r(first), *(n.get_submodule(f"t{i}")(second) for i in range(len(sets))))

    layers = {f"p{i}": conv(3, 4) for i in range(3)} | {f"t{i}": conv(16, 3) for i in range(len(sets))}
    net: Any = randomise(Net(body, **layers, q=nn.Conv2d(3, 4, 2, stride=2), r=conv(12, 3))).eval()
    for number, kept in enumerate(sets):
        kill(net.get_submodule(f"t{number}"), inputs=[c for c in range(16) if c not in kept])
    return net


def test_case_2_an_operand_of_a_concat_brings_channels_that_nobody_reads_rather_than_be_gathered() -> None:
    """Of every block of the first concat a channel is unread behind the second: the parts in between are no range."""
    net = concats_behind_a_pool([2, 5, 7, 9, 13, 14], [4, 7, 8, 9, 12, 15], [0, 5, 9, 11, 12, 14])
    result = assert_rewrites(OrderChannels(), net, image(), before=BEFORE)
    (ordered,) = [o for o in result.notes[SEGMENTS] if len(o.segment.nodes) > 1]
    assert ordered.segment.instance == ordered.segment.wider
    size = next(v.channel_bytes for v in result.program.values.values() if v.name == "max_pool2d")
    paid = ordered.solution.objective
    assert (paid, ordered.solution.bound, ordered.solution.optimal) == (18 * size, 18 * size, True)
    assert figures(result.program).copied_bytes == paid


def dual_path(*sets: list[int]) -> Any:
    """Four units that add six channels to those that are there, and put four more behind them (a dual path network)."""

    def body(n: Net, x: Tensor) -> Tensor:
        t = n.stem(x)
        for unit in range(4):
            made = n.get_submodule(f"m{unit}")(n.get_submodule(f"r{unit}")(t))
            t = torch.cat([t[:, :6] + made[:, :6], t[:, 6:], made[:, 6:]], 1)
        return n.r4(t)

    readers = {f"r{unit}": conv(10 + 4 * unit, 4) for unit in range(5)}
    net: Any = randomise(
        Net(body, stem=conv(3, 10), **readers, **{f"m{unit}": conv(4, 10) for unit in range(4)})
    ).eval()
    for (name, reader), kept in zip(readers.items(), sets, strict=True):
        kill(net.get_submodule(name), inputs=[c for c in range(reader.in_channels) if c not in kept])
    return net


def test_case_2_what_has_grown_is_brought_whole_where_nobody_reads_some_of_it_any_more() -> None:
    """Without the channels that are read no further down, what has grown is no range of what it was: 29 are copied."""
    net = dual_path(
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9],
        [2, 3, 7, 8, 9, 11, 13],
        [1, 2, 8, 9, 10, 13, 14, 16, 17],
        [0, 5, 6, 7, 8, 10, 12, 13, 17, 18, 20],
        [1, 2, 4, 10, 12, 15, 25],
    )
    result = assert_rewrites(OrderChannels(), net, image(size=4), before=BEFORE)
    (ordered,) = [o for o in result.notes[SEGMENTS] if len(o.segment.nodes) > 1]
    assert ordered.segment.instance == ordered.segment.wider
    size = next(v.channel_bytes for v in result.program.values.values() if v.name == "conv2d")
    assert (ordered.solution.objective, ordered.solution.bound) == (27 * size, 27 * size)
    assert figures(result.program).copied_bytes == 27 * size


def shuffled(width: int) -> Any:
    """Three units that pass half of their channels on, mix the other half and interleave the two (ShuffleNet V2)."""

    def body(n: Net, x: Tensor) -> Tensor:
        t = n.stem(x)
        for number in range(3):
            kept, changed = t.chunk(2, 1)
            t = torch.cat([kept, n.get_submodule(f"b{number}")(changed)], 1)
            batch, channels, *size = t.shape
            t = t.view(batch, 2, channels // 2, *size).transpose(1, 2).reshape(t.shape)
        return n.head(t)

    branches = {f"b{number}": conv(width // 2, width // 2) for number in range(3)}
    return randomise(Net(body, stem=conv(3, width), **branches, head=conv(width, 4))).eval()


@pytest.mark.parametrize(("width", "seed", "mode"), [(8, 7, None), (12, 3, None), (12, 7, "input"), (16, 2, None)])
def test_case_2_channels_that_a_reader_further_down_would_have_to_skip_are_not_brought(
    width: int, seed: int, mode: Any
) -> None:
    """Wider concats promise fewer bytes here, but a chunk of one then starts in the middle of them."""
    torch.manual_seed(seed)
    net = shuffled(width)
    mask_randomly(net, seed, mode=mode)
    result = assert_rewrites(OrderChannels(), net, image(), before=BEFORE, allow_constant=True)
    assert figures(result.program).copied_bytes <= sum(o.solution.objective for o in result.notes[SEGMENTS])
