"""Rules about subspaces as their papers define them, with whole SVDs; of (N, ...) stacked tensors."""

import torch

from helpers.spectral_definitions import polar


def iso_cts(x, common=0.8):
    if x.ndim != 3 or not x.numel():
        return x.mean(0)
    count, r = len(x), min(x.shape[1:])
    own = min(round((r - int(r * common)) / count), r // count)
    k = r - count * own
    U, s, Vh = torch.linalg.svd(x.sum(0), full_matrices=False)
    Us, ss, Vhs = [U[:, :k]], [s[:k]], [Vh[:k]]
    for task in x:
        u, t, vh = torch.linalg.svd(task - U[:, :k] @ U[:, :k].mT @ task, full_matrices=False)
        Us, ss, Vhs = [*Us, u[:, :own]], [*ss, t[:own]], [*Vhs, vh[:own]]
    return torch.cat(ss).mean() * polar(torch.cat(Us, 1)) @ polar(torch.cat(Vhs, 0))


def wudi_loss(X, x):
    """Interference with each task, of those that have a matrix at all."""
    return sum((((X - task) @ task.mT) ** 2).sum() / (task**2).sum() for task in x if task.any())


def wudi(x):
    """By least squares: ``X W^T = S`` for all tasks' rows W."""
    if x.ndim != 3 or not x.numel():
        return x.mean(0)
    told = [task for task in x if task.any()]
    if not told:
        return torch.zeros_like(x[0])
    W = torch.cat([task / task.norm() for task in told])
    S = torch.cat([task @ task.mT / task.norm() for task in told], 1)
    return S @ torch.linalg.pinv(W, rtol=1e-7).mT


def wudi_by_steps(x, steps, step_size):
    if x.ndim != 3 or not x.numel():
        return x.mean(0)
    X = torch.nn.Parameter(x.sum(0))
    optimizer = torch.optim.Adam([X], lr=step_size)
    for _ in range(steps if x.any() else 0):
        optimizer.zero_grad()
        wudi_loss(X, x).backward()
        optimizer.step()
    return X.detach()


def opcm(vectors, alpha=0.5):
    """Of whole vectors, one after the other."""
    total = dict(vectors[0])
    for vector in vectors[1:]:
        for key, part in vector.items():
            if part.ndim == 2 and part.numel():
                U, s, Vh = torch.linalg.svd(total[key])
                here = s > 1e-6 * s.sum()
                known = int((s.cumsum(0) / s.sum() <= alpha).sum())
                inner = U.mT @ part @ Vh.mT
                inner.diagonal()[: len(s)][here] = 0
                inner[:known, :known] = 0
                part = U @ inner @ Vh
            total[key] = total[key] + part

    def norm(vector):
        return sum((tensor**2).sum() for tensor in vector.values()).sqrt()

    mean = sum(norm(vector) for vector in vectors) / len(vectors)
    return {key: tensor * mean / norm(total) if mean else tensor for key, tensor in total.items()}


def doge(vectors, scale=0.07, density=1.0, subspace=6, steps=400, step_size=1e-4):
    """As the paper says, by automatic differentiation; trimming over all matrices together."""
    keys = sorted(key for key, tensor in vectors[0].items() if tensor.ndim == 2 and tensor.numel())
    result = {key: torch.zeros_like(tensor) for key, tensor in vectors[0].items()}
    limits = []
    for vector in vectors:
        size = torch.cat([vector[key].abs().flatten() for key in keys]).sort(descending=True).values
        limits.append(size[max(1, int(density * len(size))) - 1])
    for key in keys:
        x = torch.stack([vector[key] for vector in vectors])
        norms = x.flatten(1).norm(dim=1)
        factors = torch.where(norms > 0, scale / norms, 0.0)
        r = min(x.shape[1:])
        own = [torch.linalg.svd(task, full_matrices=False).U[:, : r // len(x)] for task in x]
        shared = torch.linalg.svd(torch.cat(own, 1), full_matrices=False).U[:, : r // subspace]
        delta = torch.nn.Parameter(torch.zeros_like(x[0]))
        optimizer = torch.optim.Adam([delta], lr=step_size)
        for _ in range(steps if x.any() else 0):
            optimizer.zero_grad()
            merged = (factors[:, None, None] * (x + delta)).sum(0)
            sum(((task * (task - merged)).sum(1) ** 2).sum() for task in x).backward()
            delta.grad -= shared @ shared.mT @ delta.grad
            optimizer.step()
        for task, factor, limit in zip(x, factors, limits, strict=True):
            kept = (task.abs() >= limit) & (task != 0) if density < 1 else torch.ones_like(task)
            result[key] += factor * kept * (task + delta.detach())
    return result


def essential(x, inputs, power=2.0, weighting=0.0):
    """One layer as the authors' program has it: principal directions from inputs (samples, n) of every task."""
    k = max(1, x.shape[1] // len(x))
    bases, coordinates = [], []
    for task, X in zip(x, inputs, strict=True):
        _, s, Vh = torch.linalg.svd(X @ task.mT, full_matrices=False)
        here = s > 1e-7 * s[:1]
        values, E = (s[here] ** 2)[:k], Vh[here][:k].mT
        C = E.mT @ task
        if weighting and len(values):
            weights = (values / values.mean()) ** weighting
            weights = weights / weights.mean()
            E, C = E * weights, C * weights[:, None]
        bases.append(E)
        coordinates.append(C)
    mean = sum(C.norm() for C in coordinates) / len(x)
    if not mean:
        return torch.zeros_like(x[0])
    E, C = torch.cat(bases, 1), torch.cat([C * (C.norm() / mean) ** power for C in coordinates])
    columns = C.norm(dim=0)
    C = C * (columns / columns.mean()) ** power

    def whitened(X):
        U, s, Vh = torch.linalg.svd(X, full_matrices=False)
        return s.mean() * (U * (s > 1e-7 * s[0])) @ Vh

    return whitened(E) @ whitened(C)


def decoupled(x):
    """DO-Merging without the moving apart."""
    if x.ndim != 3 or not x.numel() or len(x) == 1:
        return x.mean(0)
    lengths = x.norm(dim=1, keepdim=True)
    return lengths.mean(0) * (x / lengths.where(lengths > 0, 1.0)).mean(0)


def overlap(factors):
    """Of stacked factors (N, r, n): the sum over all pairs of two tasks."""
    return sum(((p @ q.mT) ** 2).sum() for i, p in enumerate(factors) for j, q in enumerate(factors) if i != j)


def moved_apart(factors, stay, steps):
    """(N, r, n): by automatic differentiation, for factors that are over their joint spectral norm."""
    size = torch.linalg.matrix_norm(factors.flatten(0, 1), 2)
    start = factors / size
    moving = start.clone()
    for _ in range(steps):
        leaf = moving.clone().requires_grad_()
        (overlap(leaf) + stay * ((leaf - start) ** 2).sum()).backward()
        moving = moving - leaf.grad / (12 + 2 * stay)
    return size * moving
