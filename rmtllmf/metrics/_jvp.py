"""Standard deviations of logits from random tangents in forward mode: a whole batch at once, without a graph."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from .._call import WithState, checked_rows
from .._random import generator
from .._state import wide
from .._tasks import Head
from ..errors import InputError
from ._exact import LOST
from ._inputs import batch_size
from ._variances import Variance

__all__ = ["jvp_deviations"]


@torch.no_grad()
def jvp_deviations(
    clean: WithState,
    bent: WithState,
    variance: dict[str, Variance],
    inputs: Any,
    head: Head | None,
    tangents: int,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Undisturbed and disturbed logits, and the root mean square of ``J u`` for ``u ~ N(0, V)``; (B, K) each."""
    count = batch_size(inputs)
    _load_formulas()
    with _differentiable_attention():  # for both models: equal parameters give equal bits
        z_d = checked_rows(bent.logits(inputs, "disturbed", head=head), count, "disturbed")
        if not variance:
            z_u = checked_rows(clean.logits(inputs, "undisturbed", head=head), count, "undisturbed")
            return z_u, z_d, torch.zeros_like(z_u, dtype=torch.float64)
        squares = torch.zeros_like(z_d, dtype=torch.float64)
        for index in range(tangents):
            z_u, change = _along(clean, variance, inputs, head, index, seed)
            checked_rows(z_u, count, "undisturbed")
            squares += checked_rows(change, count, "undisturbed: derivatives of").double().square()
    return z_u, z_d, (squares / tangents).sqrt()


def _along(
    clean: WithState, variance: dict[str, Variance], inputs: Any, head: Head | None, index: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Logits and their derivative along the tangent of this index, which is drawn here and forgotten afterwards."""

    def parts(logits: Tensor) -> tuple[Tensor, Tensor]:
        pair = forward_ad.unpack_dual(logits)
        if pair.tangent is None:
            raise InputError(LOST)
        return pair.primal, pair.tangent.clone()

    with forward_ad.dual_level():
        duals = {
            name: forward_ad.make_dual(clean.state[name], _tangent(clean.state[name], value, seed, index, name))
            for name, value in variance.items()
        }
        try:
            return clean.replaced(duals).inside(parts, inputs, "undisturbed", head=head)
        except (NotImplementedError, RuntimeError) as error:
            # torch has no exception of its own for this; its words are the only sign
            words = str(error).lower()
            if "forward ad" in words or "forward mode" in words or "jvp" in words:
                raise InputError(
                    f"model: cannot be differentiated in forward mode ({str(error).splitlines()[0]}); "
                    "use method='exact'"
                ) from error
            raise


def _tangent(entry: Tensor, variance: Variance, seed: int, index: int, name: str) -> Tensor:
    """``N(0, variance)`` of the entry's shape, by a generator of its own: no other name plays a part."""
    source = generator(seed, "tangent", index, name, device=entry.device)
    white = torch.empty_like(wide(entry), memory_format=torch.contiguous_format).normal_(generator=source)
    deviation = variance.sqrt().to(white.dtype) if isinstance(variance, Tensor) else math.sqrt(variance)
    return white.mul_(deviation).to(entry.dtype)


def _load_formulas() -> None:
    """What torch does at the first dual number of a process: it warns of functions of its own."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.filterwarnings("ignore", r".*torch\.jit", category=Warning)
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))


@contextmanager
def _differentiable_attention() -> Iterator[None]:
    """Attention by its formula: the fused kernels have no forward derivative."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
