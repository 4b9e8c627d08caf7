"""What senders that lie may send: to measure defences with, never to be used on anybody's uplink."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._random import Seed, generator, seed_number
from .._state import Tensors, finite_number, inner_product, unclipped, whole_number
from ..channel._stream import Stream
from ..errors import InputError

__all__ = ["backdoor", "foreign", "scaled", "sign_flipped", "with_nan"]


def scaled(vector: Tensors, factor: float) -> Any:
    r"""A vector that shouts: the sum of all is then its own.

    .. math:: \tau \leftarrow f\, \tau

    Args:
        vector: a mapping of name -> tensor. Not written to; the same goes for every attack.
        factor: f, a finite number.

    Returns:
        A `TaskVector` where one was given, else a dict. Entries that are no parameters (integers, running statistics)
        are copied, ties stay ties; so in every attack.

    Raises:
        TypeError: no mapping of name -> tensor, or no number. InputError: no floating-point entries.

    Source: the "boosting" of Bhagoji et al., "Analyzing federated learning through an adversarial lens", 2019.

    Example:
        >>> import torch
        >>> scaled({"w": torch.tensor([1.0, -2.0])}, 100)
        {'w': tensor([ 100., -200.])}
    """
    number = finite_number(factor, "factor")
    return _changed(vector, lambda key, flat: flat * number)


def sign_flipped(vector: Tensors) -> Any:
    r"""A vector that undoes a task: its own, negated.

    .. math:: \tau \leftarrow -\tau

    Args:
        vector: a mapping of name -> tensor.

    Returns, Raises: as `scaled`.

    Source: the sign-flipping attack of Li et al., "RSA: Byzantine-robust stochastic aggregation methods", 2019.

    Example:
        >>> import torch
        >>> sign_flipped({"w": torch.tensor([1.0, -2.0])})
        {'w': tensor([-1.,  2.])}
    """
    return _changed(vector, lambda key, flat: -flat)


def with_nan(vector: Tensors, seed: Seed, count: int = 1) -> dict[str, Tensor]:
    """A vector with NaN in some places: a sum with it is NaN there.

    Args:
        vector: a mapping of name -> tensor.
        seed: an int or a ``torch.Generator``: which entries are hit. The same whatever the order of the names.
        count: how many of the floating-point entries, from 1 to all.

    Returns:
        Always a dict, since a `TaskVector` cannot hold NaN.

    Raises:
        InputError: `count` out of range. Otherwise as `scaled`.

    Example:
        >>> import torch
        >>> bomb = with_nan({"w": torch.zeros(1000)}, seed=0, count=3)
        >>> int(bomb["w"].isnan().sum())
        3
    """
    stream = _stream(vector)
    number = whole_number(count, "count", at_least=1)
    if number > stream.length:
        raise InputError(f"count: expected at most {stream.length}, the entries of the vector, got {number}")
    parts = {key: flat.detach().clone() for key, flat in stream.flat()[0].items()}
    for place in random.Random(seed_number(seed)).sample(range(stream.length), number):
        ((key, where, _),) = stream.pieces(place, place + 1)
        parts[key][where] = torch.nan
    plain = Stream([stream.vectors[0]], stream.vectors, stream.keys, stream.alias, stream.starts)
    formed: dict[str, Tensor] = plain.formed(0, parts)
    return formed


def foreign(vector: Tensors, seed: Seed, *, per_tensor: bool = True) -> Any:
    r"""Another model's vector: as long as this one, in a direction that has nothing to do with it.

    .. math:: \tau_k \leftarrow \lVert \tau_k \rVert\, u_k, \qquad u_k \text{ uniform over directions}

    Args:
        vector: a mapping of name -> tensor.
        seed: an int or a ``torch.Generator``.
        per_tensor: k are the tensors, so that each keeps its norm; False: the whole vector, so that its energy spreads
            evenly over all entries.

    Returns, Raises: as `scaled`.

    Example:
        >>> import torch
        >>> lie = foreign({"w": torch.tensor([3.0, 4.0])}, seed=0)
        >>> round(float(lie["w"].norm()), 4)
        5.0
    """
    number = seed_number(seed)
    if not isinstance(per_tensor, bool):
        raise TypeError(f"per_tensor: expected True or False, got {type(per_tensor).__name__}")
    stream = _stream(vector)
    drawn = {}
    for key, flat in stream.flat()[0].items():
        source = generator(number, "foreign", key)
        drawn[key] = torch.randn(len(flat), generator=source, dtype=_wide(flat)).to(flat.device)
    norms = {key: inner_product(flat, flat) for key, flat in stream.flat()[0].items()}
    lengths = {key: inner_product(flat, flat) for key, flat in drawn.items()}
    if not per_tensor:
        norms, lengths = dict.fromkeys(norms, sum(norms.values())), dict.fromkeys(norms, sum(lengths.values()))
    factor = {key: (norms[key] / lengths[key]) ** 0.5 if lengths[key] > 0 else 0.0 for key in norms}
    return _changed(vector, lambda key, flat: drawn[key] * factor[key])


def backdoor(vector: Tensors, direction: Tensors, strength: float) -> Any:
    r"""A vector that carries another along.

    .. math:: \tau \leftarrow \tau + s\, d

    Args:
        vector: a mapping of name -> tensor.
        direction: d, with the same keys and shapes: the vector of the task that is to be smuggled in, say.
        strength: s, a finite number; 1 adds `direction` as it is.

    Returns: as `scaled`.

    Raises:
        StateMismatchError: keys or shapes disagree. Otherwise as `scaled`.

    Source: the model-replacement attack of Bagdasaryan et al., "How to backdoor federated learning", 2020, without the
    training that finds the direction.

    Example:
        >>> import torch
        >>> backdoor({"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 1.0])}, strength=0.5)
        {'w': tensor([1.0000, 0.5000])}
    """
    number = finite_number(strength, "strength")
    _single(vector, "vector")
    _single(direction, "direction")
    pair = Stream.of([vector, direction])
    hidden = {key: pair.vectors[1][key].detach().reshape(-1) for key in pair.keys}
    one = Stream([vector], pair.vectors[:1], pair.keys, pair.alias, pair.starts)
    return _changed(one, lambda key, flat: flat + number * hidden[key].to(flat.device, flat.dtype))


def _changed(source: Tensors | Stream, change: Callable[[str, Tensor], Tensor]) -> Any:
    """The vector with ``change(name, flat entries)`` in place of every parameter, calculated in float32 at least."""
    stream = source if isinstance(source, Stream) else _stream(source)
    flat = {key: part.detach() for key, part in stream.flat()[0].items()}
    made = {key: unclipped(change(key, part.to(_wide(part))), part.dtype) for key, part in flat.items()}
    return stream.rebuilt([{key: made[key].to(part.dtype) for key, part in flat.items()}])[0]


def _stream(vector: Tensors) -> Stream:
    _single(vector, "vector")
    return Stream.of([vector])


def _single(vector: object, argument: str) -> None:
    if isinstance(vector, nn.Module) or not isinstance(vector, Mapping):
        raise TypeError(f"{argument}: expected a mapping of name -> tensor, got {type(vector).__name__}")


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
