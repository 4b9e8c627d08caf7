"""Deaf to the jammer's strongest directions: a projection in front of the receiver, and why it rarely helps here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._arrays import Array, ArrayLike, Inputs, batch_shape, check_channel, check_psd, powers, resolution
from .._state import whole_number
from ..errors import InputError, warn
from ._covariance import covariance_input

__all__ = ["null_directions"]

_ON_THE_SIGNAL = 0.25  # 0: nulled directions hold as much signal as any others, 1: all of it


def null_directions(H: Array, C: Array, count: int, *others: Array, P: ArrayLike = 1.0) -> tuple[Any, ...]:
    r"""What is left of the channel after the strongest `count` directions of the noise are projected away.

    .. math:: H' = U^H H, \qquad C' = U^H C\, U, \qquad U^H U = I_{N_R - r},

    where the columns of U are the eigenvectors of `C` that belong to its :math:`N_R - r` smallest eigenvalues. The
    receivers work on the result unchanged, with :math:`N_R - r` antennas. `C` may be the jammer's covariance or that
    of the whole noise, which has the same eigenvectors.

    Warning:
        Nulling is for a jammer that stands elsewhere. The worst-case jammers of this library sit *on* the signal: what
        is nulled is mostly signal, and the mean squared error goes *up*. A receiver that is designed for the same `C`
        never does worse than one behind the projection, because it could project by itself. The function warns
        (`RmtllmfWarning`) when the directions hold clearly more of the users' energy than the :math:`r / N_R` of
        directions picked blindly: more than a quarter of the way from there to all of it, averaged over the batch.

    Args:
        H: (..., N_R, Q) complex channel, path loss included.
        C: (..., N_R, N_R) covariance in W whose strongest directions are nulled, positive semidefinite. Of equal
            eigenvalues it is left open which go first.
        count: the number r of directions, from 0 to :math:`N_R - 1`.
        others: more covariances to project, for example what the receiver is designed for.
        P: transmit powers, a number or (..., Q): they weigh the users' energy for the warning, and nothing else.

    Returns:
        The channel (..., N_R - r, Q), then `C` and each of `others` as (..., N_R - r, N_R - r). Gradients take the
        directions as fixed. The strongest user of the reduced channel need not be the strongest of `H`: for the same
        decoding order pass the original one to `sic`.

    Raises:
        TypeError: `H` is real. ShapeError: shapes do not fit. NotPSDError: a covariance is none.
        InputError: `count` out of range, a negative power; NonFiniteError: NaN or infinity.

    Source: subspace projection (interference nulling), for example H. Van Trees, "Optimum Array Processing", 2002.

    Example:
        A jammer from a direction in which no user is:

        >>> import numpy as np
        >>> H, C = null_directions(np.eye(3, 2) + 0j, np.diag([1.0, 1.0, 50.0]), 1)
        >>> H.shape, C.real.diagonal()
        ((2, 2), array([1., 1.]))
    """
    inputs = Inputs.of(H, "H", C, *others)
    channel = inputs.complex(H, "H")
    check_channel(channel)
    antennas = channel.shape[-2]
    directions = whole_number(count, "count", at_least=0)
    if directions >= antennas:
        raise InputError(f"count: at least one of {antennas} dimensions must be left, got {directions}")
    power = powers(inputs.nonnegative(P, "P"), channel)
    named = [("C", C), *((f"others[{index}]", other) for index, other in enumerate(others))]
    checked = [covariance_input(value, name, H, C, *others, size=antennas) for name, value in named]
    shapes = [(name, covariance.shape[:-2]) for (name, _), (_, covariance) in zip(named, checked, strict=True)]
    batch_shape(("H", channel.shape[:-2]), *shapes)
    values, vectors = torch.linalg.eigh(checked[0][1].detach())
    check_psd(values, "C", resolution(C))
    nulled, kept = vectors[..., antennas - directions :], vectors[..., : antennas - directions]
    share, blindly = (
        _energy_share(channel.detach() * power.detach().sqrt()[..., None, :], nulled),
        directions / antennas,
    )
    if share > blindly + _ON_THE_SIGNAL * (1 - blindly):
        warn(
            f"null_directions: the {directions} strongest directions of C hold {share:.0%} of the users' energy "
            f"({blindly:.0%} if picked blindly): the jammer sits on the signal, and nulling removes both. Use a "
            "receiver that knows C (sic(..., designed_for=None)) or an estimate (estimated_covariance) instead"
        )
    reduced = []
    for own, covariance in checked:
        projected = kept.mH @ covariance @ kept
        reduced.append(own.back(0.5 * (projected + projected.mH)))
    return inputs.back(kept.mH @ channel), *reduced


def _energy_share(B: Tensor, nulled: Tensor) -> float:
    """Mean over the batch of the part of the energy of `B` that lies in the span of `nulled`."""
    B = B / B.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    lost = (nulled.mH @ B).abs().square().sum(dim=(-2, -1))
    energy = B.abs().square().sum(dim=(-2, -1)).expand(lost.shape)
    heard = energy > 0
    return float((lost[heard] / energy[heard]).mean()) if bool(heard.any()) else 0.0
