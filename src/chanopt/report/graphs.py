"""The report of a compiled function, which may consist of several graphs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

from chanopt.report.report import Report, merged


@dataclass(frozen=True)
class GraphReports(Report):
    """The sum of the reports of a function's graphs; iterating gives each.

    A function has several graphs where Dynamo could not capture it as a whole. Of what Dynamo has compiled anew, for
    other sizes, types or modes, only the last counts.

    Attributes:
        graphs: the report of each graph, in the order in which they were compiled.
    """

    graphs: tuple[Report, ...] = ()

    def __iter__(self) -> Iterator[Report]:
        return iter(self.graphs)

    def __len__(self) -> int:
        return len(self.graphs)

    def __str__(self) -> str:
        return "\n\n".join(map(str, self.graphs))

    def to_json(self) -> str:
        """The sum as JSON, which :meth:`Report.from_json` reads; for one of the graphs, ask its own report."""
        return self._sum().to_json()

    def _sum(self) -> Report:
        return Report(**{field.name: getattr(self, field.name) for field in fields(Report)})


def together(reports: Sequence[Report]) -> Report:
    """One report of those of the graphs of a function: their sum."""
    names = [f"{number} {report.model}" for number, report in enumerate(reports)]
    several = len(reports) != 1
    total = merged(f"{len(reports)} graphs", dict(zip(names, reports, strict=True)), ()) if several else reports[0]
    return GraphReports(**{field.name: getattr(total, field.name) for field in fields(Report)}, graphs=tuple(reports))


def figures(report: Report) -> str:
    """One line for the log: how much less is computed, and how long each stage took."""
    spent = ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in report.seconds.items())
    return f"{report.macs_before} -> {report.macs_after} multiply-accumulates; {spent}"
