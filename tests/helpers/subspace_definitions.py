"""Rules about subspaces as their papers define them, with singular value decompositions; of (N, ...) stacked tensors."""

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
