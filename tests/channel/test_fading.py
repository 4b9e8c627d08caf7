"""Fading, correlation and shadowing against their closed forms."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from rmtllmf._random import generator
from rmtllmf.channel import Rician, Shadowing, UplinkScenario, exponential_correlation, steering_vector

DRAWS = 20000
P_VALUE = 1e-3  # seeds are fixed: a test that passes once passes always


def fading(seed=0, users=1, antennas=4, draws=DRAWS, **options):
    """Draws (draws, N_R, Q) without path loss."""
    options.setdefault("placement", [1.0] * users)
    scenario = UplinkScenario(num_users=users, num_antennas=antennas, path_loss=lambda d: torch.ones_like(d), **options)
    return scenario.draw(draws, seed=seed, numpy=True).H


def covariance(h):
    """Of the antennas of the first user."""
    return np.einsum("di,dj->ij", h[..., 0], h[..., 0].conj()) / len(h)


def assert_close(found, expected, draws=DRAWS):
    """Within five standard errors of entries of a sample covariance, which are at most 1/sqrt(draws) for unit power."""
    assert np.abs(found - expected).max() < 5 / math.sqrt(draws)


def test_the_default_scenario_bit_for_bit():
    """The paper's set-up in four lines: what was added to a scenario does not touch it."""
    u = torch.rand(3, 8, dtype=torch.float64, generator=generator(5, "placement"))
    distances = (100.0**2 + (1000.0**2 - 100.0**2) * u).sqrt()
    gain = (299_792_458.0 / (4 * math.pi * 2.4e9)) ** 2 * distances**-2.0
    w = torch.randn(3, 16, 8, dtype=torch.complex128, generator=generator(5, "fading"))
    assert torch.equal(UplinkScenario().draw(3, seed=5).H, gain.sqrt()[:, None] * w)


def test_options_do_not_disturb_each_others_draws():
    """Places, fading and shadowing have generators of their own: adding one thing leaves the others as they were."""
    plain = UplinkScenario().draw(3, seed=5).H
    same = UplinkScenario(fading="rayleigh", correlation=0, shadowing=Shadowing(0.0, 0.5)).draw(3, seed=5).H
    assert torch.equal(plain, same)
    shadowed = UplinkScenario(shadowing=8.0).draw(3, seed=5).H / plain
    torch.testing.assert_close(shadowed, shadowed[:, :1].expand_as(shadowed))  # one factor a user
    assert shadowed.imag.abs().max() < 1e-12


def test_without_a_line_of_sight_power_rician_is_rayleigh():
    h = fading(fading=Rician(-200.0))
    np.testing.assert_allclose(h, fading(), atol=1e-8)


@pytest.mark.parametrize("k_factor", [-3.0, 3.0, 9.0])
def test_rician_amplitudes(k_factor):
    """|h| has the Rice distribution, and K comes back from the second and fourth moment (Greenstein et al., 1999)."""
    K = 10 ** (k_factor / 10)
    power = np.abs(fading(fading=Rician(k_factor), antennas=1).ravel()) ** 2
    rice = stats.rice(b=math.sqrt(2 * K), scale=math.sqrt(1 / (2 * (K + 1))))
    assert stats.kstest(np.sqrt(power), rice.cdf).pvalue > P_VALUE
    assert power.mean() == pytest.approx(1, abs=5 * power.std() / math.sqrt(DRAWS))
    direct = math.sqrt(power.mean() ** 2 - power.var())
    assert direct / (power.mean() - direct) == pytest.approx(K, rel=0.06)


def test_rician_phases_are_uniform():
    h = fading(fading=Rician(9.0), antennas=1).ravel()
    assert stats.kstest(np.angle(h), stats.uniform(-np.pi, 2 * np.pi).cdf).pvalue > P_VALUE


def test_rician_covariance_with_the_direction_from_coordinates():
    """K/(K+1) a a^H + R/(K+1), a from the user's place: here 30 degrees off broadside."""
    K, R = 10**0.4, exponential_correlation(0.6j, 4).numpy()
    place = [(200 * math.cos(math.pi / 6), 200 * math.sin(math.pi / 6))]
    h = fading(fading=Rician(4.0, spacing=0.7), correlation=0.6j, placement=place)
    a = np.exp(2j * np.pi * 0.7 * np.arange(4) * 0.5)
    assert_close(covariance(h), (K * np.outer(a, a.conj()) + R) / (K + 1))


def test_random_directions_are_uniform_over_the_circle():
    """The direction decides the phase from one antenna to the next, 2 pi delta sin(phi): its arc sine law."""
    h = fading(fading=Rician(150.0, spacing=0.4), antennas=2, draws=5000)[..., 0]
    sine = np.angle(h[:, 1] * h[:, 0].conj()) / (2 * np.pi * 0.4)
    assert stats.kstest(sine, stats.arcsine(-1, 2).cdf).pvalue > P_VALUE


def test_who_has_no_line_of_sight_fades_as_rayleigh():
    scenario = UplinkScenario(num_users=1, placement=[300.0], path_loss="umi", fading=Rician(20.0), num_antennas=1)
    h = scenario.draw(DRAWS, seed=0, numpy=True).H.ravel()
    at = torch.tensor([300.0], dtype=torch.float64)
    clear, blocked = (float(scenario.gain(at, los=torch.tensor([state]))) for state in (True, False))
    # the gains are 20 dB apart: their populations separate
    seen = np.abs(h) ** 2 > 0.5 * clear
    p = 18 / 300 + math.exp(-300 / 36) * (1 - 18 / 300)
    assert seen.mean() == pytest.approx(p, abs=0.006)
    power = np.abs(h[~seen]) ** 2 / blocked
    assert stats.kstest(power, stats.expon.cdf).pvalue > P_VALUE
    assert (np.abs(h[seen]) ** 2 / clear).std() == pytest.approx(math.sqrt(1 + 2 * 100) / 101, rel=0.1)


@pytest.mark.parametrize("coefficient", [0.7, -0.4, 0.5 - 0.6j, 1.0])
def test_exponential_correlation_between_antennas(coefficient):
    R = exponential_correlation(coefficient, 5)
    for m in range(5):
        for n in range(m + 1):
            assert R[m, n] == pytest.approx(complex(coefficient) ** (m - n))
    assert torch.equal(R, R.mH)
    assert_close(covariance(fading(correlation=coefficient, antennas=5)), R.numpy())


def random_correlation(size, seed, rank=None):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((size, rank or size)) + 1j * rng.standard_normal((size, rank or size))
    X /= np.linalg.norm(X, axis=1, keepdims=True)
    return X @ X.conj().T


def test_a_given_correlation_and_independent_users():
    R = random_correlation(4, 0)
    h = fading(correlation=R, users=2)
    assert_close(covariance(h), R)
    assert_close(np.einsum("di,dj->ij", h[..., 0], h[..., 1].conj()) / DRAWS, np.zeros((4, 4)))
    np.testing.assert_array_equal(h, fading(correlation=torch.from_numpy(R), users=2))


def test_a_singular_correlation():
    R = random_correlation(4, 1, rank=2)
    h = fading(correlation=R)
    assert_close(covariance(h), R)
    null = np.linalg.eigh(R)[1][:, :2]
    assert np.abs(h[..., 0] @ null.conj()).max() < 1e-6


def test_a_correlation_for_every_user():
    R = np.stack([random_correlation(4, 2), np.eye(4)])
    h = fading(correlation=R, users=2)
    assert_close(covariance(h), R[0])
    assert_close(covariance(h[..., ::-1]), R[1])


def shadows(shadowing, users=3, **options):
    """The shadowing in dB, (draws, Q), from a scenario without randomness but that and a phase."""
    h = fading(users=users, antennas=1, fading=Rician(300.0), shadowing=shadowing, **options)
    return 20 * np.log10(np.abs(h[:, 0]))


def test_shadowing_is_normal_in_db():
    X = shadows(6.0)
    assert stats.kstest(X.ravel(), stats.norm(0, 6).cdf).pvalue > P_VALUE
    assert_close(np.corrcoef(X.T), np.eye(3))


def test_correlated_shadowing():
    assert_close(np.corrcoef(shadows(Shadowing(6.0, 0.5)).T), np.full((3, 3), 0.5) + 0.5 * np.eye(3))
    given = np.array([[1, 0.8, -0.3], [0.8, 1, 0.1], [-0.3, 0.1, 1]])
    assert_close(np.corrcoef(shadows(Shadowing(6.0, given)).T), given)
    same = shadows(Shadowing(6.0, 1.0))
    np.testing.assert_allclose(same, same[:, :1] + np.zeros(3), atol=1e-6)


def test_shadowing_correlated_by_distance():
    """exp(-d/50 m), two of the users on the same spot."""
    X = shadows(Shadowing(6.0, decorrelation=50.0), users=4, placement=[(100, 0), (100, 50), (130, 10), (100, 0)])
    at = np.array([[100, 0], [100, 50], [130, 10], [100, 0]])
    apart = np.linalg.norm(at[:, None] - at, axis=-1)
    assert_close(np.corrcoef(X.T), np.exp(-apart / 50))
    assert stats.kstest(X[:, 0], stats.norm(0, 6).cdf).pvalue > P_VALUE


def test_the_standards_shadowing_by_line_of_sight():
    scenario = UplinkScenario(num_users=1, num_antennas=1, placement=[15.0], path_loss="umi", shadowing="3gpp")
    scenario = UplinkScenario(**{**vars(scenario), "fading": Rician(300.0)})
    X = 20 * np.log10(np.abs(scenario.draw(DRAWS, seed=0, numpy=True).H.ravel()))
    at = torch.tensor([15.0], dtype=torch.float64)
    mean = 10 * math.log10(float(scenario.gain(at)))  # within 18 m everybody has a line of sight
    assert stats.kstest(X, stats.norm(mean, 4).cdf).pvalue > P_VALUE


def test_steering_vectors():
    a = steering_vector(np.array([0.0, math.pi / 2, -math.pi / 2, math.pi]), 3, spacing=0.25)
    np.testing.assert_allclose(a, [[1, 1, 1], [1, 1j, -1], [1, -1j, -1], [1, 1, 1]], atol=1e-12)
    assert steering_vector(torch.tensor([0.1]), 3).dtype == torch.complex64


def test_given_coordinates():
    scenario = UplinkScenario(num_users=2, placement=np.array([[30.0, 40.0], [0.0, -70.0]]))
    distances, azimuths = scenario._places((3,), 0)
    np.testing.assert_allclose(distances, [[50.0, 70.0]] * 3)
    np.testing.assert_allclose(azimuths, [[math.atan2(4, 3), -math.pi / 2]] * 3)
    by_distance = UplinkScenario(num_users=2, placement=torch.tensor([50.0, 70.0], dtype=torch.float64))
    assert torch.equal(scenario.draw(3, seed=0).H, by_distance.draw(3, seed=0).H)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_everything_together_is_reproducible(dtype):
    scenario = UplinkScenario(
        path_loss="uma", fading=Rician(9.0), correlation=0.5, shadowing=Shadowing("3gpp", decorrelation=37.0)
    )
    up = scenario.draw(2, 3, seed=0, dtype=dtype)
    assert up.H.shape == (2, 3, 16, 8)
    assert up.H.dtype == dtype
    torch.set_num_threads(before := torch.get_num_threads())
    try:
        torch.set_num_threads(2)
        assert torch.equal(up.H, scenario.draw(2, 3, seed=0, dtype=dtype).H)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(up.H, scenario.draw(2, 3, seed=0).H.to(dtype))
    assert not torch.equal(up.H, scenario.draw(2, 3, seed=1, dtype=dtype).H)
