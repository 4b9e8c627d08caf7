"""Standard deviations of logits from the gradient of each: exact to first order, a backward pass each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._call import WithState, checked_rows
from .._tasks import Head
from ..errors import InputError
from ._inputs import batch_size, single
from ._variances import Variance

__all__ = ["LOST", "exact_deviations"]

LOST = (
    "model: its logits have no gradient with respect to any parameter that has a tolerated variance; is this within "
    "torch.inference_mode(), or is forward decorated with torch.no_grad()?"
)


@torch.enable_grad()
def exact_deviations(
    clean: WithState, bent: WithState, variance: dict[str, Variance], inputs: Any, head: Head | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Undisturbed logits, disturbed logits and standard deviations, (B, K) each; one graph at a time is kept."""
    leaves = {name: clean.state[name] for name in variance}

    def gradients(logits: Tensor) -> tuple[Tensor, Tensor]:
        row = checked_rows(logits, 1, "undisturbed")[0]
        return row.detach(), _deviations(row, leaves, variance)

    z_u, z_d, sd = [], [], []
    for index in range(batch_size(inputs)):
        # both models see the same batch of one: equal parameters give equal bits
        one = single(inputs, index)
        z_d.append(checked_rows(bent.logits(one, "disturbed", head=head), 1, "disturbed")[0].detach())
        logits, deviations = clean.inside(gradients, one, "undisturbed", head=head)
        z_u.append(logits)
        sd.append(deviations)
    return torch.stack(z_u), torch.stack(z_d), torch.stack(sd)


def _deviations(logits: Tensor, parameters: dict[str, Tensor], variance: dict[str, Variance]) -> Tensor:
    """(K,) the standard deviation of each logit, from the gradient of each."""
    totals = torch.zeros(len(logits), dtype=torch.float64, device=logits.device)
    if parameters and not logits.requires_grad:
        raise InputError(LOST)
    if parameters:
        leaves, pick = list(parameters.values()), torch.eye(len(logits), dtype=logits.dtype, device=logits.device)
        for index in range(len(logits)):
            # the graph is kept for the next logit, and dies with `logits` after the last
            gradients = torch.autograd.grad(logits, leaves, pick[index], retain_graph=True, allow_unused=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    squares = gradient.double().square()
                    value = variance[name]
                    # a number after the sum: one pass less over the entries
                    total = (squares * value).sum() if isinstance(value, Tensor) else value * squares.sum()
                    totals[index] += total.to(totals.device)
    return totals.sqrt()
