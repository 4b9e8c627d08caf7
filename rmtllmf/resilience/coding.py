r"""Codes for task vectors at equal channel uses: what fewer numbers are worth over the same air.

A sender that has n/K numbers for the channel uses of n sends each of them K times, and the base station combines the
copies. How much that helps is for the channel to say: the same symbols in K blocks are a channel with K times the
antennas, `rmtllmf.channel.repeat_block` (the same block, fresh noise) or `rmtllmf.channel.stack_blocks` (independent
blocks), and from there on everything is as without a code:

>>> import torch
>>> from rmtllmf.channel import UplinkScenario, repeat_block, sic, transmit
>>> from rmtllmf.resilience.low_rank_code import low_rank_code
>>> up = UplinkScenario().draw(seed=0)
>>> vectors = [{"w": torch.ones(64, 64)} for _ in range(up.H.shape[-1])]
>>> codes = [low_rank_code(vector, rank=1) for vector in vectors]
>>> K = repetitions(codes[0], vectors[0])
>>> H, C = repeat_block(up.H, 125 * up.noise_covariance, K)
>>> received = transmit([code.sent for code in codes], sic(H, up.P, C), seed=0)
>>> decoded = [code.decode(sent) for code, sent in zip(codes, received, strict=True)]
>>> K, decoded[0]["w"].shape
(32, torch.Size([64, 64]))

`transmit` asks for the same names and shapes from all users: give all of them the same rank (`ranks_for`) or density.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._arrays import Array, ArrayLike, Inputs
from .._display import counted
from .._state import Tensors, check_finite, check_keys, check_shapes, finite_number, whole_number
from ..channel import Reception
from ..errors import InputError
from ._form import Form

__all__ = ["Encoding", "channel_uses", "reliable_bits", "repeated_mse", "repetitions"]

SCALE_BITS = 32
"""What a number that is told, a float32, costs."""


@dataclass(frozen=True, eq=False)
class Encoding:
    r"""What one user sends in place of a vector, what that costs, and how the base station gets the vector back.

    .. math:: \tau \to (x, \text{bits}), \qquad \hat\tau = \mathrm{decode}(\hat x, \text{bits})

    Attributes:
        sent: name -> floating-point tensor, in float32 at least: for `transmit`, in place of the vector.
        bits: how many bits have to be told besides, without errors (positions, scales). What follows from the agreed
            code and the shapes (rank, density) is free, and so are integer entries, as in `transmit`.
        decoder: from a received mapping to the vector in the caller's form; `decode` checks first.

    Example:
        >>> import torch
        >>> from rmtllmf.resilience.top_k_code import top_k_code
        >>> code = top_k_code({"w": torch.tensor([0.1, 5.0, -3.0, 0.2])}, density=0.5)
        >>> code.sent, code.bits
        ({'values': tensor([ 5., -3.])}, 3)
        >>> code.decode({"values": torch.tensor([4.0, -2.0])})
        {'w': tensor([ 0.,  4., -2.,  0.])}
    """

    sent: Mapping[str, Tensor]
    bits: int
    decoder: Callable[[Tensors], Any]

    def __repr__(self) -> str:
        numbers = sum(tensor.numel() for tensor in self.sent.values() if tensor.is_floating_point())
        return f"Encoding({counted(len(self.sent), 'tensor')}, {numbers:,} numbers, {self.bits:,} bits besides)"

    def decode(self, received: Tensors) -> Any:
        """The vector that received values of `sent` stand for, in the form and the dtypes of the one encoded.

        Args:
            received: the names and shapes of `sent`, in any floating dtype.

        Raises:
            TypeError: no mapping, or an entry that is not floating-point. StateMismatchError: other names or shapes.
            NonFiniteError: NaN or infinity, or a result that overflows the vector's dtype.

        Example: see `Encoding`.
        """
        return self.decoder(checked_received(received, self.sent, "received"))


def checked_received(received: Tensors, sent: Tensors, argument: str) -> dict[str, Tensor]:
    """A dict of finite floating-point tensors with the names and shapes of `sent`."""
    if not isinstance(received, Mapping):
        raise TypeError(f"{argument}: expected a mapping of name -> tensor, got {type(received).__name__}")
    state = dict(received.items())
    check_keys(state, sent, argument, "what was sent")
    for key, tensor in state.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{argument}[{key!r}]: expected a floating-point tensor, got {kind}")
    check_shapes(state, sent, argument, "what was sent")
    check_finite(state, argument)
    return state


def as_told(number: float, what: str) -> float:
    """A positive number, or 0, as float32 tells it."""
    told = float(torch.tensor(number, dtype=torch.float32))
    if not math.isfinite(told) or (number > 0 and told == 0):
        raise InputError(f"{what} does not fit into float32, as which it is told: {number:g}")
    return told


def channel_uses(vector: Tensors | Encoding, *, bits_per_use: float | None = None) -> int:
    r"""How many complex channel uses a vector takes as it is, or coded.

    .. math:: \lceil n / 2 \rceil + \lceil \text{bits} / \text{bits per use} \rceil

    Args:
        vector: a mapping of name -> tensor, of which `transmit` sends n numbers (floating entries but running
            statistics, ties once), or an `Encoding`.
        bits_per_use: what a reliable code carries in one channel use, for the bits of an encoding: see `reliable_bits`.

    Returns:
        The number of channel uses.

    Raises:
        InputError: an encoding with bits but no `bits_per_use`, or one that is not positive and finite; a vector
            without floating entries. TypeError: neither a mapping nor an `Encoding`.

    Source: two real coefficients a symbol, as in `transmit`.

    Example:
        >>> import torch
        >>> from rmtllmf.resilience.sign_code import sign_code
        >>> vector = {"w": torch.ones(10, 10)}
        >>> channel_uses(vector), channel_uses(sign_code(vector), bits_per_use=2.0)
        (50, 66)
    """
    if isinstance(vector, Encoding):
        return _symbols(vector.sent) + _uses_of_bits(vector, bits_per_use)
    return _symbols(vector)


def repetitions(code: Encoding, budget: int | Tensors | Encoding, *, bits_per_use: float | None = None) -> int:
    r"""How many whole times the numbers of a code fit into a budget of channel uses, its bits being sent once.

    .. math:: K = \Bigl\lfloor \frac{\text{budget} - \lceil \text{bits} / \text{bits per use} \rceil}
                                    {\lceil n / 2 \rceil} \Bigr\rfloor

    Args:
        code: an `Encoding`.
        budget: a number of channel uses, or what is to be compared with: the plain vector, or another encoding.
        bits_per_use: as for `channel_uses`.

    Returns:
        K, for `repeat_block` or `stack_blocks`; 0 if the code does not fit even once.

    Raises:
        InputError, TypeError: as `channel_uses`; a `budget` below 1.

    Source: equal channel uses at equal power per use are equal energy.

    Example:
        >>> import torch
        >>> from rmtllmf.resilience.low_rank_code import low_rank_code
        >>> vector = {"w": torch.ones(100, 100)}
        >>> repetitions(low_rank_code(vector, rank=5), vector)
        10
    """
    if not isinstance(code, Encoding):
        raise TypeError(f"code: expected an Encoding, got {type(code).__name__}")
    if isinstance(budget, Mapping | Encoding):
        uses = channel_uses(budget, bits_per_use=bits_per_use)
    else:
        uses = whole_number(budget, "budget", at_least=1)
    return max(0, uses - _uses_of_bits(code, bits_per_use)) // _symbols(code.sent)


def reliable_bits(reception: Reception | ArrayLike) -> float:
    r"""How many bits a channel use carries without errors, for the user and the block that are worst off.

    .. math:: \min_{b, q} R_{bq} \log_2 e, \qquad R_{bq} = -\ln \mu_{bq} \text{ from bare MSEs of matched receivers}

    This is a bound that codes of finite length stay below: a fraction of it is what to count on.

    Args:
        reception: a `Reception`, or MSEs between 0 and 1; any number of leading dimensions.

    Returns:
        Bits per channel use: 0 if somebody cannot be heard at all, infinity where nobody has noise.

    Raises:
        InputError: an MSE outside [0, 1], or none at all. NonFiniteError: NaN or infinity among them.

    Source: C. E. Shannon, 1948; R-MTLLMF eq. 5 for the rates behind MSEs.

    Example:
        >>> reliable_bits([0.25, 0.125])
        2.0
    """
    if isinstance(reception, Reception):
        return float(reception.rate.min()) * math.log2(math.e)
    mse = Inputs.of(reception, "mse").real(reception, "mse")
    if not mse.numel():
        raise InputError("mse: expected at least one number, got none")
    low, high = float(mse.min()), float(mse.max())
    if low < 0 or high > 1:
        raise InputError(
            f"mse: expected MSEs of matched receivers, between 0 and 1, got {low:.6g} to {high:.6g}; for a mismatched "
            "one pass its Reception"
        )
    return -math.log2(high) + 0.0 if high > 0 else math.inf


def repeated_mse(mse: ArrayLike, K: int) -> Array:
    r"""The MSE of the mean of K copies whose errors are independent: for bare MSEs, where there is no channel.

    .. math:: \mu_K = \mu / K

    That is what K calls of ``transmit(..., estimator="additive")`` with different seeds and the mean of them give. It
    assumes errors that have nothing to do with the symbol. A matched receiver shrinks, and part of its error is the
    symbol's own missing part, which K copies share: combining gives :math:`\mu / (K - (K - 1) \mu)` for a user without
    interference, more than :math:`\mu / K`. Where `H` is known use `repeat_block` or `stack_blocks` and the receiver.

    Args:
        mse: any shape, at least 0.
        K: the number of copies, at least 1.

    Returns:
        The same shape and kind (an array for numbers), divided by K.

    Raises:
        InputError: a negative MSE, or `K` below 1. NonFiniteError: NaN or infinity. TypeError: `K` is no int.

    Source: the variance of a mean.

    Example:
        >>> repeated_mse([0.2, 0.4], K=4)
        array([0.05, 0.1 ])
    """
    copies = whole_number(K, "K", at_least=1)
    inputs = Inputs.of(mse, "mse")
    return inputs.back(inputs.nonnegative(mse, "mse") / copies)


def _symbols(vector: Tensors) -> int:
    form, _ = Form.of(vector)
    return -(-form.stream.length // 2)


def _uses_of_bits(code: Encoding, bits_per_use: float | None) -> int:
    if bits_per_use is not None:
        bits_per_use = finite_number(bits_per_use, "bits_per_use", positive=True)
    if not code.bits:
        return 0
    if bits_per_use is None:
        raise InputError(
            f"bits_per_use: expected what a reliable code carries in a channel use (see reliable_bits), because this "
            f"encoding tells {code.bits} bits besides its numbers; got none"
        )
    return math.ceil(code.bits / bits_per_use)
