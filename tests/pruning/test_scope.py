"""Which layers decide together, how scores become keep sets, how far to go."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

import chanopt
from chanopt import Mask
from chanopt.errors import ChanoptError, MaskError
from chanopt.pruning import Pruner, Structure, apply, costs, discover, groups, prune, retained
from chanopt.pruning.importance import Magnitude
from chanopt.pruning.scope import below_threshold
from chanopt.pruning.slices import by_channel
from chanopt.torchvision_shim import ensure_torchvision
from tests.pruning.nets import Dense, Mobile, Residual, randomised

IMAGE = (torch.randn(2, 3, 8, 8),)
READERS = ["one.0", "two.0", "fc", "one.3", "two.3"]  # segment by segment


@pytest.fixture(scope="module")
def residual() -> tuple[nn.Module, Structure]:
    torch.manual_seed(0)
    model = randomised(Residual())
    return model, discover(model, IMAGE)


@pytest.fixture(scope="module")
def dense() -> tuple[nn.Module, Structure]:
    torch.manual_seed(0)
    model = randomised(Dense())
    return model, discover(model, IMAGE)


def choose(
    pair: tuple[nn.Module, Structure], amount: float | Mapping[str, float] = 0.5, **options: Any
) -> dict[str, Mask]:
    model, structure = pair
    return prune(model, (), amount, structure=structure, **options)


def kept(masks: Mapping[str, Mask]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(mask.inputs if mask.inputs is not None else mask.outputs or ()) for name, mask in masks.items()}


# -- U22: the masking manager -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 5, 8, 20])
@pytest.mark.parametrize("amount", [0.0, 0.05, 0.3, 0.5, 0.99])
def test_u22_so_many_are_dropped(count: int, amount: float) -> None:
    scores = torch.randperm(count).double()
    flags = below_threshold(scores, amount)
    assert int((~flags).sum()) == int(amount * count)
    assert flags.any()
    assert set(scores[~flags].tolist()) == set(range(int(amount * count)))


def test_u22_ties_at_the_threshold_are_kept() -> None:
    assert below_threshold(torch.tensor([1.0, 2.0, 2.0, 3.0]), 0.5).tolist() == [False, True, True, True]
    assert below_threshold(torch.ones(4), 0.75).tolist() == [True] * 4


def test_u22_every_layer_alone(residual: tuple[nn.Module, Structure]) -> None:
    model, _ = residual
    masks = choose(residual, 0.5)
    assert list(masks) == READERS
    for name in set(READERS) - {"fc"}:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Conv2d)
        scores = by_channel(layer.weight.detach(), layer, "input").norm(dim=1)
        assert set(kept(masks)[name]) == set(scores.topk(len(scores) - len(scores) // 2).indices.tolist())
    assert masks["fc"].outputs is None
    assert {feature // 4 for feature in kept(masks)["fc"]} == {
        c for c in range(8) if set(range(4 * c, 4 * c + 4)) <= set(kept(masks)["fc"])
    }
    assert len(kept(masks)["fc"]) == 16


def test_u22_one_mask_for_a_segment(residual: tuple[nn.Module, Structure]) -> None:
    model, _ = residual
    masks = kept(choose(residual, 0.5, scope="constrained"))
    assert masks["one.0"] == masks["two.0"] == tuple(f // 4 for f in masks["fc"][::4])
    assert isinstance(model, Residual)
    rows = [model.one[0].weight.transpose(0, 1).flatten(1), model.two[0].weight.transpose(0, 1).flatten(1)]
    joint = torch.cat([*rows, model.fc.weight.t().reshape(8, -1)], 1).detach().norm(dim=1)
    assert set(masks["one.0"]) == set(joint.topk(4).indices.tolist())


def test_u22_output_side(residual: tuple[nn.Module, Structure]) -> None:
    alone = choose(residual, 0.5, side="output")
    assert list(alone) == ["stem", "one.3", "two.3", "one.0", "two.0"]  # segment by segment; not fc, the output
    assert all(mask.inputs is None for mask in alone.values())
    assert len({kept(alone)[name] for name in ("stem", "one.3", "two.3")}) > 1
    together = kept(choose(residual, 0.5, side="output", scope="constrained"))
    assert together["stem"] == together["one.3"] == together["two.3"]


def test_u22_global_is_one_threshold(residual: tuple[nn.Module, Structure]) -> None:
    model, structure = residual
    masks = choose(residual, 0.4, locality="global", importance="l1")
    parts = groups(model, structure)
    scores = [Magnitude(1).score(part.members, part.count) for part in parts]
    flags = [torch.ones(part.count, dtype=torch.bool) for part in parts]
    for part, flag in zip(parts, flags, strict=True):
        for member in part.members:
            if member.name in masks:
                chosen = member.index[list(kept(masks)[member.name])]
                flag[:] = torch.isin(torch.arange(part.count), chosen)
    dropped, total = torch.cat(scores)[~torch.cat(flags)], sum(part.count for part in parts)
    assert len(dropped) == int(0.4 * total)
    assert dropped.max() < torch.cat(scores)[torch.cat(flags)].min()


@pytest.mark.parametrize("amount", [0.3, 0.5])
def test_u22_as_the_peer_masks(amount: float) -> None:
    peer = importlib.import_module("upscale.masking.mask")
    for seed in range(3):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(3, 9, 1), nn.Conv2d(9, 7, 3, padding=1), nn.Conv2d(7, 4, 1)).eval()
        for locality in ("local", "global"):
            masks = prune(model, IMAGE, amount, locality=locality)
            layers = [nn.Conv2d(9, 7, 3), nn.Conv2d(7, 4, 1)]
            for layer, like in zip(layers, (model[1], model[2]), strict=True):
                layer.weight = nn.Parameter(like.weight.detach().clone())
            segments = [peer.MaskSegment([layer], dim=1) for layer in layers]
            for manager in (
                [peer.MaskManager([s]) for s in segments] if locality == "local" else [peer.MaskManager(segments)]
            ):
                manager.importance().mask(amount)
            for name, layer in zip(("1", "2"), layers, strict=True):
                alive = (layer.weight != 0).transpose(0, 1).flatten(1).any(1).nonzero().flatten().tolist()
                assert alive == sorted(kept(masks).get(name, range(layer.in_channels)))


def test_u23_groups_for_ones_own_pruner(residual: tuple[nn.Module, Structure]) -> None:
    model, structure = residual
    found = {
        part.name: [member.name for member in part.members] for part in groups(model, structure, scope="constrained")
    }
    assert found == {"stem": ["one.0", "two.0", "fc"], "one.0": ["one.3"], "two.0": ["two.3"]}
    stream = groups(model, structure, scope="constrained")[0]
    masks = stream.masks(torch.arange(8) < 3)
    assert kept(masks) == {"one.0": (0, 1, 2), "two.0": (0, 1, 2), "fc": tuple(range(12))}
    assert stream.masks(torch.ones(8, dtype=torch.bool)) == {}


# -- what is spared ---------------------------------------------------------------------------------------------------


def test_ignored_layers_keep_all(residual: tuple[nn.Module, Structure]) -> None:
    assert list(choose(residual, ignore=["one.*", "fc"])) == ["two.0", "two.3"]
    assert list(choose(residual, ignore=["two.0"], scope="constrained")) == ["one.3", "two.3"]
    with pytest.raises(MaskError, match="expected 'nowhere' to name a layer, found none; there are stem, one.0"):
        choose(residual, ignore=["nowhere"])


def test_a_floor_and_multiples(residual: tuple[nn.Module, Structure]) -> None:
    assert {len(k) for name, k in kept(choose(residual, 0.9, floor=3)).items() if name != "fc"} == {3}
    assert {len(k) for name, k in kept(choose(residual, 0.9, floor=0.5)).items() if name != "fc"} == {3, 4}
    rounded = kept(choose(residual, 0.6, multiple=4))
    assert {name: len(k) for name, k in rounded.items()} == {"one.0": 4, "one.3": 4, "two.0": 4, "two.3": 4, "fc": 16}
    exact = kept(choose(residual, 0.6))
    assert all(set(exact[name]) <= set(rounded[name]) for name in rounded)


def test_amounts_by_layer(residual: tuple[nn.Module, Structure]) -> None:
    masks = choose(residual, {"one.0": 0.25, "two.3": 0.5})
    assert {name: len(k) for name, k in kept(masks).items()} == {"one.0": 6, "two.3": 3}


def test_nothing_that_counts_channels_is_pruned() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 1)).eval()
    assert prune(model, IMAGE, scope="constrained") == {}
    assert prune(model, IMAGE, scope="consecutive") == {}
    assert list(prune(model, IMAGE)) == ["2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"side": "both"}, "expected side 'input' or 'output', found 'both'"),
        ({"scope": "free"}, "expected scope 'constrained', 'unconstrained' or 'consecutive', found 'free'"),
        ({"locality": "here"}, "expected locality 'local' or 'global', found 'here'"),
        ({"scope": "consecutive", "side": "output"}, r"expected side 'input' for scope 'consecutive'"),
        ({"amount": 1.0}, "expected an amount of at least 0 and below 1, found 1.0"),
        ({"amount": {"a": -0.5}}, "expected an amount of at least 0 and below 1, found -0.5"),
        ({"importance": "lamp"}, "expected locality 'global': this importance compares layers"),
        ({"amount": {"a": 0.5}, "locality": "global"}, "expected one amount where layers are compared"),
        ({"target": "speed"}, "expected target ratio, macs, parameters, latency or a cost, found 'speed'"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ChanoptError, match=message):
        Pruner(**options)


def test_u19_lamp_is_for_all_layers_at_once(residual: tuple[nn.Module, Structure]) -> None:
    masks = choose(residual, 0.5, importance="lamp", locality="global")
    assert masks


# -- targets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["constrained", "unconstrained", "consecutive"])
@pytest.mark.parametrize("target", ["macs", "parameters"])
def test_targets_are_met_and_not_by_far(residual: tuple[nn.Module, Structure], scope: str, target: str) -> None:
    _, structure = residual
    cost = costs.macs if target == "macs" else costs.parameters
    masks = choose(residual, 0.4, scope=scope, target=target, effort=40)
    whole, left = costs.total(structure, {}, cost), costs.total(structure, masks, cost)
    assert 0.4 * whole < left <= 0.6 * whole


def test_a_target_out_of_reach_is_said(residual: tuple[nn.Module, Structure]) -> None:
    with pytest.raises(MaskError, match=r"expected a cost of at most .*, found .* with as few channels as floor=7"):
        choose(residual, 0.9, target="macs", floor=7)


def test_latency_is_measured_and_any_cost_will_do(
    residual: tuple[nn.Module, Structure], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, structure = residual
    seen: list[tuple[str, int, int]] = []

    def cost(layer: Any, inputs: int, outputs: int) -> float:
        seen.append((layer.name, inputs, outputs))
        return float(outputs)

    masks = choose(residual, 0.2, target=cost)
    assert costs.total(structure, masks, cost) <= 0.8 * costs.total(structure, {}, cost)
    assert {name for name, _, _ in seen} == set(structure.layers)
    latency = costs.Latency(batch=2, repeats=2)
    times = [latency(layer, layer.in_channels, layer.out_channels) for layer in structure.layers.values()]
    assert all(time > 0 for time in times)
    again = [latency(layer, layer.in_channels, layer.out_channels) for layer in structure.layers.values()]
    assert again == times  # remembered
    assert latency(structure.layers["stem"], 3, 0) == 0
    monkeypatch.setattr(costs.Latency, "_measure", lambda self, layer, inputs, outputs, groups: inputs * outputs)
    masks = choose(residual, 0.2, target="latency", multiple=2)
    steady = costs.Latency()
    assert costs.total(structure, masks, steady) <= 0.8 * costs.total(structure, {}, steady)


@pytest.mark.parametrize(
    "layer", [nn.Linear(6, 4), nn.Conv2d(6, 6, 3, groups=6), nn.ConvTranspose2d(6, 4, 3), nn.Conv2d(6, 4, 3)], ids=str
)
def test_latency_of_every_kind_of_layer(layer: nn.Module) -> None:
    head = nn.Conv2d(3, 6, 1) if not isinstance(layer, nn.Linear) else nn.Linear(3, 6)
    model = nn.Sequential(head, layer).eval()
    x = torch.randn(1, 3, 5, 5) if not isinstance(layer, nn.Linear) else torch.randn(1, 3)
    found = discover(model, (x,)).layers["1"]
    assert costs.Latency(repeats=1)(found, 6, found.out_channels) > 0


@pytest.mark.parametrize("scope", ["constrained", "unconstrained", "consecutive"])
@pytest.mark.parametrize("net", [Residual, Dense, Mobile])
def test_costs_are_those_of_the_slim_model(net: type[nn.Module], scope: Any) -> None:
    model = randomised(net())
    structure = discover(model, IMAGE)
    masks = prune(model, IMAGE, 0.5, scope=scope, structure=structure, effort=40)
    report = chanopt.explain(chanopt.optimize(model, IMAGE, masks=masks))
    foreseen = costs.total(structure, masks, costs.macs) * len(IMAGE[0])
    assert report.macs_after <= foreseen
    if scope == "constrained" or net is Mobile:
        assert report.macs_after == foreseen
    assert foreseen < costs.total(structure, {}, costs.macs) * len(IMAGE[0])


def test_what_a_dead_layer_reads_is_dead(dense: tuple[nn.Module, Structure]) -> None:
    _, structure = dense
    masks = {"end": Mask(inputs=range(6)), "layers.1": Mask(inputs=range(6)), "layers.2": Mask(inputs=range(6))}
    counts = costs.kept(structure, masks)
    assert [counts[f"layers.{k}"] for k in range(3)] == [(0, 0)] * 3
    with pytest.raises(ChanoptError, match=r"expected masks of the structure's layers, found \['other'\]"):
        costs.kept(structure, {"other": Mask()})


# -- consecutive ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("locality", ["local", "global"])
@pytest.mark.parametrize("net", ["residual", "dense"])
def test_windows_need_no_gather_and_keep_more(net: str, locality: str, request: pytest.FixtureRequest) -> None:
    pair = request.getfixturevalue(net)
    model, structure = pair
    options = {"locality": locality, "importance": "l1"}
    equal, own = (choose(pair, 0.5, scope=scope, **options) for scope in ("constrained", "consecutive"))
    assert {name: len(k) for name, k in kept(own).items()} == {name: len(k) for name, k in kept(equal).items()}
    shares = [retained(model, structure, masks, importance="l1") for masks in (equal, own)]
    assert shares[1] >= shares[0]
    if (net, locality) == ("residual", "local"):  # one threshold over all leaves this stream whole
        assert shares[1] > shares[0]
    twin = chanopt.optimize(model, IMAGE, masks=own)
    report = chanopt.explain(twin)
    assert report.gathers == 0
    assert report.copies == 0


def test_windows_are_what_is_written(residual: tuple[nn.Module, Structure]) -> None:
    import copy

    model, _ = residual
    masks = choose(residual, 0.5, scope="consecutive", importance="l1")
    twin = apply(copy.deepcopy(model), masks).double()
    fast = chanopt.optimize(model, IMAGE, masks=masks).double()
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(fast(x), twin(x))
    assert not torch.allclose(fast(x), model(x.float()).double())


def test_fewer_live_channels_on_demand(residual: tuple[nn.Module, Structure]) -> None:
    _, structure = residual
    wide, narrow = (choose(residual, 0.5, scope="consecutive", live=live) for live in (1.0, 0.5))
    equal = choose(residual, 0.5, scope="constrained")
    counts = [costs.kept(structure, masks)["stem"][1] for masks in (wide, narrow, equal)]
    assert counts[0] > counts[1] == counts[2] == 4


def test_the_share_of_importance() -> None:
    model = nn.Sequential(nn.Linear(2, 4, bias=False), nn.Linear(4, 1, bias=False)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    structure = discover(model, (torch.randn(1, 2),))
    assert retained(model, structure, {"1": Mask(inputs=[1, 3])}) == pytest.approx(0.6)
    assert retained(model, structure, {}) == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50", "densenet121", "mobilenet_v2"])
def test_large_nets_are_left_without_gathers(name: str) -> None:
    ensure_torchvision()
    model = getattr(importlib.import_module("torchvision.models"), name)(weights=None).eval()
    inputs = (torch.randn(1, 3, 64, 64),)
    captured = chanopt.capture(model, inputs)
    structure = discover(captured)
    equal = prune(model, inputs, 0.5, scope="constrained", structure=structure)
    masks = prune(model, inputs, 0.5, scope="consecutive", structure=structure, effort=60)
    assert retained(model, structure, masks) > retained(model, structure, equal)
    report = chanopt.explain(chanopt.optimize(captured, masks=masks))
    assert report.gathers == 0
    assert report.slices > 0
