"""What a training run must leave as it found it, and what it must not go on with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NonFiniteError


def warmup_cosine(steps: int, share: float) -> Callable[[int], float]:
    """Step -> factor: rising linearly to 1 over the first `share` of the steps, then half a cosine that ends at 0."""
    rising = math.ceil(share * steps)

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))

    return factor


@contextmanager
def only_trained(parameters: list[nn.Parameter], *modules: nn.Module) -> Iterator[None]:
    """`requires_grad` on `parameters` and nowhere else, and a clean `grad`; both put back afterwards."""
    found = {parameter: parameter.requires_grad for module in modules for parameter in module.parameters()}
    gradients = [parameter.grad for parameter in parameters]
    chosen = set(parameters)
    try:
        for parameter in found:
            if parameter.is_floating_point():
                parameter.requires_grad_(parameter in chosen)
        yield
    finally:
        for parameter, flag in found.items():
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient


@contextmanager
def kept(buffers: tuple[tuple[nn.Module, str], ...]) -> Iterator[None]:
    """Frozen buffers, such as running statistics, get their values back, also where forward() replaces the tensor."""
    copies = [getattr(module, name).clone() for module, name in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for (module, name), copy in zip(buffers, copies, strict=True):
                getattr(module, name).copy_(copy)


def check_finite(tensors: Iterable[Tensor | None], named: Iterable[str], what: str) -> None:
    """One look at all: the sum of their norms is finite exactly if they are."""
    present = [(name, tensor.detach()) for name, tensor in zip(named, tensors, strict=True) if tensor is not None]
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float32) for _, tensor in present]
    if norms and not math.isfinite(float(torch.stack([norm.to(norms[0].device) for norm in norms]).sum())):
        for (name, _), norm in zip(present, norms, strict=True):
            if not math.isfinite(float(norm)):
                raise NonFiniteError(f"the {what} of {name!r} is not finite; try a smaller lr, or float32")


def progress_bar(steps: int) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=steps, desc="realign", unit="step")
