"""Smallest forms of what a stranger broke: each was once a wrong output, a raw traceback or a false alarm."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import chanopt
from chanopt.errors import CaptureError, ChanoptError, MaskError, PassError, VerifyError
from tests.support.equal import assert_same_function


class Net(nn.Module):
    """Two convs on one input, joined by a function, and a conv on the result."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.join(self.a(x), self.b(x)))


JOINS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "greater": lambda a, b: (a > b).to(a.dtype),
    "less or equal": lambda a, b: (a <= b).to(a.dtype),
    "where": lambda a, b: torch.where(b > 0, a, 2 * a),
    "where of one": lambda a, _b: torch.where(a > 0, a, 2 * a),
}


@pytest.mark.parametrize("name", JOINS)
def test_a_constant_in_a_comparison_keeps_its_type(name: str) -> None:
    net = Net(JOINS[name]).double().eval()
    with torch.no_grad():
        net.b.weight.zero_()
        net.b.bias.fill_(0.3)
        net.a.weight[:2] = 0
    inputs = (torch.randn(2, 3, 5, 5, dtype=torch.float64),)
    assert_same_function(net, chanopt.optimize(net, inputs), (torch.randn(2, 3, 5, 5, dtype=torch.float64),))


@pytest.mark.parametrize(
    "pool",
    [
        nn.AvgPool2d(3, 1, 1),
        nn.AvgPool2d(2, 2, padding=1, ceil_mode=True),
        nn.AvgPool2d(3, 1, 1, count_include_pad=False),
        nn.AvgPool2d(2, 2, padding=1, ceil_mode=True, count_include_pad=False),
        nn.AvgPool2d(3, 1, 1, count_include_pad=False, divisor_override=4),
    ],
)
@pytest.mark.parametrize("traced", [1, 2, 4])
def test_a_padded_average_is_no_constant_at_another_size(pool: nn.Module, traced: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sigmoid(), pool, nn.Conv2d(4, 2, 1)).double().eval()
    with torch.no_grad():
        net[0].weight[:2] = 0
    fast = chanopt.optimize(net, (torch.randn(2, 3, traced, traced, dtype=torch.float64),))
    assert_same_function(net, fast, (torch.randn(2, 3, 9, 9, dtype=torch.float64),))


def test_verify_gives_each_module_inputs_of_its_own() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x.mul_(2))

    net, x = Writes().double().eval(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    kept = x.clone()
    assert chanopt.verify(net, chanopt.optimize(net, x), x) <= 1e-10
    assert torch.equal(x, kept)


@pytest.mark.parametrize("kept", [torch.tensor([True] * 4), [1.7], 3, "abc", [True, False]])
def test_a_mask_that_is_no_list_of_channels(kept: object) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1)).eval()
    with pytest.raises(MaskError, match="expected kept output channels of 0 as channel numbers"):
        chanopt.optimize(net, torch.randn(1, 3, 4, 4), masks={"0": chanopt.Mask(outputs=kept)})  # type: ignore[arg-type]


@pytest.mark.parametrize("masks", [[1], {"0": {1, 2}}])
def test_masks_of_another_type(masks: object) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1)).eval()
    with pytest.raises(MaskError, match="expected masks as"):
        chanopt.optimize(net, torch.randn(1, 3, 4, 4), masks=masks)  # type: ignore[arg-type]


def test_calls_that_make_no_sense_are_refused_in_words() -> None:
    net, x = nn.Sequential(nn.Conv2d(3, 4, 1)).eval(), torch.randn(1, 3, 4, 4)
    with pytest.raises(ChanoptError, match="expected a torch.nn.Module"):
        chanopt.optimize(3, x)  # type: ignore[arg-type]
    with pytest.raises(PassError, match="expected a pipeline of passes"):
        chanopt.optimize(net, x, pipeline="fast")  # type: ignore[arg-type]
    with pytest.raises(PassError, match="expected a pipeline of passes"):
        chanopt.optimize(net, x, pipeline=[chanopt.passes.Pipeline])  # type: ignore[list-item]
    with pytest.raises(ChanoptError, match="expected keyword inputs as a dict"):
        chanopt.optimize(net, x, [1])  # type: ignore[arg-type]
    with pytest.raises(ChanoptError, match="on the meta device"):
        chanopt.optimize(
            nn.Sequential(nn.Conv2d(3, 4, 1, device="meta")).eval(), torch.empty(1, 3, 4, 4, device="meta")
        )


class Middle(nn.Module):
    """A conv with two constant channels, a function, and a last layer."""

    def __init__(self, function: Callable[[Tensor], Tensor], last: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.function, self.last = nn.Conv2d(3, 6, 1), function, last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


def middle(function: Callable[[Tensor], Tensor], last: nn.Module) -> nn.Module:
    net = Middle(function, last).double().eval()
    with torch.no_grad():
        net.first.weight[:2] = 0
        net.first.bias[:2] = 0.5
    return net


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


class Tied(nn.Module):
    """A square weight that is read as it is, and transposed."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 4, *sizes))

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.ndim == 2:
            return F.linear(F.linear(x, self.weight).relu(), self.weight.t())
        return F.conv2d(F.conv2d(x, self.weight), self.weight.transpose(2, 3))


@pytest.mark.parametrize(("sizes", "image"), [((), ()), ((3, 3), (8, 8))])
def test_a_square_weight_and_its_transpose_are_two(sizes: tuple[int, ...], image: tuple[int, ...]) -> None:
    net, x = Tied(*sizes).double().eval(), random(2, 4, *image)
    assert_same_function(net, chanopt.optimize(net, x), (x,))


SIZED: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "sum over batch": (lambda y: y * y.sum(0, keepdim=True), False),
    "batch size": (lambda y: y * y.shape[0], False),
    "softmax over batch": (lambda y: y.softmax(0), False),
    "sum over pixels": (lambda y: y.sum((2, 3)), True),
    "norm over pixels": (lambda y: y.norm(dim=(2, 3)), True),
    "softmax over pixels": (lambda y: y.softmax(2).amax((2, 3)), True),
}


@pytest.mark.parametrize("name", SIZED)
def test_what_counts_pixels_or_images_is_no_constant(name: str) -> None:
    function, flat = SIZED[name]
    net = middle(function, nn.Linear(6, 3) if flat else nn.Conv2d(6, 2, 1))
    fast = chanopt.optimize(net, random(2, 3, 8, 8))
    for shape in ((2, 3, 8, 8), (5, 3, 8, 8), (3, 3, 16, 12)):
        assert_same_function(net, fast, (random(*shape),))


@pytest.mark.parametrize(
    "function", [lambda y: torch.cat(y.chunk(2, 0)[::-1], 0), lambda y: y * float(y.shape[0])], ids=["chunk", "float"]
)
def test_a_batch_that_the_code_fixes_is_the_only_one_taken(function: Callable[[Tensor], Tensor]) -> None:
    net = middle(function, nn.Conv2d(6, 2, 1))
    fast = chanopt.optimize(net, random(2, 3, 8, 8))
    assert_same_function(net, fast, (random(2, 3, 8, 8),))
    with pytest.raises(AssertionError, match="expected a batch of 2"):
        fast(random(6, 3, 8, 8))
    assert_same_function(net, chanopt.optimize(fast, random(2, 3, 8, 8)), (random(2, 3, 8, 8),))


class Readers(nn.Module):
    """Six readers of one value with masks of their own: some have to gather."""

    def __init__(self, *, rows: bool) -> None:
        super().__init__()
        self.rows, self.a, self.head = rows, nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(24, 2, 1)
        self.readers = nn.ModuleList(nn.Linear(12, 4) if rows else nn.Conv2d(12, 4, 1) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        if not self.rows:
            return self.head(torch.cat([reader(y) for reader in self.readers], 1))
        y = y.permute(0, 2, 3, 1)
        return self.head(torch.cat([reader(y) for reader in self.readers], -1).permute(0, 3, 1, 2))


@pytest.mark.parametrize("rows", [False, True])
def test_a_gather_over_rows_takes_images_of_other_sizes(rows: bool) -> None:
    torch.manual_seed(0)
    net = Readers(rows=rows).double().eval()
    with torch.no_grad():
        for layer in (net.head, *net.readers):
            layer.weight[:, torch.rand(layer.weight.shape[1]) < 0.5] = 0  # type: ignore[index, union-attr]
    small, large = (random(2, 3, size, size).to(memory_format=torch.channels_last) for size in (8, 16))
    fast = chanopt.optimize(net, small)
    assert chanopt.explain(fast).gathers > 0
    assert_same_function(net, fast, (large,))


@pytest.mark.parametrize(
    "squeeze", [lambda y: y.squeeze(), lambda y: y.squeeze((1, 2, 3)), lambda y: y.squeeze(-1).squeeze(-1)]
)
def test_an_axis_cut_down_to_one_channel_is_not_squeezed_away(squeeze: Callable[[Tensor], Tensor]) -> None:
    net = middle(lambda y: squeeze(F.adaptive_avg_pool2d(y, 1)), nn.Linear(6, 3))
    with torch.no_grad():
        net.last.weight[:, [0, 1, 2, 4, 5]] = 0  # type: ignore[index]
    fast = chanopt.optimize(net, random(2, 3, 8, 8))
    assert_same_function(net, fast, (random(4, 3, 8, 8),))


@pytest.mark.parametrize("second", [lambda y: y > 0, lambda y: y.float()], ids=["bool", "float32"])
def test_a_concat_of_several_types_promotes_them(second: Callable[[Tensor], Tensor]) -> None:
    net = middle(lambda y: torch.cat([y, second(y)], 1), nn.Conv2d(12, 2, 1))
    with torch.no_grad():
        net.last.weight[:, :6] = 0  # type: ignore[index]
    assert_same_function(net, chanopt.optimize(net, random(2, 3, 8, 8)), (random(2, 3, 8, 8),))


def test_complex_weights_are_left_alone() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4, dtype=torch.complex128)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) * 2

    net, x = Scaled().eval(), torch.randn(2, 4, dtype=torch.complex128)
    fast = chanopt.optimize(net, x)
    assert torch.allclose(fast(x), net(x))
    assert any("complex" in refusal.reason for refusal in chanopt.explain(fast).refusals)


UNUSUAL: dict[str, Callable[[Tensor], Tensor]] = {
    "images merged and split": lambda y: torch.cat([y, y.flip(3)], 0)[: y.shape[0]],
    "a view of merged images": lambda y: y.repeat(2, 1, 1, 1).relu().view(2, -1, 6, 8, 8).sum(0),
    "as many as are positive": lambda y: y * y[y > 0].sum(),
    "where it is not zero": lambda y: y * y.nonzero().double().mean(),
    "a root of the batch size": lambda y: y / y.shape[0] ** 0.5,
    "the greater of batch size and three": lambda y: y * max(y.shape[0], 3),
    "a branch": lambda y: torch.cond(y.sum() > 0, lambda t: t.relu(), lambda t: t * 2, (y,)),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_operators_raise_nothing(name: str) -> None:
    net = middle(UNUSUAL[name], nn.Conv2d(6, 2, 1))
    assert_same_function(net, chanopt.optimize(net, random(2, 3, 8, 8)), (random(2, 3, 8, 8),))


def test_a_division_by_zero_is_that_of_the_model() -> None:
    net, x = middle(lambda y: y / 0, nn.ReLU()), random(2, 3, 4, 4)
    assert torch.equal(chanopt.optimize(net, x)(x), net(x))


def test_a_part_keeps_the_attributes_that_the_code_around_it_reads() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.head(-y if y.sum() > 0 else y) * self.head.stride[0]

    net, x = Branching().double().eval(), random(2, 3, 4, 4)
    assert torch.allclose(chanopt.optimize(net, x)(x), net(x))


def test_a_forward_that_keeps_its_features_leaves_nothing_on_the_model() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            self.features = self.a(x)
            return self.features.relu()

    net, x = Keeps().double().eval(), random(2, 3, 4, 4)
    net(x)
    kept = net.features
    fast = chanopt.optimize(net, x)
    assert net.features is kept
    assert chanopt.verify(net, fast, x) <= 1e-10


def test_verify_looks_past_infinite_entries() -> None:
    class Logits(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.factor).masked_fill(torch.tensor([True, False, False]), -float("inf"))

    x = torch.randn(2, 3)
    assert chanopt.verify(Logits(1), Logits(1), x) == 0
    with pytest.raises(VerifyError, match="relative error"):
        chanopt.verify(Logits(1), Logits(1000), x)
    with pytest.raises(VerifyError, match="trials=-1"):
        chanopt.verify(Logits(1), Logits(1000), x, trials=-1)


def test_masks_that_name_no_one_weight_are_refused() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.randn(4, 4, 1, 1)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(F.conv2d(x, self.a), self.b)

    net, x = nn.Sequential(Two()).eval(), torch.randn(2, 4, 4, 4)
    with pytest.raises(MaskError, match="has several"):
        chanopt.optimize(net, x, masks={"0": chanopt.Mask(outputs=[0])})
    with pytest.raises(MaskError, match="expected masks as"):
        chanopt.optimize(net, x, masks={0: chanopt.Mask(outputs=[0])})  # type: ignore[dict-item]
    with pytest.raises(CaptureError, match="a batch of none"):
        chanopt.lower(net, (torch.randn(0, 4, 4, 4),))
