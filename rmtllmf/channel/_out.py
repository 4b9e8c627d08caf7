"""Results written into memory that the caller has already: what it must be like, and how it is filled."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._arrays import Inputs
from ..errors import InputError, ShapeError

_ALIGNED = 64  # bytes: what torch's own memory is aligned to, and vectorised products may depend on in the last bit
_HUGE = 128 << 20  # bytes: up to here huge pages save time


def checked_out(out: object, inputs: Inputs, shape: tuple[int, ...], **given: object) -> Tensor:
    """`out` as a tensor of the same memory, if a complex result of `shape` from the inputs `given` can go there."""
    dtype = torch.complex64 if inputs.single else torch.complex128
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in (out, *given.values())):
        raise InputError("out: memory that is written again has no gradient; leave it out, or use torch.no_grad()")
    target = _array(out) if inputs.numpy else _tensor(out)
    if target.device != inputs.device:
        raise InputError(f"out: expected a tensor on {inputs.device}, like the inputs, got one on {target.device}")
    if target.dtype != dtype:
        raise TypeError(f"out: expected {dtype}, the precision of H, got {target.dtype}")
    if tuple(target.shape) != shape:
        raise ShapeError(f"out: expected the shape of the result, {shape}, got {tuple(target.shape)}")
    if _shares_entries(target):
        raise InputError("out: is a view whose entries share memory; expected memory for every entry")
    if target.data_ptr() % target.element_size():  # torch would take the process down
        raise InputError(
            f"out: starts {target.data_ptr() % target.element_size()} bytes off the multiples of its entries' size; "
            "expected aligned memory, as from numpy.empty or torch.empty"
        )
    low, high = _extent(target)
    for name, value in given.items():
        if isinstance(value, np.ndarray) or (isinstance(value, Tensor) and value.device == target.device):
            first, end = _extent(value)
            if first < high and low < end:
                raise InputError(f"out: lies in the memory of {name}, which is read while out is written; use a copy")
    return target


def is_direct(out: Tensor) -> bool:
    """Whether a product can be computed right into `out`, with the bits it has anywhere else; else it is copied."""
    plain = out.dtype == torch.complex128 and out.is_contiguous() and not out.is_conj() and not out.is_neg()
    return plain and out.data_ptr() % _ALIGNED == 0


def fresh(like: Tensor, *shape: int) -> Tensor:
    """Memory for a complex128 result, where `like` is.

    On the CPU through NumPy, which asks the operating system for huge pages: handing out 41 MB page by page takes a
    third of the time of the eigendecompositions of 10,000 draws. Of hundreds of MB it has no huge pages at hand, and
    makes them, which takes longer.
    """
    count, item = math.prod(shape), np.dtype(np.complex128).itemsize
    if like.device.type != "cpu" or count * item > _HUGE:
        return like.new_empty(shape, dtype=torch.complex128)
    memory: NDArray[np.complex128] = np.empty(count + _ALIGNED // item, dtype=np.complex128)
    start = -memory.ctypes.data % _ALIGNED // item
    return torch.from_numpy(memory[start : start + count].reshape(shape))


def _array(out: object) -> Tensor:
    if not isinstance(out, np.ndarray):
        raise TypeError(f"out: expected an array, like the inputs, got {type(out).__name__}")
    if out.dtype.kind != "c" or not out.dtype.isnative or out.dtype.itemsize > 16:
        raise TypeError(f"out: expected native complex64 or complex128, got {out.dtype.str} ({out.dtype})")
    if not out.flags.writeable:
        raise InputError("out: is read-only; expected an array that can be written to")
    if any(stride < 0 or stride % out.itemsize for stride in out.strides):
        raise InputError(f"out: strides {out.strides} are not supported; expected forward ones of whole entries")
    return torch.from_numpy(out)


def _tensor(out: object) -> Tensor:
    if not isinstance(out, Tensor):
        raise TypeError(f"out: expected a tensor, like the inputs, got {type(out).__name__}")
    if out.layout != torch.strided:
        raise TypeError(f"out: expected a dense tensor, got layout {out.layout}")
    if out.is_inference() and not torch.is_inference_mode_enabled():
        raise InputError("out: was made in torch.inference_mode(), and can be written to only there")
    return out


def _shares_entries(target: Tensor) -> bool:
    """Whether steps along one dimension may end where smaller steps along others do: expanded or sliding views."""
    reach = 0
    for stride, length in sorted(zip(target.stride(), target.shape, strict=True)):
        if length > 1 and stride <= reach:
            return target.numel() > 0
        reach += (length - 1) * stride
    return False


def _extent(value: Tensor | NDArray[np.generic]) -> tuple[int, int]:
    """First and last byte address, the latter exclusive."""
    if isinstance(value, Tensor):
        start, item = value.data_ptr(), value.element_size()
        strides = [item * stride for stride in value.stride()]
    else:
        start, item, strides = value.ctypes.data, value.itemsize, list(value.strides)
    if start == 0 or 0 in value.shape:  # no memory
        return 0, 0
    reach = [(length - 1) * stride for length, stride in zip(value.shape, strides, strict=True)]
    return start + sum(min(0, r) for r in reach), start + sum(max(0, r) for r in reach) + item
