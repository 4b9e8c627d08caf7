"""RegMean: linear layers whose outputs are, in the mean over all tasks' inputs, closest to those of each task's own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import Literal, get_args

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..._sharded import full
from ..._state import Tensors, all_finite, finite_number, quoted
from ...errors import InputError, NonFiniteError, NotPSDError, StateMismatchError
from .._engine import Fusion, Piece
from .._options import FusionOptions
from ..vector import TaskVector
from ._statistics import listed

__all__ = ["regmean"]

Unseen = Literal["average", "base"]

FLAT = 1e-3  # of 1 - alpha: below it Gram matrices may be singular
FLOAT32 = 1e4  # condition for which products in float32 err by less than 1e-4 in the end: measured, some 3e-9 of it


def regmean(
    vectors: Iterable[Tensors],
    grams: Iterable[Tensors],
    alpha: float = 0.9,
    *,
    unseen: Unseen = "average",
    scale: float = 1.0,
    **options: Unpack[FusionOptions],
) -> TaskVector:
    r"""The fused update of RegMean: for every linear layer the least squares fit to the tasks' own outputs.

    .. math:: \tau = \lambda \Big( \sum_q w_q \tau_q \tilde G_q \Big) \Big( \sum_q w_q \tilde G_q \Big)^{-1}, \qquad
              \tilde G_q = \alpha G_q + (1 - \alpha) \operatorname{diag} G_q, \qquad
              G_q = \frac{1}{n_q} \sum_{t=1}^{n_q} x_{q,t} x_{q,t}^T

    for a weight (outputs, inputs), where :math:`x_{q,t}` are the inputs of the layer in task q. With :math:`\alpha = 1`
    it minimises :math:`\sum_q w_q \operatorname{mean}_t \|(\theta_0 + \tau) x_{q,t} - (\theta_0 + \tau_q)
    x_{q,t}\|^2`. What has no Gram matrices (biases, norms, embeddings) is averaged, :math:`\tau = \lambda \sum_q w_q
    \tau_q / \sum_q w_q`.

    Where no task has inputs (features that are always 0; with :math:`\alpha = 1` also directions) the fit leaves the
    weights open. The average is then what Gram matrices with a small multiple of the identity give, as its limit.

    Args:
        vectors: N mappings of name -> tensor with the same keys and shapes. Not written to.
        grams: for each vector the Gram matrices of the inputs, `input_grams` of the fine-tuned model: name of a weight
            -> (n, n), where n is the number of entries of a row of the weight (of a convolution: of an unfolded patch);
            or (b, n, n), one for each of b equal blocks of rows. Tied names need one entry; names that are not fused do
            not matter.
        alpha: :math:`\alpha` in [0, 1], by which all but the diagonals is multiplied. .9, as in the paper (.1 for T5).
        unseen: the "average" there, or the "base": the smallest change.
        scale: :math:`\lambda`, 1 for the fit itself.
        options: as for every rule, see `FusionOptions`. Weights are the :math:`w_q` of the fit and of averages, at
            least 0.

    Returns:
        The update, a `TaskVector`. Within 1e-4 (relative, a tensor's Frobenius norm) of an exact calculation, and 1e-9
        with ``compute_dtype=torch.float64``, if the Gram matrices are.

    Raises:
        InputError: an `alpha` outside [0, 1], an option that is none, negative weights or none that is positive, or
        Gram matrices for nothing that is fused. NotPSDError: a Gram matrix that is none. ShapeError: not one mapping
        for each vector. StateMismatchError: keys or shapes disagree, or only some tasks have a Gram matrix for a name.
        NonFiniteError: NaN or infinity.

    Note:
        Memory beside vectors and Gram matrices: three float64 matrices (n, n) a thread.

    Source: Jin et al., "Dataless knowledge fusion by merging weights of language models", 2023, eq. 2 and section 3.3.

    Example:
        >>> import torch
        >>> vectors = [{"w": torch.tensor([[1.0, 1.0]])}, {"w": torch.tensor([[3.0, 5.0]])}]
        >>> grams = [{"w": torch.diag(torch.tensor([1.0, 0.0]))}, {"w": torch.diag(torch.tensor([1.0, 1.0]))}]
        >>> regmean(vectors, grams)["w"]  # both see the first input, only the second task the other one
        tensor([[2., 5.]])
    """
    fusion = Fusion(vectors, options)
    fits = Fits(fusion, alpha, unseen, scale)
    found = checked_grams(fusion, grams)
    return fusion.by_matrix(
        lambda key, parts: fits.of(key, parts, found[key]), fits.average, keys=found, weighted=False
    )


class Fits:
    """The fits of linear layers, and averages for all else, to unweighted parts."""

    def __init__(self, fusion: Fusion, alpha: float, unseen: Unseen, scale: float) -> None:
        self.factor, self.alpha, self.unseen = finite_number(scale, "scale"), finite_number(alpha, "alpha"), unseen
        if not 0 <= self.alpha <= 1:
            raise InputError(
                f"alpha: expected a share in [0, 1], where 1 keeps all of the Gram matrices, got {self.alpha:g}"
            )
        if unseen not in get_args(Unseen):
            raise InputError(f"unseen: expected 'average' or 'base', got {unseen!r}")
        self.shares: dict[str, list[float]] = {}
        for key in fusion.keys:
            weights = fusion.weights(key)
            if min(weights) < 0 or max(weights) == 0:
                raise InputError(f"weights: expected at least 0, and one above, for {key!r}, got {weights}")
            self.shares[key] = [weight / sum(weights) for weight in weights]

    def of(self, key: str, parts: Sequence[Tensor], grams: Sequence[Tensor]) -> Tensor:
        """The update of a weight for N parts and Gram matrices (b, n, n)."""
        grams = [gram.to(parts[0].device) for gram in grams]
        blocks, n, _ = grams[0].shape
        rows = [part.reshape(blocks, -1, n) for part in parts]
        found = [
            _fit([row[i] for row in rows], [gram[i] for gram in grams], self.shares[key], self.alpha, self.unseen)
            for i in range(blocks)
        ]
        return torch.cat(found).reshape(parts[0].shape).to(parts[0].dtype).mul_(self.factor)

    def average(self, piece: Piece) -> None:
        """The update of anything else."""
        into = piece.into.zero_()
        for part, weight in zip(piece.parts, self.shares[piece.key], strict=True):
            into.add_(part, alpha=self.factor * weight)


def _fit(
    parts: Sequence[Tensor], grams: Sequence[Tensor], weights: Sequence[float], alpha: float, unseen: Unseen
) -> Tensor:
    """(m, n) in float64: the fit for N parts (m, n) and Gram matrices (n, n)."""
    total = torch.zeros_like(grams[0], dtype=torch.float64)
    diagonal = torch.zeros_like(total[0])
    for gram, weight in zip(grams, weights, strict=True):
        total.add_(gram, alpha=alpha * weight)
        diagonal.add_(gram.diagonal(), alpha=weight)
    total.diagonal().copy_(diagonal)
    if 1 - alpha < FLAT:
        center = torch.zeros_like(parts[0], dtype=torch.float64)
        if unseen == "average":
            center = _average(parts, weights)
        moments = _moments([part - center for part in parts], grams, weights, alpha, torch.float64)
        return center.add_(_by_eigenvectors(moments, total, torch.finfo(grams[0].dtype).eps))
    # with a unit diagonal no eigenvalue is below 1 - alpha
    root = torch.where(diagonal > 0, diagonal.rsqrt(), 0.0)
    total.mul_(root[:, None]).mul_(root)
    total.diagonal().copy_(torch.ones_like(diagonal))  # a feature that is always 0 has no moments either
    condition = float(torch.linalg.matrix_norm(total)) / (1 - alpha)
    dtype = parts[0].dtype if condition < FLOAT32 else torch.float64
    first = next(index for index, weight in enumerate(weights) if weight)
    others = [index for index, weight in enumerate(weights) if weight and index > first]
    apart = [parts[index].to(dtype) - parts[first].to(dtype) for index in others]  # one product less than from 0
    moments = _moments(apart, [grams[i] for i in others], [weights[i] for i in others], alpha, dtype)
    factor, failed = torch.linalg.cholesky_ex(total)
    if int(failed):
        raise NotPSDError("grams: one is not positive semi-definite; expected means of x x^T")
    fit = parts[first].double()
    if others:
        fit = fit + torch.cholesky_solve(moments.double().mul_(root).mT, factor).mT.mul_(root)
    never = diagonal <= 0
    if bool(never.any()):
        columns = [part[:, never] for part in parts]
        fit = fit.clone()
        fit[:, never] = _average(columns, weights) if unseen == "average" else 0.0
    return fit


def _average(parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    mean = torch.zeros_like(parts[0], dtype=torch.float64)
    for part, weight in zip(parts, weights, strict=True):
        mean.add_(part, alpha=weight)
    return mean


def _moments(
    parts: Sequence[Tensor], grams: Sequence[Tensor], weights: Sequence[float], alpha: float, dtype: torch.dtype
) -> Tensor:
    """(m, n): the sum of the parts times their Gram matrices."""
    moments = parts[0].new_zeros(parts[0].shape, dtype=dtype) if parts else torch.zeros(0, dtype=dtype)
    for part, gram, weight in zip(parts, grams, weights, strict=True):
        own = gram.to(dtype)
        moments.addmm_(part, own, alpha=alpha * weight)
        moments.addcmul_(part, own.diagonal(), value=(1 - alpha) * weight)
    return moments


def _by_eigenvectors(moments: Tensor, total: Tensor, precision: float) -> Tensor:
    """The shortest X with ``X total = moments``, for a `total` that may be singular but for rounding."""
    eigenvalues, V = torch.linalg.eigh(total)
    least = float(eigenvalues[-1]) * len(total) * precision
    if float(eigenvalues[0]) < -least:
        raise NotPSDError("grams: one is not positive semi-definite; expected means of x x^T")
    inverse = torch.where(eigenvalues > least, 1 / eigenvalues, 0.0)
    return (moments @ V).mul_(inverse) @ V.mT


def checked_grams(fusion: Fusion, grams: Iterable[Tensors], *, expected: bool = True) -> dict[str, list[Tensor]]:
    """Name -> for each vector its Gram matrices (b, n, n), for names that have some; `expected`: an error for none."""
    given = listed(grams, "grams", fusion.count)
    twins = {key: [key] for key in fusion.keys}
    for name, key in fusion.alias.items():
        twins[key].append(name)
    found: dict[str, list[Tensor]] = {}
    for key, names in twins.items():
        shape = fusion.specs[key].shape
        own = [next((each[name] for name in names if name in each), None) for each in given]
        here = [gram for gram in own if gram is not None]
        if here and len(here) < len(own):
            index = next(index for index, gram in enumerate(own) if gram is None)
            raise StateMismatchError(f"grams[{index}] lacks {key!r}, which others have; give all, or skip it")
        if here:
            found[key] = [_block(gram, shape, f"grams[{index}][{key!r}]") for index, gram in enumerate(here)]
            if len({gram.shape for gram in found[key]}) > 1:
                raise StateMismatchError(f"grams: have different numbers of blocks for {key!r}")
    if expected and not found:
        raise InputError(
            f"grams: name nothing that is fused; they have {quoted(given[0])}, the vectors {quoted(fusion.keys)}"
        )
    return found


def _block(gram: object, shape: tuple[int, ...], label: str) -> Tensor:
    if not isinstance(gram, Tensor) or not gram.is_floating_point():
        kind = gram.dtype if isinstance(gram, Tensor) else type(gram).__name__
        raise TypeError(f"{label}: expected a floating-point tensor, got {kind}")
    n = prod(shape[1:])
    blocks = full(gram.detach())
    blocks = blocks[None] if blocks.ndim == 2 else blocks
    if len(shape) < 2 or blocks.ndim != 3 or blocks.shape[1:] != (n, n) or not len(blocks) or shape[0] % len(blocks):
        raise StateMismatchError(
            f"{label} has shape {tuple(gram.shape)}; expected ({n}, {n}) for a weight {shape}, or as many for each of "
            "several equal blocks of rows"
        )
    if not all_finite(blocks):
        raise NonFiniteError(f"{label} holds non-finite entries; expected finite numbers")
    if bool((blocks.diagonal(dim1=-2, dim2=-1) < 0).any()):
        raise NotPSDError(f"{label} has negative entries on its diagonal; expected a mean of x x^T")
    return blocks if blocks.dtype in (torch.float32, torch.float64) else blocks.float()
