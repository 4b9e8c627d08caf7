"""Receptions whose errors have a covariance that is known, and the error of what comes back."""

from __future__ import annotations

import numpy as np
import torch

from rmtllmf.channel import Reception


def correlated(covariance, gain=None):
    """A Reception of errors of this covariance, (Q, Q) or (blocks, Q, Q), behind gains of 1 unless told."""
    E = torch.as_tensor(covariance).to(torch.complex128)
    mse = E.diagonal(dim1=-2, dim2=-1).real
    gain = torch.ones_like(mse) if gain is None else torch.as_tensor(gain)
    return Reception(mse, None, None, gain, None, E, E)


def error(found, sent):
    """The sum of squares over all users and tensors."""
    return sum(float((a[key] - b[key]).double().square().sum()) for a, b in zip(found, sent, strict=True) for key in b)


def random_psd(users, rank, seed, level=1.0):
    draw = np.random.default_rng(seed)
    A = draw.standard_normal((users, rank)) + 1j * draw.standard_normal((users, rank))
    return torch.from_numpy(level * A @ A.conj().T / (2 * rank))
