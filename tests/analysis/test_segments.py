"""Labels and segments of small nets whose answers are known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from chanopt.analysis.demand import demand
from chanopt.analysis.labels import Labelling, label, uncrossed, unique_in_order
from chanopt.analysis.segments import OrderGraph, Segment
from chanopt.ir import Program
from chanopt.passes import OrderChannels
from tests.support.micro import MICRO
from tests.support.nets.base import Net, conv, image, randomise
from tests.support.passes import kill, layer, lowered, passes_before, prepared, sink_values


def net(body: Any, **parts: Any) -> Any:
    return randomise(Net(body, **parts)).eval()


def labelled(model: Any) -> tuple[Program, Labelling]:
    program = lowered(model, image())
    return program, label(program)


def of(found: tuple[Program, Labelling], name: str) -> list[int]:
    program, labelling = found
    return labelling.of[layer(program, name).result].tolist()


def segments(model: Any) -> dict[str, Segment]:
    program = prepared(model, image(), passes_before(OrderChannels))
    return {s.name: s for s in OrderGraph.build(program, demand(program), label(program)).segments()}


# -- labels -----------------------------------------------------------------------------------------------------------


def test_what_is_added_has_one_label() -> None:
    found = labelled(net(lambda n, x: n.c((n.a(x) + n.b(x)).relu()), a=conv(3, 4), b=conv(3, 4), c=conv(4, 2)))
    assert of(found, "a") == of(found, "b")
    assert not set(of(found, "a")) & set(of(found, "c"))
    assert not found[1].loose


def test_a_concat_has_the_labels_of_its_operands_side_by_side() -> None:
    found = labelled(MICRO["cat_two"].build())
    (cat,) = [op for op in found[0].ops if op.target == "aten.cat.default"]
    assert found[1].of[cat.result].tolist() == of(found, "a") + of(found, "b")


def test_a_shuffle_permutes_labels() -> None:
    program, labelling = found = labelled(MICRO["channel_shuffle"].build())
    read = layer(program, "b").reads[0].value
    shuffled = np.array(of(found, "a")).reshape(4, 3).T.reshape(-1)
    assert labelling.of[read].tolist() == shuffled.tolist()


def test_a_flatten_repeats_labels_in_blocks() -> None:
    program, labelling = labelled(MICRO["flatten_many"].build())
    flat = next(op for op in program.ops if op.block > 1)
    labels = labelling.of[flat.result]
    assert (labels.reshape(-1, flat.block) == labels[:: flat.block, None]).all()


def test_blocks_are_crossed_where_they_meet_channels_with_labels_of_their_own() -> None:
    """Added to as many channels of a plain conv; made rigid, both sides of the sum have the labels of one order."""
    parts = {"a": conv(3, 4), "m": torch.nn.Conv2d(4, 8, 3, padding=1, groups=4), "p": conv(4, 8)}
    program, labelling = labelled(net(lambda n, x: n.m(n.a(x)) + n.p(n.a(x)), **parts))
    blocks, plain = layer(program, "m").result, layer(program, "p").result
    assert labelling.crossed == {blocks}
    assert labelling.of[blocks].tolist() == labelling.of[plain].tolist()
    assert len(set(labelling.of[blocks].tolist())) == 4
    relabelled = uncrossed(program, labelling)
    assert (relabelled.crossed, relabelled.rigid) == (frozenset(), {blocks})
    assert relabelled.of[blocks].tolist() == relabelled.of[plain].tolist()
    assert len(set(relabelled.of[blocks].tolist())) == 8


def test_one_order_cannot_serve_a_value_and_its_flip() -> None:
    """X + x.flip(1): the second read is loose, so its channels have labels of their own there."""
    program, labelling = labelled(MICRO["add_flip"].build())
    (add,) = [op for op in program.ops if op.target == "aten.add.Tensor"]
    assert len(labelling.loose & {(add.result, 0), (add.result, 1)}) == 1


def test_a_concat_of_a_value_with_itself_gives_one_side_labels_of_its_own() -> None:
    program, labelling = labelled(MICRO["cat_self"].build())
    (cat,) = [op for op in program.ops if op.target == "aten.cat.default"]
    labels = labelling.of[cat.result].tolist()
    assert len(set(labels)) == 12
    assert (cat.result, 1) in labelling.loose


@pytest.mark.parametrize(
    "name", ["residual_pre", "dense_block", "c2f", "shufflenet", "add_two_orders", "inception", "hrnet_fuse"]
)
def test_a_label_stands_once_in_a_value(name: str) -> None:
    program, labelling = labelled(MICRO[name].build())
    for value, labels in labelling.of.items():
        assert len(labels) == program.values[value].live.channels
        assert len(set(labels.tolist())) == len(labels), value


def test_channels_that_flow_into_one_another_have_one_label() -> None:
    program, labelling = labelled(MICRO["residual_pre"].build())
    for op in program.ops[:-1]:
        for position, read in enumerate(op.reads):
            if read.access.value == "flow" and (op.result, position) not in labelling.loose:
                here = read.index.array >= 0
                ours = labelling.of[op.result][here]
                assert np.array_equal(ours, labelling.of[read.value][read.index.array[here]])


def test_unique_in_order() -> None:
    assert list(unique_in_order(np.array([4, 4, 1, 4, 0, 1]))) == [4, 1, 0]


# -- segments ---------------------------------------------------------------------------------------------------------


def masked_fan(**kept: list[int]) -> Any:
    def body(n: Net, x: Tensor) -> tuple[Tensor, ...]:
        t = n.a(x).relu()
        return tuple(n.get_submodule(name)(t) for name in kept)

    model = net(body, a=conv(3, 6, 3), **{name: conv(6, 4) for name in kept})
    for name, keep in kept.items():
        kill(model.get_submodule(name), inputs=[c for c in range(6) if c not in keep])
    return model


def test_readers_of_one_producer() -> None:
    segment = segments(masked_fan(b=[0, 1, 2], c=[2, 3, 4], d=[0, 4, 5]))["a"]
    assert segment.producers == ("a",)
    assert set(segment.consumers) == {"b", "c", "d"}
    readers = {reader.name: (reader.set, reader.weight) for reader in segment.instance.readers}
    three = 3 * 2 * 64 * 8
    assert readers == {"b": ((0, 1, 2), three), "c": ((2, 3, 4), three), "d": ((0, 4, 5), three)}
    assert segment.instance.channels == 6
    assert not segment.instance.blocks
    assert not segment.instance.edges


def test_a_residual_chain_is_one_segment() -> None:
    def body(n: Net, x: Tensor) -> Tensor:
        first = n.a(x)
        second = first + n.b(first.relu())
        return n.c(second.relu())

    model = net(body, a=conv(3, 6, 3), b=conv(6, 6), c=conv(6, 4))
    kill(model.b, inputs=[0, 2])
    kill(model.c, inputs=[1, 3])
    segment = segments(model)["a"]
    assert set(segment.producers) == {"a", "b"}
    assert {"b", "c"} <= set(segment.consumers)
    assert segment.instance.channels == 6


def test_no_order_passes_through_a_flow_of_half_blocks() -> None:
    """What the relu takes is every other channel of blocks of two: it gathers, whatever the order of blocks."""
    parts = {"a": conv(3, 4), "m": torch.nn.Conv2d(4, 8, 3, padding=1, groups=4), "s": conv(8, 2), "u": conv(8, 2)}

    def body(n: Net, x: Tensor) -> tuple[Tensor, ...]:
        wide = n.m(n.a(x))
        return n.s(wide.relu()), n.u(wide)

    model = net(body, **parts)
    kill(model.s, inputs=[1, 3, 5, 7])
    program = prepared(model, image(), passes_before(OrderChannels))
    graph = OrderGraph.build(program, demand(program), label(program))
    (relu,) = [op.result for op in program.ops if op.target == "aten.relu.default"]
    assert graph.apart == {(relu, 0)}
    assert (relu, 0) not in graph.flows


def test_a_concat_keeps_its_operands_in_blocks() -> None:
    def body(n: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        t = torch.cat([n.a(x), n.b(x)], 1).relu()
        return n.c(t), n.d(t)

    model = net(body, a=conv(3, 4, 3), b=conv(3, 4, 3), c=conv(8, 4), d=conv(8, 4))
    kill(model.c, inputs=[0, 5])
    kill(model.d, inputs=[1, 2, 7])
    segment = segments(model)["a"]
    assert set(segment.producers) == {"a", "b"}
    assert sorted(block.set for block in segment.instance.blocks) == [
        (0, 1, 2, 3),
        (4, 5, 6, 7),
    ]


def test_what_is_returned_is_an_ordered_reader() -> None:
    model = net(lambda n, x: (t := n.a(x), n.b(t)), a=conv(3, 6), b=conv(6, 4))
    kill(model.b, inputs=[1, 3])
    segment = segments(model)["a"]
    (whole,) = [reader for reader in segment.instance.readers if reader.ordered]
    assert whole.set == tuple(range(6))


def test_the_input_is_pinned() -> None:
    model = net(lambda n, x: (n.a(x), n.b(x)), a=conv(3, 6), b=conv(3, 4))
    kill(model.b, inputs=[1])
    pins = [pin for segment in segments(model).values() for pin in segment.instance.pins]
    assert any(pin.sequence == (0, 1, 2) for pin in pins)


def test_values_without_a_common_reader_are_segments_of_their_own() -> None:
    model = masked_fan(b=[0, 1, 2], c=[2, 3, 4])
    found = segments(model)
    assert {"b", "c"} <= found.keys()
    assert found["b"].producers == ("b",)
    assert found["a"].channel_bytes == 2 * 64 * 8


def test_readers_that_take_everything_leave_nothing_to_decide() -> None:
    model = net(lambda n, x: n.b(n.a(x).relu()), a=conv(3, 6), b=conv(6, 4))
    found = segments(model)
    assert "a" not in found
    assert sink_values(lowered(model, image()))
