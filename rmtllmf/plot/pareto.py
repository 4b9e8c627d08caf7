"""The trade-off between two tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import InputError
from ..taskvec import ParetoFront
from ._axes import BLUE, GREY, ORANGE, axes_of, bare

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["pareto_front"]


def pareto_front(front: ParetoFront, tasks: tuple[str, str] | None = None, *, ax: Axes | None = None) -> Axes:
    """What two tasks can have together: the predicted front, what was measured on it, and the samples.

    Args:
        front: of `rmtllmf.taskvec.pareto_front`. Of two tasks it is a line; of more, the points that it has in these
            two, which other tasks hold back.
        tasks: the names of the tasks to the right and upwards; None: the first two.
        ax: where to draw; None: a new figure.

    Returns:
        The Axes.

    Raises:
        InputError: an unknown task, or a front of one task only. TypeError: no `ParetoFront`. ImportError: matplotlib
            is missing.

    Source: Li et al., "MAP: Low-compute Model Merging with Amortized Pareto Fronts via Quadratic Approximation", 2025,
        figure 1.

    Example:
        >>> import torch
        >>> from rmtllmf.taskvec import ParetoFront
        >>> points = torch.tensor([[0.5, 0.8], [0.7, 0.7], [0.8, 0.4]])
        >>> found = ParetoFront(("cars", "dtd"), "accuracy", True, points, points, None, points, points, (), ())
        >>> ax = pareto_front(found)
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('accuracy of cars', 'accuracy of dtd')
    """
    if not isinstance(front, ParetoFront):
        raise TypeError(f"front: expected a ParetoFront, got {type(front).__name__}")
    names = front.tasks[:2] if tasks is None else tuple(tasks)
    if len(names) != 2 or len(set(names)) < 2 or any(name not in front.tasks for name in names):
        expected = ", ".join(map(repr, front.tasks))
        raise InputError(f"tasks: expected two of {expected}, got {', '.join(map(repr, names))}")
    x, y = (front.tasks.index(name) for name in names)
    ax = axes_of(ax, (4.8, 4.0))
    ax.scatter(front.values[:, x].numpy(), front.values[:, y].numpy(), s=10, color=GREY, label="samples")
    style = "-" if len(front.tasks) == 2 else "none"
    predicted = front.predicted.numpy()
    ax.plot(predicted[:, x], predicted[:, y], linestyle=style, marker=".", color=BLUE, label="predicted")
    if front.measured is not None:
        measured = front.measured.numpy()
        ax.scatter(measured[:, x], measured[:, y], s=14, color=ORANGE, label="measured", zorder=3)
    ax.set_xlabel(f"{front.metric} of {names[0]}")
    ax.set_ylabel(f"{front.metric} of {names[1]}")
    bare(ax)
    ax.legend(frameon=False)
    return ax
