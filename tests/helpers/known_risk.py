"""Receptions and vectors for which the risk of a weighted sum is known exactly."""

import numpy as np
import torch

from rmtllmf.channel import Reception


def reception_of(E, gain=None):
    """A reception with these error covariances, or with these gains and noise covariances."""
    E = np.asarray(E, dtype=complex)
    mse = np.diagonal(E, axis1=-2, axis2=-1).real
    g = np.ones_like(mse) if gain is None else np.broadcast_to(gain, mse.shape)
    return Reception(mse, 1 / mse, np.log1p(1 / mse), g, None, E, E)


def covariance(users, seed, floor=0.05):
    rng = np.random.default_rng(seed)
    A = rng.normal(size=(users, users)) + 1j * rng.normal(size=(users, users))
    return A @ A.conj().T / users + floor * np.eye(users)


def vectors(users, size, seed, common=0.5, norms=None):
    """Vectors that share a part, of given rms, in two tensors."""
    rng = np.random.default_rng(seed)
    X = common * rng.normal(size=size) + rng.normal(size=(users, size))
    X *= (np.ones(users) if norms is None else np.asarray(norms))[:, None] / np.sqrt((X**2).mean(1, keepdims=True))
    X = torch.from_numpy(X)
    return [{"b": x[: size // 3].clone(), "a": x[size // 3 :].reshape(1, -1).clone()} for x in X]


def stacked(mappings):
    """(Q, n) in the order on the air."""
    return np.stack([np.concatenate([m[key].numpy().ravel() for key in sorted(m)]) for m in mappings])


def true_risk(a, t, sent, V, gain=None):
    """E|sum a xhat - sum t tau|^2 for fixed vectors, noise of variance `V` summed over the coefficients."""
    X = stacked(sent)
    g = np.ones(len(X)) if gain is None else gain
    return ((np.asarray(a) * g - t) @ X) @ ((np.asarray(a) * g - t) @ X) + a @ V @ a


def noise_of(E, sent):
    X = stacked(sent)
    rms = np.sqrt((X**2).mean(1))
    return X.shape[1] * np.asarray(E).real * np.outer(rms, rms)
