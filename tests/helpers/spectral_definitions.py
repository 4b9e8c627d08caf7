"""Iso-C and TSV-Merge as their papers define them, with singular value decompositions; of (N, ...) stacked tensors."""

import torch


def polar(X):
    U, _, Vh = torch.linalg.svd(X, full_matrices=False)
    return U @ Vh


def iso_c(x):
    if x.ndim != 3 or not x.numel():
        return x.mean(0)
    total = x.sum(0)
    return torch.linalg.svdvals(total).mean() * polar(total)


def tsv(x):
    r = min(x.shape[1:]) // len(x) if x.ndim == 3 else 0
    if not r:
        return x.mean(0)
    U, s, Vh = torch.linalg.svd(x, full_matrices=False)
    joined_U, joined_Vh = torch.cat(list(U[:, :, :r]), 1), torch.cat(list(Vh[:, :r]), 0)
    return polar(joined_U) @ torch.diag(s[:, :r].reshape(-1)) @ polar(joined_Vh)
