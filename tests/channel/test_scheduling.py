"""Users in turn: closed forms, and the bookkeeping of channel uses and energy."""

import numpy as np
import pytest
import torch

from helpers.oracles import complex_normal, random_covariance
from rmtllmf.channel import lmmse, repeat_block, scheduled, sic, strongest_user_covariance
from rmtllmf.errors import RmtllmfWarning


def setting(seed, *batch, antennas=4, users=3):
    rng = np.random.default_rng(seed)
    H = complex_normal(rng, *batch, antennas, users)
    return H, rng.uniform(0.2, 1, (*batch, users)), random_covariance(rng, antennas) + 0.05 * np.eye(antennas)


@pytest.mark.parametrize(("same_energy", "factor"), [(True, 3), (False, 1)])
def test_closed_form(same_energy, factor):
    H, P, C = setting(0, 5)
    rx = scheduled(H, P, C, same_energy=same_energy)
    strength = factor * P * np.einsum("bnq,nm,bmq->bq", H.conj(), np.linalg.inv(C), H).real
    np.testing.assert_allclose(rx.sinr, strength, rtol=1e-9)
    np.testing.assert_allclose(rx.mse, 1 / (1 + strength), rtol=1e-9)
    np.testing.assert_allclose(rx.rate, np.log1p(strength), rtol=1e-9)
    np.testing.assert_allclose(rx.gain, 1 - rx.mse, atol=1e-12)
    np.testing.assert_allclose(rx.error_covariance, rx.mse[..., None] * np.eye(3), atol=1e-15)
    np.testing.assert_allclose(rx.noise_covariance, (rx.mse * rx.gain)[..., None] * np.eye(3), atol=1e-12)
    assert rx.order is None


def test_each_slot_is_the_link_of_one_user():
    H, P, C = setting(1, 5)
    rx = scheduled(H, P, C, designed_for=np.eye(4), same_energy=False)
    for q in range(3):
        alone = sic(H[..., [q]], P[..., [q]], C, designed_for=np.eye(4))
        for field in ("mse", "sinr", "rate", "gain"):
            np.testing.assert_allclose(getattr(rx, field)[:, q], getattr(alone, field)[:, 0], rtol=1e-12)


def test_the_books_balance_where_nothing_interferes():
    """Orthogonal users in white noise: Q slots with Q times the power are as good as Q repetitions of all together."""
    rng = np.random.default_rng(2)
    H = np.linalg.qr(complex_normal(rng, 4, 4)).Q[:, :3] * [1.0, 2.0, 0.5]
    P, C = np.array([1.0, 0.3, 0.7]), 0.4 * np.eye(4)
    stacked, noise = repeat_block(H, C, 3)
    np.testing.assert_allclose(scheduled(H, P, C).mse, lmmse(stacked, P, noise).mse, rtol=1e-9)
    np.testing.assert_allclose(scheduled(H, P, C, same_energy=False).mse, lmmse(H, P, C).mse, rtol=1e-9)


def test_repetition_together_beats_turns_at_equal_uses_and_energy_in_the_sum_of_rates():
    """The multiple access channel's capacity region contains time division: sum log det >= sum of slots' rates / Q."""
    H, P, C = setting(3, 50)
    together = sic(H, P, C).rate.sum(-1)
    assert np.all(together >= scheduled(H, P, C).rate.sum(-1) / 3 * (1 - 1e-12))


def test_a_jammer_that_knows_whose_turn_it_is():
    H, P, C = setting(4, 5)
    alone = H.swapaxes(-1, -2)[..., None]
    jammers = strongest_user_covariance(alone, P[..., None], 2.0) + 0.1 * np.eye(4)
    assert jammers.shape == (5, 3, 4, 4)
    rx = scheduled(H, P, jammers, per_slot=True)
    # all of the jammer's power is on the one user: only the direction of h counts
    np.testing.assert_allclose(rx.sinr, 3 * P * (np.abs(H) ** 2).sum(-2) / 2.1, rtol=1e-9)
    same = scheduled(H, P, np.stack([C] * 3), per_slot=True, designed_for=np.stack([np.eye(4)] * 3))
    np.testing.assert_allclose(same.mse, scheduled(H, P, C, designed_for=np.eye(4)).mse, rtol=1e-12)


def test_kinds_singular_noise_silence_and_gradients():
    H, P, C = setting(5, 2)
    tensor = scheduled(torch.from_numpy(H), P, C)
    array = scheduled(H, P, C)
    np.testing.assert_array_equal(tensor.mse.numpy(), array.mse)
    np.testing.assert_array_equal(tensor.error_covariance.numpy(), array.error_covariance)
    with pytest.warns(RmtllmfWarning, match="singular to the precision of complex64"):
        single = scheduled(H.astype(np.complex64), 1.0, strongest_user_covariance(H.astype(np.complex64), 1.0, 2.0))
    assert single.mse.dtype == np.float32
    assert np.all((single.mse == 0).sum(-1) == 2)  # the rank-one jammer is nulled by everybody else
    assert scheduled(H, [1.0, 0.0, 1.0], C).mse[0, 1] == 1
    channel = torch.from_numpy(H).requires_grad_()
    assert torch.autograd.gradcheck(lambda H: scheduled(H, P, C, designed_for=np.eye(4)).mse, (channel,))
