"""`python -m benchmarks.accuracy`: small networks pruned in three scopes and trained in three ways."""

from __future__ import annotations

import copy
import itertools
import json
import statistics
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import chanopt
from benchmarks import accuracy, accuracy_page, digits
from benchmarks.accuracy import METHODS, SCOPES, SMOKE, Plan, Record, Subject
from chanopt import Mask

TINY = replace(SMOKE, epochs=1)
RECORD = Record(
    net="resnet",
    seed=0,
    part="ratio",
    arm="constrained",
    amount=0.5,
    epochs=0,
    accuracy=0.9,
    masked_accuracy=0.9,
    error=1e-7,
    differing=0,
    importance=0.8,
    gathers=0,
    copied_bytes=0,
    macs=1000,
    parameters=100,
    latency=(0.5, 0.6, 0.7),
    latency_ms=(0.01, 0.02, 0.03),
    machine={"python": "3"},
)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Record]]:
    """The command itself, in a process of its own."""
    folder = tmp_path_factory.mktemp("accuracy")
    assert accuracy.main(["--smoke", "--out", str(folder)]) == 0
    return folder, [Record.of(line) for line in json.loads((folder / "accuracy.json").read_text())]


@pytest.fixture(scope="module")
def subject() -> Subject:
    """A network with dense blocks, in which the scopes differ most."""
    return Subject("densenet", 3, TINY)


# -- data and networks ------------------------------------------------------------------------------------------------


def test_the_images_are_split_once_and_no_test_image_is_trained_with() -> None:
    data = digits.data()
    assert (tuple(data.train.shape), tuple(data.test.shape)) == ((1198, 1, 8, 8), (599, 1, 8, 8))
    assert data is digits.data()
    # All images there are, each in one part: the digits come with 1797 different ones.
    rows = torch.cat([data.train, data.test]).flatten(1)
    assert len(torch.unique(rows, dim=0)) == 1797
    shares = [torch.bincount(told).double() / len(told) for told in (data.train_digits, data.test_digits)]
    assert float((shares[0] - shares[1]).abs().max()) < 0.002
    assert float(data.train.mean()) == pytest.approx(0, abs=1e-5)


def test_an_epoch_sees_every_image_at_most_once_in_an_order_of_its_seed() -> None:
    told = [torch.cat([images for images, _ in digits.batches(seed)]) for seed in (1, 1, 2)]
    assert tuple(told[0].shape) == (digits.BATCH * digits.data().steps, 1, 8, 8)
    assert len(torch.unique(told[0].flatten(1), dim=0)) == len(told[0])
    assert torch.equal(told[0], told[1])
    assert not torch.equal(told[0], told[2])


@pytest.mark.parametrize("name", digits.NETS)
def test_a_seed_gives_one_network(name: str) -> None:
    nets = [digits.trained(name, seed, 1) for seed in (0, 0, 1)]
    told = [digits.outputs(net) for net in nets]
    assert torch.equal(told[0], told[1])
    assert not torch.equal(told[0], told[2])
    assert not any(net.training for net in nets)
    assert tuple(told[0].shape) == (599, 10)


def test_no_epoch_changes_nothing() -> None:
    torch.manual_seed(0)
    net = digits.NETS["mobilenet"]()
    before = copy.deepcopy(net.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in digits.train(net, 0, seed=0).state_dict().items())


def test_accuracy_is_the_share_told_rightly() -> None:
    right = torch.nn.functional.one_hot(digits.data().test_digits, 10).double()
    assert digits.accuracy(right) == 1
    assert digits.accuracy(right.roll(1, 1)) == 0


# -- scopes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amount", [0.3, 0.6])
def test_at_equal_ratio_every_layer_keeps_as_many_channels_in_all_scopes(subject: Subject, amount: float) -> None:
    masks = {scope: subject.masks(scope, amount) for scope in SCOPES}
    counts = {scope: {name: len(set(mask.inputs or ())) for name, mask in masks[scope].items()} for scope in SCOPES}
    assert counts["constrained"] == counts["consecutive"] == counts["unconstrained"]
    # A dense block's layers read parts of one segment, of which they lose different shares.
    shares = {count / subject.structure.layers[name].in_channels for name, count in counts["constrained"].items()}
    assert len(shares) > 2
    kept = [accuracy.retained(subject.net, subject.structure, masks[scope]) for scope in SCOPES]
    assert kept[0] < kept[1] < kept[2]


@pytest.mark.parametrize("scope", SCOPES)
def test_the_slim_module_is_the_masked_network(subject: Subject, scope: str) -> None:
    masked = subject.tuned(subject.masks(scope, 0.5), 1)
    slim = subject.slim(masked)
    torch.testing.assert_close(digits.outputs(slim), digits.outputs(masked), rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in slim.parameters()) < 0.8 * sum(p.numel() for p in subject.net.parameters())
    assert (chanopt.explain(slim).gathers > 0) == (scope == "unconstrained")
    # It does not change with the next one.
    before = digits.outputs(slim)
    subject.slim(subject.masked({}))
    assert torch.equal(digits.outputs(slim), before)


def test_training_holds_masks(subject: Subject) -> None:
    masks = subject.masks("consecutive", 0.5)
    net = subject.tuned(masks, 1)
    changed = 0
    for name, mask in masks.items():
        weight, old = net.get_submodule(name).weight, subject.net.get_submodule(name).weight
        assert isinstance(weight, torch.Tensor)
        assert isinstance(old, torch.Tensor)
        lost = sorted(set(range(weight.shape[1])) - set(mask.inputs or ()))
        assert not weight[:, lost].any()
        changed += not torch.equal(weight[:, sorted(set(mask.inputs or ()))], old[:, sorted(set(mask.inputs or ()))])
    assert changed == len(masks)


def test_gradual_pruning_ends_at_the_ratio_and_never_takes_back(subject: Subject, monkeypatch: Any) -> None:
    chosen: list[dict[str, Mask]] = []
    real = accuracy.prune

    def watched(*args: Any, **options: Any) -> dict[str, Mask]:
        chosen.append(real(*args, **options))
        return chosen[-1]

    monkeypatch.setattr(accuracy, "prune", watched)
    net, masks = subject.gradual(0.6)
    assert len(chosen) == TINY.ramp + 1 == 2
    at_once = real(subject.net, (), 0.6, scope="constrained", structure=subject.structure)
    counts = [sum(len(set(mask.inputs or ())) for mask in found.values()) for found in (chosen[0], masks, at_once)]
    assert counts[0] > counts[1]
    assert len(masks) == len(at_once)
    for name, mask in chosen[0].items():
        assert set(masks[name].inputs or ()) < set(mask.inputs or ())
    for name, mask in masks.items():
        weight = net.get_submodule(name).weight
        assert isinstance(weight, torch.Tensor)
        assert set(weight.transpose(0, 1).flatten(1).any(1).nonzero().flatten().tolist()) <= set(mask.inputs or ())


# -- equal latency ----------------------------------------------------------------------------------------------------


def curve(points: dict[float, float], **changes: Any) -> list[Record]:
    """Trained networks by latency, with their accuracies."""
    known: dict[str, Any] = {"epochs": 2, **changes}
    return [replace(RECORD, latency=(x, x, x), amount=1 - x, accuracy=y, **known) for x, y in points.items()]


def test_an_accuracy_lies_between_the_networks_that_are_a_little_slower_and_faster() -> None:
    records = curve({0.9: 0.9, 0.5: 0.7, 0.3: 0.1})
    assert accuracy_page.at_latency(records, 0.7) == pytest.approx(0.8)
    assert accuracy_page.at_latency(records, 0.3) == pytest.approx(0.1)
    assert accuracy_page.at_latency(records, 0.2) is None
    assert accuracy_page.at_latency(records, 0.95) is None
    # A slower network that is less accurate is chance: both count as their mean.
    assert accuracy_page.at_latency(curve({0.4: 0.6, 0.6: 0.4}), 0.5) == pytest.approx(0.5)


def test_arms_are_compared_at_times_that_all_of_their_kind_reach_seed_by_seed() -> None:
    records: list[Record] = []
    for seed, gain in enumerate((0.1, 0.3)):
        records += curve({0.9: 0.5, 0.3: 0.5}, seed=seed, arm="constrained")
        records += curve({0.9: 0.5 + gain, 0.3: 0.5 + gain}, seed=seed, arm="consecutive")
        records += curve({0.9: 0.4, (0.3 if seed else 0.5): 0.4}, seed=seed, arm="unconstrained")
    page = accuracy_page.markdown([*records, *(replace(r, part="dense", arm="dense", epochs=0) for r in records)])
    assert cells(page, "resnet", "60%", "consecutive")[3:] == ["70.0 ± 14.1", "20.0 ± 14.1", "2"]
    assert cells(page, "resnet", "40%", "consecutive")[3:] == ["80.0", "30.0", "1"]
    assert cells(page, "resnet", "40%", "constrained")[3:] == ["50.0", "", "1"]
    # Two seeds at 80 and 60 %, one at 40 %.
    assert "- `consecutive`: 22.00 ± 10.95 points over `constrained`" in page
    assert "- `unconstrained`: -10.00 ± 0.00 points over `constrained`" in page
    assert "- `smcp`: nowhere as fast" in page


def test_what_smcp_cannot_reach_is_left_out(subject: Subject, monkeypatch: Any) -> None:
    def never(*_: Any) -> None:
        raise accuracy.AllocationError("expected less")

    monkeypatch.setattr(Subject, "soft", never)
    made = accuracy._Made(subject)  # type: ignore[reportPrivateUsage]
    made.trained_while_pruned(0.5, None)  # type: ignore[arg-type]
    assert [record.arm for _, record in made.records] == ["one-shot", "agp"]


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_smoke_form_has_a_record_of_everything(smoke: tuple[Path, list[Record]]) -> None:
    _, records = smoke
    made = [(r.part, r.arm, r.amount, r.epochs) for r in records]
    expected = [("dense", "dense", 0.0, 0)]
    expected += itertools.product(["ratio"], SCOPES, SMOKE.ratios, [0, SMOKE.tuning])
    expected += itertools.product(["method"], METHODS, SMOKE.steps, [SMOKE.longer])
    assert sorted(made, key=str) == sorted(expected, key=str)
    for record in records:
        assert accuracy.differences(record) == ""
        assert abs(record.accuracy - record.masked_accuracy) < 0.005
        assert 0 < record.importance <= 1
        assert record.latency is not None
        assert record.latency_ms is not None
        assert list(record.latency) == sorted(record.latency)
        assert {"processor", "torch", "chanopt", "scikit-learn"} <= record.machine.keys()
    assert not any(r.gathers for r in records if r.arm != "unconstrained")
    whole = records[0]
    assert all(r.macs <= whole.macs for r in records)
    assert all(r.macs < whole.macs and r.parameters < whole.parameters for r in records if r.part == "ratio")
    net = digits.NETS["mobilenet"]().eval()
    assert whole.macs == chanopt.explain(chanopt.optimize(net, (digits.data().test[:4],))).macs_after / 4


@pytest.mark.slow
def test_the_same_seed_gives_the_same_accuracy(smoke: tuple[Path, list[Record]]) -> None:
    again = Subject("mobilenet", 0, SMOKE)
    masks = again.masks("consecutive", 0.3)
    masked = again.tuned(masks, SMOKE.tuning)
    found = again.record("ratio", "consecutive", masked, again.slim(masked), masks, amount=0.3, epochs=SMOKE.tuning)
    key = ("ratio", "consecutive", 0.3, SMOKE.tuning)
    (known,) = [r for r in smoke[1] if (r.part, r.arm, r.amount, r.epochs) == key]
    assert replace(known, latency=None, latency_ms=None) == found


@pytest.mark.slow
def test_a_finished_network_is_not_run_again(smoke: tuple[Path, list[Record]], capsys: Any) -> None:
    folder, records = smoke
    before = (folder / "accuracy.md").read_text(), (folder / "accuracy.svg").read_text()
    assert accuracy.main(["--smoke", "--resume", "--timeout", "0.001", "--out", str(folder)]) == 0
    assert f"{len(records)} records, 0 to look at, 0 lost" in capsys.readouterr().out
    assert ((folder / "accuracy.md").read_text(), (folder / "accuracy.svg").read_text()) == before


def test_a_plan_goes_to_the_process_and_back() -> None:
    for plan in (SMOKE, Plan()):
        words = accuracy.job("resnet", 2, plan).words
        args = accuracy.parser().parse_args(words[1:])
        assert (args.plan, args.nets, args.worker) == (plan, ["resnet"], 2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ""),
        ({"accuracy": 0.1, "masked_accuracy": 0.1}, ""),
        ({"error": 1e-3}, "outputs differ by 1.0e-03 from the masked network's, over 1e-04"),
        ({"error": float("nan")}, "outputs differ by nan from the masked network's, over 1e-04"),
        ({"differing": 2}, "2 images are told otherwise than by the masked network"),
        ({"arm": "consecutive", "gathers": 1}, "1 gathers in the consecutive scope"),
        ({"arm": "unconstrained", "gathers": 1}, ""),
    ],
)
def test_a_record_that_is_not_right_is_told(changes: dict[str, Any], said: str) -> None:
    assert accuracy.differences(replace(RECORD, **changes)) == said


def test_finishing_fails_on_what_is_wrong_or_lost(tmp_path: Path) -> None:
    assert accuracy.finish([{"job": "a", **asdict(RECORD)}], tmp_path) == 0
    assert accuracy.finish([{"job": "a", **asdict(replace(RECORD, differing=1))}], tmp_path) == 1
    assert "- resnet, seed 0, ratio, constrained, 0.5, 0 epochs: 1 images" in (tmp_path / "accuracy.md").read_text()
    assert accuracy.finish([{"job": "a", "status": "lost", "exception": "boom"}], tmp_path) == 1


# -- the page ---------------------------------------------------------------------------------------------------------


def cells(page: str, *starts: str) -> list[str]:
    """The cells of the one line of a page's tables that begins so."""
    (line,) = [line for line in page.splitlines() if line.startswith("| " + " | ".join(starts) + " |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.slow
def test_the_tables_say_what_the_records_say(smoke: tuple[Path, list[Record]]) -> None:
    folder, records = smoke
    page = (folder / "accuracy.md").read_text()
    for scope in SCOPES:
        mine = [r for r in records if (r.part, r.arm, r.amount) == ("ratio", scope, 0.3)]
        before, after = sorted(mine, key=lambda r: r.epochs)
        assert before.latency is not None
        expected = [f"{100 * value:.1f}" for value in (before.importance, before.accuracy, after.accuracy)]
        expected += [f"{before.latency[1]:.2f}", f"{before.macs / 1e6:.2f}", f"{before.gathers:.1f}"]
        assert cells(page, "mobilenet", "30%", scope)[3:] == [*expected, str(before.copied_bytes)]
    for way in METHODS:
        (record,) = [r for r in records if r.arm == way]
        found = cells(page, "mobilenet", "30%", way)
        assert found[3:6] == [f"{100 * record.importance:.1f}", "-", f"{100 * record.accuracy:.1f}"]
    assert "Nothing: all slim modules tell" in page


def test_means_and_deviations_are_over_seeds() -> None:
    values = [0.9, 0.8, 0.85]
    records = [
        replace(RECORD, seed=seed, arm=arm, accuracy=value, net=net)
        for net in ("resnet", "mobilenet")
        for arm in SCOPES
        for seed, value in enumerate(values)
    ]
    records += [replace(r, part="dense", arm="dense") for r in records if r.arm == "constrained"]
    page = accuracy_page.markdown(records)
    told = f"{100 * statistics.fmean(values):.1f} ± {100 * statistics.stdev(values):.1f}"
    assert cells(page, "resnet", "50%", "consecutive")[4:6] == [told, "-"]
    assert "3 seeds each" in page


def gained(ours: float, free: float) -> list[Record]:
    gains = zip(SCOPES, (0.0, ours, free), strict=True)
    return [replace(RECORD, arm=arm, importance=0.5 + gain, accuracy=0.5 + gain) for arm, gain in gains]


def test_the_gap_is_closed_by_the_share_of_the_gains() -> None:
    ours, free, share = accuracy_page.closed(gained(0.1, 0.4), lambda r: r.importance)
    page = accuracy_page.markdown([*gained(0.1, 0.4), *(replace(r, epochs=2) for r in gained(0.1, -0.1))])
    assert cells(page, "all")[1:4] == ["+10.00", "+40.00", "25%"]
    assert "In one figure, of the gap in importance: 25%; in accuracy after training: no gap." in page
    assert (ours, free, share) == (pytest.approx(0.1), pytest.approx(0.4), pytest.approx(0.25))
    assert accuracy_page.closed(gained(0.1, -0.1), lambda r: r.importance)[2] is None
    # Means first, so that a small gap of one network does not weigh as much as a large one.
    both = [*gained(0.1, 0.2), *gained(0.0, 0.6)]
    assert accuracy_page.closed(both, lambda r: r.importance)[2] == pytest.approx(0.125)


@pytest.mark.slow
def test_the_plot_shows_every_arm_and_equal_records_give_equal_text(smoke: tuple[Path, list[Record]]) -> None:
    folder, records = smoke
    text = (folder / "accuracy.svg").read_text()
    assert text.startswith("<?xml")
    for arm in ("constrained", "smcp", "agp", "one-shot"):
        assert accuracy_page.COLOURS[arm].lower() in text.lower()
    accuracy_page.plot(records, folder / "again.svg")
    assert (folder / "again.svg").read_text() == text
    accuracy_page.plot([replace(r, accuracy=0.5) for r in records], folder / "other.svg")
    assert (folder / "other.svg").read_text() != text
