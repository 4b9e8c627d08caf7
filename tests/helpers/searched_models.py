"""A quadratic loss whose best scale is known, and the model that it is a loss of."""

import torch
from torch import nn

from helpers.draws import double


def linear(dtype=torch.float64):
    return nn.Linear(4, 3, bias=False).to(dtype)


def quadratic(seed, target_scale):
    """A base, an update, and two tasks of unequal sizes whose squared loss is least near a scale; and that scale."""
    base, update = {"weight": double(3, 4, seed=seed)}, {"weight": double(3, 4, seed=seed + 1)}
    truth = base["weight"] + target_scale * update["weight"]
    tasks, normal, right = {}, 0.0, 0.0
    for index, sizes in enumerate([(5, 2), (6,)]):
        head = double(3, 2, seed=seed + 2 + index)
        batches = []
        for number, size in enumerate(sizes):
            x = double(size, 4, seed=seed + 10 * index + number)
            batches.append((x, x @ truth.T @ head + 0.3 * double(size, 2, seed=seed + 50 + index)))
        x, y = (torch.cat(part) for part in zip(*batches, strict=True))
        direction, missing = x @ update["weight"].T @ head, y - x @ base["weight"].T @ head
        normal += float((direction**2).mean()) / 2
        right += float((direction * missing).mean()) / 2
        tasks[f"t{index}"] = ((lambda features, head=head: features @ head), batches)
    return base, update, tasks, right / normal
