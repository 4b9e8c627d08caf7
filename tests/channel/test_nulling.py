"""The projection's properties, the limit that it is right in, and the warning where it is not."""

import warnings

import numpy as np
import pytest
import torch

from helpers.oracles import complex_normal, random_covariance
from rmtllmf.channel import (
    UplinkScenario,
    lmmse,
    null_directions,
    sic,
    strongest_user_covariance,
    worst_case_covariance,
)
from rmtllmf.errors import RmtllmfWarning


def quietly(*args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RmtllmfWarning)
        return null_directions(*args, **kwargs)


def test_it_is_the_projection_onto_the_weakest_eigenvectors():
    rng = np.random.default_rng(0)
    H, C = complex_normal(rng, 7, 5, 2), np.stack([random_covariance(rng, 5) for _ in range(7)])
    other = random_covariance(rng, 5)
    left, reduced, projected = quietly(H, C, 2, other)
    assert left.shape == (7, 3, 2)
    values, vectors = np.linalg.eigh(C)
    np.testing.assert_allclose(np.linalg.eigvalsh(reduced), values[:, :3], atol=1e-12)
    projector = vectors[:, :, :3] @ vectors[:, :, :3].conj().swapaxes(-1, -2)  # whatever basis was taken
    adjoint = H.conj().swapaxes(-1, -2)
    np.testing.assert_allclose(left.conj().swapaxes(-1, -2) @ left, adjoint @ projector @ H, atol=1e-12)
    np.testing.assert_allclose(
        left.conj().swapaxes(-1, -2) @ projected @ left, adjoint @ projector @ other @ projector @ H, atol=1e-12
    )


def test_the_jammer_alone_and_the_whole_noise_have_the_same_directions():
    rng = np.random.default_rng(1)
    H, jammer = complex_normal(rng, 5, 2), random_covariance(rng, 5, rank=1)
    floor = 0.1 * np.eye(5)
    left, _, whole = null_directions(H, jammer, 1, jammer + floor)
    np.testing.assert_allclose(whole, 0.1 * np.eye(4), atol=1e-12)  # the jammer is gone
    again, noise = null_directions(H, jammer + floor, 1)
    np.testing.assert_allclose(lmmse(left, 1.0, whole).mse, lmmse(again, 1.0, noise).mse, rtol=1e-9)


def test_it_is_right_against_an_infinitely_strong_jammer():
    rng = np.random.default_rng(2)
    H, jammer = complex_normal(rng, 6, 3), 1e9 * random_covariance(rng, 6, rank=2)
    whole = jammer + 0.1 * np.eye(6)
    left, noise = null_directions(H, whole, 2)
    np.testing.assert_allclose(lmmse(left, 1.0, noise).mse, lmmse(H, 1.0, whole).mse, rtol=1e-6)
    order = sic(H, 1.0, whole).order  # by power in H: what is left of it may be ordered otherwise
    np.testing.assert_allclose(sic(left, 1.0, noise, order=order).mse, sic(H, 1.0, whole).mse, rtol=1e-6)


def test_a_receiver_that_knows_the_covariance_is_never_worse_than_one_behind_the_projection():
    rng = np.random.default_rng(3)
    H, C = complex_normal(rng, 30, 5, 3), np.stack([random_covariance(rng, 5) for _ in range(30)])
    order = [2, 0, 1]
    for count in range(5):
        left, noise = quietly(H, C, count)
        assert np.all(sic(left, 1.0, noise, order=order).mse >= sic(H, 1.0, C, order=order).mse * (1 - 1e-9))
        if count == 0:  # a rotation
            np.testing.assert_allclose(lmmse(left, 1.0, noise).mse, lmmse(H, 1.0, C).mse, rtol=1e-9)


@pytest.mark.parametrize("jammer", ["strongest user", "sum rate"])
def test_it_warns_once_when_the_jammer_sits_on_the_signal(jammer):
    up = UplinkScenario().draw(50, seed=0, numpy=True)
    if jammer == "strongest user":
        C = strongest_user_covariance(up.H, up.P, 124 * up.noise)
    else:
        C = worst_case_covariance(up.H, up.P, 124 * up.noise, noise=up.noise)
    with pytest.warns(
        RmtllmfWarning, match=r"1 strongest directions of C hold (4\d|50)% of the users' energy"
    ) as caught:
        null_directions(up.H, C, 1)
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_it_does_not_warn_when_there_is_no_reason():
    """Directions off the signal, of a white jammer, or with the only user there silent."""
    H = np.eye(4, 2) + 0j
    null_directions(H, np.diag([1.0, 1.0, 1.0, 9.0]), 1)
    null_directions(complex_normal(np.random.default_rng(4), 200, 4, 2), np.eye(4), 2)
    there = np.diag([9.0, 1.0, 1.0, 1.0])
    null_directions(H, there, 1, P=[0.1, 1.0])
    with pytest.warns(RmtllmfWarning, match="91%"):
        null_directions(H, there, 1, P=[1.0, 0.1])
    null_directions(0 * H, there, 1)  # all silent


def test_kinds_and_gradients():
    rng = np.random.default_rng(5)
    H, C = complex_normal(rng, 3, 2), random_covariance(rng, 3)
    arrays = quietly(H.astype(np.complex64), C, 1)
    assert [part.dtype for part in arrays] == [np.complex64, np.complex128]
    for tensor, array in zip(quietly(torch.from_numpy(H), C, 1), quietly(H, C, 1), strict=True):
        np.testing.assert_array_equal(tensor.numpy(), array)
    channel = torch.from_numpy(H).requires_grad_()
    assert torch.autograd.gradcheck(lambda H: quietly(H, C, 1)[0], (channel,))
