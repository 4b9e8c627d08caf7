"""DARE: drop entries of the task vectors at random, rescale the rest, then fuse by another rule."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..._random import Seed, seed_number
from ..._state import Tensors, finite_number
from ...errors import InputError
from .._sources import Source, Stored, sources_of
from ..vector import TaskVector
from ._draws import Draws
from ._pruned import Pruned, first_names
from .arithmetic import task_arithmetic

__all__ = ["dare"]


def dare(
    vectors: Iterable[Tensors],
    drop: float = 0.5,
    *,
    scale: float | None = None,
    seed: Seed,
    rule: Callable[..., TaskVector] = task_arithmetic,
    **options: Any,
) -> TaskVector:
    r"""The fused update of DARE (drop and rescale): entries dropped at random, and `rule` of what remains.

    .. math:: \tilde\tau_q = \frac{m_q \odot \tau_q}{1 - p}, \qquad m_q \sim \operatorname{Bernoulli}(1 - p)
              \text{ independently for every entry}, \qquad E[\tilde\tau_q] = \tau_q

    The masks of different vectors are independent of each other, and so are those of different names; tied names have
    one mask. They depend on the seed, the position of the vector, the name and the entry: not on threads, the order of
    names, or which names are skipped. Nothing is held as a whole: a mask is made where a piece is read.

    Args:
        vectors: N mappings of name -> tensor with the same keys and shapes. Not written to.
        drop: :math:`p` in [0, 1), the probability that an entry is dropped; 0 changes nothing.
        scale: passed on to `rule`; None: what is usual there.
        seed: an int or a ``torch.Generator``. The same seed gives the same masks.
        rule: what fuses the vectors: `task_arithmetic`, `ties`, or another. ``dare_ties`` of PEFT and mergekit elects
            signs but does not trim by magnitude: ``rule=ties, density=1.0``.
        options: further arguments of `rule`, those of `FusionOptions` among them.

    Returns:
        The update, a `TaskVector`.

    Raises:
        InputError: a `drop` outside [0, 1), or no vectors. Otherwise as `rule`.

    Source: Yu et al., "Language models are super mario: absorbing abilities from homologous models as a free lunch",
    2024, section 3.

    Example:
        >>> import torch
        >>> vectors = [{"w": torch.ones(6)}, {"w": torch.ones(6)}]
        >>> dict(dare(vectors, 0.5, scale=1.0, seed=1))  # twice, once or not at all 1 / (1 - 0.5)
        {'w': tensor([4., 2., 2., 2., 4., 0.])}
        >>> dict(dare(vectors, 0.0, scale=1.0, seed=1))
        {'w': tensor([2., 2., 2., 2., 2., 2.])}
    """
    share = finite_number(drop, "drop")
    if not 0 <= share < 1:
        raise InputError(f"drop: expected a probability in [0, 1), got {share:g}")
    number = seed_number(seed)
    sources: list[Source] = sources_of(vectors, "vectors")
    if share > 0:
        masks = _Masks(number, share)
        sources = [Dropped(source, index, masks) for index, source in enumerate(sources)]
    if scale is not None:
        options["scale"] = scale
    return rule(sources, **options)


class Dropped(Pruned):
    """A task vector with entries dropped at random and the rest rescaled, never held as a whole."""

    def __init__(self, inner: Source, index: int, masks: _Masks) -> None:
        super().__init__(inner)
        self.index, self.masks = index, masks
        self._name = first_names(inner)

    def whole(self, key: str, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
        if not (self.wants_gradient and torch.is_grad_enabled()):
            return super().whole(key, dtype, device)
        # the same with torch's own operations, through which gradients flow
        given = self.inner.given[key] if isinstance(self.inner, Stored) else self.inner.whole(key)
        given = given.to(device=device, dtype=dtype or self.specs[key].calculated_in)
        with torch.no_grad():
            factor = torch.ones_like(given).reshape(-1)
            self.pruned(key, 0, factor, factor)
        return given * factor.view(given.shape)

    def pruned(self, key: str, start: int, part: Tensor, buffer: Tensor) -> Tensor:
        for here, mask in self.masks.over(self.index, self._name[key], start, start + len(part), buffer):
            torch.mul(part[here], mask, out=buffer[here])
        return buffer.div_(1 - self.masks.drop)


class _Masks(Draws):
    """Zeros and ones of every chunk."""

    def __init__(self, seed: int, drop: float) -> None:
        super().__init__(seed, "dare", least=1 - drop)
        self.drop = drop

    def made(self, uniform: Tensor, like: Tensor) -> Tensor:
        return uniform.lt_(1 - self.drop).to(like.dtype)
