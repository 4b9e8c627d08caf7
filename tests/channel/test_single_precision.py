"""A thermal floor that complex64 cannot hold beside a strong jammer is missed aloud, and not in silence."""

import warnings

import numpy as np
import pytest
import torch

from helpers.oracles import complex_normal
from rmtllmf.channel import (
    Uplink,
    from_db,
    lmmse,
    scheduled,
    sic,
    strongest_user_covariance,
    sum_rate,
    transmit_symbols,
    worst_case_covariance,
)
from rmtllmf.errors import NotPSDError, RmtllmfWarning

NOISE = 1e-15
VECTORS = [{"w": torch.ones(40)}] * 4

CALLS = {
    "sum_rate": lambda up, C: sum_rate(up.H, up.P, C),
    "sic": lambda up, C: sic(up.H, up.P, C),
    "lmmse": lambda up, C: lmmse(up.H, up.P, C),
    "scheduled": lambda up, C: scheduled(up.H, up.P, C),
    "transmit_symbols": lambda up, C: transmit_symbols(VECTORS, up.H, up.P, C, seed=0),
}


def attacked(decibels, dtype, *batch):
    H = 1e-5 * complex_normal(np.random.default_rng(0), *batch, 8, 4)
    up = Uplink(H.astype(dtype), 1e-4, NOISE)
    return up, strongest_user_covariance(up.H, up.P, from_db(decibels) * NOISE) + up.noise_covariance


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("name", CALLS)
def test_a_lost_floor_is_told_at_the_line_of_the_caller(name, kind):
    up, C = attacked(65.0, np.complex64)
    if kind == "torch":
        up, C = Uplink(torch.from_numpy(up.H), 1e-4, NOISE), torch.from_numpy(C)
    with pytest.warns(RmtllmfWarning, match="C: is singular to the precision of complex64.*complex128") as caught:
        CALLS[name](up, C)
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_of_many_draws_it_is_told_once(monkeypatch):
    monkeypatch.setattr("rmtllmf.channel.receivers._CHUNK", 4)
    up, C = attacked(65.0, np.complex64, 20)
    with pytest.warns(RmtllmfWarning) as caught:
        rx = sic(up.H, up.P, C)
    assert len(caught) == 1
    assert (rx.mse == 0).any()


def test_a_wrong_belief_needs_no_warning():
    """What it costs is in the errors."""
    up, C = attacked(65.0, np.complex64)
    rx = sic(up.H, up.P, C.astype(complex) + NOISE * np.eye(8), designed_for=C)
    assert (rx.mse > 1e-5).all()


@pytest.mark.parametrize("name", CALLS)
def test_what_is_right_is_silent(name):
    """Below 60 dB, in double precision, also if singular on purpose, and where nobody gains by a lost floor."""
    for decibels, dtype in ((55.0, np.complex64), (65.0, complex)):
        CALLS[name](*attacked(decibels, dtype))
    if name != "transmit_symbols":
        up, _ = attacked(65.0, complex)
        CALLS[name](up, strongest_user_covariance(up.H, up.P, 1e-9))
    up, _ = attacked(65.0, np.complex64)
    CALLS[name](up, worst_case_covariance(up.H, up.P, 1e-13))


def test_up_to_forty_decibels_single_precision_is_enough():
    for decibels, deviation in ((40.0, 5e-4), (50.0, 5e-3)):
        rates = [CALLS["sum_rate"](*attacked(decibels, dtype, 50)) for dtype in (np.complex64, complex)]
        np.testing.assert_allclose(rates[0], rates[1], atol=deviation)


def test_a_sum_of_two_precisions_says_what_is_wrong():
    up, _ = attacked(65.0, np.complex64)
    C = strongest_user_covariance(up.H, up.P, from_db(85.0) * NOISE) + NOISE * np.eye(8)
    assert C.dtype == complex
    with pytest.raises(NotPSDError, match="within the precision of complex64, but C is in double precision"):
        sum_rate(up.H, up.P, C)


@pytest.mark.parametrize("kind", [np.asmatrix, lambda H: np.broadcast_to(H, H.shape)], ids=["matrix", "read-only"])
@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_kinds_of_arrays(kind):
    up, C = attacked(20.0, complex)
    plain = worst_case_covariance(up.H, up.P, 1e-13, noise=NOISE)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        np.testing.assert_array_equal(worst_case_covariance(kind(up.H), up.P, 1e-13, noise=NOISE), plain)
        np.testing.assert_array_equal(sum_rate(kind(up.H), up.P, kind(C)), sum_rate(up.H, up.P, C))
