"""WIDEN: columns count by how far their length and their direction have moved from the base model's."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from math import fsum

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..._state import StateLike, Tensors, all_finite, as_state, finite_number, select_names
from ...errors import InputError, NonFiniteError
from .._engine import Fusion, Piece
from .._options import FusionOptions
from ..vector import TaskVector
from ._companion import companion

__all__ = ["widen"]

ROWS = 384  # whose float64 copies stay in the cache


def widen(
    vectors: Iterable[Tensors],
    base: StateLike,
    *,
    ratio: float = 1.0,
    calibration: float = 1.0,
    by_row: str | Iterable[str] = (),
    scale: float = 1.0,
    **options: Unpack[FusionOptions],
) -> TaskVector:
    r"""The fused update of WIDEN: each column of each task weighted by how much fine-tuning moved it.

    .. math::
        \tau_{:j} = \lambda \sum_{q=1}^N \tfrac12 \big(s^m_{qj} + s^d_{qj}\big) \, \tau_{q,:j}, \qquad
        s_{qj} = \begin{cases} c & r_{qj} > t \, \bar r_q \\ e^{r_{qj}} / \sum_p e^{r_{pj}} & \text{else} \end{cases}

    for each matrix (m, n), where :math:`r_{qj} \in \{0, 1/n, \dots, (n-1)/n\}` is the rank of column j among those of
    task q, once by the change of its length, :math:`|\, \|\theta_{q,:j}\| - \|\theta_{0,:j}\| \,|` (for :math:`s^m`),
    and once by the change of its direction, :math:`1 - \cos(\theta_{q,:j}, \theta_{0,:j})` (for :math:`s^d`), with
    :math:`\theta_q = \theta_0 + \tau_q`; :math:`\bar r_q` is the mean over the columns. What is important to a task is
    thus taken over as it is, and the tasks share the rest. Ranks make tasks comparable that moved by very different
    amounts. Entries of tensors that are no matrices are weighted alike, with :math:`r = |\tau_q|` itself.

    Args:
        vectors: N mappings of name -> tensor with the same keys and shapes. Not written to.
        base: :math:`\theta_0`: a module, a state dict or the path of a checkpoint. It may hold more than the
            vectors. For ``fuse`` and ``fuse_files`` bind it: ``partial(widen, base=base)``.
        ratio: t, at least 0: how far above the mean importance begins; 1, as in the source.
        calibration: c, the weight of what is important; 1, as in the source.
        by_row: names or globs of matrices whose rows take the place of columns: embedding tables (a row is a token) and
            layers that store (in, out) like GPT-2's. In the weight of a linear layer a column is an input.
        scale: :math:`\lambda`; 1, as in the source.
        options: as for every rule, see `FusionOptions`. Weights multiply the vectors, before anything is ranked.

    Returns:
        The update, a `TaskVector`. One vector comes back as it is. Columns that moved equally far are ranked in their
        order, as the authors' code does. The direction of a column that is 0 in one of the two models has changed by 1,
        in both by 0. Changes are calculated in float64 from the vectors, in which fine-tuning's small ones do not drown
        in rounding. Memory: N + 2 matrices a thread.

    Raises:
        InputError: `ratio` is negative, a name in `by_row` that matches nothing, or a number that is not finite.
        StateMismatchError: keys or shapes disagree, or the base lacks one. NonFiniteError: NaN or infinity in a vector
            or in the base's part of it.

    Source: Yu et al., "Extend model merging from fine-tuned to pre-trained large language models via weight
    disentanglement", 2024, and the authors' code for vectors, ties and defaults.

    Example:
        >>> import torch
        >>> base = {"w": torch.ones(2, 2)}
        >>> a = {"w": torch.tensor([[0.1, 2.0], [0.1, -2.0]])}  # the second column moved most
        >>> b = {"w": torch.tensor([[4.0, 0.2], [0.0, -0.2]])}  # the first
        >>> widen([a, b], base)["w"]  # the other task's comes in with its share of a softmax, 0.378
        tensor([[ 4.0378,  2.0755],
                [ 0.0378, -2.0755]])
    """
    numbers = {"ratio": ratio, "calibration": calibration, "scale": scale}
    ratio, calibration, factor = (finite_number(value, argument) for argument, value in numbers.items())
    if ratio < 0:
        raise InputError(f"ratio: expected a number of at least 0, got {ratio:g}")
    fusion = Fusion(vectors, options)
    turned = {fusion.alias.get(key, key) for key in select_names([*fusion.keys, *fusion.alias], by_row, "by_row")}
    state = as_state(base, "base")
    origin = companion({key: state[key] for key in fusion.sources[0].specs if key in state}, "base", fusion)

    def scores(importance: Tensor, high: Tensor) -> Tensor:
        """The weights (N, ...) of what is so important, and high or not."""
        return _softmax(importance).masked_fill_(high, calibration)

    def matrix(key: str, parts: list[Tensor]) -> Tensor:
        before = origin.whole(key, parts[0].dtype, parts[0].device)
        if not all_finite(before):
            raise NonFiniteError(f"base[{key!r}] holds non-finite entries; expected finite numbers, or skip it")
        if key in turned:
            before, parts = before.mT, [part.mT for part in parts]
        length, direction = _changes(before, parts)
        columns = before.shape[1]
        weights = torch.zeros_like(length)
        for change in (length, direction):
            places = _places(change)  # n times the ranks: whole numbers, that compare exactly
            weights += scores(places / columns, places > ratio * (columns - 1) / 2)
        weights = weights.mul_(0.5 * factor).to(parts[0].dtype)
        update = parts[0] * weights[0]
        for part, weight in zip(parts[1:], weights[1:], strict=True):
            update.addcmul_(part, weight)
        return update.mT if key in turned else update

    others = [key for key in fusion.keys if len(fusion.specs[key].shape) != 2 and fusion.specs[key].size]
    means = _means(fusion, others)

    def otherwise(piece: Piece) -> None:
        values = torch.stack(piece.parts)
        size = values.abs()
        mean = torch.tensor(means[piece.key], dtype=torch.float64, device=size.device)[:, None]
        piece.into.zero_()
        for weight, value in zip(scores(size, size > ratio * mean), values, strict=True):
            piece.into.addcmul_(weight, value)
        piece.into.mul_(factor)

    return fusion.by_matrix(matrix, otherwise)


def _softmax(x: Tensor) -> Tensor:
    """Over the first dimension. torch's own rounds otherwise where a piece ends."""
    x = (x - x.amax(0)).exp_()
    total = x[0].clone()
    for row in x[1:]:
        total += row
    return x.div_(total)


def _changes(before: Tensor, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """How far the length and the direction of each column moved, (N, n) each, in float64.

    Both are differences of nearly equal numbers, and written without these: for a column b that became b + d,
    ``|b + d| - |b| = (2 b.d + d.d) / (|b + d| + |b|)``, and the squared sine is ``(|b|^2 |d|^2 - (b.d)^2) / (|b|^2 |b +
    d|^2)``.
    """
    columns = before.shape[1]
    bb = before.new_zeros(columns, dtype=torch.float64)
    bd, dd = (before.new_zeros(len(parts), columns, dtype=torch.float64) for _ in range(2))
    for start in range(0, len(before), ROWS):
        b = before[start : start + ROWS].double()
        bb += b.square().sum(0)
        for part, crossed, squares in zip(parts, bd, dd, strict=True):
            d = part[start : start + ROWS].double()
            crossed += (b * d).sum(0)
            squares += d.square().sum(0)
    aa = (bb + 2 * bd + dd).clamp_min(0)
    sizes = aa.sqrt() + bb.sqrt()
    length = ((2 * bd + dd) / sizes.masked_fill(sizes == 0, 1.0)).abs()
    product = aa * bb
    nowhere = product == 0
    product = product.masked_fill_(nowhere, 1.0)
    cosine = (bb + bd) / product.sqrt()
    sine = ((bb * dd - bd.square()) / product).clamp_min(0)  # squared
    direction = torch.where(cosine > 0, sine / (1 + cosine), 1 - cosine)
    return length, torch.where(nowhere, (sizes > 0).double(), direction)


def _places(changes: Tensor) -> Tensor:
    """For each entry, how many of its row are smaller, or equal and before it; in float64."""
    order = changes.argsort(dim=1, stable=True)
    places = torch.arange(changes.shape[1], dtype=torch.float64, device=changes.device)
    return torch.empty_like(changes).scatter_(1, order, places.expand_as(changes))


def _means(fusion: Fusion, keys: Sequence[str]) -> dict[str, list[float]]:
    """Name -> the mean magnitude of each vector's entries."""

    def look(piece: Piece) -> tuple[str, list[float]]:
        return piece.key, [float(part.abs().sum(dtype=torch.float64)) for part in piece.parts]

    found: dict[str, list[list[float]]] = defaultdict(list)
    for key, sums in fusion.survey(look, keys=keys):
        found[key].append(sums)
    sizes = {key: fusion.specs[key].size for key in keys}
    return {key: [fsum(sums) / sizes[key] for sums in zip(*rows, strict=True)] for key, rows in found.items()}
