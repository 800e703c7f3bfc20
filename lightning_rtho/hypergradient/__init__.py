"""Hypergradients: Forward-HG and Reverse-HG over one shared linearization."""

from lightning_rtho.hypergradient._base import (
    AbstractHypergradient,
    Fault,
    GradientMismatchError,
    OptimizerStep,
    OuterGradient,
    Recollection,
)
from lightning_rtho.hypergradient._cost import Cost, forward_cost, reverse_cost
from lightning_rtho.hypergradient._forward import ForwardHypergradient
from lightning_rtho.hypergradient._keep_graph import KeepGraph
from lightning_rtho.hypergradient._recompute import Offload, Recompute
from lightning_rtho.hypergradient._reverse import ReverseHypergradient
from lightning_rtho.hypergradient._tape import Tape

__all__ = [
    "AbstractHypergradient",
    "Cost",
    "Fault",
    "ForwardHypergradient",
    "GradientMismatchError",
    "KeepGraph",
    "Offload",
    "OptimizerStep",
    "OuterGradient",
    "Recollection",
    "Recompute",
    "ReverseHypergradient",
    "Tape",
    "forward_cost",
    "reverse_cost",
]
