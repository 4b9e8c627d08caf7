"""The mask of Concrete subspace fusion: which entries the tasks should share, from unlabelled inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from ..._call import WithState
from ..._display import counted, course
from ..._random import Seed, generator, seed_number
from ..._state import StateLike, Tensors, finite_number, whole_number
from ..._tasks import Tasks, mode
from ...errors import InputError
from .._options import FusionOptions, Weights
from ..rules.arithmetic import heuristic_scale
from ._interpolated import Interpolated, endless, mean_entropy, prepared, shown

__all__ = ["ConcreteMask", "concrete_mask"]

Kind = Literal["sample", "binary", "probability"]


@dataclass(frozen=True, eq=False)
class ConcreteMask:
    """A mask that was learned, for `concrete`.

    Attributes:
        mask: name -> a factor for every entry, with the mean 1 in every tensor.
        losses: the mean entropy over the tasks before each step, with the mask drawn for that step.

    Example:
        >>> import torch
        >>> from rmtllmf.taskvec import concrete
        >>> found = ConcreteMask({"w": torch.tensor([2.0, 0.0])}, losses=(0.7, 0.6))
        >>> dict(concrete([{"w": torch.ones(2)}], found.mask))
        {'w': tensor([2., 0.])}
    """

    mask: Mapping[str, Tensor]
    losses: tuple[float, ...]

    def __repr__(self) -> str:
        entries = sum(tensor.numel() for tensor in self.mask.values())
        return f"ConcreteMask({counted(len(self.mask), 'tensor')}, {entries:,} entries, {course(self.losses)})"


def concrete_mask(
    vectors: Iterable[Tensors],
    model: nn.Module,
    tasks: Tasks,
    *,
    seed: Seed,
    base: StateLike | None = None,
    scale: float | None = None,
    steps: int = 2000,
    lr: float = 1e-3,
    temperature: float = 0.5,
    kind: Kind = "sample",
    weights: Weights | None = None,
    skip: str | Iterable[str] = (),
    progress: bool = False,
) -> ConcreteMask:
    r"""Learn the mask of Concrete task arithmetic.

    .. math:: \min_x\ \mathbb{E}_u \sum_i \mathbb{E}\, H\bigl(h_i(f(\cdot; \theta_0 +
              \lambda \tfrac{m}{\operatorname{mean} m} \odot \sum_q \tau_q))\bigr), \qquad
              m = \operatorname{sigmoid}\Bigl(\frac{x + \log u - \log(1 - u)}{T}\Bigr)

    with u uniform in (0, 1), entry by entry and anew in every step, and the mean over each tensor; H is the entropy of
    the predictions. By Adam, from x = 0, one batch of every task a step; batches are started again when they end. No
    labels are used. Everything is in evaluation mode.

    In memory are, beside model and vectors, seven times the parameters that change, for any number of vectors: their
    values and gradient, the masked sum, logits, mask, and two moments.

    Args:
        vectors: N mappings of name -> tensor with the same keys and shapes. Not written to.
        model: one encoder for all tasks, or a complete model. Not written to.
        tasks: name -> (head, batches), with logits ``head(model(inputs))``; or the batches of a complete model. Batches
            are inputs or (inputs, targets), of which the targets are not looked at.
        seed: of u. The same seed gives the same u for any order of names.
        base: :math:`\theta_0`: a module, a state dict or the path of a checkpoint; None: the weights of `model`.
        scale: :math:`\lambda`; None: `heuristic_scale` of N, .3 from two on.
        steps, lr: of Adam.
        temperature: T.
        kind: "sample": the mask is one more draw of m (the authors' code, FusionBench); "binary": zeros and ones with
            the probability sigmoid(x); "probability": sigmoid(x) itself, which needs no luck. All over their mean.
        weights: of the vectors, as in `FusionOptions`: :math:`w \tau` takes the place of :math:`\tau`. Those of
            `adamerging_coefficients`, with scale 1, lead to Concrete AdaMerging, one after the other: the paper
            alternates.
        skip: names that stay as in the base, as in `FusionOptions`.
        progress: show a progress bar.

    Returns:
        A `ConcreteMask`. A tensor of one entry has the factor 1, except where a binary mask is 0.

    Raises:
        InputError: no batches, an iterator that is used up or shared, an argument out of range, a loss that does not
            depend on what the vectors change. StateMismatchError: vectors, base and model do not fit. NonFiniteError:
            NaN or infinity in a vector or a loss. ShapeError: logits that are no (..., K). TypeError: no module, no
            seed, batches that are none.

    Source: Tang et al., "Concrete Subspace Learning based Interference Elimination for Multi-task Model Fusion", 2023;
        defaults of the authors' code.

    Example:
        >>> import torch
        >>> model, base = torch.nn.Linear(1, 2, bias=False), {"weight": torch.tensor([[2.0], [0.0]])}
        >>> vectors = [{"weight": torch.tensor([[2.0], [2.0]])}]  # only the first entry makes predictions surer
        >>> found = concrete_mask(vectors, model, [torch.ones(1, 1)], base=base, seed=0, steps=50, lr=0.1,
        ...     kind="probability")
        >>> found.mask["weight"].round().T
        tensor([[2., 0.]])
    """
    number = seed_number(seed)
    if kind not in get_args(Kind):
        raise InputError(f"kind: expected one of {', '.join(map(repr, get_args(Kind)))}, got {kind!r}")
    count, rate = whole_number(steps, "steps", at_least=0), finite_number(lr, "lr", positive=True)
    heat = finite_number(temperature, "temperature", positive=True)
    at = Interpolated(vectors, model, base, FusionOptions(weights=weights, skip=skip))
    factor = heuristic_scale(at.count) if scale is None else finite_number(scale, "scale")
    given = prepared(tasks)
    streams = {where: endless(task, where, at.device) for where, task in given.items()}
    masked = [_Masked.of(at, index, factor) for index in range(len(at.layers))]
    adam = torch.optim.Adam([layer.logits for layer in masked], lr=rate)
    losses = []
    with torch.enable_grad(), mode(False, model, *(task.head for task in given.values())):
        for step in shown(count, "Concrete mask" if progress else None):
            for layer in masked:
                layer.draw(number, step, heat)
            call: WithState = at.call()
            losses.append(mean_entropy(call, at.parameters, given, streams))
            for layer in masked:
                layer.pull_back(heat)
            adam.step()
    mask: dict[str, Tensor] = {}
    for layer, places in zip(masked, at.layers, strict=True):
        mask |= dict.fromkeys(places.names, layer.final(number, count, heat, kind))
    names = [name for name in at.fusion.sources[0].specs if name in mask]
    return ConcreteMask(MappingProxyType({name: mask[name] for name in names}), tuple(losses))


class _Masked(NamedTuple):
    """One tensor of the model: ``parameter = base + mask / mean(mask) * step``."""

    name: str
    parameter: Tensor
    base: Tensor
    step: Tensor
    logits: Tensor
    mask: Tensor

    @classmethod
    def of(cls, at: Interpolated, index: int, scale: float) -> _Masked:
        """With even odds for every entry."""
        layer, parameter = at.layers[index], at.parameters[index]
        wide = torch.promote_types(parameter.dtype, torch.float32)
        step = torch.zeros(parameter.shape, dtype=wide, device=parameter.device)
        for part, w in zip(at.steps(layer, wide), layer.weights, strict=True):
            step.add_(part, alpha=scale * w)
        empty = torch.empty_like(step)
        return cls(min(layer.names), parameter, layer.base, step, torch.zeros_like(step).requires_grad_(), empty)

    @torch.no_grad()
    def draw(self, seed: int, step: int, temperature: float) -> None:
        """A new mask, and the parameter that it makes."""
        self._relaxed(seed, step, temperature)
        self.parameter.copy_(torch.addcdiv(self.base.to(self.mask.dtype), self.mask * self.step, self._mean()))

    @torch.no_grad()
    def pull_back(self, temperature: float) -> None:
        """The gradient of the logits from the parameter's, in its memory where dtypes allow."""
        if self.parameter.grad is None or not self.mask.numel():
            self.logits.grad = None
            return
        slope = self.parameter.grad.to(self.mask.dtype).mul_(self.step)
        mean = self._mean()
        slope.sub_((slope * self.mask).mean() / mean).div_(mean)
        slope.mul_(self.mask)
        self.logits.grad = slope.addcmul_(slope, self.mask, value=-1).div_(temperature)

    @torch.no_grad()
    def final(self, seed: int, step: int, temperature: float, kind: Kind) -> Tensor:
        """The mask that is used, over its mean; 0 where that is 0."""
        if kind == "sample":
            self._relaxed(seed, step, temperature)
        elif kind == "binary":
            self.mask.copy_(self._uniform(seed, step) < self.logits.sigmoid())
        else:
            self.mask.copy_(self.logits.sigmoid())
        return self.mask / self._mean()

    def _mean(self) -> Tensor:
        """Of the mask, and more than 0."""
        return self.mask.mean().clamp_min(torch.finfo(self.mask.dtype).tiny)

    def _relaxed(self, seed: int, step: int, temperature: float) -> None:
        u = self._uniform(seed, step)
        torch.logit(u, out=self.mask).add_(self.logits).div_(temperature).sigmoid_()

    def _uniform(self, seed: int, step: int) -> Tensor:
        """In (0, 1), and not so near to its ends that the logit is infinite."""
        source = generator(seed, "concrete", step, self.name, device=self.mask.device.type)
        u = torch.rand(self.mask.shape, generator=source, dtype=self.mask.dtype, device=self.mask.device)
        return u.clamp_(torch.finfo(u.dtype).eps, 1 - torch.finfo(u.dtype).eps)
