"""The command line on small exported nets: what it writes, what it says, how it ends."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from chanopt import cli
from chanopt.report import Report


class Branches(nn.Module):
    """Two readers of one value, each with its own input mask, and a keyword input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.left = nn.Conv2d(16, 8, 1)
        self.right = nn.Conv2d(16, 8, 3, padding=1)
        with torch.no_grad():
            self.left.weight[:, ::2] = 0
            self.right.weight[:, 10:] = 0

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        y = self.stem(x).relu()
        made = self.left(y) + self.right(y)
        return made if scale is None else made * scale


class Ranked(nn.Module):
    """Ends in an operator that has no channel rule."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).cumsum(1)


def saved(path: Path, model: nn.Module, *, dynamic: bool = True, kwargs: dict[str, Any] | None = None) -> Path:
    inputs = (torch.randn(2, 3, 12, 12),)
    shapes: dict[str, Any] | None = {"x": {0: Dim("batch", min=1, max=64)}} if dynamic else None
    if shapes is not None and kwargs:
        shapes["scale"] = None
    torch.export.save(torch.export.export(model.eval(), inputs, kwargs, dynamic_shapes=shapes), path)
    return path


@pytest.fixture
def branches(tmp_path: Path) -> Path:
    return saved(tmp_path / "branches.pt2", Branches())


def run(*words: object) -> int:
    return cli.main([str(word) for word in words])


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line an error is told in."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


# -- optimize ------------------------------------------------------------------------------------------------


def test_optimize_saves_a_smaller_model_that_computes_the_same(
    branches: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "slim.pt2"
    assert run("optimize", branches, out) == 0
    printed = capsys.readouterr().out
    assert "same outputs: relative error" in printed
    assert f"wrote {out}" in printed
    before, after = torch.export.load(branches), torch.export.load(out)
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 12, 12)
        torch.testing.assert_close(after.module()(x), before.module()(x), rtol=1e-4, atol=1e-5)
    assert after.state_dict["right.weight"].shape == (8, 10, 3, 3)
    assert after.state_dict["stem.weight"].shape[0] < before.state_dict["stem.weight"].shape[0]


def test_optimize_leaves_open_exactly_the_sizes_that_were_open(branches: Path, tmp_path: Path) -> None:
    assert run("optimize", branches, tmp_path / "open.pt2") == 0
    (bounds,) = torch.export.load(tmp_path / "open.pt2").range_constraints.values()
    assert (int(bounds.lower), int(bounds.upper)) == (1, 64)
    fixed = saved(tmp_path / "fixed.pt2", Branches(), dynamic=False)
    assert run("optimize", fixed, tmp_path / "shut.pt2") == 0
    assert not torch.export.load(tmp_path / "shut.pt2").range_constraints


def test_sizes_that_were_equal_stay_equal_over_nested_inputs(tmp_path: Path) -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Branches()

        def forward(self, images: dict[str, Tensor], shift: Tensor) -> dict[str, Tensor]:
            return {"sum": self.body(images["left"]) + shift}

    model, images = Nested().eval(), {"left": torch.randn(2, 3, 12, 12)}
    open_sizes = ({"left": {0: Dim.AUTO, 2: Dim("height", min=4, max=40)}}, {0: Dim.AUTO})
    exported = torch.export.export(model, (images, torch.randn(2, 8, 1, 1)), dynamic_shapes=open_sizes)
    torch.export.save(exported, tmp_path / "nested.pt2")
    assert run("optimize", tmp_path / "nested.pt2", tmp_path / "slim.pt2") == 0
    fast = torch.export.load(tmp_path / "slim.pt2")
    assert sorted(map(str, fast.range_constraints.values())) == ["VR[2, int_oo]", "VR[4, 40]"]
    inputs = ({"left": torch.randn(5, 3, 20, 12)}, torch.randn(5, 8, 1, 1))
    torch.testing.assert_close(fast.module()(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match=r"to be equal to 5, but got 4"):
        fast.module()(inputs[0], torch.randn(4, 8, 1, 1))


def test_optimize_keeps_keyword_inputs(tmp_path: Path) -> None:
    scale = torch.tensor([0.5])
    path = saved(tmp_path / "scaled.pt2", Branches(), kwargs={"scale": scale})
    assert run("optimize", path, tmp_path / "slim.pt2") == 0
    x = torch.randn(3, 3, 12, 12)
    made = torch.export.load(tmp_path / "slim.pt2").module()(x, scale=2 * scale)
    torch.testing.assert_close(made, torch.export.load(path).module()(x, scale=2 * scale), rtol=1e-4, atol=1e-5)


def test_optimize_writes_reports(branches: Path, tmp_path: Path) -> None:
    page, data = tmp_path / "report.html", tmp_path / "report.json"
    assert run("optimize", branches, tmp_path / "slim.pt2", "--report", page, "--json", data, "--no-verify") == 0
    report = Report.from_json(data.read_text())
    assert report.model == "branches"
    assert report.parameters_after < report.parameters_before
    assert "<svg" in page.read_text()
    assert "branches" in page.read_text()


def test_optimize_without_comparison_says_nothing_about_outputs(
    branches: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("optimize", branches, tmp_path / "slim.pt2", "--no-verify") == 0
    assert "same outputs" not in capsys.readouterr().out


def test_optimize_ends_with_1_and_writes_nothing_if_outputs_differ(
    branches: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(exported: Any, *arguments: Any, **options: Any) -> tuple[nn.Module, Report]:
        module, report = optimized(exported, *arguments, **options)
        with torch.no_grad():
            module.get_parameter("stem.bias").add_(1.0)
        return module, report

    optimized = cli.optimized
    monkeypatch.setattr(cli, "optimized", broken)
    assert run("optimize", branches, tmp_path / "slim.pt2") == 1
    assert "within a relative error of 0.0001" in error_of(capsys)
    assert not (tmp_path / "slim.pt2").exists()


def test_a_time_limit_reaches_the_solver(branches: Path, tmp_path: Path) -> None:
    exported = cli.load(branches)
    _, report = cli.optimized(exported, "branches", time_limit=0.0)
    (default,) = (s for s in cli.optimized(exported, "branches")[1].segments if len(s.consumers) > 1)
    (hurried,) = (s for s in report.segments if len(s.consumers) > 1)
    assert default.optimal
    assert hurried.objective >= default.objective
    assert run("optimize", branches, tmp_path / "slim.pt2", "--time-limit", "5") == 0


# -- explain -------------------------------------------------------------------------------------------------


def test_explain_prints_the_report_and_saves_no_model(
    branches: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "why.json"
    assert run("explain", branches, "--json", data) == 0
    printed = capsys.readouterr().out
    assert all(layer in printed for layer in ("stem", "left", "right"))
    assert json.loads(data.read_text())["model"] == "branches"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["branches.pt2", "why.json"]


def test_explain_names_refusals_and_strict_makes_them_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(tmp_path / "ranked.pt2", Ranked())
    assert run("explain", path) == 0
    assert "aten.cumsum.default" in capsys.readouterr().out
    assert run("explain", path, "--strict") == 2
    told = error_of(capsys)
    assert told.startswith(
        "chanopt explain: error: expected an operator with a channel rule, found aten.cumsum.default"
    )
    assert "remedy" in told


# -- errors --------------------------------------------------------------------------------------------------


def test_a_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("optimize", tmp_path / "nowhere.pt2", tmp_path / "slim.pt2") == 2
    assert error_of(capsys) == (
        f"chanopt optimize: error: expected a file saved by torch.export.save, found no file {tmp_path / 'nowhere.pt2'}"
    )


@pytest.mark.parametrize("kind", ["text", "empty", "state_dict", "module"])
def test_a_file_of_another_kind(kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.pt2"
    contents = {"text": b"hello", "empty": b""}
    if kind in contents:
        path.write_bytes(contents[kind])
    else:
        torch.save({"a": torch.ones(2)} if kind == "state_dict" else nn.Linear(2, 2), path)
    assert run("explain", path) == 2
    told = error_of(capfd)
    assert f"expected a .pt2 file, found that {path} is none" in told
    assert "torch.export.save(torch.export.export(model.eval(), inputs), 'model.pt2') makes one" in told


def test_a_damaged_archive(branches: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import zipfile

    damaged = tmp_path / "damaged.pt2"
    with zipfile.ZipFile(branches) as whole, zipfile.ZipFile(damaged, "w") as part:
        for name in whole.namelist():
            if not name.endswith(".json"):
                part.writestr(name, whole.read(name))
    assert run("explain", damaged) == 2
    assert "save it again with this version of torch" in error_of(capfd)


def test_a_model_exported_in_train_mode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    torch.export.save(torch.export.export(model, (torch.randn(2, 3, 8, 8),)), tmp_path / "train.pt2")
    assert run("optimize", tmp_path / "train.pt2", tmp_path / "slim.pt2") == 2
    assert "call model.eval()" in error_of(capsys)


def test_a_folder_that_does_not_exist(branches: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("optimize", branches, tmp_path / "no" / "slim.pt2") == 2
    assert f"expected a folder {tmp_path / 'no'} for slim.pt2, found none" in error_of(capsys)


def test_missing_jinja2_is_told_before_the_work(
    branches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "jinja2" else real(name, *rest)
    )
    assert run("optimize", branches, tmp_path / "slim.pt2", "--report", tmp_path / "report.html") == 2
    assert "pip install 'chanopt[report]'" in error_of(capsys)
    assert not (tmp_path / "slim.pt2").exists()
    assert run("demo") == 2
    assert "pip install 'chanopt[report]'" in error_of(capsys)


def test_a_model_with_nan_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Branches()
    with torch.no_grad():
        model.left.weight[0, 1] = float("nan")
    assert run("explain", saved(tmp_path / "nan.pt2", model)) == 2
    assert "found 1 NaN or infinite entries in left.weight" in error_of(capsys)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "the following arguments are required: COMMAND"),
        (("melt",), "invalid choice: 'melt'"),
        (("explain",), "the following arguments are required: IN.pt2"),
        (("explain", "a.pt2", "--time-limit", "soon"), "expected seconds of at least 0, found 'soon'"),
        (("explain", "a.pt2", "--time-limit", "-1"), "expected seconds of at least 0, found '-1'"),
        (("demo", "--amount", "1.5"), "expected a fraction of at least 0 and below 1, found '1.5'"),
        (("demo", "--rounds", "0"), "expected a whole number above 0, found '0'"),
    ],
)
def test_words_that_make_no_sense(words: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        run(*words)
    assert left.value.code == 2
    assert told in capsys.readouterr().err


def test_verbose_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(cli.LoadError, match="found no file"):
        run("explain", tmp_path / "nowhere.pt2", "-v")


def test_the_module_runs_as_a_program(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "chanopt", "explain", str(tmp_path / "nowhere.pt2")],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(Path(cli.__file__).resolve().parents[1])},
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("chanopt explain: error: expected a file saved by torch.export.save")
    assert "Traceback" not in done.stderr


def test_bench_hands_its_words_on(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("bench", "--help") == 0
    assert "python -m benchmarks" in capfd.readouterr().out


def test_bench_needs_a_source_tree(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("chanopt.cli.__file__", str(tmp_path / "src" / "chanopt" / "cli.py"))
    assert run("bench") == 2
    assert "expected a source tree" in capsys.readouterr().err
