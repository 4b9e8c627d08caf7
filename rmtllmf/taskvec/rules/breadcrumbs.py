"""Model Breadcrumbs: of every tensor neither the smallest nor the very largest entries, then another rule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..._state import Tensors, finite_number
from ...errors import InputError
from .._engine import BLOCK, Fusion
from .._options import FusionOptions
from .._sources import Source, sources_of
from ..vector import TaskVector
from ._marks import Mark, marks
from ._pruned import Pruned, refuse_gradients
from ._shares import floor_of
from .arithmetic import task_arithmetic

__all__ = ["breadcrumbs"]


def breadcrumbs(
    vectors: Iterable[Tensors],
    smallest: float = 0.85,
    largest: float = 0.007,
    *,
    scale: float | None = None,
    rule: Callable[..., TaskVector] = task_arithmetic,
    **options: Any,
) -> TaskVector:
    r"""The fused update of Model Breadcrumbs: negligible entries and outliers set to zero, and `rule` of what remains.

    .. math:: \tau = \lambda \sum_{q=1}^{N} m_q \odot \tau_q, \qquad
              m_q = \big[ \beta\text{-quantile of } |\tau_q| < |\tau_q| < \gamma\text{-quantile of } |\tau_q| \big]

    with quantiles of each tensor by itself. Of its n entries exactly ``floor(smallest n)`` and ``floor(largest n)`` are
    removed; of equal magnitudes the first in flat order count as the larger ones. So nothing of a single number is
    removed, and no outlier from a tensor of less than ``1 / largest`` entries.

    Args:
        vectors: N mappings of name -> tensor with the same keys and shapes. Not written to.
        smallest: :math:`\beta` in [0, 1), the share of entries that are removed from below.
        largest: :math:`1 - \gamma` in [0, 1), the share of entries that are removed from above.
        scale: passed on to `rule`; None: what is usual there.
        rule: what fuses what remains: `task_arithmetic` as in the source, or another. ``breadcrumbs_ties`` of mergekit
            elects signs but does not trim any more: ``rule=ties, density=1.0``.
        options: further arguments of `rule`, those of `FusionOptions` among them. Weights apply after the removal.

    Returns:
        The update, a `TaskVector`. The vectors are read three times and nothing is held as a whole.

    Raises:
        InputError: shares outside [0, 1) or that leave nothing, vectors that require gradients, or no vectors.
            Otherwise as `rule`.

    Source: Davari and Belilovsky, "Model Breadcrumbs: scaling multi-task model merging with sparse masks", 2024,
    section 3. Both shares, like the scale, are tuned there on held-out data; the authors' search starts with 15 % kept
    and 0.6 % removed from above, and their code counts in each row (along the last dimension). mergekit counts in each
    tensor, as here: its ``gamma`` is `largest`, its ``density`` is ``1 - smallest - largest``.

    Example:
        >>> import torch
        >>> a = {"w": torch.tensor([0.1, 9.0, 0.2, 0.3, -1.0])}
        >>> b = {"w": torch.tensor([2.0, 0.1, 0.3, -8.0, 0.2])}
        >>> dict(breadcrumbs([a, b], smallest=0.4, largest=0.2, scale=1.0))  # without 9, -8 and each one's two smallest
        {'w': tensor([ 2.0000,  0.0000,  0.3000,  0.3000, -1.0000])}
    """
    below, above = (_share(value, name) for value, name in ((smallest, "smallest"), (largest, "largest")))
    if below + above >= 1:
        raise InputError(f"smallest, largest: {below:g} and {above:g} of the entries are removed, which leaves nothing")
    sources: list[Source] = sources_of(vectors, "vectors")
    refuse_gradients(sources)
    if below or above:
        survey = FusionOptions(skip=options.get("skip", ()), compute_dtype=options.get("compute_dtype"))
        sources = _between(Fusion(sources, survey), sources, below, above)
    if scale is not None:
        options["scale"] = scale
    return rule(sources, **options)


def _share(value: float, argument: str) -> float:
    share = finite_number(value, argument)
    if not 0 <= share < 1:
        raise InputError(f"{argument}: expected a share in [0, 1), got {share:g}")
    return share


def _between(fusion: Fusion, sources: Sequence[Source], below: float, above: float) -> list[Source]:
    fusion.lengthen(4)
    lower = marks(fusion, lambda size: size - floor_of(below, size)) if below else {}
    upper = marks(fusion, lambda size: floor_of(above, size))
    for known in (lower, upper):
        known |= {key: known[original] for key, original in fusion.alias.items() if original in known}
    return [
        _Between(source, *({key: row[index] for key, row in known.items()} for known in (lower, upper)))
        for index, source in enumerate(sources)
    ]


class _Between(Pruned):
    """What lies above the lower marks and not above the upper ones; names without a mark are not cut there."""

    def __init__(self, inner: Source, lower: Mapping[str, Mark], upper: Mapping[str, Mark]) -> None:
        super().__init__(inner)
        self.lower, self.upper = lower, upper

    def pruned(self, key: str, start: int, part: Tensor, buffer: Tensor) -> Tensor:
        lower, upper = self.lower.get(key), self.upper.get(key)
        if lower is None and upper is None:
            return part
        step = BLOCK if part.device.type == "cpu" else len(part)
        scratch = torch.empty(min(step, len(part)), dtype=buffer.dtype, device=buffer.device)
        for at in range(0, len(part), step):
            values, left = part[at : at + step], buffer[at : at + step]
            outliers = None if upper is None else upper.keep(values, start + at, scratch[: len(values)])
            kept = left.copy_(values) if lower is None else lower.keep(values, start + at, left)
            if outliers is not None:
                kept.sub_(outliers)  # of infinity is left NaN, for which the vector can be blamed
        return buffer
