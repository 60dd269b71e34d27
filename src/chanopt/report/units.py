"""Figures as people read them: 647 M, 5.50 MB, 12 ms, 6.3x fewer."""

from __future__ import annotations

_STEPS = ("", "k", "M", "G", "T", "P")
_PLAIN = 10_000
"""Counts below this are written in full."""


def count(number: float) -> str:
    """A count with three figures and a decimal prefix; in full below 10000.

    >>> [count(n) for n in (0, 2793, 999_999, 4_089_184_256)]
    ['0', '2793', '1.00 M', '4.09 G']
    """
    return str(round(number)) if abs(number) < _PLAIN else _scaled(number, "").rstrip()


def size(bytes_: float) -> str:
    """A size in decimal units, so that 1 kB is 1000 bytes.

    >>> [size(n) for n in (0, 999, 1000, 5_496_624)]
    ['0 B', '999 B', '1.00 kB', '5.50 MB']
    """
    return _scaled(bytes_, "B")


def duration(seconds: float) -> str:
    """A time in seconds, or in milliseconds below one.

    >>> [duration(s) for s in (0, 0.0004, 0.012, 12.3)]
    ['0.0 ms', '0.4 ms', '12.0 ms', '12.30 s']
    """
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def ratio(before: float, after: float) -> str:
    """How much less the second figure is.

    >>> [ratio(4089, 647), ratio(7, 7), ratio(3, 0), ratio(2, 3)]
    ['6.3x fewer', 'unchanged', 'none left', '1.5x more']
    """
    if before == after:
        return "unchanged"
    if not after:
        return "none left"
    if not before:
        return "new"
    return f"{before / after:.1f}x fewer" if before > after else f"{after / before:.1f}x more"


def shortened(text: str, width: int) -> str:
    """The text in at most ``width`` characters; what is left out of the middle is marked, the end says most.

    >>> shortened("features.denseblock1.denselayer12.conv1", 24)
    'feature...elayer12.conv1'
    """
    if len(text) <= width:
        return text
    if width <= 3:
        return "..."[:width]
    head = (width - 3) // 3
    return f"{text[:head]}...{text[len(text) - (width - 3 - head) :]}"


def tail(name: str, width: int) -> str:
    """The last parts of a dotted name that fit in ``width`` characters, or the beginning of a phrase.

    >>> tail("features.denseblock1.denselayer12.conv1", 24)
    'denselayer12.conv1'
    >>> tail("aten.cumsum.default takes all channels", 24)
    'aten.cumsum.default t...'
    """
    if " " in name:
        return name if len(name) <= width else f"{name[: width - 3]}..."
    while len(name) > width and "." in name:
        name = name.partition(".")[2]
    return shortened(name, width)


def _scaled(number: float, unit: str) -> str:
    value = float(number)
    for step in _STEPS[:-1]:
        text = f"{round(value)}" if not step else _three(value)
        if abs(float(text)) < 1000:
            return f"{text} {step}{unit}"
        value /= 1000
    return f"{_three(value)} {_STEPS[-1]}{unit}"


def _three(value: float) -> str:
    """Three figures; 99.96 is 100, not 100.0."""
    for digits in (2, 1):
        text = f"{value:.{digits}f}"
        if len(text.lstrip("-")) <= 4:
            return text
    return f"{value:.0f}"
