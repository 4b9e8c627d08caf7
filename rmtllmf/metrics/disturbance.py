"""A test of whether a disturbance of the parameters shows in a model's outputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .._call import WithState, check_model, state_of
from .._display import counted
from .._random import Seed, seed_number
from .._state import StateLike, finite_number, whole_number
from .._tasks import Head, device_of, mode, moved, without_labels
from ..errors import InputError
from ._exact import exact_deviations
from ._inputs import batch_size
from ._jvp import jvp_deviations
from ._variances import Tolerated, variances_of

__all__ = ["DisturbanceTest", "disturbance_test", "prepared", "quantile"]

_METHODS = ("exact", "jvp")


@dataclass(frozen=True)
class DisturbanceTest:
    r"""The outcome of a `disturbance_test`, for every input and logit; all (inputs, logits), float64 and bool.

    Attributes:
        ratio: :math:`R = z_u / z_d`, undisturbed over disturbed logit: the paper's statistic, 1 without disturbance.
        statistic: :math:`\lvert z_d - z_u \rvert`.
        sd: standard deviation of :math:`z_d - z_u` under the tolerated variance, to first order.
        threshold: :math:`q\, \mathrm{sd}` with the two-sided quantile :math:`q` at level alpha: of the normal
            distribution, or of Student's t distribution where `sd` is an estimate.
        rejected: ``statistic > threshold``: the disturbance is larger than what is tolerated.
        predicted: (inputs,) int64, the class with the largest undisturbed logit.
        alpha: the level.
        degrees: of freedom of `sd`: the number of tangents, or infinity where `sd` is exact.

    Example:
        >>> import torch
        >>> one, none = torch.ones(1, 1), torch.zeros(1, dtype=torch.long)
        >>> test = DisturbanceTest(one, one, one, 2.776 * one, one < 0, none, alpha=0.05, degrees=4)
        >>> bool(test.rejected.any()), round(test.variance_error, 3)
        (False, 0.707)
    """

    ratio: Tensor
    statistic: Tensor
    sd: Tensor
    threshold: Tensor
    rejected: Tensor
    predicted: Tensor
    alpha: float
    degrees: float = math.inf

    def __repr__(self) -> str:
        inputs, logits = self.rejected.shape
        share = float(self.rejected.double().mean()) if self.rejected.numel() else math.nan
        known = "" if math.isinf(self.degrees) else f", {self.degrees:g} degrees of freedom"
        return (
            f"DisturbanceTest({counted(inputs, 'input')}, {counted(logits, 'logit')}, alpha {self.alpha:g}{known}: "
            f"{100 * share:.1f} % rejected)"
        )

    @property
    def variance_error(self) -> float:
        r"""The relative standard error of `sd` squared, :math:`\sqrt{2 / K}` from K tangents; 0 where exact.

        :math:`K\, \widehat{\mathrm{sd}}^2 / \mathrm{sd}^2` is chi-squared with K degrees of freedom. The errors of
        different logits and inputs are not independent: all see the same tangents.
        """
        return math.sqrt(2 / self.degrees)


def disturbance_test(
    model: nn.Module,
    undisturbed: StateLike,
    disturbed: StateLike,
    tolerated_variance: Tolerated,
    inputs: Any,
    *,
    alpha: float = 0.05,
    method: str = "exact",
    tangents: int = 4,
    seed: Seed | None = None,
    head: Head | None = None,
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

    In forward mode the variance is estimated from K tangents, and Student's t distribution with K degrees of freedom
    takes the place of the normal one, so that the level stays alpha (for K = 4 the normal quantile would reject 12 %
    instead of 5 %):

    .. math:: \widehat{\mathrm{sd}}_k(x)^2 = \frac{1}{K} \sum_{i=1}^{K} \bigl(J_k(x)\, u_i\bigr)^2, \quad
              u_i \sim \mathcal{N}(0, \mathrm{diag}\, V), \qquad
              \text{reject if } \lvert z_{d,k} - z_{u,k} \rvert > t_{K, 1 - \alpha/2}\, \widehat{\mathrm{sd}}_k

    Args:
        model: its parameters are not used and not touched; in evaluation mode meanwhile. Its output for B inputs must
            be logits (B, K), unless there is a `head`; ``method="exact"`` calls it with one input at a time.
        undisturbed: parameters, where the derivatives are taken: a module, a state dict or a safetensors path.
        disturbed: the same after the disturbance.
        tolerated_variance: :math:`V_j` for every floating-point entry of the state dict but running statistics; or
            name -> variance, a number or a tensor of the entry's shape. Entries that a mapping does not name are taken
            to be undisturbed: variance 0.
        inputs: a batch (B, ...), or a tuple or mapping of such for models with several arguments.
        alpha: level of the test, between 0 and 1.
        method: "exact": one backward pass per input and logit, the graph of one input at a time is kept. "jvp":
            forward mode, for all inputs and logits at once: each tangent costs the operations of three forward passes,
            and the memory of one more copy of the parameters and of the activations of a forward pass without a graph.
        tangents: K, for "jvp". The relative standard error of the estimated variance is :math:`\sqrt{2/K}`.
        seed: of the tangents, for "jvp": an int or a ``torch.Generator``. Every parameter has a generator of its own,
            so that neither the order of names nor the batch plays a part. Tied parameters share one tangent.
        head: turns the model's output into logits (B, K); its own parameters are not disturbed.

    Returns:
        A `DisturbanceTest`.

    Raises:
        StateMismatchError: states that do not fit the model. ShapeError: logits, inputs or variances of another shape.
        InputError: an unknown name or `method`, `alpha` outside (0, 1), a negative variance, no inputs, no `seed` for
            "jvp", or a model that cannot be differentiated in forward mode: use "exact".
        NonFiniteError: logits or variances that are not finite.

    Source: R-MTLLMF, eq. 9 to 12, with the variance and the threshold put right.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> clean, bent = {"weight": torch.ones(1, 2)}, {"weight": torch.tensor([[1.0, 4.0]])}
        >>> test = disturbance_test(model, clean, bent, 1.0, torch.eye(2))
        >>> test.statistic.tolist(), test.rejected.tolist()
        ([[0.0], [3.0]], [[False], [True]])
        >>> disturbance_test(model, clean, bent, 1.0, torch.eye(2), method="jvp", seed=0).threshold.shape
        torch.Size([2, 1])
    """
    test = prepared(model, undisturbed, disturbed, tolerated_variance, alpha, method, tangents, seed)
    batch_size(inputs)
    with mode(False, model, head):
        return test(inputs, head)


def prepared(
    model: nn.Module,
    undisturbed: StateLike,
    disturbed: StateLike,
    tolerated_variance: Tolerated,
    alpha: float,
    method: str,
    tangents: int,
    seed: Seed | None,
) -> Callable[[Any, Head | None], DisturbanceTest]:
    """Check everything but the inputs; the test as a function of inputs and head, with the same tangents each time."""
    check_model(model)
    if method not in _METHODS:
        raise InputError(f"method: expected one of {', '.join(map(repr, _METHODS))}, got {method!r}")
    level = finite_number(alpha, "alpha")
    if not 0 < level < 1:
        raise InputError(f"alpha: expected a number between 0 and 1, got {level}")
    count = whole_number(tangents, "tangents", at_least=1)
    if method == "jvp" and seed is None:
        raise InputError("seed: expected an int or a torch.Generator for method='jvp', which draws tangents; got None")
    before, after = state_of(model, undisturbed, "undisturbed"), state_of(model, disturbed, "disturbed")
    variance = variances_of(model, before, tolerated_variance)
    bent, device = WithState(model, after), device_of(model)
    if method == "exact":
        # detached by `state_of`: neither the model nor the caller's tensors see a gradient
        before = {**before, **{name: before[name].requires_grad_() for name in variance}}
    clean = WithState(model, before)
    number = 0 if seed is None or method == "exact" else seed_number(seed)
    degrees = math.inf if method == "exact" else float(count)

    def test(inputs: Any, head: Head | None) -> DisturbanceTest:
        inputs = moved(without_labels(inputs), device)
        if method == "exact":
            z_u, z_d, deviation = exact_deviations(clean, bent, variance, inputs, head)
        else:
            z_u, z_d, deviation = jvp_deviations(clean, bent, variance, inputs, head, count, number)
        z_u, z_d = z_u.double(), z_d.double()
        statistic, threshold = (z_d - z_u).abs(), quantile(level, degrees) * deviation
        return DisturbanceTest(
            z_u / z_d, statistic, deviation, threshold, statistic > threshold, z_u.argmax(-1), level, degrees
        )

    return test


def quantile(alpha: float, degrees: float) -> float:
    """What a standardised difference exceeds in size with probability `alpha`."""
    from scipy.special import ndtri, stdtrit

    # from the lower tail, so that small levels keep their digits
    return -float(ndtri(alpha / 2) if math.isinf(degrees) else stdtrit(degrees, alpha / 2))
