"""The pass contract: what a pass is, what it returns, and pipelines, which are passes (docs/writing_passes.md)."""

from __future__ import annotations

import logging
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from chanopt.analysis.figures import Figures, figures
from chanopt.errors import IRError, OptionError, PassError
from chanopt.ir import Program

_LOG = logging.getLogger(__name__)
_CHECKED: ContextVar[bool] = ContextVar("chanopt_checked", default=False)
_DUMPED: ContextVar[Path | None] = ContextVar("chanopt_dumped", default=None)

DUMP_VARIABLE = "CHANOPT_DUMP_IR"
"""The environment variable that names the folder for :func:`dumping`."""


@dataclass(frozen=True)
class Property:
    """Something that may hold for a program, and that passes require or guarantee.

    Attributes:
        name: what holds, as a phrase: "only demanded channels are live".
        broken: a function that says where it does not hold, or returns None.
        made_by: the pass that makes it hold, for messages.
    """

    name: str
    broken: Callable[[Program], str | None] = field(compare=False)
    made_by: str = ""


@dataclass(frozen=True)
class PassResult:
    """What a pass did.

    Attributes:
        program: the program after the pass; the same object if nothing changed.
        modified: whether anything changed.
        seconds: how long the pass took, per pass name.
        notes: what the pass wants to tell besides, by name (solutions of segments, reasons, ...).
        before: the program that the pass was given; set by calling it.
    """

    program: Program
    modified: bool
    seconds: Mapping[str, float] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    before: Program | None = field(default=None, repr=False)

    @cached_property
    def figures(self) -> Mapping[str, tuple[int, int]]:
        """What changed, as ``{name: (before, after)}``; counted when first asked for."""
        if self.before is None or not self.modified:
            return {}
        return _changes(figures(self.before), figures(self.program))


class Pass(ABC):
    """A rewrite of a program. Subclasses are frozen dataclasses whose fields are their options.

    Override :meth:`apply`; call the pass to run it with its contract checked.
    """

    name: ClassVar[str]
    requires: ClassVar[tuple[Property, ...]] = ()
    ensures: ClassVar[tuple[Property, ...]] = ()

    @abstractmethod
    def apply(self, program: Program) -> Program | PassResult:
        """The rewritten program, or the very same object if there is nothing to do."""

    def __call__(self, program: Program) -> PassResult:
        """Check what the pass requires, run it, and time it.

        Raises:
            PassError: a requirement does not hold; in checked mode also a guarantee, or a rule of the IR.
        """
        for needed in self.requires:
            self._demand(needed, program, "required that")
        number = self._dump(program, "before")
        started = time.perf_counter()
        applied = self.apply(program)
        seconds = time.perf_counter() - started
        result = applied if isinstance(applied, PassResult) else PassResult(applied, applied is not program)
        self._dump(result.program, "after", number)
        if _CHECKED.get():
            self._check(result.program)
        result = replace(result, seconds=result.seconds or {self.name: seconds}, before=program)
        if _LOG.isEnabledFor(logging.DEBUG):
            _LOG.debug("%s: %s in %.3f s", self.name, result.figures or "nothing", seconds)
        return result

    def _dump(self, program: Program, when: str, number: int | None = None) -> int | None:
        """Write a program where the user asked for it; pipelines leave that to their passes."""
        folder = _dump_folder()
        if folder is None or isinstance(self, Pipeline):
            return None
        return _write(folder, self.name, when, str(program), number)

    def _check(self, program: Program) -> None:
        try:
            program.verify()
        except IRError as error:
            raise PassError(f"pass {self.name} broke a rule of the IR: {error}") from error
        for promised in self.ensures:
            self._demand(promised, program, "guaranteed that")

    def _demand(self, wanted: Property, program: Program, verb: str) -> None:
        problem = wanted.broken(program)
        if problem is not None:
            remedy = f"; run {wanted.made_by} first" if wanted.made_by and verb.startswith("required") else ""
            raise PassError(f"pass {self.name} {verb} {wanted.name}, found {problem}{remedy}")


@dataclass(frozen=True)
class Pipeline(Pass):
    """Passes one after another; a pass itself.

    Attributes:
        passes: in order.
    """

    passes: tuple[Pass, ...]
    name: ClassVar[str] = "pipeline"

    def apply(self, program: Program) -> PassResult:
        """Run every pass on the result of the one before."""
        seconds: dict[str, float] = {}
        notes: dict[str, Any] = {}
        current = program
        for step in self.passes:
            result = step(current)
            current = result.program
            for name, spent in result.seconds.items():
                seconds[name] = seconds.get(name, 0.0) + spent
            notes.update(result.notes)
        return PassResult(current, current is not program, seconds, notes)


@contextmanager
def checked() -> Generator[None, None, None]:
    """Within this context every pass verifies the program it returns and all it guarantees (tests, debugging)."""
    token = _CHECKED.set(True)
    try:
        yield
    finally:
        _CHECKED.reset(token)


@contextmanager
def dumping(folder: str | Path | None) -> Generator[None, None, None]:
    """Within this context the program before and after every pass is written into a folder (docs/backend.md).

    The files are ``0000_drop_dead_before.txt``, ``0000_drop_dead_after.txt``, ``0001_...``, numbered on from those that
    are there; :func:`chanopt.parse` reads them.

    Args:
        folder: where to; made if it does not exist. None changes nothing: the environment variable
            ``CHANOPT_DUMP_IR`` may name one.

    Raises:
        OptionError: a program cannot be written there (when the pass is run).
    """
    token = _DUMPED.set(_DUMPED.get() if folder is None else Path(folder))
    try:
        yield
    finally:
        _DUMPED.reset(token)


def _dump_folder() -> Path | None:
    named = os.environ.get(DUMP_VARIABLE)
    return _DUMPED.get() or (Path(named) if named else None)


def _write(folder: Path, name: str, when: str, text: str, number: int | None) -> int:
    """Write one file, under the next free number if none is given; returns the number."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken = [int(path.name.partition("_")[0]) for path in folder.glob("[0-9]*_*.txt")]
        chosen = max(taken, default=-1) + 1 if number is None else number
        (folder / f"{chosen:04d}_{name}_{when}.txt").write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise OptionError(f"expected {DUMP_VARIABLE} to name a folder to write into, found {error}") from error
    return chosen


def _changes(before: Figures, after: Figures) -> dict[str, tuple[int, int]]:
    old, new = asdict(before), asdict(after)
    return {key: (old[key], new[key]) for key in old if old[key] != new[key]}
