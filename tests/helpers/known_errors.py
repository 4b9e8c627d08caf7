"""Receptions whose errors have a covariance that is known, and the error of what comes back."""

from __future__ import annotations

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
