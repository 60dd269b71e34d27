"""The command line: ``chanopt optimize``, ``chanopt explain``, ``chanopt demo`` and ``chanopt bench``.

Files are those of ``torch.export.save``; what ``chanopt optimize`` writes, :func:`chanopt.load` reads too. Exit codes:
0; 1 if outputs differ; 2 for anything the user can put right, told in one line.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree
from torch.utils._sympy.numbers import int_oo
from tqdm import tqdm

from chanopt import api, demo
from chanopt.errors import CaptureError, ChanoptError, LoadError, VerifyError
from chanopt.passes import DEFAULT, OrderChannels, Pass
from chanopt.report import Report
from chanopt.saving import Plan, attach, is_saved, read_report, save

_SAVE_ONE = "torch.export.save(torch.export.export(model.eval(), inputs), 'model.pt2') makes one"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: words after the program's name; by default those of the process.

    Returns:
        The exit code: 0, or 1 if outputs differ, or 2 after an error that is told in one line.

    Raises:
        ChanoptError: with ``-v``, instead of the line.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    args = argparse.Namespace(command="bench", verbose=False) if words[:1] == ["bench"] else parser().parse_args(words)
    try:
        if args.command == "bench":
            return _bench(words[1:])
        with _quiet(args.verbose):
            args.run(args)
    except (ChanoptError, OSError) as error:
        if args.verbose:
            raise
        print(f"chanopt {args.command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1 if isinstance(error, VerifyError) else 2
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    made = argparse.ArgumentParser(prog="chanopt", description="A compiler for channel-pruned networks.")
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("-v", "--verbose", action="store_true", help="log what happens; show tracebacks and warnings")
    reading = _reading()
    optimize = commands.add_parser(
        "optimize",
        parents=[common, reading],
        help="cut the dead channels out of an exported model",
        description="Cut the dead channels out of a masked model, and save the result.",
    )
    optimize.add_argument("output", type=Path, metavar="OUT.pt2", help="where the result goes")
    optimize.add_argument("--report", type=Path, dest="html", metavar="FILE", help="write the report as HTML")
    optimize.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare outputs in float64 before anything is written",
    )
    optimize.set_defaults(run=_optimize)
    explain = commands.add_parser(
        "explain",
        parents=[common, reading],
        help="say what optimising an exported model would do, and why",
        description="Say what optimising would do to a masked model, and why; or what it did, to one that it wrote.",
    )
    explain.add_argument("--html", type=Path, metavar="FILE", help="write the report as HTML")
    explain.set_defaults(run=_explain)
    shown = commands.add_parser(
        "demo",
        parents=[common],
        help="mask torchvision models, optimise them, compare and time them on this machine",
        description="Mask torchvision models by torch.nn.utils.prune; optimise, compare, time them.",
    )
    demo.add_arguments(shown)
    shown.set_defaults(run=demo.run)
    # Its words are those of `python -m benchmarks`, which parses them itself.
    commands.add_parser("bench", add_help=False, help="run the benchmarks of a source tree")
    return made


def _bench(words: Sequence[str]) -> int:
    """Run `python -m benchmarks` in the tree that this package was installed from; returns its exit code."""
    tree = Path(__file__).resolve().parents[2]
    if not (tree / "benchmarks" / "__main__.py").exists():
        raise ChanoptError(
            "expected a source tree with benchmarks/, found an installed wheel; clone the repository and run "
            "`make bench` there"
        )
    # Not in the tree's own folder: paths among the words are the caller's.
    search = os.pathsep.join(filter(None, [str(tree), os.environ.get("PYTHONPATH")]))
    return subprocess.call([sys.executable, "-m", "benchmarks", *words], env={**os.environ, "PYTHONPATH": search})


def _reading() -> argparse.ArgumentParser:
    """What the commands that read a file have in common."""
    made = argparse.ArgumentParser(add_help=False)
    made.add_argument("input", type=Path, metavar="IN.pt2", help="a masked model saved by torch.export.save")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON")
    made.add_argument("--strict", action="store_true", help="refuse operators without a channel rule")
    made.add_argument(
        "--time-limit", type=_seconds, metavar="S", help="most seconds for the channel order of one segment"
    )
    return made


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"expected seconds of at least 0, found {text!r}")
    return value


@contextlib.contextmanager
def _quiet(verbose: bool) -> Generator[None]:
    """Keep torch's own warnings and log lines off the terminal; what matters to the user is in our errors."""
    if verbose:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
        yield
        return
    noisy = logging.getLogger("torch.export")
    level = noisy.level
    noisy.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        noisy.setLevel(level)


@contextlib.contextmanager
def _stages(count: int) -> Generator[Callable[[str], None]]:
    """A progress bar on a terminal: call what is given with the name of each stage when it begins."""
    with tqdm(total=count, bar_format="{desc} {bar} {n_fmt}/{total_fmt} {elapsed}", disable=None) as bar:

        def begin(name: str) -> None:
            bar.set_description_str(f"{name:10}")
            bar.update()

        yield begin


def _optimize(args: argparse.Namespace) -> None:
    error = None
    _require_means(args.html, args.output, args.json)
    with _stages(4 if args.verify else 3) as begin:
        begin("load")
        exported = load(args.input)
        begin("optimise")
        fast, report = optimized(exported, args.input.stem, strict=args.strict, time_limit=args.time_limit)
        if args.verify:
            begin("compare")
            error = api.verify(exported.module(check_guards=False), fast, *_examples(exported))
        begin("save")
        save(fast, args.output, exported=export_like(fast, exported))
    print(f"{report}\n")
    if error is not None:
        print(f"same outputs: relative error {error:.1e}, in float64, on the example and fresh inputs")
    print(f"wrote {args.output}")
    _write(report, args.html, args.json)


def _explain(args: argparse.Namespace) -> None:
    _require_means(args.html, args.json)
    if is_saved(args.input):
        report = read_report(args.input)
        print(report)
        _write(report, args.html, args.json)
        return
    with _stages(2) as begin:
        begin("load")
        exported = load(args.input)
        begin("optimise")
        _, report = optimized(exported, args.input.stem, strict=args.strict, time_limit=args.time_limit)
    print(report)
    _write(report, args.html, args.json)


def _require_means(html: Path | None, *others: Path | None) -> None:
    """Refuse before the work, not after it, what cannot be written."""
    if html is not None:
        demo.require_jinja2()
    for path in (html, *others):
        if path is not None and not path.parent.is_dir():
            raise ChanoptError(f"expected a folder {path.parent} for {path.name}, found none; make it first")


def _write(report: Report, html: Path | None, json: Path | None) -> None:
    if json is not None:
        json.write_text(report.to_json(), encoding="utf-8")
        print(f"wrote {json}")
    if html is not None:
        print(f"wrote {report.to_html(html)}")


def load(path: Path) -> ExportedProgram:
    """Read a file that ``torch.export.save`` wrote.

    Raises:
        LoadError: there is no such file, it is of another kind, or it holds no example inputs.
    """
    if not path.is_file():
        raise LoadError(f"expected a file saved by torch.export.save, found no file {path}")
    if not _is_archive(path):
        raise LoadError(f"expected a .pt2 file, found that {path} is none; {_SAVE_ONE}")
    try:
        exported = torch.export.load(path)
    except Exception as error:
        raise LoadError(
            f"expected torch {torch.__version__} to read {path}, found {type(error).__name__}: {error}; "
            "save it again with this version of torch"
        ) from error
    if exported.example_inputs is None and is_saved(path):
        raise LoadError(f"expected a masked model in {path}, found one that chanopt has optimised already")
    if exported.example_inputs is None:
        raise LoadError(f"expected example inputs in {path}, found none; {_SAVE_ONE}")
    return exported


def _is_archive(path: Path) -> bool:
    """Whether a file is a PT2 archive; torch.export.load would log a traceback for any other."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        names = {name.rpartition("/")[2] for name in archive.namelist()}
    return not names.isdisjoint({"archive_format", "serialized_exported_program.json"})


def optimized(
    exported: ExportedProgram, name: str, *, strict: bool = False, time_limit: float | None = None
) -> tuple[nn.Module, Report]:
    """Optimise an exported program on its own example inputs.

    Args:
        exported: the masked model.
        name: what the report calls it.
        strict: refuse operators without a channel rule.
        time_limit: seconds for the order of each segment; None leaves the default.

    Raises:
        ChanoptError: as :func:`chanopt.optimize`.
    """
    inputs, kwargs = _examples(exported)
    fast = api.optimize(exported, inputs, kwargs, pipeline=_pipeline(time_limit), strict=strict)
    report = replace(api.explain(fast), model=name)
    if isinstance(fast, fx.GraphModule):
        attach(fast, replace(Plan.of(fast), report=report))
    return fast, report


def _pipeline(time_limit: float | None) -> tuple[Pass, ...]:
    if time_limit is None:
        return DEFAULT
    return tuple(replace(step, time_limit=time_limit) if isinstance(step, OrderChannels) else step for step in DEFAULT)


def _examples(exported: ExportedProgram) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    assert exported.example_inputs is not None  # ``load`` refuses a file without
    inputs, kwargs = exported.example_inputs
    return tuple(inputs), kwargs


def export_like(fast: nn.Module, exported: ExportedProgram) -> ExportedProgram:
    """Export an optimised module with the sizes left open that its original left open.

    Raises:
        CaptureError: torch.export refuses; its first line says why.
    """
    inputs, kwargs = _examples(exported)
    shapes = ShapesCollection()
    for tensor, open_sizes in _open_sizes(exported):
        shapes[tensor] = open_sizes
    try:
        spec = shapes.dynamic_shapes(fast, inputs, dict(kwargs))
        return torch.export.export(fast, inputs, dict(kwargs), dynamic_shapes=spec)
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise CaptureError(
            f"expected torch.export to export the optimised model, found {type(error).__name__}: {first}; "
            "export the masked model with static sizes, or call chanopt.optimize on the module itself"
        ) from error


def _open_sizes(exported: ExportedProgram) -> Iterator[tuple[torch.Tensor, dict[int, Any]]]:
    """Every example input that has open sizes, with what torch.export takes for them."""
    named = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
    specs = [spec for spec in exported.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    for spec, example in zip(specs, pytree.tree_leaves(_examples(exported)), strict=True):
        if not isinstance(example, torch.Tensor):
            continue
        sizes = enumerate(named[spec.arg.name].meta["val"].shape)
        found = {axis: _dim(size, exported) for axis, size in sizes if isinstance(size, torch.SymInt)}
        if found:
            yield example, found


def _dim(size: torch.SymInt, exported: ExportedProgram) -> Any:
    """The named dimension of a size: one name for one symbol, so that equal sizes stay equal."""
    symbol = size.node.expr
    bounds = exported.range_constraints.get(symbol)
    if bounds is None:
        return Dim.DYNAMIC
    most = None if bounds.upper == int_oo else int(bounds.upper)
    return Dim(str(symbol), min=int(bounds.lower), max=most)
