"""The passes, one a file, and the default pipeline."""

if __name__ != "chanopt.passes":  # the folder is also reachable as `passes`: a second copy of every class
    raise ImportError("import chanopt.passes, not passes")

from chanopt.passes.drop_dead import DropDead
from chanopt.passes.fold_affine import FoldAffine
from chanopt.passes.fold_constants import FoldConstants

__all__ = ["DropDead", "FoldAffine", "FoldConstants"]
