"""Where the users are, what the air does to them, and how loud the receiver itself is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from .._random import Seed, generator, seed_number
from .._state import finite_number, whole_number
from ..errors import InputError
from ._placement import Placement, draw_azimuths, draw_distances, given_places
from .fading import Correlation, Fading, Rician, Shadowing, antenna_correlation, draw_fading, draw_shadowing
from .path_loss import log_distance
from .path_loss_3gpp import MODELS, los_probability, model_gain, model_shadowing
from .uplink import Uplink

__all__ = ["UplinkScenario"]

BOLTZMANN = 1.380649e-23  # J/K
ROOM_TEMPERATURE = 290.0  # K

PathLoss: TypeAlias = str | float | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class UplinkScenario:
    r"""A cell: users at random places, path loss, shadowing, fading, thermal noise.

    .. math:: h_q = \sqrt{g(d_q)\, 10^{X_q/10}}\ \tilde h_q, \qquad \sigma^2 = k T_0 B F

    The defaults are the set-up of the R-MTLLMF paper, with what it leaves open filled in so that its mean squared
    errors come out (see the theory page): users uniform over the ring, free space, a bandwidth that gives a user
    at 100 m a mean SNR of 24.8 dB per antenna, no shadowing (:math:`X_q = 0`), and uncorrelated Rayleigh fading,
    :math:`\tilde h_q \sim \mathcal{CN}(0, I_{N_R})`.

    Nobody moves: a draw is one block of constant fading, without Doppler, and draws are independent.

    Attributes:
        num_users: number of single-antenna users Q.
        num_antennas: receive antennas N_R.
        power: transmit power of every user in W.
        min_distance: of the users from the base station, in m, on the ground.
        max_distance: likewise.
        placement: "disc" (uniform over the area of the ring), "distance" (uniform in distance), the users' distances
            themselves in m, as a sequence of `num_users` numbers, or their coordinates in m, as `num_users` pairs
            (x, y) with the base station at the origin and its antennas in a row along y. Unless coordinates are
            given, users are in directions uniform over the circle.
        path_loss: "free_space"; the path loss exponent as a number (from free space at 1 m); "uma", "umi" or "rma", the
            cells of 3GPP TR 38.901 at their default heights, where a line of sight to a user exists at random with
            the standard's probability; or a function from distances in m, a float64 tensor (..., Q), to power gains.
        carrier: carrier frequency in Hz.
        bandwidth: in Hz.
        noise_figure: of the receiver, in dB.
        fading: "rayleigh", or a `Rician`, keyword only like what follows.
        correlation: between the antennas, of the scattered part of the fading: the correlation of neighbours as a
            number (`exponential_correlation`), or a matrix (N_R, N_R), or one a user (Q, N_R, N_R), with ones on its
            diagonal. Users are independent of each other (Kronecker's model).
        shadowing: its standard deviation in dB, "3gpp" (what TR 38.901 gives for the path loss), or a `Shadowing`.

    Raises:
        InputError: a number out of range, an unknown name, a `path_loss` that does not reach as far as the users;
            NotPSDError: a `correlation` that is none; ShapeError: as many places as users are expected, or a
            matrix does not fit; TypeError: something that is no number.

    Source: R-MTLLMF, section IV. H. Friis, 1946, for free space. `path_loss` and `fading` name the others.

    Example:
        >>> up = UplinkScenario().draw(3, seed=0)
        >>> up.H.shape, up.P.shape, up.noise.shape
        (torch.Size([3, 16, 8]), torch.Size([3, 8]), torch.Size([3]))
        >>> UplinkScenario(num_users=2, num_antennas=4).draw(seed=0, numpy=True).H.shape
        (4, 2)
        >>> from rmtllmf.channel import Rician
        >>> city = UplinkScenario(path_loss="umi", carrier=3.5e9, fading=Rician(9.0), correlation=0.5, shadowing="3gpp")
        >>> city.draw(3, seed=0).H.shape
        torch.Size([3, 16, 8])
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
    _: KW_ONLY
    fading: Fading = "rayleigh"
    correlation: Correlation = 0.0
    shadowing: float | str | Shadowing = 0.0

    def __post_init__(self) -> None:
        for name in ("num_users", "num_antennas"):
            count = getattr(self, name)
            object.__setattr__(self, name, whole_number(count, name, at_least=1))
        for name in ("min_distance", "max_distance", "carrier", "bandwidth"):
            finite_number(getattr(self, name), name, positive=True)
        if finite_number(self.power, "power") < 0:
            raise InputError(f"power: expected at least 0 W, got {self.power}")
        if abs(finite_number(self.noise_figure, "noise_figure")) > 300:
            raise InputError(f"noise_figure: expected decibels, at most 300 either way, got {self.noise_figure}")
        if self.max_distance < self.min_distance:
            raise InputError(
                f"max_distance: expected at least min_distance, {self.min_distance} m, got {self.max_distance} m"
            )
        places = given_places(self.placement, self.num_users)
        if isinstance(self.path_loss, str):
            if self.path_loss not in ("free_space", *MODELS):
                raise InputError(
                    "path_loss: expected 'free_space', 'uma', 'umi', 'rma', an exponent or a function, "
                    f"got {self.path_loss!r}"
                )
            if self.path_loss in MODELS:
                self._check_reach(places)
        elif not callable(self.path_loss):
            finite_number(self.path_loss, "path_loss", positive=True)
        if self.fading != "rayleigh" and not isinstance(self.fading, Rician):
            raise InputError(f"fading: expected 'rayleigh' or a Rician, got {self.fading!r}")
        antenna_correlation(self.correlation, self.num_antennas, self.num_users)
        self._shadowing().matrix(self.num_users)

    def _check_reach(self, places: Tensor | None) -> None:
        """The standard's formulas hold for some carriers and distances only: better told here than in a draw."""
        ends = torch.tensor([self.min_distance, self.max_distance], dtype=torch.float64)
        if places is not None:
            ends = places if places.ndim == 1 else places.square().sum(-1).sqrt()
        try:
            model_gain(str(self.path_loss), ends, self.carrier, False)
        except InputError as error:
            raise InputError(f"path_loss: {self.path_loss!r} does not fit this scenario; {error}") from None

    def _shadowing(self) -> Shadowing:
        shadowing = self.shadowing if isinstance(self.shadowing, Shadowing) else Shadowing(self.shadowing)
        if isinstance(shadowing.deviation, str) and self.path_loss not in MODELS:
            raise InputError("shadowing: '3gpp' needs the path_loss 'uma', 'umi' or 'rma'; give a number of dB")
        return shadowing

    @property
    def noise(self) -> float:
        """Thermal noise power per antenna in W, ``k T0 B F`` at 290 K."""
        return BOLTZMANN * ROOM_TEMPERATURE * self.bandwidth * 10 ** (self.noise_figure / 10)

    def gain(self, distances: Tensor, *, los: Tensor | None = None) -> Tensor:
        """Power gain of the path at `distances` (..., in m), without shadowing: a float64 tensor of the same shape.

        With the path losses "uma", "umi" and "rma" `los`, of the same shape, says who has a line of sight; without it
        the result is the mean over both, by their probabilities.
        """
        if callable(self.path_loss):
            gains = self.path_loss(distances)
            if not isinstance(gains, Tensor) or gains.shape != distances.shape or not bool((gains >= 0).all()):
                raise InputError("path_loss: the function must return a power gain >= 0 for every distance")
            return gains.to(torch.float64)
        if self.path_loss in MODELS:
            model = str(self.path_loss)
            if los is not None:
                return model_gain(model, distances, self.carrier, los)
            clear, blocked = (model_gain(model, distances, self.carrier, state) for state in (True, False))
            return blocked + los_probability(distances, model) * (clear - blocked)
        return log_distance(distances, self.carrier, 2.0 if isinstance(self.path_loss, str) else self.path_loss)

    def draw(
        self,
        *batch: int,
        seed: Seed,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.complex128,
        numpy: bool = False,
    ) -> Uplink:
        """Independent draws of the users' places, of who has a line of sight, of shadowing and fading.

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
        self._check_draw(batch, device, dtype, numpy)
        number = seed_number(seed)
        distances, azimuths = self._places(batch, number)
        los = None
        if self.path_loss in MODELS:
            chance = torch.rand(distances.shape, dtype=torch.float64, generator=generator(number, "line of sight"))
            los = chance < los_probability(distances, str(self.path_loss))
        gain = self.gain(distances, los=los)
        shadowing = self._shadowing()
        if shadowing.deviation != 0:
            deviation = self._deviation(shadowing.deviation, distances, los)
            gain = gain * draw_shadowing(shadowing, deviation, distances, azimuths, number)
        correlation = antenna_correlation(self.correlation, self.num_antennas, self.num_users)
        fading = draw_fading(self.fading, correlation, azimuths, los, self.num_antennas, number)
        return self._uplink(gain.sqrt()[..., None, :] * fading, device, dtype, numpy)

    def _check_draw(
        self, batch: tuple[int, ...], device: torch.device | str | None, dtype: torch.dtype, numpy: bool
    ) -> None:
        if dtype not in (torch.complex64, torch.complex128):
            raise InputError(f"dtype: expected torch.complex64 or torch.complex128, got {dtype}")
        if numpy and device is not None and torch.device(device).type != "cpu":
            raise InputError(f"device: NumPy arrays live on the CPU, got {device}")
        for size in batch:
            whole_number(size, "batch", at_least=0)

    def _uplink(self, H: Tensor, device: torch.device | str | None, dtype: torch.dtype, numpy: bool) -> Uplink:
        H = H.to(dtype)
        real = torch.float64 if dtype == torch.complex128 else torch.float32
        P = torch.full((*H.shape[:-2], self.num_users), self.power, dtype=real)
        noise = torch.full(H.shape[:-2], self.noise, dtype=real)
        if numpy:
            return Uplink(H.numpy(), P.numpy(), noise.numpy())
        return Uplink(H.to(device), P.to(device), noise.to(device))

    def _places(self, batch: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
        """Distances and directions of the users, (..., Q) each."""
        azimuths = draw_azimuths(self.placement, (*batch, self.num_users), generator(seed, "azimuth"))
        return self._distances(batch, generator(seed, "placement")), azimuths

    def _distances(self, batch: tuple[int, ...], source: torch.Generator) -> Tensor:
        shape = (*batch, self.num_users)
        return draw_distances(self.placement, shape, self.min_distance, self.max_distance, source)

    def _deviation(self, deviation: float | str, distances: Tensor, los: Tensor | None) -> Tensor:
        if isinstance(deviation, str):
            assert los is not None  # "3gpp" comes with one of the standard's path losses
            return model_shadowing(str(self.path_loss), distances, self.carrier, los)
        return torch.full_like(distances, deviation)
