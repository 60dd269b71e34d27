"""One of Dynamo's graphs without its dead channels, and what is done when its weights change."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import tracing
from torch.export import ExportedProgram, export

from chanopt.api import Captured, capture, explain, optimize
from chanopt.backend.guard import Watch
from chanopt.backend.inductor import Compiled, compile_slim, device_of, release
from chanopt.backend.options import Check, Options
from chanopt.backend.reattach import Fragment, drop_own_lines, number_of, owned, reattach
from chanopt.errors import CaptureError, ChanoptError
from chanopt.frontend.compiled import Made, caller, entered, frame
from chanopt.pass_infra import dumping
from chanopt.report import Report
from chanopt.report.graphs import figures

_LOG = logging.getLogger(__name__)
Numbers = tuple[int | float, ...]
Key = tuple[int, ...]

_COUNTER = itertools.count()
_UNUSED = 8
"""Builds that may go, with their weights, without having served a second call, until new weights count as changed."""
_REMEMBERED = 64
"""Weights whose memory was replaced that are remembered, so that new memory counts as a change."""


@dataclass(frozen=True, slots=True)
class _Captured:
    """A graph in the normal form.

    Attributes:
        captured: the graph; between builds its weights have no values.
        user: which of Dynamo's inputs it takes.
        names: the names of its weights, in the order of Dynamo's inputs.
        baked: which inputs are numbers that were written into it.
        numbers: their values.
        seconds: how long that took.
    """

    captured: Captured
    user: tuple[int, ...]
    names: tuple[str, ...]
    baked: tuple[int, ...]
    numbers: Numbers
    seconds: float


@dataclass(frozen=True, slots=True)
class _Build:
    """What was made of a graph for one state of its weights.

    Attributes:
        watch: the weights it holds for.
        numbers: the numbers it holds for.
        run: takes the tensors that are not weights; None where Dynamo's graph is run as it is.
        fits: what must hold for these tensors, if anything.
        module: the slim graph.
        report: what was done.
        owner: the call of torch.compile on whose behalf.
        code: what it was called for.
        order: builds are numbered as they are made.
    """

    watch: Watch
    numbers: Numbers
    run: Compiled | None = None
    fits: Callable[..., bool] | None = None
    module: fx.GraphModule | None = None
    report: Report | None = None
    owner: Any = None
    code: Any = None
    order: int = 0


class SlimGraph:
    """A graph of Dynamo's, optimised for the weights it is called with, for as long as they stay what they are.

    Dynamo runs one graph for all modules of a class, so there is a build for each; the weights tell them apart.
    The call after a change of weights is answered by Dynamo's graph as it is, with the weights of that moment. As soon
    as two calls in a row have seen the same weights, the passes are run again: a loop that changes weights at every
    call is not slowed down by passes whose result would serve once.
    """

    def __init__(self, name: str, graph: fx.GraphModule, examples: Sequence[Any], options: Options) -> None:
        self.name = name
        self.number = next(_COUNTER)
        self.frame = frame()
        self._graph = graph
        self._whole: Compiled = graph.forward
        self._options = options
        self._device = device_of(examples)
        self._check: Check = options.checked(self._device)
        self._traced = [node.meta.get("example_value") for node in graph.graph.nodes if node.op == "placeholder"]
        self._owned = owned(graph)
        on = torch.is_autocast_enabled(self._device)
        self._autocast = (self._device, torch.get_autocast_dtype(self._device)) if on else None
        self._lock = threading.RLock()
        self._captured: _Captured | None = None
        self._builds: dict[Key, _Build] = {}
        self._pending: dict[Key, tuple[Watch, Numbers]] = {}
        self._replaced: set[Key] = set()
        self._unused = 0
        self._released = False

    def made(self) -> list[Made]:
        """What was done for every set of weights that the graph is optimised for."""
        builds = list(self._builds.values())
        return [Made(b.owner, b.code, b.watch.ids, b.order, b.report) for b in builds if b.report is not None]

    def modules(self) -> list[fx.GraphModule]:
        """The slim graphs, as modules of ATen ops."""
        return [build.module for build in list(self._builds.values()) if build.module is not None]

    def run_otherwise(self, whole: Compiled) -> None:
        """Set what runs the graph as it is, in place of Dynamo's own."""
        self._whole = whole

    def __call__(self, *inputs: Any) -> Any:
        """Run the graph on Dynamo's inputs: the weights as they are now, and the user's tensors."""
        if not self._released:  # while Dynamo compiles, it needs to know its tensors
            release(self._traced)
            self._released = True
        build = self._builds.get(self._key(inputs))
        if build is None or not self._holds(build.watch, build.numbers, inputs):
            build = self._renewed(inputs)
        else:
            self._unused = 0
        if build is None or build.run is None or self._captured is None:
            return self._whole(*inputs)
        given = [inputs[position] for position in self._captured.user]
        if build.fits is not None and not build.fits(*given):
            return self._whole(*inputs)
        if self._autocast is None:
            return build.run(*given)
        with torch.autocast(self._device, enabled=False):  # it is written into the slim graph
            return build.run(*given)

    def build(self, inputs: Sequence[Any]) -> None:
        """Run the passes for the weights and numbers among the inputs.

        Raises:
            ChanoptError: the graph cannot be captured or lowered; it runs as it is until its weights change.
        """
        key = self._key(inputs)
        watch = self._watch(inputs)
        self._builds.pop(key, None)
        self._replaced.discard(key)
        build: _Build | None = None
        try:
            with self._lock, _plain(self._device), dumping(self._options.dump_ir):
                build = self._built(watch, inputs)
        finally:
            self._builds[key] = build or _Build(watch, self._numbers(inputs))
        report = None if build is None else build.report
        _LOG.info("%s: %s", self.name, "runs as it is" if report is None else figures(report))

    def drop(self, key: Key) -> None:
        """Forget what was made for weights whose memory is gone; the weights themselves may have been given other."""
        self._pending.pop(key, None)
        if self._builds.pop(key, None) is None:
            return
        self._unused += 1
        if len(self._replaced) < _REMEMBERED:
            self._replaced.add(key)

    def _built(self, watch: Watch, inputs: Sequence[Any]) -> _Build:
        again = self._captured
        made = self._capture(inputs)
        options = self._options
        try:
            module = optimize(made.captured, target=options.aim(), pipeline=options.pipeline, strict=options.strict)
        finally:  # whoever holds the memory of a weight does not learn that it is gone
            _put(made.captured.graph, made.names, [weight.detach().to("meta") for weight in self._weights(inputs)])
        assert isinstance(module, fx.GraphModule)
        module.requires_grad_(False)
        report = explain(module)
        report = replace(report, seconds={**report.seconds, "capture": 0.0 if made is again else made.seconds})
        order = next(_COUNTER)
        if options.compiler == "eager":
            return _Build(watch, made.numbers, module, None, module, report, caller(), entered(), order)
        started = time.perf_counter()
        given = [self._traced[position] for position in made.user]
        run, fits = compile_slim(module, given, self._traced, options.patches(self._device, _is_double(module, given)))
        report = replace(report, seconds={**report.seconds, "inductor": time.perf_counter() - started})
        return _Build(watch, made.numbers, run, fits, module, report, caller(), entered(), order)

    def _capture(self, inputs: Sequence[Any]) -> _Captured:
        """The graph in the normal form, with the weights and numbers of now."""
        kept = self._captured
        if kept is not None and kept.numbers == self._numbers(inputs):
            _put(kept.captured.graph, kept.names, self._weights(inputs))
            return kept
        started = time.perf_counter()
        fragment = reattach(self._graph, inputs, self._autocast)
        captured = replace(capture(_exported(fragment), fragment.examples), name=self.name)
        drop_own_lines(captured.graph)
        release(node.meta.get("val") for node in captured.graph.graph.nodes)
        baked, numbers = zip(*fragment.numbers, strict=True) if fragment.numbers else ((), ())
        seconds = time.perf_counter() - started
        self._captured = _Captured(captured, fragment.user, fragment.names, baked, numbers, seconds)
        return self._captured

    def _renewed(self, inputs: Sequence[Any]) -> _Build | None:
        """A build for changed weights, or None to run Dynamo's graph as it is."""
        key = self._key(inputs)
        with self._lock:
            another = key not in self._builds and key not in self._replaced and self._unused < _UNUSED
            pending = self._pending.pop(key, None)
            if not another and (pending is None or not self._holds(*pending, inputs)):
                self._pending[key] = (self._watch(inputs), self._numbers(inputs))
                _LOG.info("%s: its weights have changed; it runs as it is until they stay the same", self.name)
                return None
            try:
                self.build(inputs)
            except Exception as error:  # noqa: BLE001  whatever fails so late, the graph as it is has the answer
                told = str(error) if isinstance(error, ChanoptError) else f"{type(error).__name__}: {error}"
                _LOG.warning("%s: runs as it is until its weights change: %s", self.name, told)
            return self._builds.get(key)

    def _holds(self, watch: Watch, numbers: Numbers, inputs: Sequence[Any]) -> bool:
        return numbers == self._numbers(inputs) and watch.holds(self._weights(inputs))

    def _watch(self, inputs: Sequence[Any]) -> Watch:
        gone = functools.partial(_drop, weakref.ref(self), self._key(inputs))
        return Watch(self._weights(inputs), self._check, gone)

    def _key(self, inputs: Sequence[Any]) -> Key:
        """The weights that a build is for: two modules may share some of them."""
        return tuple(map(id, self._weights(inputs)))

    def _weights(self, inputs: Sequence[Any]) -> list[Tensor]:
        return [inputs[position] for position in self._owned]

    def _numbers(self, inputs: Sequence[Any]) -> Numbers:
        """The values of the inputs that were written into the graph."""
        if self._captured is None:
            return ()
        return tuple(number_of(inputs[position]) for position in self._captured.baked)


def _drop(graph: weakref.ref[SlimGraph], key: Key) -> None:
    alive = graph()
    if alive is not None:
        alive.drop(key)


def _exported(fragment: Fragment) -> ExportedProgram:
    """Export a fragment with the sizes open that Dynamo left open.

    Raises:
        CaptureError: torch.export cannot capture it.
    """
    shapes = {"inputs": tuple(sizes or None for sizes in fragment.sizes)}
    try:
        return export(fragment.module, fragment.examples, dynamic_shapes=shapes, strict=False)
    # torch.export fails in many ways; each says "not like this".
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise CaptureError(
            f"expected torch.export to capture Dynamo's graph, found {type(error).__name__}: {first[:200]}"
        ) from error


def _put(graph: fx.GraphModule, names: Sequence[str], weights: Sequence[Tensor]) -> None:
    """Replace the weights of a captured graph by those of now; it may lack some that it does not need."""
    modules = dict(graph.named_modules())
    for name, weight in zip(names, weights, strict=True):
        path, _, leaf = name.rpartition(".")
        owner = modules.get(path)
        if owner is None or not hasattr(owner, leaf):
            continue
        delattr(owner, leaf)
        if isinstance(weight, torch.nn.Parameter):
            owner.register_parameter(leaf, weight)
        else:
            owner.register_buffer(leaf, weight)


@contextlib.contextmanager
def _plain(device: str) -> Generator[None]:
    """What a graph is captured and compiled under, whatever the user calls it under."""
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device, enabled=False),
        tracing(None),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def _is_double(module: fx.GraphModule, given: Sequence[Any]) -> bool:
    tensors = [*module.state_dict().values(), *(x for x in given if isinstance(x, Tensor))]
    return any(tensor.dtype in (torch.float64, torch.complex128) for tensor in tensors)
