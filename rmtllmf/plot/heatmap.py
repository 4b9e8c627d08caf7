"""The similarity of task vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ..errors import InputError, NonFiniteError, ShapeError
from ._axes import axes_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["similarity_heatmap"]


def similarity_heatmap(
    similarity: Tensor | ArrayLike, names: Sequence[str] | None = None, *, ax: Axes | None = None
) -> Axes:
    """A matrix of cosines as a heat map with the numbers written in.

    Args:
        similarity: (N, N) cosines, as of `rmtllmf.metrics.cosine_similarity`. The colours run from 0 to 1, or from -1
            to 1 if an entry is below -0.05.
        names: N labels; None: no labels but numbers.
        ax: where to draw; None: a new figure.

    Returns:
        The Axes.

    Raises:
        ShapeError: no square matrix, or another number of names. NonFiniteError: NaN or infinity.
        InputError: entries outside -1 and 1. ImportError: matplotlib is missing.

    Source: R-MTLLMF, figure of cosine similarities.

    Example:
        >>> ax = similarity_heatmap([[1.0, 0.1], [0.1, 1.0]], ["mnist", "svhn"])
        >>> [text.get_text() for text in ax.texts]
        ['1.00', '0.10', '0.10', '1.00']
    """
    values = _matrix(similarity)
    size = len(values)
    labels = [str(index) for index in range(size)] if names is None else [str(name) for name in names]
    if len(labels) != size:
        raise ShapeError(f"names: expected one for each of the {size} rows, got {len(labels)}")
    margin = 0.09 * max(map(len, labels))  # inches that the longest label takes
    ax = axes_of(ax, (2.0 + margin + 0.55 * size, 1.0 + margin + 0.55 * size))
    signed = bool((values < -0.05).any())
    low, colours = (-1.0, "RdBu_r") if signed else (0.0, "viridis")
    image = ax.imshow(values, vmin=low, vmax=1.0, cmap=colours)
    for row in range(size):
        for column in range(size):
            red, green, blue = image.cmap(image.norm(values[row, column]))[:3]
            luminance = 0.299 * red + 0.587 * green + 0.114 * blue
            # + 0.0 turns -0.00 into 0.00
            text = f"{round(float(values[row, column]), 2) + 0.0:.2f}"
            ax.text(column, row, text, ha="center", va="center", color="black" if luminance > 0.5 else "white", size=9)
    ax.set_xticks(range(size), labels, rotation=45, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(size), labels)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    bar = ax.figure.colorbar(image, ax=ax)
    bar.set_label("cosine similarity")
    return ax


def _matrix(similarity: Tensor | ArrayLike) -> NDArray[np.float64]:
    if isinstance(similarity, Tensor):
        similarity = similarity.detach().cpu().numpy()
    values = np.asarray(similarity)
    if values.dtype.kind not in "iuf":
        raise TypeError(f"similarity: expected real numbers, got an array of dtype {values.dtype}")
    values = values.astype(np.float64)
    if values.ndim != 2 or values.shape[0] != values.shape[1] or not values.size:
        raise ShapeError(f"similarity: expected a square matrix (N, N), got shape {values.shape}")
    if not np.isfinite(values).all():
        raise NonFiniteError("similarity: holds NaN or infinity; expected cosines")
    if np.abs(values).max() > 1 + 1e-6:
        raise InputError(f"similarity: expected cosines between -1 and 1, got {float(np.abs(values).max())}")
    return values
