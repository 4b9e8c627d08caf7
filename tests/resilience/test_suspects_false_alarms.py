"""How often honest users are suspected, over many transmissions, against the limit that was asked for."""

import math

import numpy as np
import pytest
import torch

from helpers.suspected_users import matrix, mse_of, task_vectors, with_cosines
from rmtllmf.channel import UplinkScenario, sic, strongest_user_covariance, transmit
from rmtllmf.resilience.attacks import scaled
from rmtllmf.resilience.suspects import suspects

TRIALS = 100


def jammed(users=4):
    """A receiver that is unaware of the strongest-user attack: errors of users are correlated up to .9."""
    scenario = UplinkScenario(num_users=users)
    up = scenario.draw(seed=3)
    thermal = scenario.noise * torch.eye(16, dtype=torch.complex128)
    C = strongest_user_covariance(up.H, up.P, 124 * scenario.noise) + thermal
    return sic(up.H, up.P, C, designed_for=thermal, order="strongest_first")


def at_most(rate, trials):
    """Successes that a binomial number with this rate exceeds once in ten thousand times."""
    from scipy.stats import binom

    return int(binom.isf(1e-4, trials, rate))


def at_least(rate, trials):
    from scipy.stats import binom

    return int(binom.isf(1 - 1e-4, trials, rate)) - 1


CHANNELS = {
    "10 dB": (mse_of(10, 4), "additive", "rms"),
    "0 dB": (mse_of(0, 4), "additive", "rms"),
    "-20 dB": (mse_of(-20, 4), "additive", "rms"),
    "-20 dB, known scale": (mse_of(-20, 4), "additive", 1.0),
    "shrunk estimates": ([0.1, 0.2, 0.9, 0.1], "mmse", "rms"),
    "correlated": (jammed(), "additive", "rms"),
    "correlated, known scale": (jammed(), "additive", 1.0),
    "correlated, shrunk": (jammed(), "mmse", "tensor_rms"),
    "two blocks": ([mse_of(10, 4), mse_of(-3, 4)], "additive", "rms"),
}


def trials_of(cosines, channel, count, **limits):
    reception, estimator, scale = CHANNELS[channel]
    sent = with_cosines(cosines)
    for seed in range(count):
        received = transmit(sent, reception, seed=seed, estimator=estimator, scale=scale)
        yield suspects(received, reception, estimator=estimator, scale=scale, **limits)


def test_the_errors_of_the_jammed_receiver_are_correlated():
    E = jammed().error_covariance.numpy()
    deviation = np.sqrt(np.diag(E).real)
    assert np.abs((E / np.outer(deviation, deviation)).real - np.eye(4)).max() > 0.9


@pytest.mark.parametrize("channel", CHANNELS)
def test_false_alarms_at_the_limit(channel):
    """Cosines of exactly 0 with the limit there: any of 4 + 6 tests at its own rate, the family below."""
    found = list(trials_of(matrix(4), channel, TRIALS, opposed=0.0, false_alarm=0.2))
    assert sum(len(s.accepted) < 4 for s in found) <= at_most(0.2, TRIALS)
    rows, columns = torch.triu_indices(4, 4, 1)
    for q in range(4):
        alone = sum(float(s.p_values["direction"][q]) <= 0.1 for s in found)
        assert at_least(0.05, TRIALS) <= alone <= at_most(0.1, TRIALS)
    # the errors are those that the tests believe in: scores have mean 0 and variance 1 (4.5 and 2 to 5 standard errors)
    scores = torch.special.ndtri(torch.stack([s.p_values["opposed"][rows, columns] for s in found]))
    assert scores.mean(dim=0).abs().max() < 4.5 / math.sqrt(TRIALS)
    assert float(scores.square().mean()) == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize("channel", CHANNELS)
def test_false_alarms_of_pairs_at_other_limits(channel):
    found = list(trials_of(matrix(4, _01=-0.1, _23=0.95), channel, TRIALS))
    for name, q, r in (("opposed", 0, 1), ("copied", 2, 3)):
        hits = sum(float(s.p_values[name][q, r]) <= 0.1 for s in found)
        assert at_least(0.1, TRIALS) <= hits <= at_most(0.1, TRIALS), name


@pytest.mark.parametrize("channel", ["0 dB", "-20 dB", "-20 dB, known scale", "correlated"])
def test_false_alarms_of_norms_at_the_limit(channel):
    """Three times as long as the others, exactly; and found when four times as long, where the scale is told."""
    reception, _, scale = CHANNELS[channel]
    scale = scale if scale == "rms" else [1.0, 1.0, 1.0, 3.0]
    sent = with_cosines(matrix(4))
    hits, power = 0, 0
    for seed in range(TRIALS // 2):
        for factor in (3.0, 4.0):
            vectors = [*sent[:3], scaled(sent[3], factor)]
            if scale == "rms":
                received = transmit(vectors, reception, seed=seed)
            else:  # every user by its own number: the noise is that of the number
                parts = [transmit(vectors, reception, seed=seed, scale=number) for number in (1.0, 3.0)]
                received = [*parts[0][:3], parts[1][3]]
            found = suspects(received, reception, scale=scale, false_alarm=0.2)
            if factor == 3.0:
                hits += float(found.p_values["norm"][3]) <= 0.1
            else:
                power += 3 not in found.accepted
    assert hits <= at_most(0.1, TRIALS // 2)
    assert (power == TRIALS // 2) == (
        scale == "rms"
    )  # a known scale tells nothing: energy must be seen through the noise


@pytest.mark.parametrize("snr_db", [20, 0, -10, -20])
def test_honest_vectors_pass_all_tests_at_any_noise(snr_db):
    sent = task_vectors()
    for scale in ("rms", "tensor_rms"):
        for seed in range(15):
            received = transmit(sent, mse_of(snr_db), seed=seed, scale=scale)
            found = suspects(received, mse_of(snr_db), scale=scale)
            assert found.accepted == tuple(range(8)), repr(found)
    if snr_db >= 0:
        assert (found.profile > 0.7).all()


def test_the_slope_of_a_common_profile_is_one_at_any_noise_that_it_is_seen_through():
    for snr_db in (20, 0):
        slopes = []
        for seed in range(10):
            sent = task_vectors(scatter=0.0)
            slopes.append(suspects(transmit(sent, mse_of(snr_db), seed=seed), mse_of(snr_db)).profile)
        found = torch.stack(slopes).flatten()
        error = float(found.std()) / math.sqrt(10)  # the eight slopes of one reception share a median
        assert float(found.mean()) == pytest.approx(1, abs=max(3 * error, 0.01))
        assert error < 0.03
