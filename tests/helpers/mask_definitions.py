"""Rules that decide entry by entry (or column by column) what is kept of each task, as their papers write them."""

from __future__ import annotations

from zlib import crc32

import torch
from torch import Tensor


def emr_unified(x: Tensor) -> Tensor:
    """Of (N, ...) tensors: the sign of the sum, and the largest magnitude among those of this sign."""
    sign = x.sum(0).sign()
    agree = (x.sign() == sign) & (sign != 0)
    return sign * (x.abs() * agree).amax(0)


def like(vectors, name: str) -> dict[str, Tensor]:
    """Normal numbers in the names and shapes of the vectors, the same ones wherever; "head" is tied to "l0.w"."""
    found = {}
    for key in vectors[0]:
        seed = crc32(f"{name} {'l0.w' if key == 'head' else key}".encode())
        found[key] = torch.randn(vectors[0][key].shape, generator=torch.Generator().manual_seed(seed))
    if "head" in found:
        found["head"] = found["l0.w"]
    return found


def base_of(vectors) -> dict[str, Tensor]:
    """A base model for the vectors."""
    return like(vectors, "base")


def curvature_of(vectors) -> list[dict[str, Tensor]]:
    """The same curvature for all tasks."""
    found = {key: tensor.square() + 0.01 for key, tensor in like(vectors, "curvature").items()}
    if "head" in found:
        found["head"] = found["l0.w"]
    return [found] * len(vectors)


def moments_of(vectors) -> list[dict[str, Tensor]]:
    """Moments of the inputs of matrices, and nothing for other tensors."""
    drawn = like(vectors, "moments").items()
    found = {key: tensor.square().sum(0) + 0.1 for key, tensor in drawn if tensor.ndim == 2}
    if "head" in found:
        found["head"] = found["l0.w"]
    return [found] * len(vectors)


def widen(vectors: list[dict[str, Tensor]], base=None, ratio=1.0, calibration=1.0) -> dict[str, Tensor]:
    """WIDEN, with the steps and the names of the paper: disentangle, rank, softmax, calibrate."""

    def scores(importance: Tensor, mean: Tensor) -> Tensor:
        score = torch.softmax(importance, 0)
        score[importance > ratio * mean] = calibration
        return score

    update, base = {}, base_of(vectors) if base is None else base
    for key in vectors[0]:
        delta = torch.stack([vector[key] for vector in vectors])
        if delta.ndim != 3:
            means = delta.abs().reshape(len(delta), -1).mean(1).view(-1, *[1] * (delta.ndim - 1))
            update[key] = (scores(delta.abs(), means) * delta).sum(0)
            continue
        before = base[key].double()
        magnitude, direction = [], []
        for after in before + delta:
            magnitude.append((after.norm(dim=0) - before.norm(dim=0)).abs())
            direction.append(1 - ((after / after.norm(dim=0)) * (before / before.norm(dim=0))).sum(0))
        weight = torch.zeros(len(delta), before.shape[1], dtype=torch.float64)
        for change in (magnitude, direction):
            rank = torch.stack([row.argsort(stable=True).argsort() for row in change]).double()
            weight += 0.5 * scores(rank / rank.shape[1], (rank.shape[1] - 1) / 2 / rank.shape[1])
        update[key] = (weight[:, None] * delta).sum(0)
    return update


def given(rule, beside, **fixed):
    """A rule of vectors only, from one that is given mappings too, ``beside(vectors)``; a rule of the package still."""

    def call(vectors, **options):
        return rule(vectors, beside(list(vectors)), **fixed, **options)

    call.__module__, call.__qualname__ = rule.__module__, rule.__qualname__
    return call


def grafted(vectors, curvature, density, *, by_tensor=False, combine="curvature"):
    """Fast Fisher grafting of each vector, and OTA's average by the roots of the curvature."""
    names = sorted(vectors[0])
    groups = [[key] for key in names] if by_tensor else [names]
    update = {}
    for group in groups:
        sizes = [vectors[0][key].numel() for key in group]
        rows, h = (
            torch.stack([torch.cat([state[key].double().reshape(-1) for key in group]) for state in states])
            for states in (vectors, curvature)
        )
        keep = torch.zeros(rows.shape, dtype=torch.bool)
        for row, saliency in zip(keep, h * rows.square(), strict=True):
            row[saliency.argsort(descending=True, stable=True)[: max(1, int(density * len(row) + 1e-9))]] = True
        if combine == "curvature":
            weight = keep * h.sqrt()
            merged = (weight * rows).sum(0) / weight.sum(0).where(weight.sum(0) > 0, 1.0)
        else:
            merged = (keep * rows).sum(0) / (len(rows) if combine == "mean" else 1)
        for key, part in zip(group, merged.split(sizes), strict=True):
            update[key] = part.view(vectors[0][key].shape)
    return update


def taken_in_turn(vectors, curvature, densities, *, by_model=False):
    """OBIM: each task's most salient entries among those that are left; curvature broadcasts, and is 1 if missing."""
    names = sorted(vectors[0])
    update = {key: torch.zeros_like(vectors[0][key], dtype=torch.float64) for key in names}
    for group in [names] if by_model else [[key] for key in names]:
        free = torch.ones(sum(vectors[0][key].numel() for key in group), dtype=torch.bool)
        merged = torch.zeros(len(free), dtype=torch.float64)
        for vector, h, density in zip(vectors, curvature, densities, strict=True):
            whole = torch.cat([vector[key].double().reshape(-1) for key in group])
            saliency = torch.cat(
                [(h.get(k, torch.ones(())).double() * vector[k].double() ** 2).reshape(-1) for k in group]
            )
            order = (saliency * free).argsort(descending=True, stable=True)
            first = order[: max(1, int(density * len(free) + 1e-9))]
            first = first[(saliency * free)[first] > 0]
            merged[first] = whole[first]
            free[first] = False
        for key, part in zip(group, merged.split([vectors[0][key].numel() for key in group]), strict=True):
            update[key] = part.view(vectors[0][key].shape)
    return update


def obim(vectors):
    """OBIM with these moments, a fifth for each task."""
    return taken_in_turn(vectors, moments_of(vectors), [0.2] * len(vectors))
