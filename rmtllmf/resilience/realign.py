"""Train a fused model on a few samples of every task, with some of its parameters frozen."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.functional import cross_entropy

from .._state import StateLike
from .._tasks import Tasks
from ._anchor import AnchorWeight
from ._plan import Loss as Loss
from ._plan import MakeOptimizer as MakeOptimizer
from ._plan import Plan as Plan
from ._plan import Realignment
from ._plan import prepare as prepare

__all__ = ["Realignment", "realign"]


def realign(
    model: nn.Module,
    tasks_or_batches: Tasks,
    *,
    steps: int = 100,
    frozen: str | Iterable[str] = (),
    trainable: str | Iterable[str] | None = None,
    loss: Loss = cross_entropy,
    lr: float | None = None,
    weight_decay: float | None = None,
    warmup: float | None = None,
    schedule_steps: int | None = None,
    anchor: StateLike | None = None,
    anchor_weight: AnchorWeight = 1.0,
    validation: Tasks | None = None,
    validate_every: int = 1,
    patience: int | None = None,
    optimizer: MakeOptimizer | None = None,
    progress: bool = False,
) -> Realignment:
    r"""Minimise the mean loss of all tasks over the parameters that are not frozen, in place.

    .. math:: \min_{\theta_j,\ j \notin \mathcal{E}} \frac{1}{N} \sum_{i=1}^N
              E_{(x, y) \sim \mathcal{S}_i}\, \ell\bigl(h_i(f(x; \theta)), y\bigr)
              + \frac{1}{2} \sum_j w_j \lVert \theta_j - \theta^{\text{anchor}}_j \rVert^2

    where the last sum is there with an `anchor` only.

    Every step takes the next batch of every task, so small tasks come round more often. Tasks go backward one by one,
    so memory is that of the largest. The model is in training mode meanwhile (but for modules with frozen statistics,
    and parts that were in evaluation mode when the whole was in training mode), the heads in evaluation mode;
    `requires_grad`, `grad` and the mode of every sub-module are left as they were found, after an exception too.
    Only what the model and the DataLoader draw themselves (dropout, shuffling) is random.

    Args:
        model: one encoder for all tasks, or a complete model.
        tasks_or_batches: name -> (head, batches), with logits ``head(model(inputs))``; or the batches of a complete
            model. Batches are (inputs, targets), in anything that can be gone through again: a DataLoader, a list.
            Inputs that are a tuple or a mapping become positional or keyword arguments. A batch that is a mapping with
            the key "labels", as Hugging Face's collators make them, is (the rest of it, its labels).
        steps: number of steps, at least 0.
        frozen: names or glob patterns of parameters and buffers that must keep their values; wins over `trainable`.
            A tied parameter is meant under any of its names.
        trainable: names or glob patterns of the parameters to train; None: those with `requires_grad`.
        loss: of logits and targets, a scalar. The default takes class indices, one a sample; to train a language model
            on all tokens pass one that shifts by one, such as ``lambda logits, labels: cross_entropy(logits[:,
            :-1].flatten(0, 1), labels[:, 1:].flatten())``.
        lr: peak step size of AdamW; None: 1e-4.
        weight_decay: of AdamW; None: 0, since decay would pull away from the base model.
        warmup: share of the steps with linearly rising step size, followed by a cosine to 0; None: 0.1.
        schedule_steps: number of steps that the schedule of the step size is made for, at least `steps`; None: `steps`.
            So the first 30 of 100 steps can be taken as `steps_by_cross_validation` took them.
        anchor: what the trained parameters are pulled to: a module, a state dict or the path of a checkpoint, of
            which only trained parameters with a weight are read, or "start": where the model stands when the first
            step is taken. None: no pull.
        anchor_weight: :math:`w`, at least 0: a number, or a mapping of name or glob pattern -> a number, or a tensor
            that broadcasts to the parameter; the first pattern that matches counts, and a parameter that none matches
            is free, as with weight 0. The precision of the anchor: where its error has variance v and the loss is the
            mean over n samples of a negative log-likelihood, ``1 / (n v)`` makes the sum the posterior's; with many
            more parameters than samples that is so stiff that hardly anything is learnt, and less is better. With
            AdamW (also Adam and SGD as `optimizer`) the pull is a proximal step after every step,
            :math:`\theta \leftarrow (D \theta + \eta w \theta^{\text{anchor}}) / (D + \eta w)`, in the metric D of
            the optimizer: the root of the second moment for AdamW, 1 for SGD. It is stable for any weight, and comes
            to rest in the minimum of the sum above. Any other optimizer gets the penalty's gradient, and must have
            a step size that is small enough for it.
        validation: tasks and batches as in `tasks_or_batches`, held-out samples. The mean loss on them, in evaluation
            mode, is evaluated before the first step, after every `validate_every` steps and after the last; the
            trained parameters and the buffers are left as they were at the smallest. A list is best: a DataLoader may
            draw from torch's generator whenever it is gone through. None: left as after the last step.
        validate_every: steps from one evaluation to the next.
        patience: number of successive evaluations without a new smallest validation loss after which no more steps
            are taken; None: all are.
        optimizer: parameters -> a ``torch.optim.Optimizer`` that replaces AdamW and the schedule (and so excludes
            `lr`, `weight_decay`, `warmup` and `schedule_steps`).
        progress: show a bar.

    Returns:
        A `Realignment`.

    Raises:
        InputError: a pattern that matches nothing, nothing left to train, a task without batches or with an iterator
            that is used up, half-precision parameters without an `optimizer`, `steps` or `lr` out of range, a label
            that is no class of the logits'.
        NonFiniteError: a loss or a gradient that is not finite, before the step is taken, or a parameter that is not
            after the last.
        ShapeError: the loss is not one number, targets do not fit the logits, or a weight of the anchor does not
            broadcast to its parameter.
        StateMismatchError: `anchor` lacks a trained parameter, or has another shape or dtype.

    Source: R-MTLLMF, section III, step "realignment" (few-shot fine-tuning with frozen embeddings); the anchor: Li,
    Grandvalet and Davoine, "Explicit inductive bias for transfer learning with convolutional networks", 2018 (L2-SP),
    with weights for each parameter as Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks",
    2017, eq. 3; the proximal step in the metric of the optimizer: Yun, Lozano and Yang, "Adaptive proximal gradient
    methods for structured neural networks", 2021.

    Example:
        >>> import torch
        >>> model, head = torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)
        >>> batches = [(torch.eye(4), torch.tensor([0, 0, 1, 1]))]
        >>> done = realign(model, {"parity": (head, batches)}, steps=30, lr=0.1, frozen="bias")
        >>> done.trained, done.losses[-1] < done.losses[0]
        (('weight',), True)
    """
    plan = prepare(
        model,
        tasks_or_batches,
        steps=steps,
        frozen=frozen,
        trainable=trainable,
        loss=loss,
        lr=lr,
        weight_decay=weight_decay,
        warmup=warmup,
        optimizer=optimizer,
        progress=progress,
        schedule_steps=schedule_steps,
        anchor=anchor,
        anchor_weight=anchor_weight,
        validation=validation,
        validate_every=validate_every,
        patience=patience,
    )
    return plan.run()
