"""The errors chanopt raises. Each says what was expected, what was found, where, and what to do."""

from __future__ import annotations


class ChanoptError(Exception):
    """Base of every error that chanopt raises on purpose."""


class IRError(ChanoptError, ValueError):
    """A program, layout or index map that breaks a rule of the IR (docs/ir.md)."""


class ParseError(IRError):
    """A text that is not a program; names the line and the column."""


class InstanceError(ChanoptError, ValueError):
    """A permutation instance or solution that contradicts itself."""


class CaptureError(ChanoptError):
    """A model that torch.export cannot turn into a graph."""


class LoweringError(ChanoptError):
    """An operator without a rule, in strict mode; names the operator and the user's source line."""


class MaskError(ChanoptError, ValueError):
    """A mask for a module or a channel that does not exist."""


class PassError(ChanoptError):
    """A pass whose requirement does not hold, or that broke its own guarantee."""


class VerifyError(ChanoptError, AssertionError):
    """Two modules that do not compute the same function within the tolerance."""


class LoadError(ChanoptError):
    """A file that is not chanopt's, or comes from a newer version."""


class AllocationError(ChanoptError, ValueError):
    """A channel allocation that contradicts itself, or that no choice of channels brings within its target."""


class ScheduleError(ChanoptError, ValueError):
    """A pruning schedule that says something impossible, or whose masks disagree where channels meet."""


class OptionError(ChanoptError, ValueError):
    """An option of the torch.compile backend, or an environment variable, that says something impossible."""
