"""The multiple access channel itself: what a draw of the uplink consists of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._arrays import Array, Inputs, batch_shape, check_channel, powers
from .._display import counted, decibels

__all__ = ["Uplink"]


@dataclass(frozen=True)
class Uplink:
    r"""One draw, or a batch of draws, of the multiple access channel.

    .. math:: y = H P^{1/2} s + z, \qquad z \sim \mathcal{CN}(0, C + \sigma^2 I)

    with unit-variance symbols :math:`s` of :math:`Q` single-antenna users, :math:`N_R` receive antennas, thermal
    noise of power :math:`\sigma^2` per antenna, and a jammer's noise of covariance :math:`C`, which is not part of
    the uplink: see `worst_case_covariance`.

    Attributes:
        H: (..., N_R, Q) complex, path loss included.
        P: (..., Q) transmit powers in W.
        noise: (...) thermal noise power per receive antenna in W.

    All three become arrays of one kind (torch if any is) and one precision (that of `H`), `P` of the shape above.

    Raises:
        TypeError: `H` is real.
        ShapeError: the shapes do not fit.
        InputError: a power or `noise` is negative; ``NonFiniteError`` if not finite.

    Source: R-MTLLMF, eq. 2.

    Example:
        >>> import torch
        >>> up = Uplink(torch.ones(4, 2, dtype=torch.complex128), torch.tensor([1e-4, 1e-4]), torch.tensor(1e-15))
        >>> up.noise_covariance.shape
        torch.Size([4, 4])
    """

    H: Array
    P: Array
    noise: Array

    def __post_init__(self) -> None:
        inputs = Inputs.of(self.H, "H", self.P, self.noise)
        H = inputs.complex(self.H, "H")
        check_channel(H)
        P = powers(inputs.nonnegative(self.P, "P"), H)
        noise = inputs.nonnegative(self.noise, "noise")
        batch_shape(("H", H.shape[:-2]), ("P", P.shape[:-1]), ("noise", noise.shape))
        for name, tensor in (("H", H), ("P", P), ("noise", noise)):
            object.__setattr__(self, name, inputs.back(tensor))

    def __repr__(self) -> str:
        antennas, users = self.H.shape[-2:]
        shape = tuple(self.H.shape[:-2])
        found = [f"{counted(users, 'user')} at {decibels(self.P, 'dBm')}", counted(antennas, "antenna")]
        found += [f"draws {shape}"] if shape else []
        found += [f"noise {decibels(self.noise, 'dBm')}"]
        return f"Uplink({', '.join(found)})"

    @property
    def noise_covariance(self) -> Any:
        """Covariance of the thermal noise, ``noise * I``: (..., N_R, N_R), complex like `H`."""
        size = self.H.shape[-2]
        if isinstance(self.H, Tensor):
            return self.noise[..., None, None] * torch.eye(size, dtype=self.H.dtype, device=self.H.device)
        return np.asarray(self.noise)[..., None, None] * np.eye(size, dtype=self.H.dtype)
