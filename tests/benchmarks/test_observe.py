from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from benchmarks.arms import Copies
from benchmarks.observe import Macs, observe, peak_allocated, profiled


class Selecting(nn.Module):
    """Two selections of channels, one of rows, a concat and a change of memory format."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 1)
        self.register_buffer("picked", torch.tensor([5, 0, 2]))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        first = y.index_select(1, self.get_buffer("picked"))
        second = y[:, [1, 4]]
        rows = y[torch.tensor([0])]
        both = torch.cat([first, second], 1).clone(memory_format=torch.channels_last)
        return both.sum() + rows.sum()


def test_selections_of_channels_are_counted_with_their_bytes() -> None:
    seen = observe(Selecting(), (torch.randn(2, 3, 4, 4),))
    assert seen.copies == Copies(2, 5, 2 * 5 * 16 * 4)
    assert (seen.concats, seen.concat_bytes) == (1, 2 * 5 * 16 * 4)
    assert (seen.relayouts, seen.relayout_bytes) == (1, 2 * 5 * 16 * 4)


def test_the_profiler_sees_the_selections_that_the_dispatch_mode_sees() -> None:
    assert profiled(Selecting(), (torch.randn(2, 3, 4, 4),)).copies == Copies(2, 5, 2 * 5 * 16 * 4)


class Detector(nn.Module):
    """A network whose own code picks rows, entries and columns of what a body makes."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.body(x).flatten(1)
        every = torch.arange(len(y))
        best = y[:, y.sum(0).argsort()[:3]]
        return y[every], y[y[:, 0] > -1e9], y[every[:, None], every[:2]], best, torch.cat([y[:, :1], y[:, 2:]], 1)


class Gathers(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (2 * x)[:, [3, 0]]


def test_what_the_networks_own_code_picks_is_no_selection_of_channels() -> None:
    inputs = (torch.randn(2, 4, 3, 3),)
    network, arm = Detector(nn.Conv2d(4, 4, 1)), Detector(Gathers())
    for module, copies in ((network, Copies()), (arm, Copies(1, 2, 2 * 2 * 9 * 4))):
        assert observe(module, inputs, network).copies == copies
        assert profiled(module, inputs, network=network).copies == copies


def test_rows_and_pairs_are_no_channels_whoever_picks_them() -> None:
    class Rows(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            y, every = 2 * x, torch.arange(len(x))
            return y[every], y.index_select(0, every), y[every[:, None], every[:2]], y[y[:, 0] > -1e9]

    inputs = (torch.randn(3, 4),)
    assert observe(Rows(), inputs).copies == profiled(Rows(), inputs).copies == Copies()


def test_a_concat_of_slices_of_one_tensor_is_a_selection_that_only_the_dispatch_mode_sees() -> None:
    class Runs(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = 2 * x
            return torch.cat([y[:, :1], y[:, 2:4]], 1)

    inputs = (torch.randn(2, 5, 4, 4),)
    seen = observe(Runs(), inputs)
    assert (seen.copies, seen.concats) == (Copies(1, 3, 2 * 3 * 16 * 4), 0)
    assert profiled(Runs(), inputs).copies == Copies()


def test_the_peak_of_a_call_is_what_it_has_allocated_at_once() -> None:
    chain = nn.Sequential(nn.ReLU(), nn.ReLU(), nn.ReLU())
    assert peak_allocated(chain, (torch.randn(1, 2, 8, 8),)) == 2 * (2 * 64 * 4)


class Sliced(nn.Module):
    """A convolution that reads a slice of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x[:, :4])


def test_a_slice_is_copied_inside_the_convolution_unless_the_batch_is_one() -> None:
    alone, two = (profiled(Sliced(), (torch.randn(batch, 8, 32, 32),)) for batch in (1, 2))
    assert alone.hidden == 0
    assert two.hidden_bytes >= 2 * 4 * 32 * 32 * 4


def test_a_table_of_the_network_itself_is_no_copy() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(4, 6))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.table[:, torch.tensor([1, 0, 2])]

    assert observe(Table(), (torch.randn(4, 3),)).copies == Copies()


def test_attention_is_counted_though_torch_would_run_it_as_one_operator() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    seen = observe(layer, (torch.randn(2, 5, 8),))
    # Projections of queries, keys and values, and of the output; two linear layers; ten tokens.
    assert seen.macs.dense == 10 * (3 * 8 * 8 + 8 * 8 + 2 * 8 * 16)
    assert torch.backends.mha.get_fastpath_enabled()


def test_the_peak_is_what_is_alive_at_once() -> None:
    # A ReLU keeps its operand while it makes its result; nothing else stays.
    chain = nn.Sequential(nn.ReLU(), nn.ReLU(), nn.ReLU(), nn.ReLU())
    assert observe(chain, (torch.randn(1, 2, 8, 8),)).peak_bytes == 2 * (2 * 64 * 4)
    assert observe(nn.Sequential(nn.ReLU(inplace=True)), (torch.randn(1, 2, 8, 8),)).peak_bytes == 0


# The network of the Flux pruning tutorial: MobileNet of a quarter of the width, for 96 x 96 pixels.
WIDTHS = (16, 32, 32, 64, 64, 128, 128, 128, 128, 128, 128, 256, 256)
STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)


def tutorial() -> nn.Sequential:
    parts: list[nn.Module] = [nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)]
    inside = 8
    for outside, stride in zip(WIDTHS, STRIDES, strict=True):
        parts += [nn.Conv2d(inside, inside, 3, stride, 1, groups=inside, bias=False), nn.BatchNorm2d(inside)]
        parts += [nn.Conv2d(inside, outside, 1), nn.BatchNorm2d(outside)]
        inside = outside
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 64), nn.Linear(64, 1)]
    return nn.Sequential(*parts, *head).eval()


def tutorial_macs(net: nn.Module) -> Macs:
    return observe(net, (torch.randn(1, 3, 96, 96),)).macs


def weights(net: nn.Module) -> list[Tensor]:
    return [m.weight.data for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]


def test_the_dense_network_costs_what_the_tutorial_prints() -> None:
    macs = tutorial_macs(tutorial())
    assert (macs.flux, macs.flux_adds) == (7505600, 7273983)
    assert macs.exact == macs.dense == macs.flux


def test_level_pruning_costs_what_the_tutorial_prints_and_less_in_truth() -> None:
    net = tutorial()
    for weight in weights(net):
        flat = weight.view(-1)
        flat[flat.abs().argsort()[: len(flat) - math.ceil(0.8 * len(flat))]] = 0
    macs = tutorial_macs(net)
    assert (macs.flux, macs.flux_adds) == (7460806, 7273983)
    assert macs.exact == 6009230
    assert macs.dense == 7505600


def test_channel_pruning_costs_what_the_tutorial_prints() -> None:
    net = tutorial()
    for weight in weights(net):
        if weight.ndim == 4:
            weight[weight.abs().sum((1, 2, 3)).argsort()[: len(weight) - math.ceil(0.8 * len(weight))]] = 0
    macs = tutorial_macs(net)
    assert (macs.flux, macs.flux_adds) == (6105200, 5915181)


class Block(nn.Module):
    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        stride = outside // inside
        self.one = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.two = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.project = nn.Conv2d(inside, outside, 1, 2, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return (self.two(self.one(x).relu()) + self.project(x)).relu()


def test_the_dense_count_of_resnet20_is_distillers() -> None:
    blocks = [Block(*sizes) for sizes in ((16, 16),) * 3 + ((16, 32), (32, 32), (32, 32), (32, 64), (64, 64), (64, 64))]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    net = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), *blocks, *head)
    assert observe(net, (torch.randn(1, 3, 32, 32),)).macs.dense == 40_813_184


def test_transposed_and_grouped_convolutions_and_linear_layers_at_several_places() -> None:
    def dense(layer: nn.Module, *shape: int) -> int:
        return observe(layer, (torch.randn(*shape),)).macs.dense

    assert dense(nn.ConvTranspose2d(4, 6, 2, stride=2), 1, 4, 5, 5) == 25 * 4 * 6 * 4
    assert dense(nn.Conv2d(4, 6, 3, groups=2), 2, 4, 5, 5) == 2 * 9 * 6 * 2 * 9
    assert dense(nn.Linear(4, 6), 3, 7, 4) == 21 * 24
    layer = nn.Linear(4, 6)
    layer.weight.data[:, 1] = 0
    layer.weight.data[2] = 0
    macs = observe(layer, (torch.randn(5, 4),)).macs
    assert (macs.dense, macs.exact, macs.flux, macs.flux_adds) == (120, 75, 75, 75)
