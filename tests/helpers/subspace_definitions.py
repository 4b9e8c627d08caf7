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
