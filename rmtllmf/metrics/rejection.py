"""How much of a task notices a disturbance: the share of inputs that the disturbance test rejects."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from .._random import Seed
from .._state import StateLike, finite_number
from .._tasks import Tasks, inputs_of, mode, named_tasks
from ..errors import InputError
from ._inputs import batch_size
from ._variances import Tolerated
from .disturbance import DisturbanceTest, prepared, quantile

__all__ = ["RejectionRate", "rejection_rate", "task_disturbance"]

_PER = ("prediction", "any")


@dataclass(frozen=True)
class RejectionRate:
    r"""The share of inputs that are rejected, and how well it is known.

    Attributes:
        share: rejected inputs over all.
        low: lower end of a confidence interval of the share over all inputs of which these are a sample.
        high: its upper end.
        count: the number of inputs.
        expected: the share to expect under H0, that is at the tolerated variance: alpha (at most alpha for "any").

    Example:
        >>> rate = RejectionRate(share=0.2, low=0.15, high=0.26, count=200, expected=0.05)
        >>> rate.low > rate.expected
        True
    """

    share: float
    low: float
    high: float
    count: int
    expected: float


def rejection_rate(test: DisturbanceTest, *, per: str = "prediction", level: float = 0.95) -> RejectionRate:
    r"""The share of inputs that the disturbance test rejects, with the interval of Clopper and Pearson.

    .. math:: \hat p = k / n, \qquad
              \Bigl[B_{(1-l)/2}(k, n - k + 1),\ B_{(1+l)/2}(k + 1, n - k)\Bigr]

    with the quantiles :math:`B` of the beta distribution. Inputs are counted, not logits: the logits of one input
    share its features and rise and fall together, so that an interval over all of them would be far too narrow. One
    input counts as rejected

    - per "prediction": if the test of its predicted logit rejects, the largest before the disturbance. One test an
      input, of the logit that matters, at level alpha: the default.
    - per "any": if the test of at least one of its C logits rejects at level alpha / C (Bonferroni). More sensitive
      where single other logits are hit, but under H0 the share is at most alpha, and less where logits are correlated.

    The interval covers at least `level` for any n, and is sensible for k = 0 and k = n, where Wald's is empty. It is
    about the inputs: the share, for *this* disturbance (and these tangents), of all inputs of which the given ones are
    an independent sample. All inputs see the same disturbance, so that under H0 one draw's share scatters about
    `expected` by more than the interval says; only its mean over draws of the disturbance is `expected`.

    Args:
        test: n inputs, as of `disturbance_test`.
        per: "prediction" or "any".
        level: of the interval, between 0 and 1.

    Returns:
        A `RejectionRate`.

    Raises:
        InputError: an unknown `per`, or a `level` outside (0, 1). TypeError: no `DisturbanceTest`.

    Source: Clopper and Pearson, "The use of confidence or fiducial limits illustrated in the case of the binomial",
    1934; R-MTLLMF, eq. 9 to 12, for the test.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> clean, bent = {"weight": torch.ones(1, 2)}, {"weight": torch.tensor([[1.0, 4.0]])}
        >>> from rmtllmf.metrics import disturbance_test
        >>> rate = rejection_rate(disturbance_test(model, clean, bent, 1.0, torch.eye(2)))
        >>> rate.share, round(rate.low, 3), round(rate.high, 3), rate.count
        (0.5, 0.013, 0.987, 2)
    """
    if not isinstance(test, DisturbanceTest):
        raise TypeError(f"test: expected a DisturbanceTest, got {type(test).__name__}")
    _check_per(per)
    coverage = _check_level(level)
    if per == "prediction":
        rejected = test.rejected.gather(1, test.predicted[:, None])[:, 0]
    else:
        corrected = quantile(test.alpha / test.sd.shape[1], test.degrees)
        rejected = (test.statistic > corrected * test.sd).any(1)
    count, hits = len(rejected), int(rejected.sum())
    low, high = _clopper_pearson(hits, count, coverage)
    return RejectionRate(hits / count, low, high, count, test.alpha)


def task_disturbance(
    model: nn.Module,
    undisturbed: StateLike,
    disturbed: StateLike,
    tolerated_variance: Tolerated,
    tasks: Tasks,
    *,
    alpha: float = 0.05,
    method: str = "jvp",
    tangents: int = 4,
    seed: Seed | None = None,
    per: str = "prediction",
    level: float = 0.95,
) -> dict[str, RejectionRate]:
    r"""How much of each task notices a disturbance: `rejection_rate` over all batches of every task.

    .. math:: \hat p_t = \frac{1}{n_t} \sum_{x \in \mathcal{S}_t} 1\bigl[H_0 \text{ is rejected for } x\bigr]

    Labels play no part. All batches of all tasks see the same tangents, so that the division into batches does not
    matter.

    Args:
        model, undisturbed, disturbed, tolerated_variance, alpha, tangents, seed: as for `disturbance_test`.
        tasks: name -> (head, batches), or name -> batches for a complete model; batches are inputs or
            (inputs, targets). Heads are not disturbed.
        method: "jvp", whole batches at once, which needs a `seed`; or "exact".
        per, level: as for `rejection_rate`.

    Returns:
        Task -> `RejectionRate`.

    Raises:
        InputError: as `disturbance_test` and `rejection_rate` do; a task without inputs. TypeError: no mapping.

    Source: R-MTLLMF, eq. 9 to 12.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> clean, bent = {"weight": torch.ones(1, 2)}, {"weight": torch.tensor([[1.0, 4.0]])}
        >>> tasks = {"hit": [(torch.eye(2)[1:], torch.zeros(1))], "spared": [(torch.eye(2)[:1], torch.zeros(1))]}
        >>> rates = task_disturbance(model, clean, bent, 1.0, tasks, method="exact")
        >>> {name: rate.share for name, rate in rates.items()}
        {'hit': 1.0, 'spared': 0.0}
    """
    named = named_tasks(tasks, "tasks")
    _check_per(per)
    _check_level(level)
    test = prepared(model, undisturbed, disturbed, tolerated_variance, alpha, method, tangents, seed)
    rates = {}
    with mode(False, model, *(task.head for task in named.values())):
        for name, task in named.items():
            parts = []
            for inputs in inputs_of(task.batches, f"tasks[{name!r}]"):
                batch_size(inputs)
                parts.append(test(inputs, task.head))
            rates[name] = rejection_rate(_joined(parts), per=per, level=level)
    return rates


def _joined(tests: list[DisturbanceTest]) -> DisturbanceTest:
    """One test of all inputs; levels and degrees are those of the first."""
    names = [field.name for field in fields(DisturbanceTest) if isinstance(getattr(tests[0], field.name), Tensor)]
    tensors: dict[str, Any] = {name: torch.cat([getattr(test, name) for test in tests]) for name in names}
    return replace(tests[0], **tensors)


def _check_per(per: object) -> None:
    if per not in _PER:
        raise InputError(f"per: expected one of {', '.join(map(repr, _PER))}, got {per!r}")


def _check_level(level: object) -> float:
    number = finite_number(level, "level")
    if not 0 < number < 1:
        raise InputError(f"level: expected a number between 0 and 1, got {number}")
    return number


def _clopper_pearson(hits: int, count: int, level: float) -> tuple[float, float]:
    from scipy.special import betaincinv

    tail = (1 - level) / 2
    low = float(betaincinv(hits, count - hits + 1, tail)) if hits else 0.0
    high = float(betaincinv(hits + 1, count - hits, 1 - tail)) if hits < count else 1.0
    return low, high
