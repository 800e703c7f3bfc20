"""Derivatives of one training step: of the user's loss, of clipping, and of the update."""

from lightning_rtho.linearization._clipping import ClipByNorm, ClipByValue, GradientClip
from lightning_rtho.linearization._cohort import cohort_jvp, cohort_vjp, cohorts
from lightning_rtho.linearization._fused import fused_step_jvp, fused_step_vjp, is_large
from lightning_rtho.linearization._gradient import Linearization, TracedLoss
from lightning_rtho.linearization._graph import graph_nodes, rounds_otherwise
from lightning_rtho.linearization._hooks import BackwardHooks, silenceable_hooks, unheard
from lightning_rtho.linearization._statistics import RunningStatistics, StatisticUpdate
from lightning_rtho.linearization._step import load_forward_mode, step_jvp, step_vjp
from lightning_rtho.linearization._stop_gradient import (
    scale_gradient,
    stop_gradient,
    value_dependence,
)

__all__ = [
    "BackwardHooks",
    "ClipByNorm",
    "ClipByValue",
    "GradientClip",
    "Linearization",
    "RunningStatistics",
    "StatisticUpdate",
    "TracedLoss",
    "cohort_jvp",
    "cohort_vjp",
    "cohorts",
    "fused_step_jvp",
    "fused_step_vjp",
    "graph_nodes",
    "is_large",
    "load_forward_mode",
    "rounds_otherwise",
    "scale_gradient",
    "silenceable_hooks",
    "step_jvp",
    "step_vjp",
    "stop_gradient",
    "unheard",
    "value_dependence",
]
