"""Channels into aligned blocks, here called bins: which channels share one is all that counts, not their places.

A reader pays its weight for every bin that holds a channel of its set. Channels with the same signature, the
set of readers that take them, are one *class*; a bin costs the weight of the union of the signatures in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = [
    "Bools",
    "Counts",
    "Packing",
    "cost_of",
    "floor_of",
    "gray_bins",
    "gray_order",
    "grown_bins",
    "packing_of",
    "unions",
]

Bools = npt.NDArray[np.bool_]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Packing:
    """How many channels of each class go into bins of `grain`; the last bin may be shorter, all are full."""

    signatures: Bools
    """Row s, column r: whether reader r takes the channels of class s."""
    counts: Counts
    """The channels of each class."""
    weights: tuple[int, ...]
    grain: int

    @property
    def full(self) -> int:
        """The number of bins of `grain` channels."""
        return int(self.counts.sum()) // self.grain

    @property
    def rest(self) -> int:
        """The size of the short bin; 0 if there is none."""
        return int(self.counts.sum()) % self.grain

    @property
    def bins(self) -> int:
        """The number of bins, the short one included."""
        return self.full + (self.rest > 0)


def packing_of(members: Bools, weights: Sequence[int], grain: int) -> tuple[Packing, npt.NDArray[np.intp]]:
    """Return the packing program of readers, and the class of every channel; equal readers count as one.

    Row c, column r of `members` tells whether reader r takes channel c.
    """
    distinct, number = np.unique(members, axis=1, return_inverse=True)
    summed = [0] * distinct.shape[1]
    for reader, weight in zip(number.ravel().tolist(), weights, strict=True):
        summed[reader] += weight
    pays = [reader for reader, weight in enumerate(summed) if weight and distinct[:, reader].any()]
    signatures, classes, counts = np.unique(distinct[:, pays], axis=0, return_inverse=True, return_counts=True)
    packing = Packing(signatures, counts.astype(np.int64), tuple(summed[reader] for reader in pays), grain)
    return packing, classes.ravel()


def floor_of(packing: Packing) -> int:
    """Return what is paid at least: every reader touches as many bins as its channels fill."""
    sizes = (packing.counts @ packing.signatures).tolist()
    return sum(weight * -(-size // packing.grain) for weight, size in zip(packing.weights, sizes, strict=True))


def cost_of(packing: Packing, bins: Counts) -> int:
    """Return what is paid if row b of `bins` holds that many channels of each class."""
    # Products of floats, exact for counts, are many times faster than those of integers.
    touched = ((bins.astype(float) @ packing.signatures.astype(float)) > 0).sum(axis=0).tolist()
    return sum(weight * count for weight, count in zip(packing.weights, touched, strict=True))


def gray_bins(packing: Packing, counts: Counts, short: bool) -> Counts:
    """Return bins filled in the order of the reflected Gray code of the signatures, the short bin last.

    Neighbours in that order differ in few readers.
    """
    order = gray_order(packing.signatures)
    total = int(counts.sum())
    classes = np.repeat(order, counts[order])
    sizes = total // packing.grain + (1 if short else 0)
    bins = np.zeros((sizes, len(counts)), dtype=np.int64)
    np.add.at(bins, (np.arange(total) // packing.grain, classes), 1)
    return bins


def grown_bins(packing: Packing, favour: float) -> Counts:
    """Return bins that are filled one after another, each from the lightest class left, the short bin last.

    What touches least besides comes next; `favour` times its own weight counts for it.
    """
    weights = np.array(packing.weights, dtype=np.int64)
    own = packing.signatures @ weights
    left = packing.counts.copy()
    bins = np.zeros((packing.bins, len(left)), dtype=np.int64)
    for number, row in enumerate(bins):
        room = packing.grain if number < packing.full else packing.rest
        worth = own.astype(float)
        while room:
            chosen = int(np.argmin(np.where(left > 0, worth, np.inf)))
            count = min(room, int(left[chosen]))
            row[chosen] += count
            left[chosen] -= count
            room -= count
            union = packing.signatures[row > 0].any(axis=0)
            worth = (packing.signatures & ~union) @ weights - favour * own
    return bins


def gray_order(signatures: Bools) -> npt.NDArray[np.intp]:
    """Return the rows in the order of the reflected Gray code; equal rows stay as they stand."""
    rank = np.logical_xor.accumulate(signatures, axis=1) if signatures.size else signatures
    return np.lexsort(rank.T[::-1]) if rank.size else np.arange(len(signatures))


def unions(signatures: Bools, limit: int) -> Bools | None:
    """Return every union of some rows, the empty one left out; None if there are more than `limit`."""
    found: dict[int, None] = {}
    for code in _codes(signatures):
        for union in [code, *(code | other for other in found)]:
            found[union] = None
        if len(found) > limit:
            return None
    width = signatures.shape[1]
    return np.array([[code >> reader & 1 for reader in range(width)] for code in found], dtype=bool).reshape(-1, width)


def _codes(signatures: Bools) -> list[int]:
    packed = np.packbits(signatures, axis=1, bitorder="little")
    return [int.from_bytes(row.tobytes(), "little") for row in packed]


def divisor(weights: Sequence[int]) -> int:
    """Return what every cost is a multiple of; 1 if nothing is paid."""
    return math.gcd(*weights) or 1
