"""The path of the hyperparameters through a run: what is written down, kept and drawn."""

from lightning_rtho.schedule._schedule import Schedule
from lightning_rtho.schedule._update import OuterUpdate

__all__ = ["OuterUpdate", "Schedule"]
