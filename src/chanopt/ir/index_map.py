"""Which channels, in which order: the two types that stand for every permutation, subset and range.

An :class:`IndexMap` is a finite sequence of channel numbers; a :class:`Layout` says which logical channels of a
tensor exist physically and at which position. Both check themselves when they are made.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import overload

import numpy as np
import numpy.typing as npt

from chanopt.errors import IRError

Ints = npt.NDArray[np.int64]


class IndexMap:
    """An immutable sequence of integers, each a channel number or ``ABSENT`` (-1).

    >>> IndexMap([4, 5, 6, 1])
    IndexMap('4:7,1')
    >>> IndexMap.identity(8).is_identity(8)
    True
    >>> IndexMap.parse('0:3,7').tolist()
    [0, 1, 2, 7]
    """

    __slots__ = ("_array", "_hash")

    ABSENT = -1

    def __init__(self, channels: Iterable[int] | Ints) -> None:
        values = channels if isinstance(channels, np.ndarray) else list(channels)
        array = np.array(values, dtype=np.int64).reshape(-1)
        if array.size and int(array.min()) < self.ABSENT:
            raise IRError(f"expected channel numbers of at least 0, found {int(array.min())}")
        array.flags.writeable = False
        self._array: Ints = array
        self._hash: int | None = None

    @classmethod
    def identity(cls, count: int) -> IndexMap:
        """The channels ``0 .. count - 1`` in order."""
        return cls(np.arange(count, dtype=np.int64))

    @classmethod
    def parse(cls, text: str) -> IndexMap:
        """Read the form that ``str`` writes: numbers and half-open ranges, joined by commas."""
        parts: list[Ints] = []
        for piece in filter(None, (part.strip() for part in text.split(","))):
            number, _, rest = piece.partition(":")
            repeat, _, times = piece.partition("x")
            if rest:
                parts.append(np.arange(int(number), int(rest), dtype=np.int64))
            elif times:
                parts.append(np.full(int(times), int(repeat), dtype=np.int64))
            else:
                parts.append(np.array([int(piece)], dtype=np.int64))
        return cls(np.concatenate(parts) if parts else np.zeros(0, np.int64))

    @property
    def array(self) -> Ints:
        """The numbers as a read-only array of shape (length,)."""
        return self._array

    def tolist(self) -> list[int]:
        """The numbers as a list."""
        return self._array.tolist()

    def is_identity(self, count: int) -> bool:
        """Whether this is ``0 .. count - 1`` in order."""
        return len(self) == count and bool((self._array == np.arange(count)).all())

    def is_range(self) -> bool:
        """Whether the numbers ascend by one (an empty map is a range)."""
        return bool((np.diff(self._array) == 1).all())

    def is_distinct(self) -> bool:
        """Whether no number stands twice."""
        ascending = bool((np.diff(self._array) > 0).all())  # most are
        return ascending or len(np.unique(self._array)) == len(self)

    def runs(self) -> list[tuple[int, int]]:
        """The maximal ascending runs as half-open ``(start, stop)`` pairs, in order."""
        if not len(self):
            return []
        breaks = np.flatnonzero((np.diff(self._array) != 1) | (self._array[:-1] == self.ABSENT)) + 1
        starts = self._array[np.concatenate(([0], breaks))]
        lengths = np.diff(np.concatenate(([0], breaks, [len(self)])))
        return [(int(s), int(s + n)) for s, n in zip(starts, lengths, strict=True)]

    @overload
    def __getitem__(self, item: int) -> int: ...
    @overload
    def __getitem__(self, item: IndexMap) -> IndexMap: ...
    def __getitem__(self, item: int | IndexMap) -> int | IndexMap:
        """One number, or the map ``i -> self[item[i]]``."""
        if isinstance(item, IndexMap):
            return IndexMap(self._array[item.array])
        return int(self._array[item])

    def __len__(self) -> int:
        return len(self._array)

    def __iter__(self) -> Iterator[int]:
        return iter(self.tolist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, IndexMap) and np.array_equal(self._array, other._array)

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = hash(self._array.tobytes())
        return self._hash

    def __str__(self) -> str:
        return ",".join(_written(self._array))

    def __repr__(self) -> str:
        return f"IndexMap({str(self)!r})"


def _written(array: Ints) -> Iterator[str]:
    """Ranges as ``4:7``, repeats as ``5x3`` (a flatten repeats each channel once per pixel), else the number."""
    starts = np.flatnonzero(np.diff(array, prepend=array[:1] - 1))
    values, counts = array[starts].tolist(), np.diff(starts, append=len(array)).tolist()
    begin = end = 0  # of the range that is open
    for value, count in zip(values, counts, strict=True):
        if count == 1 and value == end > begin:
            end += 1
            continue
        yield from _range(begin, end)
        single = count == 1 and value >= 0
        begin, end = (value, value + 1) if single else (0, 0)
        if not single:
            yield f"{value}x{count}" if count > 1 else str(value)
    yield from _range(begin, end)


def _range(begin: int, end: int) -> Iterator[str]:
    if end > begin:
        yield str(begin) if end == begin + 1 else f"{begin}:{end}"


@dataclass(frozen=True, slots=True)
class Layout:
    """The physical order of a tensor's live channels: an injection of positions into logical channels.

    Attributes:
        channels: how many logical channels the tensor had when it was captured.
        live: the logical channel at each physical position.

    >>> layout = Layout(6, IndexMap([4, 0, 2]))
    >>> layout.positions(IndexMap([0, 2]))
    IndexMap('1:3')
    """

    channels: int
    live: IndexMap

    def __post_init__(self) -> None:
        if not self.live.is_distinct():
            raise IRError("expected every channel of a layout once, found one twice")
        if len(self.live) and not 0 <= int(self.live.array.min()) <= int(self.live.array.max()) < self.channels:
            raise IRError(f"expected channels within 0..{self.channels - 1}, found {self.live}")

    @classmethod
    def identity(cls, channels: int) -> Layout:
        """All channels in their logical order."""
        return cls(channels, IndexMap.identity(channels))

    @property
    def is_identity(self) -> bool:
        """Whether every channel is live and in its logical order."""
        return self.live.is_identity(self.channels)

    def __len__(self) -> int:
        return len(self.live)

    def mask(self) -> npt.NDArray[np.bool_]:
        """Shape (channels,): which logical channels are live."""
        mask = np.zeros(self.channels, dtype=np.bool_)
        mask[self.live.array] = True
        return mask

    def positions(self, wanted: IndexMap) -> IndexMap:
        """The physical position of each wanted logical channel.

        Raises:
            IRError: a wanted channel is not live.
        """
        where = np.full(self.channels, -1, dtype=np.int64)
        where[self.live.array] = np.arange(len(self.live))
        if len(wanted) and int(wanted.array.max()) >= self.channels:
            raise IRError(f"expected channels below {self.channels}, found {int(wanted.array.max())}")
        found = where[wanted.array]
        if len(found) and int(found.min()) < 0:
            missing = IndexMap(np.unique(wanted.array[found < 0]))
            raise IRError(f"expected only live channels to be read, found {missing} missing from the layout")
        return IndexMap(found)
