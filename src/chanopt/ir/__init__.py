"""The channel-flow IR. Knows channels; knows no operator (docs/ir.md)."""

from chanopt.ir.fusing import Beside, Fusing
from chanopt.ir.index_map import IndexMap, Layout
from chanopt.ir.program import (
    Access,
    Arg,
    Dialect,
    How,
    Interface,
    Kind,
    Marker,
    Op,
    Param,
    Program,
    Read,
    Refusal,
    Value,
    Window,
    leaves,
    map_leaves,
)
from chanopt.ir.reads import Form, PhysicalRead, flow_back, logical_read, physical_read, physical_reads
from chanopt.ir.text import parse

__all__ = [
    "Access",
    "Arg",
    "Beside",
    "Dialect",
    "Form",
    "Fusing",
    "How",
    "IndexMap",
    "Interface",
    "Kind",
    "Layout",
    "Marker",
    "Op",
    "Param",
    "PhysicalRead",
    "Program",
    "Read",
    "Refusal",
    "Value",
    "Window",
    "flow_back",
    "leaves",
    "logical_read",
    "map_leaves",
    "parse",
    "physical_read",
    "physical_reads",
]
