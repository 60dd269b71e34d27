"""docs/results.md and the HTML page, from made-up results: what is there is shown, bad rows too, what is not is named."""

from __future__ import annotations

import json
from argparse import ArgumentTypeError
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from benchmarks import accuracy_given, docs, gate, page, solver
from benchmarks.cases import Case, Mask, Record

VOID = {"meta", "link", "br", "hr", "img", "path", "use", "rect", "line", "circle"}


class Balance(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [str(value) for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [str(value) for name, value in attrs if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def record(arm: str, ratio: float, amount: float = 0.5) -> Record:
    case = Case("resnet18", Mask(amount=amount))
    copies = {"copies": 3, "channels": 9, "bytes": 36_000_000}
    return Record(
        case,
        arm,
        {"torch": "2.13", "threads": "1", "node": "here"},
        latency_ms=(90 * ratio, 100 * ratio, 110 * ratio),
        ratios={"dense": (ratio * 0.9, ratio, ratio * 1.1)} if arm != "dense" else {},
        rounds=5,
        planned=copies,
        observed=copies,
        agree=True,
        profiled={"selections": 3, "selected_bytes": 36_000_000, "hidden_bytes": 0},
        macs={"dense": 2_000_000, "exact": 1_000_000, "flux": 1_500_000, "flux_adds": 1},
        parameters=4_000_000,
        peak_bytes=1_000_000,
        seconds={"make": 0.5},
        error=1e-6,
    )


SPEED = [record("dense", 1.0), record("chanopt", 0.4), record("dense", 1.0, 0.7), record("chanopt", 1.2, 0.7)]


def surveyed(model: str, ours: int, **changes: Any) -> dict[str, Any]:
    def copies(count: int) -> dict[str, int]:
        return {"copies": count, "channels": count, "bytes": count * 1_000_000}

    made = {"model": model, "side": "input", "amount": 0.5, "resolution": 64, "segments": 5, "segments_optimal": 5}
    made |= {"plans_cut": True}
    return {**made, "naive": copies(9), "greedy": copies(4), "upscale": copies(4), "chanopt": copies(ours), **changes}


def solved(family: str, channels: int, greedy: float | None, **changes: Any) -> dict[str, Any]:
    row = {
        "family": family,
        "channels": channels,
        "readers": 8,
        "seed": 0,
        "objective": 10,
        "optimal": True,
        "gap": 0.0,
    }
    return {**row, "greedy": greedy, "natural": 20, "seconds": 0.5, **changes}


def compiled(size: int) -> dict[str, Any]:
    row = {"family": "residual", "parameters": 10**6, "segments": 5, "solver": 0.1, "memory": 2 * 10**7}
    return {
        **row,
        "size": size,
        "ops": 4 * size,
        "operands": 5 * size,
        "segments_optimal": 5,
        "optimize": 0.2,
        "capture": size * 0.1,
        "rest": size * 0.01,
        "passes": {"drop_dead": 1.0},
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = {
        "run.json": [r.to_dict() for r in SPEED],
        "survey.json": [
            surveyed("resnet18", 3),
            surveyed("vgg11", 5),
            surveyed("swin_t", 0, naive=None, greedy=None, upscale=None),
        ],
        "solver.json": [
            solved("chain", 64, 15),
            solved("chain", 64, None),
            solved("corpus", 99, 12, name="x", known=10),
        ],
        "scale.json": [compiled(18), compiled(34)],
        "goldens.json": {"resnet18, input 50%": dict.fromkeys(gate.COUNTS, 1_000_000)},
    }
    for name, rows in found.items():
        (tmp_path / name).write_text(json.dumps(rows))
    lines = ["model,side,amount,violations", "resnet18,input,0.5,", "vgg11,both,0.5,error32 2e-04 over 1e-04"]
    (tmp_path / "sweep.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_the_page_shows_every_part_and_keeps_bad_rows(folder: Path) -> None:
    text = docs.markdown(folder)
    assert "Not measured yet" not in text
    assert "| input 50% | 3 | 3 | 2 | 18.00 | 8.00 | 8.00 | 1.00 | 8.00 | 1 | 0 | 1 | 15 / 15 |" in text
    assert "| resnet18 | 9 | 4 | 4 | 3 | 9.00 | 4.00 | 3.00 | - | - |" in text
    assert "- vgg11, input 50%: chanopt copies 5,000,000 bytes, greedy 4,000,000; " in text
    assert "| resnet18 | 100.0 [90.0, 110.0] | 40.0 [36.0, 44.0] | 0.40 [0.36, 0.44] |" in text
    assert "- against dense: geometric mean 1.200; slower on resnet18" in text
    assert "Of 4 runs, 4 were compared with their plan by a dispatch mode in one eager run: 4 selected" in text
    assert "| chain | 64 x 8 | 2 | 2 | 0.0% | 1.50 | 2.00 | 0.500 | 0.500 |" in text
    assert "| corpus | all | 1 | 1 | 0.0% | 1.20 | 2.00 |" in text
    assert "| residual | ops, all sizes | 1.00 | 0.00 | 1.00 |" in text
    assert "1 rows, at the least resolution" in text
    assert "1 of 2 rows in bounds (2 networks; " in text
    assert "- vgg11, both 50%: error32 2e-04 over 1e-04" in text


def test_an_observation_that_disagrees_and_an_arm_that_failed_are_shown(folder: Path) -> None:
    wrong = replace(SPEED[1], agree=False, observed={"copies": 9})
    failed = Record(SPEED[0].case, "upscale", {}, status="error", exception="ArmError: no")
    text = "\n".join(docs.speed_part([r.to_dict() for r in (SPEED[0], wrong, failed)]))
    assert "Of 2 runs, 2 were compared with their plan by a dispatch mode in one eager run: 1 selected" in text
    assert "planned {'copies': 3, 'channels': 9, 'bytes': 36000000}, observed {'copies': 9}" in text
    assert "- resnet18, upscale: ArmError: no" in text


def test_an_order_better_than_ours_is_shown() -> None:
    text = "\n".join(docs.solver_part([solved("chain", 64, 9)]))
    assert "- chain 64x8 seed 0: greedy pays 9, ours 10" in text
    assert solver.differences(solved("chain", 64, 11)) == ""


def test_what_was_not_measured_is_named_with_its_command(tmp_path: Path) -> None:
    text = docs.markdown(tmp_path)
    parts = [f"--parts {part}" for part in ("survey", "speed", "solver", "scale")]
    for command in (*parts, "gate --all --update", "sweep"):
        assert f"Not measured yet: `python -m benchmarks {command}`." in text
    assert "python -m benchmarks --parts survey" in page.html(tmp_path)


def test_the_machine_is_told_once_and_each_if_there_are_several(folder: Path) -> None:
    (folder / "scale.json").write_text(json.dumps([{**compiled(18), "machine": {"torch": "3", "node": "there"}}]))
    text = docs.markdown(folder)
    assert "- Copies, against UPSCALE, Orders of channels: measured on a machine that the rows do not name.\n" in text
    assert "- Speed on a CPU: measured on torch 2.13, threads 1.\n" in text
    assert "- Compile time and memory: measured on torch 3.\n" in text
    assert "Compile time and memory: measured on torch 3." in page.html(folder)
    for part in ("survey", "solver", "scale"):
        (folder / f"{part}.json").unlink()
    assert "Measured on torch 2.13, threads 1.\n\n## Copies" in docs.markdown(folder)


def test_a_curve_is_of_records_that_differ_in_their_amount_alone(folder: Path) -> None:
    compiled_ones = [replace(r, case=replace(r.case, mode="inductor")) for r in SPEED]
    rows = [r.to_dict() for r in (*SPEED, *compiled_ones[:2])]
    captions = [plot.caption for plot in page.speed_part(rows).plots if "by the share" in plot.caption]
    assert len(captions) == 1
    assert "resnet18, eager, batch 1" in captions[0]
    more = [plot.caption for plot in page.speed_part([*rows, *(r.to_dict() for r in compiled_ones[2:])]).plots]
    assert len([caption for caption in more if "by the share" in caption]) == 2


def test_the_html_page_is_whole_and_self_contained(folder: Path) -> None:
    text = page.html(folder)
    parser = Balance()
    parser.feed(text)
    assert parser.open == []
    assert len(parser.ids) == len(set(parser.ids))
    assert text.count("<svg") == text.count("<figure ") >= 7
    assert "<script" not in text
    links = [part for part in text.split('"') if part.startswith(("http://", "https://"))]
    assert all("w3.org" in link or "purl.org" in link or "creativecommons.org" in link for link in links), links
    assert "Latency by the share that is masked: resnet18, eager" in text
    assert "Accuracy and latency" not in text


def test_accuracies_that_are_given_add_a_pareto_front(folder: Path, tmp_path: Path) -> None:
    given = tmp_path / "accuracy.csv"
    given.write_text("model,amount,arm,accuracy\nresnet18,0.5,chanopt,0.7\nresnet18,0.7,chanopt,0.6\n")
    assert "Accuracy and latency: resnet18" in page.html(folder, given)
    rows = accuracy_given.added([r.to_dict() for r in SPEED], given)
    assert [row["accuracy"] for row in rows] == [None, 0.7, None, 0.6]
    given.write_text("model,amount,arm,accuracy\nresnet18,0.5,chanopt,0.0\n")
    assert "Accuracy and latency: resnet18" in page.html(folder, given)
    given.write_text("network,accuracy\nresnet18,0.7\n")
    with pytest.raises(ValueError, match="expected the columns accuracy, amount, arm, model, found network, accuracy"):
        accuracy_given.added([r.to_dict() for r in SPEED], given)


def test_an_accuracy_goes_to_its_own_mask_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    masks = [Mask(), Mask(side="output"), Mask(scope="global"), Mask("random", seed=1), Mask("random", seed=2)]
    rows = [replace(SPEED[1], case=Case("resnet18", mask)).to_dict() for mask in masks]
    given = tmp_path / "accuracy.csv"
    given.write_text("model,amount,arm,accuracy\nresnet18,0.5,chanopt,0.7\n")
    assert [row["accuracy"] for row in accuracy_given.added(rows, given)] == [0.7, None, None, None, None]
    heads = "model,amount,arm,accuracy,side,criterion,scope,seed\n"
    given.write_text(heads + "resnet18,0.5,chanopt,0.6,output,,,7\nresnet18,0.5,chanopt,0.5,input,random,local,2\n")
    assert [row["accuracy"] for row in accuracy_given.added(rows, given)] == [None, 0.6, None, None, 0.5]
    assert capsys.readouterr().err == ""


def test_accuracies_of_what_was_not_timed_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = tmp_path / "accuracy.csv"
    given.write_text("model,amount,arm,accuracy\nresnet19,0.5,chanopt,0.7\nresnet18,0.5,ours,0.7\n")
    accuracy_given.added([r.to_dict() for r in SPEED], given)
    told = capsys.readouterr().err
    assert "line 2 (resnet19, input 50% l2 local, chanopt); line 3 (resnet18, input 50% l2 local, ours)" in told


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        ("resnet18,50%,chanopt,0.7,", r"line 2: expected a share of the channels in \[0, 1\), found '50%'"),
        ("resnet18,0.5,chanopt,71%,", "line 2: expected an accuracy as a number, as in 0.71, found '71%'"),
        ("resnet18,0.5,chanopt,0.7,left", "line 2: expected a side among input, output, both, found 'left'"),
        ("resnet18,0.5,chanopt", "line 2: expected an accuracy as a number"),
        ("x,0.5,a,0.7,\nx,0.5,a,0.6,", r"line 3 \(x, .*, a\): expected one accuracy, found 0.7 and 0.6"),
    ],
)
def test_cells_that_mean_nothing_are_refused(cells: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "accuracy.csv"
    path.write_text(f"model,amount,arm,accuracy,side\n{cells}\n")
    with pytest.raises(ArgumentTypeError, match=said):
        accuracy_given.file(str(path))


def test_what_the_accuracy_benchmark_writes_is_shown_with_its_own_latencies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "accuracy.csv"
    lines = ['resnet,0,dense,0.0,0.9,"[1, 2, 3]"', 'resnet,0,smcp,0.5,0.8,"[1, 1.5, 3]"', "resnet,0,agp,0.5,0.8,"]
    path.write_text("\n".join(["net,seed,arm,amount,accuracy,latency_ms", *lines]) + "\n")
    assert [line.latency_ms for line in accuracy_given.read(accuracy_given.file(str(path)))[0]] == [2, 1.5, None]
    text = page.html(tmp_path, path)
    assert "Accuracy and latency, as given: resnet" in text
    assert "<!-- smcp -->" in text
    assert "<!-- agp -->" not in text
    assert capsys.readouterr().err == ""


def test_legends_name_what_is_drawn() -> None:
    ours = [replace(record, accuracy=0.5) for record in SPEED if record.arm == "chanopt"]
    curve, front = page.speed_part([replace(r, ratios={}).to_dict() for r in ours]).plots
    for plot in (curve, front):
        assert "<!-- chanopt -->" in plot.svg
        assert "<!-- naive -->" not in plot.svg


def test_every_network_with_counts_is_drawn_whether_upscale_runs_it_or_not() -> None:
    rows = [surveyed("resnet18", 3), surveyed("fastvit_t8", 5, upscale=None), surveyed("ssd300_vgg16", 5, greedy=None)]
    nothing = {"copies": 0, "channels": 0, "bytes": 0}
    rows.append(surveyed("swin_t", 0, naive=nothing, greedy=nothing, chanopt=nothing))
    summed, by_network = page.copies_part(rows).plots
    assert "<!-- MB copied, 3 networks -->" in summed.svg
    assert "<!-- fastvit_t8 -->" in by_network.svg
    assert "ssd300_vgg16" not in by_network.svg
    assert "not shown, as the naive export copies nothing: swin_t" in by_network.caption
    rows[0] = surveyed("resnet18", 3, amount=0.3)
    assert page.copies_part(rows[:1]).plots


def test_the_same_results_make_the_same_page(folder: Path) -> None:
    assert page.html(folder) == page.html(folder)


def test_names_are_escaped(folder: Path) -> None:
    (folder / "survey.json").write_text(json.dumps([surveyed("<b>resnet18", 3)]))
    assert "<b>" not in page.html(folder)
