"""Orders of channels: our optimum against the greedy order and the natural one, over sizes.

    python -m benchmarks solver                       # random families up to 4096 channels and 128 readers, the corpus
    python -m benchmarks solver --families concat --sizes 256x16
    python -m benchmarks solver --store               # write benchmarks/corpus anew: random instances, zoo segments

What is compared is the objective of the permutation program, the weight of the readers that gather (and of the
edges that are cut); in the family `touched`, the aligned blocks of 16 channels that readers touch. The greedy and the
natural order use one order for all values of an instance, as they do in UPSCALE; where they break a pin or a block
they are not counted (None).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import cases, jobs
from benchmarks.arms.greedy import greedy_order
from chanopt.solve import Block, Edge, Instance, Reader, Solution, solve
from chanopt.solve.solution import cost

OUT = jobs.MINE / "solver.json"
CORPUS = Path(__file__).resolve().parent / "corpus"
SIZES = ((64, 8), (256, 16), (512, 32), (1024, 64), (2048, 96), (4096, 128))
SEEDS = (0, 1, 2)

# Networks whose segments the corpus holds: residual, inverted residual, branching, gated, dense.
NETWORKS = ("resnet18", "resnet50", "mobilenet_v2", "googlenet", "efficientnet_b0", "densenet121")
STORED_SIZES = ((12, 5), (64, 8), (128, 12))

Random = np.random.Generator
Family = Callable[[Random, int, int], Instance]


def independent(random: Random, channels: int, readers: int) -> Instance:
    """Every reader keeps half of the channels, whatever the others keep."""
    sets = [_some(random, np.arange(channels), 0.5) for _ in range(readers)]
    return Instance(channels, _weighted(random, sets))


def correlated(random: Random, channels: int, readers: int) -> Instance:
    """All readers value the channels alike, up to noise, and keep the better half, or a little more or less."""
    common = random.normal(size=channels)
    sets: list[Iterable[int]] = []
    for _ in range(readers):
        kept = max(1, int(channels * random.uniform(0.4, 0.6)))
        sets.append(np.argsort(common + 0.1 * random.normal(size=channels))[:kept].tolist())
    return Instance(channels, _weighted(random, sets))


def nested(random: Random, channels: int, readers: int) -> Instance:
    """Four chains of sets, each within the one before."""
    sets: list[Iterable[int]] = []
    tops = [np.array(_some(random, np.arange(channels), 0.8)) for _ in range(4)]
    for number in range(readers):
        sets.append(tops[number % 4].tolist())
        tops[number % 4] = np.array(_some(random, tops[number % 4], 0.8))
    return Instance(channels, _weighted(random, sets))


def concat(random: Random, channels: int, readers: int) -> Instance:
    """A dense block: the channels of a growing concat; a reader takes half of each operand that exists yet."""
    blocks = np.array_split(np.arange(channels), max(2, readers // 2))
    sets = [
        [c for block in blocks[: 1 + number * len(blocks) // readers] for c in _some(random, block, 0.5)]
        for number in range(readers)
    ]
    return Instance(channels, _weighted(random, sets), blocks=tuple(Block(tuple(block.tolist())) for block in blocks))


def chain(random: Random, channels: int, readers: int) -> Instance:
    """A residual stage: values in a chain, two readers each; later values hold fewer channels."""
    values = max(2, readers // 2)
    live = np.arange(channels)
    sets: list[Reader] = []
    edges: list[Edge] = []
    for value in range(values):
        for number in range(2):
            taken = _some(random, live, 0.5)
            sets.append(Reader(f"reader {value}.{number}", tuple(taken), len(taken), value))
        edges += [Edge(f"edge {value}", value, value + 1, len(live))] if value + 1 < values else []
        live = np.array(_some(random, live, 0.95))
    return Instance(channels, tuple(sets[:readers]), edges=tuple(edges))


def dual_path(random: Random, channels: int, readers: int) -> Instance:
    """A stage of a dual path network: half of the channels are a residual, the others a growing concat.

    Seven values for every unit: what its conv makes, the two slices of it, the sum, the concat of the sum and all that
    was grown, and the two slices of that for the next unit. A reader takes half of a concat, and no value holds what
    nobody reads any more.
    """
    residual, *grown = np.split(np.arange(channels), np.linspace(channels // 2, channels, readers + 1, dtype=int)[:-1])
    sets = [_some(random, np.arange(part[-1] + 1), 0.5) for part in grown]
    blocks: list[Block] = []
    edges: list[Edge] = []
    heard: list[Reader] = []
    for unit, part in enumerate(grown):
        live = set().union(*sets[unit:])
        kept, new = ([c for c in found.tolist() if c in live] for found in (residual, part))
        before = [c for c in range(residual.size, part[0]) if c in live]
        made, left, right, added, joined, on, grew = (7 * unit + number for number in range(7))
        held = {
            left: [kept],
            right: [new],
            added: [kept],
            joined: [kept, before, new],
            on: [kept],
            grew: [before + new],
        }
        blocks += [Block(tuple(block), value) for value, found in held.items() for block in found if block]
        ends = [
            (made, left, kept),
            (made, right, new),
            (left, added, kept),
            (added, joined, kept),
            (right, joined, new),
        ]
        ends += [(joined, on, kept), (joined, grew, before + new)]
        ends += [(on - 7, added, kept), (grew - 7, joined, before)] if unit else []
        edges += [Edge(f"edge {start} {end}", start, end, len(moved)) for start, end, moved in ends]
        heard.append(Reader(f"reader {unit}", tuple(sets[unit]), len(sets[unit]), joined))
    return Instance(channels, tuple(heard), tuple(blocks), edges=tuple(edges))


def touched(random: Random, channels: int, readers: int) -> Instance:
    """Every reader keeps half of the channels and pays 1 for every aligned block of 16 that it touches."""
    sets = [_some(random, np.arange(channels), 0.5) for _ in range(readers)]
    return Instance(channels, tuple(Reader(f"reader {n}", tuple(s), 1, grain=16) for n, s in enumerate(sets)))


FAMILIES: Mapping[str, Family] = {f.__name__: f for f in (independent, correlated, nested, concat, chain, dual_path)}
GRAINED: Mapping[str, Family] = {"touched": touched}
"""Families of which no instance of many readers is proven: they are not in the corpus."""


def make(family: str, channels: int, readers: int, seed: int) -> Instance:
    """An instance of a family; the same arguments give the same one.

    Raises:
        KeyError: there is no such family.
    """
    return {**FAMILIES, **GRAINED}[family](np.random.default_rng([seed, channels, readers]), channels, readers)


def _some(random: Random, among: Any, share: float) -> list[int]:
    count = max(1, int(share * len(among)))
    return sorted(int(channel) for channel in random.choice(among, count, replace=False))


def _weighted(random: Random, sets: Sequence[Iterable[int]]) -> tuple[Reader, ...]:
    """Readers that pay for each of their channels the area of the layer: 1, 4 or 16 units."""
    areas = random.choice([1, 4, 16], len(sets))
    made = zip(sets, areas, strict=True)
    return tuple(Reader(f"reader {n}", tuple(s), len(tuple(s)) * int(area)) for n, (s, area) in enumerate(made))


@dataclass(frozen=True, slots=True)
class Comparison:
    """One instance, ordered in three ways.

    Attributes:
        channels, readers: its size.
        everything: what it pays if every reader gathers, or touches every block that it may.
        floor: what its readers pay at least, each for itself: the blocks that its channels fill.
        objective, bound, optimal, seconds: ours.
        greedy, greedy_seconds, natural: the others; None for an order that breaks a pin or a block.
    """

    channels: int
    readers: int
    everything: float
    floor: float
    objective: float
    bound: float
    optimal: bool
    seconds: float
    greedy: float | None
    greedy_seconds: float
    natural: float | None

    @property
    def gap(self) -> float:
        """How far the objective may be from the least, as a share of it."""
        return (self.objective - self.bound) / self.objective if self.objective else 0.0

    @property
    def over_floor(self) -> float | None:
        """The objective as a multiple of the floor; None if there is none."""
        return self.objective / self.floor if self.floor else None


def compare(instance: Instance, time_limit: float) -> Comparison:
    """Order an instance in three ways."""
    solution: Solution = solve(instance, time_limit=time_limit)
    solution.check(instance)
    started = time.perf_counter()
    greedy = greedily(instance)
    seconds = time.perf_counter() - started
    return Comparison(
        instance.channels,
        len(instance.readers),
        sum(reader.weight * _blocks(instance, reader) for reader in instance.readers),
        sum(reader.weight * -(-len(reader.set) // reader.grain) for reader in instance.readers if reader.grain),
        solution.objective,
        solution.bound,
        solution.optimal,
        solution.seconds,
        paid(instance, greedy),
        seconds,
        paid(instance, tuple(range(instance.channels))),
    )


def _blocks(instance: Instance, reader: Reader) -> int:
    return min(len(reader.set), -(-instance.channels // reader.grain)) if reader.grain else 1


def greedily(instance: Instance) -> tuple[int, ...]:
    """The greedy order of an instance; channels that nobody reads come last."""
    block_of = dict.fromkeys(range(instance.channels), 0)
    # The smallest block that holds a channel is its producer; blocks lie in the order of their first channels.
    for block in sorted(instance.blocks, key=lambda block: -len(block.set)):
        block_of.update(dict.fromkeys(block.set, min(block.set, default=0)))
    order = greedy_order([reader.set for reader in instance.readers], block_of)
    named = set(order)
    order += [channel for channel in range(instance.channels) if channel not in named]
    return tuple(sorted(order, key=lambda channel: block_of[channel]))


def paid(instance: Instance, order: tuple[int, ...]) -> float | None:
    """What an instance pays under one order for all its values; None if a pin or a block does not hold in it."""
    place = {channel: position for position, channel in enumerate(order)}
    for block in instance.blocks:
        found = [place[channel] for channel in block.set]
        if found and max(found) - min(found) + 1 != len(found):
            return None
    if any(place[b] != place[a] + 1 for pin in instance.pins for a, b in pairwise(pin.sequence)):
        return None
    return cost(instance, [order] * instance.values)[2]


def random_rows(family: str, sizes: Iterable[tuple[int, int]], seeds: Iterable[int], limit: float) -> Iterator[Any]:
    """The rows of one random family."""
    for channels, readers in sizes:
        for seed in seeds:
            yield {"family": family, "seed": seed} | _row(make(family, channels, readers, seed), limit)


def corpus_rows(limit: float) -> Iterator[Any]:
    """The rows of the committed instances."""
    for name, instance, known in stored():
        yield {"family": "corpus", "name": name, "known": known} | _row(instance, limit)


def _row(instance: Instance, limit: float) -> dict[str, Any]:
    found = compare(instance, limit)
    derived = {"gap": found.gap, "over_floor": found.over_floor, "time_limit": limit}
    return {name: getattr(found, name) for name in Comparison.__slots__} | derived


def stored() -> Iterator[tuple[str, Instance, float | None]]:
    """The committed instances: name, instance, least objective if it was proven."""
    for path in sorted(CORPUS.glob("*.json")):
        for entry in json.loads(path.read_text()):
            yield f"{path.stem}: {entry['name']}", Instance.from_json(entry["instance"]), entry["objective"]


def store(time_limit: float) -> None:
    """Write the corpus anew: a file a random family, and one a network of the zoo with its shared segments."""
    for family in FAMILIES:
        made = ((f"{n}x{k}, seed {seed}", make(family, n, k, seed)) for n, k in STORED_SIZES for seed in SEEDS[:2])
        _store(f"random_{family}", made, time_limit)
    for name in NETWORKS:
        _store(f"zoo_{name}", zoo_segments(name), time_limit)


def _store(stem: str, instances: Iterable[tuple[str, Instance]], time_limit: float) -> None:
    entries: list[dict[str, Any]] = []
    for name, instance in instances:
        solution = solve(instance, time_limit=time_limit)
        known = solution.objective if solution.optimal else None
        entries.append({"name": name, "objective": known, "instance": json.loads(instance.to_json())})
    CORPUS.mkdir(exist_ok=True)
    lines = (json.dumps(entry, separators=(",", ":")) for entry in entries)
    (CORPUS / f"{stem}.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")


def zoo_segments(name: str) -> Iterator[tuple[str, Instance]]:
    """The segments of a network of the zoo, at half its input channels and a low resolution, that two readers share."""
    import chanopt
    from benchmarks import zoo
    from benchmarks.masks import Setting, build_masked

    size = zoo.entry(name).small
    model = build_masked(name, Setting("input", 0.5), size)
    report = chanopt.explain(chanopt.optimize(model, zoo.example_inputs(name, 1, size)))
    for segment in report.segments:
        if len(segment.instance.readers) > 1:
            yield segment.name, segment.instance


def size(text: str) -> tuple[int, int]:
    """Parse CHANNELSxREADERS.

    >>> size("256x16")
    (256, 16)
    """
    channels, _, readers = text.partition("x")
    if not (channels.isdecimal() and readers.isdecimal() and int(channels) and int(readers)):
        raise argparse.ArgumentTypeError(f"expected CHANNELSxREADERS, as in 256x16, found {text!r}")
    return int(channels), int(readers)


NAMES = [*FAMILIES, *GRAINED, "corpus"]
"""What `--families` takes."""


def add_arguments(made: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    made.add_argument("--families", nargs="+", choices=NAMES, default=NAMES)
    made.add_argument("--sizes", nargs="+", type=size, metavar="CHANNELSxREADERS", default=SIZES)
    made.add_argument("--seeds", nargs="+", type=cases.at_least(0), default=SEEDS)
    made.add_argument("--time-limit", type=cases.seconds, default=5.0, metavar="SECONDS", help="for one instance")
    made.add_argument("--store", action="store_true", help="write benchmarks/corpus anew, and nothing else")
    made.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)


def job(family: str, sizes: Sequence[tuple[int, int]], seeds: Sequence[int], limit: float) -> jobs.Job:
    """The process of one family."""
    words = ["--families", family, "--sizes", *(f"{n}x{k}" for n, k in sizes), "--seeds", *map(str, seeds)]
    words += ["--time-limit", str(limit)]
    return jobs.Job(" ".join(words), ("benchmarks", "solver", "--worker", *words))


def main(args: argparse.Namespace) -> int:
    """Run the command; 1 if a stored optimum is not met, another order is better, or a process is lost."""
    if args.store:
        store(max(60.0, args.time_limit))
        return 0
    if args.worker:
        solve(make("independent", 16, 4, 0))  # loads what the first call of a process loads
        for family in args.families:
            named = family == "corpus"
            rows = (
                corpus_rows(args.time_limit) if named else random_rows(family, args.sizes, args.seeds, args.time_limit)
            )
            for row in rows:
                jobs.emit(row)
        return 0
    todo = [job(family, args.sizes, args.seeds, args.time_limit) for family in args.families]
    # One at a time: their seconds are reported.
    lines = jobs.run(todo, args.out.with_suffix(".jsonl"), timeout=args.timeout, resume=args.resume, what="solver")
    return finish(lines, args.out)


def finish(lines: Sequence[jobs.Line], out: Path) -> int:
    """Write the rows and print what is not right; returns the exit code."""
    rows = [line for line in lines if "family" in line]
    jobs.write(out, rows)
    wrong = [told for row in rows if (told := differences(row))]
    lost = [f"{line['job']}: {line['exception']}" for line in lines if "family" not in line]
    print("\n".join([*wrong, *lost, f"{len(rows)} instances, {len(wrong)} to look at, {len(lost)} lost; {out}"]))
    return 1 if wrong or lost else 0


def differences(row: Mapping[str, Any]) -> str:
    """What is wrong with a row, in words; "" if nothing is. An instance that is not proven in time is not."""
    label = row.get("name") or f"{row['family']} {row['channels']}x{row['readers']} seed {row['seed']}"
    others = {name: row[name] for name in ("greedy", "natural") if row[name] is not None}
    better = [f"{name} pays {value:,}" for name, value in others.items() if value < row["objective"]]
    if better:
        return f"{label}: {' and '.join(better)}, ours {row['objective']:,}"
    if row["optimal"] and row.get("known") is not None and row["known"] != row["objective"]:
        return f"{label}: the least is {row['objective']:,}, stored as {row['known']:,}"
    return ""
