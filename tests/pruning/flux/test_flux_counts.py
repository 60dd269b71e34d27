"""The tutorial's model and its counts, to the last digit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import nn

import chanopt
from chanopt.pruning import masks
from chanopt.pruning.flux import (
    ChannelPrune,
    LevelPrune,
    MobileNet,
    compute_dot_prods,
    keepprune,
    prune,
    prune_propagate,
    resize,
    slopehtanh,
)
from chanopt.pruning.flux.counting import Dots, exact_counts, tutorial_counts

SIZE = (1, 3, 96, 96)

# Dead channels, of each conv and the depthwise one behind it together, that give the numbers on the tutorial's page.
WITNESS = (2, 6, 10, 11, 21, 19, 43, 46, 45, 48, 48, 45, 92, 51)


def counts(model: nn.Module, *, exact: bool = False) -> tuple[int, int]:
    mults, adds, _ = compute_dot_prods(model, SIZE, exact=exact)
    return mults, adds


def randomised(model: nn.Module) -> nn.Module:
    """With batch norms that are not the identity, and statistics that keep the signal alive."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            module.weight.data.uniform_(0.8, 1.6)
            module.bias.data.normal_(0, 0.3)
    with torch.no_grad():
        model.train()(torch.randn(4, *SIZE[1:]))
    return model.eval()


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    torch.manual_seed(0)
    return randomised(MobileNet())


def test_f01_the_model_has_as_many_parameters(dense: nn.Module) -> None:
    assert sum(parameter.numel() for parameter in dense.parameters()) == 231_073
    assert sum(buffer.numel() for buffer in dense.buffers() if buffer.ndim) == 5_472
    convs = [module for module in dense[0] if isinstance(module, nn.Conv2d)]
    assert [conv.out_channels for conv in convs if conv.kernel_size == (1, 1)] == [
        16, 32, 32, 64, 64, *[128] * 6, 256, 256
    ]  # fmt: skip
    assert all((conv.bias is not None) == (conv.kernel_size == (1, 1)) for conv in convs)
    assert dense(torch.randn(2, 3, 96, 96)).shape == (2, 1)


def test_f02_slopehtanh() -> None:
    x = torch.tensor([-9.0, -5.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 5.0, 9.0])
    expected = torch.tensor([1.0, 0.0, -0.75, -1.0, -0.5, 0.0, 0.5, 1.0, 0.75, 0.0, -1.0])
    torch.testing.assert_close(slopehtanh(x), expected)


def test_f03_dense_level_and_channel_counts(dense: nn.Module) -> None:
    assert compute_dot_prods(dense, SIZE) == (7_505_600, 7_273_983, torch.Size([1, 1]))
    assert counts(MobileNet(nclasses=2).eval()) == (7_505_664, 7_274_046)
    assert counts(prune(LevelPrune(0.2), dense)) == (7_460_806, 7_273_983)
    assert counts(prune(LevelPrune(0.1), dense)) == (7_483_208, 7_273_983)
    assert counts(prune(ChannelPrune(0.2), dense)) == (6_105_200, 5_915_181)
    assert counts(prune(ChannelPrune(0.1), dense)) == (6_873_971, 6_659_193)


def test_f03_signed_level_prune_counts_alike(dense: nn.Module) -> None:
    assert counts(prune(LevelPrune(0.2, signed=True), dense)) == (7_460_806, 7_273_983)


@pytest.mark.parametrize(
    ("layer", "pairs"),
    [
        (0, (497_664, 479_232)),
        (3, (165_888, 147_456)),
        (6, (294_912, 258_048)),
        (9, (82_944, 73_728)),
        (12, (294_912, 276_480)),
    ],
)
def test_f03_layer_by_layer(dense: nn.Module, layer: int, pairs: tuple[int, int]) -> None:
    from chanopt.pruning.flux.counting import dots

    found = {part.name: tutorial_counts(part) for part in dots(dense, SIZE)[0]}
    assert found[f"0.{layer}"] == pairs
    assert found["1.2"][0] == 16_384
    assert found["1.4"][0] == 64


def test_f03_the_formulas_by_hand() -> None:
    rows = torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    conv, full = Dots("c", rows, 10, True), Dots("f", rows, 1, False)
    assert tutorial_counts(conv) == (10 * 3 * 3 - 1 * 10 * 3 - (4 - 3), 10 * 2 * 2)
    assert tutorial_counts(full) == (9 - 4, 2 * 2)
    assert exact_counts(conv) == (10 * 5, 10 * (1 + 0 + 2))


def test_f03_exact_counts(dense: nn.Module) -> None:
    assert counts(prune(LevelPrune(0.2), dense), exact=True) == (6_009_230, 5_777_613)
    assert counts(dense, exact=True) == counts(dense)


# -- the witness ------------------------------------------------------------------------------------------------------


def _dead(unions: Sequence[int], widths: Sequence[int]) -> Iterator[tuple[range, range | None]]:
    """Per conv and the depthwise one behind it, the filters that are weak: the two overlap as the union asks."""
    for union, width in zip(unions, widths, strict=True):
        count = width - -(-8 * width // 10)
        yield range(count), range(union - count, union) if union > count else None


def witness() -> nn.Module:
    """The model with weak filters where the witness has them."""
    torch.manual_seed(0)
    model = randomised(MobileNet())
    convs = [module for module in model[0] if isinstance(module, nn.Conv2d)]
    wide, deep = [convs[0], *convs[2::2]], convs[1::2]
    with torch.no_grad():
        for number, (first, second) in enumerate(_dead(WITNESS, [conv.out_channels for conv in wide])):
            wide[number].weight[list(first)] *= 1e-3
            if second is not None:
                deep[number].weight[list(second)] *= 1e-3
    return model.double()


@pytest.fixture(scope="module")
def stages() -> dict[str, nn.Module]:
    """The model at every stage of the tutorial."""
    model = witness()
    channel = prune(ChannelPrune(0.2), model)
    propagated = prune_propagate(keepprune(channel), (torch.randn(SIZE, dtype=torch.float64),))
    return {"dense": model, "channel": channel, "propagated": propagated, "resized": resize(propagated)}


def test_f11_the_witness_gives_the_published_numbers(stages: dict[str, nn.Module]) -> None:
    assert counts(stages["channel"]) == (6_105_200, 5_915_181)
    assert counts(stages["propagated"]) == (5_002_864, 4_899_018)


def test_f12_resizing_the_witness_gives_the_published_numbers(stages: dict[str, nn.Module]) -> None:
    resized = stages["resized"]
    assert counts(resized) == (3_680_115, 3_527_886)
    assert isinstance(resized, nn.Sequential)
    convs = [module for module in resized[0] if isinstance(module, nn.Conv2d)]
    widths = [conv.out_channels for conv in [convs[0], *convs[2::2]]]
    assert widths == [8, 10, 22, 21, 43, 45, 85, 82, 83, 80, 80, 83, 164, 256]


def test_f12_the_exact_count_does_not_change(stages: dict[str, nn.Module]) -> None:
    for stage in ("propagated", "resized"):
        assert counts(stages[stage], exact=True) == (3_634_055, 3_478_542)


def test_f11_f12_all_stages_compute_the_same(stages: dict[str, nn.Module]) -> None:
    x = torch.randn(3, 3, 96, 96, dtype=torch.float64)
    outputs = [masks.bake(keepprune(stages[name])).double()(x) for name in ("channel", "propagated", "resized")]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(outputs[2], outputs[0], rtol=1e-12, atol=1e-12)
    assert outputs[0].std() > 1e-4


def test_f11_propagating_twice_changes_nothing(stages: dict[str, nn.Module]) -> None:
    again = prune_propagate(stages["propagated"], (torch.randn(SIZE, dtype=torch.float64),))
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, stages["propagated"].get_parameter(name))


def test_f12_the_compiler_resizes_everywhere(stages: dict[str, nn.Module]) -> None:
    fast = chanopt.optimize(stages["propagated"], (torch.randn(SIZE, dtype=torch.float64),))
    mults, adds, _ = compute_dot_prods(fast, SIZE, exact=True)
    assert (mults, adds) == (3_634_055, 3_478_542)
    assert compute_dot_prods(fast, SIZE)[:2] == (mults, adds)  # no zeros are left for the tutorial's count to miss
    chanopt.verify(stages["propagated"], fast, (torch.randn(SIZE, dtype=torch.float64),))


# Three builds of the tutorial's page printed the resized model with its counts.
@pytest.mark.parametrize(
    ("widths", "printed"),
    [
        ([11, 21, 20, 44, 41, 83, 85, 86, 82, 81, 82, 162, 256], (3_682_228, 3_529_002)),
        ([11, 20, 20, 41, 43, 84, 82, 83, 83, 81, 84, 167, 256], (3_642_844, 3_491_382)),
        ([12, 22, 20, 42, 40, 84, 83, 84, 85, 84, 83, 163, 256], (3_736_478, 3_579_699)),
    ],
)
def test_f03_counts_of_printed_models(widths: list[int], printed: tuple[int, int]) -> None:
    strides = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)]
    before = 8
    for width, stride in zip(widths, strides, strict=True):
        layers.append(nn.Conv2d(before, before, 3, stride=stride, padding=1, groups=before, bias=False))
        layers.append(nn.Conv2d(before, width, 1))
        before = width
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 64), nn.Linear(64, 1))
    stem, deep, first, last, fc = layers[0], layers[1], layers[2], layers[-1], model[-2]
    with torch.no_grad():  # two stem channels and a fifth of the last pointwise conv's are dead, and stay in place
        for layer in (stem, deep):
            layer.weight[:2] = 0
        first.weight[:, :2] = 0
        last.weight[:51] = 0
        fc.weight[:, :51] = 0
    assert counts(model.eval()) == printed
