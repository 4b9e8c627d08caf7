"""The only file that knows Sionna: 3GPP TR 38.901 channels in full, and 5G LDPC codes. Needs the extra `sionna`.

Sionna is imported on first use, and kept from reaching further than it should: its import reseeds torch's global
generators, and it draws from, and computes in the precision of, global singletons. Here the former are put back, and
the latter are neither relied on nor changed.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .._arrays import Array, Inputs
from .._random import Seed, generator, seed_number
from .._state import finite_number, whole_number
from ..errors import InputError, NonFiniteError, ShapeError
from .path_loss_3gpp import BASE_HEIGHT, MODELS, USER_HEIGHT
from .scenario import UplinkScenario
from .uplink import Uplink

__all__ = ["ldpc_decode", "ldpc_encode", "sionna_uplink"]

_CHUNK = 32  # draws at once: Sionna keeps every ray of every path
_CLASSES = {"uma": "UMa", "umi": "UMi", "rma": "RMa"}


def sionna_uplink(
    scenario: str,
    *batch: int,
    seed: Seed,
    cell: UplinkScenario | None = None,
    los: bool | None = None,
    path_loss: bool = True,
    shadowing: bool = True,
    offset: float = 0.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.complex128,
    numpy: bool = False,
) -> Uplink:
    r"""Independent draws of an uplink in a cell of 3GPP TR 38.901, by Sionna's implementation.

    .. math:: h_q(f) = \sum_p a_{q,p}\, e^{-j 2 \pi f \tau_{q,p}}

    with the standard's clusters of rays, delays :math:`\tau`, angles and polarisations, its K factors, its path loss
    and correlated shadowing. The base station has a row of vertically polarised omnidirectional antennas, half a
    wavelength apart, along y; users are outdoors, have one such antenna and do not move. Heights are the standard's:
    25, 10 or 35 m for the base station in "uma", "umi" and "rma", 1.5 m for users.

    Args:
        scenario: "uma", "umi" or "rma".
        batch: leading dimensions; ``sionna_uplink("umi", 100, seed=0)`` gives 100 draws.
        seed: an int or a ``torch.Generator``. The same seed gives the same channel on every device and in every dtype,
            for one version of Sionna.
        cell: users, antennas, powers, placement, carrier, bandwidth and noise figure as an `UplinkScenario`, the
            default one if None. What Sionna brings itself, it must leave at its defaults: path loss, fading,
            correlation and shadowing.
        los: True or False to force a line of sight, or its absence, for all users; None: at random, as in the standard.
        path_loss: False leaves the path loss out.
        shadowing: False leaves the shadowing out.
        offset: :math:`f` in Hz: of the subcarrier that is taken from the carrier. It has one coefficient per antenna
            and user: the channel is flat over the bandwidth.
        device: where the result goes.
        dtype: torch.complex128 or torch.complex64; powers and noise get the matching real one.
        numpy: return NumPy arrays (on the CPU).

    Returns:
        An `Uplink` with `H` (..., N_R, Q), `P` (..., Q) and `noise` (...), where ... stands for `batch`.

    Raises:
        ImportError: Sionna is not installed.
        InputError: an unknown scenario, users or a carrier outside the standard's ranges, a `cell` with path loss,
            fading, correlation or shadowing of its own, or what `UplinkScenario.draw` rejects.

    Source: 3GPP TR 38.901, section 7; J. Hoydis et al., "Sionna: an open-source library for next-generation physical
    layer research", 2022.

    Example:
        >>> sionna_uplink("umi", 3, seed=0).H.shape  # doctest: +SKIP
        torch.Size([3, 16, 8])
    """
    if scenario not in MODELS:
        raise InputError(f"scenario: expected one of {', '.join(map(repr, MODELS))}, got {scenario!r}")
    if los is not None and not isinstance(los, bool):
        raise TypeError(f"los: expected True, False or None, got {type(los).__name__}")
    offset = finite_number(offset, "offset")
    cell = UplinkScenario() if cell is None else cell
    _check_cell(cell, scenario)
    cell._check_draw(batch, device, dtype, numpy)
    number = seed_number(seed)
    distances, azimuths = (part.reshape(-1, cell.num_users) for part in cell._places(batch, number))
    x, y = distances * torch.cos(azimuths), distances * torch.sin(azimuths)
    users = torch.stack([x, y, torch.full_like(x, USER_HEIGHT)], dim=-1)
    model = _model(scenario, cell, path_loss=path_loss, shadowing=shadowing)
    responses = [
        _responses(model, part, BASE_HEIGHT[scenario], los, offset, generator(number, "sionna", index))
        for index, part in enumerate(users.split(_CHUNK))
        if len(part)
    ]
    shape = (*batch, cell.num_antennas, cell.num_users)
    H = torch.cat(responses).reshape(shape) if responses else torch.zeros(shape, dtype=torch.complex128)
    return cell._uplink(H, device, dtype, numpy)


def ldpc_encode(bits: Array, n: int) -> Any:
    """The 5G LDPC code, with rate matching: `k` bits in, `n` bits out.

    Args:
        bits: (..., k) of zeros and ones, 12 <= k <= 8448, in any dtype.
        n: length of a codeword; the code rate ``k / n`` may be 1/5 to 948/1024.

    Returns:
        (..., n), in the kind and dtype of `bits`.

    Raises:
        ImportError: Sionna is not installed.
        InputError: something else than zeros and ones, or no such code.

    Source: 3GPP TS 38.212, section 5.3.2; Sionna's ``LDPC5GEncoder``.

    Example:
        >>> import torch
        >>> bits = torch.randint(2, (3, 100), generator=torch.Generator().manual_seed(0))
        >>> ldpc_encode(bits, 200).shape  # doctest: +SKIP
        torch.Size([3, 200])
    """
    given = bits if isinstance(bits, Tensor) else torch.as_tensor(bits)
    if given.ndim == 0:
        raise ShapeError("bits: expected shape (..., k), got ()")
    if given.is_complex() or not bool(((given == 0) | (given == 1)).all()):
        raise InputError("bits: expected zeros and ones")
    n = whole_number(n, "n", at_least=1)
    encoder, _ = _code(given.shape[-1], n, 20, str(given.device))
    with _sandbox():
        coded = encoder(given.reshape(-1, given.shape[-1]).to(torch.float32))
    coded = coded.reshape(*given.shape[:-1], n).to(given.dtype)
    return coded if isinstance(bits, Tensor) else coded.numpy()


def ldpc_decode(llr: Array, k: int, *, iterations: int = 20) -> Any:
    r"""Belief propagation on the 5G LDPC code of `ldpc_encode`.

    Args:
        llr: (..., n) log-likelihood ratios :math:`\log(P(b = 0) / P(b = 1))` of the code bits: positive for 0. (Sionna
            has the opposite sign.)
        k: number of information bits.
        iterations: of the decoder.

    Returns:
        (..., k) decided information bits, int64: NumPy for NumPy, torch for torch.

    Raises:
        ImportError: Sionna is not installed.
        InputError: no such code; NonFiniteError: NaN or infinity.

    Source: 3GPP TS 38.212, section 5.3.2; Sionna's ``LDPC5GDecoder``.

    Example:
        >>> import torch
        >>> bits = torch.randint(2, (3, 100), generator=torch.Generator().manual_seed(0))
        >>> coded = ldpc_encode(bits, 200)  # doctest: +SKIP
        >>> torch.equal(ldpc_decode(1.0 - 2.0 * coded, 100), bits)  # doctest: +SKIP
        True
    """
    inputs = Inputs.of(llr, "llr")
    ratios = inputs.real(llr, "llr")
    if ratios.ndim == 0:
        raise ShapeError("llr: expected shape (..., n), got ()")
    iterations = whole_number(iterations, "iterations", at_least=1)
    k = whole_number(k, "k", at_least=1)
    _, decoder = _code(k, ratios.shape[-1], iterations, str(ratios.device))
    with _sandbox():
        decided = decoder(-ratios.reshape(-1, ratios.shape[-1]).to(torch.float32))
    decided = decided.reshape(*ratios.shape[:-1], k).to(torch.int64)
    return decided.numpy() if inputs.numpy else decided


def _check_cell(cell: UplinkScenario, scenario: str) -> None:
    plain = UplinkScenario()
    for name in ("path_loss", "fading", "correlation", "shadowing"):
        value = getattr(cell, name)
        if type(value) is not type(getattr(plain, name)) or value != getattr(plain, name):
            raise InputError(f"cell: expected {name} at its default, because Sionna brings its own; got {value!r}")
    replace(cell, path_loss=scenario)  # raises if the standard does not reach that far


def _model(scenario: str, cell: UplinkScenario, *, path_loss: bool, shadowing: bool) -> Any:
    """One of Sionna's channel models, always in double precision on the CPU."""
    with _sandbox() as phy:
        tr38901 = phy.channel.tr38901
        where = {"precision": "double", "device": "cpu"}
        row = {"num_rows_per_panel": 1, "polarization": "single", "polarization_type": "V", "antenna_pattern": "omni"}
        return getattr(tr38901, _CLASSES[scenario])(
            carrier_frequency=cell.carrier,
            ut_array=tr38901.PanelArray(num_cols_per_panel=1, carrier_frequency=cell.carrier, **row, **where),
            bs_array=tr38901.PanelArray(
                num_cols_per_panel=cell.num_antennas, carrier_frequency=cell.carrier, **row, **where
            ),
            direction="uplink",
            enable_pathloss=path_loss,
            enable_shadow_fading=shadowing,
            **({} if scenario == "rma" else {"o2i_model": "low"}),
            **where,
        )


def _responses(
    model: Any, users: Tensor, base_height: float, los: bool | None, offset: float, source: torch.Generator
) -> Tensor:
    """Frequency responses (B, N_R, Q) at `offset` from the carrier, for users at (B, Q, 3)."""
    draws, count, _ = users.shape
    base = torch.tensor([0.0, 0.0, base_height], dtype=torch.float64).expand(draws, 1, 3)
    still = torch.zeros_like(users)
    outdoors = torch.zeros(draws, count, dtype=torch.bool)
    # from version 2.1 on users in a rural cell sit in cars, unless one says that they do not
    feet = {"in_car": outdoors} if model.__class__.__name__ == "RMa" and _knows(model.set_topology, "in_car") else {}
    with _sandbox(source), torch.no_grad():
        model.reset_topology() if hasattr(model, "reset_topology") else None
        model.set_topology(
            ut_loc=users,
            bs_loc=base,
            ut_orientations=still,
            bs_orientations=still[:, :1],
            ut_velocities=still,
            in_state=outdoors,
            los=los,
            **feet,
        )
        a, tau = model(1, 1.0)  # one sample in time
    phase = -2 * math.pi * offset * tau[:, 0, None]  # (B, 1, Q, paths)
    h = (a[:, 0, :, :, 0, :, 0] * torch.polar(torch.ones_like(phase), phase)).sum(-1)
    if not bool(torch.isfinite(torch.view_as_real(h)).all()):
        raise NonFiniteError("sionna_uplink: Sionna returned NaN or infinity; do two users stand at the same place?")
    return h


@lru_cache(maxsize=16)
def _code(k: int, n: int, iterations: int, device: str) -> tuple[Any, Any]:
    with _sandbox() as phy:
        where = {"precision": "single", "device": device}
        try:
            encoder = phy.fec.ldpc.LDPC5GEncoder(k, n, **where)
        except ValueError as error:
            raise InputError(f"k, n: there is no 5G LDPC code with k = {k}, n = {n} ({error})") from None
        return encoder, phy.fec.ldpc.LDPC5GDecoder(encoder, num_iter=iterations, hard_out=True, **where)


def _knows(function: Any, parameter: str) -> bool:
    return parameter in inspect.signature(function).parameters


@contextmanager
def _sandbox(source: torch.Generator | None = None) -> Iterator[Any]:
    """``sionna.phy``, drawing what `source` would; afterwards torch's and Sionna's generators are as they were."""
    with _generators_kept():
        phy = _sionna()
        own = phy.config.torch_rng("cpu")
        state = own.get_state()
        if source is not None:
            own.set_state(source.get_state())
            torch.default_generator.set_state(source.get_state())
        try:
            yield phy
        finally:
            own.set_state(state)


@contextmanager
def _generators_kept() -> Iterator[None]:
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


def _sionna() -> ModuleType:
    try:
        return import_module("sionna.phy")
    except Exception as error:  # it needs h5py and matplotlib, too
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ImportError(
            f"this function needs Sionna, but importing it failed ({reason}); pip install 'rmtllmf[sionna]'"
        ) from error
