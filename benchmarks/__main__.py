"""`python -m benchmarks`: where chanopt stands against what a user could pick instead.

python -m benchmarks                 # everything that docs/results.md shows; less than an hour on two cores
python -m benchmarks --smoke         # a cut of every part, within three minutes
python -m benchmarks COMMAND ...     # one part; --help tells its arguments
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

COMMANDS = {
    "all": "everything, then the page and docs/results.md (the default)",
    "run": "models x masks x arms: latency, memory, copies, multiplications",
    "survey": "the survey of UPSCALE's exporter again, with chanopt beside it",
    "solver": "orders of channels: our optimum, the greedy order, the natural one",
    "scale": "time and memory of compiling, against depth and width",
    "backend": "the torch.compile backend: outputs, graphs, speed under Inductor",
    "gate": "counts of the zoo against the committed ones",
    "docs": "write docs/results.md from the committed JSON",
    "page": "write one HTML page with plots from the committed JSON",
}
_OTHERS = {"sweep": "benchmarks.sweep", "speed": "benchmarks.speed", "accuracy": "benchmarks.accuracy"}
"""Commands with a grammar of their own."""


INTERRUPTED = 130
"""The exit code after Ctrl-C, as shells have it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        return _main(arguments)
    except KeyboardInterrupt as told:  # `benchmarks.jobs.Interrupted` says what is kept
        print(f"interrupted: {told}" if str(told) else "interrupted", file=sys.stderr)
        return INTERRUPTED


def _main(arguments: Sequence[str] | None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] in _OTHERS:
        return importlib.import_module(_OTHERS[words[0]]).main(words[1:])
    if words and words[0] in ("-h", "--help"):
        print(_help())
        return 0
    name = "all"
    if words and not words[0].startswith("-"):
        name, *words = words
    if name not in COMMANDS:
        raise SystemExit(f"expected a command, found {name!r}; there are: {', '.join({**COMMANDS, **_OTHERS})}")
    module = importlib.import_module("benchmarks.everything" if name == "all" else f"benchmarks.{name}")
    made = parser(name, module)
    args = made.parse_args(words)
    written = () if getattr(args, "worker", None) else ("out", "page")
    for option in written:
        path = getattr(args, option, None)
        if path is not None and (told := _unwritable(path)):
            made.error(f"argument --{option}: {told}")
    from benchmarks.cases import CaseError
    from benchmarks.jobs import UnreadableError

    try:
        return module.main(args)
    except (CaseError, UnreadableError) as error:
        made.error(str(error))


def parser(name: str, module: ModuleType) -> argparse.ArgumentParser:
    """The command line of one command."""
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(made)
    _common(made, getattr(module, "OUT", None))
    return made


def _help() -> str:
    others = {name: f"see python -m benchmarks {name} --help" for name in _OTHERS}
    return f"{__doc__}\n" + "\n".join(f"    {name:8} {told}" for name, told in {**COMMANDS, **others}.items())


def _unwritable(path: Path) -> str:
    """Why a file cannot be written, found out before anything is measured; makes its folder."""
    if path.is_dir() or path.suffix in ("", ".csv", ".jsonl"):
        return f"expected the name of a file that is neither .csv nor .jsonl (those stand beside it), found {path}"
    beside = [path.with_suffix(".jsonl"), path.with_suffix(".csv")]
    if folders := [str(file) for file in beside if file.is_dir()]:
        return f"expected to write files beside it, found a folder: {', '.join(folders)}"
    there = path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a"):
            pass
    except OSError as error:
        return str(error)
    if not there:
        path.unlink()
    return ""


def _common(sub: argparse.ArgumentParser, out: Path | None) -> None:
    from benchmarks import cases  # here, as the commands are: the list of them needs no torch

    sub.add_argument("--out", type=Path, default=out, help=f"default: {out}")
    sub.add_argument(
        "--jobs", type=cases.at_least(1), default=2, help="processes at a time, for what is not timed (default: 2)"
    )
    sub.add_argument("--timeout", type=cases.seconds, default=3600, metavar="SECONDS", help="for one process")
    sub.add_argument("--resume", action="store_true", help="keep what was measured without a crash")


if __name__ == "__main__":
    sys.exit(main())
