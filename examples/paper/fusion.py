"""Fused models of many subsets of the same vectors: what subsets share is added up once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from rmtllmf.taskvec import TaskVector, heuristic_scale, task_arithmetic

from .protocol import Subset

ALIGNED = 16  # entries: products of matrices that start elsewhere than new ones do may differ in their last bits

Rule = Callable[..., Mapping[str, Tensor]]


class Layout:
    """Where the entries of a model lie in one flat float32 tensor."""

    def __init__(self, names: Sequence[str], model: nn.Module) -> None:
        state = model.state_dict(keep_vars=True)
        self.places: dict[str, slice] = {}
        start = 0
        for name in names:
            tensor = state[name]
            if tensor.dtype != torch.float32:
                raise TypeError(f"{name!r} of the model is {tensor.dtype}; expected torch.float32")
            self.places[name] = slice(start, start + tensor.numel())
            start += -(-tensor.numel() // ALIGNED) * ALIGNED
        self.size = start
        self.device = state[names[0]].device

    def flat(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The tensors one after the other."""
        out = torch.zeros(self.size, device=self.device)
        for name, place in self.places.items():
            out[place].copy_(tensors[name].detach().reshape(-1))
        return out


class PartialSums:
    """Sums of subsets of flat vectors, each one addition from that of the subset without its last member.

    Every sum has the bits of one that adds its members one after the other. Subsets in lexicographic order cost one
    addition each; at most one sum for each member of the latest is held.
    """

    def __init__(self, vectors: Sequence[Tensor]) -> None:
        self.vectors = list(vectors)
        self.additions = 0
        self._path: list[tuple[int, Tensor]] = []
        self._spare: list[Tensor] = []

    def of(self, subset: Subset) -> Tensor:
        """The sum over a subset of ascending indices; not to be written to, and good until the next call."""
        shared = 0
        while shared < min(len(self._path), len(subset)) and self._path[shared][0] == subset[shared]:
            shared += 1
        while len(self._path) > shared:
            index, tensor = self._path.pop()
            if self._path:  # the first is a vector itself
                self._spare.append(tensor)
        for index in subset[shared:]:
            if not self._path:
                self._path.append((index, self.vectors[index]))
                continue
            into = self._spare.pop() if self._spare else torch.empty_like(self.vectors[index])
            torch.add(self._path[-1][1], self.vectors[index], out=into)
            self.additions += 1
            self._path.append((index, into))
        return self._path[-1][1]


class Fuser:
    """One model whose parameters lie in one tensor, so that it becomes another fused model by two operations.

    A `scale` of None is the rule's own. The vectors are held only for a rule that has to see them every time.
    """

    def __init__(self, base: nn.Module, vectors: Sequence[TaskVector], rule: Rule, scale: float | None) -> None:
        self.rule, self.scale = rule, scale
        self.layout = Layout(list(vectors[0]), base)
        self.model = copy.deepcopy(base)
        self.origin = self.layout.flat(base.state_dict())
        self.current = self.origin.clone()
        adds = rule is task_arithmetic
        self.sums = PartialSums([self.layout.flat(vector) for vector in vectors]) if adds else None
        self.received = [] if adds else list(vectors)
        state = self.model.state_dict(keep_vars=True)
        for name, place in self.layout.places.items():
            state[name].data = self.current[place].view(state[name].shape)

    def fused(self, subset: Subset, restored: Sequence[str] = ()) -> nn.Module:
        """The model with the fused vectors of a subset, and some parameters as in the base; always the same object."""
        with torch.no_grad():
            if self.sums is not None:
                scale = heuristic_scale(len(subset)) if self.scale is None else self.scale
                torch.mul(self.sums.of(subset), scale, out=self.current)
                self.current.add_(self.origin)
            else:
                given = {} if self.scale is None else {"scale": self.scale}  # rules that average have 1, not 0.3
                update = self.rule([self.received[index] for index in subset], **given)
                self.current.copy_(self.origin)
                for name in update:
                    self.current[self.layout.places[name]].add_(update[name].reshape(-1).to(self.layout.device))
            for place in self._places(restored):
                self.current[place].copy_(self.origin[place])
        return self.model

    def _places(self, names: Sequence[str]) -> Iterator[slice]:
        for name in names:
            if name in self.layout.places:
                yield self.layout.places[name]
