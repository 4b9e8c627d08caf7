"""Multi-Krum: the average of the task vectors that have the nearest neighbours."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..._state import Tensors, finite_number, whole_number
from ...errors import InputError
from .._engine import Fusion
from .._options import FusionOptions, Weights
from ..vector import TaskVector
from ._distances import squared_distances
from ._linear import weighted_sum

__all__ = ["krum_scores", "multi_krum"]


def multi_krum(
    vectors: Iterable[Tensors],
    hostile: int,
    *,
    keep: int | None = None,
    scale: float = 1.0,
    **options: Unpack[FusionOptions],
) -> TaskVector:
    r"""The mean of the vectors with the lowest `krum_scores`: those that lie among others, not apart.

    .. math:: \tau = \frac{\lambda}{m} \sum_{q \in S} \tau_q, \qquad
              s_q = \sum_{p \in \mathcal{N}_q} \lVert \tau_q - \tau_p \rVert^2

    where S are the m vectors of lowest score :math:`s_q`, and :math:`\mathcal{N}_q` the N - f - 2 vectors nearest to
    :math:`\tau_q`.

    Args:
        vectors: N mappings of name -> tensor with the same keys and shapes. Not written to.
        hostile: f, how many of them may be hostile at most; N > 2 f + 2.
        keep: m, how many are averaged; None: N - f. 1 is Krum.
        scale: :math:`\lambda`; 1, as in the source.
        options: as for every rule, see `FusionOptions`. Weights multiply the vectors, before distances are taken.

    Returns:
        The update, a `TaskVector`. Of vectors with equal scores the first ones are taken.

    Raises:
        InputError: too few vectors for `hostile`, or `keep` is not between 1 and N. NonFiniteError: NaN or infinity in
            any vector: distances to it do not exist. Otherwise as `task_arithmetic`.

    Source: Blanchard et al., "Machine learning with adversaries: Byzantine tolerant gradient descent", 2017, sections 4
    and 6.

    Example:
        >>> import torch
        >>> values = [{"w": torch.tensor([value])} for value in (1.0, 2.0, 3.0, 2.5, 1e6)]
        >>> dict(multi_krum(values, 1, keep=3))
        {'w': tensor([2.5000])}
    """
    factor = finite_number(scale, "scale")
    fusion = Fusion(vectors, options)
    scores = _scores(fusion, hostile)
    kept = fusion.count - hostile if keep is None else whole_number(keep, "keep", at_least=1)
    if kept > fusion.count:
        raise InputError(f"keep: expected at most {fusion.count}, the number of vectors, got {kept}")
    best = set(torch.argsort(scores, stable=True)[:kept].tolist())
    share = [factor / kept if index in best else 0.0 for index in range(fusion.count)]
    return weighted_sum(fusion, lambda key: [a * w for a, w in zip(share, fusion.weights(key), strict=True)])


def krum_scores(
    vectors: Iterable[Tensors], hostile: int, *, weights: Weights | None = None, skip: str | Iterable[str] = ()
) -> Tensor:
    r"""How far every vector is from its nearest neighbours.

    .. math:: s_q = \sum_{p \in \mathcal{N}_q} \lVert \tau_q - \tau_p \rVert^2

    Args:
        vectors: N mappings of name -> tensor with the same keys and shapes.
        hostile: f, how many of them may be hostile at most; the N - f - 2 nearest neighbours count, and N > 2 f + 2.
        weights, skip: as in `FusionOptions`.

    Returns:
        ``(N,)`` float64. `multi_krum` averages the vectors ``scores.argsort(stable=True)[:keep]``.

    Raises:
        InputError: too few vectors for `hostile`. NonFiniteError: NaN or infinity in a vector.

    Source: Blanchard et al., "Machine learning with adversaries: Byzantine tolerant gradient descent", 2017, section 4.

    Example:
        >>> import torch
        >>> values = [{"w": torch.tensor([value])} for value in (1.0, 2.0, 3.0, 2.5, 100.0)]
        >>> krum_scores(values, 1).tolist()
        [3.25, 1.25, 1.25, 0.5, 18915.25]
    """
    return _scores(Fusion(vectors, {"weights": weights, "skip": skip}), hostile)


def _scores(fusion: Fusion, hostile: int) -> Tensor:
    hostile = whole_number(hostile, "hostile", at_least=0)
    if fusion.count <= 2 * hostile + 2:
        raise InputError(
            f"hostile: {hostile} hostile vectors can be told from others among {2 * hostile + 3} or more, "
            f"got {fusion.count}"
        )
    distances = squared_distances(fusion)
    distances.fill_diagonal_(torch.inf)
    return distances.sort(dim=1).values[:, : fusion.count - hostile - 2].sum(dim=1)
