"""DELLA: drop entries of the task vectors at random, small ones rather than large ones, then elect signs and fuse."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ..._random import Seed, seed_number
from ..._state import Tensors, finite_number
from ...errors import InputError
from .. import _engine
from .._engine import BLOCK, Fusion, Piece
from .._options import FusionOptions
from .._sources import Source, Spec, sources_of
from ..vector import TaskVector
from ._draws import Draws
from ._pruned import Pruned, first_names, refuse_gradients
from .ties import ties

__all__ = ["della"]

By = Literal["row", "tensor"]
Rescale = Literal["probability", "norm"]

_elect_and_fuse = partial(ties, density=1.0)

LONGEST = 1 << 16  # entries of a row that is ranked again for every piece it reaches into; longer ones are read at once


def della(
    vectors: Iterable[Tensors],
    drop: float = 0.3,
    window: float = 0.14,
    *,
    scale: float | None = None,
    seed: Seed,
    by: By = "row",
    rescale: Rescale = "probability",
    rule: Callable[..., TaskVector] = _elect_and_fuse,
    **options: Any,
) -> TaskVector:
    r"""The fused update of DELLA (drop, elect, fuse): MAGPRUNE, and `rule` of what remains.

    .. math:: \tilde\tau_i = \frac{m_i \tau_i}{1 - p_i}, \qquad m_i \sim \operatorname{Bernoulli}(1 - p_i), \qquad
              p_i = p + \frac{\epsilon}{2} - \epsilon \, \frac{r_i}{n - 1}, \qquad E[\tilde\tau] = \tau

    where :math:`r_i` in 0, ..., n - 1 ranks the magnitudes of a row of n entries, from the smallest to the largest. Of
    equal magnitudes the first in flat order rank lower. A row of one entry is dropped with :math:`p`.

    The draws depend on the seed, the position of the vector, the name and the entry: not on threads, the order of
    names, or which names are skipped; tied names have the same. Nothing is held as a whole, but for ``by="tensor"`` and
    rows of more than 65,536 entries: these are ranked as a whole, a tensor a thread.

    Args:
        vectors: N mappings of name -> tensor with the same keys and shapes. Not written to.
        drop: :math:`p`, the mean probability that an entry is dropped.
        window: :math:`\epsilon`, how much more often the smallest entry of a row is dropped than the largest. Twice
            mergekit's ``epsilon``. 0 is DARE.
        scale: :math:`\lambda`, passed on to `rule`; None: what is usual there.
        seed: an int or a ``torch.Generator``. The same seed gives the same update.
        by: what is ranked. "row": the weights that lead to one output, that is all with the same first index, of
            tensors of two dimensions or more, and vectors as a whole; or each "tensor".
        rescale: by the "probability", as in the formula; or so that each tensor keeps its l1 "norm" (mergekit).
        rule: what fuses the vectors: by default `ties` without trimming, which elects signs and averages what agrees;
            `task_arithmetic` for ``della_linear`` of mergekit; or another.
        options: further arguments of `rule`, those of `FusionOptions` among them. Weights apply after dropping.

    Returns:
        The update, a `TaskVector`.

    Raises:
        InputError: probabilities outside [0, 1), an option that is none, vectors that require gradients, or no vectors.
            Otherwise as `rule`.

    Source: Deep et al., "DELLA-Merging: reducing interference in model merging through magnitude-based sampling", 2024,
    section 3, with the normalisation by n - 1 of the authors' code, for which the mean of :math:`p_i` is p. The
    defaults are those of their example; the paper tunes p, the window and the scale. Their code and mergekit rank a
    convolution along its second dimension alone.

    Example:
        >>> import torch
        >>> vector = {"w": torch.arange(1.0, 7.0)}
        >>> della([vector], 0.5, 0.9, seed=2)["w"]  # of 100 draws 95 keep the 6, as 6 / 0.95, and 5 the 1, as 1 / 0.05
        tensor([0.0000, 8.6957, 0.0000, 6.7797, 6.4935, 6.3158])
    """
    p, width = finite_number(drop, "drop"), finite_number(window, "window")
    if width < 0 or p - width / 2 < 0 or p + width / 2 >= 1:
        raise InputError(
            f"drop, window: expected probabilities drop - window / 2 and drop + window / 2 in [0, 1), got {p:g} and "
            f"{width:g}"
        )
    for argument, value, choices in (("by", by, By), ("rescale", rescale, Rescale)):
        if value not in get_args(choices):
            expected = ", ".join(repr(choice) for choice in get_args(choices))
            raise InputError(f"{argument}: expected one of {expected}, got {value!r}")
    number = seed_number(seed)
    sources: list[Source] = sources_of(vectors, "vectors")
    refuse_gradients(sources)
    if p:
        prune = _MagPrune(number, p, width, by, rescale == "probability")
        pruned = [_Sampled(source, index, prune) for index, source in enumerate(sources)]
        if rescale == "norm":
            survey = FusionOptions(skip=options.get("skip", ()), compute_dtype=options.get("compute_dtype"))
            _restore_norms(Fusion(pruned, survey), pruned)
        sources = list(pruned)
    if scale is not None:
        options["scale"] = scale
    return rule(sources, **options)


class _MagPrune:
    """The probabilities, and the numbers that decide."""

    def __init__(self, seed: int, drop: float, window: float, by: By, rescale: bool) -> None:
        self.least, self.window, self.by, self.rescale = 1 - drop - window / 2, window, by, rescale
        self.draws = Draws(seed, "della", self.least)

    def row(self, spec: Spec) -> int:
        """The number of entries that are ranked together."""
        whole = self.by == "tensor" or len(spec.shape) < 2
        return spec.size if whole else spec.size // max(1, spec.shape[0])

    def keep(self, rows: Tensor) -> Tensor:
        """The probabilities (rows, n) with which entries are kept."""
        n = rows.shape[1]
        if n == 1:
            return torch.full_like(rows, self.least + self.window / 2)
        levels = torch.arange(n, dtype=torch.float64).div_(n - 1).mul_(self.window).add_(self.least)
        levels = levels.to(rows.device, rows.dtype)
        return torch.empty_like(rows).scatter_(1, _order(rows), levels.expand(rows.shape))


def _order(rows: Tensor) -> Tensor:
    """For each row the positions of its entries by magnitude, the smallest first, of equal ones the first."""
    if rows.device.type != "cpu" or rows.dtype != torch.float32:
        return rows.abs().sort(dim=1, stable=True).indices
    both = rows.abs().view(torch.int32).numpy().astype(np.int64)  # bits of positive floats are ordered like these
    both <<= 32
    both |= np.arange(rows.shape[1])
    both.sort(axis=1)
    both &= (1 << 32) - 1
    return torch.from_numpy(both)


class _Sampled(Pruned):
    """A task vector with entries dropped by magnitude at random, and the rest rescaled."""

    def __init__(self, inner: Source, index: int, prune: _MagPrune) -> None:
        super().__init__(inner)
        self.index, self.prune = index, prune
        self._name = first_names(inner)
        self.factors: dict[str, float] = {}  # of tensors that get their norm back
        self._of_thread = threading.local()

    def sliceable(self, key: str) -> bool:
        return self.inner.sliceable(key) and self.prune.row(self.specs[key]) <= LONGEST

    def read(self, key: str, start: int, stop: int, buffer: Tensor) -> Tensor:
        n = self.prune.row(self.specs[key])
        if start == stop:
            return buffer
        first, last = start // n * n, -(-stop // n) * n
        if (first, last) == (start, stop):
            return self.pruned(key, start, self.inner.read(key, start, stop, buffer), buffer)
        around = self._space(last - first, buffer)
        whole = self.pruned(key, first, self.inner.read(key, first, last, around), around)
        return buffer.copy_(whole[start - first : stop - first])

    def pruned(self, key: str, start: int, part: Tensor, buffer: Tensor) -> Tensor:
        """As everywhere; `part` is of whole rows."""
        n = self.prune.row(self.specs[key])
        step = n * max(1, BLOCK // n)
        for at in range(0, len(part), step):
            values, left = part[at : at + step], buffer[at : at + step]
            keep = self.prune.keep(values.view(-1, n)).view(-1)
            begin = start + at
            for here, draws in self.prune.draws.over(self.index, self._name[key], begin, begin + len(values), buffer):
                kept = torch.lt(draws, keep[here]).to(buffer.dtype)
                # not where(): 0 times infinity is NaN, for which the vector can be blamed
                torch.mul(values[here], kept.div_(keep[here]) if self.prune.rescale else kept, out=left[here])
        factor = self.factors.get(key, 1.0)
        return buffer if factor == 1 else buffer.mul_(factor)

    def _space(self, length: int, like: Tensor) -> Tensor:
        found = getattr(self._of_thread, "space", None)
        if found is None or len(found) < length or found.dtype != like.dtype or found.device != like.device:
            found = self._of_thread.space = torch.empty(length, dtype=like.dtype, device=like.device)
        return found[:length]


def _restore_norms(fusion: Fusion, sources: Sequence[_Sampled]) -> None:
    """From now on every tensor is scaled to the l1 norm that it has before dropping, unless nothing of it is left."""

    def look(piece: Piece) -> tuple[str, Tensor]:
        found = []
        for source, part in zip(sources, piece.parts, strict=True):
            given = source.inner.read(piece.key, piece.start, piece.stop, piece.spare(0, len(piece)))
            found.append(torch.stack([_sizes(given), _sizes(part)]))
        sums = torch.stack(found).cpu().double()
        if not torch.isfinite(sums).all():
            raise fusion.blame(piece.key)
        return piece.key, sums

    parts: dict[str, list[Tensor]] = {}
    for key, sums in fusion.survey(look, weighted=False):
        parts.setdefault(key, []).append(sums)
    for key, found in parts.items():
        names = [key, *(name for name, original in fusion.alias.items() if original == key)]
        for source, (before, after) in zip(sources, torch.cat(found, dim=-1).tolist(), strict=True):
            if any(after):  # added up exactly, so that the order does not matter
                source.factors |= dict.fromkeys(names, math.fsum(before) / math.fsum(after))


def _sizes(part: Tensor) -> Tensor:
    """The l1 norms of chunks, which are the same ones whether a tensor is read in pieces or as a whole."""
    longest = min(1 << 15, _engine.PIECE) if part.device.type == "cpu" else min(1 << 20, _engine.PIECE_ON_DEVICE)
    return torch.stack([chunk.abs().sum() for chunk in part.split(longest)])
