"""Which parameters of a fused model are better restored from the base model: those that noise harms more than helps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .._arrays import ArrayLike
from .._sample_gradients import Loss, SampleGradients, parameters_of, under_all_names
from .._state import Tensors, finite_number, heuristic_scale, quoted
from .._tasks import Tasks, as_tasks, device_of, mode, pairs
from ..channel import Reception
from ..errors import InputError, NonFiniteError, StateMismatchError
from ._energy import energy_of
from ._noise import KnownNoise, Scale
from .shrink import Sensitivity, sensitivities

__all__ = ["harmful_keys", "squared_gradients"]


def harmful_keys(
    received: Iterable[Tensors],
    reception: Reception | ArrayLike,
    *,
    estimator: str = "additive",
    scale: Scale = "rms",
    fusion_scale: float | None = None,
    sensitivity: Sensitivity = 1.0,
    importance: Mapping[str, float] | None = None,
    tolerance: float | None = None,
) -> tuple[str, ...]:
    r"""The names of the parameters that a fused model should take from the base model.

    .. math:: N_k + \kappa_k B_k \ge \kappa_k S_k, \qquad
              N_k = \sum_{j \in k} \mathbf{1}^T V_j \mathbf{1}, \quad
              B_k = \sum_{j \in k} \sum_q (1 - g_{q,j})^2 v_{q,k}, \quad
              S_k = \sum_{j \in k} \sum_q v_{q,k}

    The fused update is :math:`\lambda \sum_q \hat\tau_q` with :math:`\hat\tau_q = g_q \tau_q + n_q`; wanted is
    :math:`\lambda \sum_q \tau_q`. In units of :math:`\lambda^2`, which cancels, keeping a tensor k costs the energy
    :math:`N_k` of the noise's sum over the users (with V the covariance of their noise, so correlated errors add up or
    cancel as they do in the fusion) and, where gains are not 1, the lost part :math:`B_k` of the signal; restoring it
    costs the signal, :math:`S_k`. With :math:`\kappa = 1` this compares two expected squared errors.

    The energies v are those of `shrink`, estimated from the received power. Products of different users' vectors
    are taken as 0: task vectors are nearly orthogonal, and their small inner products cannot be told from those
    of the noise. If every two have the cosine c and the same norm, :math:`S_k` is :math:`1 + (Q - 1) c` times what is
    calculated here: with related tasks pass that as (a factor of) `sensitivity`.

    This is the hard threshold to which `shrink` is the soft one; `shrink` multiplies each user's tensor by
    :math:`\kappa g v / (\kappa g^2 v + \sigma^2)` instead of 0 or 1. For the least error use `shrink` (or
    `joint_shrink`): with uncorrelated errors and energies that are known it is never worse. Use this one to leave what
    was received as it is, to have parameters that are exactly the base's and can be frozen while realigning, or to see
    what is hopeless. Not both: the noise in what was shrunk is no longer the reception's. The paper's rule is
    ``restore(fused, base, embedding_keys(model))``, which looks at names only.

    With `importance` and `tolerance` more is restored, until the variance of a sample's loss that is due to noise, to
    first order :math:`\lambda^2 \sum_k F_k N_k` over the tensors k that are kept, is at most the tolerance. To lose as
    little signal as possible, :math:`\sum_k F_k \kappa_k (S_k - B_k)` over those that are restored, is a knapsack
    problem. Tensors go in the order of :math:`N_k / (\kappa_k (S_k - B_k))`, the largest first: the importance is in
    what a tensor disturbs and in what its signal is worth, and cancels in the ratio. So the criterion stays the one
    above, with a lower threshold, which is what a Lagrange multiplier of the constraint gives. Where the tolerance is
    met with equality that is optimal; else the loss of signal exceeds the least possible by less than what the
    last tensor restored is worth.

    Args:
        received: Q mappings of name -> tensor with the same keys and shapes, as they came over the channel.
        reception: the `Reception` of `transmit`, or bare MSEs, (Q,) or (blocks, Q).
        estimator, scale: as for `shrink`.
        fusion_scale: :math:`\lambda > 0` of the fusion, which only the tolerance depends on; None: `heuristic_scale` of
            Q, as for `task_arithmetic`.
        sensitivity: :math:`\kappa > 0`, how much more signal is worth than noise of its energy, as for `shrink`.
        importance: :math:`F`, name -> mean squared derivative of the loss by an entry of the tensor, at least 0:
            `squared_gradients` of the base model. Names that were not received do not matter.
        tolerance: the variance that is tolerated, in units of the loss squared, at least 0; goes with `importance`.

    Returns:
        The names, ties included, in the order of the received vectors: for ``restore(fused, base, names)``, or as
        `frozen` of `resilient_fusion`. Integer entries, running statistics and tensors on which keeping and restoring
        come to the same (no noise, no signal) are never among them. Empty if nothing is harmful.

    Raises:
        InputError: one of `importance` and `tolerance` without the other, a negative one, or what `shrink` refuses.
        ShapeError: the reception is not for Q users.
        StateMismatchError: keys or shapes disagree, or `importance` lacks a name that was received.
        NonFiniteError: NaN or infinity. NotPSDError: an error covariance that is none.

    Source: the oracle of hard thresholding, "keep or kill", in Donoho and Johnstone, "Ideal spatial adaptation by
    wavelet shrinkage", 1994, section 2, block by block; the greedy knapsack: Dantzig, "Discrete-variable extremum
    problems", 1957.

    Example:
        >>> import torch
        >>> from rmtllmf.channel import transmit
        >>> from rmtllmf.resilience import restore
        >>> sent = {"steady": torch.zeros(4000), "tuned": torch.randn(4000, generator=torch.Generator().manual_seed(0))}
        >>> heard = transmit([sent], [0.5], seed=0, scale=1.0)
        >>> names = harmful_keys(heard, [0.5], scale=1.0)
        >>> names, bool(restore(heard[0], {name: torch.zeros(4000) for name in sent}, names)["steady"].any())
        (('steady',), False)
    """
    if (importance is None) != (tolerance is None):
        raise InputError("importance and tolerance: expected both or neither")
    known = KnownNoise.of(received, reception, estimator=estimator, scale=scale)
    kappa = sensitivities(known.stream.keys, sensitivity)
    given = heuristic_scale(known.users) if fusion_scale is None else fusion_scale
    factor = finite_number(given, "fusion_scale", positive=True)
    noise, gained = _energies(known)
    ratio = {key: _ratio(noise[key], kappa[key] * gained[key]) for key in noise}
    chosen = {key for key in ratio if ratio[key] >= 1}
    if importance is not None and tolerance is not None:
        weight = _importances(importance, noise)
        left = {key: factor**2 * weight[key] * noise[key] for key in ratio if key not in chosen}
        chosen |= _beyond(left, ratio, _not_negative(tolerance, "tolerance"))
    alias = known.stream.alias
    return tuple(name for name in known.stream.vectors[0] if alias.get(name, name) in chosen)


def _energies(known: KnownNoise) -> tuple[dict[str, float], dict[str, float]]:
    """Name -> the energy of the noise in the sum over the users, and that of the signal which it has to make up for."""
    energy = energy_of(known)
    noise, gained = {}, {}
    for key in energy.keys:
        v = energy.of(key)
        parts = known.parts[key]
        # real and imaginary parts of a sum of users are uncorrelated (the imaginary part of a Hermitian matrix adds up
        # to 0), so that only the real covariance matters
        sums = [max(0.0, float(known.covariance_of(key, part.block).sum())) for part in parts]
        noise[key] = math.fsum((part.stop - part.start) * value for part, value in zip(parts, sums, strict=True))
        gains = [known.gain[part.block] for part in parts]
        shares = [float((g * (2 - g) * v).sum()) for g in gains]  # 1 - (1 - g)^2
        gained[key] = math.fsum((part.stop - part.start) * value for part, value in zip(parts, shares, strict=True))
    return noise, gained


def _ratio(noise: float, gained: float) -> float:
    if noise == 0 and gained >= 0:
        return 0.0
    return noise / gained if gained > 0 else math.inf


def _beyond(disturbance: Mapping[str, float], ratio: Mapping[str, float], tolerance: float) -> set[str]:
    """Those with the largest ratios, so many that the others' disturbances add up to at most the tolerance."""
    order = sorted((key for key in disturbance if disturbance[key] > 0), key=lambda key: (ratio[key], key))
    totals = accumulate(disturbance[key] for key in order)
    return {key for key, total in zip(order, totals, strict=True) if total > tolerance}


def _importances(importance: Mapping[str, float], keys: Iterable[str]) -> dict[str, float]:
    if not isinstance(importance, Mapping):
        raise TypeError(f"importance: expected a mapping of name -> number, got {type(importance).__name__}")
    names = list(keys)
    missing = [key for key in names if key not in importance]
    if missing:
        raise StateMismatchError(f"importance lacks {quoted(missing)}, which received names")
    return {key: _not_negative(importance[key], f"importance[{key!r}]") for key in names}


def _not_negative(value: object, argument: str) -> float:
    number = finite_number(value, argument)
    if number < 0:
        raise InputError(f"{argument}: expected at least 0, got {number}")
    return number


def squared_gradients(
    model: nn.Module,
    tasks_or_batches: Tasks,
    *,
    loss: Loss = cross_entropy,
) -> dict[str, float]:
    r"""How much a loss depends on an entry of each parameter: the diagonal of the empirical Fisher matrix, averaged.

    .. math:: F_k = \frac{1}{T} \sum_{t=1}^T \frac{1}{|\mathcal{S}_t|} \sum_{(x, y) \in \mathcal{S}_t}
              \frac{1}{|k|} \sum_{j \in k}
              \left( \frac{\partial\, \ell\bigl(h_t(f(x; \theta)), y\bigr)}{\partial \theta_j} \right)^2

    White noise of variance :math:`\sigma^2` in the entries of a tensor changes the loss of a sample, to first order, by
    a number of mean square :math:`\sigma^2 |k| F_k`. Every task counts the same, as in `realign`.

    Gradients are those of single samples, many at a time (``torch.func.vmap`` of ``torch.func.grad``). A model that
    these transformations refuse (values that steer Python, writes into buffers, functions without a batching rule of
    their own, random numbers), or so large that the gradients of two samples do not fit into 1 GiB, is differentiated
    sample by sample: the same numbers up to rounding, slower.

    Args:
        model: one encoder for all tasks, or a complete model. In evaluation mode meanwhile; mode, buffers,
            `requires_grad` and `grad` are left as they were found, after an exception too.
        tasks_or_batches: name -> (head, batches), or the batches of a complete model, as for `realign`; the first
            dimension of every tensor in the inputs and targets counts the samples.
        loss: of the logits and targets of a batch of one sample, one number. The default takes class indices.

    Returns:
        Name -> mean squared derivative by an entry, for all floating-point parameters, tied and frozen ones included.

    Raises:
        InputError: no batches, no samples, no floating-point parameters. NonFiniteError: a gradient that is not finite.
        ShapeError: tensors of a batch with different numbers of samples, or a loss that is not one number.

    Source: Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", 2017; Kunstner, Hennig and
    Balles, "Limitations of the empirical Fisher approximation for natural gradient descent", 2019, for what it is not.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> batches = [(torch.tensor([[1.0, 3.0], [2.0, 0.0]]), torch.zeros(2))]
        >>> squared_gradients(model, batches, loss=lambda logits, targets: logits.sum())  # of 1, 9, 4 and 0
        {'weight': 3.5}
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not callable(loss):
        raise TypeError(f"loss: expected a function (logits, targets) -> number, got {type(loss).__name__}")
    tasks = as_tasks(tasks_or_batches, "tasks_or_batches")
    parameters, rest = parameters_of(model)
    gradients = SampleGradients(model, parameters, loss, rest)
    means = dict.fromkeys(parameters, 0.0)
    with mode(False, model, *(task.head for task in tasks.values())):
        for name, task in tasks.items():
            argument = f"tasks_or_batches[{name!r}]" if name else "tasks_or_batches"
            samples, sums = 0, dict.fromkeys(parameters, 0.0)
            for batch in pairs(task.batches, argument, device_of(model)):
                count, squares = gradients.of(task.head, batch, _squares, argument)
                samples += count
                for key, total in squares.items():
                    if not math.isfinite(total):
                        raise NonFiniteError(f"the gradient of {key!r} is not finite for the samples of {argument}")
                    sums[key] += total
            if not samples:
                raise InputError(f"{argument}: expected at least one sample, got batches of none")
            for key, total in sums.items():
                means[key] += total / samples / max(1, parameters[key].numel()) / len(tasks)
    return under_all_names(model, means)


def _squares(gradients: Iterator[Tensors]) -> dict[str, float]:
    totals: dict[str, Tensor] = {}
    for found in gradients:
        for key, g in found.items():
            square = torch.linalg.vector_norm(g, dtype=torch.float64) ** 2
            totals[key] = totals[key] + square if key in totals else square
    return {key: float(total) for key, total in totals.items()}
