"""How much a channel matters."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chanopt import Mask
from chanopt.errors import ChanoptError, MaskError
from chanopt.pruning import apply, importance
from chanopt.pruning.importance import (
    FPGM,
    LAMP,
    Average,
    Collected,
    Gradient,
    Importance,
    Latest,
    Magnitude,
    Member,
    Momentum,
    Random,
    Taylor,
)
from chanopt.pruning.slices import Side
from chanopt.pruning.statistics import ActivationMean, Activity, Rank, collect

ROWS = torch.randn(7, 12, dtype=torch.float64)


def member(layer: nn.Linear | nn.Conv2d, side: Side = "input", index: list[int] | None = None) -> Member:
    count = {"input": layer.weight.shape[1], "output": layer.weight.shape[0]}[side]
    return Member("layer", layer, side, torch.tensor(list(range(count)) if index is None else index))


def score(kind: Importance, *members: Member) -> Tensor:
    return kind.score(members, 1 + max(int(m.index.max()) for m in members))


def linear(rows: list[list[float]]) -> nn.Linear:
    """A linear layer with these weights, one row an output."""
    layer = nn.Linear(len(rows[0]), len(rows), bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(rows))
    return layer


def test_u18_l1_l2_norms() -> None:
    layer = linear([[3.0, -1.0], [4.0, 1.0]])
    torch.testing.assert_close(score(Magnitude(2), member(layer)), torch.tensor([5.0, 2**0.5], dtype=torch.float64))
    torch.testing.assert_close(score(Magnitude(1), member(layer)), torch.tensor([7.0, 2.0], dtype=torch.float64))
    torch.testing.assert_close(
        score(Magnitude(1), member(layer, "output")), torch.tensor([4.0, 5.0], dtype=torch.float64)
    )
    assert Magnitude().p == 2


def test_u18_convs_count_all_their_pixels() -> None:
    conv = nn.Conv2d(3, 5, 3)
    weight = conv.weight.detach().double()
    torch.testing.assert_close(score(Magnitude(1), member(conv)), weight.abs().sum((0, 2, 3)))
    torch.testing.assert_close(score(Magnitude(2), member(conv, "output")), weight.square().sum((1, 2, 3)).sqrt())


@pytest.mark.parametrize(
    ("norms", "expected"),
    [
        ([1.0, 1.0, 1.0, 1.0], [1.0, 1 / 2, 1 / 3, 1 / 4]),
        ([1.0, 2.0, 3.0, 4.0], [0.1, 2 / 9, 3 / 7, 1.0]),
        ([2.0, 4.0, 1.0, 3.0], [2 / 9, 1.0, 0.1, 3 / 7]),
        ([0.0, 0.0], [0.0, 0.0]),
    ],
)
def test_u19_lamp(norms: list[float], expected: list[float]) -> None:
    layer = linear([norms])
    torch.testing.assert_close(score(LAMP(), member(layer)), torch.tensor(expected, dtype=torch.float64))


def test_u20_fpgm() -> None:
    expected = [sum(float((row - other).norm()) for other in ROWS) for row in ROWS]
    torch.testing.assert_close(importance.fpgm(ROWS), torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(importance.fpgm(ROWS), torch.cdist(ROWS, ROWS).sum(0))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda x: importance.norms(x, 2), "Magnitude"),
        (lambda x: importance.lamp(x[importance.norms(x).argsort(descending=True)]), "LAMP"),
        (importance.fpgm, "FPGM"),
    ],
)
def test_u18_u19_u20_are_what_the_peer_computes(ours: Callable[[Tensor], Tensor], theirs: str) -> None:
    peer = importlib.import_module("upscale.masking.importance")
    # The peer puts LAMP's scores back by the sorting permutation instead of its inverse: only sorted rows come out right.
    rows = ROWS[importance.norms(ROWS).argsort(descending=True)] if theirs == "LAMP" else ROWS
    torch.testing.assert_close(ours(ROWS), getattr(peer, theirs)()(rows))


def test_u21_rank_of_known_maps() -> None:
    eye, flat = torch.eye(4), torch.ones(4, 4)
    two = flat + torch.diag(torch.tensor([1.0, 0, 0, 0]))
    maps = torch.stack([torch.stack([eye, flat, two]), torch.stack([flat, flat, 0 * flat])]).double()
    assert Rank()(maps).tolist() == [5, 2, 2]
    with pytest.raises(MaskError, match="expected feature maps of two dimensions for their rank, found 0"):
        Rank()(torch.ones(2, 3))


def _maps(conv: nn.Conv2d, side: Side, batches: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return torch.cat([batch if side == "input" else conv(batch) for batch in batches]).double()


@pytest.mark.parametrize("side", ["input", "output"])
def test_u21_hrank_over_two_batches(side: Side, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    conv = nn.Conv2d(2, 3, 3, padding=1)
    batches = [torch.randn(2, 2, 5, 5), torch.randn(1, 2, 5, 5)]
    batches[0][:, 0, 2:] = 0
    model = nn.Sequential(conv)
    found = collect(model, batches, Rank(), layers=["0"], side=side, cache=tmp_path / "ranks.pt")
    expected = torch.linalg.matrix_rank(_maps(conv, side, batches)).double().mean(0)
    torch.testing.assert_close(found["0"], expected)
    assert "statistics" in capsys.readouterr().err
    torch.testing.assert_close(
        Collected(found).score([Member("0", conv, side, torch.arange(len(expected)))], len(expected)), expected
    )
    again = collect(model, [], Rank(), layers=["0"], side=side, cache=tmp_path / "ranks.pt")
    assert torch.equal(again["0"], found["0"])
    with pytest.raises(MaskError, match=r"expected statistics of \['1'\] in .*ranks.pt, found other layers"):
        collect(model, [], Rank(), layers=["1"], side=side, cache=tmp_path / "ranks.pt")
    assert not conv._forward_hooks
    assert not conv._forward_pre_hooks


def test_statistics_of_linear_layers() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    x = torch.randn(5, 4)
    expected = model[0](x).relu().detach().double()
    mean = collect(model, [x], ActivationMean(), layers=["0"], progress=False)["0"]
    torch.testing.assert_close(mean, expected.mean(0))
    share = collect(model, [x[:2], x[2:]], Activity(), layers=["2"], side="input", progress=False)["2"]
    torch.testing.assert_close(share, (expected != 0).double().mean(0))
    one = collect(model, [x[0]], ActivationMean(), layers=["0"], progress=False)["0"]
    torch.testing.assert_close(one, expected[0])


def test_collecting_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Dropout(), nn.Conv2d(3, 2, 1)).train()
    model[2].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(4, 2, 5, 5)
    found = collect(model, [x], ActivationMean(), layers=["3"], side="input", progress=False)
    assert [module.training for module in model] == [True, True, False, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    again = collect(model.eval(), [x], ActivationMean(), layers=["3"], side="input", progress=False)
    assert torch.equal(found["3"], again["3"])


def test_a_cache_knows_what_it_holds(tmp_path: Path) -> None:
    model, x, cache = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), torch.randn(2, 3, 4, 4), tmp_path / "it.pt"
    options: dict[str, Any] = {"layers": ["0"], "cache": cache, "progress": False}
    found = collect(model, [x], Activity(), **options)
    assert torch.equal(collect(model, [], Activity(), **options)["0"], found["0"])
    for other in ({"statistic": ActivationMean()}, {"statistic": Activity(torch.tanh)}, {"side": "input"}):
        with pytest.raises(MaskError, match=r"expected statistic .*, side .* in .*it.pt, found statistic Activity"):
            collect(model, [], **{"statistic": Activity(), **options, **other})
    with pytest.raises(MaskError, match=r"expected statistics of \['0'\] in .*it.pt, found other layers"):
        collect(model, [], Activity(), at={"0": "1"}, **options)
    cache.write_text("nothing")
    with pytest.raises(MaskError, match="found another file"):
        collect(model, [], Activity(), **options)


def test_u21_layers_that_do_not_run_and_other_shapes() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(MaskError, match="expected 0 to be run on the batches, found that it was not"):
        collect(model, [], Activity(), layers=["0"], progress=False)
    found = collect(model, [torch.randn(2, 7, 4)], ActivationMean(), layers=["0"], side="input", progress=False)
    assert found["0"].shape == (4,)
    with pytest.raises(MaskError, match="expected collected scores of the 3 output channels of 0, found 4 scores"):
        Collected(found).score([Member("0", model[0], "output", torch.arange(3))], 3)


WEIGHT = [[1.0, -2.0], [3.0, 0.5]]
GRAD = torch.tensor([[0.5, 1.0], [-1.0, 2.0]])


def graded() -> nn.Linear:
    layer = linear(WEIGHT)
    layer.weight.grad = GRAD.clone()
    return layer


def test_s7_weight_and_taylor() -> None:
    w, h = torch.tensor(WEIGHT), torch.tensor([[2.0, 1.0], [0.5, 4.0]])
    assert importance.taylor(w, GRAD).tolist() == [[-0.5, 2.0], [3.0, -1.0]]
    assert importance.taylor(w, GRAD, h).tolist() == [[0.5, 4.0], [5.25, -0.5]]
    layer = graded()
    assert score(Magnitude(1), member(layer)).tolist() == [4.0, 2.5]
    assert score(Taylor(1), member(layer)).tolist() == [2.5, 1.0]
    squared = importance.taylor(w, GRAD, GRAD.square()).sum(0).abs()
    assert score(Taylor(2), member(layer)).tolist() == squared.tolist()


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda p: torch.optim.Adam(p, lr=0.0), "exp_avg"),
        (lambda p: torch.optim.SGD(p, lr=0.0, momentum=0.9), "momentum_buffer"),
    ],
)
def test_s7_gradients_from_the_optimizer(make: Callable[..., torch.optim.Optimizer], key: str) -> None:
    layer = graded()
    optimizer = make(layer.parameters())
    optimizer.step()
    layer.weight.grad = None
    mean = optimizer.state[layer.weight][key]
    expected = importance.taylor(layer.weight.detach(), mean).sum(0).abs()
    torch.testing.assert_close(score(Taylor(1, optimizer), member(layer)), expected.double())
    if key == "exp_avg":
        second = importance.taylor(layer.weight.detach(), mean, optimizer.state[layer.weight]["exp_avg_sq"])
        found = score(Taylor(2, optimizer, "optimizer"), member(layer))
        torch.testing.assert_close(found, second.sum(0).abs().double())
    else:
        with pytest.raises(ChanoptError, match="expected the optimizer to keep exp_avg_sq for layer.weight, found"):
            score(Taylor(2, optimizer, "optimizer"), member(layer))


def test_s7_what_is_missing_is_said() -> None:
    with pytest.raises(ChanoptError, match="expected a gradient of layer.weight, found none; run a backward pass"):
        score(Taylor(), member(linear(WEIGHT)))
    with pytest.raises(ChanoptError, match="expected an optimizer whose state has the curvature"):
        score(Taylor(2, None, "optimizer"), member(graded()))


def test_s8_signs_cancel_over_outputs_and_layers() -> None:
    one, two = nn.Conv2d(2, 3, 3), nn.Conv2d(2, 4, 1)
    for conv in (one, two):
        conv.weight.grad = torch.randn_like(conv.weight)
    expected = torch.zeros(2, dtype=torch.float64)
    for conv in (one, two):
        grad, weight = conv.weight.grad, conv.weight.detach()
        assert grad is not None
        for i in range(2):
            for o in range(conv.out_channels):
                expected[i] += float(-(weight[o, i] * grad[o, i]).sum())
    members = [Member("one", one, "input", torch.arange(2)), Member("two", two, "input", torch.arange(2))]
    torch.testing.assert_close(Taylor().score(members, 2), expected.abs(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["hard", "soft"])
def test_s8_only_outputs_that_are_not_masked_count(how: str) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1))
    apply(model, {"0": Mask(inputs=[1], outputs=[0, 2])}, how)
    stored = model[0].parametrizations.weight.original
    stored.grad = torch.ones_like(stored)
    found = Taylor().score([Member("0", model[0], "input", torch.arange(2))], 2)
    alive = -stored.detach()[[0, 2]].sum((0, 2, 3))
    expected = alive.abs().double()  # also of input 0, which is masked: it has a score and may come back
    assert expected[0] != 0
    torch.testing.assert_close(found, expected)


def test_s8_the_stream_of_a_resnet_by_hand() -> None:
    from tests.pruning.nets import Residual

    model = Residual().eval()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    from chanopt.pruning import discover, groups

    structure = discover(model, (torch.randn(1, 3, 8, 8),))
    (stream,) = (g for g in groups(model, structure, scope="constrained") if g.name == "stem")
    expected = torch.zeros(8)
    for layer in (model.one[0], model.two[0]):
        for i in range(8):
            for o in range(6):
                expected[i] -= (layer.weight[o, i] * layer.weight.grad[o, i]).sum().detach()
    for feature in range(32):
        expected[feature // 4] -= (model.fc.weight[:, feature] * model.fc.weight.grad[:, feature]).sum().detach()
    torch.testing.assert_close(Taylor().score(stream.members, 8).float(), expected.abs(), rtol=1e-4, atol=1e-5)


def test_s9_accumulators() -> None:
    values = [torch.tensor([1.0, 4.0]), torch.tensor([3.0, 0.0]), torch.tensor([5.0, 2.0])]
    expected = {
        Latest: [5.0, 2.0],
        Average: [3.0, 2.0],
        Momentum: [0.9 * (0.9 * 0.1 + 0.1 * 3) + 0.5, 0.9 * 0.9 * 0.4 + 0.2],
    }
    for kind, wanted in expected.items():
        accumulator = kind()
        for value in values:
            accumulator.update("group", value)
            accumulator.update("other", 10 * value)
        torch.testing.assert_close(accumulator.value("group"), torch.tensor(wanted))
        torch.testing.assert_close(accumulator.value("other"), 10 * torch.tensor(wanted))
        accumulator.clear()
        with pytest.raises(ChanoptError, match="expected scores of group, found none since the last pruning"):
            accumulator.value("group")
    assert not Latest.every_step
    assert Average.every_step
    assert Momentum.every_step


def test_d07_apoz_and_activation_mean() -> None:
    conv = nn.Conv2d(2, 3, 1)
    batches = [torch.randn(2, 2, 4, 4), torch.randn(3, 2, 4, 4)]
    model = nn.Sequential(conv, nn.BatchNorm2d(3)).eval()
    model[1].bias.data.copy_(torch.tensor([2.0, 0.0, -2.0]))
    maps = model(torch.cat(batches)).detach().double()
    found = collect(model, batches, Activity(), layers=["0"], at={"0": "1"}, progress=False)
    torch.testing.assert_close(found["0"], (maps > 0).double().mean((0, 2, 3)))
    assert found["0"][0] > found["0"][1] > found["0"][2]
    mean = collect(model, batches, ActivationMean(), layers=["0"], at={"0": "1"}, progress=False)
    torch.testing.assert_close(mean["0"], maps.clamp(min=0).mean((0, 2, 3)))
    plain = collect(model, batches, ActivationMean(torch.clone), layers=["0"], progress=False)
    torch.testing.assert_close(plain["0"], _maps(conv, "output", batches).mean((0, 2, 3)))


def test_d07_gradient_is_the_signed_sum() -> None:
    layer = graded()
    assert score(Gradient(), member(layer, "output")).tolist() == [-1.5, -2.0]
    with pytest.raises(ChanoptError, match="expected a gradient of layer.weight, found none"):
        score(Gradient(), member(linear(WEIGHT)))


def test_d07_random_repeats_with_its_seed() -> None:
    layer = linear(WEIGHT)
    first, again, other = (score(Random(seed), member(layer)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    one = Random(0)
    assert torch.equal(score(one, member(layer)), score(one, member(layer)))
    assert not torch.equal(score(one, member(layer)), score(one, member(layer, "output")))


def test_a_group_has_its_weights_side_by_side() -> None:
    one, two = linear([[3.0, 1.0, 5.0]]), linear([[4.0, 2.0]])
    members = [member(one, index=[0, 2, -1]), member(two, index=[0, 0])]
    torch.testing.assert_close(
        Magnitude(2).score(members, 3), torch.tensor([29.0, 0.0, 1.0], dtype=torch.float64).sqrt()
    )


def test_names_of_importances() -> None:
    assert importance.by_name("l1") == Magnitude(1)
    assert importance.by_name(FPGM()) == FPGM()
    with pytest.raises(ChanoptError, match="expected one of l1, l2, lamp, fpgm, .* as importance, found 'l3'"):
        importance.by_name("l3")
