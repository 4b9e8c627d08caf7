"""Realign a model by low-rank updates of its matrices, which are then merged into them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from typing_extensions import Unpack

from .._random import Seed, generator, seed_number
from .._state import quoted, whole_number, wide
from .._tasks import Tasks
from ..errors import InputError, NonFiniteError
from ._plan import Realignment, TrainingOptions, check_keywords, choose, prepare

__all__ = ["realign_lora"]


def realign_lora(
    model: nn.Module,
    tasks_or_batches: Tasks,
    *,
    seed: Seed,
    rank: int = 4,
    steps: int = 100,
    frozen: str | Iterable[str] = (),
    trainable: str | Iterable[str] | None = None,
    validation: Tasks | None = None,
    validate_every: int = 1,
    patience: int | None = None,
    **options: Unpack[TrainingOptions],
) -> Realignment:
    r"""Minimise the mean loss of all tasks over low-rank updates of matrices, and add these to them, in place.

    .. math:: \min_{B_j, A_j} \frac{1}{N} \sum_{i=1}^N E_{(x, y) \sim \mathcal{S}_i}\,
              \ell\bigl(h_i(f(x; \dots, W_j + B_j A_j, \dots)), y\bigr), \qquad
              B_j \in \mathbb{R}^{m \times r},\ A_j \in \mathbb{R}^{r \times n}

    It starts at the model itself, with B = 0 and the entries of A uniform in :math:`\pm 1/\sqrt{n}`, as PEFT does for
    linear layers (with ``lora_alpha`` equal to the rank). What changes in a matrix has a rank of at most `rank`, up to
    one rounding of every sum; everything else that is a parameter keeps its bits. Any parameter with two dimensions can
    be adapted, also the ``in_proj_weight`` of ``torch.nn.MultiheadAttention``. The factors are float32 at least, so
    that a model in half precision can be realigned. A step needs memory for the sums ``W + B A``, and no optimizer
    state but that of the factors.

    Args:
        model: one encoder for all tasks, or a complete model. Heads that share a matrix with it see the old one
            until the end.
        tasks_or_batches: as for `realign`.
        seed: of A: an int or a ``torch.Generator``.
        rank: r, at least 1; a matrix with a side shorter than that gets as many as its side.
        steps: number of steps, at least 0.
        frozen: names or glob patterns of parameters and buffers that must keep their values; wins over `trainable`.
        trainable: names or glob patterns, of which the matrices are adapted (such as `attention_keys`); None: every
            matrix with `requires_grad`, embeddings among them.
        validation, validate_every, patience: as for `realign`.
        options: loss, lr, weight_decay, warmup, schedule_steps, optimizer and progress, as for `realign`; of the
            factors, which usually take a ten times larger `lr` than the matrices themselves.

    Returns:
        A `Realignment`; `trained` has the names of the matrices.

    Raises:
        InputError: no matrix to adapt, `rank` below 1, or an argument that `realign` refuses.
        NonFiniteError: a loss, a gradient or a result that is not finite; the parameters are then what they were.

    Source: Hu et al., "LoRA: low-rank adaptation of large language models", 2022, section 4.1.

    Example:
        >>> import torch
        >>> model, head = torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)
        >>> before = model.weight.detach().clone()
        >>> batches = [(torch.eye(4), torch.tensor([0, 0, 1, 1]))]
        >>> done = realign_lora(model, {"parity": (head, batches)}, rank=1, steps=30, lr=0.1, seed=0)
        >>> done.trained, int(torch.linalg.matrix_rank(model.weight - before, rtol=1e-4))
        (('weight',), 1)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    rank = whole_number(rank, "rank", at_least=1)
    steps = whole_number(steps, "steps", at_least=0)
    check_keywords(options, TrainingOptions)
    candidates, buffers = choose(model, frozen, trainable, needed=steps > 0)
    matrices = {name: parameter for name, parameter in candidates.items() if parameter.ndim == 2 and parameter.numel()}
    if not matrices and steps:
        raise InputError(f"trainable: expected at least one matrix to adapt, got {quoted(candidates)}")
    adapted = _Adapted(model, matrices, rank, seed_number(seed))
    plan = prepare(
        adapted,
        tasks_or_batches,
        steps=steps,
        trainable=[name for name, _ in adapted.named_parameters() if not name.startswith("model.")],
        validation=validation,
        validate_every=validate_every,
        patience=patience,
        **options,
    )
    done = replace(plan, kept_buffers=buffers).run()
    if steps:
        adapted.merge()
    return replace(done, trained=tuple(matrices))


class _Adapted(nn.Module):
    """A model that calculates with ``W + B A``, while its own parameters stay what they are."""

    def __init__(self, model: nn.Module, matrices: Mapping[str, nn.Parameter], rank: int, seed: int) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self._matrices = dict(matrices)
        self.down, self.up = nn.ParameterList(), nn.ParameterList()
        for name, matrix in matrices.items():
            rows, columns = matrix.shape
            dtype, device = wide(matrix.detach()).dtype, matrix.device
            draws = torch.rand(min(rank, rows, columns), columns, generator=generator(seed, "realign_lora", name))
            self.down.append(nn.Parameter((2 * draws - 1).div_(math.sqrt(columns)).to(device, dtype)))
            self.up.append(nn.Parameter(torch.zeros(rows, len(draws), dtype=dtype, device=device)))

    def updated(self, place: int) -> Tensor:
        """The matrix with its update, rounded once: what is trained is what is merged, to the bit."""
        matrix = list(self._matrices.values())[place].detach()
        return torch.addmm(wide(matrix), self.up[place], self.down[place]).to(matrix.dtype)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Of the model; ties hold, for a tied parameter is replaced under all of its names."""
        current = {name: self.updated(place) for place, name in enumerate(self._matrices)}
        return functional_call(self.model, current, inputs, named)

    @torch.no_grad()
    def merge(self) -> None:
        """Write the sums into the matrices; all of them or, where one is not finite, none."""
        for place, name in enumerate(self._matrices):
            if not bool(self.updated(place).isfinite().all()):
                raise NonFiniteError(f"the updated {name!r} is not finite; try a smaller lr")
        for place, matrix in enumerate(self._matrices.values()):
            matrix.copy_(self.updated(place))
