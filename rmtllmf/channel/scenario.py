"""Where the users are, what the air does to them, and how loud the receiver itself is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from .._random import Seed, generator, seed_number
from .._state import finite_number
from ..errors import InputError, ShapeError
from .uplink import Uplink

__all__ = ["UplinkScenario"]

SPEED_OF_LIGHT = 299_792_458.0  # m/s
BOLTZMANN = 1.380649e-23  # J/K
ROOM_TEMPERATURE = 290.0  # K

PathLoss: TypeAlias = str | float | Callable[[Tensor], Tensor]
Placement: TypeAlias = str | Sequence[float]


@dataclass(frozen=True)
class UplinkScenario:
    r"""A cell: users at random distances, path loss, Rayleigh fading, thermal noise.

    .. math:: h_q = \sqrt{g(d_q)}\, \tilde h_q, \quad \tilde h_q \sim \mathcal{CN}(0, I_{N_R}), \qquad
              \sigma^2 = k T_0 B F

    The defaults are the set-up of the R-MTLLMF paper, with what it leaves open filled in so that its mean squared
    errors come out (see the theory page): users uniform over the ring, free space, and a bandwidth that gives a user
    at 100 m a mean SNR of 24.8 dB per antenna.

    Attributes:
        num_users: number of single-antenna users Q.
        num_antennas: receive antennas N_R.
        power: transmit power of every user in W.
        min_distance: of the users from the base station, in m.
        max_distance: likewise.
        placement: "disc" (uniform over the area of the ring), "distance" (uniform in distance), or the users'
            distances themselves in m, as a sequence of `num_users` numbers.
        path_loss: "free_space", the path loss exponent as a number (with free space up to 1 m), or a function from
            distances in m, a float64 tensor (..., Q), to power gains.
        carrier: carrier frequency in Hz.
        bandwidth: in Hz.
        noise_figure: of the receiver, in dB.

    Raises:
        InputError: a number out of range, an unknown `placement` or `path_loss`; ShapeError: as many distances as
            users are expected; TypeError: something that is no number.

    Source: R-MTLLMF, section IV. H. Friis, 1946, for free space.

    Example:
        >>> up = UplinkScenario().draw(3, seed=0)
        >>> up.H.shape, up.P.shape, up.noise.shape
        (torch.Size([3, 16, 8]), torch.Size([3, 8]), torch.Size([3]))
        >>> UplinkScenario(num_users=2, num_antennas=4).draw(seed=0, numpy=True).H.shape
        (4, 2)
    """

    num_users: int = 8
    num_antennas: int = 16
    power: float = 1e-4
    min_distance: float = 100.0
    max_distance: float = 1000.0
    placement: Placement = "disc"
    path_loss: PathLoss = "free_space"
    carrier: float = 2.4e9
    bandwidth: float = 8.2e5
    noise_figure: float = 0.0

    def __post_init__(self) -> None:
        for name in ("num_users", "num_antennas"):
            count = getattr(self, name)
            if isinstance(count, bool) or not isinstance(count, int):
                raise TypeError(f"{name}: expected an int, got {type(count).__name__}")
            if count < 1:
                raise InputError(f"{name}: expected at least 1, got {count}")
        for name in ("min_distance", "max_distance", "carrier", "bandwidth"):
            finite_number(getattr(self, name), name, positive=True)
        if finite_number(self.power, "power") < 0:
            raise InputError(f"power: expected at least 0 W, got {self.power}")
        finite_number(self.noise_figure, "noise_figure")
        if self.max_distance < self.min_distance:
            raise InputError(
                f"max_distance: expected at least min_distance, {self.min_distance} m, got {self.max_distance} m"
            )
        if isinstance(self.placement, str):
            if self.placement not in ("disc", "distance"):
                raise InputError(
                    f"placement: expected 'disc', 'distance' or the distances in m, got {self.placement!r}"
                )
        else:
            if len(self.placement) != self.num_users:
                raise ShapeError(f"placement: expected {self.num_users} distances, got {len(self.placement)}")
            for index, distance in enumerate(self.placement):
                finite_number(distance, f"placement[{index}]", positive=True)
        if isinstance(self.path_loss, str):
            if self.path_loss != "free_space":
                raise InputError(f"path_loss: expected 'free_space', an exponent or a function, got {self.path_loss!r}")
        elif not callable(self.path_loss):
            finite_number(self.path_loss, "path_loss", positive=True)

    @property
    def noise(self) -> float:
        """Thermal noise power per antenna in W, ``k T0 B F`` at 290 K."""
        return BOLTZMANN * ROOM_TEMPERATURE * self.bandwidth * 10 ** (self.noise_figure / 10)

    def gain(self, distances: Tensor) -> Tensor:
        """Mean power gain of the path at `distances` (..., in m), a float64 tensor of the same shape."""
        if callable(self.path_loss):
            gains = self.path_loss(distances)
            if not isinstance(gains, Tensor) or gains.shape != distances.shape or not bool((gains >= 0).all()):
                raise InputError("path_loss: the function must return a power gain >= 0 for every distance")
            return gains.to(torch.float64)
        exponent = 2.0 if isinstance(self.path_loss, str) else float(self.path_loss)
        at_one_metre = (SPEED_OF_LIGHT / (4 * math.pi * self.carrier)) ** 2
        return at_one_metre * distances**-exponent

    def draw(
        self,
        *batch: int,
        seed: Seed,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.complex128,
        numpy: bool = False,
    ) -> Uplink:
        """Independent draws of the users' places and of the fading.

        Args:
            batch: leading dimensions; ``draw(1500, seed=0)`` gives 1,500 draws.
            seed: an int or a ``torch.Generator``. Drawn on the CPU in double precision, so that the same seed gives
                the same channel on every device and in every dtype.
            device: where the result goes.
            dtype: torch.complex128 or torch.complex64; powers and noise get the matching real one.
            numpy: return NumPy arrays (on the CPU).

        Returns:
            An `Uplink` with `H` (..., N_R, Q), `P` (..., Q) and `noise` (...), where ... stands for `batch`.

        Raises:
            InputError: a negative batch dimension, another dtype, `numpy` together with a device that is not the CPU.

        Example:
            >>> import torch
            >>> scenario = UplinkScenario(num_users=2)
            >>> torch.equal(scenario.draw(seed=1).H, scenario.draw(seed=1).H)
            True
        """
        if dtype not in (torch.complex64, torch.complex128):
            raise InputError(f"dtype: expected torch.complex64 or torch.complex128, got {dtype}")
        if numpy and device is not None and torch.device(device).type != "cpu":
            raise InputError(f"device: NumPy arrays live on the CPU, got {device}")
        if any(isinstance(size, bool) or not isinstance(size, int) or size < 0 for size in batch):
            raise InputError(f"batch: expected whole numbers >= 0, got {batch}")
        number = seed_number(seed)
        distances = self._distances(batch, generator(number, "placement"))
        fading = torch.randn(
            *batch, self.num_antennas, self.num_users, dtype=torch.complex128, generator=generator(number, "fading")
        )
        H = (self.gain(distances).sqrt()[..., None, :] * fading).to(dtype)
        real = torch.float64 if dtype == torch.complex128 else torch.float32
        P = torch.full((*batch, self.num_users), self.power, dtype=real)
        noise = torch.full(batch, self.noise, dtype=real)
        if numpy:
            return Uplink(H.numpy(), P.numpy(), noise.numpy())
        return Uplink(H.to(device), P.to(device), noise.to(device))

    def _distances(self, batch: tuple[int, ...], source: torch.Generator) -> Tensor:
        shape = (*batch, self.num_users)
        if not isinstance(self.placement, str):
            return torch.tensor([float(d) for d in self.placement], dtype=torch.float64).expand(shape)
        uniform = torch.rand(shape, dtype=torch.float64, generator=source)
        if self.placement == "distance":
            return self.min_distance + (self.max_distance - self.min_distance) * uniform
        inner, outer = self.min_distance**2, self.max_distance**2
        return (inner + (outer - inner) * uniform).sqrt()
