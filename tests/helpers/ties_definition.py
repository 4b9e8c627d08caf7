"""TIES and DARE's sum as their papers write them, on whole vectors."""

from __future__ import annotations

import torch

Vectors = list[dict[str, torch.Tensor]]


def merged(vectors: Vectors, density: float, *, by_tensor: bool = False, mean: bool = True) -> dict[str, torch.Tensor]:
    """Trim, elect by mass, and merge what agrees."""
    groups = [[key] for key in sorted(vectors[0])] if by_tensor else [sorted(vectors[0])]
    update = {}
    for group in groups:
        rows = torch.stack([torch.cat([vector[key].reshape(-1) for key in group]) for vector in vectors])
        if rows.numel():
            kept = max(1, int(density * rows.shape[1] + 1e-9))
            for row in rows:
                row[row.abs().argsort(descending=True, stable=True)[kept:]] = 0
        sign = rows.sum(0).sign()
        agree = (rows.sign() == sign) & (sign != 0)
        total = (rows * agree).sum(0) / (agree.sum(0).clamp(min=1) if mean else 1)
        sizes = [vectors[0][key].numel() for key in group]
        for key, part in zip(group, total.split(sizes), strict=True):
            update[key] = part.view(vectors[0][key].shape)
    return update
