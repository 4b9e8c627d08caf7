"""Transmitted vectors as one row of numbers, and what their scale and their errors should be."""

import numpy as np
import torch

USERS = 3


def flat(vector):
    return torch.cat([vector[key].reshape(-1) for key in sorted(vector)]).double()


def noise_covariance(rx, estimator):
    if estimator == "additive":
        return rx.error_covariance
    if estimator == "mmse":
        return rx.noise_covariance
    return rx.noise_covariance / np.outer(rx.gain, rx.gain)


def reference_scale(vector, scale):
    whole = flat(vector)
    if scale == "rms":
        return whole.square().mean().sqrt().expand_as(whole)
    if scale == "peak":
        return whole.abs().max().expand_as(whole)
    if isinstance(scale, float):
        return torch.full_like(whole, scale)
    measure = (
        (lambda t: t.double().square().mean().sqrt()) if scale == "tensor_rms" else (lambda t: t.double().abs().max())
    )
    return torch.cat([measure(vector[key]).expand(vector[key].numel()) for key in sorted(vector)])


def check_covariance(errors, expected, z=5.0):
    """Real and imaginary parts of all users' symbol errors against a complex covariance, z standard errors."""
    even, odd = errors[:, 0::2], errors[:, 1::2]
    even = even[:, : odd.shape[1]]
    n = odd.shape[1]
    power = np.sqrt(np.outer(np.diag(expected).real, np.diag(expected).real))
    bound = z * np.sqrt(2 / n) * power
    for left, right, wanted in ((even, even, expected.real), (odd, odd, expected.real), (odd, even, expected.imag)):
        found = (left @ right.T / n).numpy()
        assert np.all(np.abs(found - wanted) <= bound), (found, wanted)
    assert np.all(np.abs(errors.mean(1).numpy()) <= z * np.sqrt(np.diag(expected).real / errors.shape[1]))


def same_bits(left, right):
    return all(torch.equal(a[key], b[key]) for a, b in zip(left, right, strict=True) for key in a)
