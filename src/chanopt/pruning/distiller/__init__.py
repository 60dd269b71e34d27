"""Distiller's pruning schedules, run by chanopt: the YAML of IntelLabs/distiller, unchanged.

The formulas, class names and arguments are Distiller's (Apache-2.0); the code is chanopt's own.
"""

from __future__ import annotations

from chanopt.pruning.distiller.agp import AgpPruningRate
from chanopt.pruning.distiller.components import Component, Moment, Pruner, Sight
from chanopt.pruning.distiller.dependencies import Conflict, DisagreementError, Kept
from chanopt.pruning.distiller.policies import (
    LossComponent,
    LRPolicy,
    Policy,
    PolicyLoss,
    PruningPolicy,
    RegularizationPolicy,
)
from chanopt.pruning.distiller.recipes import (
    Directive,
    Recipe,
    apply_recipe,
    load_checkpoint,
    recipes_of,
    save_checkpoint,
)
from chanopt.pruning.distiller.schedule import CLASSES, Schedule, load_schedule, parse_schedule
from chanopt.pruning.distiller.scheduler import CompressionScheduler, ParameterMasker
from chanopt.pruning.distiller.statistics import collect_activations, collect_feature_maps
from chanopt.pruning.distiller.thinning import StructureRemover, Thinning, thin

__all__ = [
    "CLASSES",
    "AgpPruningRate",
    "Component",
    "CompressionScheduler",
    "Conflict",
    "Directive",
    "DisagreementError",
    "Kept",
    "LRPolicy",
    "LossComponent",
    "Moment",
    "ParameterMasker",
    "Policy",
    "PolicyLoss",
    "Pruner",
    "PruningPolicy",
    "Recipe",
    "RegularizationPolicy",
    "Schedule",
    "Sight",
    "StructureRemover",
    "Thinning",
    "apply_recipe",
    "collect_activations",
    "collect_feature_maps",
    "load_checkpoint",
    "load_schedule",
    "parse_schedule",
    "recipes_of",
    "save_checkpoint",
    "thin",
]
