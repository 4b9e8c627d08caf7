"""Several receptions of the same symbols as one channel with more antennas: repetition, and HARQ with combining."""

from __future__ import annotations

from typing import Any

import torch

from .._arrays import Array, Inputs, batch_shape, check_channel
from .._state import whole_number
from ..errors import ShapeError
from ._covariance import covariance_input

__all__ = ["repeat_block", "stack_blocks"]


def stack_blocks(H: Array, C: Array, *others: Array) -> tuple[Any, ...]:
    r"""The channel of symbols that are sent once in each of K blocks, and decoded from all of them together.

    .. math::
        \begin{pmatrix} y_1 \\ \vdots \\ y_K \end{pmatrix}
        = \begin{pmatrix} H_1 \\ \vdots \\ H_K \end{pmatrix} P^{1/2} s + z, \qquad
        z \sim \mathcal{CN}\bigl(0, \mathrm{blockdiag}(C_1, \dots, C_K)\bigr)

    This is a channel with :math:`K N_R` antennas, for which `sic`, `lmmse` and `sum_rate` work unchanged: what counts
    is :math:`\sum_k B_k^H C_k^{-1} B_k`. The orders of `sic` by power become orders by *mean* power over the blocks.

    Every symbol takes K channel uses and K times the energy: compare with other ways to spend those. The noise is
    independent from block to block; a jammer that sends the same noise in all of them is another covariance, and can
    undo the gain.

    Args:
        H: (..., K, N_R, Q) complex channels of the K blocks, as in ``UplinkScenario().draw(draws, K, seed=0)``.
        C: (..., K, N_R, N_R) covariances of the whole noise; broadcasts, so that (N_R, N_R) is the same in all blocks.
        others: more covariances like `C`, for example what the receiver is designed for.

    Returns:
        The channel (..., K N_R, Q), and each covariance as (..., K N_R, K N_R). For powers that differ between the
        blocks stack ``H P^{1/2}`` and go on with ``P = 1``.

    Raises:
        TypeError: `H` is real. ShapeError: shapes do not fit. NotPSDError: a covariance is not Hermitian.
        NonFiniteError: NaN or infinity.

    Source: D. Chase, IEEE Trans. Communications 33, 1985 (combining); G. Caire and D. Tuninetti, IEEE Trans.
    Information Theory 47, 2001 (HARQ).

    Example:
        >>> import numpy as np
        >>> from rmtllmf.channel import sum_rate
        >>> H, C = stack_blocks(np.ones((2, 3, 1)) + 0j, np.eye(3))  # 2 blocks, 3 antennas, 1 user
        >>> H.shape, C.shape, bool(np.isclose(sum_rate(H, 1.0, C), np.log(1 + 2 * 3)))
        ((6, 1), (6, 6), True)
    """
    inputs = Inputs.of(H, "H", C, *others)
    channel = inputs.complex(H, "H")
    if channel.ndim < 3 or 0 in channel.shape[-3:]:
        raise ShapeError(f"H: expected shape (..., K, N_R, Q) with K, N_R, Q >= 1, got {tuple(channel.shape)}")
    antennas, users = channel.shape[-2:]
    named = [("C", C), *((f"others[{index}]", other) for index, other in enumerate(others))]
    checked = [covariance_input(value, name, H, C, *others, size=antennas) for name, value in named]
    shapes = [(name, covariance.shape[:-2]) for (name, _), (_, covariance) in zip(named, checked, strict=True)]
    blocks = batch_shape(("H", channel.shape[:-2]), *shapes)[-1]
    eye = torch.eye(blocks, dtype=channel.dtype, device=channel.device)
    stacked = []
    for own, covariance in checked:
        ahead = covariance.shape[:-3]
        covariance = covariance.expand(*ahead, blocks, antennas, antennas)
        spread = torch.einsum("...kij,kl->...kilj", covariance, eye)
        stacked.append(own.back(spread.reshape(*ahead, blocks * antennas, blocks * antennas)))
    channel = channel.expand(*channel.shape[:-3], blocks, antennas, users)
    return inputs.back(channel.reshape(*channel.shape[:-3], blocks * antennas, users)), *stacked


def repeat_block(H: Array, C: Array, K: int, *others: Array) -> tuple[Any, ...]:
    r"""The channel of symbols that are sent K times over the same channel, with fresh noise each time.

    `stack_blocks` with K equal blocks: for a receiver that knows `C` the same as `H` with the noise :math:`C / K`.

    Args:
        H: (..., N_R, Q) complex channel, path loss included.
        C: (..., N_R, N_R) covariance of the whole noise in W in each repetition.
        K: how many times every symbol is sent, at least 1; as many channel uses, and as many times the energy.
        others: more covariances like `C`, for example what the receiver is designed for.

    Returns:
        The channel (..., K N_R, Q), and each covariance as (..., K N_R, K N_R).

    Raises:
        TypeError, ShapeError, NotPSDError, NonFiniteError: as `stack_blocks`. InputError: `K` below 1.

    Source: maximum ratio combining, generalised to coloured noise.

    Example:
        >>> import numpy as np
        >>> from rmtllmf.channel import lmmse
        >>> H, C = repeat_block(np.eye(2) + 0j, 3 * np.eye(2), K=3)
        >>> lmmse(H, 1.0, C).sinr
        array([1., 1.])
    """
    blocks = whole_number(K, "K", at_least=1)
    inputs = Inputs.of(H, "H", C, *others)
    channel = inputs.complex(H, "H")
    check_channel(channel)
    antennas = channel.shape[-2]
    named = [("C", C), *((f"others[{index}]", other) for index, other in enumerate(others))]
    covariances = []
    for name, value in named:
        own, covariance = covariance_input(value, name, H, C, *others, size=antennas)
        covariances.append(own.back(covariance[..., None, :, :]))
    repeated = channel[..., None, :, :].expand(*channel.shape[:-2], blocks, *channel.shape[-2:])
    return stack_blocks(inputs.back(repeated), *covariances)
