"""The YAML of schedules (D11), and what is said where layers that must be pruned alike are not (4b of Distiller's bugs)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from torch.optim.lr_scheduler import StepLR

import chanopt
from chanopt.errors import ScheduleError
from chanopt.pruning.distiller import (
    CompressionScheduler,
    DisagreementError,
    LRPolicy,
    PruningPolicy,
    Schedule,
    StructureRemover,
    load_schedule,
    parse_schedule,
)
from chanopt.pruning.distiller.ranked import L1RankedStructureParameterPruner_AGP
from tests.pruning.distiller.networks import SCHEDULES, Example3, Example4, play, resnet20_cifar

FILES = sorted(SCHEDULES.glob("*.yaml"))

EXAMPLE = """
version: 1
pruners:
  example_pruner:
    class: L1RankedStructureParameterPruner_AGP
    initial_sparsity : 0.10
    final_sparsity: 0.50
    group_type: Filters
    weights: [module.conv1.weight]
"""
LEADER = """
pruners:
  example_pruner:
    class: L1RankedStructureParameterPruner_AGP
    initial_sparsity : 0.10
    final_sparsity: 0.50
    group_type: Filters
    group_dependency: Leader
    weights: [module.conv1.weight, module.conv2.weight]
"""
CHANNELS = """
pruners:
  example_pruner:
    class: L1RankedStructureParameterPruner_AGP
    initial_sparsity : 0.10
    final_sparsity: 0.50
    group_type: Channels
    weights: [module.conv2.weight]
"""
POLICIES = """
extensions:
  thinner: {class: FilterRemover, thinning_func_str: FUNCTION, arch: example, dataset: cifar10}
policies:
  - pruner: {instance_name: example_pruner}
    starting_epoch: 0
    ending_epoch: 6
    frequency: 2
  - extension: {instance_name: thinner}
    epochs: [6]
"""


def with_policies(text: str, function: str = "remove_filters") -> str:
    return text + POLICIES.replace("FUNCTION", function)


def image() -> tuple[torch.Tensor]:
    return (torch.randn(1, 3, 8, 8),)


# -- reading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_d11_example_schedules_load_unchanged(path: Path) -> None:
    schedule = load_schedule(path)
    data = yaml.safe_load(path.read_text())
    assert {entry.name for entry in schedule.declarations if entry.section == "pruners"} == set(data["pruners"])
    assert len(schedule.policies) == len(data["policies"])
    assert parse_schedule(schedule.to_yaml()) == schedule


@pytest.mark.parametrize("text", [EXAMPLE, LEADER, CHANNELS], ids=["filters", "leader", "channels"])
def test_d11_the_tutorials_snippets(text: str) -> None:
    function = "remove_channels" if "Channels" in text else "remove_filters"
    scheduler = parse_schedule(with_policies(text, function)).build(
        Example4() if text is LEADER else chain(), inputs=image()
    )
    (policy,) = (policy for policy in scheduler.policies if isinstance(policy, PruningPolicy))
    assert isinstance(policy.pruner, L1RankedStructureParameterPruner_AGP)
    assert policy.pruner.weights[0] in ("conv1.weight", "conv2.weight")  # module. is of DataParallel
    assert scheduler.epochs == 7


def chain() -> nn.Module:
    from tests.pruning.distiller.networks import Example1

    return Example1()


def test_d11_all_sections_come_to_life() -> None:
    model = resnet20_cifar()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    path = SCHEDULES / "resnet20_filters.schedule_agp_2.yaml"
    scheduler = load_schedule(path).build(model, optimizer, inputs=(torch.randn(1, 3, 32, 32),))
    assert isinstance(scheduler, CompressionScheduler)
    kinds = [type(policy) for policy in scheduler.policies]
    assert kinds == [PruningPolicy, LRPolicy, PruningPolicy, StructureRemover]
    rates = next(policy for policy in scheduler.policies if isinstance(policy, LRPolicy))
    assert isinstance(rates.lr_scheduler, StepLR)
    assert scheduler.epochs == 400


def test_d11_policies_of_one_epoch_run_in_the_order_of_declaration() -> None:
    text = with_policies(LEADER).replace("epochs: [6]", "epochs: [0]")
    head, _, tail = text.partition("policies:\n")
    lines = [f"  - {entry}" for entry in re.split(r"^  - ", tail, flags=re.MULTILINE)[1:]]
    turned = head + "policies:\n" + "".join(reversed(lines))
    for given, first in ((text, PruningPolicy), (turned, StructureRemover)):
        scheduler = parse_schedule(given).build(Example4(), inputs=image())
        assert isinstance(scheduler.at(0)[0], first)


def entry(**change: Any) -> dict[str, Any]:
    pruner = {"class": "L1RankedStructureParameterPruner", "group_type": "Filters", "desired_sparsity": 0.5}
    pruner = {**pruner, "weights": ["conv1.weight"], **change}
    policies = [{"pruner": {"instance_name": "p"}, "epochs": [0]}]
    return {
        "version": 1,
        "pruners": {"p": {k: v for k, v in pruner.items() if v is not None}},
        "policies": policies,
    }


def changed(**sections: Any) -> dict[str, Any]:
    return {**entry(), **sections}


RATE = {"r": {"class": "StepLR", "step_size": 5}}
RATES = [{"lr_scheduler": {"instance_name": "r"}, "epochs": [0]}]


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ([], "expected a schedule with sections and policies, found list"),
        (changed(prunners={}), "expected the sections pruners, .* found 'prunners'"),
        (changed(pruners=[1]), "pruners: expected entries by name, found list"),
        (changed(pruners={"p": 3}), "pruners: p: expected a class and its arguments, found 3"),
        (entry(**{"class": "L1RankedPruner"}), "p: expected a class such as .*L1RankedStruct.*found 'L1RankedPruner'"),
        (entry(**{"class": "eval"}), "p: expected a class such as .* found 'eval'"),
        (entry(sparsity=0.5), "p: expected arguments of L1Ranked.*desired_sparsity.*found unknown sparsity"),
        (entry(desired_sparsity=None), "p: expected arguments of .*found none for desired_sparsity"),
        (changed(policies=[]), "expected policies: a list"),
        (changed(policies=[{"prune": {}}]), "policies: expected each to name one of pruner, regularizer"),
        (changed(policies=[{"pruner": None, "epochs": [0]}]), "expected instance_name under pruner, found None"),
        (changed(policies=[{"pruner": {"instance_name": "q"}, "epochs": [0]}]), "one of the pruners p, found 'q'"),
        (changed(policies=[{"pruner": {"instance_name": "p"}}]), "policies: p: expected either epochs, or starting"),
        (changed(policies=[{"pruner": {"instance_name": "p"}, "epochs": 3}]), "p: expected epochs to be a list"),
        (changed(policies=[{"pruner": {"instance_name": "p"}, "epoch": [3]}]), "p: expected epochs or .*found 'epoch'"),
        (
            changed(
                policies=[{"pruner": {"instance_name": "p"}, "starting_epoch": 5, "ending_epoch": 5, "frequency": 1}]
            ),
            "policies: p: expected 0 <= starting_epoch < ending_epoch",
        ),
        (changed(quantizers={"a": {"class": "A"}, "b": {"class": "B"}}), "at most one quantizer"),
    ],
)
def test_d11_what_is_wrong_is_named(data: Any, told: str) -> None:
    with pytest.raises(ScheduleError, match=told):
        Schedule.from_dict(data)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (entry(desired_sparsity=2), r"pruners: expected desired_sparsity between 0 and 1, found 2 \(in p\)"),
        (entry(weights=["conv7.weight"]), r"found 'conv7.weight'; nearest names: .*conv1.weight \(in p\)"),
        (changed(lr_schedulers=RATE, policies=RATES), "lr_schedulers: r: expected an optimizer"),
        (
            changed(policies=[{"pruner": {"instance_name": "p", "args": {"keepmask": True}}, "epochs": [0]}]),
            "p: expected arguments that .* accepts.*keepmask",
        ),
        (
            changed(
                quantizers={"q": {"class": "DorefaQuantizer"}},
                policies=[{"quantizer": {"instance_name": "q"}, "epochs": [0]}],
            ),
            "quantizers: q: .*chanopt does not quantize: build with skip={'quantizers'}",
        ),
        (
            changed(
                extensions={"t": {"class": "FilterRemover", "thinning_func_str": "rm"}},
                policies=[{"extension": {"instance_name": "t"}, "epochs": [0]}],
            ),
            "thinning_func_str to be one of remove_filters, remove_channels, contract_model, found 'rm'",
        ),
    ],
)
def test_d11_what_is_wrong_with_a_network_is_named(data: Any, told: str) -> None:
    with pytest.raises(ScheduleError, match=told):
        Schedule.from_dict(data).build(Example3())


def test_d11_sections_can_be_left_out() -> None:
    data = changed(lr_schedulers=RATE, policies=[*entry()["policies"], *RATES])
    scheduler = Schedule.from_dict(data).build(Example3(), skip={"lr_schedulers"})
    assert [type(policy) for policy in scheduler.policies] == [PruningPolicy]
    with pytest.raises(ScheduleError, match="expected skip among .*found \\['learning_rates'\\]"):
        Schedule.from_dict(data).build(Example3(), skip={"learning_rates"})


def test_d11_files_that_are_no_schedules(tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match=r"nowhere.yaml, found No such file"):
        load_schedule(tmp_path / "nowhere.yaml")
    (tmp_path / "bad.yaml").write_text("pruners: [")
    with pytest.raises(ScheduleError, match=r"bad.yaml: expected YAML, found an error: .*line 1"):
        load_schedule(tmp_path / "bad.yaml")


def test_d11_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    with pytest.raises(ScheduleError, match="could not determine a constructor"):
        parse_schedule(f"pruners: !!python/object/apply:os.mkdir ['{marker}']")
    assert not marker.exists()


# -- layers that must be pruned alike -------------------------------------------------------------------------------


def forgotten(weights: str = "[module.conv1.weight, module.conv2.weight]") -> str:
    """The tutorial's example 4 with the leader forgotten."""
    return with_policies(
        LEADER.replace("    group_dependency: Leader\n", "").replace(
            "[module.conv1.weight, module.conv2.weight]", weights
        )
    )


def test_example_4_without_a_leader_is_explained_before_anything_is_touched() -> None:
    """Distiller thins this without a word, and the network is wrong by 19 % of its output."""
    model = Example4()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(DisagreementError) as caught:
        parse_schedule(forgotten()).build(model, inputs=image())
    told = str(caught.value)
    assert "filters meet at aten.add.Tensor" in told
    assert "self.conv1(x) + self.conv2(x)" in told  # the user's source line
    for number, layer in enumerate(("conv1", "conv2")):
        sizes = before[f"{layer}.weight"].flatten(1).abs().sum(1)
        keep = sorted(torch.argsort(sizes)[4:].tolist())
        (kept,) = (kept for kept in caught.value.conflicts[0].layers if kept.layer == layer)
        assert kept.keep == tuple(keep)
        assert f"operand {number}: {layer} keeps 4 of 8" in told
        assert "(pruner example_pruner)" in told
    assert "group_dependency: Leader" in told
    assert "weights: [module.conv1.weight, module.conv2.weight]" in told
    assert 'on_conflict="unconstrained"' in told
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("weights", "kept"),
    [
        ("[module.conv1.weight]", {"conv1": 4, "conv2": 8}),
        ("module.conv2.weight", {"conv1": 8, "conv2": 4}),
    ],
)
def test_example_4_with_one_layer_forgotten(weights: str, kept: dict[str, int]) -> None:
    """Distiller: "The size of tensor a (6) must match the size of tensor b (8)", at the next forward."""
    with pytest.raises(DisagreementError) as caught:
        parse_schedule(forgotten(weights)).build(Example4(), inputs=image())
    (conflict,) = caught.value.conflicts
    assert {entry.layer: len(entry.keep or ()) for entry in conflict.layers} == kept
    assert {"conv1.weight", "conv2.weight"} == {
        name.removeprefix("module.") for name in re.findall(r"[\w.]+\.weight", conflict.remedy)
    }


def pasted(text: str, remedy: str) -> str:
    """A schedule with the lines of a remedy written into it, as a user would."""
    data, lines = yaml.safe_load(text), yaml.safe_load(remedy)
    data["pruners"].update(lines["pruners"])
    data["policies"] = [*lines.get("policies", []), *data["policies"]]
    return yaml.safe_dump(data)


@pytest.mark.parametrize(
    "weights",
    [
        "[module.conv1.weight, module.conv2.weight]",
        "[module.conv2.weight]",
        "[module.conv2.weight, module.conv3.weight]",
        "[conv3.weight, conv2.weight, conv1.weight]",
    ],
)
def test_the_remedy_pasted_in_is_a_remedy(weights: str) -> None:
    text = forgotten(weights)
    with pytest.raises(DisagreementError) as caught:
        parse_schedule(text).build(Example4(), inputs=image())
    (conflict,) = caught.value.conflicts
    parse_schedule(pasted(text, conflict.remedy)).build(Example4(), inputs=image())


class Concat(nn.Module):
    """Readers of a concat, of its operands the other way round, and where there is a chain of the first operand."""

    def __init__(self, chain: bool) -> None:
        super().__init__()
        self.chain = chain
        self.one = nn.Conv2d(3, 8, 3, padding=1)
        self.two = nn.Conv2d(8 if chain else 3, 8, 3, padding=1)
        self.wide = nn.Conv2d(16, 4, 1)
        self.turned = nn.Conv2d(16, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.one(x).relu()
        b = self.two(a if self.chain else x).relu()
        return self.wide(torch.cat([a, b], 1)) + self.turned(torch.cat([b, a], 1))


@pytest.mark.parametrize(
    ("chain", "weights"),
    [
        (True, "[two.weight]"),
        (True, "[wide.weight, turned.weight]"),
        (False, "[wide.weight, turned.weight]"),
        (False, "[wide.weight]"),
    ],
)
@pytest.mark.parametrize("leader", ["", "\n    group_dependency: Leader"])
def test_no_leader_is_offered_where_none_can_lead(chain: bool, weights: str, leader: str) -> None:
    text = with_policies(CHANNELS, "remove_channels")
    text = re.sub(r"weights: .*", f"weights: {weights}{leader}", text)
    for on_conflict in ("raise", "leader"):
        with pytest.raises(DisagreementError, match="no leader can have them pruned alike") as caught:
            parse_schedule(text).build(Concat(chain), inputs=image(), on_conflict=on_conflict)
        assert all(conflict.remedy == "" for conflict in caught.value.conflicts)
    parse_schedule(text).build(Concat(chain), inputs=image(), on_conflict="unconstrained")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("3", "policies: example_pruner: expected args as names and values, found 3"),
        ("{levels: 3}", "expected levels by weight, found 3 (in example_pruner)"),
        ("{mini_batch_pruning_frequency: -1}", "expected mini_batch_pruning_frequency as a number of minibatches"),
        ("{mini_batch_pruning_frequency: often}", "expected mini_batch_pruning_frequency as a number of minibatches"),
    ],
)
def test_d12_arguments_of_a_policy_that_make_no_sense(arguments: str, told: str) -> None:
    data = yaml.safe_load(with_policies(LEADER))
    data["policies"][0]["pruner"]["args"] = yaml.safe_load(arguments)
    with pytest.raises(ScheduleError, match=re.escape(told)):
        parse_schedule(yaml.safe_dump(data)).build(Example4(), inputs=image())


def test_two_pruners_at_one_join() -> None:
    text = forgotten("[conv1.weight]").replace(
        "extensions:",
        "  other:\n    class: L1RankedStructureParameterPruner\n    group_type: Filters\n"
        "    desired_sparsity: 0.25\n    weights: [conv2.weight]\nextensions:",
    )
    text += "  - pruner: {instance_name: other}\n    epochs: [4]\n"
    with pytest.raises(DisagreementError, match=r"conv2 keeps 6 of 8.*\(pruner other\)"):
        parse_schedule(text).build(Example4(), inputs=image())
    mended = parse_schedule(text).mended(Example4(), image())
    assert [entry.name for entry in mended.declarations] == ["example_pruner", "thinner"]
    assert mended.find("pruners", "example_pruner").arguments["weights"] == ["conv1.weight", "conv2.weight"]
    assert [policy.name for policy in mended.policies] == ["example_pruner", "thinner"]


def test_a_schedule_in_order_is_left_alone() -> None:
    schedule = parse_schedule(with_policies(LEADER))
    assert schedule.conflicts(Example4(), image()) == []
    assert schedule.mended(Example4(), image()) == schedule


def test_without_a_remover_layers_may_disagree() -> None:
    text = forgotten()
    kept = text[: text.index("  - extension")]
    parse_schedule(kept).build(Example4(), inputs=image())


def test_readers_of_one_value_must_drop_the_same_channels() -> None:
    """The mirror image: channels of conv2 alone, where conv3 reads the same value."""
    text = with_policies(CHANNELS, "remove_channels")
    with pytest.raises(DisagreementError) as caught:
        parse_schedule(text).build(Example3(), inputs=image())
    told = str(caught.value)
    assert "layers that read the channels of conv1 to keep the same input channels" in told
    assert "conv2 keeps 4 of 8" in told
    assert "conv3 keeps 8 of 8" in told
    (conflict,) = caught.value.conflicts
    parse_schedule(pasted(text, conflict.remedy)).build(Example3(), inputs=image())


def test_the_shipped_resnet20_schedule_is_caught() -> None:
    """Distiller ships it without the leader; the residual addition then mixes channels with different numbers."""
    schedule = load_schedule(SCHEDULES / "resnet20_filters.schedule_agp.yaml")
    (conflict,) = schedule.conflicts(resnet20_cifar())  # the remover's dataset gives the inputs
    assert conflict.join is not None
    assert conflict.join.layer == "layer2.0"
    assert [kept.layer for kept in conflict.layers] == [
        "layer2.0.conv2", "layer2.0.downsample.0", "layer2.1.conv2", "layer2.2.conv2",
    ]  # fmt: skip
    assert {len(kept.keep or ()) for kept in conflict.layers} == {16}
    assert len({kept.keep for kept in conflict.layers}) == 4
    assert "module.layer2.2.conv2.weight" in conflict.remedy


def test_pruners_whose_choice_is_not_known_yet() -> None:
    text = forgotten().replace("L1RankedStructureParameterPruner_AGP", "ActivationAPoZRankedFilterPruner_AGP")
    with pytest.raises(DisagreementError, match="conv1 keeps what example_pruner will choose of 8"):
        parse_schedule(text).build(Example4(), inputs=image())


def test_checking_draws_no_random_numbers() -> None:
    text = forgotten().replace("L1RankedStructureParameterPruner_AGP", "RandomRankedFilterPruner_AGP")
    model, inputs = Example4(), image()
    torch.manual_seed(5)
    expected = torch.rand(())
    torch.manual_seed(5)
    parse_schedule(text).conflicts(model, inputs)
    assert torch.equal(torch.rand(()), expected)


def test_going_on_without_constraint_is_exact() -> None:
    """Masks disagree, only what all have dropped is thinned, and the network computes what the masked one did."""
    torch.manual_seed(1)
    model, inputs = Example4(), image()
    scheduler = parse_schedule(forgotten()).build(model, inputs=inputs, on_conflict="unconstrained")
    play(scheduler, 7)
    (remover,) = (policy for policy in scheduler.policies if isinstance(policy, StructureRemover))
    dead = [set(torch.nonzero(~c.weight.flatten(1).any(1)).flatten().tolist()) for c in (model.conv1, model.conv2)]
    both = 8 - model.conv1.out_channels
    assert both > 0
    assert dead[0].isdisjoint(dead[1])
    assert len(remover.thinnings) == 1
    assert len(remover.thinnings[0].conflicts) == 1
    assert model.conv1.out_channels == model.conv2.out_channels == model.conv3.in_channels
    assert len(dead[0]) == len(dead[1]) == 4 - both
    fast = chanopt.optimize(model.eval(), inputs)
    chanopt.verify(model, fast, inputs)
    # At the addition a channel goes if no operand keeps it.
    assert fast.get_parameter("conv1.weight").shape[0] == fast.get_parameter("conv2.weight").shape[0] == 8 - both


def test_leader_mends_and_thins() -> None:
    model, inputs = Example4(), image()
    scheduler = parse_schedule(forgotten()).build(model, inputs=inputs, on_conflict="leader")
    play(scheduler, 7)
    assert model.conv1.weight.shape[0] == model.conv2.weight.shape[0] == model.conv3.weight.shape[1] == 4
    with pytest.raises(ScheduleError, match="on_conflict raise, leader or unconstrained; found 'ignore'"):
        parse_schedule(forgotten()).build(model, inputs=inputs, on_conflict="ignore")  # type: ignore[arg-type]
