"""``save`` and ``load``: the same bytes come out, in any process, and nothing in a file is ever run."""

from __future__ import annotations

import copy
import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import chanopt
from chanopt import cli
from chanopt.errors import ChanoptError, LoadError
from chanopt.saving import is_saved, read_report
from tests.support.masks import mask_randomly
from tests.support.micro import MICRO

MANIFEST = "archive/extra/chanopt/manifest.json"
PLAN = "archive/extra/chanopt/plan.json"
REPORT = "archive/extra/chanopt/report.json"
ROOT = Path(__file__).resolve().parents[2]


def optimised(name: str, seed: int = 1) -> tuple[fx.GraphModule, Callable[[int], tuple[Any, ...]]]:
    """A masked micro net after the compiler, and its inputs by batch."""
    micro = MICRO[name]
    net = micro.build()
    mask_randomly(net, seed)

    def inputs(batch: int) -> tuple[Any, ...]:
        return micro.inputs(micro.fixed_batch or batch, torch.float32, 5)

    fast = chanopt.optimize(net, inputs(2))
    assert isinstance(fast, fx.GraphModule)
    return fast, inputs


@pytest.fixture(scope="module")
def fast() -> fx.GraphModule:
    torch.manual_seed(0)
    return optimised("bottleneck")[0]


@pytest.fixture(scope="module")
def x() -> Tensor:
    return MICRO["bottleneck"].inputs(2, torch.float32, 5)[0]


@pytest.fixture
def path(fast: fx.GraphModule, tmp_path: Path) -> Path:
    return chanopt.save(fast, tmp_path / "slim.pt2")


def assert_same(left: Any, right: Any) -> None:
    """Byte for byte, in the same structure."""
    (one, spec), (two, other) = pytree.tree_flatten(left), pytree.tree_flatten(right)
    assert spec == other
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


# -- what comes back ---------------------------------------------------------------------------------------------------

VARIED = (
    *("bottleneck", "c2f", "channel_shuffle", "grouped_residual", "cat_two_orders"),  # gathers, ranges, concats
    *("dict_input", "named_tuple_output", "nested_output", "unused_input", "embedding"),  # structures of the interface
    *("reshape_fixed_batch", "conv_unbatched"),  # a batch of one size, or none
)


@pytest.mark.parametrize("name", VARIED)
def test_the_loaded_module_computes_the_same_bytes_at_any_batch(name: str, tmp_path: Path) -> None:
    fast, inputs = optimised(name)
    loaded = chanopt.load(chanopt.save(fast, tmp_path / "slim.pt2"))
    for batch in (1, 2, 5):
        assert_same(fast(*inputs(batch)), loaded(*inputs(batch)))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(MICRO) - set(VARIED))[::8])
def test_every_kind_of_network_survives(name: str, tmp_path: Path) -> None:
    fast, inputs = optimised(name)
    path = chanopt.save(fast, tmp_path / "slim.pt2")
    loaded = chanopt.load(path)
    assert_same(fast(*inputs(3)), loaded(*inputs(3)))
    assert_same(fast(*inputs(3)), torch.export.load(path).module()(*inputs(3)))


def test_the_loaded_module_is_as_optimize_returns_it(fast: fx.GraphModule, path: Path, x: Tensor) -> None:
    loaded = chanopt.load(path)
    assert isinstance(loaded, fx.GraphModule)
    assert loaded.code == fast.code
    assert not loaded.training
    assert [name for name, _ in loaded.named_parameters()] == [name for name, _ in fast.named_parameters()]
    assert [name for name, _ in loaded.named_buffers()] == [name for name, _ in fast.named_buffers()]
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert chanopt.explain(loaded) == chanopt.explain(fast)
    assert chanopt.Plan.of(loaded) == chanopt.Plan.of(fast)
    layers = [(node.meta.get("chanopt") or {}).get("layer") for node in loaded.graph.nodes]
    assert layers == [(node.meta.get("chanopt") or {}).get("layer") for node in fast.graph.nodes]


def test_the_loaded_module_trains_and_copies(path: Path, x: Tensor) -> None:
    loaded = chanopt.load(path)
    before = loaded(x).detach().clone()
    twin = copy.deepcopy(loaded)
    optimiser = torch.optim.SGD(loaded.parameters(), lr=0.1)
    loaded(x).square().mean().backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())
    optimiser.step()
    assert not torch.equal(loaded(x), before)
    assert torch.equal(twin(x), before)


def test_a_fine_tuned_module_is_saved_as_it_is_now(path: Path, x: Tensor) -> None:
    loaded = chanopt.load(path)
    with torch.no_grad():
        next(loaded.parameters()).mul_(1.5)
    next(loaded.parameters()).requires_grad_(False)
    again = chanopt.load(chanopt.save(loaded, path))  # over the file that it came from
    assert_same(loaded(x), again(x))
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in loaded.parameters()]
    assert sum(p.requires_grad for p in again.parameters()) == len(list(again.parameters())) - 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_floating_type_of_the_module_is_kept(
    dtype: torch.dtype, fast: fx.GraphModule, tmp_path: Path, x: Tensor
) -> None:
    cast = copy.deepcopy(fast).to(dtype)
    loaded = chanopt.load(chanopt.save(cast, tmp_path / "slim.pt2"))
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert_same(cast(x.to(dtype)), loaded(x.to(dtype)))


def test_the_memory_format_of_the_weights_is_kept(fast: fx.GraphModule, tmp_path: Path, x: Tensor) -> None:
    last = copy.deepcopy(fast).to(memory_format=torch.channels_last)
    loaded = chanopt.load(chanopt.save(last, tmp_path / "slim.pt2"))
    strides = {name: tensor.stride() for name, tensor in last.state_dict().items()}
    assert {name: tensor.stride() for name, tensor in loaded.state_dict().items()} == strides
    assert strides != {name: tensor.stride() for name, tensor in fast.state_dict().items()}
    assert_same(last(x), loaded(x))


def test_a_model_with_channels_last_inputs(tmp_path: Path) -> None:
    micro = MICRO["bottleneck"]
    net = micro.build().to(memory_format=torch.channels_last)
    mask_randomly(net, 1)
    x = micro.inputs(2, torch.float32, 5)[0].to(memory_format=torch.channels_last)
    fast = chanopt.optimize(net, (x,))
    loaded = chanopt.load(chanopt.save(fast, tmp_path / "slim.pt2"))
    assert_same(fast(x), loaded(x))
    assert loaded(x).stride() == fast(x).stride()


def test_another_process_that_only_imports_chanopt(fast: fx.GraphModule, path: Path, x: Tensor, tmp_path: Path) -> None:
    torch.save(x, tmp_path / "x.pt")
    script = (
        "import sys, chanopt\n"
        "fast = chanopt.load(sys.argv[1] + '/slim.pt2')\n"
        "assert 'ortools' not in sys.modules\n"
        "import torch\n"
        "torch.set_num_threads(1)\n"
        "torch.save(fast(torch.load(sys.argv[1] + '/x.pt')), sys.argv[1] + '/y.pt')\n"
        "print(chanopt.explain(fast))\n"
    )
    paths = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths}
    command = [sys.executable, "-W", "ignore", "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(chanopt.explain(fast)).strip()
    assert torch.equal(torch.load(tmp_path / "y.pt"), fast(x))


def test_torch_reads_the_file_without_chanopt(fast: fx.GraphModule, path: Path, x: Tensor) -> None:
    exported = torch.export.load(path, extra_files=(extra := {"chanopt/report.json": ""}))
    assert_same(exported.module()(x), fast(x))
    assert_same(exported.module()(x[:1]), fast(x[:1]))
    assert json.loads(extra["chanopt/report.json"]) == json.loads(chanopt.explain(fast).to_json())


def test_the_report_is_read_without_the_module(fast: fx.GraphModule, path: Path) -> None:
    assert read_report(path) == chanopt.explain(fast)
    assert is_saved(path)


def test_saving_leaves_the_module_alone(fast: fx.GraphModule, x: Tensor, tmp_path: Path) -> None:
    twin = copy.deepcopy(fast).train()
    before, code = {name: tensor.clone() for name, tensor in twin.state_dict().items()}, twin.code
    chanopt.save(twin, tmp_path / "slim.pt2")
    assert twin.training
    assert twin.code == code
    assert all(torch.equal(before[name], tensor) for name, tensor in twin.state_dict().items())


def test_nothing_in_the_file_is_pickled(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            assert not name.endswith((".pkl", ".pickle"))
            data = archive.read(name)
            assert not (data[:1] == b"\x80" and data[-1:] == b"."), name  # a pickle of protocol 2 or newer
            assert not data.startswith(b"PK"), name  # what torch.save writes


def test_the_command_line_writes_and_explains_such_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net, inputs = MICRO["bottleneck"].build(), MICRO["bottleneck"].inputs(2, torch.float32, 5)
    mask_randomly(net, 1)
    torch.export.save(torch.export.export(net, inputs), tmp_path / "net.pt2")
    out = tmp_path / "slim.pt2"
    assert cli.main(["optimize", str(tmp_path / "net.pt2"), str(out), "--no-verify"]) == 0
    printed = capsys.readouterr().out
    loaded = chanopt.load(out)
    assert chanopt.explain(loaded).model == "net"
    torch.testing.assert_close(loaded(*inputs), net(*inputs), rtol=1e-4, atol=1e-5)
    assert cli.main(["explain", str(out), "--json", str(tmp_path / "report.json")]) == 0
    assert str(chanopt.explain(loaded)) in printed
    assert str(chanopt.explain(loaded)) in capsys.readouterr().out
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(chanopt.explain(loaded).to_json())
    assert cli.main(["optimize", str(out), str(tmp_path / "again.pt2")]) == 2
    assert "found one that chanopt has optimised already" in capsys.readouterr().err


# -- what save refuses -------------------------------------------------------------------------------------------------


def test_a_module_of_another_maker(tmp_path: Path) -> None:
    with pytest.raises(ChanoptError, match="expected a module made by chanopt.optimize, found a Linear"):
        chanopt.save(nn.Linear(2, 2), tmp_path / "slim.pt2")
    assert list(tmp_path.iterdir()) == []


def test_a_graph_that_was_edited_since(fast: fx.GraphModule, tmp_path: Path) -> None:
    edited = copy.deepcopy(fast)
    relu = next(node for node in edited.graph.nodes if "relu" in str(node.target))
    relu.target = torch.ops.aten.sigmoid.default
    edited.recompile()
    with pytest.raises(ChanoptError, match="its graph or the sizes of its tensors were changed since"):
        chanopt.save(edited, tmp_path / "slim.pt2")


def test_tensors_that_were_resized_since(fast: fx.GraphModule, tmp_path: Path) -> None:
    edited = copy.deepcopy(fast)
    name = next(name for name, _ in edited.named_parameters())
    owner, _, leaf = name.rpartition(".")
    setattr(edited.get_submodule(owner), leaf, nn.Parameter(torch.zeros(2, 2)))
    with pytest.raises(ChanoptError, match="the sizes of its tensors were changed since"):
        chanopt.save(edited, tmp_path / "slim.pt2")


def test_an_export_of_something_else(fast: fx.GraphModule, tmp_path: Path) -> None:
    other = torch.export.export(nn.Linear(2, 2), (torch.randn(2, 2),))
    with pytest.raises(ChanoptError, match="found one with other parameters"):
        chanopt.save(fast, tmp_path / "slim.pt2", exported=other)


class TwoStage(nn.Module):
    """A detector in small: what its second half sees depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        features = self.backbone(x).flatten(2).transpose(1, 2).reshape(-1, 4)
        return self.head(features[: max(1, int((features[:, 0] > 0).sum().item()))])


def test_a_model_optimised_in_parts_is_saved_part_by_part(tmp_path: Path) -> None:
    model = TwoStage().eval()
    with torch.no_grad():
        model.backbone[2].weight[:, 3:] = 0
    x = torch.randn(1, 3, 8, 8)
    whole = chanopt.optimize(model, (x,))
    with pytest.raises(ChanoptError, match=r"optimised in parts.*one by one: backbone, head"):
        chanopt.save(whole, tmp_path / "whole.pt2")
    part = whole.get_submodule("backbone")
    rebuilt = copy.deepcopy(model)
    rebuilt.backbone = chanopt.load(chanopt.save(part, tmp_path / "backbone.pt2"))
    rebuilt.head = chanopt.load(chanopt.save(whole.get_submodule("head"), tmp_path / "head.pt2"))
    assert rebuilt.backbone.get_parameter("0.weight").shape[0] == 3
    assert torch.equal(rebuilt(x), whole(x))


def test_a_failed_save_leaves_the_old_file(fast: fx.GraphModule, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()
    monkeypatch.setattr(Path, "write_bytes", _full)
    with pytest.raises(OSError, match="no space"):
        chanopt.save(fast, path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def _full(*_: object) -> int:
    raise OSError("no space left on device")


# -- what load refuses -------------------------------------------------------------------------------------------------


def rewritten(path: Path, change: dict[str, Callable[[bytes], bytes] | bytes | None], *, sign: bool = False) -> Path:
    """The archive with entries changed, added or (None) dropped; with ``sign``, their digests too."""
    import hashlib

    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    for name, new in change.items():
        if new is None:
            del entries[name]
        else:
            entries[name] = new if isinstance(new, bytes) else new(entries[name])
    if sign:
        manifest = json.loads(entries[MANIFEST])
        manifest["entries"] = {
            name.removeprefix("archive/"): hashlib.sha256(data).hexdigest()
            for name, data in entries.items()
            if name != MANIFEST
        }
        entries[MANIFEST] = json.dumps(manifest).encode()
    other = path.with_name("changed.pt2")
    with zipfile.ZipFile(other, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return other


def edited(**new: Any) -> Callable[[bytes], bytes]:
    """A change of JSON."""
    return lambda data: json.dumps({**json.loads(data), **new}).encode()


class Bomb:
    """Unpickling it writes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="found no file"):
        chanopt.load(tmp_path / "none.pt2")


def test_not_an_archive(tmp_path: Path) -> None:
    (tmp_path / "text.pt2").write_text("weights")
    with pytest.raises(LoadError, match="found that .*text.pt2 is none, or cut short"):
        chanopt.load(tmp_path / "text.pt2")


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_file_that_is_cut_short(part: float, path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(part * len(data))])
    with pytest.raises(LoadError, match="cut short|damaged"):
        chanopt.load(path)
    assert not is_saved(path)


def test_bytes_that_were_damaged(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[200] ^= 0xFF  # in the first weight
    path.write_bytes(data)
    with pytest.raises(LoadError, match="it is damaged|is not what was saved"):
        chanopt.load(path)


@pytest.mark.parametrize("lost", [(0, 3000), (-500, 0), (-800, -300)])
def test_bytes_that_were_lost(path: Path, lost: tuple[int, int]) -> None:
    data = path.read_bytes()
    middle = len(data) // 2
    start, stop = lost if lost[0] == 0 else (middle + lost[0], middle + lost[1])
    path.write_bytes(data[:start] + data[stop:])
    with pytest.raises(LoadError):
        chanopt.load(path)


def test_no_flipped_bit_raises_anything_else(path: Path, fast: fx.GraphModule, x: Tensor) -> None:
    """Of the archive's directory, which no digest covers, every 7th bit."""
    data = path.read_bytes()
    directory = data.rfind(b"PK\x01\x02", 0, data.rfind(b"PK\x01\x02"))  # the last two entries
    refused = 0
    for bit in range(8 * directory, 8 * len(data), 7):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            again = chanopt.load(path)
        except LoadError:
            refused += 1
        else:  # a time stamp
            assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in fast.state_dict().items())
    assert refused > 20


def test_a_file_that_may_not_be_read_is_no_damaged_one(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(PermissionError, match="Permission denied"):
        chanopt.load(path)


@pytest.mark.parametrize("written", [0, -1, True, 1.0, "1", None])
def test_a_format_that_never_was(path: Path, written: Any) -> None:
    with pytest.raises(LoadError, match="its format is"):
        chanopt.load(rewritten(path, {MANIFEST: edited(format=written)}))


@pytest.mark.parametrize("report", [b"[]", b'{"x": 1}', b'{"format": 1}', b"{"])
def test_a_report_that_is_none(path: Path, report: bytes) -> None:
    other = rewritten(path, {REPORT: report}, sign=True)
    for read in (chanopt.load, read_report):
        with pytest.raises(LoadError, match="report"):
            read(other)


@pytest.mark.parametrize("where", [b"slim.pt2", io.BytesIO(), None, 3])
def test_what_is_no_path(fast: fx.GraphModule, where: Any) -> None:
    with pytest.raises(ChanoptError, match="expected the path of a file"):
        chanopt.save(fast, where)
    with pytest.raises(ChanoptError, match="expected the path of a file"):
        chanopt.load(where)


def test_folders(fast: fx.GraphModule, tmp_path: Path) -> None:
    with pytest.raises(ChanoptError, match="to write, found the folder"):
        chanopt.save(fast, tmp_path)
    with pytest.raises(ChanoptError, match="found no folder .*nowhere; make it first"):
        chanopt.save(fast, tmp_path / "nowhere" / "slim.pt2")
    with pytest.raises(LoadError, match="found a folder"):
        chanopt.load(tmp_path)


def test_a_device_that_is_not_there(path: Path) -> None:
    with pytest.raises(ChanoptError, match="expected a device of this machine, found 'nonsense'"):
        chanopt.load(path, device="nonsense")
    if not torch.cuda.is_available():
        with pytest.raises(ChanoptError, match="expected a device of this machine, found 'cuda'"):
            chanopt.load(path, device="cuda")


def test_weights_without_values(fast: fx.GraphModule, tmp_path: Path) -> None:
    with pytest.raises(ChanoptError, match="on the meta device; load a state dict first"):
        chanopt.save(copy.deepcopy(fast).to("meta"), tmp_path / "slim.pt2")


def test_what_torch_export_saved(tmp_path: Path) -> None:
    exported = torch.export.export(nn.Linear(2, 2), (torch.randn(2, 2),))
    torch.export.save(exported, tmp_path / "other.pt2")
    with pytest.raises(LoadError, match="has no manifest; chanopt.save"):
        chanopt.load(tmp_path / "other.pt2")
    assert not is_saved(tmp_path / "other.pt2")


def test_a_pickled_module_is_not_touched(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    torch.save(Bomb(mark), tmp_path / "model.pt")
    with pytest.raises(LoadError, match=r"holds pickled Python \(.*data\.pkl\), which chanopt never loads"):
        chanopt.load(tmp_path / "model.pt")
    assert not mark.exists()


@pytest.mark.parametrize("sign", [False, True])
def test_pickles_put_into_the_archive_are_not_touched(path: Path, tmp_path: Path, sign: bool) -> None:
    mark, buffer = tmp_path / "ran", io.BytesIO()
    torch.save(Bomb(mark), buffer)
    bomb = {"archive/data/sample_inputs/model.pt": buffer.getvalue(), "archive/data/constants/custom_obj_0": b"\x80"}
    other = rewritten(path, dict(bomb), sign=sign)
    if sign:
        chanopt.load(other)  # its digests are right: loaded, and the pickles are bytes that nobody reads
    else:
        with pytest.raises(LoadError, match="entries were added|is not what was saved"):
            chanopt.load(other)
    assert not mark.exists()


def test_a_newer_version(path: Path) -> None:
    other = rewritten(path, {MANIFEST: edited(format=2, chanopt="9.1")})
    with pytest.raises(LoadError, match=r"format 2, written by chanopt 9\.1; update chanopt"):
        chanopt.load(other)
    assert is_saved(other)


def test_a_newer_plan(path: Path) -> None:
    with pytest.raises(LoadError, match="expected a plan of format 1, found 7; update chanopt"):
        chanopt.load(rewritten(path, {PLAN: edited(format=7)}, sign=True))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({MANIFEST: b"{"}, "its manifest is not JSON"),
        ({MANIFEST: b"[]"}, "its manifest is not JSON"),
        ({MANIFEST: edited(entries=None)}, "lists no entries"),
        ({MANIFEST: edited(tensors={})}, "expected the tensors that the plan in"),
        ({MANIFEST: edited(tensors={"conv.weight": {}})}, "its manifest does not fit"),
        ({MANIFEST: edited(byteorder="big")}, "expected tensors of a little-endian machine"),
        ({PLAN: edited(weights={})}, "plan.json is not what was saved"),
        ({PLAN: None}, "taken away"),
        ({"archive/extra/more": b"1"}, "entries were added"),
        ({"archive/data/weights/weight_0": b""}, "weight_0 is not what was saved"),
    ],
)
def test_a_file_that_was_tampered_with(path: Path, change: dict[str, Any], told: str) -> None:
    with pytest.raises(LoadError, match=told):
        chanopt.load(rewritten(path, change))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({PLAN: b"nothing"}, "expected the JSON of a chanopt plan, found something else"),
        ({PLAN: edited(program=["program"])}, "found one that was changed: ParseError"),
        ({PLAN: edited(weights={})}, "found one that was changed: KeyError"),
        ({PLAN: edited(report={})}, "expected the JSON of a chanopt report"),
        ({"archive/data/weights/weight_0": b"1234"}, "expected .* bytes in data/weights/weight_0, found 4"),
    ],
)
def test_a_file_that_was_tampered_with_and_signed(path: Path, change: dict[str, Any], told: str) -> None:
    with pytest.raises(LoadError, match=told):
        chanopt.load(rewritten(path, change, sign=True))


@pytest.mark.parametrize(
    ("field", "value"),
    [("shape", [1 << 40]), ("stride", [-1, 1, 1, 1]), ("offset", -8), ("dtype", "load"), ("entry", "nowhere")],
)
def test_descriptions_of_tensors_that_lie(path: Path, field: str, value: Any) -> None:
    def change(data: bytes) -> bytes:
        manifest = json.loads(data)
        name = min(name for name, row in manifest["tensors"].items() if len(row["shape"]) == 4)
        manifest["tensors"][name][field] = value
        return json.dumps(manifest).encode()

    with pytest.raises(LoadError):
        chanopt.load(rewritten(path, {MANIFEST: change}))
