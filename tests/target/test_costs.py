"""Targets, ways of reading, and what they cost."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from chanopt.errors import ChanoptError
from chanopt.target import ConvRead, Measured, Realization, Target, analytic
from chanopt.target.measured import calls_of

R = Realization
HALF = ConvRead(
    stored=64,
    runs=((16, 48),),
    made=16,
    kernel=(1, 1),
    stride=(1, 1),
    padding=(0, 0),
    dilation=(1, 1),
    size=(14, 14),
    batch=1,
    itemsize=4,
    channels_last=False,
)
LAST = replace(HALF, channels_last=True)
SCATTERED = tuple((start, start + 2) for start in range(0, 64, 4))


def test_a_reads_numbers() -> None:
    read = replace(HALF, runs=((3, 5), (8, 9), (40, 41)), stride=(2, 1), kernel=(3, 3), padding=(1, 1), batch=2)
    assert (read.taken, read.span, read.is_whole, read.is_pointwise) == (4, 38, False, False)
    assert (read.pixels, read.pixels_out) == (2 * 14 * 14, 2 * 7 * 14)
    assert (read.blocks(8), read.blocks(16)) == ([0, 1, 5], [0, 2])


@pytest.mark.parametrize(
    ("read", "device", "ways"),
    [
        (HALF, "cpu", {R.VIEW, R.DENSE}),
        (LAST, "cpu", {R.VIEW, R.GEMM, R.DENSE}),
        (replace(HALF, batch=2), "cpu", {R.VIEW, R.DENSE}),
        (replace(LAST, runs=((0, 8), (16, 24))), "cpu", {R.GATHER, R.GEMM, R.RUNS, R.COVER, R.DENSE}),
        (replace(LAST, runs=SCATTERED), "cpu", {R.GATHER, R.GEMM, R.COVER, R.DENSE}),
        (replace(LAST, kernel=(3, 3)), "cpu", {R.VIEW, R.DENSE}),
        (LAST, "cuda", {R.VIEW, R.FUSED, R.DENSE}),
        (replace(LAST, made=15), "cuda", {R.VIEW, R.DENSE}),
        (replace(LAST, itemsize=8), "cuda", {R.VIEW, R.DENSE}),
        (HALF, "cuda", {R.VIEW, R.DENSE}),
    ],
)
def test_ways(read: ConvRead, device: str, ways: set[Realization]) -> None:
    found = list(read.ways(device, "eager"))
    assert set(found) == ways
    assert found[0] is (R.VIEW if len(read.runs) == 1 else R.GATHER)
    assert len(found) == len(ways)


def test_inductor_lays_convs_out_itself() -> None:
    assert R.GEMM not in LAST.ways("cpu", "inductor")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_free_where(device: str) -> None:
    """The table of the design: a view is free in NCHW for one image, and copied otherwise."""
    compact = {read: replace(read, stored=32, runs=((0, 32),)) for read in (HALF, LAST, replace(HALF, batch=8))}
    extra = {read: cost(read, R.VIEW, device) - cost(whole, R.VIEW, device) for read, whole in compact.items()}
    assert extra[HALF] == 0
    assert extra[LAST] > 0
    assert extra[replace(HALF, batch=8)] > 0


def cost(read: ConvRead, way: Realization, device: str) -> float:
    return analytic.seconds(read, way, device)


def test_the_model_ranks_ways_as_measured_ones_do() -> None:
    """On a large tensor; benchmarks/reads.py has the times."""
    large = replace(LAST, stored=512, runs=((128, 384),), made=128, size=(28, 28), batch=8)
    assert cost(large, R.GEMM, "cpu") < cost(large, R.VIEW, "cpu") < cost(large, R.DENSE, "cpu")
    scattered = replace(large, runs=tuple((start, start + 16) for start in range(0, 512, 32)))
    assert cost(scattered, R.FUSED, "cuda") < cost(scattered, R.GATHER, "cuda")
    assert cost(scattered, R.FUSED, "cuda") < cost(scattered, R.DENSE, "cuda")


def test_a_gather_that_is_shared_costs_each_a_part() -> None:
    read = replace(LAST, runs=SCATTERED, kernel=(3, 3))
    assert cost(replace(read, sharing=2), R.GATHER, "cpu") < cost(read, R.GATHER, "cpu")


def test_zeros_are_multiplied_on_a_cpu_only_where_that_was_measured() -> None:
    assert R.DENSE not in Target("cpu").ways(LAST)
    assert R.DENSE in Target("cpu", cost=lambda read, way: 1.0).ways(LAST)
    assert R.DENSE in Target("cuda").ways(LAST)


@pytest.mark.parametrize("text", ["cpu", "cuda", "cpu:inductor", "cuda:inductor"])
def test_targets_have_names(text: str) -> None:
    assert str(Target.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "told"),
    [("tpu", "found 'tpu'"), ("cpu:gcc", "found 'gcc'"), ("", "found ''"), ("cpu:", "found 'cpu:'")],
)
def test_other_names_are_refused(text: str, told: str) -> None:
    with pytest.raises(ChanoptError, match=told):
        Target.parse(text)


def test_auto_is_made_up_for_by_the_devices_own_name() -> None:
    assert [str(Target().on(device)) for device in ("cpu", "cuda", "mps")] == ["cpu", "cuda", "other"]
    assert str(Target("cuda").on("cpu")) == "cuda"


# -- measured -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beside", [(0, 0), (1, 1), (2, 2)])
@pytest.mark.parametrize("layout", [HALF, LAST, replace(HALF, batch=3), replace(LAST, batch=3)])
@pytest.mark.parametrize("runs", [((16, 48),), ((0, 8), (16, 40)), SCATTERED])
def test_what_is_timed_computes_the_same_shape(
    layout: ConvRead, runs: tuple[tuple[int, int], ...], beside: tuple[int, int]
) -> None:
    read = replace(layout, runs=runs, before=beside[0], after=beside[1])
    for device_of_ways in ("cpu", "cuda"):
        names = {way.value for way in read.ways(device_of_ways, "eager")}
        calls = calls_of(read, "cpu")
        for name in (names | {"beside"}) & set(calls) | {"compact"}:
            assert calls[name]().shape == (read.batch, read.made, *read.size), name


def test_what_a_kernel_does_besides_is_charged_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Measured, "_timed", lambda *_: {"view": 5.0, "fused": 6.0, "beside": 2.0, "compact": 3.0})
    measured = Measured("cpu", None, progress=False)
    dressed = replace(LAST, before=2, after=1)
    assert [measured(dressed, way) for way in (R.VIEW, R.FUSED)] == [7.0, 6.0]


def test_the_timed_ways_agree_with_each_other() -> None:
    """View, product and sum of products multiply the same numbers."""
    for read in (LAST, replace(LAST, runs=((0, 8), (16, 40)))):
        calls = calls_of(replace(read, itemsize=8), "cpu")
        results = [calls[name]() for name in ("view", "gather", "gemm", "runs") if name in calls]
        assert len(results) > 1
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], rtol=1e-12, atol=1e-12)


def test_costs_are_measured_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cache" / "costs.json"
    first = Measured("cpu", path, progress=False, rounds=3)
    seconds = {way: first(LAST, way) for way in LAST.ways("cpu", "eager")}
    assert all(0 < spent < 1 for spent in seconds.values())
    assert json.loads(path.read_text())["costs"]
    monkeypatch.setattr(Measured, "_timed", lambda *_: pytest.fail("measured again"))
    again = Measured("cpu", path, progress=False)
    assert {way: again(LAST, way) for way in seconds} == seconds


def test_a_damaged_file_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_text('{"version": 1, "costs": {"a": 3')
    measured = Measured("cpu", path, progress=False, rounds=2)
    assert measured(LAST, R.VIEW) > 0
    assert json.loads(path.read_text())["version"] == 1


def test_only_the_copy_of_a_shared_gather_is_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    read = replace(LAST, runs=SCATTERED)
    monkeypatch.setattr(Measured, "_timed", lambda *_: {"gather": 5.0, "compact": 3.0})
    measured = Measured("cpu", None, progress=False)
    assert measured(read, R.GATHER) == 5
    assert measured(replace(read, sharing=2), R.GATHER) == 4


def test_measured_products_share_the_gather_too(monkeypatch: pytest.MonkeyPatch) -> None:
    read = replace(LAST, runs=SCATTERED)
    monkeypatch.setattr(Measured, "_timed", lambda *_: {"gather": 5.0, "gemm": 4.5, "cover": 6.0, "compact": 3.0})
    measured = Measured("cpu", None, progress=False)
    shared = replace(read, sharing=2)
    assert [measured(shared, way) for way in (R.GATHER, R.GEMM, R.COVER)] == [4, 3.5, 6]
    assert measured(replace(shared, runs=((0, 32),)), R.GEMM) == 4.5
