"""How much of each received vector to fuse: weights, or a choice of vectors, from what is known about the noise."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from .._arrays import ArrayLike, Inputs
from .._state import Tensors, finite_number, whole_number
from ..channel import Reception
from ..channel._link import checked_estimator, link_of
from ..errors import InputError, ShapeError
from ._moments import Moments, null_share
from ._noise import KnownNoise, Scale

__all__ = ["inverse_variance_weights", "mse_optimal_weights", "select_users"]

EXHAUSTIVE = 12  # users up to whom all subsets are looked at


def inverse_variance_weights(reception: Reception | ArrayLike, *, estimator: str = "additive") -> Tensor:
    r"""The best linear unbiased weights if all users had sent the same vector: the less noise, the more weight.

    .. math:: \min_a\ a^T V a \quad \text{subject to} \quad \sum_q a_q g_q = Q, \qquad \text{so} \quad
              a = Q\, \frac{V^{-1} g}{g^T V^{-1} g}

    generalised least squares, with the covariance `V` of the noise in equal coefficients of the users (for bare MSEs
    diagonal, so that :math:`a_q \propto 1/\mu_q`) and the gains `g`, which are 1 but for "mmse". Without gains the
    weights add up to Q, and are ones for equal noise. Where errors are correlated, weights can be negative.

    Several blocks are as long as each other, and a vector has one weight in all of them: `V` and `g` are their means
    over the blocks. Without gains, that is exactly the least error over the whole vector.

    Where some combination of the users is free of noise, so is the result. Users that are received without noise share
    everything in the limit that as little noise on each of them goes to 0: equal weights, and 0 for all others.

    Args:
        reception: a `Reception` of Q users, or bare MSEs (Q,) or (blocks, Q), of symbols of unit variance.
        estimator: "additive", "mmse" or "unbiased", as for `transmit`.

    Returns:
        (Q,) float64 on the CPU, for ``task_arithmetic(received, weights=...)``.

    Raises:
        InputError: an MSE that the estimator does not allow, no user that is heard (all gains 0).
        ShapeError: a single number, which does not tell how many users there are. NotPSDError: no covariance.

    Note:
        Task vectors of different tasks are no common signal: for their sum see `mse_optimal_weights`.

    Source: Aitken, "On least squares and linear combination of observations", 1936.

    Example:
        >>> inverse_variance_weights([0.1, 0.1, 0.4])
        tensor([1.3333, 1.3333, 0.3333], dtype=torch.float64)
        >>> inverse_variance_weights([0.0, 0.1])
        tensor([2., 0.], dtype=torch.float64)
    """
    shape = tuple(reception.mse.shape) if isinstance(reception, Reception) else _shape(reception)
    if not shape or not shape[-1]:
        raise ShapeError(
            f"reception: expected MSEs (Q,) or (blocks, Q) or a Reception, got shape {shape}, which does not tell how "
            "many users there are"
        )
    link = link_of(reception, shape[-1], checked_estimator(estimator))
    root = link.root.to(torch.complex128)
    V = (root @ root.mH).real.mean(0)
    g = torch.tensor([[1.0 if x is None else float(x) for x in row] for row in link.gain], dtype=torch.float64).mean(0)
    heard = g != 0
    if not heard.any():
        raise InputError("reception: the gain of every user is 0, so nothing of what was sent is received")
    noise = V.diagonal()
    rounding = 0.0 if bool((torch.diag(noise) == V).all()) else null_share(len(g)) * float(noise.max())
    noisy = noise > rounding
    weights = torch.where(noisy, 0.0, g)
    if not weights.any():
        weights[noisy] = _least_squares(V[noisy][:, noisy], g[noisy])
    return weights * (len(g) / (g @ weights))


def mse_optimal_weights(
    received: Iterable[Tensors],
    reception: Reception | ArrayLike,
    *,
    estimator: str = "additive",
    scale: Scale = "rms",
    target: Sequence[float] | np.ndarray | Tensor | None = None,
) -> Tensor:
    r"""The weights with which the sum of what was received comes closest to the sum of what was sent.

    .. math:: \min_a\ E \Bigl\lVert \sum_q a_q \hat\tau_q - \sum_q t_q \tau_q \Bigr\rVert^2, \qquad
              a = (D S D + V)^{-1} D S\, t

    with the gains :math:`D = \mathrm{diag}(g)`, the covariance `V` of the noise, summed over the coefficients, and the
    Gram matrix `S` of what was sent. That is estimated from the Gram matrix `R` of what was received: `R - V` is
    :math:`D S D` on average, for any vectors. Combinations of the users of which less was received than their
    noise alone brings on average (eigenvalues of `R` relative to `V` below 1) count as 0 in it, and as noise of the
    known strength in :math:`D S D + V`: the most likely positive semidefinite `S`. Where there are none, and no gains,
    it is :math:`a = R^{-1} (R - V) t`.

    A multivariate Wiener filter over the users: a vector full of noise gets a small weight, what it shares with others
    is taken from them, and correlated errors are subtracted from each other. Fading blocks, gains and scales that
    differ from tensor to tensor are added up coefficient by coefficient.

    Args:
        received: Q mappings of name -> tensor, as `transmit` returned them.
        reception: a `Reception` of Q users, or bare MSEs (Q,) or (blocks, Q).
        estimator: "additive", "mmse" or "unbiased", as for `transmit`.
        scale: what a coefficient was divided by, as for `transmit`, or a number for each user; "rms" and "tensor_rms"
            are read off the received power.
        target: :math:`t`, (Q,) the weights that the sum of what was sent would have had; None: ones.

    Returns:
        (Q,) float64 on the CPU, for ``task_arithmetic(received, scale, weights=...)``: the sum's own scale stays what
        it would have been without noise. Vectors that are linear combinations of others have many solutions, of which
        it is the one with the shortest vector of :math:`a_q \lVert \hat\tau_q \rVert`.

    Raises:
        InputError: no vectors, an MSE that the estimator does not allow, a peak as scale, more blocks than symbols, a
            gain of 0 (a silent user's part of the sum cannot be known) where the target is not.
        ShapeError, StateMismatchError: something is not for Q users, or the vectors do not fit together.
        NonFiniteError: NaN or infinity. NotPSDError: an error covariance that is none.

    Note:
        Inner products are taken in float64 over short pieces, and the weights have the same bits for any number of
        threads. They are estimates: for n coefficients, off by about :math:`1/\sqrt n`.

    Source: Wiener filter; Amemiya, "What should be done when an estimated between-group covariance matrix is not
        nonnegative definite?", 1985, for the projection.

    Example:
        >>> import torch
        >>> from rmtllmf.channel import transmit
        >>> from rmtllmf.taskvec import task_arithmetic
        >>> draw = torch.Generator().manual_seed(0)
        >>> sent = [{"w": torch.randn(10_000, generator=draw)} for _ in range(2)]
        >>> mse = [0.01, 4.0]
        >>> received = transmit(sent, mse, seed=1)
        >>> weights = mse_optimal_weights(received, mse)
        >>> [round(w, 1) for w in weights.tolist()]
        [1.0, 0.2]
        >>> update = task_arithmetic(received, scale=0.3, weights=weights)
    """
    known = KnownNoise.of(received, reception, estimator=estimator, scale=scale)
    wanted = _target(target, known.users)
    _check_heard(known, wanted)
    moments = Moments.of(known)
    return moments.solve(moments.cross @ wanted)


def select_users(
    received: Iterable[Tensors],
    reception: Reception | ArrayLike,
    *,
    estimator: str = "additive",
    scale: Scale = "rms",
    at_least: int = 1,
) -> tuple[int, ...]:
    r"""Whose vectors to fuse, if all count the same: those without which the sum would be further off.

    .. math:: \min_{A \subseteq \{1, \dots, Q\}}\ E \Bigl\lVert \sum_{q \in A} \hat\tau_q - \sum_q \tau_q \Bigr\rVert^2

    Leaving a vector out costs what it tells about the sum, and saves its noise: with independent vectors, errors and
    no gains it stays if its own signal is stronger than its noise. The expected errors are estimated as for
    `mse_optimal_weights`. Up to 12 users all subsets are compared, and the best is exact; for more, users are left out
    one by one, each time the one without whom the error is least (greedy backward), and the best of these Q subsets
    is taken, which need not be the best of all. Between equal errors the larger subset wins.

    Args:
        received, reception, estimator, scale: as for `mse_optimal_weights`.
        at_least: how many to keep. With 0 the answer can be nobody, ``()``, where every vector does more harm than
            good and the base model is the best that there is; rules of fusion refuse to fuse nothing.

    Returns:
        Indices into `received`, increasing; fuse ``[received[q] for q in chosen]``, with the scale of all Q.

    Raises:
        InputError: `at_least` above Q, a gain of 0, and what `mse_optimal_weights` raises.

    Source: none; subset selection by an unbiased estimate of the risk, as in Mallows, "Some comments on Cp", 1973.

    Example:
        >>> import torch
        >>> from rmtllmf.channel import transmit
        >>> draw = torch.Generator().manual_seed(0)
        >>> sent = [{"w": torch.randn(10_000, generator=draw)} for _ in range(3)]
        >>> mse = [0.01, 1.5, 0.5]
        >>> select_users(transmit(sent, mse, seed=1), mse)
        (0, 2)
    """
    known = KnownNoise.of(received, reception, estimator=estimator, scale=scale)
    fewest = whole_number(at_least, "at_least", at_least=0)
    if fewest > known.users:
        raise InputError(f"at_least: expected at most the number of vectors, {known.users}, got {fewest}")
    everyone = torch.ones(known.users, dtype=torch.float64)
    _check_heard(known, everyone)
    moments = Moments.of(known)
    subsets = _all_subsets(known.users) if known.users <= EXHAUSTIVE else _backward(moments)
    subsets = subsets[subsets.sum(-1) >= fewest]
    errors = moments.errors(subsets)
    within = errors <= errors.min() + 1e-12 * (moments.received.diagonal().sum() + moments.cross.abs().sum())
    sizes = torch.where(within, subsets.sum(-1), -1)
    return tuple(torch.nonzero(subsets[int(sizes.argmax())]).flatten().tolist())


def _least_squares(V: Tensor, g: Tensor) -> Tensor:
    """Proportional to ``V^-1 g`` for users with noise, or to its limit where `V` is singular."""
    noise = V.diagonal().sqrt()
    heard = g / noise
    values, vectors = torch.linalg.eigh(V / noise[:, None] / noise)
    parts, null = vectors.T @ heard, values <= null_share(len(values)) * values[-1]
    if torch.linalg.vector_norm(parts[null]) > 1e-8 * torch.linalg.vector_norm(parts):
        parts[~null] = 0.0  # a combination without noise
    else:
        parts = torch.where(null, 0.0, parts / torch.where(null, 1.0, values))
    return (vectors @ parts) / noise


def _all_subsets(users: int) -> Tensor:
    numbers = torch.arange(2**users)
    return (numbers[:, None] >> torch.arange(users) & 1).to(torch.float64)


def _backward(moments: Moments) -> Tensor:
    """(Q + 1, Q) everyone, then one user less in each row."""
    path = [torch.ones(len(moments.cross), dtype=torch.float64)]
    while path[-1].any():
        left = torch.nonzero(path[-1]).flatten()
        without = path[-1].repeat(len(left), 1)
        without[torch.arange(len(left)), left] = 0.0
        path.append(without[int(moments.errors(without).argmin())])
    return torch.stack(path)


def _shape(reception: ArrayLike) -> tuple[int, ...]:
    return tuple(Inputs.of(reception, "reception").real(reception, "reception").shape)


def _target(target: object, users: int) -> Tensor:
    if target is None:
        return torch.ones(users, dtype=torch.float64)
    if isinstance(target, np.ndarray | Tensor) and target.ndim:
        target = target.tolist()
    if isinstance(target, str) or not isinstance(target, Sequence):
        raise TypeError(f"target: expected {users} numbers, one for each vector, got {type(target).__name__}")
    if len(target) != users:
        raise ShapeError(f"target: expected {users} numbers, one for each vector, got {len(target)}")
    return torch.tensor([finite_number(x, f"target[{q}]") for q, x in enumerate(target)], dtype=torch.float64)


def _check_heard(known: KnownNoise, wanted: Tensor) -> None:
    silent = (known.gain == 0) & (wanted != 0)
    if silent.any():
        block, q = torch.nonzero(silent)[0].tolist()
        raise InputError(
            f"reception: the gain of user {q} is 0 in block {block}, so what it sent there cannot be known; leave that "
            "user out"
        )
