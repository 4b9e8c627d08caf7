"""The scenario's distributions against closed forms, and its reproducibility."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from rmtllmf.channel import Uplink, UplinkScenario


def distances(scenario, draws):
    """From the channel itself: without fading the gain tells the distance."""
    return scenario._distances((draws,), torch.Generator().manual_seed(0)).numpy()


def test_users_are_uniform_over_the_ring():
    found = distances(UplinkScenario(), 5000).ravel()
    cdf = lambda d: (d**2 - 100**2) / (1000**2 - 100**2)  # noqa: E731
    assert stats.kstest(found, cdf).pvalue > 1e-3


def test_or_uniform_in_distance_or_given():
    found = distances(UplinkScenario(placement="distance"), 5000).ravel()
    assert stats.kstest(found, stats.uniform(100, 900).cdf).pvalue > 1e-3
    given = UplinkScenario(num_users=2, placement=[50.0, 70.0])
    np.testing.assert_array_equal(distances(given, 3), [[50.0, 70.0]] * 3)


def test_rayleigh_fading_with_the_mean_gain_of_free_space():
    """|h|^2 is exponential with mean (lambda / 4 pi d)^2, phases are uniform."""
    scenario = UplinkScenario(num_users=1, placement=[100.0])
    h = scenario.draw(4000, seed=1, numpy=True).H.ravel()
    wavelength = 299_792_458 / 2.4e9
    gain = (wavelength / (4 * math.pi * 100)) ** 2
    assert stats.kstest(np.abs(h) ** 2 / gain, stats.expon.cdf).pvalue > 1e-3
    assert stats.kstest(np.angle(h), stats.uniform(-np.pi, 2 * np.pi).cdf).pvalue > 1e-3


def test_the_default_signal_to_noise_ratio():
    scenario = UplinkScenario()
    gain = scenario.gain(torch.tensor([100.0], dtype=torch.float64))
    assert 10 * math.log10(scenario.power * float(gain) / scenario.noise) == pytest.approx(24.8, abs=0.05)
    assert UplinkScenario(noise_figure=10).noise == pytest.approx(10 * scenario.noise)


def test_path_loss_exponents_and_functions():
    at = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)
    free = UplinkScenario().gain(at)
    np.testing.assert_allclose(UplinkScenario(path_loss=3.5).gain(at) / free, [1, 10**-1.5, 100**-1.5])
    np.testing.assert_allclose(UplinkScenario(path_loss=lambda d: 1 / d).gain(at), [1, 0.1, 0.01])


def test_the_same_seed_gives_the_same_channel_in_every_form():
    scenario = UplinkScenario()
    one = scenario.draw(3, seed=5)
    assert torch.equal(one.H, scenario.draw(3, seed=5).H)
    assert not torch.equal(one.H, scenario.draw(3, seed=6).H)
    np.testing.assert_array_equal(scenario.draw(3, seed=5, numpy=True).H, one.H.numpy())
    single = scenario.draw(3, seed=5, dtype=torch.complex64)
    assert torch.equal(single.H, one.H.to(torch.complex64))
    assert single.P.dtype == single.noise.dtype == torch.float32
    # the global generator is neither used nor touched
    torch.manual_seed(0)
    before = torch.get_rng_state()
    scenario.draw(3, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    generator = torch.Generator().manual_seed(1)
    assert not torch.equal(scenario.draw(seed=generator).H, scenario.draw(seed=generator).H)


def test_shapes_and_noise_covariance():
    up = UplinkScenario(num_users=3, num_antennas=5).draw(2, 4, seed=0)
    assert up.H.shape == (2, 4, 5, 3)
    assert up.P.shape == (2, 4, 3)
    assert up.noise.shape == (2, 4)
    assert torch.equal(up.noise_covariance, up.noise[..., None, None] * torch.eye(5))
    assert isinstance(Uplink(np.ones((2, 2)) + 0j, 1.0, 0.5).noise_covariance, np.ndarray)
    np.testing.assert_array_equal(Uplink(np.ones((2, 2)) + 0j, 1.0, 0.5).noise_covariance, 0.5 * np.eye(2))


def test_an_uplink_is_of_one_kind_and_one_precision():
    H = torch.ones(2, 3, dtype=torch.complex128)
    up = Uplink(H, 1.0, 3.3e-50)
    assert (up.P.shape, up.P.dtype, up.noise.dtype) == ((3,), torch.float64, torch.float64)
    assert float(up.noise_covariance[0, 0].real) == 3.3e-50
    single = Uplink(np.ones((2, 3), np.complex64), np.eye(3), 0.5)
    assert single.P.shape == (3,)
    assert single.P.dtype == np.float32
    assert single.noise_covariance.dtype == np.complex64
    assert isinstance(Uplink(np.ones((2, 3)) + 0j, 1.0, torch.tensor(0.5)).H, torch.Tensor)
    assert Uplink([[1 + 1j]], 1, 1).noise_covariance.shape == (1, 1)


def test_whole_numbers_may_come_from_numpy():
    up = UplinkScenario(num_users=np.int64(2)).draw(np.int32(3), seed=np.int64(0))
    assert torch.equal(up.H, UplinkScenario(num_users=2).draw(3, seed=0).H)
