"""Plans: JSON from which a slim module is rebuilt around a state dict, on the word of no weights at all."""

from __future__ import annotations

import builtins
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize, prune

import chanopt
from chanopt.errors import CaptureError, ChanoptError, LoadError
from chanopt.frontend import capture
from tests.support.masks import mask_randomly
from tests.support.micro import MICRO


class Net(nn.Module):
    """Two readers of one value, a batch norm, a constant channel behind zero padding."""

    def __init__(self, width: int = 8, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.act = activation()
        self.left = nn.Conv2d(width, 6, 3, padding=1)
        self.right = nn.Conv2d(width, 6, 1)
        self.tail = nn.Conv2d(width, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(self.stem(x)))
        return torch.cat([self.left(y) + self.right(y), self.tail(y)], 1)


def masked(net: Net | None = None) -> Net:
    net = Net().eval() if net is None else net
    with torch.no_grad():
        net.stem.weight[3] = 0
        net.left.weight[:, [4, 5, 6, 7]] = 0  # three sets in a circle: no order makes all of them ranges
        net.right.weight[:, [0, 1, 6, 7]] = 0
        net.tail.weight[:, [2, 3, 6, 7]] = 0
    return net


@pytest.fixture(scope="module")
def fast() -> fx.GraphModule:
    torch.manual_seed(0)
    made = chanopt.optimize(masked(), (torch.randn(2, 3, 8, 8),))
    assert isinstance(made, fx.GraphModule)
    assert chanopt.explain(made).gathers > 0  # an index is one of the tensors that must come back
    return made


@pytest.fixture(scope="module")
def text(fast: fx.GraphModule) -> str:
    return chanopt.Plan.of(fast).to_json()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 8, 8)


# -- rebuilding --------------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_a_fine_tuned_slim_model_loads_anywhere(
    fast: fx.GraphModule, text: str, tmp_path: Path, x: Tensor
) -> None:
    tuned = copy.deepcopy(fast)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(torch.randn_like(parameter))
    torch.save(tuned.state_dict(), tmp_path / "checkpoint.pt")
    slim = chanopt.apply_plan(Net(), text)  # other weights, no masks, train mode
    slim.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    assert slim.code == tuned.code
    assert {n: p.shape for n, p in slim.named_parameters()} == {n: p.shape for n, p in tuned.named_parameters()}
    assert torch.equal(slim(x), tuned(x))
    assert not torch.equal(slim(x), fast(x))
    assert chanopt.explain(slim) == chanopt.explain(fast)


def test_no_weights_are_needed(fast: fx.GraphModule, text: str, x: Tensor) -> None:
    with torch.device("meta"):
        model = Net()
    slim = chanopt.apply_plan(model, text)
    slim.load_state_dict(fast.state_dict())
    assert torch.equal(slim(x), fast(x))


def test_without_a_state_dict_the_outputs_say_so(text: str, x: Tensor) -> None:
    slim = chanopt.apply_plan(masked(), text)
    assert bool(slim(x).isnan().all())


def test_what_apply_plan_made_is_saved_and_trained(fast: fx.GraphModule, text: str, tmp_path: Path, x: Tensor) -> None:
    slim = chanopt.apply_plan(Net(), text)
    slim.load_state_dict(fast.state_dict())
    slim(x).square().mean().backward()
    assert all(parameter.grad is not None for parameter in slim.parameters())
    assert torch.equal(chanopt.load(chanopt.save(slim, tmp_path / "slim.pt2"))(x), fast(x))


def test_the_json_round_trips(fast: fx.GraphModule, text: str) -> None:
    plan = chanopt.Plan.from_json(text)
    assert plan == chanopt.Plan.of(fast)
    assert plan.to_json() == text
    assert plan.report == chanopt.explain(fast)
    assert not any(line.startswith("0x") for line in json.loads(text)["program"])


def test_a_plan_holds_no_weights(fast: fx.GraphModule) -> None:
    other = chanopt.optimize(masked(), (torch.randn(2, 3, 8, 8),))
    one, two = (json.loads(chanopt.Plan.of(module).to_json()) for module in (fast, other))
    one.pop("report"), two.pop("report")  # has times
    assert one == two  # the same architecture and masks, other values


def test_a_deep_copy_shares_the_plan(fast: fx.GraphModule) -> None:
    assert chanopt.Plan.of(copy.deepcopy(fast)) == chanopt.Plan.of(fast)


@pytest.mark.parametrize("name", ["c2f", "channel_shuffle", "tied_weights", "conv_twice", "batch_norm_beta_border"])
def test_random_masks(name: str) -> None:
    micro = MICRO[name]
    net = micro.build()
    mask_randomly(net, 3)
    inputs = micro.inputs(2, torch.float32, 0)
    fast = chanopt.optimize(net, inputs)
    slim = chanopt.apply_plan(micro.build(), chanopt.Plan.of(fast).to_json(), inputs)
    slim.load_state_dict(fast.state_dict())
    assert torch.equal(slim(*inputs), fast(*inputs))


def test_a_checkpoint_of_another_plan_does_not_fit(fast: fx.GraphModule, text: str) -> None:
    other = chanopt.optimize(Net().eval(), (torch.randn(2, 3, 8, 8),))
    with pytest.raises(RuntimeError, match="size mismatch for left.weight"):
        chanopt.apply_plan(Net(), text).load_state_dict(other.state_dict())


# -- the architecture --------------------------------------------------------------------------------------------------


def test_another_width(text: str) -> None:
    with pytest.raises(LoadError, match=r"Net with stem.weight of sizes \[8, 3, 3, 3\] \(found \[16, 3, 3, 3\]\)"):
        chanopt.apply_plan(Net(16), text)


def test_another_model(text: str) -> None:
    with pytest.raises(LoadError, match=r"and \d+ more; found Linear; build it with the same options"):
        chanopt.apply_plan(nn.Linear(2, 2), text)


def test_a_module_more(text: str) -> None:
    model = Net()
    model.extra = nn.Identity()
    with pytest.raises(LoadError, match=r"no module extra \(found one\)"):
        chanopt.apply_plan(model, text)


def test_other_operators_on_modules_of_the_same_names(text: str, x: Tensor) -> None:
    chanopt.apply_plan(Net().eval(), text, (x,))
    chanopt.apply_plan(Net(activation=nn.GELU), text)  # the names agree, and nothing else was asked
    with pytest.raises(LoadError, match="on modules of the same names"):
        chanopt.apply_plan(Net(activation=nn.GELU).eval(), text, (x,))
    with pytest.raises(CaptureError, match="eval mode"):
        chanopt.apply_plan(Net(), text, (x,))


def test_the_same_operators_with_other_arguments(text: str, x: Tensor) -> None:
    strided = Net().eval()
    strided.stem.stride = (2, 2)
    with pytest.raises(LoadError, match="with other arguments"):
        chanopt.apply_plan(strided, text, (x,))
    chanopt.apply_plan(Net().eval(), text, (torch.randn(3, 3, 24, 20),))  # sizes of the example are no arguments


def test_what_stands_around_a_module_does_not_hide_its_architecture(text: str) -> None:
    weighted = Net()
    nn.utils.parametrizations.weight_norm(weighted.left)
    for net in (weighted, torch.compile(Net()), torch.compile(weighted)):
        assert isinstance(chanopt.apply_plan(net, text), fx.GraphModule)  # type: ignore[arg-type]
    inside: Any = Net()
    inside.right = torch.compile(inside.right)
    assert isinstance(chanopt.apply_plan(inside, text), fx.GraphModule)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (None, "found a NoneType"),
        ({}, "found a dict; give the text"),
        (Path("plan.json"), r"path.read_text\(\)"),
        (b"{}", "found a bytes; decode it"),
        (nn.ReLU(), r"chanopt.Plan.of\(module\)"),
    ],
)
def test_what_is_given_for_a_plan(wrong: Any, told: str) -> None:
    with pytest.raises(ChanoptError, match=told):
        chanopt.apply_plan(Net(), wrong)


def test_what_is_given_for_a_model(text: str) -> None:
    with pytest.raises(ChanoptError, match="found the class Net; make one"):
        chanopt.apply_plan(Net, text)  # type: ignore[arg-type]
    with pytest.raises(ChanoptError, match="found a NoneType"):
        chanopt.apply_plan(None, text)  # type: ignore[arg-type]


@pytest.mark.parametrize("mask", ["prune", "parametrize"])
def test_a_plan_made_under_masks_fits_the_bare_architecture(mask: str, x: Tensor) -> None:
    model = Net().eval()
    pattern = torch.ones_like(model.left.weight)
    pattern[:, ::2] = 0
    if mask == "prune":
        prune.custom_from_mask(model.left, "weight", pattern)
    else:
        parametrize.register_parametrization(model.left, "weight", Times(pattern))
        model.eval()
    fast = chanopt.optimize(model, (x,))
    for other in (Net().eval(), model):
        slim = chanopt.apply_plan(other, chanopt.Plan.of(fast).to_json(), (x,))
        slim.load_state_dict(fast.state_dict())
        assert torch.equal(slim(x), fast(x))


class Split(nn.Module):
    """What a capture spells differently when torch has traced it again."""

    def __init__(self, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), activation(), nn.Dropout(0.5))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.stem(x).chunk(2, 1)
        return self.head((one * other).mean((2, 3), keepdim=True).flatten(1))


def test_a_plan_does_not_depend_on_how_a_model_was_captured(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    text = chanopt.Plan.of(chanopt.optimize(Split().eval(), (x,))).to_json()
    monkeypatch.setitem(capture.__globals__, "out_of_place", lambda module: None)
    chanopt.apply_plan(Split().eval(), text, (x,))
    with pytest.raises(LoadError, match="runs others"):
        chanopt.apply_plan(Split(nn.SiLU).eval(), text, (x,))


class Times(nn.Module):
    def __init__(self, pattern: Tensor) -> None:
        super().__init__()
        self.register_buffer("pattern", pattern)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.get_buffer("pattern")


def test_a_plan_made_from_an_exported_program(x: Tensor) -> None:
    model = masked()
    fast = chanopt.optimize(torch.export.export(model, (x,)), (x,))
    slim = chanopt.apply_plan(Net().eval(), chanopt.Plan.of(fast).to_json(), (x,))
    slim.load_state_dict(fast.state_dict())
    assert torch.equal(slim(x), fast(x))


def test_a_module_without_a_plan() -> None:
    with pytest.raises(ChanoptError, match="found a Linear without a plan"):
        chanopt.Plan.of(nn.Linear(2, 2))


# -- JSON that is wrong, or wants to be run ----------------------------------------------------------------------------


def changed(text: str, change: Callable[[dict[str, Any]], object]) -> str:
    data = json.loads(text)
    change(data)
    return json.dumps(data)


def in_program(old: str, new: str) -> Callable[[dict[str, Any]], object]:
    def change(data: dict[str, Any]) -> None:
        lines = [line.replace(old, new) for line in data["program"]]
        assert lines != data["program"]
        data["program"] = lines

    return change


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"plan"', "{}", "[" * 100_000])
def test_what_is_no_plan(text: str) -> None:
    with pytest.raises(LoadError, match="expected the JSON of a chanopt plan, found something else"):
        chanopt.Plan.from_json(text)


def test_a_plan_of_a_newer_version(text: str) -> None:
    with pytest.raises(LoadError, match="expected a plan of format 1, found 2; update chanopt to read it"):
        chanopt.Plan.from_json(changed(text, lambda data: data.update(format=2)))


@pytest.mark.parametrize("key", ["program", "hints", "weights", "architecture", "report"])
@pytest.mark.parametrize("value", [None, 3, "x", [], {}, [[]]])
def test_a_plan_with_a_part_that_is_wrong(text: str, key: str, value: Any) -> None:
    if (key, value) in [("hints", {}), ("report", [])]:
        value = None
    with pytest.raises(LoadError):
        chanopt.Plan.from_json(changed(text, lambda data: data.update({key: value})))


def test_a_plan_that_asks_for_all_memory(text: str) -> None:
    huge = {"stem.weight": ["float32", [1 << 50, 3, 3, 3], False]}
    with pytest.raises(LoadError):
        chanopt.Plan.from_json(changed(text, lambda data: data["weights"].update(huge)))


INJECTIONS = [
    ("an argument of the model", '"x"]', '"x=print(5)"]'),
    ("an argument of the model", '"x"]', '"lambda"]'),
    ("an input of the model", 'input("x")', 'input("x=print(5)")'),
    ("registered in this process", "aten.relu.default", "builtins.eval.x"),
    ("a tensor operator", "aten.relu.default", "operator.attrgetter"),
    ("a tensor operator", "aten.relu.default", "operator.methodcaller"),
    ("a tensor operator", "aten.relu.default", "aten.relu.__class__"),
    ("a tensor operator", "aten.relu.default", "load_library.__globals__.clear"),
    ("which touches files", "aten.relu.default", "aten.from_file.default"),
    ("registered in this process", "aten.relu.default", "aten.launch.default"),
    ("a literal argument", "[1, 1], [1, 1], [1, 1], 1)", "[1, 1], [1, 1], torch.compile, 1)"),
    ("the name of a parameter", "@stem.weight", '@"stem.a\\"b"'),
    ("the name of a parameter", "@stem.weight", "@stem.__class__"),
]


@pytest.mark.parametrize(("told", "old", "new"), INJECTIONS)
def test_code_in_a_plan_is_refused(
    text: str, told: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was compiled")

    monkeypatch.setattr(builtins, "exec", refuse)
    with pytest.raises(LoadError, match=told):
        chanopt.Plan.from_json(changed(text, in_program(old, new)))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "context",
    [
        '{"__enum__": true, "fqn": "antigravity:x", "name": "y"}',
        '{"default_factory_module": "antigravity"}',
        '["a\'b"]',
    ],
)
def test_structures_that_import_modules_are_refused(text: str, context: str) -> None:
    def change(data: dict[str, Any]) -> None:
        place = next(i for i, line in enumerate(data["program"]) if line.strip().startswith("interface"))
        inputs, *rest = json.loads(data["program"][place].strip().removeprefix("interface "))
        protocol, spec = json.loads(inputs)
        spec["children_spec"][1]["context"] = context
        line = json.dumps([json.dumps([protocol, spec]), *rest])
        data["program"][place] = f"  interface {line}"

    with pytest.raises(LoadError, match="in tuples, lists and dicts with names|the name of an input"):
        chanopt.Plan.from_json(changed(text, change))


def test_a_plan_may_not_break_the_rules_of_the_ir(text: str) -> None:
    with pytest.raises(LoadError, match="rule"):
        chanopt.Plan.from_json(changed(text, in_program("@left.weight<0,1>", "@left.weight<1,0>")))


@pytest.mark.parametrize("how", ["as they are", "prune", "parametrize", "weight_norm"])
def test_what_was_frozen_comes_back_frozen(how: str, x: Tensor) -> None:
    """Under whatever computes the weight, and through the plan; what it is folded with goes with it."""
    net = masked()
    if how == "prune":
        prune.l1_unstructured(net.left, "weight", 0.2)
    if how == "parametrize":
        parametrize.register_parametrization(net.left, "weight", nn.Hardtanh())
    if how == "weight_norm":
        nn.utils.parametrizations.weight_norm(net.left)
    net.eval().left.requires_grad_(False)
    net.tail.bias.requires_grad_(False)
    made = chanopt.optimize(net, (x,))
    assert isinstance(made, fx.GraphModule)
    found = {name: parameter.requires_grad for name, parameter in made.named_parameters()}
    assert [name for name, trained in found.items() if not trained] == ["left.weight", "left.bias", "tail.bias"]
    rebuilt = chanopt.apply_plan(Net(), chanopt.Plan.of(made).to_json())
    assert {name: parameter.requires_grad for name, parameter in rebuilt.named_parameters()} == found
    rebuilt.load_state_dict(made.state_dict())
    assert torch.equal(rebuilt(x), made(x))


def test_a_weight_that_is_trained_in_part_is_trained(x: Tensor) -> None:
    net = masked()
    nn.utils.parametrizations.weight_norm(net.left)
    net.left.parametrizations.weight.original0.requires_grad_(False)  # the lengths; the directions stay
    made = chanopt.optimize(net.eval(), (x,))
    assert made.get_parameter("left.weight").requires_grad


def test_plans_from_before_weights_could_be_frozen_are_read(fast: fx.GraphModule, text: str) -> None:
    data = json.loads(text)
    data["weights"] = {name: form[:3] for name, form in data["weights"].items()}
    assert chanopt.Plan.from_json(json.dumps(data)) == chanopt.Plan.from_json(text) == chanopt.Plan.of(fast)
