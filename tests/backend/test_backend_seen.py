"""Seeing what happens: the log, the dump of the IR, the registration of the backend."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import chanopt
from chanopt.errors import ChanoptError, OptionError
from chanopt.pass_infra import DUMP_VARIABLE, dumping
from chanopt.passes import DEFAULT, DropDead, Pipeline
from tests.backend.small import EAGER, Branches, Broken, compiled, images, macs, masked

ROOT = Path(__file__).resolve().parents[2]

_SCRIPT = """
import sys
import torch
from torch import nn
{imports}
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
with torch.no_grad():
    model[2].weight[:, 4:] = 0
    x = torch.randn(2, 3, 8, 8)
    fast = torch.compile(model, backend="chanopt", options={{"compiler": "eager"}})
    assert torch.allclose(model(x), fast(x), atol=1e-5)
import chanopt
report = chanopt.explain(fast)
print("MACS", report.macs_before, report.macs_after)
"""


def _run(imports: str, path: list[Path], **environment: str) -> subprocess.CompletedProcess[str]:
    plain = {name: value for name, value in os.environ.items() if name not in ("TORCH_LOGS", DUMP_VARIABLE)}
    variables = {**plain, **environment, "PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _SCRIPT.format(imports=imports)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_a_source_tree_registers_on_import_and_torch_logs_shows_the_passes(tmp_path: Path) -> None:
    done = _run("import chanopt.backend", [ROOT / "src"], TORCH_LOGS="+chanopt", CHANOPT_DUMP_IR=str(tmp_path))
    assert "MACS 17856 8928" in done.stdout
    assert "drop_dead: {" in done.stderr
    assert "graph 0/0: 17856 -> 8928 multiply-accumulates; capture" in done.stderr
    assert len(list(tmp_path.glob("*_drop_dead_after.txt"))) == 1


@pytest.mark.slow
def test_an_installed_package_is_found_by_its_entry_point_and_is_silent(tmp_path: Path) -> None:
    metadata = tmp_path / "chanopt-0.0.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: chanopt\nVersion: 0.0.0\n")
    (metadata / "entry_points.txt").write_text("[torch_dynamo_backends]\nchanopt = chanopt.backend:backend\n")
    done = _run("assert 'chanopt.backend' not in sys.modules", [tmp_path, ROOT / "src"])
    assert "MACS 17856 8928" in done.stdout
    assert "chanopt" not in done.stderr


def test_the_log_tells_what_every_pass_did_and_how_long_it_took(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="chanopt"), torch.no_grad():
        fast = compiled(masked())
        fast(images())
        masked_again = compiled(masked().train())
        with pytest.warns(UserWarning, match="train mode"):
            masked_again(images())
    text = caplog.text
    for step in DEFAULT:
        assert f"{step.name}: " in text
    assert "multiply-accumulates; capture" in text
    assert "as it is: norm is in train mode" in text
    seconds = chanopt.explain(fast).seconds
    assert set(seconds) == {"capture", "optimize", *(step.name for step in DEFAULT)}
    assert all(spent >= 0 for spent in seconds.values())


def test_explain_before_the_first_call_says_to_call() -> None:
    fast = compiled(masked())
    with pytest.raises(ChanoptError, match="call it once, in eval mode"):
        chanopt.explain(fast)


def test_explain_of_what_was_compiled_by_others_says_so() -> None:
    with torch.no_grad():
        fast = torch.compile(masked(), backend="eager")
        fast(images())
    with pytest.raises(ChanoptError, match="compiled with backend='chanopt'"):
        chanopt.explain(fast)
    with pytest.raises(ChanoptError, match="a module made by chanopt.optimize"):
        chanopt.explain(nn.ReLU())
    with pytest.raises(ChanoptError, match="a module made by chanopt.optimize"):
        chanopt.explain(lambda x: x)


def test_reports_of_several_graphs_add_up_and_are_written() -> None:
    fast = compiled(masked(Broken))
    with torch.no_grad():
        fast(images(2))
    both = chanopt.explain(fast)
    first, second = both  # type: ignore[misc]
    assert both.macs_before == first.macs_before + second.macs_before
    assert len(both.segments) == len(first.segments) + len(second.segments)
    again = chanopt.Report.from_json(both.to_json())
    assert (again.model, again.macs_after, again.layers) == ("2 graphs", both.macs_after, both.layers)
    assert len(both) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize(("make", "parts"), [(Branches, 1), (Broken, 2)])
def test_what_was_compiled_anew_counts_once(make: type[nn.Module], parts: int) -> None:
    fast = compiled(masked(make))
    with torch.no_grad():
        fast(images(2))
        alone = chanopt.explain(fast)
        fast(images(5))
    report = chanopt.explain(fast)
    assert len(list(report)) == len(list(alone)) == parts  # type: ignore[call-overload]
    assert (report.parameters_before, report.parameters_after) == (alone.parameters_before, alone.parameters_after)


def test_a_single_graph_is_iterated_too() -> None:
    fast = compiled(masked())
    with torch.no_grad():
        fast(images())
    report = chanopt.explain(fast)
    (part,) = report  # type: ignore[misc]
    assert (part.model, part.macs_after, str(part)) == (report.model, report.macs_after, str(report))


def test_each_call_of_torch_compile_has_reports_of_its_own() -> None:
    model = masked()
    fast, plain, elsewhere = compiled(model), compiled(model, pipeline=()), torch.compile(model, backend="eager")
    same = compiled(model)

    @torch.compile(backend="chanopt", options=EAGER)
    def function(x: Tensor) -> Tensor:
        return model(x) * 2

    with torch.no_grad():
        for each in (fast, plain, elsewhere, function, same):
            each(images())
    before = chanopt.explain(fast).macs_before
    assert macs(plain) == (before, before)
    for each in (fast, function, same):  # the last shares with the first what Dynamo compiled
        assert macs(each)[0] == before
        assert macs(each)[1] < before
    with pytest.raises(ChanoptError, match="compiled with backend='chanopt'"):
        chanopt.explain(elsewhere)


def test_bound_methods_of_two_objects_keep_apart() -> None:
    class Runner:
        def __init__(self) -> None:
            self.net = masked()

        def run(self, x: Tensor) -> Tensor:
            return self.net(x)

    first, second = Runner(), Runner()
    with torch.no_grad():
        second.net.left.weight.fill_(1.0)  # type: ignore[operator,union-attr]
        fast, slow = compiled(first.run), compiled(second.run)
        for each in (fast, slow):
            each(images())
    assert macs(fast)[0] == macs(slow)[0]
    assert macs(fast)[1] < macs(slow)[1]


def test_where_pytorch_makes_no_graph_the_message_says_what_to_do() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1)).eval()
    model.compile(backend="chanopt", options=EAGER)
    with torch.no_grad():
        model(images())
    with pytest.raises(ChanoptError, match=r"no graph of Sequential.compile\(\): use torch.compile\(module\)"):
        chanopt.explain(model)


def test_no_line_of_chanopts_own_is_taken_for_the_users(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    with torch.no_grad():
        compiled(model, dump_ir=tmp_path)(images())
    texts = [path.read_text() for path in tmp_path.iterdir()]
    assert texts
    assert not [text for text in texts if "reattach" in text]


def test_what_was_done_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="chanopt"), torch.no_grad():
        compiled(masked())(images())
        lines = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
        assert [line.startswith("graph 0/0: ") and "multiply-accumulates" in line for line in lines] == [True]
        caplog.clear()
        chanopt.optimize(masked(), (images(),))
        (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert re.match(r"Branches: \d+ -> \d+ multiply-accumulates; capture \d+\.\d\d s, ", line)


def test_every_pass_is_written_before_and_after(tmp_path: Path) -> None:
    program = chanopt.lower(masked(), (images(),))
    with dumping(tmp_path / "new" / "folder"):
        result = Pipeline(DEFAULT)(program)
    files = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    expected = [f"{n:04d}_{step.name}_{when}.txt" for n, step in enumerate(DEFAULT) for when in ("after", "before")]
    assert files == expected
    texts = [(tmp_path / "new" / "folder" / name).read_text() for name in files]
    assert chanopt.parse(texts[1]) == chanopt.parse(str(program))
    assert chanopt.parse(texts[-2]) == chanopt.parse(str(result.program))
    assert texts[0] == texts[3]  # after the first is before the second
    with dumping(tmp_path / "new" / "folder"):
        DropDead()(program)
    assert (tmp_path / "new" / "folder" / f"{len(DEFAULT):04d}_drop_dead_before.txt").exists()


def test_nothing_is_written_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = chanopt.lower(masked(), (images(),))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(DUMP_VARIABLE, raising=False)
    with dumping(None):
        DropDead()(program)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv(DUMP_VARIABLE, str(tmp_path / "dump"))
    DropDead()(program)
    assert len(list((tmp_path / "dump").iterdir())) == 2


def test_where_nothing_can_be_written_is_said_in_our_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(DUMP_VARIABLE, str(tmp_path / "file" / "folder"))
    with pytest.raises(OptionError, match="expected CHANOPT_DUMP_IR to name a folder to write into, found"):
        chanopt.optimize(masked(), (images(),))


def test_the_option_dumps_one_compiled_function(tmp_path: Path) -> None:
    with torch.no_grad():
        compiled(masked(), dump_ir=tmp_path)(images())
        compiled(masked())(images(4))
    assert len(list(tmp_path.iterdir())) == 2 * len(DEFAULT)
