"""Essential subspace merging: of every task the directions in which its update moves a layer's outputs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from statistics import fmean

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..._state import Tensors, finite_number
from ...errors import InputError
from .._engine import Fusion, Piece
from .._options import FusionOptions
from ..vector import TaskVector
from ._interim import interim, part_of
from ._joined import COINCIDENT
from ._spectral import averaged, leading, polar, rounding_level, scaled
from .regmean import checked_grams
from .tsv import separated

__all__ = ["essential_subspace"]


def essential_subspace(
    vectors: Iterable[Tensors],
    grams: Iterable[Tensors],
    *,
    power: float = 2.0,
    weighting: float = 0.0,
    scale: float = 1.0,
    **options: Unpack[FusionOptions],
) -> TaskVector:
    r"""The fused update of essential subspace merging (ESM).

    .. math::
        \tau = \lambda\, \beta\, \bar\sigma_E \bar\sigma_C\, \operatorname{polar}[E_1 \cdots E_N]\,
               \operatorname{polar}{\begin{bmatrix} s_1 C_1 \\ \vdots \\ s_N C_N \end{bmatrix} D}, \qquad
        C_q = E_q^T \tau_q

    roughly, for the weight (m, n) of a linear layer. The columns of :math:`E_q` are the k = m / N leading eigenvectors
    of :math:`\tau_q G_q \tau_q^T`, the second moments of what the update adds to the layer's outputs, where :math:`G_q`
    are those of its inputs in task q; polar is the nearest matrix with orthonormal columns or rows, and
    :math:`\bar\sigma` the mean singular value of the matrix that it is taken of. Three scalings make the strong
    stronger, each to the power p:

    - :math:`s_q = (\|C_q\| / \operatorname{mean}_t \|C_t\|)^p`, of a task by its norm;
    - :math:`D_{jj} = (\|c_j\| / \operatorname{mean}_i \|c_i\|)^p`, of an input by the norm of its column of the joined
      C, before the polar factor is taken of it;
    - :math:`\beta`, of a layer by the norm of its update over the mean of that of all layers whose names differ from
      its own in numbers only.

    Matrices without Gram matrices are merged as `tsv` does, tensors that are no matrices are averaged.

    Args:
        vectors: N mappings of name -> tensor with the same keys and shapes. Not written to.
        grams: for each vector the Gram matrices of the inputs, `input_grams` of the fine-tuned model, as for `regmean`.
            Some 32 unlabelled samples are enough in the source. Blocks of rows that see inputs of their own are merged
            apart.
        power: p, 2 in the source; 0: no scaling.
        weighting: by this power of its eigenvalue over their mean every direction counts more in :math:`E_q` and
            :math:`C_q` (normalised to a mean of 1): 0 in the first paper, 0.15 in the extended one's code.
        scale: :math:`\lambda`, of the averages too; the source tunes it on held-out data.
        options: as for every rule, see `FusionOptions`. Weights multiply the vectors.

    Returns:
        The update, a `TaskVector`. Memory: one vector more than the result.

    Raises:
        InputError: `power` or `weighting` is negative; otherwise as `regmean`.

    Source: Li et al., "Model merging in the essential subspace", 2026, and its extension "Essential subspace merging
    for multi-task learning", 2026. What the first one's text leaves open is as in the authors' code: moments about 0
    and not about the mean, the mean singular values, and the order of the scalings. Other than there, the norm of a
    task is that of what is kept of it (the text), the layers' types are told by their names, and a constant factor of 2
    is left to `scale`.

    Example:
        >>> import torch
        >>> vectors = [{"w": torch.diag(torch.tensor([2.0, 1.0]))}, {"w": torch.diag(torch.tensor([1.0, 2.0]))}]
        >>> seen = [{"w": torch.diag(torch.tensor([1.0, 0.0]))}, {"w": torch.diag(torch.tensor([0.0, 1.0]))}]
        >>> essential_subspace(vectors, seen)["w"]  # each task keeps what its inputs feel
        tensor([[2., 0.],
                [0., 2.]])
    """
    factor, p, lift = (
        finite_number(value, name) for value, name in ((scale, "scale"), (power, "power"), (weighting, "weighting"))
    )
    for value, name in ((p, "power"), (lift, "weighting")):
        if value < 0:
            raise InputError(f"{name}: expected a number that is not negative, got {value:g}")
    fusion = Fusion(vectors, options)
    found = checked_grams(fusion, grams)
    others = [key for key in fusion.keys if len(fusion.specs[key].shape) == 2 and key not in found]
    lengths: dict[str, float] = {}

    def matrix(key: str, parts: list[Tensor]) -> Tensor:
        if key in found:
            blocks = [gram.to(parts[0].device) for gram in found[key]]
            rows = [part.reshape(len(blocks[0]), -1, blocks[0].shape[-1]) for part in parts]
            merged = [
                _merged([row[index] for row in rows], [gram[index] for gram in blocks], p, lift)
                for index in range(len(blocks[0]))
            ]
            update = torch.cat(merged).reshape(parts[0].shape)
        else:
            update = separated(parts, 1.0)
        lengths[key] = float(torch.linalg.vector_norm(update, dtype=torch.float64))
        return update

    merged = interim(fusion, options).by_matrix(matrix, averaged(fusion.count, 1.0), keys=[*found, *others])
    kinds: dict[str, list[float]] = {}
    for key in sorted(lengths):
        kinds.setdefault(_kind(key), []).append(lengths[key])

    def polarise(piece: Piece) -> None:
        length, share = lengths.get(piece.key, 0.0), factor
        if length:
            share *= (length / fmean(kinds[_kind(piece.key)])) ** p
        torch.mul(part_of(merged, piece), share, out=piece.into)

    return fusion.by_entry(polarise, positional=True)


def _kind(key: str) -> str:
    """The name without its numbers: the same for the same weight of all blocks."""
    return re.sub(r"\d+", "#", key)


def _merged(parts: list[Tensor], grams: list[Tensor], power: float, weighting: float) -> Tensor:
    """(m, n), of matrices (m, n) and Gram matrices (n, n)."""
    dtype, most = parts[0].dtype, max(1, parts[0].shape[0] // len(parts))
    parts, unit = scaled(parts)
    bases, coordinates = [], []
    for part, gram in zip(parts, grams, strict=True):
        E, eigenvalues = _essential(part, gram, most)
        C = E.mT @ part.double()
        if weighting and len(eigenvalues):
            weights = (eigenvalues / eigenvalues.mean()).pow(weighting)
            weights /= weights.mean()
            E, C = E * weights, C * weights[:, None]
        bases.append(E)
        coordinates.append(C)
    if power:
        norms = [float(torch.linalg.matrix_norm(C)) for C in coordinates]
        coordinates = [
            C * (norm / fmean(norms)) ** power if norm else C for C, norm in zip(coordinates, norms, strict=True)
        ]
    E, C = torch.cat(bases, 1), torch.cat(coordinates)
    if not E.shape[1]:
        return torch.zeros_like(parts[0])
    if power:
        columns = torch.linalg.vector_norm(C, dim=0)
        C = C * (columns / columns.mean().clamp_min(torch.finfo(C.dtype).tiny)).pow(power)
    left, lengths = polar(E, COINCIDENT, dtype)
    right, widths = polar(C.mT, rounding_level([C.to(dtype)]), dtype)
    update = left.times(right.whole().to(left.pairs[0][0].dtype).mT).to(dtype)
    return update.mul_(unit * float(lengths.mean() * widths.mean()))


def _essential(part: Tensor, gram: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` leading eigenvectors (m, k) of ``part gram part^T`` and their eigenvalues, without those that are 0.

    Rounding of the Gram matrix makes some up, which are left out.
    """
    m, n = part.shape
    precision = max(m, n) * torch.finfo(gram.dtype).eps
    part, gram = part.double(), gram.double()
    if m <= n:
        eigenvalues, E = torch.linalg.eigh(part @ gram @ part.mT)
        eigenvalues, E = eigenvalues.flip(0)[:count], E.flip(1)[:, :count]
        seen = eigenvalues > precision * eigenvalues[:1].clamp_min(0)
        return E[:, seen], eigenvalues[seen]
    values, Q = torch.linalg.eigh(gram)
    seen = values > precision * values[-1:].clamp_min(0)
    image = part @ (Q[:, seen] * values[seen].sqrt())  # whose product with its transpose it is
    if not image.shape[1]:
        return part[:, :0], values[:0]
    E, s, _ = leading(image, count, rounding_level([image]), torch.float64)
    return E, s.square()
