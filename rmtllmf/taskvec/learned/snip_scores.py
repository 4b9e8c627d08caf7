"""How much a loss depends on each weight: gradient times weight, sample by sample."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..._call import check_model
from ..._sample_gradients import Loss, SampleGradients, parameters_of, summed_over_samples, under_all_names
from ..._state import StateLike
from ..._tasks import Tasks, as_tasks, mode

__all__ = ["snip_scores"]


def snip_scores(
    model: nn.Module, tasks: Tasks, *, loss: Loss = cross_entropy, state: StateLike | None = None
) -> dict[str, Tensor]:
    r"""The SNIP score of every weight: by how much the loss of a sample would change, to first order, without it.

    .. math:: s_j = \frac{1}{|\mathcal{S}|} \sum_{(x, y) \in \mathcal{S}}
              \left| \theta_j \frac{\partial\, \ell\bigl(h(f(x; \theta)), y\bigr)}{\partial \theta_j} \right|

    For `led_merging` call it twice a task, on the task's data: with the base model and with the fine-tuned one.
    Gradients are those of single samples, as of `rmtllmf.resilience.squared_gradients`; memory is one more tensor for
    each parameter, and at most 1 GiB of gradients.

    Args:
        model: one encoder for all tasks, or a complete model. In evaluation mode meanwhile, and otherwise left as it
            was found.
        tasks: the batches of one task for a complete model, or ``{name: (head, batches)}``; several tasks count the
            same each. The first dimension of every tensor in inputs and targets counts the samples. The source takes
            128 of them.
        loss: of the logits and targets of a batch of one sample, one number. The default takes class indices.
        state: parameters and buffers in place of the model's own, such as ``vector.apply_to(base)``.

    Returns:
        Name -> scores in the shape of the parameter, at least 0, in float32 (float64 for parameters that are), for all
        floating-point parameters, tied and frozen ones included.

    Raises:
        InputError: no batches, no samples, no floating-point parameters. NonFiniteError: a gradient that is not finite.
        ShapeError: tensors of a batch with different numbers of samples, or a loss that is not one number.
        StateMismatchError: `state` does not fit the model.

    Source: Lee, Ajanthan and Torr, "SNIP: single-shot network pruning based on connection sensitivity", 2019; per
    sample as in Wei et al., "Assessing the brittleness of safety alignment via pruning and low-rank modifications",
    2024, which LED-Merging follows.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, 2.0)
        >>> batches = [(torch.tensor([[1.0, 3.0], [-3.0, 0.0]]), torch.zeros(2))]
        >>> snip_scores(model, batches, loss=lambda logits, targets: logits.sum())["weight"]
        tensor([[4., 3.]])
    """
    check_model(model)
    if not callable(loss):
        raise TypeError(f"loss: expected a function (logits, targets) -> number, got {type(loss).__name__}")
    named = as_tasks(tasks, "tasks")
    parameters, rest = parameters_of(model, state)
    gradients = SampleGradients(model, parameters, loss, rest)
    scores: dict[str, Tensor] = {}
    with mode(False, model, *(task.head for task in named.values())):
        for name, task in named.items():
            argument = f"tasks[{name!r}]" if name else "tasks"
            sums, count = summed_over_samples(gradients, task, torch.abs, argument)
            for key, total in sums.items():
                total.mul_(parameters[key].abs()).div_(count * len(named))
                scores[key] = scores[key].add_(total) if key in scores else total
    return under_all_names(model, scores)
