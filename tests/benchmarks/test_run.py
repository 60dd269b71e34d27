from __future__ import annotations

import argparse
import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import arms, cases, run, zoo
from benchmarks.arms import Arm, Copies, Subject, build
from benchmarks.cases import Case, Mask, Record

makers = import_module("benchmarks.arms.build")  # the package has a function of that name
CASE = Case("squeezenet1_1", Mask(), 64)


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return list(run.run(CASE, ["dense", "naive", "chanopt", "upscale"], rounds=3))


def test_every_arm_gives_a_record_with_everything_in_it(records: list[Record]) -> None:
    assert [record.arm for record in records] == ["dense", "naive", "chanopt", "upscale"]
    for record in records:
        assert (record.status, record.exception, record.rounds, record.agree) == ("ok", "", 3, True)
        assert record.machine["torch"] == torch.__version__
        assert record.machine["threads"] == "1"
        assert record.peak_bytes
        assert record.parameter_bytes == 4 * (record.parameters or 0)
        assert record.error is not None
        assert record.error < 1e-4
        low, median, high = record.latency_ms or (0, 0, 0)
        assert 0 < low <= median <= high
        assert set(record.ratios) == {"dense", "naive", "chanopt", "upscale"} - {record.arm}
        assert run.differences(record) == ""
    dense, naive, ours, _ = records
    assert (naive.planned or {})["copies"] == 25
    assert dense.macs
    assert naive.macs
    assert naive.macs["dense"] == naive.macs["exact"] < dense.macs["exact"] < dense.macs["dense"]
    assert ours.figures["objective"] == ours.figures["bound"] == 0
    assert set(ours.seconds) == {"capture", "make"}


def test_a_compiled_arm_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking at it and timing it call it in the same mode: torch compiles for each anew."""
    graphs: list[Any] = []

    def counting(graph: Any, examples: Any) -> Any:
        graphs.append(examples)
        return graph

    monkeypatch.setattr(run, "_compiled", lambda module, case: torch.compile(module, backend=counting, dynamic=False))
    (record,) = run.run(replace(CASE, mode="inductor"), ["dense"], rounds=2)
    assert (record.status, record.rounds) == ("ok", 2)
    assert len(graphs) == 1


def test_ratios_are_the_inverse_of_one_another(records: list[Record]) -> None:
    dense, _, ours, _ = records
    low, _, high = ours.ratios["dense"]
    assert dense.ratios["chanopt"][1] == pytest.approx(1 / ours.ratios["dense"][1])
    assert low <= ours.ratios["dense"][1] <= high


def test_records_survive_json_and_a_newer_schema_is_refused(records: list[Record]) -> None:
    for record in records:
        again = Record.of(json.loads(json.dumps(record.to_dict())))
        assert again.to_dict() == json.loads(json.dumps(record.to_dict()))
        assert again.case == CASE
    with pytest.raises(ValueError, match="expected a record of schema 1 or older, found 2: update benchmarks"):
        Record.of({**records[0].to_dict(), "schema": 2})


def test_an_arm_that_cannot_be_made_is_a_record_too() -> None:
    case = replace(CASE, mask=Mask(side="output"))
    dense, upscale = run.run(case, ["dense", "upscale"], rounds=2)
    assert dense.status == "ok"
    assert dense.ratios == {}
    assert upscale.status == "error"
    assert "Invalid layer for output pruning" in upscale.exception
    assert run.differences(upscale) == ""


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"agree": False}, "planned {'copies': 0"),
        ({"profiled": {"selections": 1}}, "the profiler saw {'selections': 1}"),
        ({"profiled": {"selections": 0, "selected_bytes": 8}}, "'selected_bytes': 8"),
        ({"profiled": {"selections": 0, "channels": 5, "selected_bytes": 0}}, "'channels': 5"),
        ({"arm": "upscale", "profiled": {"selections": 0, "channels": 5, "selected_bytes": 0}}, "'channels': 5"),
        ({"arm": "upscale", "profiled": {"selections": 9, "selected_bytes": 9}}, ""),
        ({"arm": "upscale_runs", "agree": False}, "planned {'copies': 0"),
        ({"agree": False, "case": replace(CASE, mode="inductor")}, ""),
        ({"agree": None, "profiled": None}, ""),
        ({"error": 1e-3}, "outputs differ by 1.0e-03"),
        ({"error": 1e-3, "same_function": False}, ""),
        ({"agree": False, "case": replace(CASE, device="cuda")}, ""),
        ({"arm": "chanopt", "status": "error", "exception": "broken"}, "broken"),
        ({"arm": "upscale", "status": "error", "exception": "not installed"}, ""),
    ],
)
def test_a_plan_that_is_not_what_happened_is_told(changes: dict[str, Any], said: str, records: list[Record]) -> None:
    told = run.differences(replace(records[0], **changes))
    assert said in told
    assert bool(said) == bool(told)


class Net(nn.Module):
    """Three readers of one value, of which no two keep the same channels, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.readers = nn.ModuleList([nn.Conv2d(8, 6, 1) for _ in range(3)])
        for layer, kept in zip(self.readers, ([0, 1, 2], [2, 3, 0], [1, 3, 5]), strict=True):
            dead = [channel for channel in range(8) if channel not in kept]
            layer.weight.data[:, dead] = 0  # type: ignore[union-attr,index]
        self.head = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).relu()
        return self.head(torch.stack([layer(y) for layer in self.readers]).sum(0).relu())


class Picking(nn.Module):
    """The same with a part that torch.export cannot capture: it picks rows and columns by what it finds."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.net(x).mean((2, 3))
        rows = y[y[:, 0] > -1e9]
        return rows, y[:, y.sum(0).argsort()[: 1 + int(bool((rows > -1e9).all()))]]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> type[nn.Module]:
    """Cases are of the small net, at 8 pixels, from here on."""
    put(monkeypatch, Net)
    return Net


def put(monkeypatch: pytest.MonkeyPatch, kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    network = kind().eval()
    monkeypatch.setattr(cases, "networks", lambda _: (network, network))
    monkeypatch.setattr(cases, "inputs", lambda _, seed=0: (torch.randn(2, 3, 8, 8) + 0 * seed,))


def test_copies_that_are_not_none_are_planned_and_seen_alike(tiny: type[nn.Module]) -> None:
    names = ["dense", "naive", "greedy", "upscale", "upscale_runs", "chanopt"]
    found = list(run.run(CASE, names, 2))
    for record in found:
        assert (record.status, record.agree, run.differences(record)) == ("ok", True, ""), record
        assert run.profile_agrees(record) is (None if record.arm == "upscale_runs" else True)
        assert bool((record.planned or {})["copies"]) == (record.arm != "dense")


def test_what_a_detectors_own_code_picks_is_neither_planned_nor_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, Picking)
    dense, ours = run.run(CASE, ["dense", "chanopt"], 2)
    for record in (dense, ours):
        assert (record.agree, run.profile_agrees(record)) == (True, True), record
    assert (ours.planned or {})["copies"]


class Breaks(nn.Module):
    """Raises from some call on."""

    def __init__(self, model: nn.Module, calls: int) -> None:
        super().__init__()
        self.model = model
        self.left = calls

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise KeyError("broken")
        return self.model(x)


@pytest.mark.parametrize("calls", [-1, 0, 1, 4, 6], ids=["make", "error", "observe", "warm up", "round"])
def test_an_arm_that_breaks_anywhere_is_its_own_row_and_takes_no_other_with_it(
    calls: int, tiny: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    def maker(subject: Subject) -> Arm:
        if calls < 0:
            raise KeyError("broken")
        return Arm("greedy", Breaks(subject.model, calls), Copies())

    monkeypatch.setattr(makers, "_MAKERS", {**makers._MAKERS, "greedy": maker})
    dense, broken, naive = run.run(CASE, ["dense", "greedy", "naive"], rounds=2)
    assert (broken.status, broken.exception) == ("error", "KeyError: 'broken'")
    assert broken.latency_ms is None
    for record, other in ((dense, "naive"), (naive, "dense")):
        assert record.status == "ok"
        assert set(record.ratios) == {other}


def test_what_is_told_of_a_compiled_module_is_measured_on_it(
    tiny: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiled(module: nn.Module, _: Case) -> Any:
        return lambda x: 2 * torch.cat([module(x)] * 50)[:2]

    monkeypatch.setattr(run, "_compiled", compiled)
    (ours,) = run.run(replace(CASE, mode="inductor"), ["chanopt"], 2)
    assert (ours.agree, ours.observed, ours.profiled, ours.relayouts, ours.macs) == (None,) * 5
    assert ours.error is not None
    assert ours.error > 0.5
    assert (ours.peak_bytes or 0) > 50 * 2 * 4 * 64 * 4
    assert ours.parameters


def test_arms_are_run_in_the_layout_of_their_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """UPSCALE and Torch-Pruning cut weights into contiguous ones, which a conv in channels last copies at each call."""
    timed: dict[str, nn.Module] = {}
    monkeypatch.setattr(run, "time_arms", lambda arms, *_: timed.update(arms) or {})
    list(run.run(replace(CASE, layout="channels_last"), ["naive", "upscale", "torch_pruning", "chanopt"], 2))
    assert len(timed) == 4
    for name, module in timed.items():
        images = [p for p in module.parameters() if p.ndim == 4]
        assert images, name
        assert all(p.is_contiguous(memory_format=torch.channels_last) for p in images), name


def test_torch_pruning_keeps_the_classes_of_a_classifier_that_is_a_conv() -> None:
    masked, original = cases.networks(CASE)
    subject = Subject(masked, cases.inputs(CASE), original)
    arm = build("torch_pruning", subject)
    with torch.no_grad():
        assert arm.module(*subject.inputs).shape == (1, 1000)
    assert sum(p.numel() for p in arm.module.parameters()) < 0.8 * sum(p.numel() for p in original.parameters())


def parsed(*words: str) -> argparse.Namespace:
    made = argparse.ArgumentParser()
    run.add_arguments(made)
    return made.parse_args(words)


def test_the_help_tells_which_arms_ignore_masked_outputs() -> None:
    made = argparse.ArgumentParser(description=run.__doc__)
    run.add_arguments(made)
    told = " ".join(made.format_help().split())
    assert "naive and greedy ignore masked outputs: with --sides output or both" in told
    assert "--arms" in told
    assert (arms.__doc__ or "").count("blind to masked outputs") == 2


def test_the_plan_is_every_combination() -> None:
    words = ["--models", "resnet18", "vgg11", "--amounts", "0.3", "0.5", "--sides", "both", "--batches", "1", "8"]
    planned = run.plan(parsed(*words, "--layouts", "channels_last", "--modes", "eager", "inductor", "--small"))
    assert len(planned) == 16
    assert len(set(map(str, planned))) == 16
    assert planned[0] == Case("resnet18", Mask(amount=0.3, side="both"), 64, layout="channels_last")
    assert planned[-1] == Case("vgg11", Mask(amount=0.5, side="both"), 64, "inductor", "channels_last", 8)


def test_seeds_are_of_random_masks_only() -> None:
    planned = run.plan(parsed("--models", "resnet18", "--criteria", "l2", "random", "--seeds", "0", "1"))
    assert [str(case.mask) for case in planned] == [
        "input 50% l2 local",
        "input 50% random local seed 0",
        "input 50% random local seed 1",
    ]


def test_a_job_is_the_command_line_of_its_case() -> None:
    job = run.job(CASE, ["dense"], 5)
    args = parsed(*job.words[2:])
    assert Case.of(json.loads(args.worker)) == CASE
    assert (args.arms, args.rounds) == (["dense"], 5)


def test_finishing_writes_one_schema_and_tells_what_is_wrong(
    records: list[Record], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"job": "a", "status": "ok", **record.to_dict()} for record in records]
    assert run.finish(lines, tmp_path / "run.json") == 0
    assert [Record.of(row).arm for row in json.loads((tmp_path / "run.json").read_text())] == [r.arm for r in records]
    lost = {"job": "b", "status": "lost", "exception": "boom"}
    assert run.finish([{**lines[0], "agree": False}, lost], tmp_path / "run.json") == 1
    assert "b: boom" in capsys.readouterr().out


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.second = nn.Conv2d(8, 6, 1)
        self.third = nn.Conv2d(6, 4, 1)


def dead(layer: nn.Conv2d, axis: int) -> int:
    return int((layer.weight.transpose(0, axis).flatten(1) == 0).all(1).sum())


def test_masks_by_l1_take_the_least_channels_of_every_layer() -> None:
    net = Chain()
    net.second.weight.data[:, 3] = 1e-3
    cases.apply(net, Mask("l1", 0.25))
    assert [dead(layer, 1) for layer in (net.first, net.second, net.third)] == [0, 2, 1]
    assert not bool(net.second.weight[:, 3].any())


def test_global_masks_weigh_layers_against_each_other_and_leave_each_a_channel() -> None:
    net = Chain()
    net.second.weight.data.uniform_(0.9, 1.1)
    net.third.weight.data[:, :3] *= 1e-3
    cases.apply(net, Mask("l2", 0.25, scope="global"))
    assert [dead(net.second, 1), dead(net.third, 1)] == [0, 3]
    net = Chain()
    cases.apply(net, Mask("random", 0.99, "both", "global"))
    assert all(dead(layer, 0) < layer.out_channels for layer in (net.first, net.second, net.third))
    assert dead(net.first, 0) > 4
    assert not bool(net.first.bias[(net.first.weight == 0).flatten(1).all(1)].any())  # type: ignore[index]


def test_random_masks_depend_on_the_seed() -> None:
    def masked(seed: int) -> list[bool]:
        torch.manual_seed(0)
        net = Chain()
        cases.apply(net, Mask("random", 0.5, scope="global", seed=seed))
        return (net.second.weight == 0).flatten().tolist()

    assert masked(1) == masked(1) != masked(2)


def test_an_amount_that_is_no_fraction_is_refused() -> None:
    with pytest.raises(ValueError, match=r"in \[0, 1\), got 1"):
        cases.apply(Chain(), Mask(amount=1.0))


def test_networks_are_as_their_case_says() -> None:
    case = replace(CASE, layout="channels_last", dtype="float64", batch=2)
    masked, original = cases.networks(case)
    (images,) = cases.inputs(case)
    assert images.dtype == torch.float64
    assert images.shape == (2, 3, 64, 64)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert next(masked.parameters()).dtype == torch.float64
    sparse, full = (sum(int((p == 0).sum()) for p in model.parameters()) for model in (masked, original))
    assert sparse > 100_000 > full
    with torch.no_grad():
        assert zoo.sensitivity(masked, (images,)) > 0
