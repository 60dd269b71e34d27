"""The pruner in training: in a plain loop, in a trainer with hooks, in two processes; and what chanopt makes of it."""

from __future__ import annotations

import copy
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import chanopt
from chanopt import Mask
from chanopt.errors import AllocationError
from chanopt.pruning.masks import Hard, Permanent, Rescale, Soft, apply, masked, read
from chanopt.pruning.slices import original
from chanopt.pruning.smcp import (
    Groups,
    LatencyTable,
    MacCost,
    Options,
    ParameterCost,
    Schedule,
    SoftMaskCallback,
    SoftMaskPruner,
    choose,
    discover_groups,
    measure_latencies,
)
from chanopt.pruning.smcp.costs import key_of
from chanopt.torchvision_shim import ensure_torchvision
from tests.pruning.nets import Attention, Dense, Grouped, Mobile, Shared, Sum, randomised
from tests.pruning.smcp.nets import Branches, Residual, trained_norms

SCHEDULE = Schedule(0.5, epochs=6, warmup=1, ramp=2, cooldown=1, every=2)
X = (torch.randn(1, 3, 8, 8),)


def pruner_of(groups: Groups, model: nn.Module | None = None, **options: Any) -> SoftMaskPruner:
    schedule = options.pop("schedule", SCHEDULE)
    return SoftMaskPruner(model or Residual(), X, schedule, groups=groups, **options)


def train(
    pruner: SoftMaskPruner, epochs: int, batches: int = 4, spoil: Callable[[int], bool] | None = None, rate: float = 0.1
) -> list[float]:
    """A plain loop: pruner.start_epoch, pruner.step."""
    optimizer = torch.optim.SGD(pruner.model.parameters(), rate, momentum=0.9)
    losses: list[float] = []
    for epoch in range(epochs):
        pruner.start_epoch(epoch)
        for batch in range(batches):
            torch.manual_seed(10 * epoch + batch)
            x = torch.randn(8, 3, 8, 8)
            loss = nn.functional.cross_entropy(pruner.model(x), x.mean((1, 2, 3)).mul(20).long().clamp(0, 4))
            optimizer.zero_grad()
            loss.backward()
            if spoil is not None and spoil(epoch * batches + batch):
                original(pruner.model.conv2).grad.fill_(float("nan"))  # type: ignore[union-attr, arg-type]
            if pruner.step():
                optimizer.step()
            losses.append(loss.item())
    return losses


def fraction(model: nn.Module, name: str) -> float:
    mask = masked(model.get_submodule(name))
    assert mask is not None
    return float(mask.mask.double().mean())


# -- masks in training ------------------------------------------------------------------------------------------------


def test_s1_pruned_weights_go_on_learning_and_stay_unseen(residual: Groups) -> None:
    pruner = pruner_of(residual, importance="l2", decay_rate=0.0)
    choice = pruner.prune(0.5)
    assert choice.cost <= choice.target
    conv = pruner.model.get_submodule("conv2")
    mask = masked(conv)
    assert isinstance(mask, Soft)
    assert 0 < fraction(pruner.model, "conv2") < 1
    before = original(conv).detach().clone()
    train(pruner, 1)
    gone = ~mask.mask
    assert bool((original(conv) != before)[gone].all())
    assert bool((conv.weight[gone] == 0).all())  # type: ignore[index, operator]


def test_s2_only_soft_masks_let_channels_return(residual: Groups) -> None:
    returned = {}
    for kind in (Soft, Permanent):
        torch.manual_seed(1)
        schedule = Schedule(0.5, epochs=12, warmup=0, ramp=2, cooldown=0, every=1)
        pruner = pruner_of(residual, mask=kind, schedule=schedule)
        train(pruner, 8, rate=0.3)
        returned[kind] = sum(change.returned for change in pruner.tracker.changes)
        assert pruner.tracker.changes[-1].pruned > 0
    assert returned[Soft] > 0
    assert returned[Permanent] == 0


def test_s7_masked_weights_have_a_magnitude(residual: Groups) -> None:
    """Scores are those of the weights behind the masks, or no channel would ever come back."""
    pruner = pruner_of(residual, importance="l1")
    first = pruner.prune(0.5)
    with torch.no_grad():
        weight = original(pruner.model.get_submodule("conv2"))
        place = [group.name for group in residual.groups].index("conv1")
        gone = min(set(range(24)) - set(first.kept[place]))
        weight[:, gone] = 9.0
    assert gone in pruner.prune(0.5).kept[place]
    assert pruner.tracker.changes[-1].returned > 0


def test_s3_masks_survive_baking(residual: Groups) -> None:
    pruner = pruner_of(residual, trained_norms(Residual()), importance="l1")
    pruner.prune(0.4)
    model, x = pruner.model.eval(), torch.randn(2, 3, 8, 8)
    before, masks = model(x), pruner.masks()
    baked = pruner.bake()
    assert torch.equal(baked(x), before)
    assert not any("parametrizations" in name for name, _ in baked.named_parameters())
    assert {name for name, mask in read(baked).items() if mask.inputs is not None} == set(masks)


def test_s4_decay_is_added_to_the_gradients(residual: Groups) -> None:
    pruner = pruner_of(residual, importance="l2", decay_rate=0.1)
    pruner.prune(0.5)
    stored, mask = original(pruner.model.get_submodule("conv2")), masked(pruner.model.get_submodule("conv2"))
    pruner.model(torch.randn(4, 3, 8, 8)).square().mean().backward()
    assert stored.grad is not None
    assert mask is not None
    before = stored.grad.clone()
    pruner.step()
    assert torch.allclose(stored.grad, before + 0.1 * stored.detach() * ~mask.mask)


@pytest.mark.parametrize("kind", Rescale)
def test_s6_batch_norms_follow_the_masks_before_them(residual: Groups, kind: Rescale) -> None:
    pruner = pruner_of(residual, importance="l2", rescaling=kind)
    scores = pruner._importance.score(pruner._members["conv1"], 24)
    choice = pruner.prune(0.5)
    norm = pruner.model.get_submodule("norm2")
    gamma = original(norm)
    places = [group.name for group in residual.groups]
    kept = choice.kept[places.index("conv1")]
    assert 0 < len(kept) < 24
    scale = {
        Rescale.SKIP: 1.0,
        Rescale.BINARY: 1.0,
        Rescale.PRUNE_FRACTION: len(kept) / 24,
        Rescale.IMPORTANCE_FRACTION: float(scores[list(kept)].sum() / scores.sum()),
    }[kind]
    assert torch.allclose(norm.weight, gamma * scale)  # type: ignore[arg-type]


def test_s8_scores_of_a_group_are_the_size_of_a_signed_sum(residual: Groups) -> None:
    pruner = pruner_of(residual)
    pruner.model(torch.randn(4, 3, 8, 8)).square().mean().backward()
    total = torch.zeros(16)
    for name in ("conv1", "last"):
        weight = original(pruner.model.get_submodule(name))
        assert weight.grad is not None
        total += (-weight * weight.grad).detach().sum((0, 2, 3))
    found = pruner._importance.score(pruner._members["stem"], 16)
    assert torch.allclose(found.float(), total.abs(), atol=1e-6)


@pytest.mark.parametrize("kind", ["average", "momentum", "latest"])
def test_s9_scores_accumulate_between_prunings(residual: Groups, kind: str) -> None:
    schedule = Schedule(0.5, epochs=6, warmup=0, ramp=0, cooldown=0, every=3)
    pruner = pruner_of(residual, accumulate=kind, schedule=schedule)
    seen: list[torch.Tensor] = []
    real = pruner._importance.score

    def score(members: Any, count: int) -> torch.Tensor:
        found = real(members, count)
        if members is pruner._members["conv1"]:
            seen.append(found)
        return found

    object.__setattr__(pruner._importance, "score", score)
    used: list[torch.Tensor] = []
    solve = pruner._solve
    pruner._solve = lambda scores, ratio: (used.append(scores["conv1"]), solve(scores, ratio))[1]  # type: ignore[method-assign]
    train(pruner, 1, batches=4)
    assert len(used) == 2
    by_hand = {
        "latest": lambda: seen[-1],
        "average": lambda: (seen[1] + seen[2] + seen[3]) / 3,
        "momentum": lambda: 0.1 * (0.81 * seen[1] + 0.9 * seen[2] + seen[3]),
    }[kind]()
    assert len(seen) == (2 if kind == "latest" else 4)
    assert torch.allclose(used[1], by_hand)


# -- layers that go, and the compiler ---------------------------------------------------------------------------------


def scores_without(groups: Groups, *worthless: str) -> dict[str, list[float]]:
    return {
        group.name: [0.0 if group.name in worthless else 1.0 + n for n in range(group.channels)]
        for group in groups.groups
        if group.prunable
    }


def names_of(fast: nn.Module) -> set[str]:
    return {name.rpartition(".")[0] for name, _ in fast.named_parameters()}


def test_s16_a_worthless_branch_goes_whole(residual: Groups) -> None:
    model = trained_norms(Residual())
    choice = choose(residual, scores_without(residual, "conv1"), ratio=0.5, options=Options(layer_pruning=True))
    places = {group.name: number for number, group in enumerate(residual.groups)}
    assert choice.kept[places["conv1"]] == ()
    assert choice.masks["conv2"].inputs == ()
    apply(model, choice.masks)
    fast = chanopt.optimize(model, X)
    chanopt.verify(model, fast, X)
    assert not names_of(fast) & {"conv1", "conv2", "norm1"}
    kept = choose(residual, scores_without(residual, "conv1"), ratio=0.5).kept
    assert len(kept[places["conv1"]]) == 8


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_s16_blocks_of_a_resnet_go_whole(name: str, request: pytest.FixtureRequest) -> None:
    x = (torch.randn(1, 3, 64, 64),)
    if name == "resnet18":
        model, groups = request.getfixturevalue(name)
    else:
        ensure_torchvision()
        model = importlib.import_module("torchvision.models").resnet50(weights=None).eval()
        groups = discover_groups(model, x)
    dead = ["layer2.1.conv1", "layer3.1.conv1", "layer4.1.conv1"]
    scores = {
        group.name: [0.0 if group.name in dead else 1.0] * group.channels for group in groups.groups if group.prunable
    }
    choice = choose(groups, scores, ratio=0.3, options=Options(layer_pruning=True))
    gone = [group.name for group, kept in zip(groups.groups, choice.kept, strict=True) if not kept]
    assert set(dead) <= set(gone)
    masked_twin = apply(trained_norms(copy.deepcopy(model)), choice.masks)
    fast = chanopt.optimize(masked_twin, x)
    assert chanopt.verify(masked_twin, fast, x, trials=1) <= 4e-7
    left = {layer.rpartition(".")[0] for layer in names_of(fast)}
    assert not left & {layer.rpartition(".")[0] for layer in dead}


def test_s16_branches_do_not_both_go(branches: Groups) -> None:
    """Neither branch alone is a cut; the two together are, which one-by-one tests do not see."""
    places = {group.name: number for number, group in enumerate(branches.groups)}
    options = Options(layer_pruning=True)
    choice = choose(branches, scores_without(branches, "left", "right"), ratio=0.5, options=options)
    gone = {number for number, kept in enumerate(choice.kept) if not kept}
    assert gone
    assert branches.connected(gone)
    assert choice.instance.cuts
    assert not {places["left"], places["right"]} <= gone
    model = apply(trained_norms(Branches()), choice.masks)
    chanopt.verify(model, chanopt.optimize(model, X), X)


def chain(*layers: nn.Module) -> nn.Module:
    return trained_norms(nn.Sequential(*layers))


class Bypass(nn.Module):
    """A block with or without a conv on its bypass."""

    def __init__(self, bypass: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 1))
        self.bypass = nn.Conv2d(8, 8, 1) if bypass else nn.Identity()
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x).relu()
        return self.last((self.block(y) + self.bypass(y)).relu())


NINE: dict[str, tuple[Callable[[], nn.Module], dict[str, Mask]]] = {
    "inputs": (lambda: chain(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), {"2": Mask(inputs=range(3))}),
    "outputs": (lambda: chain(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), {"0": Mask(outputs=range(3))}),
    "norm": (
        lambda: chain(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)),
        {"3": Mask(inputs=[1, 2, 5])},
    ),
    "constant behind a norm": (
        lambda: chain(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)),
        {"0": Mask(outputs=[1, 2, 5])},
    ),
    "depthwise": (
        lambda: chain(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)),
        {"3": Mask(inputs=[0, 7])},
    ),
    "linear": (
        lambda: chain(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 6), nn.Linear(6, 3)),
        {"3": Mask(inputs=range(8, 20)), "4": Mask(inputs=[1, 4])},
    ),
    "bypass": (lambda: trained_norms(Bypass(False)), {"block.0": Mask(inputs=[0, 1]), "last": Mask(inputs=[1, 2])}),
    "bypass with a conv": (
        lambda: trained_norms(Bypass(True)),
        {"bypass": Mask(inputs=[3]), "block.3": Mask(inputs=[0], outputs=[0, 2]), "last": Mask(inputs=[0, 2, 3])},
    ),
    "dead layer": (lambda: trained_norms(Bypass(False)), {"block.3": Mask(inputs=())}),
}


@pytest.mark.parametrize("name", NINE)
def test_s20_nine_slim_models_in_float64(name: str) -> None:
    build, masks = NINE[name]
    model = apply(build(), masks).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    fast = chanopt.optimize(model, (x,))
    fresh = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(fast(fresh), model(fresh), rtol=0, atol=1e-11)
    assert sum(p.numel() for p in fast.parameters()) < sum(p.numel() for p in model.parameters())


def test_s20_slim_models_compute_the_same_and_cost_what_was_said(residual: Groups) -> None:
    """What SMCP's slimmer does, from zeros: in float64 on fresh inputs, for parameters and multiplications."""
    torch.manual_seed(5)
    for ratio in (0.3, 0.6):
        scores = {group.name: torch.rand(group.channels).tolist() for group in residual.groups}
        model = trained_norms(Residual())
        choice = choose(residual, scores, ratio=ratio, options=Options(multiple=4))
        apply(model, choice.masks)
        fast = chanopt.optimize(model, X)
        chanopt.verify(model, fast, X)
        assert sum(p.numel() for p in fast.parameters() if p.ndim > 1) == choice.allocation.cost
        by_name = chanopt.optimize(trained_norms(Residual()), X, masks=choice.masks)
        shapes = [{name: tuple(p.shape) for name, p in net.named_parameters()} for net in (fast, by_name)]
        assert shapes[0] == shapes[1]
        choice = choose(residual, scores, MacCost(), ratio, Options(multiple=4))
        fast = chanopt.optimize(model := apply(trained_norms(Residual()), choice.masks), X)
        assert chanopt.explain(fast).macs_after == choice.allocation.cost
        assert model is not fast


@pytest.mark.parametrize("net", [Sum, Grouped, Shared, Attention, Dense, Mobile])
@pytest.mark.parametrize("cost", [ParameterCost(), MacCost()])
def test_s20_what_was_said_is_the_slim_model(net: type[nn.Module], cost: Any) -> None:
    """Also of layers without a name for masks, in groups, or called twice and cut differently."""
    model = randomised(net())
    groups = discover_groups(model, X)
    scores = {group.name: torch.rand(group.channels).tolist() for group in groups.groups}
    choice = choose(groups, scores, cost, 0.15, Options(multiple=2))
    fast = chanopt.optimize(model, X, masks=choice.masks)
    report = chanopt.explain(fast)
    if cost.name == "parameters":
        before, after = (sum(p.numel() for p in m.parameters() if p.ndim > 1) for m in (model, fast))
    else:  # the report does not count convs that it does not follow, as transposed ones in groups
        fixed = sum(layer.macs() for layer in groups.structure.others.values() if "transpose" in layer.kind)
        before, after = report.macs_before + fixed, report.macs_after + fixed
    assert round(choice.before / cost.unit) == before
    assert round(choice.cost / cost.unit) == after
    assert after <= round(choice.target / cost.unit) <= before


def test_s20_a_slim_model_that_misses_the_target_is_said(residual: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chanopt.pruning.costs.total", lambda structure, masks, cost: 1e9)
    scores = {group.name: torch.rand(group.channels).tolist() for group in residual.groups}
    with pytest.warns(UserWarning, match=r"expected a slim model within .* of parameters, found 1000: it keeps more"):
        choose(residual, scores, ratio=0.5)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, "a", float("nan")])
def test_a_ratio_out_of_range_is_said(residual: Groups, ratio: Any) -> None:
    scores = {group.name: [1.0] * group.channels for group in residual.groups}
    for call in (lambda: choose(residual, scores, ratio=ratio), lambda: Schedule(ratio)):
        with pytest.raises(AllocationError, match="expected a pruning ratio from 0 up to but not 1, found"):
            call()


def test_budget_in_measured_milliseconds(residual: Groups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine where a layer takes a fixed time and some more by its size."""
    monkeypatch.setattr(
        "chanopt.pruning.smcp.measure._time", lambda layer, key, *_: 0.01 + 1e-3 * key.inputs * key.outputs / key.groups
    )
    layers = list(residual.structure.layers.values())
    table = measure_latencies(layers, cache=tmp_path, points=2, repeats=1)
    scores = scores_without(residual)
    choice = choose(residual, scores, table, 0.2, Options(multiple=4))
    assert choice.cost <= choice.target
    assert choice.target == pytest.approx(0.8 * choice.before)
    counts = {name: len(mask.inputs or ()) for name, mask in choice.masks.items()}
    assert counts
    choice.allocation.check(choice.instance)


def test_a_budget_by_a_made_up_table(residual: Groups) -> None:
    """Latency that only falls at 8 channels: nothing between is worth keeping."""
    entries = {
        key._replace(inputs=i, outputs=o): 1.0 + (i > 8) + (o > 8)
        for layer in residual.structure.layers.values()
        for key in [key_of(layer, 1)]
        if not layer.depthwise
        for i in (8, key.inputs)
        for o in (8, key.outputs)
    }
    deep = key_of(residual.structure.layers["deep"], 1)
    entries |= {deep._replace(inputs=c, outputs=c, groups=c): c / 8 for c in (8, 16)}
    choice = choose(residual, scores_without(residual), LatencyTable(entries), 0.3, Options(multiple=4))
    assert choice.cost <= choice.target
    assert any(choice.masks)
    counts = {g.name: len(kept) for g, kept in zip(residual.groups, choice.kept, strict=True)}
    assert all(counts[name] in (8, 16, 24) for name in ("stem", "conv1"))


# -- when -------------------------------------------------------------------------------------------------------------


def test_s18_event_log_and_frozen_masks(residual: Groups) -> None:
    pruner = pruner_of(residual)
    train(pruner, 6, spoil=lambda step: step in (6, 9, 21))
    # Epoch 1 is step 4; step 6 is skipped, and with it its pruning; epoch 5, from step 20 on, is the cool-down.
    expected = [(4, "pruned"), (6, "skipped"), (8, "pruned"), (9, "skipped")]
    assert pruner.events[:4] == expected
    assert [step for step, what in pruner.events if what == "pruned"] == [4, 8, 10, 12, 14, 16, 18]
    assert pruner.events[-1] == (21, "skipped")
    last = max(step for steps in pruner.tracker.last_change.values() for step in steps)
    assert last <= 18
    assert pruner.tracker.settled(20) == 1.0
    assert pruner.choice is not None
    assert pruner.choice.cost <= pruner.choice.target


def test_s18_nothing_without_gradients_in_the_warm_up(residual: Groups) -> None:
    pruner = pruner_of(residual)
    assert not pruner.step()
    assert pruner.events == [(0, "skipped")]
    assert pruner.masks() == {}


def test_s19_protected_layers_stay_whole(residual: Groups) -> None:
    pruner = pruner_of(residual, importance="l2", protect=["conv1"], options=Options(multiple=4))
    with pytest.raises(AllocationError, match=r"raise the target .*keep all their channels"):
        pruner.prune(0.9)
    pruner.prune(0.01)
    assert set(pruner.masks()) <= {"fc"}
    assert masked(pruner.model.get_submodule("conv2")) is None


def test_s22_channels_last_trains_alike(residual: Groups) -> None:
    losses = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(2)
        pruner = pruner_of(residual, Residual().to(memory_format=layout))
        losses.append((train(pruner, 3, rate=0.01), pruner.kept))
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-3)
    assert losses[0][1] == losses[1][1]


def test_training_goes_on_from_a_checkpoint(residual: Groups) -> None:
    pruner = pruner_of(residual, importance="l2")
    pruner.start_epoch(3)
    pruner.prune(0.5)
    other = pruner_of(residual, importance="l2")
    other.model.load_state_dict(pruner.model.state_dict())
    other.load_state_dict(json.loads(json.dumps(pruner.state_dict())))
    assert other.kept == pruner.kept
    assert other.state_dict() == pruner.state_dict()
    assert fraction(other.model, "conv2") == fraction(pruner.model, "conv2")
    with pytest.raises(AllocationError, match="expected the state of a pruner"):
        other.load_state_dict({**pruner.state_dict(), "kept": ((0,),)})


@pytest.mark.parametrize("accumulate", ["average", "momentum"])
def test_scores_since_the_last_pruning_are_resumed(residual: Groups, accumulate: str) -> None:
    schedule = Schedule(0.5, epochs=6, warmup=1, ramp=2, cooldown=1, every=3)
    states: list[Any] = []
    for stops in (False, True):
        torch.manual_seed(0)
        pruner = pruner_of(residual, schedule=schedule, accumulate=accumulate)
        pruner.start_epoch(1)
        for step in range(6):  # prunes at steps 0 and 3; stops between them
            if stops and step == 2:
                state, weights = json.loads(json.dumps(pruner.state_dict())), pruner.model.state_dict()
                assert state["scores"]["values"]
                pruner = pruner_of(residual, schedule=schedule, accumulate=accumulate)
                pruner.model.load_state_dict(weights)
                pruner.load_state_dict(state)
            torch.manual_seed(step)
            pruner.model.zero_grad()
            pruner.model(torch.randn(4, 3, 8, 8)).square().mean().backward()
            pruner.step()
        states.append(pruner.state_dict())
    assert states[0] == states[1]


def test_the_pruner_captures_a_model_in_training_mode() -> None:
    model = Residual().train()
    model.norm1.eval()
    pruner = SoftMaskPruner(model, X, SCHEDULE, importance="l2", mask=Hard)
    assert model.training
    assert model.norm.training
    assert not model.norm1.training
    assert {group.name for group in pruner.groups.groups if group.prunable} == {"stem", "conv1", "last"}
    with pytest.raises(AllocationError, match="average, momentum"):
        SoftMaskPruner(model, X, SCHEDULE, accumulate="median", groups=pruner.groups)


# -- trainers ---------------------------------------------------------------------------------------------------------


class Trainer:
    """The hooks of Lightning's trainer that the callback uses, in Lightning's order."""

    def __init__(self, callback: SoftMaskCallback, epochs: int) -> None:
        self.callback, self.epochs, self.current_epoch = callback, epochs, 0

    def fit(self, module: nn.Module) -> None:
        self.callback.setup(self, module, "fit")
        optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
        for epoch in range(self.epochs):
            self.current_epoch = epoch
            self.callback.on_train_epoch_start(self, module)
            for batch in range(4):
                torch.manual_seed(10 * self.current_epoch + batch)
                x = torch.randn(8, 3, 8, 8)
                optimizer.zero_grad()
                nn.functional.cross_entropy(module(x), x.mean((1, 2, 3)).mul(20).long().clamp(0, 4)).backward()
                self.callback.on_before_optimizer_step(self, module, optimizer)
                optimizer.step()


def test_callback_does_what_the_loop_does(residual: Groups) -> None:
    kept = []
    for way in ("loop", "callback"):
        torch.manual_seed(7)
        model = Residual()
        if way == "loop":
            pruner = pruner_of(residual, model)
            train(pruner, 4)
        else:
            callback = SoftMaskCallback(lambda module: pruner_of(residual, module))
            with pytest.raises(AllocationError, match="has started"):
                _ = callback.pruner
            Trainer(callback, 4).fit(model)
            pruner = callback.pruner
        kept.append((pruner.kept, pruner.events))
    assert kept[0] == kept[1]
    later = SoftMaskCallback(lambda module: pruner_of(residual, module))
    later.load_state_dict(callback.state_dict())
    later.setup(None, Residual())
    assert later.pruner.kept == callback.pruner.kept
    later.setup(None, Residual(), "validate")


@pytest.mark.slow
def test_lightning_trains_with_the_callback_and_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}", "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("in_lightning.py")
    words = [sys.executable, "-W", "ignore", str(script), str(tmp_path / "run"), str(tmp_path / "result.json")]
    subprocess.run(words, env=environment, cwd=root, check=True, timeout=300)
    told = json.loads((tmp_path / "result.json").read_text())
    first = told["first"]
    assert any(len(channels) < 16 for channels in first["kept"])
    assert first["cost"] <= first["target"]
    pruned = [step for step, what in first["events"] if what == "pruned"]
    assert pruned
    assert told["later"]
    assert min(step for step, _ in told["later"]) >= 4 * 4  # it goes on behind the four epochs of the checkpoint


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "local", "skip", "infeasible"])
def test_two_processes_decide_alike(mode: str, tmp_path: Path) -> None:
    """`local` has gradients of its own data in each process, so that alone they would decide otherwise."""
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}", "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("two_processes.py")
    results = [tmp_path / f"{rank}.json" for rank in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path / "meeting"), str(results[rank]), mode],
            env=environment,
            cwd=root,
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    one, other = (json.loads(result.read_text()) for result in results)
    if mode == "infeasible":
        assert one["error"] == other["error"]
        assert "within the target cost" in one["error"]
        return
    (kept, events), (others, other_events) = one["kept"], other["kept"]
    assert kept == others
    assert any(len(channels) < 16 for channels in kept)
    pruned = [[step for step, what in log if what == "pruned"] for log in (events, other_events)]
    assert pruned[0] == pruned[1] == ([4, 6] if mode == "skip" else [0, 2, 4, 6])
    assert mode != "skip" or [step for step, what in other_events if what == "skipped"] == [0, 1, 2, 3]
    assert mode == "ddp" or one["local"] != other["local"]


def test_discovery_is_only_done_when_needed(residual: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chanopt.pruning.smcp.pruner.discover_groups", None)
    assert pruner_of(residual).groups.structure == residual.structure
