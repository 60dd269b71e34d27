"""The report of a compiled function that consists of several graphs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

from chanopt.report.report import Report, merged


@dataclass(frozen=True)
class GraphReports(Report):
    """The sum of several reports; iterating gives each.

    A function has several graphs where Dynamo could not capture it as a whole, and one more for every set of input
    sizes, types or modes that it compiled the function for anew. The figures are sums over all of them.

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
        """The sum as JSON, which :meth:`Report.from_json` reads; for one graph, ask its own report."""
        return self._sum().to_json()

    def _sum(self) -> Report:
        return Report(**{field.name: getattr(self, field.name) for field in fields(Report)})


def together(reports: Sequence[Report]) -> Report:
    """One report of those of several graphs: itself if it is alone, else their sum."""
    if len(reports) == 1:
        return reports[0]
    names = [f"{number} {report.model}" for number, report in enumerate(reports)]
    total = merged(f"{len(reports)} graphs", dict(zip(names, reports, strict=True)), ())
    return GraphReports(**{field.name: getattr(total, field.name) for field in fields(Report)}, graphs=tuple(reports))
