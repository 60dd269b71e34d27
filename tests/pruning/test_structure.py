"""The structure of a model: which channels are the same, who makes and who reads them."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor, nn

import chanopt
from chanopt.errors import ChanoptError
from chanopt.pruning import Layer, Structure, discover
from chanopt.torchvision_shim import ensure_torchvision
from tests.pruning.nets import Dense, Mobile, Residual, randomised

IMAGE = (torch.randn(2, 3, 8, 8),)


def structure(model: nn.Module, inputs: tuple[Tensor, ...] = IMAGE) -> Structure:
    return discover(model.eval(), inputs)


def test_channels_that_are_added_are_one() -> None:
    found = structure(Residual())
    stream = found.producing("stem")
    assert stream.channels == 8
    assert list(stream.producers) == ["stem", "one.3", "two.3"]
    assert list(stream.consumers) == ["one.0", "two.0", "fc"]
    assert all(index == tuple(range(8)) for index in stream.producers.values())
    assert not stream.pinned
    assert found.producing("two.3") is stream


def test_a_flattened_channel_feeds_all_its_pixels() -> None:
    index = structure(Residual()).consuming("fc").consumers["fc"]
    assert index == tuple(channel for channel in range(8) for _ in range(4))


def test_the_norms_of_a_segment_pass_its_channels_on() -> None:
    found = structure(Residual())
    assert list(found.producing("stem").through) == ["norm"]
    assert found.layers["stem"].norm == "norm"
    assert found.layers["fc"].norm == ""


def test_joins_tell_who_arrives_at_which_operand() -> None:
    one, two = structure(Residual()).producing("stem").joins
    assert one.op == two.op == "aten.add.Tensor"
    assert one.operands == (("stem",), ("one.3",))
    assert two.operands == (("stem", "one.3"), ("two.3",))
    assert one.channels == (tuple(range(8)),) * 2
    assert "y = (y + self.one(y)).relu()" in one.source


def test_concats_place_blocks_side_by_side() -> None:
    found = structure(Dense())
    segment = found.producing("stem")
    assert segment.channels == 18
    assert segment.producers["layers.1"] == (10, 11, 12, 13)
    assert segment.consumers["layers.1"] == tuple(range(10))
    assert segment.consumers["end"] == tuple(range(18))
    assert (10, 11, 12, 13) in segment.spans


def test_depthwise_channels_pass_through() -> None:
    found = structure(Mobile())
    segment = found.producing("first")
    assert segment.producers == {"first": tuple(range(6))}
    assert segment.consumers == {"last": tuple(c for c in range(6) for _ in range(2))}
    assert segment.through["middle"] == segment.consumers["last"]
    assert found.consuming("middle") is found.producing("middle") is segment
    assert found.layers["middle"].depthwise
    assert not found.layers["first"].depthwise


def test_inputs_and_outputs_are_pinned() -> None:
    found = structure(Residual())
    assert found.producing("fc").pins == ("an output of the network",)
    assert found.consuming("stem").pins == ("made by input x",)
    assert found.consuming("stem").producers == {}


class Shuffled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 1)
        self.left, self.right = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y = y.reshape(len(y), 2, 3, *y.shape[2:]).transpose(1, 2).flatten(1, 2)
        one, two = y.chunk(2, 1)
        return self.left(one) + self.right(two)


def test_shuffles_and_splits_move_channels() -> None:
    found = structure(Shuffled(), (torch.randn(2, 3, 4, 4),))
    segment = found.producing("first")
    index = segment.producers["first"]
    order = [0, 3, 1, 4, 2, 5]
    assert segment.consumers["left"] == tuple(index[c] for c in order[:3])
    assert segment.consumers["right"] == tuple(index[c] for c in order[3:])


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.shared, self.end = (nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), *[nn.Conv2d(4, 4, 1)] * 2)
        self.end = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(torch.cat([self.shared(self.a(x)), self.shared(self.b(x))], 1))


def test_a_module_used_twice_ties_its_channels() -> None:
    found = structure(Twice())
    assert found.producing("a") is found.producing("b")
    assert found.producing("a").channels == 4
    assert found.producing("shared").channels == 4
    assert found.consuming("end").consumers["end"] == (0, 1, 2, 3, 0, 1, 2, 3)
    assert found.layers["shared"].uses == 2
    assert found.layers["shared"].positions == 2 * 64


class Mirrored(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last(y + y.flip(1))


def test_channels_that_meet_through_a_flip_are_one() -> None:
    segment = structure(Mirrored()).producing("first")
    assert segment.channels == 2
    assert segment.producers["first"] == (0, 1, 1, 0)


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)))


def test_what_counts_channels_pins_them() -> None:
    segment = structure(Counted()).producing("first")
    assert segment.pinned
    assert segment.pins == ("aten.group_norm.default counts its channels",)


def test_grouped_convs_order_what_they_touch() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 2, 1))
    found = structure(model)
    assert found.layers["1"].groups == 2
    assert found.producing("0").ordered
    assert found.producing("1").ordered
    assert not found.producing("2").ordered


def test_layers_know_their_sizes() -> None:
    found = structure(Residual())
    assert found.layers["one.0"] == Layer(
        "one.0",
        "conv2d",
        8,
        6,
        1,
        (3, 3),
        (1, 1),
        (1, 1),
        (1, 1),
        bias=True,
        positions=64,
        input_size=(8, 8),
        output_size=(8, 8),
        norm="one.1",
    )
    fc = found.layers["fc"]
    assert (fc.kind, fc.kernel, fc.positions, fc.input_size) == ("linear", (), 1, ())
    assert fc.parameters() == 32 * 5 + 5
    assert found.layers["one.0"].macs(4, 3) == 4 * 3 * 9 * 64


def test_transposed_and_strided_convs() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding="valid"),
        nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1),
        nn.Conv2d(4, 2, 3, padding="same", dilation=2),
    )
    first, turned, last = structure(model, (torch.randn(1, 3, 9, 9),)).layers.values()
    assert (first.positions, first.padding, first.stride) == (16, (0, 0), (2, 2))
    assert (turned.kind, turned.in_channels, turned.out_channels) == ("conv_transpose2d", 6, 4)
    assert (turned.positions, turned.output_size, turned.dilation) == (16, (7, 7), (1, 1))
    assert (last.padding, last.dilation, last.output_size) == ((2, 2), (2, 2), (7, 7))


def test_the_parameters_and_macs_of_the_whole_are_those_of_the_report() -> None:
    model = randomised(Residual())
    found = discover(model, IMAGE)
    report = chanopt.explain(chanopt.optimize(model, IMAGE, pipeline=()))
    assert sum(layer.macs() for layer in found.layers.values()) * len(IMAGE[0]) == report.macs_before
    weights = sum(
        parameter.numel()
        for module in model.modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
        for parameter in module.parameters()
    )
    assert sum(layer.parameters() for layer in found.layers.values()) == weights


@pytest.mark.parametrize("net", [Residual, Dense, Mobile, Shuffled, Twice])
def test_json_round_trip(net: type[nn.Module]) -> None:
    found = structure(net())
    assert Structure.from_json(found.to_json()) == found


def test_a_lowered_program_and_a_capture_do_as_well() -> None:
    model = Residual().eval()
    captured = chanopt.capture(model, IMAGE)
    assert discover(captured) == discover(chanopt.lower(model, IMAGE)) == discover(model, IMAGE)


def test_a_layer_that_is_none_is_named() -> None:
    with pytest.raises(ChanoptError, match="expected one of the layers stem, .*found 'nowhere'"):
        structure(Residual()).producing("nowhere")


# Producers, consumers, segments, segments with several consumers, most consumers of one: what UPSCALE counts.
@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("resnet18", (20, 20, 12, 4, 4)),
        pytest.param("resnet50", (53, 53, 37, 5, 7), marks=pytest.mark.slow),
        pytest.param("densenet121", (120, 120, 62, 4, 25), marks=pytest.mark.slow),
        pytest.param("mobilenet_v2", (35, 35, 25, 5, 4), marks=pytest.mark.slow),
    ],
)
def test_u23_segments_with_their_layers(name: str, counts: tuple[int, ...]) -> None:
    ensure_torchvision()
    model = getattr(importlib.import_module("torchvision.models"), name)(weights=None).eval()
    segments = [segment for segment in discover(model, (torch.randn(1, 3, 64, 64),)).segments if not segment.pinned]
    consumers = [len(segment.consumers) for segment in segments]
    producers = sum(len(segment.producers) for segment in segments)
    assert (producers, sum(consumers), len(segments), sum(n > 1 for n in consumers), max(consumers)) == counts
