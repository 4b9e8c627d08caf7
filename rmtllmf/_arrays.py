"""NumPy in -> NumPy out, dtype and device rules, and checks that name the offending argument and its shape.

Inside, everything is torch in double precision, whatever came in: powers are around 1e-17 W, and a receiver's errors
are differences of nearly equal numbers. `Inputs` remembers what came in, so that results go back the same way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .errors import InputError, NonFiniteError, NotPSDError, ShapeError

Array: TypeAlias = Tensor | NDArray[Any]
ArrayLike: TypeAlias = Tensor | NDArray[Any] | float | list[Any] | tuple[Any, ...]

_NUMPY_SINGLE = (np.complex64, np.float32, np.float16)
_SINGLE = (torch.complex64, torch.complex32, torch.float32, torch.float16, torch.bfloat16)

# what a negative number most likely is, for arguments that are linear; see `Inputs.nonnegative`
_POWER = "powers are linear, in W: is it dBm? from_dbm({0})"
_RATIO = "ratios are linear: is it dB? from_db({0})"
_LINEAR = {**dict.fromkeys(("P", "P_N", "noise", "max_power", "target"), _POWER), "snr": _RATIO}


@dataclass(frozen=True)
class Inputs:
    """What a call was given: whether NumPy or torch, which device, single or double precision."""

    numpy: bool
    device: torch.device
    single: bool

    @classmethod
    def of(cls, main: object, argument: str, *others: object) -> Inputs:
        """The precision is `main`'s; the result is torch if any of the arguments is a tensor."""
        tensors = [value for value in (main, *others) if isinstance(value, Tensor)]
        if any(map(torch._C._functorch.is_batchedtensor, tensors)):
            raise InputError(
                f"{argument}: torch.func.vmap hides the values that are checked here; pass the whole batch at once, "
                "leading dimensions are batches"
            )
        if isinstance(main, str | bytes) or main is None:
            raise TypeError(f"{argument}: expected a tensor or an array, got {type(main).__name__}")
        if isinstance(main, Tensor):
            single = main.dtype in _SINGLE
        else:
            single = _as_array(main, argument).dtype in _NUMPY_SINGLE
        return cls(not tensors, tensors[0].device if tensors else torch.device("cpu"), single)

    def complex(self, value: object, argument: str, *, real_too: bool = False) -> Tensor:
        """`value` as a complex128 tensor; real numbers only if `real_too` (a covariance may be real)."""
        tensor = self._tensor(value, argument)
        if not tensor.is_complex():
            if not real_too or tensor.dtype == torch.bool:
                cast = ".to(torch.complex128)" if isinstance(value, Tensor) else ".astype(complex)"
                phase = "a channel has a phase" if argument == "H" else "amplitudes have phases"
                raise TypeError(
                    f"{argument}: expected complex numbers, got {tensor.dtype}; {phase}, so cast it yourself (for "
                    f"example {cast}) if yours really is real"
                )
        return self._finite(tensor.to(torch.complex128).resolve_conj(), argument)

    def real(self, value: object, argument: str) -> Tensor:
        """`value` as a float64 tensor."""
        tensor = self._tensor(value, argument)
        if tensor.is_complex() or tensor.dtype == torch.bool:
            raise TypeError(f"{argument}: expected real numbers, got {tensor.dtype}")
        return self._finite(tensor.to(torch.float64), argument)

    def nonnegative(self, value: object, argument: str) -> Tensor:
        """`value` as a float64 tensor without negative entries: a power."""
        tensor = self.real(value, argument)
        if bool((tensor.detach() < 0).any()):
            least = float(tensor.detach().min())
            hint = f"; {_LINEAR[argument].format(least)}" if argument in _LINEAR else ""
            raise InputError(f"{argument}: expected numbers >= 0, got {least}{hint}")
        return tensor

    def back(self, tensor: Tensor) -> Any:
        """A result in the caller's kind and precision."""
        if self.single and tensor.dtype in (torch.complex128, torch.float64):
            tensor = tensor.to(torch.complex64 if tensor.is_complex() else torch.float32)
        return tensor.numpy() if self.numpy else tensor

    def _tensor(self, value: object, argument: str) -> Tensor:
        if isinstance(value, Tensor):
            if value.device != self.device and value.ndim > 0:
                raise InputError(f"{argument}: is on {value.device}, but another argument is on {self.device}")
            return value.to(self.device)
        if value is None or isinstance(value, str | bytes):
            raise TypeError(f"{argument}: expected numbers, got {type(value).__name__}")
        array = _as_array(value, argument)
        if array.dtype.kind not in "biufc":
            raise TypeError(f"{argument}: expected numbers, got an array of dtype {array.dtype}")
        if array.dtype in (np.longdouble, np.clongdouble):
            raise TypeError(f"{argument}: extended precision is not supported, got {array.dtype}")
        if array.dtype.kind == "u":
            array = array.astype(np.float64)
        # a copy: torch would share the caller's memory, and knows neither read-only nor byte-swapped arrays
        return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), copy=True)).to(self.device)

    @staticmethod
    def _finite(tensor: Tensor, argument: str) -> Tensor:
        values = tensor.detach()
        values = torch.view_as_real(values) if values.is_complex() else values
        if values.numel() and not torch.isfinite(torch.stack(torch.aminmax(values))).all():
            bad = int((~torch.isfinite(tensor.detach())).sum())
            raise NonFiniteError(
                f"{argument}: holds {bad} non-finite entries of {tensor.numel()}; expected finite numbers"
            )
        return tensor


def refuse_masked(value: object, argument: str) -> None:
    """Raise if `value` is a masked array, or a list of them: the masks would be dropped in silence."""
    if any(isinstance(part, np.ma.MaskedArray) for part in (value if isinstance(value, list | tuple) else [value])):
        raise TypeError(
            f"{argument}: expected numbers, got a masked array; fill its gaps with .filled(...), or leave out what is "
            "masked and pass .data"
        )


def _as_array(value: object, argument: str) -> NDArray[Any]:
    refuse_masked(value, argument)
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ShapeError(f"{argument}: expected numbers in rows of equal length ({error})") from None
    except (TypeError, RuntimeError) as error:  # tensors in a list, on a device or with gradients
        raise TypeError(f"{argument}: expected numbers ({error})") from None
    if array.dtype == object:
        raise TypeError(f"{argument}: expected numbers, got {type(value).__name__} of objects")
    return array


def largest(tensor: Tensor, dims: int) -> Tensor:
    """The largest real or imaginary part in magnitude, over the last `dims` dimensions: far cheaper than ``abs``."""
    return torch.view_as_real(tensor.detach()).abs().amax(dim=tuple(range(-dims - 1, 0)))


def check_channel(H: Tensor) -> None:
    """`H` must be a matrix or a batch of matrices, with at least one antenna and one user."""
    if H.ndim < 2 or H.shape[-1] == 0 or H.shape[-2] == 0:
        raise ShapeError(f"H: expected shape (..., N_R, Q) with N_R, Q >= 1, got {tuple(H.shape)}")


def powers(P: Tensor, H: Tensor) -> Tensor:
    """`P` as (..., Q), from a number, a vector a batch item, or diagonal matrices when ``P.ndim == H.ndim``."""
    users = H.shape[-1]
    shape = tuple(P.shape)
    if P.ndim == H.ndim:
        if shape[-2:] != (users, users):
            raise ShapeError(
                f"P: with as many dimensions as H it is a matrix and must end in ({users}, {users}), got {shape}; "
                "to sweep powers add an axis to H, as in H[None]"
            )
        diagonal = torch.diagonal(P, dim1=-2, dim2=-1)
        if bool((P.detach() - torch.diag_embed(diagonal.detach()) != 0).any()):
            raise InputError("P: a power matrix must be exactly diagonal, but has entries off the diagonal")
        P = diagonal
    elif P.ndim > H.ndim:
        raise ShapeError(f"P: {shape} has more dimensions than H {tuple(H.shape)}; to sweep powers add an axis to H")
    elif P.ndim > 0 and shape[-1] not in (1, users):
        raise ShapeError(f"P: expected a number or shape (..., {users}), one power per column of H, got {shape}")
    try:
        return P.expand(torch.broadcast_shapes(P.shape, (*H.shape[:-2], users)))
    except RuntimeError:
        raise ShapeError(f"P: shape {shape} does not broadcast with H of shape {tuple(H.shape)}") from None


def batch_shape(*named: tuple[str, torch.Size]) -> torch.Size:
    """The common batch shape, or an error that names who does not fit."""
    found = torch.Size()
    for name, shape in named:
        try:
            found = torch.broadcast_shapes(found, shape)
        except RuntimeError:
            first = named[0][1]
            told = [named[0], *((n, s) for n, s in named[1:] if n != "P" or s != first)]  # P has been expanded to H
            shapes = ", ".join(f"{n} {tuple(s)}" for n, s in told)
            hint = f"; to sweep {name} give it an axis of its own, as in {name}[:, None]" if name.isidentifier() else ""
            raise ShapeError(f"batch dimensions do not broadcast: {shapes}{hint}") from None
    return found


def check_hermitian(C: Tensor, size: int, argument: str, eps: float) -> None:
    """`C` must be (..., size, size) and Hermitian to `eps`; its sign is checked where its eigenvalues are known."""
    if C.ndim < 2 or C.shape[-2:] != (size, size):
        raise ShapeError(f"{argument}: expected shape (..., {size}, {size}), got {tuple(C.shape)}")
    values = C.detach()
    largest = values.abs().amax(dim=(-2, -1))
    off = (values - values.mH).abs().amax(dim=(-2, -1))
    if bool((off > _slack(eps) * largest).any()):
        worst = float((off / largest.clamp_min(torch.finfo(torch.float64).tiny)).max())
        raise NotPSDError(f"{argument}: expected Hermitian matrices; C - C^H is up to {worst:.1e} of the largest entry")


def check_psd(eigenvalues: Tensor, argument: str, eps: float) -> None:
    """Raise unless no eigenvalue is more negative than rounding at `eps` explains."""
    values = eigenvalues.detach()
    low, high = values.amin(-1), values.abs().amax(-1)
    if bool((low < -_slack(eps) * high).any()):
        hint = ""
        if eps < SINGLE and not bool((low < -1e2 * SINGLE * high).any()):
            hint = (
                f", within the precision of complex64, but {argument} is in double precision; make all that it is the "
                "sum of from complex128, H too"
            )
        raise NotPSDError(
            f"{argument}: expected positive semidefinite matrices; the smallest eigenvalue is {float(low.min()):.3e}"
            f"{hint}"
        )


SINGLE = torch.finfo(torch.float32).eps


def _slack(eps: float) -> float:
    return 1e4 * eps


def resolution(*values: object) -> float:
    """Machine epsilon of the coarsest of the arrays: what their last digits are worth."""
    single = any(
        value.dtype in _SINGLE if isinstance(value, Tensor) else getattr(value, "dtype", None) in _NUMPY_SINGLE
        for value in values
        if getattr(value, "ndim", 0)
    )
    return SINGLE if single else torch.finfo(torch.float64).eps
