"""A test of whether a disturbance of the parameters shows in a model's outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._state import StateLike, finite_number, identity, is_bendable, quoted
from .._tasks import device_of, mode, moved
from ..errors import InputError, NonFiniteError, ShapeError
from ._call import WithState, check_model, state_of

__all__ = ["DisturbanceTest", "disturbance_test"]

_METHODS = ("exact",)


@dataclass(frozen=True)
class DisturbanceTest:
    r"""The outcome of a `disturbance_test`, for every input and logit; all (inputs, logits), float64 and bool.

    Attributes:
        ratio: :math:`R = z_u / z_d`, undisturbed over disturbed logit: the paper's statistic, 1 without disturbance.
        statistic: :math:`\lvert z_d - z_u \rvert`.
        sd: standard deviation of :math:`z_d - z_u` under the tolerated variance, to first order.
        threshold: :math:`z_{1 - \alpha/2}\, \mathrm{sd}`.
        rejected: ``statistic > threshold``: the disturbance is larger than what is tolerated.

    Example:
        >>> import torch
        >>> one = torch.ones(1, 1)
        >>> bool(DisturbanceTest(one, one, one, 1.96 * one, one < 0).rejected.any())
        False
    """

    ratio: Tensor
    statistic: Tensor
    sd: Tensor
    threshold: Tensor
    rejected: Tensor


def disturbance_test(
    model: nn.Module,
    undisturbed: StateLike,
    disturbed: StateLike,
    tolerated_variance: float | Mapping[str, float],
    inputs: Any,
    *,
    alpha: float = 0.05,
    method: str = "exact",
) -> DisturbanceTest:
    r"""Test for every input and logit whether the parameters were disturbed by more than a tolerated variance.

    .. math:: H_0: \mathrm{Var}(\Delta\theta_j) = V_j, \qquad
              \mathrm{sd}_k(x)^2 = \sum_j \Bigl(\frac{\partial z_k(x)}{\partial \theta_j}\Bigr)^2 V_j, \qquad
              \text{reject if } \lvert z_{d,k} - z_{u,k} \rvert > z_{1 - \alpha/2}\, \mathrm{sd}_k

    To first order the same as :math:`\lvert R - 1 \rvert > T` with :math:`T = z_{1-\alpha/2}\,\mathrm{sd}/\lvert
    z_u \rvert`, without dividing by small logits. In a linear model the rate of rejections is 0 without noise, alpha
    at the tolerated variance, and :math:`2 (1 - \Phi(z_{1-\alpha/2}/\sqrt r))` at r times it. After task arithmetic
    over a channel :math:`V = \lambda_N^2 \sum_q \mu_q\, \mathrm{scale}_q^2`, with the MSEs of the channel that is
    *tolerated* (the ideal uplink, say): with those of the channel under test the rate is alpha, whatever they are.

    Args:
        model: its parameters are not used and not touched; in evaluation mode meanwhile. Its output for one input must
            be logits (1, K).
        undisturbed: parameters, where the derivatives are taken: a module, a state dict or a safetensors path.
        disturbed: the same after the disturbance.
        tolerated_variance: :math:`V_j` for every floating-point entry of the state dict but running statistics; or
            name -> variance. Entries that a mapping does not name are taken to be undisturbed: variance 0.
        inputs: a batch (B, ...), or a tuple or mapping of such for models with several arguments.
        alpha: level of the test, between 0 and 1.
        method: "exact": one backward pass per input and logit. The graph of one input at a time is kept.

    Returns:
        A `DisturbanceTest`.

    Raises:
        StateMismatchError: states that do not fit the model. ShapeError: logits or inputs of another shape.
        InputError: an unknown name or `method`, `alpha` outside (0, 1), a negative or non-finite variance, no inputs.
        NonFiniteError: logits that are not finite.

    Source: R-MTLLMF, eq. 9 to 12, with the variance and the threshold put right.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> clean, bent = {"weight": torch.ones(1, 2)}, {"weight": torch.tensor([[1.0, 4.0]])}
        >>> test = disturbance_test(model, clean, bent, 1.0, torch.eye(2))
        >>> test.statistic.tolist(), test.rejected.tolist()
        ([[0.0], [3.0]], [[False], [True]])
    """
    check_model(model)
    if method not in _METHODS:
        raise InputError(f"method: expected one of {', '.join(map(repr, _METHODS))}, got {method!r}")
    level = finite_number(alpha, "alpha")
    if not 0 < level < 1:
        raise InputError(f"alpha: expected a number between 0 and 1, got {level}")
    before, after = state_of(model, undisturbed, "undisturbed"), state_of(model, disturbed, "disturbed")
    variance = _variances(model, before, tolerated_variance)
    count = _batch_size(inputs)
    inputs = moved(inputs, device_of(model))
    # detached by `state_of`: neither the model nor the caller's tensors see a gradient
    clean = WithState(model, {**before, **{name: before[name].requires_grad_() for name in variance}})
    bent = WithState(model, after)

    def gradients(logits: Tensor) -> tuple[Tensor, Tensor]:
        row = _one_row(logits, "undisturbed")
        return row.detach(), _deviations(row, {name: clean.state[name] for name in variance}, variance)

    z_u, z_d, sd = [], [], []
    with mode(False, model), torch.enable_grad():
        for index in range(count):
            one = _single(inputs, index)
            z_d.append(_one_row(bent.logits(one, "disturbed"), "disturbed").detach())
            logits, deviations = clean.inside(gradients, one, "undisturbed")
            z_u.append(logits)
            sd.append(deviations)
    undisturbed_logits, disturbed_logits = torch.stack(z_u).double(), torch.stack(z_d).double()
    deviation = torch.stack(sd)
    statistic = (disturbed_logits - undisturbed_logits).abs()
    threshold = -float(torch.special.ndtri(torch.tensor(level / 2, dtype=torch.float64))) * deviation
    ratio = undisturbed_logits / disturbed_logits
    return DisturbanceTest(ratio, statistic, deviation, threshold, statistic > threshold)


def _deviations(logits: Tensor, parameters: dict[str, Tensor], variance: dict[str, float]) -> Tensor:
    """(K,) the standard deviation of each logit, from the gradient of each."""
    totals = torch.zeros(len(logits), dtype=torch.float64, device=logits.device)
    if parameters and not logits.requires_grad:
        raise InputError(
            "model: its logits have no gradient with respect to any parameter that has a tolerated variance; is this "
            "within torch.inference_mode(), or is forward decorated with torch.no_grad()?"
        )
    if parameters:
        leaves, pick = list(parameters.values()), torch.eye(len(logits), dtype=logits.dtype, device=logits.device)
        for index in range(len(logits)):
            # the graph is kept for the next logit, and dies with `logits` after the last
            gradients = torch.autograd.grad(logits, leaves, pick[index], retain_graph=True, allow_unused=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    totals[index] += variance[name] * gradient.double().square().sum().to(totals.device)
    return totals.sqrt()


def _variances(model: nn.Module, state: dict[str, Tensor], tolerated: float | Mapping[str, float]) -> dict[str, float]:
    """Name -> variance where it is positive; tied entries under the last of their names, as in `WithState`."""
    own = model.state_dict(keep_vars=True)
    last = {identity(own[name]): name for name in own}
    bendable = [name for name in state if is_bendable(name, state[name])]
    if isinstance(tolerated, Mapping):
        unknown = [str(name) for name in tolerated if name not in bendable]
        if unknown:
            raise InputError(
                f"tolerated_variance: {quoted(unknown)} is no floating-point entry of the model, which has "
                f"{quoted(bendable, 8)}"
            )
        named = {name: _variance(value, f"tolerated_variance[{name!r}]") for name, value in tolerated.items()}
    else:
        named = dict.fromkeys(bendable, _variance(tolerated, "tolerated_variance"))
    result: dict[str, float] = {}
    for name, value in named.items():
        first = last[identity(own[name])]
        if result.setdefault(first, value) != value:
            raise InputError(f"tolerated_variance[{name!r}]: {value} differs from that of {first!r}, its tied twin")
    return {name: value for name, value in result.items() if value > 0}


def _variance(value: object, argument: str) -> float:
    number = finite_number(value, argument)
    if number < 0:
        raise InputError(f"{argument}: expected a variance >= 0, got {number}")
    return number


def _tensors(inputs: Any) -> list[Any]:
    if isinstance(inputs, Mapping):
        return list(inputs.values())
    return list(inputs) if isinstance(inputs, tuple | list) else [inputs]


def _batch_size(inputs: Any) -> int:
    parts = _tensors(inputs)
    for part in parts:
        if not isinstance(part, Tensor):
            raise TypeError(f"inputs: expected tensors with a leading batch dimension, got {type(part).__name__}")
    sizes = {part.shape[0] if part.ndim else None for part in parts}
    if len(sizes) != 1 or None in sizes:
        raise ShapeError(f"inputs: expected one leading batch dimension, got {[tuple(part.shape) for part in parts]}")
    (size,) = sizes
    if not size:
        raise InputError("inputs: expected at least one input, got an empty batch")
    return int(size)


def _single(inputs: Any, index: int) -> Any:
    """A batch of one."""
    if isinstance(inputs, Tensor):
        return inputs[index : index + 1]
    if isinstance(inputs, Mapping):
        return {name: part[index : index + 1] for name, part in inputs.items()}
    return tuple(part[index : index + 1] for part in inputs)


def _one_row(logits: Tensor, argument: str) -> Tensor:
    if logits.shape[0] != 1:
        raise ShapeError(f"model: expected logits (1, K) for one input, got {tuple(logits.shape)}")
    if not bool(logits.isfinite().all()):
        raise NonFiniteError(f"{argument}: the logits are not finite")
    return logits[0]
