"""The form of a vector without its values: what a base station knows of it before anything is sent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .._state import Tensors, as_state, check_finite, is_bendable
from ..channel._stream import Stream
from ..errors import InputError


@dataclass(frozen=True, eq=False)
class Form:
    """Names, shapes, dtypes, ties and kind of one vector, with what is never sent (integer entries) as it is."""

    stream: Stream

    @classmethod
    def of(cls, vector: Tensors, argument: str = "vector") -> tuple[Form, dict[str, Tensor]]:
        """The form of a checked vector, and its sent entries (ties once, sorted names), detached."""
        if not isinstance(vector, Mapping):
            raise TypeError(f"{argument}: expected a mapping of name -> tensor, got {type(vector).__name__}")
        state = as_state(vector, argument)
        bendable = {key: tensor for key, tensor in state.items() if is_bendable(key, tensor.dtype)}
        if not any(tensor.numel() for tensor in bendable.values()):
            raise InputError(f"{argument}: holds no floating-point entries, so there is nothing to send")
        check_finite(bendable, argument)
        stream = Stream.of([vector])
        parts = {key: state[key].detach() for key in stream.keys}
        hollow = {key: _hollow(tensor) if key in bendable else tensor.detach().clone() for key, tensor in state.items()}
        given: Any = vector
        given = given.map(lambda key, tensor: hollow[key]) if hasattr(vector, "map") else hollow
        return cls(replace(stream, given=[given], vectors=[hollow])), parts

    @property
    def dtype(self) -> torch.dtype:
        """In which to calculate: float64 if any entry is, else float32."""
        return self.stream.dtype

    def template(self, key: str) -> Tensor:
        """A tensor of the shape, dtype and device of one entry; its values mean nothing."""
        return self.stream.vectors[0][key]

    def names_of(self, key: str) -> list[str]:
        """A sent name and the names that are tied to it."""
        return [key, *(name for name, original in self.stream.alias.items() if original == key)]

    def filled(self, parts: Tensors) -> Any:
        """A vector of this form with these entries, of any shape; 0 for sent names that are not among them."""
        flat = {}
        for key in self.stream.keys:
            template = self.template(key)
            if key in parts:
                flat[key] = parts[key].reshape(-1).to(template)
            else:
                flat[key] = template.new_zeros(template.numel())
        return self.stream.rebuilt([flat], every_dtype=True)[0]


def _hollow(tensor: Tensor) -> Tensor:
    return tensor.new_zeros(()).expand(tensor.shape)
