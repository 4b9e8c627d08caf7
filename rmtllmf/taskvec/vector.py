"""The task vector: what fine-tuning changed, as an immutable mapping of name -> tensor that can be calculated with."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Self, TypeVar, overload

import torch
from torch import Tensor, nn

from .._display import html_table
from .._state import (
    StateLike,
    Tensors,
    as_state,
    check_finite,
    check_keys,
    check_shapes,
    finite_number,
    inner_product,
    map_tied,
    overflows,
    select_names,
)
from ..errors import InputError, NonFiniteError
from ._files import check_vector, load_tensors, save_tensors
from ._models import applied, differences

__all__ = ["TaskVector"]

_Module = TypeVar("_Module", bound=nn.Module)


class TaskVector(Mapping[str, Tensor]):
    r"""What fine-tuning changed: :math:`\tau = \theta_{\text{fine-tuned}} - \theta_{\text{base}}`.

    An immutable mapping of name -> floating-point tensor. Integer and boolean buffers and running statistics of
    normalisation layers are no part of it: they always come from the base model. Tied tensors (two names, one
    memory) stay tied through every operation. Arithmetic gives new vectors: ``a + b``, ``a - b``, ``-a``,
    ``0.3 * a``, ``a / 2``, ``sum([a, b])``; operands must have the same keys and shapes.

    Args:
        tensors: mapping of name -> floating-point tensor with finite entries. The tensors are not copied.

    Raises:
        TypeError: an entry is no floating-point tensor. NonFiniteError: NaN or infinity. InputError: no entries.

    Source: Ilharco et al., "Editing models with task arithmetic", 2023; R-MTLLMF, eq. 1.

    Example:
        >>> import torch
        >>> tau = TaskVector({"weight": torch.tensor([3.0, 4.0])})
        >>> (0.5 * tau)["weight"], tau.norm()
        (tensor([1.5000, 2.0000]), 5.0)
    """

    __slots__ = ("__weakref__", "_tensors")
    __array_ufunc__ = None  # so that a NumPy number on the left leaves the multiplication to __rmul__
    _tensors: Mapping[str, Tensor]

    def __init__(self, tensors: Tensors) -> None:
        state = as_state(tensors, "tensors")
        if not state:
            raise InputError("tensors: expected at least one floating-point tensor, got an empty mapping")
        for key, value in state.items():
            if not value.is_floating_point():
                raise TypeError(
                    f"tensors[{key!r}] is {value.dtype}; a task vector holds floating-point entries only, the rest "
                    "comes from the base model"
                )
        check_finite(state, "tensors")
        state = map_tied(lambda tensor: tensor, state, state)  # one object for each tie: copies and pickles keep it
        object.__setattr__(self, "_tensors", MappingProxyType(state))

    @classmethod
    def _of(cls, tensors: dict[str, Tensor]) -> Self:
        """Without checks, for tensors that are known to be good."""
        vector = cls.__new__(cls)
        object.__setattr__(vector, "_tensors", MappingProxyType(tensors))
        return vector

    @classmethod
    def between(
        cls, base: StateLike, finetuned: StateLike, *, skip: str | Iterable[str] = (), mixed_dtypes: bool = False
    ) -> Self:
        r"""The task vector from `base` to `finetuned` (eq. 1 of R-MTLLMF).

        Args:
            base: the pre-trained model: a module, a state dict, or a path (safetensors file, index of shards, folder).
            finetuned: the same after fine-tuning, with the same keys, shapes and dtypes.
            skip: names or glob patterns that are no part of the vector. What they name may have another shape or dtype
                in one of the models, or be missing there: a head, a longer vocabulary.
            mixed_dtypes: let floating dtypes differ, as after training a bfloat16 model in float32.

        Returns:
            The difference of all floating-point entries but running statistics; half-precision checkpoints are
            subtracted in float32 and give a float32 vector. Entries that are the same infinity or NaN in both (an
            attention mask, say) did not change: 0.

        Raises:
            StateMismatchError: a missing, extra or reshaped key, or another dtype.
            InputError: a pattern of `skip` that matches nothing, or a path of something else than a model.
            NonFiniteError: NaN or infinity in one and not the same in the other.
            TypeError: something that is no module, mapping or path.

        Example:
            >>> import torch
            >>> base = {"w": torch.tensor([1.0, 2.0]), "steps": torch.tensor(7)}
            >>> tuned = {"w": torch.tensor([1.5, 2.0]), "steps": torch.tensor(9)}
            >>> dict(TaskVector.between(base, tuned))
            {'w': tensor([0.5000, 0.0000])}
        """
        return cls._of(differences(base, finetuned, skip, mixed_dtypes=mixed_dtypes))

    @overload
    def apply_to(self, base: _Module, scale: float = 1.0) -> _Module: ...
    @overload
    def apply_to(self, base: Tensors, scale: float = 1.0) -> dict[str, Tensor]: ...
    def apply_to(self, base: Any, scale: float = 1.0) -> Any:
        r""":math:`\theta = \theta_{\text{base}} + \text{scale} \cdot \tau`.

        Args:
            base: a state dict, or a module.
            scale: a finite number.

        Returns:
            For a state dict a new one, in the base's dtypes (half precision is added up in float32), sharing no memory
            with `base`; entries that the vector does not name are copies of the base's. A module is changed in place,
            and returned. What is tied in the base moves together, under whichever of its names the vector has it.

        Raises:
            StateMismatchError: the vector names a key that `base` lacks or that has another shape there, or changes
                two names of one tied tensor differently.
            TypeError: `base` is neither, or its entry is no floating-point tensor.
            NonFiniteError: the sum overflows the base's dtype.

        Example:
            >>> import torch
            >>> tau = TaskVector({"w": torch.tensor([1.0])})
            >>> tau.apply_to({"w": torch.tensor([2.0]), "steps": torch.tensor(7)}, scale=0.5)
            {'w': tensor([2.5000]), 'steps': tensor(7)}
        """
        return applied(self, base, scale)

    def __getitem__(self, key: str) -> Tensor:
        return self._tensors[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("a TaskVector is immutable; arithmetic, map() and select() give new ones")

    def __delattr__(self, name: str) -> None:
        raise AttributeError("a TaskVector is immutable")

    __eq__ = object.__eq__  # comparing tensors has no single answer; Mapping's would raise
    __hash__ = object.__hash__

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), dict(self._tensors)))

    def __repr__(self) -> str:
        entries = sum(tensor.numel() for tensor in self.values())
        dtypes = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in self.values()}))
        return f"TaskVector({len(self)} tensors, {entries:,} entries, {dtypes})"

    def _repr_html_(self) -> str:
        rows = [
            [name, " x ".join(map(str, tensor.shape)) or "()", str(tensor.dtype).removeprefix("torch."), tensor.device]
            for name, tensor in self.items()
        ]
        hidden = max(0, len(rows) - 20)
        if hidden:
            rows[10:-10] = [[f"... {hidden} in between ...", "", "", ""]]
        return html_table(repr(self), ["tensor", "shape", "dtype", "device"], rows)

    def __add__(self, other: Tensors) -> Self:
        return self._combined(torch.add, other)

    def __radd__(self, other: object) -> Self:
        if isinstance(other, int) and other == 0:  # the start of sum()
            return self
        return NotImplemented

    def __sub__(self, other: Tensors) -> Self:
        return self._combined(torch.sub, other)

    def __neg__(self) -> Self:
        return self._of(map_tied(torch.neg, self, self))

    def __mul__(self, factor: float | Tensor) -> Self:
        if isinstance(factor, Mapping):
            return NotImplemented
        number = _scalar(factor, "factor")
        return self._finite(map_tied(lambda tensor: tensor * number, self, self), "the product")

    __rmul__ = __mul__

    def __truediv__(self, divisor: float | Tensor) -> Self:
        if isinstance(divisor, Mapping):
            return NotImplemented
        number = _scalar(divisor, "divisor")
        if float(number.detach() if isinstance(number, Tensor) else number) == 0:
            raise ZeroDivisionError("divisor: a task vector cannot be divided by 0")
        return self._finite(map_tied(lambda tensor: tensor / number, self, self), "the quotient")

    def _combined(self, operation: Callable[[Tensor, Tensor], Tensor], other: Tensors) -> Self:
        if not isinstance(other, Mapping):
            return NotImplemented
        right = other if isinstance(other, TaskVector) else as_state(other, "the right operand")
        check_keys(right, self, "the right operand", "the left one")
        check_shapes(right, self, "the right operand", "the left one")
        for key, tensor in right.items():
            if not tensor.is_floating_point():
                raise TypeError(f"the right operand[{key!r}] is {tensor.dtype}; expected floating-point entries")
        return self._finite(map_tied(operation, self, self, right), "the result")

    @classmethod
    def _finite(cls, tensors: dict[str, Tensor], argument: str) -> Self:
        """The guard: one pass over what comes out, and no vector that could not be saved and loaded again."""
        check_finite(tensors, argument)
        return cls._of(tensors)

    def norm(self) -> float:
        """The Euclidean norm over all entries, accumulated in float64.

        Example:
            >>> import torch
            >>> TaskVector({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}).norm()
            5.0
        """
        return float(sum(inner_product(self[key], self[key]) for key in sorted(self)) ** 0.5)

    def dot(self, other: Tensors) -> float:
        """The inner product with another vector of the same keys and shapes, accumulated in float64.

        Example:
            >>> import torch
            >>> TaskVector({"a": torch.tensor([3.0])}).dot({"a": torch.tensor([2.0])})
            6.0
        """
        right = as_state(other, "other")
        check_keys(right, self, "other", "this vector")
        check_shapes(right, self, "other", "this vector")
        return float(sum(inner_product(self[key], right[key]) for key in sorted(self)))

    def select(self, keys: str | Iterable[str]) -> Self:
        """The part named by `keys`: names, or globs such as ``"*.attn.*"``; one that matches nothing is an error.

        Example:
            >>> import torch
            >>> tau = TaskVector({"attn.weight": torch.ones(2), "mlp.weight": torch.ones(2)})
            >>> list(tau.select("attn.*"))
            ['attn.weight']
        """
        chosen = select_names(self, keys, "keys")
        if not chosen:
            raise InputError("keys: expected at least one name or pattern, got none")
        return self._of({key: self[key] for key in chosen})

    def map(self, function: Callable[[str, Tensor], Tensor]) -> Self:
        """A vector of the same names with ``function(name, tensor)`` in place of every tensor.

        The function is called once a name. Tied entries stay tied only if it returns the same tensor for both; what is
        calculated anew, as in the example, is two tensors with the same entries.

        Raises:
            TypeError: the function returned something that is no floating-point tensor.

        Example:
            >>> import torch
            >>> tau = TaskVector({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])})
            >>> dict(tau.map(lambda name, tensor: tensor * (name == "b")))
            {'a': tensor([0.]), 'b': tensor([4.])}
        """
        if not callable(function):
            raise TypeError(f"function: expected a function of name and tensor, got {type(function).__name__}")
        result = {key: function(key, tensor) for key, tensor in self.items()}
        for key, value in result.items():
            if not isinstance(value, Tensor) or not value.is_floating_point():
                kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"function: expected a floating-point tensor for {key!r}, got {kind}")
        return self._finite(result, "function's result")

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """On another device or in another floating dtype, with the arguments of ``torch.Tensor.to``.

        Example:
            >>> import torch
            >>> TaskVector({"a": torch.ones(1)}).to(torch.float64)["a"].dtype
            torch.float64
        """
        result = map_tied(lambda tensor: tensor.to(*args, **kwargs), self, self)
        for key, value in result.items():
            if not value.is_floating_point():
                raise TypeError(f"to: a task vector holds floating-point entries only, got {value.dtype} for {key!r}")
            if overflows(self[key], value):
                raise NonFiniteError(f"to: {key!r} overflows {value.dtype}")
        return self._of(result)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, atomically: a reader sees the old file or the new one, never a part.

        Args:
            path: ends in ``.safetensors``. Tied tensors are stored once.

        Raises:
            InputError: another ending. OSError: the file cannot be written; what was there stays.

        Example:
            >>> import tempfile, torch
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     TaskVector({"a": torch.ones(2)}).save(f"{folder}/tau.safetensors")
            ...     TaskVector.load(f"{folder}/tau.safetensors")
            TaskVector(1 tensors, 2 entries, float32)
        """
        save_tensors(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> Self:
        """Read what `save` wrote; nothing is ever unpickled.

        Raises:
            InputError: the file holds no task vector (a whole model, for example: see `between`).
            FileNotFoundError: there is none. NonFiniteError: NaN or infinity in it.

        Example: see `save`.
        """
        tensors = load_tensors(path, device)
        check_vector(tensors, path)
        return cls._of(tensors)


def _rebuild(cls: type[TaskVector], tensors: dict[str, Tensor]) -> TaskVector:
    return cls._of(tensors)


def _scalar(value: object, argument: str) -> float | Tensor:
    """A finite real number, or a tensor of one (its gradient is kept)."""
    if isinstance(value, Tensor) and value.is_floating_point():
        finite_number(value.detach(), argument)
        return value
    return finite_number(value, argument)
