"""The weighted average of the task vectors."""

from __future__ import annotations

from collections.abc import Iterable

from typing_extensions import Unpack

from ..._state import Tensors
from ...errors import InputError
from .._engine import Fusion
from .._options import FusionOptions, plain_number
from ..vector import TaskVector
from ._linear import weighted_sum

__all__ = ["weighted_average"]


def weighted_average(vectors: Iterable[Tensors], *, scale: float = 1.0, **options: Unpack[FusionOptions]) -> TaskVector:
    r"""The weighted mean of the task vectors: model soup, federated averaging.

    .. math:: \tau = \lambda \frac{\sum_q w_q \tau_q}{\sum_q w_q}

    Args:
        vectors: N mappings of name -> tensor with the same keys and shapes. Not written to.
        scale: :math:`\lambda`, 1 for the mean itself.
        options: as for every rule, see `FusionOptions`; ``weights=1 / mse`` is the inverse-variance average. Here the
            weights are normalised; without them all count the same.

    Returns:
        The update, a `TaskVector`.

    Raises:
        InputError: weights that add up to zero for some entry, or no vectors. Otherwise as `task_arithmetic`.

    Source: Wortsman et al., "Model soups", 2022; McMahan et al., "Communication-efficient learning of deep networks
    from decentralized data", 2017.

    Example:
        >>> import torch
        >>> a, b = {"w": torch.tensor([1.0])}, {"w": torch.tensor([4.0])}
        >>> dict(weighted_average([a, b], weights=[2, 1]))
        {'w': tensor([2.])}
    """
    fusion = Fusion(vectors, options)
    factor = plain_number(scale, "scale")
    totals = {key: sum(fusion.weights(key)) for key in fusion.keys}
    for key, total in totals.items():
        if total == 0:
            raise InputError(f"weights: add up to 0 for {key!r}; an average needs another sum")
    return weighted_sum(fusion, lambda key: [factor * weight / totals[key] for weight in fusion.weights(key)])
