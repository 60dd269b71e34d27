"""What an optimised module is exported to: torch.export, AOTInductor, ONNX, TorchScript (docs/export.md)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import chanopt

pytestmark = [
    pytest.mark.slow,
    # torch's exporters on themselves
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def assert_close(reference: Tensor, output: Tensor, tolerance: float) -> None:
    """The largest difference, relative to the largest value; and the outputs must depend on the inputs."""
    assert reference.shape == output.shape
    assert float(reference.std(0).mean()) > 1e-3 * float(reference.abs().max())
    assert float((reference - output).abs().max()) <= tolerance * float(reference.abs().max())


def test_torch_export(slim: Any) -> None:
    module = slim.exported.module()
    for batch in (1, 3):
        x = slim.inputs(batch)
        assert torch.equal(module(x), slim.fast(x))
    assert set(slim.exported.state_dict) == set(slim.fast.state_dict())


def test_a_file_of_all_three(slim: Any, tmp_path: Path) -> None:
    path, x = chanopt.save(slim.fast, tmp_path / "slim.pt2"), slim.inputs(3)
    assert torch.equal(chanopt.load(path)(x), slim.fast(x))
    assert torch.equal(torch.export.load(path).module()(x), slim.fast(x))
    fresh = chanopt.apply_plan(slim.masked, chanopt.Plan.of(slim.fast).to_json(), (x,))
    fresh.load_state_dict(slim.fast.state_dict())
    assert torch.equal(fresh(x), slim.fast(x))


@pytest.mark.filterwarnings("ignore")  # torch and the compilers behind it, on themselves
def test_aot_inductor(slim: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # no locks shared with other processes
    with torch._inductor.config.patch(compile_threads=1):  # nor a pool of compilers
        path = aoti_compile_and_package(
            slim.exported,
            package_path=str(tmp_path / "slim_cpu.pt2"),
            # Compiled to be right, not fast: vectors and optimisation are a third of the time.
            inductor_configs={"aot_inductor.debug_compile": True, "cpp.simdlen": 1},
        )
    compiled = aoti_load_package(path)
    x = slim.inputs(3)
    with torch.no_grad():
        assert_close(slim.masked(x), compiled(x), 1e-4)
        torch.testing.assert_close(compiled(x[:1]), compiled(x)[:1], rtol=1e-3, atol=1e-3)
    assert Path(path).stat().st_size < 4.5 * sum(p.numel() for p in slim.masked.parameters())


@pytest.mark.filterwarnings("ignore")  # torch and the compilers behind it, on themselves
def test_onnx(slim: Any, tmp_path: Path) -> None:
    import onnx
    import onnxruntime

    path = tmp_path / "slim.onnx"
    torch.onnx.export(slim.exported, dynamo=True, verbose=False).save(path)
    kinds = Counter(node.op_type for node in onnx.load(path).graph.node)
    report = chanopt.explain(slim.fast)
    assert {node.domain for node in onnx.load(path).graph.node} <= {""}  # plain ONNX, no operator of ours
    taken = sum("index_select" in str(node.target) for node in slim.fast.graph.nodes)
    ranges = sum(node.target is torch.ops.aten.slice.Tensor for node in slim.fast.graph.nodes)
    assert kinds["Gather"] >= taken
    assert kinds["Slice"] >= ranges
    assert report.gathers == 0 or taken > 0
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (2, 3):
        x = slim.inputs(batch)
        (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            assert_close(slim.masked(x), torch.from_numpy(output), 1e-4)


@pytest.mark.filterwarnings("ignore")  # torch and the compilers behind it, on themselves
def test_torch_jit_trace(slim: Any, tmp_path: Path) -> None:
    with torch.no_grad():
        traced = torch.jit.trace(slim.fast, slim.inputs(2))
        traced.save(tmp_path / "slim.pt")
        x = 1 - 2 * slim.inputs(2)  # other values; a trace keeps the batch where the model flattens
        assert torch.equal(torch.jit.load(tmp_path / "slim.pt")(x), slim.fast(x))
