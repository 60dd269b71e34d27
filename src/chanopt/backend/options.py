"""What can be said to ``torch.compile(model, backend="chanopt", options={...})``."""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from torch import _inductor as inductor  # pyright: ignore[reportPrivateUsage]

from chanopt.errors import OptionError
from chanopt.passes import DEFAULT, Pass
from chanopt.target import DEVICES, Target

Check = Literal["auto", "version", "sample", "all"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the backend. All have a default; a value that makes no sense is refused at the first call.

    Attributes:
        compiler: what runs the slim graph: "inductor" compiles it, "eager" calls its operators one by one.
        freezing: whether Inductor may treat the slim weights as constants; None means on a CPU, unless some are float64
            (Inductor cannot freeze convolutions of these).
        mode: a mode of Inductor's ("reduce-overhead", "max-autotune", ...); ``torch.compile(mode=...)`` is the same.
        inductor: options of Inductor's, as ``torch.compile(options=...)`` gives them to Inductor itself.
        target: the device that choices are made for, as for :func:`chanopt.optimize`; of a :class:`chanopt.Target` the
            compiler is the one above.
        pipeline: passes to run, as for :func:`chanopt.optimize`.
        strict: raise where a graph cannot be optimised or an operator has no channel rule, instead of a warning.
        check: how a weight that was changed is noticed at the next call. "version" compares objects, version
            counters and addresses: every change that PyTorch counts. What is written through ``p.data`` or NumPy it
            does not count: "all" compares all values besides, "sample" all of the small weights and, of each large
            one, at least one entry at every index of every axis. "auto" is "all" on a CPU and "version" elsewhere,
            where comparing values would wait for the device.
        dump_ir: a folder into which the program before and after every pass is written.
    """

    compiler: Literal["inductor", "eager"] = "inductor"
    freezing: bool | None = None
    mode: str | None = None
    inductor: Mapping[str, Any] = field(default_factory=dict)
    target: Target | Literal["auto", "cpu", "cuda"] = "auto"
    pipeline: Pass | Sequence[Pass] = DEFAULT
    strict: bool = False
    check: Check = "auto"
    dump_ir: str | Path | None = None

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise _wrong(name, " or ".join(map(repr, allowed)), getattr(self, name))
        for name, fits, words in _KINDS:
            if not fits(getattr(self, name)):
                raise _wrong(name, words, getattr(self, name))
        _require_known("a mode of Inductor's", [self.mode] if self.mode else [], inductor.list_mode_options())
        plain = [str(key).replace("-", "_") for key in self.inductor]
        _require_known("options of Inductor's", plain, inductor.list_options())

    def patches(self, device: str, double: bool = False) -> dict[str, Any]:
        """What to set in Inductor's configuration for a graph on a device ("cpu", "cuda").

        Args:
            device: the kind of device.
            double: whether anything in the graph is float64, of which Inductor cannot freeze convolutions.
        """
        freezing = device == "cpu" and not double if self.freezing is None else self.freezing
        named = {key.replace("-", "_"): value for key, value in self.inductor.items()}
        return {**(inductor.list_mode_options(self.mode) if self.mode else {}), "freezing": freezing, **named}

    def aim(self) -> Target:
        """What the passes choose for."""
        target = self.target if isinstance(self.target, Target) else Target(self.target)
        return replace(target, compiler=self.compiler)

    def checked(self, device: str) -> Check:
        """How values are watched on a device, "auto" resolved."""
        if self.check != "auto":
            return self.check
        return "all" if device == "cpu" else "version"

    def require_folder(self) -> None:
        """Make the folder for the IR.

        Raises:
            OptionError: it cannot be made, or nothing can be written into it.
        """
        if self.dump_ir is None:
            return
        try:
            Path(self.dump_ir).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.dump_ir):
                pass
        except OSError as error:
            raise OptionError(
                f"expected option 'dump_ir' of backend 'chanopt' to be a folder to write into, found "
                f"{str(self.dump_ir)!r} ({error.strerror or error})"
            ) from error


def parse(options: Mapping[str, Any] | None, mode: str | None = None) -> Options:
    """The options that ``torch.compile`` was called with.

    Raises:
        OptionError: an option that does not exist, or a value it cannot have.
    """
    given = dict(options or {})
    _require_known("options", list(given), [option.name for option in fields(Options)])
    if mode is not None:
        given["mode"] = mode
    return Options(**given)


_HINTS = get_type_hints(Options)
_CHOICES = {name: get_args(_HINTS[name]) for name in ("compiler", "check")}


def _is_pipeline(given: object) -> bool:
    steps = [given] if isinstance(given, Pass) else given
    return isinstance(steps, Sequence) and all(isinstance(step, Pass) for step in steps)


def _is_target(given: object) -> bool:
    return isinstance(given, Target) or (isinstance(given, str) and given in DEVICES)


_KINDS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("freezing", lambda given: given is None or isinstance(given, bool), "True, False or None"),
    ("strict", lambda given: isinstance(given, bool), "True or False"),
    ("mode", lambda given: given is None or isinstance(given, str), "the name of a mode or None"),
    ("inductor", lambda given: isinstance(given, Mapping), "a dict of Inductor's options"),
    ("pipeline", _is_pipeline, "a pass or a sequence of passes"),
    ("target", _is_target, "'auto', 'cpu', 'cuda' or a chanopt.Target"),
    ("dump_ir", lambda given: given is None or (isinstance(given, str | Path) and given != ""), "a folder or None"),
)


def _require_known(what: str, given: Sequence[str], valid: Sequence[str] | Mapping[str, Any]) -> None:
    unknown = [name for name in given if name not in valid]
    if not unknown:
        return
    near = difflib.get_close_matches(str(unknown[0]), list(valid), n=1)
    close = difflib.get_close_matches(str(unknown[0]), list(valid), 8, 0)
    listed = ", ".join(sorted(valid) if len(valid) < 40 else close)
    raise OptionError(
        f"expected {what}, found {', '.join(map(repr, unknown))}; "
        + (f"did you mean {near[0]!r}? " if near else "")
        + f"{'Valid' if len(valid) < 40 else 'The nearest'} are: {listed}"
    )


def _wrong(name: str, expected: str, found: Any) -> OptionError:
    return OptionError(f"expected option {name!r} of backend 'chanopt' to be {expected}, found {found!r}")
