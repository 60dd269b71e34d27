"""benchmarks/gpu.py without a GPU: its graphs as files, and a dry run."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

pytest.importorskip("triton", reason="triton is published for Linux only")

import chanopt
from benchmarks import gpu, gpu_plans
from benchmarks.gpu_plans import MODELS, PLANS, VARIANTS, dump, load, plan_path
from chanopt.passes import DEFAULT, RealizeReads
from chanopt.target import Realization, Target

ROOT = Path(__file__).parents[2]
OPS = torch.ops.chanopt


class Net(nn.Module):
    """Residual blocks, a batch norm before a conv, a stride, a slice, a gate: what the kernels do besides."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.first = nn.Conv2d(32, 16, 1)
        self.second = nn.Conv2d(16, 32, 3, padding=1)
        self.down = nn.Conv2d(32, 16, 1, stride=2)
        self.side = nn.Conv2d(32, 16, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.pre = nn.Conv2d(32, 8, 3, stride=2, padding=1)
        self.other = nn.Conv2d(32, 16, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (x + self.second(self.first(x).relu())).relu()
        y = (self.down(x) + nn.functional.silu(self.side(x))).relu()
        y = torch.cat([y, self.other(x)], 1)
        return torch.cat([y, self.pre(torch.relu(self.norm(x)))], 1)


def net() -> nn.Module:
    torch.manual_seed(1)
    model = Net().eval()
    with torch.no_grad():
        model.norm.running_mean.normal_()
        model.norm.running_var.uniform_(0.5, 2)
        for conv in (model.first, model.down, model.side, model.pre):
            conv.weight[:, torch.randperm(32)[:16]] = 0
    return model


def image(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 10, 12).contiguous(memory_format=torch.channels_last)


def compiled(*, fused: bool) -> fx.GraphModule:
    """The net for a GPU: every conv that can gathers by itself, or none does."""
    target = Target("cuda", cost=lambda _, way: float(way is not Realization.FUSED))
    pipeline = DEFAULT if fused else [step for step in DEFAULT if not isinstance(step, RealizeReads)]
    module = chanopt.optimize(net(), (image(),), target=target, pipeline=pipeline)
    assert isinstance(module, fx.GraphModule)
    return module


slim, fused = partial(compiled, fused=False), partial(compiled, fused=True)


def calls(module: fx.GraphModule, target: object) -> list[fx.Node]:
    return [node for node in module.graph.nodes if node.target is target]


@pytest.mark.parametrize("make", [slim, fused])
def test_a_graph_comes_back_from_its_file(make: object, tmp_path: Path) -> None:
    module = make()  # type: ignore[operator]
    path = tmp_path / "net-dense.json.gz"
    dump(module, path)
    again = load(path)
    assert [n.op for n in again.graph.nodes] == [n.op for n in module.graph.nodes]
    assert [n.target for n in again.graph.nodes if n.op == "call_function"] == [
        n.target for n in module.graph.nodes if n.op == "call_function"
    ]
    tables = {n.replace(".", "_"): b for n, b in module.named_buffers() if not b.is_floating_point()}
    for name, table in again.named_buffers():
        if not table.is_floating_point():
            assert torch.equal(table, tables[name])
    x = image().double()
    found = again.double()(x)
    assert found[0].shape == module(image()).shape
    assert bool(found[0].isfinite().all())
    assert torch.equal(load(path).double()(x)[0], found[0])
    assert not torch.equal(load(path, seed=1).double()(x)[0], found[0])
    second = tmp_path / "again.json.gz"
    dump(make(), second)  # type: ignore[operator]
    assert second.read_bytes() == path.read_bytes()


def test_committed_plans() -> None:
    """Every network has its variants, small, with operators that exist; chanopt's use the kernels."""
    paths = sorted(PLANS.glob("*.json.gz"))
    assert sum(path.stat().st_size for path in paths) < 5_000_000
    for model in MODELS:
        made = {variant for variant in VARIANTS if plan_path(model, variant).exists()}
        assert made >= {"dense", "naive", "chanopt"}
    chosen = load(plan_path("resnet50", "chanopt"))
    assert len(calls(chosen, OPS.gather_conv2d.default)) > 5
    dense = load(plan_path("densenet121", "chanopt"))
    assert calls(dense, torch.ops.aten.index_select.default) == []
    naive = load(plan_path("resnet50", "naive"))
    assert len(calls(naive, torch.ops.aten.index_select.default)) > 5
    assert calls(naive, OPS.gather_conv2d.default) == []


def test_readers_leave_the_last_of_each_segment() -> None:
    model = nn.ModuleDict(
        {"layer1": nn.ModuleList([nn.ModuleDict({"conv1": nn.Conv2d(8, 8, 1), "downsample": nn.Conv2d(8, 8, 1)})])}
    )
    convs = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert gpu_plans.readers("resnet50", convs) == ["layer1.0.conv1"]


def test_half_precision_keeps_biases_of_kernels_wide(tmp_path: Path) -> None:
    dump(fused(), path := tmp_path / "net-chanopt.json.gz")
    module = gpu._half(load(path), torch.half)
    node = calls(module, OPS.gather_conv2d.default)[0]
    values = dict(module.named_buffers())
    assert values[str(node.args[1].target)].dtype == torch.half  # type: ignore[union-attr]


def test_checks_hold_the_failing_shape_at_four_and_eight_warps() -> None:
    every = gpu.checks(dry=False)
    failing = [check for check in every if "failing" in check.name]
    assert {check.config.warps for check in failing} == {4, 8}
    assert {check.problem.dtype for check in failing} == {"fp16", "bf16", "fp32"}
    assert all((c.problem.stride, c.problem.padding, c.problem.width) == ((2, 3), (4, 5), 41) for c in failing)
    assert len(every) > 150


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = gpu.Bench(torch.device("cpu"), lambda run, n: 0.0, deadline=1e18, dry=True, found={"seconds": 1.0})
    check = gpu.checks(dry=True)[0]

    def no_launch(problem: object, config: object, call: object, out: Tensor) -> None:
        out.fill_(1.0)

    monkeypatch.setattr(gpu, "launch", no_launch)
    found = gpu.verify(bench, [check])
    assert len(found["wrong"]) == 1
    monkeypatch.setattr(gpu, "launch", lambda *_: None)
    assert gpu.verify(bench, [check])["wrong"][0]["error"] == float("inf")


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        return
    assert gpu.main(["--models"]) == 2
    assert "expected a CUDA device, found none; --dry-run" in capsys.readouterr().err


_ALONE = """
import sys
for name in ("ortools", "torchvision", "timm", "upscale", "pandas", "matplotlib", "sklearn"):
    sys.modules[name] = None
from benchmarks import gpu
sys.exit(gpu.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_dry_run_without_solver_or_peers(tmp_path: Path) -> None:
    """Every part runs, in a process that has neither; networks in all three modes."""
    for variant in ("dense", "chanopt"):
        dump(slim() if variant == "dense" else fused(), tmp_path / f"tiny-{variant}.json.gz")
    arguments = ["--dry-run", "--models", "tiny", "--plans", str(tmp_path), "--out", str(tmp_path / "gpu")]
    done = subprocess.run(
        [sys.executable, "-c", _ALONE, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["verify"]["wrong"] == []
    assert found["verify"]["checks"] > 10
    assert found["determinism"] == {"run_to_run": True, "batch_invariant": True}
    assert len(found["layers"]) == 3
    assert all(row["us"]["chanopt"] > 0 and row["us"]["zeros + cuDNN"] > 0 for row in found["layers"])
    modes = {(row["variant"], row["mode"]) for row in found["networks"]}
    every = {(v, m) for v in ("dense", "chanopt") for m in ("eager", "graph", "inductor")}
    assert modes == every | {("chanopt", "tuned")}
    (tuned,) = (row for row in found["networks"] if row["mode"] == "tuned")
    assert sum(tuned["tuned"].values()) > 0
    assert tuned["not tuned"] == 0
    assert all(row["error"] < 1e-4 for row in found["networks"] if row["mode"] == "eager")
    assert "tiny naive batch 1 eager: no plan" in found["left_out"]
    page = (tmp_path / "gpu.md").read_text()
    assert "| tiny, batch 1, eager |" in page
    assert "| resnet50, batch 1 |" in page
