"""The pull towards an anchor while a model is trained: a proximal step after every step of the optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .._state import StateLike, all_finite, as_state, finite_number, quoted, wide
from ..errors import InputError, NonFiniteError, ShapeError, StateMismatchError

AnchorWeight: TypeAlias = float | Mapping[str, float | Tensor]

_PROXIMAL = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)


@dataclass(frozen=True)
class Anchor:
    """Where trained parameters are pulled to, and how strongly; nothing is copied yet.

    Attributes:
        values: name -> anchor; None: where the model stands when training begins.
        weights: name -> weight, a number or a tensor of the parameter's shape; those of weight 0 are left out.
    """

    values: dict[str, Tensor] | None
    weights: dict[str, float | Tensor]

    @classmethod
    def of(cls, model: nn.Module, trained: Mapping[str, nn.Parameter], anchor: StateLike, weight: Any) -> Anchor:
        """Checked against the parameters to train; a tied one may be given under any of its names."""
        names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        aliases = {name: names[id(parameter)] for name, parameter in trained.items()}
        weights = _weights(model, trained, aliases, weight)
        if isinstance(anchor, str) and anchor == "start":
            return cls(None, weights)
        if isinstance(anchor, str) and not anchor.endswith(".safetensors"):
            raise InputError(f"anchor: expected 'start', a state or the path of a .safetensors file, got {anchor!r}")
        state, values = as_state(anchor, "anchor"), {}
        for name in weights:
            given = [alias for alias in aliases[name] if alias in state]
            if not given:
                raise StateMismatchError(
                    f"anchor lacks {name!r}, which is trained; give it, or the weight 0 in `anchor_weight`"
                )
            values[name] = state[given[0]]
            for alias in given:
                _check_value(state[alias], alias, trained[name])
                if not torch.equal(state[alias], values[name]):
                    raise StateMismatchError(
                        f"anchor[{given[0]!r}] and anchor[{alias!r}] differ, but are one tensor in the model"
                    )
        return cls(values, weights)

    def pull(self, trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> Pull:
        """For a run that begins now. The anchor is copied: it may be a view of the model that is trained."""
        groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        entries = []
        for name, weight in self.weights.items():
            parameter = trained[name]
            if id(parameter) in groups:
                value = parameter if self.values is None else self.values[name]
                copy = value.detach().to(parameter.device, parameter.dtype, copy=True)
                if isinstance(weight, Tensor):
                    weight = weight.detach().to(parameter.device, wide(parameter.detach()).dtype)
                entries.append(_Entry(parameter, copy, weight, groups[id(parameter)]))
        return Pull(optimizer, tuple(entries))


@dataclass(frozen=True)
class _Entry:
    parameter: nn.Parameter
    anchor: Tensor
    weight: float | Tensor
    group: dict[str, Any]  # of the optimizer


@dataclass(frozen=True)
class Pull:
    """The penalty ``1/2 sum_j w_j (theta_j - anchor_j)^2`` beside the steps of an optimizer."""

    optimizer: torch.optim.Optimizer
    entries: tuple[_Entry, ...]

    @property
    def proximal(self) -> bool:
        """Whether the optimizer's metric is known; if not, the penalty goes into the gradients."""
        return type(self.optimizer) in _PROXIMAL

    @torch.no_grad()
    def penalty(self) -> float:
        """Its value now."""
        parts = []
        for entry in self.entries:
            squares = (wide(entry.parameter) - wide(entry.anchor)).square_().mul_(entry.weight)
            parts.append(squares.sum(dtype=torch.float64))
        return 0.5 * float(torch.stack([part.to(parts[0].device) for part in parts]).sum()) if parts else 0.0

    @torch.no_grad()
    def before_step(self) -> None:
        """Add the gradient of the penalty, unless a proximal step will follow."""
        for entry in () if self.proximal else self.entries:
            parameter = entry.parameter
            slope = (wide(parameter) - wide(entry.anchor)).mul_(entry.weight).to(parameter.dtype)
            parameter.grad = slope if parameter.grad is None else parameter.grad.add_(slope)

    @torch.no_grad()
    def after_step(self) -> None:
        r"""``argmin_x D/2 (x - theta)^2 + lr w/2 (x - anchor)^2`` in the metric D in which the optimizer stepped."""
        for entry in self.entries if self.proximal else ():
            parameter = entry.parameter
            rate = float(entry.group["lr"]) * entry.weight
            if isinstance(rate, float) and rate == 0:
                continue
            metric = self._metric(entry)
            if isinstance(metric, Tensor) or isinstance(rate, Tensor):
                # 1 / (1 + D/rate): 0 where the rate is 0, 1 where it overflows
                share = torch.as_tensor(metric / rate).add(1).reciprocal_()
                parameter.copy_(torch.lerp(wide(parameter), wide(entry.anchor), share))
            else:
                parameter.copy_(torch.lerp(wide(parameter), wide(entry.anchor), 1 / (1 + metric / rate)))

    def _metric(self, entry: _Entry) -> float | Tensor:
        """D, so that a constant gradient g ends up moving a parameter by ``lr g / D`` a step."""
        group = entry.group
        if isinstance(self.optimizer, torch.optim.SGD):
            momentum = float(group["momentum"])
            return (1 - momentum) / (1 - float(group["dampening"])) if momentum else 1.0
        state = self.optimizer.state.get(entry.parameter)
        if not state:  # it has had no gradient yet
            return float(group["eps"]) or math.ulp(0.0)
        square = wide(state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"])
        correction = 1 - float(group["betas"][1]) ** float(state["step"])
        return square.div(correction).sqrt_().add_(float(group["eps"]))


def _weights(
    model: nn.Module, trained: Mapping[str, nn.Parameter], aliases: Mapping[str, list[str]], weight: Any
) -> dict[str, float | Tensor]:
    if not isinstance(weight, Mapping):
        number = _checked_weight(weight, "anchor_weight")
        if isinstance(number, Tensor):
            raise ShapeError(f"anchor_weight: expected one number or a mapping, got shape {tuple(number.shape)}")
        return dict.fromkeys(trained, number) if number else {}
    rules = {pattern: _checked_weight(value, f"anchor_weight[{pattern!r}]") for pattern, value in weight.items()}
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    names += [name for name, _ in model.named_buffers(remove_duplicate=False)]
    for pattern in rules:
        if not isinstance(pattern, str):
            raise TypeError(f"anchor_weight: expected names or glob patterns as keys, got {type(pattern).__name__}")
        if not any(name == pattern or fnmatchcase(name, pattern) for name in names):
            raise InputError(f"anchor_weight: {pattern!r} matches none of the {len(names)} names: {quoted(names, 8)}")
    found: dict[str, float | Tensor] = {}
    for name, parameter in trained.items():
        for pattern, value in rules.items():
            if any(alias == pattern or fnmatchcase(alias, pattern) for alias in aliases[name]):
                if isinstance(value, Tensor):
                    _check_broadcast(value, pattern, name, parameter)
                    found[name] = value
                elif value:
                    found[name] = value
                break
    return found


def _checked_weight(value: Any, argument: str) -> float | Tensor:
    if not isinstance(value, Tensor) or value.ndim == 0:
        number = finite_number(value, argument)
        if number < 0:
            raise InputError(f"{argument}: expected a number >= 0, got {number}")
        return number
    if not value.is_floating_point():
        raise TypeError(f"{argument}: expected a floating-point tensor, got {value.dtype}")
    if not all_finite(value):
        raise NonFiniteError(f"{argument}: holds NaN or infinity; expected numbers >= 0")
    if bool((value < 0).any()):
        raise InputError(f"{argument}: expected numbers >= 0, got {float(value.min())}")
    return value


def _check_broadcast(value: Tensor, pattern: str, name: str, parameter: Tensor) -> None:
    try:
        fits = torch.broadcast_shapes(value.shape, parameter.shape) == parameter.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ShapeError(
            f"anchor_weight[{pattern!r}]: expected a number or a shape that broadcasts to {tuple(parameter.shape)} of "
            f"{name!r}, got {tuple(value.shape)}"
        )


def _check_value(value: Tensor, name: str, parameter: Tensor) -> None:
    if value.shape != parameter.shape:
        raise StateMismatchError(
            f"anchor[{name!r}] has shape {tuple(value.shape)}; the model has {tuple(parameter.shape)}"
        )
    if value.dtype != parameter.dtype:
        raise StateMismatchError(
            f"anchor[{name!r}] is {value.dtype}; the model has {parameter.dtype}. Convert one of them first: nothing "
            "is cast in silence"
        )
    if not all_finite(value):
        raise NonFiniteError(f"anchor[{name!r}] holds NaN or infinity; expected finite numbers")
