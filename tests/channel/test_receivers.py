"""Receivers against explicit filters, against a simulation of the link, and against what theory says of them."""

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.oracles import assert_covariance, complex_normal, log_det_rate, random_covariance, receive, simulate
from rmtllmf.channel import (
    UplinkScenario,
    barrage_covariance,
    lmmse,
    receivers,
    sic,
    strongest_user_covariance,
    sum_rate,
    worst_case,
    worst_case_covariance,
)
from rmtllmf.errors import NonFiniteError, RmtllmfWarning, ShapeError

ANTENNAS, USERS = 4, 3


def covariance(kind, rng, antennas=ANTENNAS):
    """A regular covariance, or a singular one of the given rank."""
    if kind == "regular":
        return random_covariance(rng, antennas) + 0.05 * np.eye(antennas)
    if kind == "none":
        return np.zeros((antennas, antennas), complex)
    return random_covariance(rng, antennas, rank=kind)


KINDS = ["regular", 3, 2, 1, "none"]


def call(receiver, H, P, C, design=None, order=None):
    if receiver == "lmmse":
        return lmmse(H, P, C, designed_for=design)
    return sic(H, P, C, designed_for=design, order=order)


@pytest.mark.parametrize("shape", [(4, 3), (3, 5), (2, 1)], ids=str)
@pytest.mark.parametrize("design", [None, *KINDS], ids=lambda kind: f"design-{kind}")
@pytest.mark.parametrize("noise", KINDS, ids=lambda kind: f"noise-{kind}")
@pytest.mark.parametrize("receiver", ["sic", "lmmse"])
def test_against_explicit_filters(receiver, noise, design, shape):
    """E, N, gain, mse and sinr of every kind of noise and design, singular ones included."""
    rng = np.random.default_rng(17)
    antennas, users = shape
    kinds = [min(kind, antennas) if isinstance(kind, int) else kind for kind in (noise, design)]
    for _ in range(3):
        H, P = complex_normal(rng, antennas, users), rng.uniform(0.2, 2.0, users)
        C = covariance(kinds[0], rng, antennas)
        C_design = None if design is None else covariance(kinds[1], rng, antennas)
        order = rng.permutation(users)
        rx = call(receiver, H, P, C, C_design, order)
        used = C if C_design is None else C_design
        E, N, gain = receive(H, P, C, used, None if receiver == "lmmse" else order)
        np.testing.assert_allclose(rx.error_covariance, E, atol=1e-9)
        np.testing.assert_allclose(rx.noise_covariance, N, atol=1e-9)
        np.testing.assert_allclose(rx.gain, gain, atol=1e-9)
        np.testing.assert_allclose(rx.mse, np.diag(E).real, atol=1e-9)
        noisy = np.diag(N).real > 1e-9
        np.testing.assert_allclose(rx.sinr[noisy], gain[noisy] ** 2 / np.diag(N).real[noisy], rtol=1e-6)
        np.testing.assert_allclose(rx.rate, np.log1p(rx.sinr))


@pytest.mark.parametrize("design", [None, "unaware", "other", 2], ids=lambda kind: f"design-{kind}")
@pytest.mark.parametrize("noise", ["regular", 2, 1], ids=lambda kind: f"noise-{kind}")
@pytest.mark.parametrize("receiver", ["sic", "lmmse"])
def test_against_a_simulation_of_the_link(receiver, noise, design):
    """Mean, covariance and cross-covariance of the errors of 200,000 channel uses, within 5 standard errors."""
    rng = np.random.default_rng(5)
    H, P = complex_normal(rng, ANTENNAS, USERS), np.array([1.0, 0.5, 0.2])
    C = covariance(noise, rng)
    C_design = {None: None, "unaware": 0.05 * np.eye(ANTENNAS), "other": covariance("regular", rng)}.get(
        design, covariance(2, rng)
    )
    order = np.array([2, 0, 1])
    rx = call(receiver, H, P, C, C_design, order)
    used = C if C_design is None else C_design
    estimate, sent = simulate(rng, H, P, C, used, None if receiver == "lmmse" else order, 200_000)
    error = estimate - sent
    assert_covariance(error, np.ones((1, error.shape[1])), 0)
    assert_covariance(error, error, rx.error_covariance)
    assert_covariance(error, error.conj(), 0)  # circular
    if (receiver == "lmmse" and noise != 1) or design is not None:
        assert np.abs(rx.error_covariance - np.diag(rx.mse)).max() > 0.01  # correlated: the test has something to see
    rest = estimate - rx.gain[:, None] * sent
    assert_covariance(rest, rest, rx.noise_covariance)
    assert_covariance(rest[:1], sent[:1], 0)  # nothing of the wanted symbol is left: the gain is right


def test_rates_add_up_to_the_sum_rate_in_every_order():
    rng = np.random.default_rng(3)
    H, P = 1e-7 * complex_normal(rng, 16, 4), rng.uniform(0.1, 1, 4) * 1e-4
    C = worst_case_covariance(H, P, 1e-17) + 1e-19 * np.eye(16)
    orders = list(permutations(range(4)))
    rates = sic(H, P, C, order=np.array(orders)).rate
    assert rates.shape == (24, 4)
    total = sum_rate(H, P, C)
    np.testing.assert_allclose(rates.sum(-1), total, rtol=1e-12)
    assert total == pytest.approx(log_det_rate(1e7 * H, P / 1e-4, C / (1e-14 * 1e-4)), rel=1e-9)
    assert np.ptp(rates[:, 0]) > 0.01  # the order does matter for each


@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 6))
def test_matched_relations(seed, antennas, users):
    """mse = 1/(1 + sinr) = exp(-rate), gain = 1 - mse, SIC no worse than linear, uncorrelated SIC errors."""
    rng = np.random.default_rng(seed)
    H, P = complex_normal(rng, antennas, users), 10 ** rng.uniform(-3, 3, users)
    C = random_covariance(rng, antennas) + 1e-3 * np.eye(antennas)
    linear, cancelling = lmmse(H, P, C), sic(H, P, C)
    for rx in (linear, cancelling):
        np.testing.assert_allclose(rx.mse, 1 / (1 + rx.sinr), rtol=1e-9)
        np.testing.assert_allclose(rx.mse, np.exp(-rx.rate), rtol=1e-9)
        np.testing.assert_allclose(rx.gain, 1 - rx.mse, atol=1e-12)
    assert np.all(cancelling.mse <= linear.mse * (1 + 1e-9))
    np.testing.assert_array_equal(cancelling.error_covariance, np.diag(cancelling.mse))
    B = H * np.sqrt(P)
    E = np.linalg.inv(np.eye(users) + B.conj().T @ np.linalg.inv(C) @ B)
    np.testing.assert_allclose(linear.error_covariance, E, atol=1e-9)


def test_no_other_filter_has_a_smaller_error():
    """The matched filters are optimal: a design for anything else does worse for every user."""
    rng = np.random.default_rng(4)
    H, C = complex_normal(rng, 4, 3), covariance("regular", rng)
    for receiver in (sic, lmmse):
        best = receiver(H, 1.0, C).mse
        for _ in range(50):
            assert np.all(receiver(H, 1.0, C, designed_for=covariance("regular", rng)).mse > best)
        np.testing.assert_allclose(receiver(H, 1.0, C, designed_for=C).mse, best, rtol=1e-12)


def test_singular_noise_is_the_limit_of_a_vanishing_floor():
    rng = np.random.default_rng(6)
    H, P = complex_normal(rng, 4, 3), np.array([1.0, 0.5, 0.2])
    for rank in (1, 2, 3):
        C = random_covariance(rng, 4, rank)
        for receiver in (sic, lmmse):
            limit, close = receiver(H, P, C), receiver(H, P, C + 1e-9 * np.eye(4))
            np.testing.assert_allclose(limit.mse, close.mse, atol=1e-6)
            np.testing.assert_array_equal(limit.mse == 0, np.isinf(limit.rate))
            np.testing.assert_array_equal(limit.mse == 0, close.mse < 1e-7)


def test_a_rank_one_jammer_without_a_floor_is_nulled():
    """The others escape exactly, and so does the attacked user once somebody else is gone; never garbage."""
    rng = np.random.default_rng(7)
    H = 1e-6 * complex_normal(rng, 16, 8)
    C = strongest_user_covariance(H, 1e-4, 1e-17)
    rx = sic(H, 1e-4, C, order="weakest_first")
    attacked = rx.order[-1]
    assert np.all(np.delete(rx.mse, attacked) == 0)
    assert np.all(np.isinf(np.delete(rx.rate, attacked)))
    signal = 1e-4 * np.sum(np.abs(H[:, attacked]) ** 2)
    assert rx.mse[attacked] == pytest.approx(1 / (1 + signal / 1e-17), rel=1e-9)
    assert sum_rate(H, 1e-4, C) == np.inf
    # a jammer in the whole signal space leaves nobody a clear direction
    full = worst_case_covariance(H, 1e-4, 1e-17)
    assert np.linalg.matrix_rank(full) == 8
    assert sum_rate(H, 1e-4, full) == pytest.approx(sic(H, 1e-4, full).rate.sum(), rel=1e-9)
    assert np.isfinite(sum_rate(H, 1e-4, full))


def test_single_precision_covariances_are_judged_by_their_own_digits():
    """A rank-one covariance in complex64 has eigenvalues of 1e-8 that mean nothing."""
    rng = np.random.default_rng(8)
    H = complex_normal(rng, 6, 3).astype(np.complex64)
    C = strongest_user_covariance(H, 1.0, 2.0)
    with pytest.warns(RmtllmfWarning, match="singular to the precision of complex64"):
        rx = sic(H, 1.0, C)
    assert rx.mse.dtype == np.float32
    assert np.count_nonzero(rx.mse == 0) == 2


def test_silent_users():
    rng = np.random.default_rng(9)
    H, P, C = complex_normal(rng, 4, 3), np.array([1.0, 0.0, 0.5]), covariance("regular", rng)
    for design in (None, 0.1 * np.eye(4)):
        for receiver in (sic, lmmse):
            rx = receiver(H, P, C, designed_for=design)
            assert (rx.mse[1], rx.sinr[1], rx.rate[1], rx.gain[1]) == (1, 0, 0, 0)
            others = receiver(H[:, [0, 2]], P[[0, 2]], C, designed_for=design)
            np.testing.assert_allclose(rx.mse[[0, 2]], others.mse, rtol=1e-12)


def test_orders():
    H, P = np.diag([3.0, 1.0, 2.0]) + 0.1 + 0j, np.array([0.1, 1.0, 1.0])  # received: about 0.9, 1.0, 4.0
    weakest, strongest = sic(H, P, np.eye(3)), sic(H, P, np.eye(3), order="strongest_first")
    assert weakest.order.tolist() == [0, 1, 2]
    assert strongest.order.tolist() == [2, 1, 0]
    np.testing.assert_array_equal(sic(H, P, np.eye(3), order=[2, 1, 0]).mse, strongest.mse)
    assert lmmse(H, P, np.eye(3)).order is None


def test_batches_equal_single_calls():
    rng = np.random.default_rng(10)
    H, P = complex_normal(rng, 3, 1, 4, 3), rng.uniform(0.1, 1, (3, 1, 3))
    C = np.stack([covariance(kind, rng) for kind in ("regular", 2)])  # a singular item takes the others along
    order = np.array([[0, 1, 2], [2, 0, 1]])
    rx = sic(H, P, C, order=order, designed_for=np.eye(4))
    matched = sic(H, P, C, order=order)
    linear = lmmse(H, P, C)
    assert rx.mse.shape == (3, 2, 3)
    assert rx.order.shape == (3, 2, 3)
    for i in range(3):
        for j in range(2):
            one = sic(H[i, 0], P[i, 0], C[j], order=order[j], designed_for=np.eye(4))
            np.testing.assert_allclose(rx.error_covariance[i, j], one.error_covariance, atol=1e-12)
            np.testing.assert_allclose(matched.mse[i, j], sic(H[i, 0], P[i, 0], C[j], order=order[j]).mse, atol=1e-9)
            np.testing.assert_allclose(linear.mse[i, j], lmmse(H[i, 0], P[i, 0], C[j]).mse, atol=1e-9)


@pytest.fixture(scope="module")
def paper_draws():
    return UplinkScenario().draw(1500, seed=0, numpy=True)


@pytest.mark.parametrize(("jammer", "expected"), [("ideal", 0.0132), ("su", 0.146), ("sr", 0.210), ("barrage", 0.113)])
def test_the_papers_mean_squared_errors(paper_draws, jammer, expected):
    """The set-up that reproduces the paper's .013 / .16 / .21: an unaware receiver, strongest user first."""
    up = paper_draws
    P_N = 124 * up.noise
    C = {
        "ideal": lambda: 0.0,
        "su": lambda: strongest_user_covariance(up.H, up.P, P_N),
        "sr": lambda: worst_case_covariance(up.H, up.P, P_N, noise=up.noise),
        "barrage": lambda: barrage_covariance(up.H, P_N),
    }[jammer]()
    thermal = up.noise_covariance
    rx = sic(up.H, up.P, C + thermal, designed_for=thermal, order="strongest_first")
    assert rx.mse.mean() == pytest.approx(expected, rel=0.1)


def test_errors_of_an_unaware_receiver_are_strongly_correlated(paper_draws):
    up = paper_draws
    thermal = up.noise_covariance
    C = strongest_user_covariance(up.H, up.P, 124 * up.noise) + thermal
    E = sic(up.H, up.P, C, designed_for=thermal, order="strongest_first").error_covariance
    root = np.sqrt(np.einsum("bqq->bq", E).real)
    correlation = np.abs(E) / (root[:, :, None] * root[:, None, :])
    off = correlation[:, ~np.eye(8, dtype=bool)]
    assert off.mean() == pytest.approx(0.78, abs=0.05)


def test_gradients_pass_through_receivers_rates_and_the_simpler_jammers():
    """Against finite differences, in H, P, the jammer's power and the design; a white covariance is degenerate."""
    rng = np.random.default_rng(11)
    H = torch.from_numpy(complex_normal(rng, 3, 2)).requires_grad_()
    P = torch.tensor([1.0, 0.5], dtype=torch.float64, requires_grad=True)
    power = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    thermal = 0.3 * torch.eye(3, dtype=torch.float64)

    def outputs(H, P, power):
        jammed = strongest_user_covariance(H, P, power) + thermal
        white = barrage_covariance(H, power) + thermal
        unaware = sic(H, P, jammed, designed_for=white, order=[1, 0])
        linear = lmmse(H, P, white)
        return sum_rate(H, P, white), unaware.mse, unaware.rate, linear.error_covariance, sic(H, P, jammed).sinr

    assert torch.autograd.gradcheck(outputs, (H, P, power))


@pytest.mark.parametrize("weakness", [1e-3, 1e-8, 1e-14])
def test_small_rates_keep_their_digits(weakness):
    """Powers far below the noise: against the first-order expansion, whose error is the square of the SINR."""
    rng = np.random.default_rng(12)
    H, C = complex_normal(rng, 4, 3), covariance("regular", rng)
    exact = weakness * np.einsum("iq,ij,jq->q", H.conj(), np.linalg.inv(C), H).real
    for receiver in (sic, lmmse):
        rx = receiver(H, weakness, C)
        np.testing.assert_allclose(rx.sinr, exact, rtol=100 * weakness + 1e-12)
        np.testing.assert_allclose(rx.gain, exact, rtol=200 * weakness + 1e-12)
        np.testing.assert_allclose(np.diag(rx.noise_covariance).real, exact, rtol=200 * weakness + 1e-12)
        other = receiver(H, weakness, C, designed_for=2 * C)
        np.testing.assert_allclose(other.sinr, exact, rtol=200 * weakness + 1e-12)
    assert sum_rate(H, weakness, C) == pytest.approx(exact.sum(), rel=100 * weakness + 1e-12)
    assert sic(H, weakness, C).rate.sum() == pytest.approx(float(sum_rate(H, weakness, C)), rel=1e-12)


def test_a_loud_jammer_leaves_a_rate_that_three_functions_agree_on():
    rng = np.random.default_rng(13)
    H = complex_normal(rng, 6, 3)
    for P_N in 10.0 ** np.arange(3, 13, 3):
        found = worst_case(H, 1.0, P_N)
        total = sum_rate(H, 1.0, found.covariance)
        assert total == pytest.approx(sic(H, 1.0, found.covariance).rate.sum(), rel=1e-11)
        assert total == pytest.approx(float(found.sum_rate), rel=1e-11)


def test_the_precision_of_the_channel_does_not_decide_the_rank_of_the_noise():
    """60 dB between jammer and floor: in double precision nobody's noise is zero, whatever the channel's precision."""
    rng = np.random.default_rng(14)
    H = complex_normal(rng, 16, 8)
    C = strongest_user_covariance(H, 1.0, 1e6) + np.eye(16)
    coarse, fine = sic(H.astype(np.complex64), 1.0, C), sic(H, 1.0, C)
    np.testing.assert_allclose(coarse.rate, fine.rate, rtol=1e-4)
    assert np.isfinite(fine.rate).all()
    # a design in single precision is judged by its own digits, too
    design = strongest_user_covariance(H.astype(np.complex64), 1.0, 1.0)
    assert np.count_nonzero(np.abs(sic(H, 1.0, np.eye(16), designed_for=design).gain - 1) < 1e-12) == 7


@pytest.mark.parametrize("receiver", [sic, lmmse])
def test_a_singular_neighbour_changes_nothing_for_the_rest_of_the_batch(receiver):
    """Users that are nearly parallel and very loud, where squaring the condition would cost half the digits."""
    rng = np.random.default_rng(15)
    h, g = complex_normal(rng, 4, 1), complex_normal(rng, 4, 1)
    H = np.hstack([h, h + 1e-6 * g])
    regular, singular = np.eye(4), random_covariance(rng, 4, 2)
    both = receiver(H, 1e12, np.stack([regular, singular]))
    np.testing.assert_array_equal(both.mse[0], receiver(H, 1e12, regular).mse)
    np.testing.assert_array_equal(both.mse[1], receiver(H, 1e12, singular).mse)


def test_equally_strong_users_are_ordered_alike_by_jammer_and_receiver():
    rng = np.random.default_rng(16)
    h = complex_normal(rng, 500, 4, 1)
    # the same channel up to a unitary change: equal in exact arithmetic, with powers that make roundings differ
    H = np.concatenate([h, h[:, ::-1] * np.exp(1j), 2 * h], axis=-1) * 0.1
    P = np.array([0.3, 0.3, 0.075])
    C = strongest_user_covariance(H, P, 1.0)
    last = sic(H, P, np.eye(4)).order[:, -1]
    attacked = np.take_along_axis(H, last[:, None, None], axis=-1)[..., 0]
    aligned = np.einsum("bi,bij,bj->b", attacked.conj(), C, attacked).real / (np.abs(attacked) ** 2).sum(-1)
    np.testing.assert_allclose(aligned, 1.0)


def test_gradients_that_do_not_exist_are_refused():
    H = torch.eye(2, dtype=torch.complex128)
    P = torch.tensor([1.0, 0.0], requires_grad=True)
    C = torch.diag(torch.tensor([1.0, 0.0])).requires_grad_()
    for receiver in (sic, lmmse, sum_rate):
        with pytest.raises(TypeError, match="P: requires a gradient, but a user is silent"):
            receiver(H, P, torch.eye(2))
        with pytest.raises(TypeError, match="C: requires a gradient, but is singular"):
            receiver(H, 1.0, C)
        with torch.no_grad():
            receiver(H, P, C)


def test_an_order_as_a_tensor_makes_the_result_one():
    rx = sic(np.eye(2) + 0j, 1.0, np.eye(2), order=torch.tensor([1, 0]))
    assert isinstance(rx.mse, torch.Tensor)


@pytest.mark.filterwarnings("ignore:C. is singular to the precision of complex64")  # it is meant to be
@pytest.mark.parametrize("order", ["weakest_first", "shared", "own"])
@pytest.mark.parametrize("design", [None, "shared", "own", "singular"])
@pytest.mark.parametrize("kind", ["numpy", "torch", "single"])
def test_a_long_batch_in_parts_has_the_same_bits(monkeypatch, kind, design, order):
    """Draws and shared arguments, regular and singular noise in one batch, and a last part of a single draw."""
    rng = np.random.default_rng(9)
    draws = 25
    H, P = complex_normal(rng, draws, ANTENNAS, USERS), rng.uniform(0.2, 2.0, (draws, USERS))
    C = np.stack([covariance("regular" if k % 5 else 2, rng) for k in range(draws)])
    design = {
        None: None,
        "shared": covariance("regular", rng),
        "own": np.stack([covariance("regular", rng) for _ in range(draws)]),
        "singular": np.stack([covariance(k % 3 + 1, rng) for k in range(draws)]),
    }[design]
    order = {"shared": np.array([2, 0, 1]), "own": rng.permuted(np.tile(np.arange(USERS), (draws, 1)), axis=-1)}.get(
        order, order
    )
    if kind == "single":
        H, C = H.astype(np.complex64), C.astype(np.complex64)
    if kind == "torch":
        H, P, C = map(torch.from_numpy, (H, P, C))
    for receiver in ("sic", "lmmse"):
        if kind == "numpy" or receiver == "sic" or isinstance(order, str):
            whole = call(receiver, H, P, C, design, order)
            monkeypatch.setattr("rmtllmf.channel.receivers._CHUNK", 8)
            parts = call(receiver, H, P, C, design, order)
            monkeypatch.undo()
            for name, expected in vars(whole).items():
                found = getattr(parts, name)
                assert type(found) is type(expected), name
                if expected is not None:
                    assert found.dtype == expected.dtype, name
                    np.testing.assert_array_equal(found, expected, err_msg=name, strict=True)
                    end = (USERS, USERS) if name.endswith("covariance") else (USERS,)
                    assert found.shape == (draws, *end)


def test_what_is_and_what_is_not_received_in_parts(monkeypatch):
    """Gradients and errors are those of the whole batch; arguments that do not fit are not cut to fit."""
    monkeypatch.setattr("rmtllmf.channel.receivers._CHUNK", 4)
    lengths = []
    receive_part = receivers._receive
    monkeypatch.setattr(receivers, "_receive", lambda H, *rest: lengths.append(len(H)) or receive_part(H, *rest))
    rng = np.random.default_rng(10)
    H = complex_normal(rng, 8, ANTENNAS, USERS)
    C = np.stack([covariance("regular", rng) for _ in range(8)])
    sic(H, np.ones((8, USERS)), C, designed_for=C, order=np.tile(np.arange(USERS), (8, 1)))
    assert lengths == [4, 4]  # a third one would be the whole batch, after a part that did not fit
    lengths.clear()
    sic(H, [1.0, 2.0, 3.0], C[:1], order=[0, 1, 2])
    assert lengths == [4, 4]
    lengths.clear()
    leaf = torch.from_numpy(H).requires_grad_()
    sic(leaf, 1.0, C).mse.sum().backward()
    assert lengths == [8]
    assert leaf.grad is not None
    with pytest.raises(ShapeError, match="batch dimensions"):
        sic(H, 1.0, C[:4])
    with pytest.raises(ShapeError, match="does not broadcast"):
        lmmse(H, np.ones((4, USERS)).tolist(), C)
    H[6:, 0, 0] = np.nan
    with pytest.raises(NonFiniteError, match=f"2 non-finite entries of {H.size}"):
        lmmse(H, 1.0, C)
