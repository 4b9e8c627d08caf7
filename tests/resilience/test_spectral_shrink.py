"""Optimal shrinkage against its closed forms, against naive transcriptions, and what it does to the risk."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.bad_receptions import EVERY, GOOD
from helpers.draws import normal
from helpers.known_errors import correlated
from helpers.spectral_shrinkage import equicorrelated, error, low_rank, naive, orthonormal, shrunk, with_noise
from rmtllmf.channel import transmit
from rmtllmf.errors import InputError, NonFiniteError, StateMismatchError
from rmtllmf.resilience.spectral_shrink import spectral_shrink
from rmtllmf.taskvec import TaskVector


@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (30, 30), (1, 9), (9, 1), (150, 200)])
@pytest.mark.parametrize("level", [1e-12, 0.3, 1.0, 1e12])
def test_it_is_the_formula_written_out(shape, level):
    spikes = low_rank(*shape, [90.0, 14.0, 9.0][: min(shape)], seed=1)
    X = level * (spikes + 0.8 * normal(*shape, seed=2))
    (found,) = shrunk([X], [(0.8 * level) ** 2])
    np.testing.assert_allclose(found, naive(X, 0.8 * level), rtol=0, atol=1e-11 * float(X.norm()))


def test_weak_singular_values_beside_an_enormous_one_are_seen():
    X = 1e9 * low_rank(20, 40, [1.0], seed=1) + low_rank(20, 40, [15.0], seed=2) + normal(20, 40, seed=3)
    (found,) = shrunk([X], [1.0])
    new, expected = np.linalg.svd(found, compute_uv=False), np.linalg.svd(naive(X, 1.0), compute_uv=False)
    assert expected[1] > 5
    np.testing.assert_allclose(new[1], expected[1], rtol=1e-5)
    np.testing.assert_allclose(found, naive(X, 1.0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("signal", [0.6, 1.1, 1.5, 3.0])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_risk_of_a_spike_is_the_asymptotic_one(signal, transposed):
    """Within 8 %: the mean of 12 draws of 120 x 240, one of which is off by about 1/sqrt(120)."""
    m, n, beta = 120, 240, 0.5
    x = signal
    if x <= beta**0.25:
        expected = x**2
    else:  # Gavish and Donoho: the cosines between the singular vectors with and without noise
        left, right = (x**4 - beta) / (x**4 + beta * x**2), (x**4 - beta) / (x**4 + x**2)
        expected = x**2 * (1 - left * right)
    risks = []
    for seed in range(12):
        A, Z = low_rank(m, n, [x * n**0.5], seed), normal(m, n, seed=seed + 500)
        if transposed:
            A, Z = A.T, Z.T
        risks.append(error(shrunk([A + Z], [1.0]), [A]) / n)
    assert np.mean(risks) == pytest.approx(expected, rel=0.08)


@given(
    shape=st.tuples(st.integers(24, 60), st.integers(24, 60)),
    rank=st.integers(0, 60),
    decay=st.floats(0, 3),
    snr=st.floats(-30, 50),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=80)
def test_the_error_is_never_above_that_of_what_was_received(shape, rank, decay, snr, seed):
    """But for 15 % of the noise's energy: the formula, and the estimate of its error, are for large matrices."""
    rank = min(rank, *shape)
    A = low_rank(*shape, torch.arange(1, rank + 1, dtype=torch.float64) ** -decay, seed)
    if rank:
        A *= (10 ** (snr / 10) * A.numel()) ** 0.5 / A.norm()
    Z = normal(*shape, seed=seed + 1)
    assert error(shrunk([A + Z], [1.0]), [A]) <= 1.15 * float(Z.square().sum())


@pytest.mark.parametrize("shape", [(40, 42), (60, 30)])
@pytest.mark.parametrize("snr", [-20, 0, 4, 8, 14, 22, 30])
def test_nor_where_ranks_are_high(shape, snr):
    """Here the bare formula loses up to 1.8 times the noise's energy."""
    bare = []
    for decay in (0.0, 0.3, 0.7, 1.0, 1.4):
        for rank in (6, 15, 22, 30):
            A = low_rank(*shape, torch.arange(1, rank + 1, dtype=torch.float64) ** -decay, rank)
            A *= (10 ** (snr / 10) * A.numel()) ** 0.5 / A.norm()
            Z = normal(*shape, seed=rank + 1)
            received = float(Z.square().sum())
            assert error(shrunk([A + Z], [1.0]), [A]) <= 1.15 * received
            bare.append(error([torch.from_numpy(naive(A + Z, 1.0))], [A]) / received)
    assert shape[0] == 60 or snr != 8 or max(bare) > 1.3


def test_pure_noise_comes_back_as_zeros():
    """In four of five draws at least (the largest value of noise is below the edge in about 83 %), else as little."""
    draws = [normal(30, 50, seed=seed) for seed in range(300)]
    found = shrunk(draws, [1.0] * len(draws))
    assert sum(not bool(X.any()) for X in found) >= 0.8 * len(draws)
    assert error(found, [0 * X for X in found]) <= 0.005 * 30 * 50 * len(draws)


@given(shape=st.tuples(st.integers(1, 12), st.integers(1, 12)), snr=st.floats(-10, 30), seed=st.integers(0, 2**20))
@settings(max_examples=50)
def test_turned_matrices_give_turned_results(shape, snr, seed):
    X = 10 ** (snr / 20) * normal(*shape, seed=seed) + normal(*shape, seed=seed + 1)
    R, P = orthonormal(shape[0], shape[0], seed + 2), orthonormal(shape[1], shape[1], seed + 3)
    (plain,) = shrunk([X], [1.0])
    (turned,) = shrunk([R @ X @ P], [1.0])
    tolerance = 1e-6 * float(X.norm())  # rounding at the edge grows as a root
    torch.testing.assert_close(turned, R @ plain @ P, rtol=0, atol=tolerance)
    (flipped,) = shrunk([X.T.contiguous()], [1.0])
    torch.testing.assert_close(flipped, plain.T, rtol=0, atol=tolerance)


def test_noise_free_matrices_come_back_unchanged():
    X = normal(6, 9)
    for joint in (False, True):
        quiet, loud = shrunk([X, X], [0.0, 4.0], joint=joint)
        assert torch.equal(quiet, X)
        assert not torch.equal(loud, X)
    received = [{"w": torch.zeros(4, 5)}]  # measured scale 0
    assert not spectral_shrink(received, [0.3])[0]["w"].any()


def test_a_measured_scale_is_the_senders():
    sent = [{"b": torch.zeros(50), "w": low_rank(60, 90, [3.0, 2.0], seed=q)} for q in range(2)]
    received = transmit(sent, [0.2, 0.6], seed=1)
    scales = [float((vector["w"].square().sum() / (60 * 90 + 50)).sqrt()) for vector in sent]
    for q, vector in enumerate(spectral_shrink(received, [0.2, 0.6])):
        mse = (0.2, 0.6)[q]
        expected = naive(received[q]["w"], scales[q] * mse**0.5)
        assert float((vector["w"] - torch.from_numpy(expected)).norm() / np.linalg.norm(expected)) < 0.02
        assert error([vector["w"]], [sent[q]["w"]]) < 0.2 * error([received[q]["w"]], [sent[q]["w"]])


# Estimators, forms, kinds of entries


@pytest.mark.parametrize("mse", [[0.3, 0.6], [[0.3, 0.6], [0.5, 0.1], [0.2, 0.2]]])
@pytest.mark.parametrize("joint", [False, True])
def test_mmse_is_unbiased_times_the_gain(mse, joint):
    X = [low_rank(12, 20, [20.0], seed=q) + normal(12, 20, seed=q + 5) for q in range(2)]
    gain = 1 - torch.tensor(mse, dtype=torch.float64).reshape(-1, 2)
    rows = gain.repeat_interleave(12 // len(gain), 0)
    scaled = [x * rows[:, q, None] for q, x in enumerate(X)]
    unbiased = shrunk(X, mse, estimator="unbiased", joint=joint)
    for a, b in zip(shrunk(scaled, mse, estimator="mmse", joint=joint), unbiased, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
        assert a.any()


def test_correlated_noise_behind_gains():
    V, gain = equicorrelated(0.7, [0.5, 0.8]), torch.tensor([0.8, -0.4], dtype=torch.float64)
    A = [low_rank(20, 30, [20.0], seed=q) for q in range(2)]
    X = with_noise([g * a for g, a in zip(gain, A, strict=True)], V, seed=7)
    found = shrunk(X, correlated(V, gain), estimator="mmse", joint=True)
    divided = [x / g for g, x in zip(gain, X, strict=True)]
    for a, b in zip(found, shrunk(divided, correlated(V / (gain[:, None] * gain)), joint=True), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_kernels_are_matrices_of_output_channels_and_nothing_else_is_one():
    kernel = (low_rank(10, 36, [30.0], seed=1) + normal(10, 36, seed=2)).view(10, 4, 3, 3)
    others = {"bias": normal(10), "scalar": normal(1)[0], "conv1d": normal(4, 3, 5), "empty": normal(0, 5)}
    received = {"kernel": kernel, **others, "steps": torch.tensor(3), "bn.running_mean": normal(4)}
    before = {key: tensor.clone() for key, tensor in received.items()}
    for estimator in ("additive", "mmse"):
        (found,) = spectral_shrink([received], [0.5], estimator=estimator, scale=1.0)
        assert list(found) == list(received)
        for key in received:
            torch.testing.assert_close(received[key], before[key], rtol=0, atol=0)
            assert key == "empty" or found[key].data_ptr() != received[key].data_ptr()
            assert key == "kernel" or torch.equal(found[key], received[key])
    (found,) = spectral_shrink([received], [0.5], scale=1.0)
    np.testing.assert_allclose(found["kernel"].view(10, 36), naive(kernel.view(10, 36), 0.5**0.5), atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_memory_layouts(dtype):
    X = (low_rank(30, 20, [30.0, 20.0], seed=1) + normal(30, 20, seed=2)).to(dtype)
    for given_ in (X, X.T.contiguous().T, X.repeat(1, 2)[:, :20]):
        (found,) = shrunk([given_], [1.0])
        assert found.dtype == dtype
        expected = naive(X.double(), 1.0)
        bound = torch.finfo(dtype).eps * float(np.abs(expected).max()) + 1e-12
        np.testing.assert_allclose(found.double(), expected, rtol=0, atol=bound)


def test_task_vectors_ties_and_skip():
    X, Y = (low_rank(20, 30, [30.0], seed=q) + normal(20, 30, seed=q) for q in (1, 2))
    vectors = [TaskVector({"embed": x, "head": x, "w": x.clone()}) for x in (X, Y)]
    found = spectral_shrink(vectors, [1.0, 2.0], scale=1.0, skip=("he*",))
    for vector, x in zip(found, (X, Y), strict=True):
        assert isinstance(vector, TaskVector)
        assert vector["embed"] is vector["head"]
        assert torch.equal(vector["embed"], x)
        assert not torch.equal(vector["w"], x)
    tied = spectral_shrink(vectors, [1.0, 2.0], scale=1.0, joint=True)[1]
    assert tied["embed"] is tied["head"]
    np.testing.assert_allclose(tied["embed"], naive(Y, 2**0.5), atol=1e-11)


def test_the_same_bits_for_any_number_of_threads():
    V = equicorrelated(0.6, [1.0, 1.2, 0.8])
    received = [
        {f"w{i}": low_rank(130, 140 + i, [40.0], seed=q) + normal(130, 140 + i, seed=q + i) for i in range(4)}
        for q in range(3)
    ]
    before = torch.get_num_threads()
    for joint in (False, True):
        results = []
        try:
            for threads in (1, 3):
                torch.set_num_threads(threads)
                results.append(spectral_shrink(received, correlated(V), scale=1.0, joint=joint))
        finally:
            torch.set_num_threads(before)
        for a, b in zip(*results, strict=True):
            assert all(torch.equal(a[key], b[key]) for key in a)


BAD = {
    **EVERY,
    "other keys": (([GOOD[0], {"w": torch.eye(4)}], [0.1, 0.1]), {}, StateMismatchError, "lacks 'b'"),
    "negative": ((GOOD, [0.1, -0.1]), {}, InputError, "at least 0"),
    "scale": ((GOOD, [0.1, 0.1]), {"scale": "peak"}, InputError, "scale: the peak"),
    "joint": ((GOOD, [0.1, 0.1]), {"joint": "yes"}, TypeError, "joint: expected a bool, got str"),
    "skip": ((GOOD, [0.1, 0.1]), {"skip": "v*"}, InputError, re.escape("skip: 'v*' matches none")),
    "skip type": ((GOOD, [0.1, 0.1]), {"skip": 3}, TypeError, "skip: expected names"),
    "silent": ((GOOD, [1.0, 0.1]), {"estimator": "mmse"}, InputError, "gain of 'w' is 0 for a silent user"),
    "NaN": (
        ([{"w": torch.full((2, 2), torch.nan)}], [0.1]),
        {"scale": 1.0},
        NonFiniteError,
        re.escape("received[0]['w'] holds NaN"),
    ),
    "overflow": (
        ([{"w": torch.full((4, 4), 6e4, dtype=torch.float16)}], [0.9]),
        {"scale": 1.0, "estimator": "mmse"},
        NonFiniteError,
        re.escape("received[0]['w']: the estimate overflows torch.float16"),
    ),
    "gradient": (([{"w": torch.eye(2, requires_grad=True)}], [0.1]), {}, InputError, "wants gradients"),
    "complex": (([{"w": torch.eye(2) + 0j}], [0.1]), {}, TypeError, "complex"),
    "blocks": (([{"w": torch.eye(2)}], [[0.1]] * 3), {}, InputError, "3 blocks are more than the 2 symbols"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    arguments, options, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        spectral_shrink(*arguments, **options)
