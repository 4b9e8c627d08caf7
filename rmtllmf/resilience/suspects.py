"""Senders that lie: received vectors that stand out from the others by more than the channel's known noise explains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, ValuesView
from dataclasses import dataclass

import torch
from torch import Tensor

from .._arrays import ArrayLike
from .._state import Tensors, all_finite, as_vectors, is_bendable, map_tied
from ..channel import Reception
from ..errors import InputError
from ._findings import Found, Limits
from ._noise import KnownNoise, Scale

__all__ = ["Suspicion", "suspects"]

_LARGEST = 1e60  # magnitude whose powers fit into float64


@dataclass(frozen=True, eq=False, repr=False)
class Suspicion:
    """What is known about the senders; where users are indices, in the order of the received vectors.

    Attributes:
        accepted: the users of whom nothing bad was found.
        reasons: user -> why not, for all others.
        nonfinite: how many entries of each user are NaN, infinite, or larger than 1e60.
        norm: (Q,) float64, of what was sent, the noise taken off; NaN for users with non-finite entries, as in all that
            follows.
        direction: (Q,) cosine with the sum of the others' unit vectors, the noise taken off.
        cosines: (Q, Q) between the users, likewise.
        profile: (Q,) how much of the ups and downs of the common profile a vector has: 1 all, 0 none. NaN where fewer
            than five tensors are received well enough to tell.
        p_values: of "norm", "direction" and "profile" (Q,), of "opposed" and "copied" (Q, Q), before correction.
        tests: how many there were; a p-value up to ``false_alarm / tests`` is a finding.
        false_alarm: as it was asked for.

    Example:
        >>> import math
        >>> import torch
        >>> bomb = {"w": torch.tensor([1.0, math.nan])}
        >>> suspects([{"w": torch.tensor([1.0, 2.0])}, bomb], [0.1, 0.1]).reasons
        {1: '1 entries are not finite'}
    """

    accepted: tuple[int, ...]
    reasons: Mapping[int, str]
    nonfinite: tuple[int, ...]
    norm: Tensor
    direction: Tensor
    cosines: Tensor
    profile: Tensor
    p_values: Mapping[str, Tensor]
    tests: int
    false_alarm: float

    def __repr__(self) -> str:
        rows = [f"Suspicion(accepted={self.accepted}, false_alarm={self.false_alarm:g}, {self.tests} tests)"]
        for q, bad in enumerate(self.nonfinite):
            known = f"norm {self.norm[q]:.3g}, direction {self.direction[q]:+.3f}, profile {self.profile[q]:.2f}"
            verdict = self.reasons.get(q, "nothing found")
            rows.append(f"  user {q}: {verdict}" + ("" if bad else f" ({known})"))
        return "\n".join(rows)


def suspects(
    received: Iterable[Tensors],
    reception: Reception | ArrayLike,
    *,
    estimator: str = "additive",
    scale: Scale = "rms",
    false_alarm: float = 0.01,
    norm_ratio: float = 3.0,
    opposed: float = -0.1,
    copied: float = 0.95,
    profile: float = 0.5,
) -> Suspicion:
    r"""Which received vectors are not those of honest senders, at a given rate of false alarms.

    What the base station holds of user q is :math:`y_q = g_q \tau_q + n_q`, with a noise covariance C that it knows.
    All that it tests are inner products with their noise taken off, over the n coefficients,

    .. math:: \widehat{\langle \tau_q, \tau_r \rangle}
              = \frac{\langle y_q, y_r \rangle - n\, C_{qr}}{g_q g_r}, \qquad
              \operatorname{Var}\, y^\top M y = n \bigl(2 \operatorname{tr}(M C M C)
              + 4 \operatorname{tr}(M C M S)\bigr)

    where M picks what is tested and S is the mean outer product of the signals. An honest vector is *allowed* to be

    - finite, below 1e60;
    - up to `norm_ratio` times longer or shorter than the median of the others, more where these spread more (three
      robust standard deviations of the logarithms, from their median absolute deviation);
    - at a cosine of `opposed` or more with every other and with the sum of the others' unit vectors. Of two opposed
      users the one is found that opposes the rest more, too; where the rest does not tell, both;
    - at a cosine of `copied` or less with every other. Of users with the same vector the one received best is kept;
    - of a `profile` of energies per tensor like the others': the slope of the logarithms of its mean squares per tensor
      over the median of the others' (a correlation would be 0/0 for a vector without ups and downs) is at least this.

    A finding is an excess over these limits that the noise does not explain: one-sided normal tests (Student's t for
    the slope, whose error takes in the tensors' own scatter), Bonferroni-corrected over all tests and users.

    Args:
        received: Q mappings of name -> tensor with the same keys and shapes, as `transmit` returned them. NaN and
            infinity are a finding, not an error. Not written to.
        reception: the `Reception`, or MSEs, (Q,) or (blocks, Q), with which they were received.
        estimator, scale: as for `transmit`; `scale` may also be one number for each user. With "rms" the scale is read
            off the received power: a sender that multiplies its vector looks like one of larger rms, at any noise.
        false_alarm: probability that *any* honest user is suspected because of the noise, if all keep the limits.
        norm_ratio: at least 1. opposed: above -1, up to 0. copied: above 0, below 1. profile: 0 to below 1.

    Returns:
        A `Suspicion`. Fuse ``[received[q] for q in suspicion.accepted]``, with the reception of these users.

    Raises:
        InputError: an option out of range, a gain of 0 (a silent user), or as `transmit`. StateMismatchError: keys or
            shapes disagree. TypeError: not mappings.

    Note:
        What this cannot see: a direction. A vector of another model, or of random numbers, with the right norm in every
        tensor is as orthogonal to all others as honest vectors are to each other. So is the flipped vector of a task
        that no other user has, unless the honest ones have something in common. A backdoor within `norm_ratio` passes.
        A random vector with the right norm as a whole fails `profile`, if tensors' energies differ and are measured to
        a third: at L entries of a tensor and a mean square of s times the noise's there, L must exceed
        :math:`18 (1 + 2 s)/s^2`. A cosine is known to within :math:`(1 + 1/\mathrm{SNR})/\sqrt n`: .03 for
        n = 100,000 at -10 dB; opposition is found a few times that below `opposed`. With eight users, 47,000 entries,
        the norms, profiles and cosines (.1) of a small transformer and scale="rms", a liar was always found down to:
        scaled by 100, or NaN, -20 dB (the lowest tried); minus the sum of the others -15 dB; a flipped vector, of a
        task of its own or of another user's, -5 dB; a copy, or a foreign profile, 0 dB. Ten times as many entries lower
        the last four by some 5 dB.

        Less than half of the users may lie: medians decide. Of two that disagree both are suspected. The normal law is
        that of many coefficients, a thousand or more; the imaginary part of a correlated error is left out, which
        only makes the tests cautious. What "any honest user" covers is the first round: opposed users are
        taken out one round after another, on the same data.

    Example:
        >>> import torch
        >>> from rmtllmf.channel import transmit
        >>> from rmtllmf.resilience.attacks import scaled
        >>> source = torch.Generator().manual_seed(0)
        >>> sent = [{"w": torch.randn(20_000, generator=source)} for _ in range(5)]
        >>> sent[2] = scaled(sent[2], 100.0)
        >>> suspects(transmit(sent, [0.5] * 5, seed=0), [0.5] * 5)
        Suspicion(accepted=(0, 1, 3, 4), false_alarm=0.01, 35 tests)
          user 0: nothing found (norm 142, direction ..., profile nan)
          user 1: nothing found (norm 141, direction ..., profile nan)
          user 2: norm is ... times the median of the others (norm 1.4e+04, direction ..., profile nan)
          user 3: nothing found (norm 142, direction ..., profile nan)
          user 4: nothing found (norm 14..., direction ..., profile nan)
    """
    limits = Limits.of(false_alarm, norm_ratio, opposed, copied, profile)
    if isinstance(received, Iterator | ValuesView):
        received = list(received)
    vectors = as_vectors(received, "received")
    bad = [_nonfinite(vector) for vector in vectors]
    clean = [vector if not bad[q] else map_tied(torch.zeros_like, vector, vector) for q, vector in enumerate(vectors)]
    known = KnownNoise.of(clean, reception, estimator=estimator, scale=scale)
    if not bool((known.gain != 0).all()):
        block, q = (known.gain == 0).nonzero()[0].tolist()
        raise InputError(f"reception: the gain of user {q} is 0 in block {block}; leave out a user who is not heard")
    if not known.stream.length:
        raise InputError("received: all tensors are empty, so there is nothing to compare")
    users = [q for q, count in enumerate(bad) if not count]
    reasons = {q: f"{count} entries are not finite" for q, count in enumerate(bad) if count}
    found = Found.of(known, users, scale, limits)
    reasons |= found.reasons(limits)
    return Suspicion(
        accepted=tuple(q for q in range(len(bad)) if q not in reasons),
        reasons=dict(sorted(reasons.items())),
        nonfinite=tuple(bad),
        norm=_spread(found.energy.clamp_min(0).sqrt(), users, len(bad)),
        direction=_spread(found.direction, users, len(bad)),
        cosines=_spread(found.cosines, users, len(bad)),
        profile=_spread(found.slope, users, len(bad)),
        p_values={name: _spread(p, users, len(bad)) for name, p in found.p_values.items()},
        tests=found.tests,
        false_alarm=limits.false_alarm,
    )


def _nonfinite(vector: dict[str, Tensor]) -> int:
    """How many parameters are NaN or infinite, or as good as that."""
    count = 0
    for key, tensor in vector.items():
        if is_bendable(key, tensor.dtype) and (tensor.dtype == torch.float64 or not all_finite(tensor)):
            # in float32 the limit itself is infinite
            count += int((~(torch.isfinite(tensor) & (tensor.detach().abs() <= _LARGEST))).sum())
    return count


def _spread(values: Tensor, users: list[int], count: int) -> Tensor:
    """Values of some users among those of all, NaN for the others."""
    result = torch.full((count,) * values.ndim, torch.nan, dtype=torch.float64)
    result[torch.meshgrid(*[torch.tensor(users, dtype=torch.long)] * values.ndim, indexing="ij")] = values
    return result
