"""Posterior means of all users' task vectors together, where what is known of one user's error tells of another's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .._arrays import ArrayLike
from .._state import Tensors
from ..channel import Reception
from ._energy import Energy, energy_of
from ._inner_products import gram
from ._moments import null_share
from ._noise import KnownNoise, Scale
from ._pooling import pooled
from .shrink import Sensitivity, sensitivities

__all__ = ["joint_shrink"]

_LONGEST = 1 << 18  # entries of every vector calculated with at once
_CERTAIN = 0.03  # no combination of users is believed to be nothing: estimated correlations are not known so well


def joint_shrink(
    received: Iterable[Tensors],
    reception: Reception | ArrayLike,
    *,
    estimator: str = "additive",
    scale: Scale = "rms",
    sensitivity: Sensitivity = 1.0,
) -> list[Any]:
    r"""The posterior mean of what all users sent, from all that was received.

    .. math:: E[\tau \mid \hat\tau] = \kappa S D\, (\kappa D S D + V)^{-1}\, \hat\tau, \qquad
              \hat\tau = D\tau + n, \quad D = \mathrm{diag}(g), \quad \mathrm{Cov}\,\tau = S, \quad \mathrm{Cov}\,n = V

    symbol by symbol, over the Q users: a symbol is two coefficients, its real and its imaginary part, and V is complex.
    It is the receiver's; under an attack that it does not know, most of the noise comes from few directions, and what
    is seen of it in one user tells of the others. The signal's covariance S has the energies of `shrink`, tensor by
    tensor, and correlations that are one for all tensors, as far as they stand out of the noise. With errors of
    independent users and unrelated tasks this is `shrink`.

    The estimates of energies and correlations are not exact. In one of a hundred draws of some hundred coefficients the
    error is a few per cent above that of `shrink`; where a combination of users is received without any noise and the
    energies of these users are hidden by it, it can be several times as large.

    Args:
        received, reception, estimator, scale, sensitivity: as for `shrink`.

    Returns:
        As `shrink`.

    Raises:
        As `shrink`.

    Source: the linear minimum mean squared error estimator, Kay, "Estimation theory", 1993, chapter 12.

    Example:
        >>> import torch
        >>> from rmtllmf.channel import UplinkScenario, sic, strongest_user_covariance, transmit
        >>> up = UplinkScenario(num_users=4).draw(seed=1)
        >>> C = strongest_user_covariance(up.H, up.P, 124 * up.noise) + up.noise_covariance
        >>> heard_as = sic(up.H, up.P, C, designed_for=up.noise_covariance, order="strongest_first")
        >>> draw = torch.Generator().manual_seed(0)
        >>> sent = [{"w": torch.randn(5000, generator=draw)} for _ in range(4)]
        >>> heard = transmit(sent, heard_as, seed=0)
        >>> error = lambda vectors: sum(float((a["w"] - b["w"]).square().mean()) for a, b in zip(vectors, sent))
        >>> from rmtllmf.resilience import shrink
        >>> [round(error(found), 1) for found in (heard, shrink(heard, heard_as), joint_shrink(heard, heard_as))]
        [1.8, 1.0, 0.7]
    """
    known = KnownNoise.of(received, reception, estimator=estimator, scale=scale)
    return jointly_shrunk(known, energy_of(known), sensitivities(known.stream.keys, sensitivity))


def jointly_shrunk(known: KnownNoise, energy: Energy, kappa: Mapping[str, float]) -> list[Any]:
    """What `joint_shrink` returns."""
    correlation = _correlation(known, energy)
    flat: list[dict[str, Tensor]] = []
    for vector in known.stream.vectors:
        flat.append({key: torch.empty_like(vector[key].reshape(-1)) for key in known.stream.keys})
    for key in known.stream.keys:
        given = [vector[key].detach().reshape(-1) for vector in known.stream.vectors]
        deviation = energy.of(key).sqrt() if key in energy.keys else torch.zeros(known.users, dtype=torch.float64)
        S = kappa[key] * deviation[:, None] * correlation * deviation
        for part in known.parts[key]:
            gain = known.gain[part.block]
            single = _posterior(S, gain, known.covariance_of(key, part.block))
            paired = _posterior(S, gain, known.complex_covariance_of(key, part.block))
            for cut, pairs in _cuts(known.stream.start_of(key), part.start, part.stop):
                rows = torch.stack([g[cut] if g.dtype.itemsize >= 4 else g[cut].float() for g in given])
                if pairs:
                    symbols = torch.view_as_complex(rows.view(len(rows), -1, 2))
                    rows = torch.view_as_real(paired.to(symbols) @ symbols).flatten(1)
                else:
                    rows = single.to(rows) @ rows
                for q, row in enumerate(rows):
                    flat[q][key][cut] = row.to(flat[q][key].dtype)
    return known.stream.rebuilt(flat)


def _cuts(first: int, start: int, stop: int) -> Iterator[tuple[slice, bool]]:
    """[start, stop) of a tensor that begins at `first` of the stream, in whole symbols and single coefficients."""
    if (first + start) % 2 and start < stop:
        yield slice(start, start + 1), False
        start += 1
    whole = start + (stop - start) // 2 * 2
    for at in range(start, whole, _LONGEST):
        yield slice(at, min(at + _LONGEST, whole)), True
    if whole < stop:
        yield slice(whole, stop), False


def _posterior(S: Tensor, gain: Tensor, V: Tensor) -> Tensor:
    """``S D (D S D + V)^+``, in the form in which nothing is lost where there is no noise."""
    A = gain[:, None] * S * gain + V
    if bool((gain == 0).any()):
        return (S * gain).to(A.dtype) @ _pseudo_inverse(A)
    unbiased = torch.eye(len(A), dtype=A.dtype) - V @ _pseudo_inverse(A)  # of D tau
    return unbiased / gain[:, None]


def _pseudo_inverse(A: Tensor) -> Tensor:
    unit = A.diagonal().real.clamp_min(0).sqrt()
    unit = torch.where(unit > 0, 1 / unit, 0.0)
    values, vectors = torch.linalg.eigh(unit[:, None] * A * unit)
    there = values > null_share(len(values)) * values[-1].clamp_min(0)
    inverse = (vectors[:, there] / values[there]) @ vectors[:, there].mH
    return unit[:, None] * inverse * unit


def _correlation(known: KnownNoise, energy: Energy) -> Tensor:
    """(Q, Q) of what was sent, in the mean over all coefficients; 0 where noise allows it."""
    users = known.users
    products, information = torch.zeros(2, users, users, dtype=torch.float64)
    for key in energy.keys:
        deviation = energy.of(key).sqrt()
        scale = deviation[:, None] * deviation
        for part in known.parts[key]:
            g, V = known.gain[part.block], known.covariance_of(key, part.block)
            rows = [vector[key].detach().reshape(-1)[part.start : part.stop] for vector in known.stream.vectors]
            power = g * g * deviation**2 + V.diagonal()
            expected = g[:, None] * scale * g  # times the correlation, beside V
            # the variance of a product of two received coefficients, were they uncorrelated but for the noise
            spread = power[:, None] * power + V**2
            weight = torch.where(spread > 0, expected / torch.where(spread > 0, spread, 1.0), 0.0)
            products += weight * (gram(rows) - len(rows[0]) * V)
            information += weight * expected * len(rows[0])
    found = torch.where(information > 0, products / torch.where(information > 0, information, 1.0), 0.0)
    above = torch.triu_indices(users, users, 1)
    error = torch.where(information > 0, 1 / torch.where(information > 0, information, 1.0), torch.inf)
    believed = torch.eye(users, dtype=torch.float64)
    if above.shape[1]:
        values = pooled(found[above[0], above[1]][None], error[above[0], above[1]][None])[0].clamp(-1, 1)
        believed[above[0], above[1]] = values
        believed[above[1], above[0]] = values
    values, vectors = torch.linalg.eigh(believed)
    psd = (vectors * values.clamp_min(_CERTAIN)) @ vectors.T
    unit = psd.diagonal().rsqrt()
    return unit[:, None] * psd * unit
