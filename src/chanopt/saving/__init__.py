"""Optimised modules as files: ``save`` and ``load``; plans that rebuild a slim module around a state dict."""

from chanopt.saving.files import is_saved, load, read_report, save
from chanopt.saving.plan import Architecture, Form, Plan, apply_plan, attach, made_by

__all__ = [
    "Architecture",
    "Form",
    "Plan",
    "apply_plan",
    "attach",
    "is_saved",
    "load",
    "made_by",
    "read_report",
    "save",
]
