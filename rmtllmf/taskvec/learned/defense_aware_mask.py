"""Defence-aware merging: a mask for what tasks share, and against what a trigger in the inputs would set off."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..._call import WithState
from ..._display import counted, course
from ..._random import Seed, seed_number
from ..._state import StateLike, Tensors, finite_number, whole_number
from ..._tasks import Task, Tasks, describe, mode
from ...errors import InputError, ShapeError
from .._options import FusionOptions, Weights
from ..rules.arithmetic import heuristic_scale
from ._interpolated import Interpolated, descend, endless, entropy, prepared, rows_of, shown
from .concrete_mask import Kind, _Masked

__all__ = ["DefenseAwareMask", "defense_aware_mask"]

Against = Literal["entropy", "prediction"]


@dataclass(frozen=True, eq=False)
class DefenseAwareMask:
    """A mask that was learned, for `concrete`.

    Attributes:
        mask: name -> a factor for every entry, with the mean 1 in every tensor.
        triggers: name of the task ("" for a complete model) -> what was added to its inputs in the end.
        losses: the mean loss over the tasks before each step.
        disagreements: the mean cross-entropy of the disturbed predictions with the undisturbed, before each step: what
            the triggers were made to raise.

    Example:
        >>> import torch
        >>> from rmtllmf.taskvec import concrete
        >>> found = DefenseAwareMask({"w": torch.tensor([2.0, 0.0])}, {"": torch.zeros(3)}, (0.7,), (0.1,))
        >>> dict(concrete([{"w": torch.ones(2)}], found.mask))
        {'w': tensor([2., 0.])}
    """

    mask: Mapping[str, Tensor]
    triggers: Mapping[str, Tensor]
    losses: tuple[float, ...]
    disagreements: tuple[float, ...]

    def __repr__(self) -> str:
        entries = sum(tensor.numel() for tensor in self.mask.values())
        return f"DefenseAwareMask({counted(len(self.mask), 'tensor')}, {entries:,} entries, {course(self.losses)})"


def defense_aware_mask(
    vectors: Iterable[Tensors],
    model: nn.Module,
    tasks: Tasks,
    *,
    seed: Seed,
    base: StateLike | None = None,
    scale: float | None = None,
    defense: float = 0.1,
    against: Against = "entropy",
    steps: int = 2000,
    lr: float = 1e-3,
    trigger_lr: float = 1e-4,
    bounds: tuple[float, float] | None = None,
    temperature: float = 0.5,
    kind: Kind = "sample",
    weights: Weights | None = None,
    skip: str | Iterable[str] = (),
    progress: bool = False,
) -> DefenseAwareMask:
    r"""Learn the mask of defence-aware merging (DAM), in turns with the triggers that it is to withstand.

    .. math:: \min_x\ \sum_i \mathbb{E}\bigl[H(z_i(u)) + \alpha L(z_i(u + \delta_i))\bigr], \qquad
              \max_{\delta_i}\ \mathbb{E}\, \mathrm{CE}\bigl(z_i(u + \delta_i), \arg\max z_i(u)\bigr)

    with the logits :math:`z_i` of the model at :math:`\theta_0 + \lambda\, m \odot \sum_q \tau_q`, the mask m drawn
    from x as in `concrete_mask`, H the entropy of predictions, and one trigger :math:`\delta_i` for all inputs u of a
    task, a stand-in for one that an attacker may have hidden in a vector. A step takes two batches of every task: with
    one the triggers are moved, with the other the mask, both by Adam, from 0. No labels are used. Inputs are
    single floating-point tensors (B, ...), of one shape for a task but for B. Everything is in evaluation mode.

    Args:
        vectors, model, tasks, seed, base, scale, steps, lr, temperature, kind, weights, skip, progress: as for
            `concrete_mask`.
        defense: :math:`\alpha`; 0: the mask is that of `concrete_mask` for every second batch. Measure what it is worth
            to you: in a linear model with a planted trigger the mask alone protected as well, and with 1 and more the
            trigger was obeyed more often ("entropy") or predictions suffered ("prediction").
        against: what L is: "entropy": H, as in the authors' code, so that disturbed inputs get sure predictions, of
            whatever class; or "prediction": the cross-entropy that the triggers raise, so that they get the same ones
            as undisturbed.
        trigger_lr: of the triggers' Adam, which moves no entry of one by more than this in a step.
        bounds: the lowest and highest value that an input may have: disturbed ones are clipped. None: any.

    Returns:
        A `DefenseAwareMask`.

    Raises:
        As `concrete_mask`; TypeError: inputs that are no floating-point tensors. ShapeError: of changing shapes.

    Source: Yang et al., "Mitigating the backdoor effect for multi-task model merging via safety-aware subspace", 2025.
        The paper tells of two masks, for what tasks share and against backdoors; the authors' code in FusionBench has
        one for both losses, and so has this. It clips to [0, 1], which pixels are in before they are normalised, and
        does so for the mask only.

    Example:
        >>> import torch
        >>> from rmtllmf.taskvec import concrete
        >>> model, base = torch.nn.Linear(2, 2, bias=False), {"weight": torch.zeros(2, 2)}
        >>> vectors = [{"weight": torch.tensor([[4.0, 1.0], [-4.0, -1.0]])}]  # the second input is of no use
        >>> inputs = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        >>> found = defense_aware_mask(vectors, model, [inputs], base=base, seed=0, steps=60, lr=0.1, trigger_lr=0.1,
        ...     defense=1.0, against="prediction", kind="probability")
        >>> list(concrete(vectors, found.mask)) == ["weight"]
        True
        >>> found.triggers[""].shape
        torch.Size([2])
    """
    number = seed_number(seed)
    for argument, value, choices in (("kind", kind, get_args(Kind)), ("against", against, get_args(Against))):
        if value not in choices:
            raise InputError(f"{argument}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
    count, rate = whole_number(steps, "steps", at_least=0), finite_number(lr, "lr", positive=True)
    trigger_rate = finite_number(trigger_lr, "trigger_lr", positive=True)
    alpha = finite_number(defense, "defense")
    if alpha < 0:
        raise InputError(f"defense: expected at least 0, got {alpha:g}")
    limits = None if bounds is None else (finite_number(bounds[0], "bounds[0]"), finite_number(bounds[1], "bounds[1]"))
    if limits is not None and limits[0] >= limits[1]:
        raise InputError(f"bounds: expected the lowest value before the highest, got {bounds}")
    heat = finite_number(temperature, "temperature", positive=True)
    at = Interpolated(vectors, model, base, FusionOptions(weights=weights, skip=skip))
    factor = heuristic_scale(at.count) if scale is None else finite_number(scale, "scale")
    given = prepared(tasks)
    attacked = [_Attacked(task, where, at.device, limits) for where, task in given.items()]
    share = 1 / len(attacked)
    masked = [_Masked.of(at, index, factor) for index in range(len(at.layers))]
    adam = torch.optim.Adam([layer.logits for layer in masked], lr=rate)
    attack = torch.optim.Adam([task.trigger for task in attacked], lr=trigger_rate)
    losses, disagreements = [], []
    with torch.enable_grad(), mode(False, model, *(task.head for task in given.values())):
        for step in shown(count, "defence-aware mask" if progress else None):
            for layer in masked:
                layer.draw(number, step, heat)
            call = at.call()
            attack.zero_grad()
            disagreements.append(share * sum(task.disagree(call) for task in attacked))
            attack.step()
            losses.append(share * sum(task.withstand(call, at.parameters, alpha, against) for task in attacked))
            for layer in masked:
                layer.pull_back(heat)
            adam.step()
    mask: dict[str, Tensor] = {}
    for layer, places in zip(masked, at.layers, strict=True):
        mask |= dict.fromkeys(places.names, layer.final(number, count, heat, kind))
    names = [name for name in at.fusion.sources[0].specs if name in mask]
    called = list(tasks) if isinstance(tasks, Mapping) else [""]
    found = {name: task.trigger.detach() for name, task in zip(called, attacked, strict=True)}
    return DefenseAwareMask(
        MappingProxyType({name: mask[name] for name in names}),
        MappingProxyType(found),
        tuple(losses),
        tuple(disagreements),
    )


class _Attacked:
    """A task, and the trigger that is added to its inputs."""

    def __init__(self, task: Task, where: str, device: torch.device | None, bounds: tuple[float, float] | None) -> None:
        self.where, self.head, self.bounds = where, rows_of(task.head), bounds
        stream = endless(task, where, device)
        first = next(stream)
        if not isinstance(first, Tensor) or not first.is_floating_point() or first.ndim < 2:
            raise TypeError(f"{where}: expected inputs (B, ...) as one floating-point tensor, got {describe(first)}")
        self.trigger = torch.zeros_like(first[0]).requires_grad_()
        self.stream = self._checked(chain([first], stream))

    def _checked(self, stream: Iterator[Any]) -> Iterator[Tensor]:
        for inputs in stream:
            if not isinstance(inputs, Tensor) or inputs.shape[1:] != self.trigger.shape:
                raise ShapeError(
                    f"{self.where}: expected inputs (B, {', '.join(map(str, self.trigger.shape))}), as in the first "
                    f"batch, got {describe(inputs)}"
                )
            yield inputs

    def both(self, trigger: Tensor) -> Tensor:
        """The next inputs, and after them the same with `trigger`."""
        inputs = next(self.stream)
        disturbed = inputs + trigger
        return torch.cat([inputs, disturbed if self.bounds is None else disturbed.clamp(*self.bounds)])

    def disagree(self, call: WithState) -> float:
        """How much the predictions change, whose gradient is left at the trigger, downwards."""

        def up(logits: Tensor) -> float:
            value = _disagreement(logits)
            return -descend(-value, 1.0, [self.trigger], f"{self.where} with a trigger")

        return call.inside(up, self.both(self.trigger), self.where, head=self.head)

    def withstand(self, call: WithState, parameters: Sequence[Tensor], alpha: float, against: Against) -> float:
        """The loss of the mask, whose gradient is added to the parameters'."""

        def down(logits: Tensor) -> float:
            calm, disturbed = logits.chunk(2)
            loss = entropy(calm)
            if alpha:
                loss = loss + alpha * (entropy(disturbed) if against == "entropy" else _disagreement(logits))
            return descend(loss, 1.0, parameters, self.where)

        return call.inside(down, self.both(self.trigger.detach()), self.where, head=self.head)


def _disagreement(logits: Tensor) -> Tensor:
    """Cross-entropy of the second half of the predictions with the first."""
    calm, disturbed = logits.chunk(2)
    return cross_entropy(disturbed if disturbed.element_size() >= 4 else disturbed.float(), calm.detach().argmax(-1))
