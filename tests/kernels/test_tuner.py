"""Tiles without a GPU: the heuristic, what is pruned, and the tuner with a clock of our own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from chanopt.kernels import Config, KernelError, Kind, Problem, candidates, heuristic
from chanopt.kernels.aot import problems
from chanopt.kernels.configs import Rival, fits, listed, shared_bytes, tiles
from chanopt.kernels.launch import grid
from chanopt.kernels.tuner import Choice, Tuner, Work, default_path, key_of, wall_time

LAYER = Problem(Kind.CONV, "fp16", 64, 56, 56, 128, 64, 256, act="relu")
SMALL = Problem(Kind.CONV, "fp32", 1, 5, 5, 32, 8, 64, kernel=(3, 3), padding=(1, 1), group=4, act="relu")
CPU = torch.device("cpu")


def test_heuristic_takes_the_largest_tile_that_fills_the_machine() -> None:
    assert heuristic(LAYER) == Config(128, 128, 64, 4, 3)
    small = replace(LAYER, batch=1, height=7, width=7, outputs=512)
    assert tiles(small, heuristic(small)) == max(tiles(small, c) for c in candidates(small))
    assert heuristic(replace(LAYER, batch=1)) != heuristic(LAYER)


@pytest.mark.parametrize("problem", list(problems()), ids=lambda p: f"{p.kind.value}-{p.dtype}-{p.kernel[0]}")
@pytest.mark.parametrize("capability", [80, 86, 89, 90])
def test_candidates_fit(problem: Problem, capability: int) -> None:
    limit = {80: 163, 86: 99, 89: 99, 90: 227}[capability] * 1024
    found = candidates(problem, capability)
    assert found
    for config in found:
        assert shared_bytes(problem, config) <= limit
        assert problem.kernel == (1, 1) or config.warps <= 4
        programs = 1
        for size in grid(problem, config):
            programs *= size
        assert programs == tiles(problem, config)


def test_candidates_of_few_pixels_are_small() -> None:
    assert all(c.block_m <= 64 for c in candidates(replace(LAYER, batch=1, height=14, width=14)))


def test_a_tile_that_does_not_divide_the_channels_does_not_fit() -> None:
    assert not fits(replace(LAYER, gathered=96), Config(128, 128, 64, 4, 3))
    assert fits(replace(LAYER, gathered=96), Config(128, 128, 32, 4, 4))
    with pytest.raises(KernelError, match="expected a tile for 40 gathered channels"):
        candidates(replace(LAYER, gathered=40))


def test_configs_as_lists() -> None:
    config = listed(LAYER)[0]
    assert Config.from_list(config.to_list()) == config
    for wrong in ([1, 2, 3], [128, 128, 48, 4, 3], [128, 128, 64, 4, 0]):
        with pytest.raises(KernelError, match="expected a config"):
            Config.from_list(wrong)


def test_without_a_gpu_the_heuristic_chooses_and_nothing_is_written(tmp_path: Path) -> None:
    path = tmp_path / "tuner.json"
    tuner = Tuner(path)
    assert tuner.choose(LAYER) == Choice(heuristic(LAYER), {})
    assert not tuner.choose(LAYER).measured
    assert not path.exists()
    assert tuner.freeze() == {}


class Clock:
    """Counts measurements; the kernels' own cannot run here, so only the rivals are timed."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, run: Any, buffers: int) -> float:
        self.calls += 1
        return wall_time(run, buffers, replays=1)


def tuned(path: Path | None, clock: Clock) -> Tuner:
    return Tuner(path, measure=clock, machine="a machine", tensors=CPU)


def test_rivals_are_measured_once_and_kept(tmp_path: Path) -> None:
    path, clock = tmp_path / "sub" / "tuner.json", Clock()
    first = tuned(path, clock)
    choice = first.choose(SMALL)
    assert set(choice.microseconds) == {"zeros", "gather"}
    assert choice.how in ("zeros", "gather")
    assert choice.tile is Rival[choice.how.upper()]
    assert clock.calls == 2
    assert tuned(path, clock).choose(SMALL) == first.choose(SMALL) == choice
    assert clock.calls == 2
    other = tuned(path, clock)
    other.choose(replace(SMALL, outputs=16))
    assert clock.calls == 4
    assert len(json.loads(path.read_text())["choices"]) == 2
    assert Tuner(path, measure=clock, machine="another", tensors=CPU).choose(SMALL).measured
    assert clock.calls == 6


def test_the_fastest_wins_and_a_failing_candidate_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    config = candidates(LAYER)[1]

    def triton(self: Work, tile: Config) -> Any:
        def run(i: int) -> None:
            if tile != config:
                raise RuntimeError("out of resources")

        return run

    monkeypatch.setattr(Work, "triton", triton)
    small = replace(LAYER, batch=1, height=24, width=24)
    times = iter([5.0, 7.0, 9.0])
    choice = Tuner(measure=lambda run, buffers: next(times), machine="m", tensors=CPU).choose(small)
    assert choice.how == "triton"
    assert choice.tile == config
    assert sorted(choice.microseconds.values()) == [5.0, 7.0, 9.0]


def test_a_candidate_that_spills_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Compiled:
        n_spills = 12

    monkeypatch.setattr(Work, "triton", lambda self, tile: lambda i: Compiled())
    assert set(tuned(None, Clock()).choose(SMALL).microseconds) == {"zeros", "gather"}


def test_frozen_choices_go_before_measured_ones(tmp_path: Path) -> None:
    clock = Clock()
    frozen = tuned(None, clock)
    frozen.choose(SMALL)
    plan = json.loads(json.dumps(frozen.freeze()))
    assert list(plan) == [key_of(SMALL, "a machine")]
    plan[key_of(SMALL, "a machine")] |= {"tile": [64, 64, 32, 4, 4]}
    thawed = tuned(None, clock)
    thawed.thaw(plan)
    assert thawed.choose(SMALL).tile == Config(64, 64, 32, 4, 4)
    assert clock.calls == 2


_UNKNOWN = '{"version": 1, "choices": {"a": {"tile": [3], "microseconds": {}}}}'


@pytest.mark.parametrize(
    "text", ["", "{", '{"version": 1}', '{"version": 1, "choices": {"a": {"tile": 1}}}', "[]", _UNKNOWN]
)
def test_a_damaged_file_is_measured_again(tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "tuner.json"
    path.write_text(text)
    assert tuned(path, Clock()).choose(SMALL).measured
    assert "is damaged" in caplog.text
    assert len(json.loads(path.read_text())["choices"]) == 1


def test_a_file_of_another_version_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "tuner.json"
    path.write_text(json.dumps({"version": 99, "choices": {}}))
    assert tuned(path, Clock()).choose(SMALL).measured


def test_where_choices_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CHANOPT_CACHE_DIR", raising=False)
    assert default_path() == tmp_path / "chanopt" / "tuner.json"
    monkeypatch.setenv("CHANOPT_CACHE_DIR", str(tmp_path / "elsewhere"))
    assert default_path() == tmp_path / "elsewhere" / "tuner.json"


@pytest.mark.parametrize(
    "problem",
    [
        SMALL,
        replace(SMALL, residual="add"),
        replace(SMALL, act="hardswish", bias=False),
        Problem(Kind.POINT, "fp32", 2, 4, 4, 32, 8, 64, group=1, act="relu"),
    ],
    ids=["3x3", "residual", "hardswish", "nchw"],
)
def test_rivals_compute_the_same(problem: Problem) -> None:
    from chanopt.kernels.problem import Covered, coverage
    from chanopt.kernels.reference import reference

    work = Work(problem, CPU)
    covered = coverage(work.calls[0])
    assert isinstance(covered, Covered)
    assert replace(covered.problem, precision="tf32") == problem
    for run in work.rivals().values():
        torch.testing.assert_close(run(0), reference(work.calls[0]), rtol=1e-4, atol=1e-5)


def test_depthwise_and_prologues_have_one_rival() -> None:
    depthwise = Problem(Kind.DEPTHWISE, "fp32", 1, 5, 5, 32, 32, 64, kernel=(3, 3), padding=(1, 1), group=4)
    assert set(Work(depthwise, CPU).rivals()) == {Rival.GATHER}
    assert set(Work(replace(SMALL, affine=True, pre_act="relu"), CPU).rivals()) == {Rival.GATHER}
    for problem in (depthwise, replace(SMALL, affine=True)):
        assert Work(problem, CPU).rivals()[Rival.GATHER](0).shape[1] == problem.outputs


def test_large_problems_rotate_buffers() -> None:
    assert Work(SMALL, CPU).buffers == 1
    assert Work(replace(SMALL, batch=8, channels=512, height=40, width=40), CPU).buffers > 1
