"""What docs/results.md says of its own figures: over what sums are, what was compared, of what code rows are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import docs
from benchmarks.cases import Case, Mask, Record
from benchmarks.jobs import UnreadableError


def copies(count: int, megabytes: int) -> dict[str, int]:
    return {"copies": count, "channels": count, "bytes": megabytes * 1_000_000}


def surveyed(model: str, ours: dict[str, int], **changes: Any) -> dict[str, Any]:
    """A network that UPSCALE does not run, under masked inputs."""
    made = {"model": model, "side": "input", "amount": 0.5, "resolution": 64, "segments": 5, "segments_optimal": 5}
    made |= {"naive": copies(9, 9), "greedy": copies(4, 4), "upscale": None, "plans_cut": True}
    return {**made, "chanopt": ours, **changes}


def output(model: str, ours: dict[str, int]) -> dict[str, Any]:
    nothing = copies(0, 0)
    return surveyed(model, ours, side="output", naive=nothing, greedy=nothing, plans_cut=False)


def test_networks_that_upscale_does_not_run_are_compared_with_the_greedy_order_too() -> None:
    rows = [surveyed("a", copies(1, 5)), surveyed("b", copies(1, 3), upscale=copies(4, 4))]
    text = "\n".join(docs.copies_part([{**row, "model": name} for row, name in zip(rows, NAMES, strict=True)]))
    assert "| input 50% | 2 | 2 | 1 | 9.00 | 4.00 | 3.00 | 0.75 | 8.00 | 1 | 0 | 1 | 10 / 10 |" in text


NAMES = ("resnet18", "vgg11")


def test_masked_outputs_have_dashes_for_arms_that_do_not_see_them_and_a_line_of_their_own() -> None:
    text = "\n".join(docs.copies_part([output("resnet18", copies(2, 3)), output("vgg11", copies(0, 0))]))
    assert "| output 50% | 2 | 2 | 0 | - | - | - | - | 3.00 | - | - | - | 10 / 10 |" in text
    assert "masked: resnet18 2 (3.00 MB); none on the other 1 of 2 networks." in text


def test_more_copies_of_fewer_bytes_are_told_in_words() -> None:
    text = "\n".join(docs.copies_part([surveyed("resnet18", copies(7, 3)), surveyed("vgg11", copies(4, 4))]))
    assert "In 1 of 2 rows with input masks chanopt makes more copies than the greedy order" in text
    assert ", of fewer bytes (resnet18): " in text


def record(arm: str, **changes: Any) -> Record:
    made = Record(
        Case("resnet18"),
        arm,
        {},
        planned=copies(3, 36),
        observed=copies(3, 36),
        agree=True,
        profiled={"selections": 3, "channels": 3, "selected_bytes": 36_000_000, "hidden_bytes": 0},
        macs={"dense": 2_000_000, "exact": 1_000_000, "flux": 1_500_000, "flux_adds": 1},
        peak_bytes=7_000_000,
        error=1e-6,
    )
    return replace(made, **changes)


def told(*records: Record) -> str:
    return "\n".join(docs.speed_part([r.to_dict() for r in records]))


def test_the_page_tells_how_many_runs_were_compared_by_what() -> None:
    before = {"selections": 0, "selected_bytes": 0, "hidden_bytes": 0}  # of a time when `x[:, indices]` was not seen
    inductor = replace(record("chanopt").case, mode="inductor")
    text = told(
        record("chanopt"),
        record("upscale", profiled=before),
        record("upscale_runs", agree=None, profiled=before),
        record("greedy", case=inductor),
    )
    assert "Of 4 runs, 2 were compared with their plan by a dispatch mode in one eager run: 2 selected what" in text
    assert "Of these 2, 1 were compared with torch's profiler too, which saw the same in 1." in text
    assert "Not compared with anything: 2 (1 compiled, 1 of an arm that was not compared then)." in text
    other = record("upscale", profiled={**before, "channels": 0})
    assert "Of these 1, 1 were compared with torch's profiler too, which saw the same in 0." in told(other)
    assert "the profiler saw {'selections': 0" in told(other)


def test_of_compiled_modules_only_what_was_measured_on_them_is_shown() -> None:
    case = replace(record("chanopt").case, mode="inductor")
    now = record("chanopt", case=case, agree=None, observed=None, profiled=None, macs=None)
    assert docs.doing(now)[2:9] == ["-"] * 7
    assert docs.doing(now)[10] == "7.00"
    assert docs.doing(now)[12] == "1e-06"
    assert "and error are of compiled modules." in told(now)
    before = replace(now, observed=copies(3, 36), macs=record("chanopt").macs)
    assert docs.doing(before)[2:9] == ["-"] * 7
    assert (docs.doing(before)[10], docs.doing(before)[12]) == ("-", "-")
    assert "peak memory and error were not measured." in told(before)


def test_arms_that_ignore_masked_outputs_are_named_above_their_speed() -> None:
    blind = record("greedy", case=Case("resnet18", Mask(side="both")))
    assert "*naive* and *greedy* ignore masked outputs" in told(blind)
    assert "ignore masked outputs" not in told(record("greedy"))
    assert "ignore masked outputs" not in told(replace(blind, arm="dense"))


def test_one_network_at_two_sizes_is_two_networks() -> None:
    sizes = [replace(record("chanopt").case, resolution=size) for size in (224, 64)]
    ours = [
        record("chanopt", case=case, ratios={"dense": (ratio,) * 3})
        for case, ratio in zip(sizes, (0.5, 2.0), strict=True)
    ]
    assert "against dense: geometric mean 1.000; slower on resnet18 at 64" in told(*ours)


@pytest.mark.parametrize("text", ["[{", '["row"]'])
def test_results_that_cannot_be_read_are_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UnreadableError, match=r"expected (results|rows) .*in .*run\.json"):
        docs.markdown(tmp_path)


def test_objectives_and_bounds_of_timed_networks_are_shown() -> None:
    figures = {"objective": 2_000_000, "bound": 1_000_000, "segments": 5, "segments_optimal": 4}
    text = told(record("chanopt", figures=figures))
    assert "| resnet18, input 50% l2 local | 2.00 | 1.00 | 36.00 | 3 | 4 / 5 |" in text
    assert "Orders of these networks" not in told(record("dense"))


def test_a_sweep_of_earlier_code_is_told_by_its_counts(tmp_path: Path) -> None:
    heads = "model,side,amount,resolution,violations,copies,gathered_channels,copied_bytes,segments"
    lines = ["resnet18,input,0.5,64,,1,1,3000000,5", "vgg11,input,0.5,64,,2,2,3000000,5", "vgg11,both,0.5,64,,2,2,3,5"]
    (tmp_path / "sweep.csv").write_text("\n".join([heads, *lines]) + "\n")
    assert len(docs.sweep_part(tmp_path / "sweep.csv")) == 2
    rows = [surveyed("resnet18", copies(1, 3)), surveyed("vgg11", copies(1, 3))]
    (tmp_path / "survey.json").write_text(json.dumps(rows))
    text = docs.sweep_part(tmp_path / "sweep.csv")[-1]
    assert "earlier code than the survey above: of the 2 rows that both have, 1 have other counts" in text
    assert "(vgg11)" in text
    (tmp_path / "survey.json").write_text(json.dumps(rows[:1]))
    assert (
        "All 1 rows that the survey above has too have the same counts" in docs.sweep_part(tmp_path / "sweep.csv")[-1]
    )


def test_the_corpus_says_which_segments_it_holds() -> None:
    row = {"family": "corpus", "channels": 9, "readers": 2, "seed": 0, "objective": 1, "optimal": True, "gap": 0.0}
    row |= {"greedy": 1, "natural": 1, "seconds": 0.1, "name": "x", "known": 1}
    text = "\n".join(docs.solver_part([row]))
    assert "segments with more than one reader in 6 networks of the zoo (resnet18, " in text


def test_what_needs_no_masks_is_told_apart() -> None:
    """The unmasked arm against the dense one: half of the time, by medians."""
    case = Case("resnet18")
    timed = [
        Record(case, arm, {}, latency_ms=(1.0, median, 90.0)) for arm, median in (("dense", 8.0), ("unmasked", 4.0))
    ]
    text = "\n".join(docs.speed_part([record.to_dict() for record in timed]))
    assert "before masking takes 0.500 of the dense time (least 0.50, resnet18)" in text
    assert "before masking" not in "\n".join(docs.speed_part([timed[0].to_dict()]))
