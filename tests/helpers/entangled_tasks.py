"""A small image tower, a task vector for each of several tasks, and heads and batches of these tasks."""

from __future__ import annotations

import torch
from open_clip.transformer import VisionTransformer
from torch import nn

from helpers.draws import gaussian, seeded


def entangled(classes, sizes):
    """A model, its state, and vectors and tasks with so many classes, whose vectors' entries are of these sizes."""

    def made():
        model = VisionTransformer(image_size=8, patch_size=4, width=16, layers=1, heads=2, mlp_ratio=2, output_dim=6)
        return model, [nn.Linear(6, count) for count in classes]

    model, heads = seeded(made)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    vectors = [
        {name: size * gaussian(*tensor.shape, seed=31 * k + len(name)) for name, tensor in base.items()}
        for k, size in enumerate(sizes)
    ]
    tasks = {
        name: (head, [(gaussian(count, 3, 8, 8, seed=9 * k + count), torch.zeros(count)) for count in (20, 7)])
        for k, (name, head) in enumerate(zip("abc"[: len(heads)], heads, strict=True))
    }
    return model, base, vectors, tasks
