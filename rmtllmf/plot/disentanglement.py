"""The weight disentanglement of two tasks over their scales."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError
from ..metrics import DisentanglementGrid
from ._axes import axes_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["disentanglement_map"]


def disentanglement_map(grid: DisentanglementGrid, task: str | None = None, *, ax: Axes | None = None) -> Axes:
    r"""The weight disentanglement error as a heat map over the scales of both tasks.

    Args:
        grid: as of `rmtllmf.metrics.disentanglement_grid`: the first task's scale is drawn to the right, the second's
            upwards, each cell centred at its scales where these are evenly spaced. The colours run from 0 to 1, or to
            2 if an entry is above 1: light where the tasks are disentangled.
        task: whose share of changed predictions to draw; None: the sum over both, :math:`\xi`.
        ax: where to draw; None: a new figure.

    Returns:
        The Axes.

    Raises:
        InputError: an unknown task. TypeError: no `DisentanglementGrid`. ImportError: matplotlib is missing.

    Source: Ortiz-Jimenez et al., "Task arithmetic in the tangent space", 2023, figure 3.

    Example:
        >>> import torch
        >>> from rmtllmf.metrics import DisentanglementGrid
        >>> half = torch.tensor([[0.0, 0.1], [0.2, 0.3]])
        >>> ax = disentanglement_map(DisentanglementGrid((0.5, 1.0), 2 * half, {"mnist": half, "svhn": half}))
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('scale of mnist', 'scale of svhn')
    """
    if not isinstance(grid, DisentanglementGrid):
        raise TypeError(f"grid: expected a DisentanglementGrid, got {type(grid).__name__}")
    if task is not None and task not in grid.per_task:
        raise InputError(f"task: expected one of {', '.join(map(repr, grid.per_task))}, got {task!r}")
    values = (grid.total if task is None else grid.per_task[task]).detach().cpu().numpy()
    first, second = grid.per_task
    ax = axes_of(ax, (4.8, 4.0))
    edges = _edges(np.array(grid.scales))
    top = 2.0 if float(values.max()) > 1 else 1.0
    # rows of the grid are the first task's scales, and columns of the picture go to the right
    mesh = ax.pcolormesh(edges, edges, values.T, vmin=0.0, vmax=top, cmap="viridis_r")
    ax.set_aspect("equal")
    ax.set_xlabel(f"scale of {first}")
    ax.set_ylabel(f"scale of {second}")
    bar = ax.figure.colorbar(mesh, ax=ax)
    bar.set_label("weight disentanglement error" if task is None else f"changed predictions on {task} (share)")
    return ax


def _edges(centres: np.ndarray) -> np.ndarray:
    """The borders of cells around increasing centres: half-way between neighbours."""
    if len(centres) == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    middle = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[2 * centres[0] - middle[0]], middle, [2 * centres[-1] - middle[-1]]])
