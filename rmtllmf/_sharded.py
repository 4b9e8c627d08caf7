"""Tensors that are spread over several processes (DTensors, as FSDP2 makes them).

What works entry by entry works on the local part. What decides something (is all of it finite? how long is it?) is
agreed on by all processes; a local part's answer is never taken for the whole's.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from .errors import InputError


def can_be_sharded() -> bool:
    """Whether there can be DTensors in this process at all."""
    return "torch.distributed.tensor" in sys.modules


def is_sharded(tensor: Tensor) -> bool:
    """Whether `tensor` is a DTensor; costs nothing where none was ever made."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a DTensor, in its memory; any other tensor itself."""
    if not is_sharded(tensor):
        return tensor
    shards: Any = tensor
    if any(placement.is_partial() for placement in shards.placements):
        raise InputError(f"a DTensor with the placements {shards.placements} is a sum not yet taken; redistribute it")
    part: Tensor = shards.to_local()
    return part


def full(tensor: Tensor) -> Tensor:
    """All of a DTensor, on every process; any other tensor itself."""
    if not is_sharded(tensor):
        return tensor
    shards: Any = tensor
    whole: Tensor = shards.full_tensor()
    return whole


def sharded_like(part: Tensor, template: Tensor) -> Tensor:
    """The DTensor that is spread like `template`, of which `part` is this process's part."""
    shards: Any = template
    made: Tensor = type(shards).from_local(
        part, shards.device_mesh, shards.placements, run_check=False, shape=shards.shape, stride=shards.stride()
    )
    return made


def part_of(whole: Tensor, template: Tensor) -> Tensor:
    """This process's part of what is known to all, if spread like `template`."""
    shards: Any = template
    from torch.distributed.tensor import Replicate

    everywhere = [Replicate()] * shards.device_mesh.ndim
    known: Any = type(shards).from_local(whole, shards.device_mesh, everywhere, run_check=False)
    part: Tensor = known.redistribute(placements=shards.placements).to_local()
    return part


def largest_of_all(values: list[float], template: Tensor) -> list[float]:
    """The largest of each number over the processes over which `template` is spread; all of them must ask."""
    shards: Any = template
    from torch.distributed.tensor import Partial

    mesh = shards.device_mesh
    mine = torch.tensor(values, dtype=torch.float64, device=local(template).device)
    raised: Any = type(shards).from_local(mine, mesh, [Partial("max")] * mesh.ndim, run_check=False)
    largest: list[float] = raised.full_tensor().tolist()
    return largest


def any_process(flag: bool, template: Tensor) -> bool:
    """Whether `flag` is true on any of the processes over which `template` is spread; all of them must ask."""
    return largest_of_all([float(flag)], template)[0] > 0


def same_layout(left: Tensor | None, right: Tensor | None) -> bool:
    """Whether two tensors are spread alike, or both not (None: no DTensor)."""
    a, b = (tensor if tensor is not None and is_sharded(tensor) else None for tensor in (left, right))
    if a is None or b is None:
        return a is b
    return bool(a.device_mesh == b.device_mesh and a.placements == b.placements)  # type: ignore[attr-defined]
