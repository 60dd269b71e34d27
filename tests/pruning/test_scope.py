"""Which layers decide together, how scores become keep sets, how far to go."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import chanopt
from benchmarks import digits
from chanopt import Mask
from chanopt.errors import ChanoptError, MaskError
from chanopt.pruning import Pruner, Structure, apply, costs, discover, groups, prune, retained
from chanopt.pruning.importance import Magnitude
from chanopt.pruning.scope import below_threshold
from chanopt.pruning.slices import by_channel
from chanopt.torchvision_shim import ensure_torchvision
from tests.pruning.nets import Attention, Dense, Grouped, Mobile, Residual, Shared, Sum, randomised

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


class Fork(nn.Module):
    """A stream that a conv reads whole, a conv of another kernel too, and a narrower one reads its first channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 9, 1)
        self.whole = nn.Conv2d(9, 4, 3, padding=1)
        self.other = nn.Conv2d(9, 6, 1)
        self.first = nn.Conv2d(5, 4, 1)
        self.next = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.stem(x).relu()
        return self.next(self.whole(y).relu()), self.other(y), self.first(y[:, :5])


@pytest.mark.parametrize("amount", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("locality", ["local", "global"])
def test_u22_one_mask_for_a_segment_as_the_peer_has_it(amount: float, locality: Any) -> None:
    """Weights side by side, narrower layers filled up with zeros, and the mask cut off for them."""
    peer = importlib.import_module("upscale.masking.mask")
    for seed in range(3):
        torch.manual_seed(seed)
        model = Fork().eval()
        masks = kept(prune(model, IMAGE, amount, scope="constrained", locality=locality))
        twins = copy.deepcopy(model)
        stream = [twins.whole, twins.other, twins.first]
        segments = [peer.MaskSegment(layers, dim=1) for layers in (stream, [twins.next])]
        for part in [[segment] for segment in segments] if locality == "local" else [segments]:
            peer.MaskManager(part).importance().mask(amount)
        for name in ("whole", "other", "first", "next"):
            layer = twins.get_submodule(name)
            alive = (layer.weight != 0).transpose(0, 1).flatten(1).any(1).nonzero().flatten().tolist()
            ours = sorted(masks.get(name, range(layer.in_channels)))
            assert alive == ours if alive else len(ours) == 1  # the peer may drop a whole segment


@pytest.mark.parametrize("amount", [0.3, 0.6])
def test_u22_output_side_as_the_peer_has_it(residual: tuple[nn.Module, Structure], amount: float) -> None:
    peer = importlib.import_module("upscale.masking.mask")
    model, _ = residual
    masks = kept(choose(residual, amount, side="output", scope="constrained"))
    twins = copy.deepcopy(model)
    for names in (("stem", "one.3", "two.3"), ("one.0",), ("two.0",)):
        layers = [twins.get_submodule(name) for name in names]
        peer.MaskManager([peer.MaskSegment(layers, dim=0)]).importance().mask(amount)
        for name, layer in zip(names, layers, strict=True):
            alive = (layer.weight != 0).flatten(1).any(1).nonzero().flatten().tolist()
            assert alive == sorted(masks.get(name, range(layer.out_channels)))


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


def test_amounts_by_pattern_and_by_what_a_name_stands_for(residual: tuple[nn.Module, Structure]) -> None:
    def counts(amounts: Mapping[str, float], **options: Any) -> dict[str, int]:
        return {name: len(k) for name, k in kept(choose(residual, amounts, **options)).items()}

    assert counts({"*": 0.5}) == {"one.0": 4, "two.0": 4, "fc": 16, "one.3": 3, "two.3": 3}
    assert counts({"one.*": 0.5, "*": 0.25, "two.3": 0.0}) == {"one.0": 4, "one.3": 3, "two.0": 6, "fc": 24}
    # one.0 is a reader of the stem's segment, and also what makes the segment that one.3 reads.
    assert counts({"one.0": 0.5}, scope="constrained") == {"one.0": 4, "two.0": 4, "fc": 16}
    assert counts({"stem": 0.5}, scope="constrained") == {"one.0": 4, "two.0": 4, "fc": 16}
    assert counts({"one.0": 0.5}, side="output") == {"one.0": 3}
    with pytest.raises(MaskError, match="expected 'stem' to name a layer whose channels may go here, found none"):
        choose(residual, {"stem": 0.5})
    with pytest.raises(MaskError, match="expected one amount for layers that keep the same channels, found"):
        choose(residual, {"one.0": 0.5, "two.0": 0.25}, scope="constrained")


def test_random_scores_mean_something(residual: tuple[nn.Module, Structure]) -> None:
    model, structure = residual
    masks = choose(residual, 0.5, importance="random")
    assert choose(residual, 0.5, importance="random") == masks
    best = retained(model, structure, masks, importance="random")
    assert best > retained(model, structure, choose(residual, 0.5, importance="l1"), importance="random")


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
        ({"amount": "0.5"}, "expected an amount of at least 0 and below 1, found '0.5'"),
        ({"multiple": 0}, "expected multiple as a whole number from 1 up, found 0"),
        ({"multiple": 2.5}, "expected multiple as a whole number from 1 up, found 2.5"),
        ({"floor": -1}, "expected floor as a number of channels, or a share of them below 1, found -1"),
        ({"live": 0}, "expected live as a share above 0 and at most 1, found 0"),
        ({"effort": -3}, "expected effort as a whole number from 0 up, found -3"),
        ({"ignore": "fc"}, "expected names of layers in a list to ignore, found 'fc'"),
        ({"ignore": [3]}, r"expected names of layers in a list to ignore, found \[3\]"),
        ({"target": 5}, "expected target ratio, macs, parameters, latency or a cost, found 5"),
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
    assert report.macs_after == costs.emitted(structure, masks, costs.macs) * len(IMAGE[0])
    assert foreseen <= report.macs_after  # reads may be widened to save copies
    if scope == "constrained" or net is Mobile:
        assert report.macs_after == foreseen
    assert foreseen < costs.total(structure, {}, costs.macs) * len(IMAGE[0])


@pytest.mark.parametrize("scope", ["constrained", "unconstrained"])
@pytest.mark.parametrize("target", ["macs", "parameters"])
@pytest.mark.parametrize(
    ("net", "side", "amount"),
    [
        (Sum, "output", 0.4),
        (Sum, "input", 0.4),
        (Grouped, "input", 0.25),
        (Residual, "output", 0.4),
        (Residual, "input", 0.4),
        (Shared, "input", 0.2),
    ],
)
def test_targets_are_met_by_the_slim_model(net: Any, side: Any, amount: float, target: str, scope: Any) -> None:
    model = randomised(net())
    masks = prune(model, IMAGE, amount, target=target, side=side, scope=scope)
    fast = chanopt.optimize(model, IMAGE, masks=masks)
    report = chanopt.explain(fast)
    before, after = (
        (report.macs_before, report.macs_after)
        if target == "macs"
        else (sum(p.numel() for p in module.parameters()) for module in (model, fast))
    )
    assert 0 < after <= (1 - amount) * before
    assert after >= 0.6 * (1 - amount) * before


def test_a_target_is_met_beside_an_attention() -> None:
    model = Attention().eval()
    masks = prune(model, IMAGE, 0.2, target="parameters")
    before, after = (
        sum(p.numel() for p in module.parameters()) for module in (model, chanopt.optimize(model, IMAGE, masks=masks))
    )
    assert 0.7 * before < after <= 0.8 * before


def test_what_no_mask_reaches_counts(residual: tuple[nn.Module, Structure]) -> None:
    found = discover(Attention().eval(), IMAGE)
    assert list(found.others) == ["layer.self_attn.in_proj_weight", "layer.self_attn.out_proj.weight"]
    assert costs.total(found, {}, costs.parameters) == sum(p.numel() for p in Attention().parameters())
    found = discover(Grouped().eval(), IMAGE)
    assert [(name, layer.groups, layer.macs()) for name, layer in found.others.items()] == [("4.weight", 2, 8192)]
    assert residual[1].others == {}


@pytest.mark.parametrize("net", [Sum, Grouped, Shared, Attention, Residual, Dense, Mobile])
def test_a_structure_from_json_has_an_estimate(net: type[nn.Module]) -> None:
    model = randomised(net())
    structure = discover(model, IMAGE)
    plain = Structure.from_json(structure.to_json())
    assert plain == structure
    assert costs.total(plain, {}, costs.macs) == costs.total(structure, {}, costs.macs)
    masks = prune(model, IMAGE, 0.5, structure=plain, scope="constrained")
    found, exact = (costs.total(known, masks, costs.macs) for known in (plain, structure))
    assert found <= exact
    if net is not Grouped:  # what groups are filled up with, somebody has to make: the estimate does not see that
        assert found == exact
    with pytest.raises(ChanoptError, match="found one from JSON or a copy"):
        costs.emitted(copy.deepcopy(structure), masks, costs.macs)


def test_a_target_that_the_slim_model_misses_is_said(
    residual: tuple[nn.Module, Structure], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "emitted", lambda structure, masks, cost: costs.total(structure, {}, cost))
    with pytest.warns(
        UserWarning, match=r"expected a slim model with a cost of at most .*, found .*: chanopt.optimize"
    ):
        choose(residual, 0.4, target="macs")


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


class Again(nn.Module):
    """A stream that one layer reads twice: whole and negated, or whole and in part."""

    def __init__(self, second: slice) -> None:
        super().__init__()
        self.second = second
        extra = len(range(16)[second])
        self.stem = nn.Conv2d(3, 16, 3)
        self.twice = nn.Conv2d(16 + extra, 8, 1)
        self.once = nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.twice(torch.cat([y, -y[:, self.second]], 1).relu()) + self.once(y)


@pytest.mark.parametrize("second", [slice(0, 16), slice(4, 12), slice(15, 16)], ids=str)
@pytest.mark.parametrize("seed", range(2))
def test_windows_where_a_layer_reads_a_channel_at_two_places(second: slice, seed: int) -> None:
    torch.manual_seed(seed)
    model = Again(second).eval()
    equal, own = (prune(model, IMAGE, 0.5, scope=scope) for scope in ("constrained", "consecutive"))
    assert {name: len(k) for name, k in kept(own).items()} == {name: len(k) for name, k in kept(equal).items()}
    assert chanopt.explain(chanopt.optimize(model, IMAGE, masks=own)).gathers == 0


def test_windows_are_what_is_written(residual: tuple[nn.Module, Structure]) -> None:
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
@pytest.mark.parametrize("name", digits.NETS)
def test_windows_keep_strictly_more_of_trained_nets(name: str) -> None:
    model = digits.trained(name, 0, 1).eval()
    inputs = (digits.data().test[:2],)
    structure = discover(model, inputs)
    equal, own = (
        prune(model, inputs, 0.5, scope=scope, structure=structure, effort=60)
        for scope in ("constrained", "consecutive")
    )
    assert {layer: len(k) for layer, k in kept(own).items()} == {layer: len(k) for layer, k in kept(equal).items()}
    assert retained(model, structure, own) > retained(model, structure, equal)
    assert chanopt.explain(chanopt.optimize(model, inputs, masks=own)).gathers == 0


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
