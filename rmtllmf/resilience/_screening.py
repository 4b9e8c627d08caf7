"""Which users a fusion goes on with: received vectors with their reception, and those of some users only."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._arrays import ArrayLike
from .._state import Tensors, all_finite, is_bendable
from ..channel import Reception
from ..channel._link import checked_estimator, link_of
from ..errors import InputError
from ._noise import KnownNoise, Scale
from .suspects import suspects


class Uplink(NamedTuple):
    """Vectors of some users, and how they came."""

    users: tuple[int, ...]
    vectors: Sequence[Tensors]
    reception: Reception | ArrayLike
    estimator: str
    scale: Scale

    def known(self) -> KnownNoise:
        return KnownNoise.of(self.vectors, self.reception, estimator=self.estimator, scale=self.scale)

    def only(self, places: Sequence[int]) -> Uplink:
        """Those at some places, in ascending order; the others were received with them."""
        if len(places) == len(self.users):
            return self
        return self._replace(
            users=tuple(self.users[i] for i in places),
            vectors=[self.vectors[i] for i in places],
            reception=_of_users(self.reception, list(places)),
            scale=_scale_of(self.scale, places),
        )


def screened(uplink: Uplink) -> tuple[Uplink, dict[int, str]]:
    """Without the users who were not heard, sent what is not finite, or look hostile, and why."""
    count = len(uplink.users)
    reasons = {q: f"{entries} entries are not finite" for q in range(count) if (entries := _bad(uplink.vectors[q]))}
    silent = _silent(uplink)
    reasons |= {q: "was not heard: its gain is 0" for q, blocks in silent.items() if blocks is None}
    rest = uplink.only([q for q in range(count) if q not in reasons])
    if len(rest.users) > 2:  # else nobody can say who of them differs
        for q in rest.users:
            if q in silent:
                raise InputError(
                    f"reception: the gain of user {q} is 0 in block {silent[q]}, but not in all, and such a vector "
                    "cannot be told from a hostile one; leave the user out, or pass screen=False"
                )
        found = suspects(rest.vectors, rest.reception, estimator=rest.estimator, scale=rest.scale)
        for i, why in found.reasons.items():  # which name others by their place
            reasons[rest.users[i]] = re.sub(r"user (\d+)", lambda place: f"user {rest.users[int(place[1])]}", why)
        rest = rest.only(found.accepted)
    if not rest.users:
        told = "; ".join(f"user {user}: {why}" for user, why in sorted(reasons.items()))
        raise InputError(f"received: nobody is left to fuse ({told}); screen=False fuses everything, if it is finite")
    return rest, dict(sorted(reasons.items()))


def _silent(uplink: Uplink) -> dict[int, int | None]:
    """User -> a block in which the gain is 0, or None where it is in all."""
    result: dict[int, int | None] = {}
    blocks = link_of(uplink.reception, len(uplink.users), checked_estimator(uplink.estimator)).gain
    for q in range(len(uplink.users)):
        gains = [1.0 if row is None else float(row) for row in (block[q] for block in blocks)]
        if 0 in gains:
            result[q] = gains.index(0) if any(gains) else None
    return result


def _bad(vector: Tensors) -> int:
    """How many parameters are not finite."""
    sent = [tensor for key, tensor in vector.items() if is_bendable(key, tensor.dtype)]
    return sum(int((~tensor.detach().isfinite()).sum()) for tensor in sent if not all_finite(tensor))


def _of_users(reception: Reception | ArrayLike, users: list[int]) -> Reception | ArrayLike:
    """The reception of some of the users, in ascending order."""
    if not isinstance(reception, Reception):
        given: Any = reception
        array = given if isinstance(given, Tensor | np.ndarray) else np.asarray(given)
        return array if array.ndim == 0 else array[..., users]
    order = reception.order
    if order is not None:
        rows, index = order.cpu() if isinstance(order, Tensor) else torch.tensor(np.asarray(order)), torch.tensor(users)
        rows = torch.searchsorted(index, rows[torch.isin(rows, index)].view(*rows.shape[:-1], len(users)))
        order = rows.to(order) if isinstance(order, Tensor) else rows.numpy()
    columns = {name: getattr(reception, name)[..., users] for name in ("mse", "sinr", "rate", "gain")}
    squares = {
        name: getattr(reception, name)[..., users, :][..., users] for name in ("error_covariance", "noise_covariance")
    }
    return replace(reception, order=order, **columns, **squares)


def _scale_of(scale: Scale, users: Sequence[int]) -> Scale:
    numbers: Any = scale.tolist() if isinstance(scale, np.ndarray | Tensor) else scale
    return [numbers[q] for q in users] if isinstance(numbers, Sequence) and not isinstance(numbers, str) else numbers
