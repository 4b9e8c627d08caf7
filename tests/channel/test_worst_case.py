"""The worst-case covariance against a convex solver, its optimality conditions, and anything that might be worse."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.oracles import complex_normal, log_det_rate, random_covariance, worst_case_by_cvxpy
from rmtllmf.channel import sum_rate, worst_case, worst_case_covariance, worst_case_rate
from rmtllmf.errors import ConvergenceError

SHAPES = {"tall": (4, 2), "square": (3, 3), "wide": (2, 4), "one user": (3, 1), "one antenna": (1, 3)}


def received_power(H, P):
    return (np.abs(H) ** 2 * np.asarray(P)[..., None, :]).sum((-2, -1))


def trace(C):
    return np.trace(C, axis1=-2, axis2=-1).real


@pytest.mark.filterwarnings("ignore:Solution may be inaccurate")  # the solver: accurate enough for what is asked
@pytest.mark.parametrize("floor", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_optimum_agrees_with_a_convex_solver(shape, floor):
    rng = np.random.default_rng(sum(shape))
    for _ in range(3):
        H, P, P_N = complex_normal(rng, *shape), rng.uniform(0.2, 2.0, shape[1]), rng.uniform(0.2, 3.0)
        found = worst_case(H, P, P_N, noise=floor)
        assert found.sum_rate == pytest.approx(worst_case_by_cvxpy(H, P, P_N, floor), rel=1e-6)


def test_conditions_of_optimality_over_twelve_orders_of_magnitude():
    """1,000 draws: trace, stationarity on jammed modes, no gain on the others; all relative, in the matrices."""
    rng = np.random.default_rng(0)
    draws, antennas, users = 1000, 8, 4
    H, P = complex_normal(rng, draws, antennas, users), rng.uniform(0.1, 1.0, (draws, users))
    T = received_power(H, P)
    P_N = T * 10 ** rng.uniform(-6, 6, draws)
    floor = T * 10 ** rng.uniform(-6, 6, draws)
    floor[::5] = 0.0
    found = worst_case(H, P, P_N, noise=floor)
    assert np.max(np.abs(trace(found.covariance) / P_N - 1)) < 1e-10

    # the gradient of the rate with respect to C on the signal space, U^H (C_n^-1 - (C_n + A)^-1) U, equals the level
    # wherever C is positive and lies below it elsewhere; U from an SVD that the solver does not use
    B = H * np.sqrt(P)[:, None, :]
    U, s, _ = np.linalg.svd(B, full_matrices=False)
    C_modes = U.conj().swapaxes(-1, -2) @ found.covariance @ U
    off = C_modes - C_modes * np.eye(users)
    assert np.max(np.abs(off) / P_N[:, None, None]) < 1e-10
    c, v = np.einsum("...ii->...i", C_modes).real, s**2
    noise = c + floor[:, None]
    gradient = v / (noise * (noise + v)) / found.level[:, None]
    jammed = c > 1e-9 * P_N[:, None]
    # c is known to 1e-16 P_N here, not relative to itself: allow for what that does to the gradient
    tolerance = 1e-10 + 1e-13 * P_N[:, None] / noise
    assert np.all(np.abs(gradient - 1)[jammed] < tolerance[jammed])
    assert np.all((gradient - 1)[~jammed] < tolerance[~jammed])
    assert jammed.any(axis=1).all()


def test_stationarity_is_exact_where_the_floor_is_far_above_the_jammer():
    """The case in which sigma - s2 cancels: every c is accurate relative to itself."""
    v = np.array([1.0, 0.9, 0.5])
    H = np.diag(np.sqrt(v)) + 0j
    for floor in (1.0, 1e3, 1e6):
        C = worst_case(H, 1.0, 1e-6, noise=floor)
        c = np.diag(C.covariance).real
        assert c.sum() == pytest.approx(1e-6, rel=1e-14)
        # for c << floor: v/(floor + c)(floor + c + v), linear in c; solved in extended precision
        jammed = c > 0
        noise = np.longdouble(c) + np.longdouble(floor)
        gradient = (v / (noise * (noise + v)))[jammed]
        assert np.ptp(gradient) / gradient.max() < 1e-15 + 1e-9 * 1e-6 / floor


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_no_covariance_does_more_harm(floor):
    rng = np.random.default_rng(1)
    H, P, P_N = complex_normal(rng, 4, 3), np.array([1.0, 0.5, 0.2]), 2.0
    found = worst_case(H, P, P_N, noise=floor)
    eye = np.eye(4)
    rates = []
    for k in range(5000):
        C = P_N * random_covariance(rng, 4)
        if k % 2:  # half of them close to the optimum, where a mistake would show
            share = 10 ** rng.uniform(-6, 0)
            C = (1 - share) * found.covariance + share * C
        rates.append(log_det_rate(H, P, C + (floor + 1e-300) * eye))
    assert min(rates) >= found.sum_rate * (1 - 1e-12)
    assert min(rates) < found.sum_rate * (1 + 1e-3)  # and some of them came close


def test_no_power_vector_below_full_power_raises_the_rate():
    rng = np.random.default_rng(2)
    H, P, floor = complex_normal(rng, 4, 3), np.array([1.0, 0.5, 0.2]), 0.1
    found = worst_case(H, P, 2.0, noise=floor)
    C = found.covariance + floor * np.eye(4)
    for _ in range(2000):
        assert log_det_rate(H, P * rng.uniform(0, 1, 3), C) <= found.sum_rate


@given(st.integers(-20, 20), st.integers(0, 10**6), st.booleans())
def test_scale_invariance(exponent, seed, with_floor):
    """All powers times 10^k: the same rate, the covariance times 10^k."""
    rng = np.random.default_rng(seed)
    H, P, P_N = complex_normal(rng, 4, 3), rng.uniform(0.1, 1.0, 3), rng.uniform(0.1, 10)
    floor = rng.uniform(0, 1) if with_floor else 0.0
    factor = 10.0**exponent
    plain = worst_case(H, P, P_N, noise=floor)
    for scaled in (
        worst_case(H, P * factor, P_N * factor, noise=floor * factor),
        worst_case(H * np.sqrt(factor), P, P_N * factor, noise=floor * factor),
    ):
        assert scaled.sum_rate == pytest.approx(plain.sum_rate, rel=1e-11)
        np.testing.assert_allclose(scaled.covariance / factor, plain.covariance, rtol=0, atol=1e-11 * P_N)
        assert scaled.level * factor == pytest.approx(plain.level, rel=1e-11)


def test_both_gram_routes_agree():
    """A silent user more makes Q >= N_R, and so changes the route, but not the problem."""
    rng = np.random.default_rng(3)
    H, P = complex_normal(rng, 4, 3), np.array([1.0, 0.5, 0.2])
    wider, silent = np.concatenate([H, complex_normal(rng, 4, 2)], axis=1), np.append(P, [0.0, 0.0])
    for floor in (0.0, 0.3):
        np.testing.assert_allclose(
            worst_case_covariance(H, P, 1.5, noise=floor),
            worst_case_covariance(wider, silent, 1.5, noise=floor),
            atol=1e-14,
        )


@pytest.mark.parametrize("floor", [0.0, 0.2])
def test_rank_deficient_channels(floor):
    """Two users with the same channel are one user of the summed power; a nearly equal one changes nearly nothing."""
    rng = np.random.default_rng(4)
    h, g = complex_normal(rng, 5, 1), complex_normal(rng, 5, 1)
    merged = worst_case(np.hstack([h, g]), np.array([3.0, 1.0]), 1.0, noise=floor)
    for gap in (0.0, 1e-13, 1e-9):
        split = worst_case(np.hstack([h, h + gap * g, g]), np.array([1.0, 2.0, 1.0]), 1.0, noise=floor)
        np.testing.assert_allclose(split.covariance, merged.covariance, atol=1e-12 + 3 * gap)
        assert trace(split.covariance) == pytest.approx(1.0, rel=1e-12)


def test_physical_scales():
    """1e-17 W: nothing under- or overflows, and the trace is exact."""
    rng = np.random.default_rng(5)
    H = 1e-6 * complex_normal(rng, 200, 16, 8)
    found = worst_case(H, 1e-4, 3e-17, noise=2.5e-19)
    np.testing.assert_allclose(trace(found.covariance), 3e-17, rtol=1e-13)
    rate = sum_rate(H, 1e-4, found.covariance + 2.5e-19 * np.eye(16))
    np.testing.assert_allclose(found.sum_rate, rate, rtol=1e-12)


def test_envelope_theorem():
    """-level is the derivative of the optimal rate with respect to the jammer's power."""
    rng = np.random.default_rng(6)
    H, P = complex_normal(rng, 4, 3), np.array([1.0, 0.5, 0.2])
    for floor in (0.0, 0.4):
        step = 1e-5
        up, down = (worst_case(H, P, 1.0 + d, noise=floor).sum_rate for d in (step, -step))
        assert -worst_case(H, P, 1.0, noise=floor).level == pytest.approx((up - down) / (2 * step), rel=1e-8)


def test_limits():
    rng = np.random.default_rng(7)
    H = complex_normal(rng, 4, 3)
    assert np.all(worst_case_covariance(H, 1.0, 0.0) == 0)
    assert worst_case(H, 1.0, 0.0).sum_rate == np.inf
    quiet = worst_case(H, 1.0, 0.0, noise=0.5)
    assert quiet.sum_rate == pytest.approx(log_det_rate(H, np.ones(3), 0.5 * np.eye(4)))
    np.testing.assert_allclose(worst_case_covariance(H, 0.0, 2.0), 0.5 * np.eye(4))
    assert worst_case(H, 0.0, 2.0).sum_rate == 0
    # one user: all power along its channel
    h = H[:, :1]
    np.testing.assert_allclose(
        worst_case_covariance(h, 1.0, 2.0, noise=0.1), 2 * h @ h.conj().T / trace(h @ h.conj().T)
    )
    # no floor and a weak jammer: c ~ sqrt(v); an overwhelming one: c ~ v^(1/2) again from v/(c^2) = nu
    v = np.array([4.0, 1.0])
    strong = worst_case_covariance(np.diag(np.sqrt(v)) + 0j, 1.0, 1e9)
    np.testing.assert_allclose(np.diag(strong).real, 1e9 * np.sqrt(v) / np.sqrt(v).sum(), rtol=1e-6)
    weak = worst_case_covariance(np.diag(np.sqrt(v)) + 0j, 1.0, 1e-9)
    np.testing.assert_allclose(np.diag(weak).real, [5e-10, 5e-10], rtol=1e-6)


def test_the_strongest_modes_are_jammed_first():
    H = np.diag([2.0, 1.5, 1.0]) + 0j
    # with v = 4, 2.25, 1 the second mode is jammed from P_N = 0.127 on, the third from 0.741
    counts = []
    for P_N in (0.12, 0.13, 0.73, 0.75):
        c = np.diag(worst_case_covariance(H, 1.0, P_N, noise=1.0)).real
        assert np.all(np.diff(c) <= 0)
        counts.append(np.count_nonzero(c))
    assert counts == [1, 2, 2, 3]


def test_batches_and_broadcasting_equal_single_calls():
    rng = np.random.default_rng(8)
    H, P = complex_normal(rng, 5, 1, 4, 3), rng.uniform(0.1, 1, (5, 1, 3))
    P_N, floor = np.array([0.5, 2.0]), np.array([[0.0], [0.1], [0.0], [3.0], [1e3]])
    found = worst_case(H, P, P_N, noise=floor)
    assert found.covariance.shape == (5, 2, 4, 4)
    assert found.sum_rate.shape == found.level.shape == (5, 2)
    for i in range(5):
        for j in range(2):
            single = worst_case(H[i, 0], P[i, 0], P_N[j], noise=floor[i, 0])
            np.testing.assert_allclose(found.covariance[i, j], single.covariance, rtol=1e-11, atol=1e-13)
            assert found.sum_rate[i, j] == pytest.approx(single.sum_rate, rel=1e-12)
    diagonal = worst_case_covariance(H[:, 0], np.stack([np.diag(p[0]) for p in P]), 0.5)
    np.testing.assert_array_equal(diagonal, worst_case_covariance(H[:, 0], P[:, 0], 0.5))


def test_kinds_and_precisions():
    """NumPy in, NumPy out, the same bits as torch; complex64 stays complex64, computed in double inside."""
    rng = np.random.default_rng(9)
    H = complex_normal(rng, 6, 4, 3)
    from_numpy = worst_case(H, 0.5, 2.0, noise=0.1)
    from_torch = worst_case(torch.from_numpy(H), 0.5, 2.0, noise=0.1)
    assert isinstance(from_numpy.covariance, np.ndarray)
    assert isinstance(from_torch.covariance, torch.Tensor)
    np.testing.assert_array_equal(from_numpy.covariance, from_torch.covariance.numpy())
    np.testing.assert_array_equal(from_numpy.level, from_torch.level.numpy())
    single = worst_case(H.astype(np.complex64) * np.float32(1e-6), 1e-4, 1e-17)
    assert single.covariance.dtype == np.complex64
    assert single.sum_rate.dtype == np.float32
    exact = worst_case(H.astype(np.complex64).astype(complex) * np.float32(1e-6), 1e-4, 1e-17)
    np.testing.assert_allclose(single.covariance, exact.covariance, atol=1e-6 * 1e-17)


@given(st.integers(0, 10**6), st.sampled_from(list(SHAPES.values())), st.floats(-8, 8), st.floats(-8, 8))
def test_the_result_is_always_a_covariance(seed, shape, jammer, floor):
    rng = np.random.default_rng(seed)
    H = complex_normal(rng, *shape) * 10 ** rng.uniform(-3, 3, shape[1])
    P_N = 10.0**jammer
    C = worst_case_covariance(H, 1.0, P_N, noise=10.0**floor)
    np.testing.assert_array_equal(C, C.conj().T)
    assert np.linalg.eigvalsh(C).min() > -1e-14 * P_N
    assert trace(C) == pytest.approx(P_N, rel=1e-10)


def test_nearly_parallel_users():
    """Where the Gram matrix loses the digits of its small eigenvalue: the trace stays exact, and so does the rate."""
    rng = np.random.default_rng(10)
    h, g = complex_normal(rng, 5, 1), complex_normal(rng, 5, 1)
    for gap in 10.0 ** np.arange(-8, 0.5, 0.25):
        H = np.hstack([h, h + gap * g])
        for P_N in (1e-9, 1.0):
            found = worst_case(H, 1.0, P_N)
            assert trace(found.covariance) == pytest.approx(P_N, rel=1e-10)
            # from singular values, which keep what the Gram matrix loses
            v = np.linalg.svd(H, compute_uv=False) ** 2
            v = v[v > 1e-30]
            low, high = 1e-12, 1e40
            for _ in range(400):
                nu = np.sqrt(low * high)
                c = 2 * np.sqrt(v) / (np.sqrt(nu) * (np.sqrt(v * nu) + np.sqrt(v * nu + 4)))
                low, high = (nu, high) if c.sum() > P_N else (low, nu)
            assert found.sum_rate == pytest.approx(np.log1p(v / c).sum(), rel=1e-9)


def test_powers_beyond_double_precision_are_an_error():
    with pytest.raises(ConvergenceError, match="underflows double"):
        worst_case(np.array([[1e160 + 0j]]), 1.0, 1.0)


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_single_precision_in_both_kinds(kind):
    H = kind(complex_normal(np.random.default_rng(11), 3, 2).astype(np.complex64))
    found = worst_case(H, 1.0, 2.0, noise=0.1)
    assert "complex64" in str(found.covariance.dtype)
    assert "float32" in str(found.sum_rate.dtype)
    assert "float32" in str(found.level.dtype)
    rate = sum_rate(H, 1.0, found.covariance + 0.1 * (np.eye(3) if kind is np.asarray else torch.eye(3)))
    assert "float32" in str(rate.dtype)
    assert float(rate) == pytest.approx(float(found.sum_rate), rel=1e-5)


def test_the_callers_arrays_are_neither_changed_nor_shared():
    H, P = complex_normal(np.random.default_rng(12), 3, 2), np.ones(2)
    H.flags.writeable = P.flags.writeable = False
    big_endian = H.astype(">c16")
    np.testing.assert_allclose(
        worst_case_covariance(big_endian, P.astype(np.uint8), 1.0), worst_case_covariance(H, P, 1.0), atol=1e-14
    )


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_rate_alone_is_the_same(shape):
    rng = np.random.default_rng(13)
    H = complex_normal(rng, 50, *shape)
    H[0] = 0  # silent
    H[1] = H[1, :, :1]  # rank one
    P_N, noise = rng.uniform(0, 3, 50), rng.uniform(0, 1, 50)
    noise[::2] = 0
    np.testing.assert_allclose(
        worst_case_rate(H, 0.5, P_N, noise=noise), worst_case(H, 0.5, P_N, noise=noise).sum_rate, rtol=1e-12
    )
    power = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    worst_case_rate(torch.from_numpy(H[2]), 0.5, power, noise=0.1).backward()
    assert float(power.grad) == pytest.approx(-float(worst_case(H[2], 0.5, 1.0, noise=0.1).level))


def test_no_draws():
    out = np.empty((0, 3, 3), dtype=complex)
    assert worst_case_covariance(np.empty((0, 3, 2), dtype=complex), 1.0, 2.0, out=out) is out
