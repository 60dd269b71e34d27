"""Tiles: the few that are tried, which of them fit a problem, and which one to take without measuring."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from chanopt.kernels.call import KernelError
from chanopt.kernels.problem import Kind, Problem

# Shared memory that one program may have, in bytes, by compute capability; else that of the smallest.
_SHARED = {80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448, 100: 232448}
_LEAST_SHARED = 101376
# Inductor's conv template was silently wrong with eight warps on k x k on an H100 (pytorch#173068). Until
# benchmarks/gpu.py has proven these kernels right there, the tuner stays at four.
KXK_WARPS = 4
H100_MULTIPROCESSORS = 132
_MOST = 1024
"""No size of a tile is larger."""
_MOST_WARPS, _MOST_STAGES = 8, 8
_LEAST_OF_PRODUCT = 16
"""Tensor cores multiply no smaller matrices."""


@dataclass(frozen=True, slots=True)
class Config:
    """A tile and how it is run.

    Attributes:
        block_m: pixels of a tile; output channels for NCHW.
        block_n: output channels of a tile; pixels for NCHW.
        block_k: gathered channels a step; 1 for depthwise.
        warps: of 32 threads, a program.
        stages: steps whose loads are in flight.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int

    @property
    def label(self) -> str:
        """Its name in tables."""
        return f"triton {self.block_m}x{self.block_n}x{self.block_k} w{self.warps} s{self.stages}"

    def to_list(self) -> list[int]:
        """The fields, as the op takes them."""
        return [self.block_m, self.block_n, self.block_k, self.warps, self.stages]

    @classmethod
    def from_list(cls, values: list[int] | tuple[int, ...]) -> Config:
        """A config out of :meth:`to_list`.

        Raises:
            KernelError: not five positive integers of no more than 1024, or a size that is not a power of two.
        """
        whole = len(values) == 5 and all(type(v) is int and 0 < v <= _MOST for v in values)
        if not whole or any(v & (v - 1) for v in values[:4]):
            raise KernelError(
                "expected a config [block_m, block_n, block_k, warps, stages], powers of two but for stages, "
                f"none above {_MOST}, found {list(values)}"
            )
        return cls(*values)


class Rival(enum.Enum):
    """A way without a kernel of ours."""

    GATHER = 1
    """A copy of the channels, then cuDNN."""
    ZEROS = 2
    """cuDNN on all channels, with zeros in the weight."""

    @property
    def label(self) -> str:
        """Its name in tables."""
        return self.name.lower()

    def to_list(self) -> list[int]:
        """As the op takes it."""
        return [self.value]


Tile = Config | Rival
"""What runs a gathered conv on a GPU."""


def tile_of(values: list[int] | tuple[int, ...]) -> Tile:
    """A tile, or a way without one, out of `to_list`.

    Raises:
        KernelError: it is neither.
    """
    is_rival = len(values) == 1 and type(values[0]) is int and values[0] in {rival.value for rival in Rival}
    return Rival(values[0]) if is_rival else Config.from_list(values)


# From the largest tile to the smallest. Read off compiled kernels: none spills with what `fits` lets through.
_HALF = tuple(
    Config(*c)
    for c in (
        (128, 256, 64, 8, 3),
        (128, 128, 64, 4, 3),
        (128, 128, 64, 8, 4),
        (128, 128, 32, 4, 4),
        (128, 64, 64, 4, 4),
        (64, 128, 64, 4, 3),
        (64, 64, 64, 4, 4),
        (64, 64, 32, 4, 5),
        (128, 32, 32, 4, 4),
        (64, 32, 64, 4, 4),
        (32, 64, 64, 4, 4),
    )
)
_FLOAT = tuple(Config(*c) for c in ((128, 128, 32, 8, 3), (128, 64, 32, 4, 3), (64, 64, 32, 4, 4), (64, 32, 32, 4, 4)))
_POINT = tuple(
    Config(*c)
    for c in (
        (128, 128, 32, 4, 3),
        (64, 128, 64, 4, 3),
        (64, 128, 32, 4, 4),
        (64, 64, 64, 4, 3),
        (64, 64, 32, 4, 4),
        (32, 128, 32, 4, 4),
    )
)
_POINT_FLOAT = tuple(
    Config(*c) for c in ((64, 128, 32, 4, 3), (64, 64, 32, 4, 3), (32, 128, 32, 4, 3), (32, 64, 32, 4, 3))
)
_DEPTHWISE = tuple(Config(*c) for c in ((64, 64, 1, 4, 1), (64, 32, 1, 4, 1), (32, 64, 1, 4, 1), (32, 32, 1, 4, 1)))


def listed(problem: Problem) -> tuple[Config, ...]:
    """Every config for the problem's kernel and dtype, from the largest tile to the smallest."""
    if problem.kind is Kind.DEPTHWISE:
        return _DEPTHWISE
    wide = problem.dtype == "fp32"
    if problem.kind is Kind.POINT:
        return _POINT_FLOAT if wide else _POINT
    return _FLOAT if wide else _HALF


def shared_bytes(problem: Problem, config: Config) -> int:
    """Shared memory of the pipeline's buffers; the compiler may need a little less."""
    if problem.kind is Kind.DEPTHWISE:
        return 0
    return config.stages * (config.block_m + config.block_n) * config.block_k * problem.itemsize


def fits(problem: Problem, config: Config, capability: int = 90) -> bool:
    """Whether a config is right and worth trying for a problem on a GPU of this compute capability (80 is 8.0)."""
    if config.warps > _MOST_WARPS or config.stages > _MOST_STAGES:
        return False
    if problem.kind is Kind.DEPTHWISE:
        return config.block_n <= 2 * max(problem.outputs, 16) and not _spills(problem, config)
    if min(config.block_m, config.block_n, config.block_k) < _LEAST_OF_PRODUCT:
        return False
    if problem.gathered % config.block_k or config.block_k % max(problem.group, 1):
        return False
    if shared_bytes(problem, config) > _SHARED.get(capability, _LEAST_SHARED):
        return False
    if problem.kernel != (1, 1) and config.warps > KXK_WARPS:
        return False
    outputs = config.block_m if problem.kind is Kind.POINT else config.block_n
    if outputs > 2 * max(problem.outputs, 16):
        return False
    return not _spills(problem, config) and not _loads_narrowly(problem, config, capability)


def _loads_narrowly(problem: Problem, config: Config, capability: int) -> bool:
    """Whether a tile's TF32 products want an operand turned, which is then loaded in 4-byte pieces.

    Hopper's instruction for 64 rows and more takes both operands with K contiguous; in NCHW memory pixels are.
    """
    wide = problem.dtype == "fp32" and problem.precision == "tf32"
    return problem.kind is Kind.POINT and wide and capability >= 90 and config.block_m >= 64


def _spills(problem: Problem, config: Config) -> bool:
    """Whether the kernel is known not to keep its sums in registers, as `python -m chanopt.kernels.aot` shows."""
    sums = config.block_m * config.block_n // (32 * config.warps)
    if problem.kind is Kind.DEPTHWISE:
        return sums >= 32 and (problem.residual != "none" or problem.kernel[0] * problem.kernel[1] > 9)
    return sums >= 128 and (problem.residual != "none" or (problem.prologue and not problem.point))


def candidates(problem: Problem, capability: int = 90) -> list[Config]:
    """The configs to try, from the largest tile to the smallest; at least one.

    Raises:
        KernelError: none fits, which `coverage` rules out.
    """
    found = [config for config in listed(problem) if fits(problem, config, capability)]
    if not found:
        raise KernelError(f"expected a tile for {problem.gathered} gathered channels, found none; {problem}")
    small = [config for config in found if _tile_pixels(problem, config) <= 64]
    return small if problem.pixels < 512 and small else found


def tiles(problem: Problem, config: Config) -> int:
    """Programs that a launch has."""
    if problem.kind is Kind.POINT:
        height, width = problem.out_size
        across = -(-height * width // config.block_n)
        return problem.batch * across * -(-problem.outputs // config.block_m)
    return -(-problem.pixels // config.block_m) * -(-problem.outputs // config.block_n)


def heuristic(problem: Problem, capability: int = 90, multiprocessors: int = H100_MULTIPROCESSORS) -> Config:
    """The largest tile that still gives every multiprocessor work, or else the one with most programs."""
    found = candidates(problem, capability)
    return next((c for c in found if tiles(problem, c) >= multiprocessors), max(found, key=lambda c: tiles(problem, c)))


def _tile_pixels(problem: Problem, config: Config) -> int:
    return config.block_n if problem.kind is Kind.POINT else config.block_m
