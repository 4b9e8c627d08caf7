"""The diagonal of the Fisher information matrix of a classifier's parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax

from ..._call import check_model, logit_matrix
from ..._random import Seed, generator, seed_number
from ..._sample_gradients import Loss, SampleGradients, parameters_of, summed_over_samples, under_all_names
from ..._state import StateLike, whole_number
from ..._tasks import Task, Tasks, as_tasks, device_of, inputs_of, mode
from ...errors import InputError

__all__ = ["fisher_information"]

Labels = Literal["expected", "sampled", "given"]


def fisher_information(
    model: nn.Module,
    tasks: Tasks,
    *,
    labels: Labels = "expected",
    draws: int = 1,
    seed: Seed | None = None,
    loss: Loss = cross_entropy,
    state: StateLike | None = None,
) -> dict[str, Tensor]:
    r"""How much every weight matters for what the model predicts: the diagonal of its Fisher information matrix.

    .. math:: F_j = \frac{1}{|\mathcal{S}|} \sum_{x \in \mathcal{S}} \; \mathbb{E}_{y \sim p_\theta(y | x)}
              \left( \frac{\partial \log p_\theta(y | x)}{\partial \theta_j} \right)^2

    For `fisher` call it once a task, with the fine-tuned model and the task's data. Gradients are those of single
    samples (and classes), as of `rmtllmf.resilience.squared_gradients`; memory is one more tensor for each parameter,
    and at most 1 GiB of gradients. The time is that of a backward pass for each sample and class, or draw.

    Args:
        model: one encoder for all tasks, or a complete model. In evaluation mode meanwhile, and otherwise left as it
            was found.
        tasks: the batches of one task for a complete model, or ``{name: (head, batches)}``; several tasks count the
            same each. The first dimension of every tensor in the inputs counts the samples.
        labels: "expected": the expectation over all classes, as above, which needs no labels; "sampled": its estimate
            from `draws` classes for each input, drawn from :math:`p_\theta`, for many classes; or "given": the labels
            of the data, which makes the *empirical* Fisher matrix. That is another matrix, and the smaller the better
            the model fits the labels.
        draws: classes drawn for each input.
        seed: for "sampled", an int or a ``torch.Generator``.
        loss: for "given", of the logits and targets of a batch of one sample, one number.
        state: parameters and buffers in place of the model's own, such as ``vector.apply_to(base)``.

    Returns:
        Name -> information in the shape of the parameter, at least 0, in float32 (float64 for parameters that are), for
        all floating-point parameters, tied and frozen ones included.

    Raises:
        InputError: an option that is none, "sampled" without a seed, no batches, no samples, no floating-point
        parameters. NonFiniteError: a gradient or logit that is not finite. ShapeError: logits that are not (B, K), or
        tensors of a batch with different numbers of samples. StateMismatchError: `state` does not fit the model.

    Source: Matena and Raffel, "Merging models with Fisher-weighted averaging", 2022, section 3; Kunstner, Hennig and
    Balles, "Limitations of the empirical Fisher approximation for natural gradient descent", 2019, for what "given" is
    not.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 2, bias=False)
        >>> _ = torch.nn.init.zeros_(model.weight)  # both classes are as likely
        >>> fisher_information(model, [torch.tensor([[2.0]])])["weight"]  # (2 * 0.5)^2
        tensor([[1.],
                [1.]])
    """
    check_model(model)
    if labels not in get_args(Labels):
        raise InputError(f"labels: expected one of {', '.join(map(repr, get_args(Labels)))}, got {labels!r}")
    if not callable(loss):
        raise TypeError(f"loss: expected a function (logits, targets) -> number, got {type(loss).__name__}")
    count = whole_number(draws, "draws", at_least=1)
    if labels == "sampled" and seed is None:
        raise InputError('seed: labels="sampled" needs one')
    number = seed_number(seed) if labels == "sampled" and seed is not None else 0
    named = as_tasks(tasks, "tasks")
    parameters, rest = parameters_of(model, state)
    gradients = SampleGradients(model, parameters, _LOSSES.get(labels, loss), rest)
    found: dict[str, Tensor] = {}
    with mode(False, model, *(task.head for task in named.values())):
        for name, task in named.items():
            argument = f"tasks[{name!r}]" if name else "tasks"
            classes: _Classes | None = None
            if labels != "given":
                classes = _Classes(gradients, task, argument, count if labels == "sampled" else 0, number, name)
            sums, rows = summed_over_samples(gradients, task, torch.square, argument, batches=classes)
            samples = classes.samples if classes is not None and labels == "expected" else rows
            for key, total in sums.items():
                total /= samples * len(named)
                found[key] = found[key].add_(total) if key in found else total
    return under_all_names(model, found)


def _expected(logits: Any, target: Tensor) -> Tensor:
    """Whose squared gradients, summed over the classes, are the expectation."""
    log_p = log_softmax(logits, -1).gather(-1, target.unsqueeze(-1))
    return (log_p.detach() / 2).exp() * log_p


def _sampled(logits: Any, target: Tensor) -> Tensor:
    return cross_entropy(logits, target)


# these are not to be checked again: what looks at values cannot be vectorised
_LOSSES: dict[str, Loss] = {"expected": _expected, "sampled": _sampled}


class _Classes:
    """For every batch of inputs: it with class 0 for all, with class 1, ...; or with classes drawn for each input.

    Attributes:
        samples: inputs so far.
    """

    def __init__(self, gradients: SampleGradients, task: Task, argument: str, draws: int, seed: int, name: str) -> None:
        self.gradients, self.task, self.argument, self.samples = gradients, task, argument, 0
        self.draws, self.seed, self.name = draws, seed, name

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        device = device_of(self.gradients.model)
        for index, inputs in enumerate(inputs_of(self.task.batches, self.argument, device)):
            with torch.no_grad():
                logits = logit_matrix(self.gradients.logits(self.task.head, inputs), self.argument)
            self.samples += len(logits)
            if not self.draws:
                for label in range(logits.shape[1]):
                    yield inputs, torch.full((len(logits),), label, device=logits.device)
                continue
            below = logits.double().softmax(-1).cumsum(-1).cpu()
            source = generator(self.seed, "fisher_information", self.name, index)
            for _ in range(self.draws):
                drawn = torch.rand(len(logits), 1, dtype=torch.float64, generator=source)
                label_of_each = (drawn > below).sum(-1).clamp_max(logits.shape[1] - 1)
                yield inputs, label_of_each.to(logits.device)
