"""Does removing constraints pay? Accuracy of small networks on scikit-learn's digits, against ratio and latency.

    python -m benchmarks.accuracy                           # three networks, five seeds
    python -m benchmarks.accuracy --nets resnet --seeds 2
    python -m benchmarks.accuracy --smoke                   # one network, one seed, few epochs

Every network is trained once a seed, and pruned from there (inputs of layers, by their L2 norm) in three scopes:

* `constrained`: all readers of a segment keep the same channels;
* `consecutive`: every reader keeps its own window of one shared order;
* `unconstrained`: every reader keeps its own best channels.

At equal ratio all three keep the same number of channels in every layer, that of the constrained scope, so that they
differ in nothing but which ones. (In a dense block that is not the ratio in every layer: the constrained scope drops
a share of a segment, of which each layer reads a part.) Accuracy is told right after pruning, and after a short
training with the masks held.

Three ways to train while pruning, of equally many epochs, at a few ratios: `one-shot` (prune, then train), `agp` (prune
more in every epoch, by the formula of Zhu and Gupta 2017), both constrained and by L2 norm, and `smcp` (soft masks by
the Taylor expansion, allocated by a latency table, so its ratio is one of time; see docs/smcp.md).

At equal latency: the accuracy that each arm would have at a share of the whole network's time, between its networks
that are a little slower and a little faster. (No ratio gives exactly that time: a conv's time goes in steps.)

All latencies are of what `chanopt.optimize` makes, the whole network too, in channels last: medians of shares within
rounds in which all arms are called in turn. All accuracies are of slim modules, whose outputs are compared with the
masked network's. Writes accuracy.json (one record a pruned network), accuracy.md and accuracy.svg to a folder.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import chanopt
from benchmarks import accuracy_page, digits, jobs, speed
from benchmarks.machine import machine
from benchmarks.measure import MAX_ERROR32
from chanopt import Mask
from chanopt.errors import AllocationError
from chanopt.pruning import apply, bake, prune, retained, smcp
from chanopt.pruning.distiller.agp import AgpPruningRate

SCOPES, METHODS = (accuracy_page.ARMS[part] for part in ("ratio", "method"))

_TUNING_RATE = 0.02  # a fifth of that of the first training
_MULTIPLE = 4  # of kept channels, in what SMCP chooses: its table is measured at multiples
_SOLVER_SECONDS = 0.5

Masks = Mapping[str, Mask]
Arm = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is done of everything.

    Attributes:
        epochs: of the first training.
        tuning: of the short training after pruning.
        longer: of the three ways to train while pruning.
        ratios: of the scopes.
        steps: ratios of the three ways to train.
        rounds: timed calls of each module, at least 2.
        batch: images in a timed call; so many that calling an operator costs little beside its work.
    """

    epochs: int = 6
    tuning: int = 2
    longer: int = 6
    ratios: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
    steps: tuple[float, ...] = (0.15, 0.3, 0.45, 0.6)
    rounds: int = 15
    batch: int = 128

    @property
    def ramp(self) -> int:
        """Epochs of the longer training in which the ratio grows, before the first with all of it."""
        return self.longer // 3

    @classmethod
    def of(cls, text: str) -> Plan:
        """Read what `json.dumps(asdict(plan))` writes."""
        read: dict[str, Any] = json.loads(text)
        for name in ("ratios", "steps"):
            read[name] = tuple(read[name])
        return cls(**read)


SMOKE = Plan(epochs=2, tuning=1, longer=3, ratios=(0.3, 0.6), steps=(0.3,), rounds=3, batch=64)


@dataclass(frozen=True, slots=True)
class Record:
    """One pruned network.

    Attributes:
        net, seed: which network.
        part: `dense` (not pruned), `ratio` (scopes) or `method` (ways to train).
        arm: a scope or a way; `dense`.
        amount: share of each segment's channels that goes; for SMCP, of the latency that its table tells.
        epochs: of training since the first one.
        accuracy: share of the test images that the slim module tells rightly.
        masked_accuracy: the same of the masked network.
        error: greatest difference of their outputs, relative to the greatest output.
        differing: images on which they disagree by more than that error explains.
        importance: share of the L2 norms of the whole network's weights that every layer keeps, summed over layers.
        gathers, copied_bytes: by plan; bytes for one image.
        macs: multiply-accumulates for one image.
        parameters: of the slim module.
        latency: quartiles of its time as a share of the whole network's, both made by chanopt; None if not timed.
        latency_ms: quartiles of its time for one image of the batch, in milliseconds.
        machine: where and with which versions.
    """

    net: str
    seed: int
    part: str
    arm: str
    amount: float
    epochs: int
    accuracy: float
    masked_accuracy: float
    error: float
    differing: int
    importance: float
    gathers: int
    copied_bytes: int
    macs: int
    parameters: int
    latency: tuple[float, float, float] | None
    latency_ms: tuple[float, float, float] | None
    machine: Mapping[str, str]

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> Record:
        """Read one back from JSON; what it does not know is left out."""
        known: dict[str, Any] = {field.name: line[field.name] for field in fields(cls)}
        for name in ("latency", "latency_ms"):
            known[name] = known[name] and tuple(known[name])
        return cls(**known)


class Subject:
    """A trained network, and all that is shared between the ways of pruning it."""

    def __init__(self, name: str, seed: int, plan: Plan) -> None:
        self.name, self.seed, self.plan = name, seed, plan
        self.on = where()
        self.net = digits.trained(name, seed, plan.epochs)
        # In NCHW a conv on 20 channels takes as long as one on 32, which no choice of channels changes.
        self.inputs = (digits.data().test[: plan.batch].contiguous(memory_format=torch.channels_last),)
        # Captured once; weights are loaded into what it was captured from.
        self._skeleton = cast(Any, copy.deepcopy(self.net)).to(memory_format=torch.channels_last)
        self._captured = chanopt.capture(self._skeleton, self.inputs)
        self.groups = smcp.discover_groups(self._captured)
        self.structure = self.groups.structure
        self.dense = self.slim(self.net)

    def slim(self, masked: nn.Module) -> nn.Module:
        """What `chanopt.optimize` makes of a network whose weights have the zeros of its masks."""
        self._skeleton.load_state_dict(masked.state_dict())
        # What nothing was cut from may be shared with the captured module, whose weights change with the next one.
        return copy.deepcopy(chanopt.optimize(self._captured))

    # -- masks --------------------------------------------------------------------------------------------------------

    def masks(self, scope: str, amount: float) -> Masks:
        """The masks of a scope, at as many channels in every layer as the constrained scope leaves it."""
        if scope != "unconstrained":
            return prune(self.net, self.inputs, amount, scope=scope, structure=self.structure)
        constrained = self.masks("constrained", amount)
        shares = {name: self._share(name, mask) for name, mask in constrained.items()}
        return prune(self.net, self.inputs, shares, scope=scope, structure=self.structure)

    def _share(self, layer: str, mask: Mask) -> float:
        """The share that drops as many inputs as a mask; one always stays."""
        assert mask.inputs is not None
        count = self.structure.layers[layer].in_channels
        return (min(count - len(set(mask.inputs)), count - 1) + 0.5) / count

    def masked(self, masks: Masks) -> nn.Module:
        """The network with masks written into its weights."""
        return apply(copy.deepcopy(self.net), masks)

    # -- training -----------------------------------------------------------------------------------------------------

    def tuned(self, masks: Masks, epochs: int) -> nn.Module:
        """The network, masked and trained with its masks held."""
        net = apply(copy.deepcopy(self.net), masks, "hard")
        return bake(digits.train(net, epochs, seed=self.seed, rate=_TUNING_RATE))

    def gradual(self, amount: float) -> tuple[nn.Module, Masks]:
        """Trained while more is pruned at the beginning of every epoch of the ramp: AGP."""
        net, rate = copy.deepcopy(self.net), AgpPruningRate(0.0, amount)
        span = self.plan.ramp + 1
        found: list[Masks] = []

        def more(epoch: int) -> None:
            if epoch < span:
                now = rate.step(epoch + 1, 0, span + 1, 1)
                found.append(prune(net, self.inputs, now, scope="constrained", structure=self.structure))
                apply(net, found[-1], "hard")

        digits.train(net, self.plan.longer, seed=self.seed, rate=_TUNING_RATE, at_epoch=more)
        return bake(net), found[-1]

    def soft(self, amount: float, cost: smcp.LatencyTable) -> tuple[nn.Module, Masks]:
        """Trained with soft masks that are chosen anew twice an epoch: SMCP."""
        net, longer, ramp = copy.deepcopy(self.net), self.plan.longer, self.plan.ramp
        every = max(1, digits.data().steps // 2)
        schedule = smcp.Schedule(amount, longer, warmup=0, ramp=ramp, cooldown=ramp, every=every)
        pruner = self._pruner(net, schedule, cost)

        def step() -> None:
            if not pruner.step():
                raise RuntimeError(f"expected finite gradients, found others; {self.name}, seed {self.seed}")

        at_epoch = pruner.start_epoch
        digits.train(net, longer, seed=self.seed, rate=_TUNING_RATE, at_epoch=at_epoch, at_step=step)
        masks = pruner.masks()
        return pruner.bake().eval(), masks

    def _pruner(self, net: nn.Module, schedule: smcp.Schedule, cost: smcp.LatencyTable) -> smcp.SoftMaskPruner:
        options = smcp.Options(multiple=_MULTIPLE)
        return smcp.SoftMaskPruner(
            net, self.inputs, schedule, cost=cost, options=options, time_limit=_SOLVER_SECONDS, groups=self.groups
        )

    # -- measuring ----------------------------------------------------------------------------------------------------

    def times(self, arms: Mapping[Arm, nn.Module]) -> dict[Arm, list[float]]:
        """Milliseconds of every module for one image of a batch, round by round, beside the whole network's."""
        named: dict[str, speed.Arm] = {" ".join(arm): module for arm, module in arms.items()}
        taken = speed.time_arms({"dense": self.dense, **named}, self.inputs, self.plan.rounds)
        each = {name: [one / self.plan.batch for one in times] for name, times in taken.items()}
        return {("dense",): each["dense"], **{arm: each[" ".join(arm)] for arm in arms}}

    def record(self, part: str, arm: str, masked: nn.Module, slim: nn.Module, masks: Masks, **known: Any) -> Record:
        """What a pruned network is, but for its latency."""
        expected, found = digits.outputs(masked), digits.outputs(slim)
        report = chanopt.explain(slim)
        given: dict[str, Any] = {"amount": 0.0, "epochs": 0, **known}
        return Record(
            net=self.name,
            seed=self.seed,
            part=part,
            arm=arm,
            accuracy=digits.accuracy(found),
            masked_accuracy=digits.accuracy(expected),
            error=_error(expected, found),
            differing=_differing(expected, found),
            importance=retained(self.net, self.structure, masks),
            gathers=report.gathers,
            copied_bytes=report.copied_bytes // self.plan.batch,
            macs=report.macs_after // self.plan.batch,
            parameters=report.parameters_after,
            latency=None,
            latency_ms=None,
            machine=self.on,
            **given,
        )


def where() -> dict[str, str]:
    """Where a record was made, and with which versions."""
    return machine() | {
        "scikit-learn": version("scikit-learn"),
        "chanopt": chanopt.__version__,
    }


def _error(expected: Tensor, found: Tensor) -> float:
    return float((expected - found).abs().max() / expected.abs().max())


def _differing(expected: Tensor, found: Tensor) -> int:
    """Images that are told otherwise, though the two best outputs are further apart than noise could bridge."""
    best = expected.topk(2, dim=1).values
    noise = 2 * MAX_ERROR32 * expected.abs().max()
    return int(((expected.argmax(1) != found.argmax(1)) & (best[:, 0] - best[:, 1] > noise)).sum())


# -- one network ------------------------------------------------------------------------------------------------------


def run(name: str, seed: int, plan: Plan) -> list[Record]:
    """All records of one network and seed.

    Raises:
        KeyError: there is no such network.
    """
    torch.set_num_threads(1)
    subject = Subject(name, seed, plan)
    layers, on = subject.structure.layers.values(), smcp.Machine(channels_last=True)
    with tempfile.TemporaryDirectory() as folder:
        cost = smcp.measure_latencies(
            layers, batch=plan.batch, machine=on, points=6, multiple=_MULTIPLE, cache=Path(folder)
        )
    made = _Made(subject)
    made.add("dense", "dense", subject.net, {})
    for scope, amount in itertools.product(SCOPES, plan.ratios):
        made.pruned(scope, amount)
    for amount in plan.steps:
        made.trained_while_pruned(amount, cost)
    return made.timed()


class _Made:
    """Records of one network, and the modules that are timed in the end, all side by side."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.records: list[tuple[Arm, Record]] = []
        self.modules: dict[Arm, nn.Module] = {}

    def pruned(self, scope: str, amount: float) -> None:
        """A scope's network right after pruning, and after the short training."""
        masks, epochs = self.subject.masks(scope, amount), self.subject.plan.tuning
        self.add("ratio", scope, self.subject.masked(masks), masks, amount=amount)
        self.add("ratio", scope, self.subject.tuned(masks, epochs), masks, amount=amount, epochs=epochs)

    def trained_while_pruned(self, amount: float, cost: smcp.LatencyTable) -> None:
        """The network pruned and trained in each of the ways."""
        subject, known = self.subject, {"amount": amount, "epochs": self.subject.plan.longer}
        masks = subject.masks("constrained", amount)
        self.add("method", "one-shot", subject.tuned(masks, subject.plan.longer), masks, **known)
        self.add("method", "agp", *subject.gradual(amount), **known)
        # SMCP cannot save more than its table tells of its cheapest choice.
        with contextlib.suppress(AllocationError):
            self.add("method", "smcp", *subject.soft(amount, cost), **known)

    def add(self, part: str, arm: str, masked: nn.Module, masks: Masks, **known: Any) -> None:
        """A network with zeros in its weights; one that has the same masks as another is timed once with it."""
        slim = self.subject.slim(masked)
        record = self.subject.record(part, arm, masked, slim, masks, **known)
        key = (part, arm, str(record.amount))
        self.modules.setdefault(key, slim)
        self.records.append((key, record))

    def timed(self) -> list[Record]:
        """The records with their latencies."""
        taken = self.subject.times(self.modules)
        return [
            replace(
                record,
                latency=_quartiles(speed.ratio(taken[key], taken[("dense",)])),
                latency_ms=_quartiles(speed.Spread.of(taken[key])),
            )
            for key, record in self.records
        ]


def _quartiles(spread: speed.Spread) -> tuple[float, float, float]:
    return spread.low, spread.median, spread.high


# -- the command ------------------------------------------------------------------------------------------------------


def differences(record: Record) -> str:
    """What is wrong with a record, in words; "" if nothing is. A low accuracy is not."""
    if not record.error <= MAX_ERROR32:
        return f"outputs differ by {record.error:.1e} from the masked network's, over {MAX_ERROR32:.0e}"
    if record.differing:
        return f"{record.differing} images are told otherwise than by the masked network"
    if record.arm == "consecutive" and record.gathers:
        return f"{record.gathers} gathers in the consecutive scope"
    return ""


def job(name: str, seed: int, plan: Plan) -> jobs.Job:
    """The process of one network and seed."""
    words = ("--nets", name, "--worker", str(seed), "--plan", json.dumps(asdict(plan)))
    return jobs.Job(f"{name}, seed {seed}, {plan}", ("benchmarks.accuracy", *words))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--nets", nargs="+", choices=digits.NETS, metavar="NAME", help=f"of {', '.join(digits.NETS)}")
    made.add_argument("--seeds", type=int, help="how many (default: 5)")
    made.add_argument("--smoke", action="store_true", help="one network, one seed, few epochs: does it run?")
    made.add_argument("--out", type=Path, default=jobs.RESULTS, metavar="FOLDER", help=f"default: {jobs.RESULTS}")
    made.add_argument("--resume", action="store_true", help="keep the networks that were finished")
    made.add_argument("--timeout", type=float, default=3600, metavar="SECONDS", help="for one network and seed")
    made.add_argument("--worker", type=int, metavar="SEED", help=argparse.SUPPRESS)
    made.add_argument("--plan", type=Plan.of, default=None, help=argparse.SUPPRESS)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 1 if a slim module is not its masked network or a process is lost, else 0."""
    args = parser().parse_args(arguments)
    plan = args.plan or (SMOKE if args.smoke else Plan())
    nets = args.nets or (["mobilenet"] if args.smoke else list(digits.NETS))
    if args.worker is not None:
        for record in run(nets[0], args.worker, plan):
            jobs.emit(asdict(record))
        return 0
    seeds = range((1 if args.smoke else 5) if args.seeds is None else args.seeds)
    todo = [job(name, seed, plan) for seed in seeds for name in nets]
    # One at a time: they are timed.
    path = args.out / "accuracy.jsonl"
    lines = jobs.run(todo, path, timeout=args.timeout, resume=args.resume, what="accuracy", others=False)
    return finish(lines, args.out)


def finish(lines: Sequence[jobs.Line], folder: Path) -> int:
    """Write the records, the tables and the plot, and print what is not right; returns the exit code."""
    records = [Record.of(line) for line in lines if "net" in line]
    jobs.write(folder / "accuracy.json", [asdict(record) for record in records])
    wrong = [(record, told) for record in records if (told := differences(record))]
    said = [f"{r.net}, seed {r.seed}, {r.part}, {r.arm}, {r.amount}, {r.epochs} epochs: {told}" for r, told in wrong]
    lost = [f"{line['job']}: {line['exception']}" for line in lines if "net" not in line]
    if records:
        (folder / "accuracy.md").write_text(accuracy_page.markdown(records, [*said, *lost]))
        accuracy_page.plot(records, folder / "accuracy.svg")
    print("\n".join([*said, *lost, f"{len(records)} records, {len(wrong)} to look at, {len(lost)} lost; {folder}"]))
    return 1 if wrong or lost else 0


if __name__ == "__main__":
    sys.exit(main())
