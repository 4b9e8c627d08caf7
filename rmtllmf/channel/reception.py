"""How well users are received: what every receiver reports, and what `transmit` works with."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._arrays import Array, ArrayLike, Inputs, check_hermitian, check_psd, resolution
from .._display import counted, decibels, html_table, spread
from ..errors import InputError, ShapeError

__all__ = ["Reception"]

_DEVIATION = 0.05  # relative, of what belongs together but may have been measured apart


@dataclass(frozen=True)
class Reception:
    r"""How well every user is received, in the columns' own order.

    The receiver's estimate of user q is :math:`\hat s_q = w_q^H (y - \text{cancelled users})
    = \sum_j G_{qj} s_j + w_q^H z`, with the noise's true covariance :math:`C`.

    Attributes:
        mse: (..., Q) :math:`E|\hat s_q - s_q|^2`, for symbols of unit variance. Above 1 is possible when mismatched.
        sinr: (..., Q) signal to interference plus noise, linear.
        rate: (..., Q) nats per channel use, ``log1p(sinr)``.
        gain: (..., Q) the gain :math:`g_q = G_{qq}` of the wanted symbol in its estimate, real.
        order: (..., Q) the users, first decoded first; None for a linear receiver.
        error_covariance: (..., Q, Q) complex, :math:`E = (G - I)(G - I)^H + W^H C W`: covariance of
            :math:`\hat s - s`.
        noise_covariance: (..., Q, Q) complex, :math:`N = (G - \mathrm{diag}\,g)(G - \mathrm{diag}\,g)^H + W^H C W`:
            covariance of :math:`\hat s - \mathrm{diag}(g)\, s`.

    The receivers of this package fill all of them in. For a receiver of your own `from_errors` does, from its error
    covariance; `transmit` reads only `error_covariance` under "additive" (and that `mse` is its diagonal, unless None),
    and only `gain` and `noise_covariance` under "mmse" and "unbiased", so that the others may be None.

    Example:
        >>> import numpy as np
        >>> from rmtllmf.channel import lmmse
        >>> rx = lmmse(np.eye(2) + 0j, P=3.0, C=np.eye(2))
        >>> rx.mse, rx.sinr
        (array([0.25, 0.25]), array([3., 3.]))
    """

    mse: Any
    sinr: Any
    rate: Any
    gain: Any
    order: Any
    error_covariance: Any
    noise_covariance: Any

    @classmethod
    def from_errors(
        cls, error_covariance: Array, *, gain: ArrayLike | None = None, noise_covariance: Array | None = None
    ) -> Reception:
        r"""The reception by a receiver of one's own, from the covariance of its errors.

        A joint estimate of least mean squared error, linear or not, is uncorrelated with its errors, so that their
        covariance says all:

        .. math:: g_q = 1 - E_{qq}, \qquad N = E - E D - D E + D^2, \qquad D = \mathrm{diag}(E)

        Any other receiver (one that cancels users, for example) needs its gain and noise covariance too, unless it is
        only used with ``estimator="additive"``, which reads `E` alone.

        Args:
            error_covariance: (..., Q, Q) :math:`E`, covariance of :math:`\hat s - s` for symbols of unit variance;
                diagonal if the users' errors have nothing to do with each other.
            gain: (..., Q) :math:`g_q = \Re \operatorname{E}[\hat s_q s_q^*]`; None: that of least mean squared error.
            noise_covariance: (..., Q, Q) :math:`N`, covariance of :math:`\hat s - \mathrm{diag}(g)\, s`; together with
                `gain`.

        Returns:
            A `Reception`, with ``order`` None, in the kind and precision of `error_covariance`. Gradients are kept.

        Raises:
            InputError: errors larger than the symbols, :math:`E \not\preceq I`, without `gain` and `noise_covariance`;
                one of these without the other; :math:`E_{qq} \ne (1 - g_q)^2 + N_{qq}`. NotPSDError: no covariance.
            ShapeError, TypeError, NonFiniteError: as everywhere.

        Source: the orthogonality principle.

        Example:
            >>> import numpy as np
            >>> rx = Reception.from_errors(np.array([[0.2, 0.1], [0.1, 0.5]]))
            >>> rx.mse, rx.gain, rx.sinr
            (array([0.2, 0.5]), array([0.8, 0.5]), array([4., 1.]))
        """
        inputs = Inputs.of(error_covariance, "error_covariance", gain, noise_covariance)
        E = _covariance(inputs, error_covariance, "error_covariance")
        mse = torch.diagonal(E, dim1=-2, dim2=-1).real
        if gain is None and noise_covariance is None:
            largest = float(torch.linalg.eigvalsh(E.detach()).max())
            if largest > 1 + 1e2 * resolution(error_covariance):
                raise InputError(
                    f"error_covariance: has an eigenvalue of {largest:.6g}, but an estimate of least mean squared "
                    "error is never off by more than the symbols' variance, 1; for another receiver pass its gain and "
                    "noise_covariance"
                )
            D = torch.diag_embed(mse).to(E.dtype)
            g, N = 1 - mse, E - E @ D - D @ E + D.square()
        elif gain is None or noise_covariance is None:
            raise InputError("gain, noise_covariance: expected both or neither")
        else:
            g, N = inputs.real(gain, "gain"), _covariance(inputs, noise_covariance, "noise_covariance")
            if g.shape != mse.shape or N.shape != E.shape:
                raise ShapeError(
                    f"gain, noise_covariance: expected shapes {tuple(mse.shape)} and {tuple(E.shape)} for this "
                    f"error_covariance, got {tuple(g.shape)} and {tuple(N.shape)}"
                )
            power = torch.diagonal(N, dim1=-2, dim2=-1).real
            eps = resolution(error_covariance, gain, noise_covariance)
            check_mse(mse, (1 - g).square() + power, "the diagonal of error_covariance", "(1 - gain)^2 + noise", eps)
        power = torch.diagonal(N, dim1=-2, dim2=-1).real
        sinr = torch.where(power > 0, g.square() / torch.where(power > 0, power, 1.0), torch.inf)
        sinr = torch.where(g == 0, 0.0, sinr)
        back = inputs.back
        return cls(back(mse), back(sinr), back(torch.log1p(sinr)), back(g), None, back(E), back(N))

    def __repr__(self) -> str:
        users = next((np.shape(v)[-1:] for v in (self.mse, self.gain, self.error_covariance) if v is not None), ())
        shape = () if self.mse is None else np.shape(self.mse)[:-1]
        found = [counted(users[0], "user")] if users else []
        found += [f"draws {tuple(shape)}"] if shape else []
        found += [] if self.mse is None else [f"MSE {spread(self.mse)}"]
        found += [] if self.sinr is None else [f"SINR {decibels(self.sinr)}"]
        found += [] if self.rate is None else [f"rates {spread(self.rate, 'nats')}"]
        return f"Reception({', '.join([*found, 'linear' if self.order is None else 'successive'])})"

    def _repr_html_(self) -> str:
        columns = (self.mse, self.sinr, self.rate, self.gain)
        if any(column is None or len(np.shape(column)) != 1 for column in columns):
            return f"<pre>{escape(repr(self))}</pre>"
        turns = None if self.order is None else [int(user) for user in self.order]
        rows = [
            [
                q,
                f"{float(self.mse[q]):.3g}",
                decibels(self.sinr[q], ""),
                f"{float(self.rate[q]):.3g}",
                f"{float(self.gain[q]):.3g}",
                "" if turns is None else turns.index(q) + 1,
            ]
            for q in range(self.mse.shape[0])
        ]
        return html_table(repr(self), ["user", "MSE", "SINR (dB)", "rate (nats)", "gain", "decoded"], rows)


def _covariance(inputs: Inputs, value: Array, argument: str) -> Tensor:
    """(..., Q, Q) complex128, Hermitian and positive semidefinite to its own precision."""
    C = inputs.complex(value, argument, real_too=True)
    if C.ndim < 2 or C.shape[-1] == 0:
        raise ShapeError(f"{argument}: expected shape (..., Q, Q) with Q >= 1, got {tuple(C.shape)}")
    check_hermitian(C, C.shape[-1], argument, resolution(value))
    check_psd(torch.linalg.eigvalsh(C.detach()), argument, resolution(value))
    return C


def check_mse(mse: Tensor, expected: Tensor, name: str, reference: str, eps: float) -> None:
    """Raise unless both agree as well as two measurements do; `eps` is what last digits are worth."""
    mse, expected = mse.detach(), expected.detach()
    if mse.shape != expected.shape:
        raise ShapeError(f"{name}: expected shape {tuple(expected.shape)} as {reference}, got {tuple(mse.shape)}")
    off = (mse - expected).abs() - _DEVIATION * torch.maximum(mse, expected)
    if bool((off > 1e4 * eps * expected.amax(-1, keepdim=True)).any()):
        worst = int(off.argmax())
        raise InputError(
            f"{name}: expected {reference}, {float(expected.reshape(-1)[worst]):.6g}, got "
            f"{float(mse.reshape(-1)[worst]):.6g}"
        )
