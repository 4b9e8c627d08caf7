"""Rules that are given statistics beside the vectors, as their sources define them; and statistics made of vectors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rmtllmf._sharded import full

Vectors = list[dict[str, Tensor]]


def plain(tensor: Tensor) -> Tensor:
    return full(tensor).double().nan_to_num()


def sizes(vectors) -> Vectors:
    """Statistics that scale with the vectors: magnitudes."""
    return [{key: plain(vector[key]).abs() for key in vector} for vector in vectors]


def others(vectors) -> Vectors:
    """And other ones."""
    return [{k: t.flatten().roll(1).view(t.shape) + t for k, t in scores.items()} for scores in sizes(vectors)]


def with_scores(rule, **options):
    """A rule of vectors only, from `led_merging` or what has its arguments."""
    return lambda vectors, **more: rule(vectors, sizes(list(vectors)), others(list(vectors)), 0.5, **options, **more)


def top(scores: Tensor, ratio: float) -> Tensor:
    """True for the largest scores, the first of equal ones, but never for 0."""
    flat = scores.flatten()
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[(-flat).sort(stable=True).indices[: max(1, math.floor(ratio * len(flat) + 1e-9))]] = True
    return (mask if ratio == 1 else mask & (flat > 0)).view(scores.shape)


def led_masks(base: Vectors, finetuned: Vectors, ratios, *, neurons: bool = False) -> Vectors:
    elected = []
    for b, f, ratio in zip(base, finetuned, ratios, strict=True):
        found = {}
        for key in b:
            if not b[key].numel():
                found[key] = torch.zeros(b[key].shape, dtype=torch.bool)
            elif neurons and b[key].ndim > 1:
                rows = top(b[key].flatten(1).sum(1), ratio) & top(f[key].flatten(1).sum(1), ratio)
                found[key] = torch.stack([torch.full(b[key].shape[1:], bool(row)) for row in rows])
            else:
                found[key] = top(b[key], ratio) & top(f[key], ratio)
        elected.append(found)
    alone = []
    for task, masks in enumerate(elected):
        rest = [other for index, other in enumerate(elected) if index != task]
        alone.append(
            {key: mask & ~sum((other[key] for other in rest), torch.zeros(())).bool() for key, mask in masks.items()}
        )
    return alone


def led_merging(vectors: Vectors, base: Vectors, finetuned: Vectors, ratios, *, neurons: bool = False):
    masks = led_masks(base, finetuned, ratios, neurons=neurons)
    return {key: sum(v[key] * m[key] for v, m in zip(vectors, masks, strict=True)) for key in vectors[0]}


def led_of_sizes(vectors: Vectors, *, neurons: bool = False):
    """`led_merging` of what `with_scores` gives it."""
    return led_merging(vectors, sizes(vectors), others(vectors), [0.5] * len(vectors), neurons=neurons)


def with_information(rule, **options):
    """A rule of vectors only, from `fisher`."""
    return lambda vectors, **more: rule(vectors, others(list(vectors)), **options, **more)


def fisher(vectors: Vectors, information: Vectors, weights=None, *, normalize=True, floor=1e-6):
    weights = weights or [1.0] * len(vectors)
    flat = [torch.cat([each[key].flatten() for key in vectors[0]]) for each in information]
    scales = [1 / f.norm() if normalize and f.any() else torch.ones(()).double() for f in flat]
    unit = torch.cat([c * f for c, f in zip(scales, flat, strict=True)]).square().mean().sqrt()
    fused = {}
    for key in vectors[0]:
        needed = [
            w * (c * f[key] / unit if unit else 0 * f[key]).clamp_min(floor)
            for w, c, f in zip(weights, scales, information, strict=True)
        ]
        fused[key] = sum(n * v[key] for n, v in zip(needed, vectors, strict=True)) / sum(needed)
    return fused


def fisher_of_sizes(vectors: Vectors):
    """`fisher` of what `with_information` gives it."""
    return fisher(vectors, others(vectors))


def grams(vectors) -> Vectors:
    """Gram matrices that scale with the vectors, for all that has rows."""
    return [
        {key: t.flatten(1).mT @ t.flatten(1) / max(1, len(t)) for key, t in each.items() if t.ndim > 1}
        for each in others(vectors)
    ]


def with_grams(rule, **options):
    """A rule of vectors only, from `regmean`."""
    return lambda vectors, **more: rule(vectors, grams(list(vectors)), **options, **more)


def regmean(vectors: Vectors, given: Vectors, alpha: float = 0.9, weights=None):
    """With a pseudo-inverse around the average, and the average for what has no Gram matrices."""
    weights = weights or [1.0] * len(vectors)
    fused = {}
    for key in vectors[0]:
        mean = sum(w * v[key] for w, v in zip(weights, vectors, strict=True)) / sum(weights)
        fused[key] = mean
        if key in given[0] and mean.numel():
            own = [g[key] for g in given]
            scaled = [w * (alpha * g + (1 - alpha) * g.diag().diag()) for w, g in zip(weights, own, strict=True)]
            moments = sum((v[key] - mean).flatten(1) @ g for v, g in zip(vectors, scaled, strict=True))
            fused[key] = mean + (moments @ torch.linalg.pinv(sum(scaled), hermitian=True)).view(mean.shape)
    return fused


def regmean_of_grams(vectors: Vectors):
    """`regmean` of what `with_grams` gives it."""
    return regmean(vectors, grams(vectors))
