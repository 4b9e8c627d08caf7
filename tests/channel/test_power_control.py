"""Powers that follow the channel: what is received is what was asked for."""

import numpy as np
import pytest
import torch

from helpers.oracles import complex_normal
from rmtllmf.channel import UplinkScenario, channel_inversion, fractional_power_control


def received(H, P):
    return P * (np.abs(H) ** 2).sum(-2)


def test_inversion_gives_equal_received_powers():
    up = UplinkScenario().draw(5, 7, seed=0, numpy=True)
    P = channel_inversion(up.H, 3e-15)
    assert P.shape == (5, 7, 8)
    np.testing.assert_allclose(received(up.H, P), 3e-15, rtol=1e-12)
    targets = np.linspace(1, 2, 8) * 1e-15
    np.testing.assert_allclose(received(up.H, channel_inversion(up.H, targets)), np.broadcast_to(targets, P.shape))


def test_inversion_respects_the_maximum():
    up = UplinkScenario().draw(20, seed=1, numpy=True)
    full = received(up.H, up.P)
    target = np.median(full)
    P = channel_inversion(up.H, target, max_power=up.P)
    reached = full >= target
    assert 0 < reached.sum() < reached.size
    np.testing.assert_array_equal(P[~reached], up.P[~reached])
    np.testing.assert_allclose(received(up.H, P)[reached], target, rtol=1e-12)
    assert np.all(P <= up.P)


def test_inversion_of_the_mean_gain_leaves_the_fading():
    scenario = UplinkScenario(placement=np.linspace(100, 1000, 8).tolist())
    up = scenario.draw(20_000, seed=2, numpy=True)
    gain = 16 * scenario.gain(torch.linspace(100, 1000, 8, dtype=torch.float64)).numpy()
    P = channel_inversion(up.H, 1e-4 * gain[-1], max_power=up.P, gain=gain)
    assert P[:, -1] == pytest.approx(1e-4)
    assert np.ptp(P, axis=0).max() == 0
    mean = received(up.H, P).mean(0)
    np.testing.assert_allclose(mean, 1e-4 * gain[-1], rtol=0.01)  # 20,000 draws of 16 antennas: 0.2 %


def test_a_user_without_a_channel_sends_with_the_maximum():
    H = np.array([[1.0, 0.0]]) + 0j
    np.testing.assert_array_equal(channel_inversion(H, 0.5, max_power=2.0), [0.5, 2.0])
    np.testing.assert_array_equal(channel_inversion(H, [0.5, 0.0]), [0.5, 0.0])
    np.testing.assert_array_equal(fractional_power_control(H, 2.0), [2.0, 2.0])


@pytest.mark.parametrize("exponent", [0.0, 0.3, 1.0])
def test_fractional_control_compresses_the_received_powers_in_decibels(exponent):
    up = UplinkScenario().draw(30, seed=3, numpy=True)
    limit = np.geomspace(1e-5, 1e-3, 8)
    P = fractional_power_control(up.H, limit, exponent=exponent)
    assert np.all(limit * (1 + 1e-12) >= P)
    full, now = np.log10(received(up.H, limit)), np.log10(received(up.H, P))
    weakest = full.min(-1, keepdims=True)
    np.testing.assert_allclose(now - weakest, (1 - exponent) * (full - weakest), atol=1e-12)


def test_full_compensation_is_max_min_fair():
    """Nobody can be received with more than the weakest user at full power, if all are to be equal."""
    rng = np.random.default_rng(4)
    H = complex_normal(rng, 50, 4, 3)
    P = fractional_power_control(H, 1.0)
    weakest = received(H, 1.0).min(-1, keepdims=True)
    np.testing.assert_allclose(received(H, P), np.broadcast_to(weakest, (50, 3)), rtol=1e-12)
    assert np.all(P.max(-1) == 1)
    np.testing.assert_allclose(P, channel_inversion(H, weakest, max_power=1.0), rtol=1e-12)


def test_kinds_and_gradients():
    rng = np.random.default_rng(5)
    H = complex_normal(rng, 2, 3, 2)
    for rule in (lambda H: channel_inversion(H, 0.5, max_power=0.3), lambda H: fractional_power_control(H, 0.3)):
        tensor = rule(torch.from_numpy(H))
        np.testing.assert_array_equal(tensor.numpy(), rule(H))
        assert rule(H.astype(np.complex64)).dtype == np.float32
    channel = torch.from_numpy(H).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda H: (channel_inversion(H, 0.5), fractional_power_control(H, 0.3, exponent=0.4)), (channel,)
    )
