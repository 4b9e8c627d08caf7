"""Where the users are: the base station is at the origin, its row of antennas along the y axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .._arrays import Array
from .._state import finite_number
from ..errors import InputError, ShapeError

Placement: TypeAlias = str | Sequence[float] | Sequence[Sequence[float]] | Array
PLACEMENTS = ("disc", "distance")


def given_places(placement: Placement, users: int) -> Tensor | None:
    """Checked distances (Q,) or coordinates (Q, 2) in m as float64; None where the users are placed at random."""
    if isinstance(placement, str):
        if placement not in PLACEMENTS:
            raise InputError(
                f"placement: expected 'disc', 'distance', distances or (x, y) coordinates in m, got {placement!r}"
            )
        return None
    places: Any = placement.tolist() if hasattr(placement, "tolist") else placement
    if not isinstance(places, Sequence):
        raise TypeError(f"placement: expected a name or a sequence, got {type(placement).__name__}")
    if len(places) != users:
        raise ShapeError(f"placement: expected {users} distances or (x, y) coordinates, got {len(places)}")
    if not any(hasattr(place, "__len__") for place in places):
        distances = [finite_number(d, f"placement[{q}]", positive=True) for q, d in enumerate(places)]
        return torch.tensor(distances, dtype=torch.float64)
    rows = []
    for q, place in enumerate(places):
        if not hasattr(place, "__len__") or isinstance(place, str) or len(place) != 2:
            raise ShapeError(f"placement[{q}]: expected two coordinates (x, y) in m like the others, got {place!r}")
        row = [finite_number(value, f"placement[{q}]") for value in place]
        if row == [0.0, 0.0]:
            raise InputError(f"placement[{q}]: (0, 0) is where the base station is")
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def draw_distances(
    placement: Placement, shape: tuple[int, ...], nearest: float, farthest: float, source: torch.Generator
) -> Tensor:
    """Distances on the ground, (..., Q) in m."""
    places = given_places(placement, shape[-1])
    if places is not None:
        return (places if places.ndim == 1 else places.square().sum(-1).sqrt()).expand(shape)
    uniform = torch.rand(shape, dtype=torch.float64, generator=source)
    if placement == "distance":
        return nearest + (farthest - nearest) * uniform
    inner, outer = nearest**2, farthest**2
    return (inner + (outer - inner) * uniform).sqrt()


def draw_azimuths(placement: Placement, shape: tuple[int, ...], source: torch.Generator) -> Tensor:
    """Directions (..., Q) in radians from the x axis, the array's broadside: uniform unless coordinates are given."""
    places = given_places(placement, shape[-1])
    if places is not None and places.ndim == 2:
        return torch.atan2(places[:, 1], places[:, 0]).expand(shape)
    return 2 * math.pi * torch.rand(shape, dtype=torch.float64, generator=source)
