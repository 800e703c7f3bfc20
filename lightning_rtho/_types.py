"""Names for the dictionaries of tensors that the mathematics passes around."""

from typing import TypeAlias

from torch import Tensor

State: TypeAlias = dict[str, Tensor]
"""One parameter and its optimizer buffers: ``"param"`` ``[*P]``, buffers ``[*P]`` or ``[]``."""

StateTangent: TypeAlias = dict[str, Tensor]
"""Derivative of a :data:`State` by every hyperparameter entry: each tensor ``[m, ...]``."""

StateCotangent: TypeAlias = dict[str, Tensor]
"""Derivative of a scalar by a :data:`State`: each tensor shaped as its primal."""

Hypers: TypeAlias = dict[str, Tensor]
"""Settings of one parameter group by name, natural values, each ``[]``."""
