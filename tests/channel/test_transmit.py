"""What is added to a vector is what was asked for: per estimator and scale, across users, real and imaginary part."""

import math

import numpy as np
import pytest
import torch

from helpers.oracles import complex_normal
from helpers.transmitted import USERS, check_covariance, flat, noise_covariance, reference_scale
from rmtllmf._random import generator
from rmtllmf.channel import Reception, lmmse, sic, transmit
from rmtllmf.errors import NotPSDError, ShapeError
from rmtllmf.metrics import snr_db
from rmtllmf.taskvec import TaskVector


@pytest.mark.parametrize("scale", ["rms", "peak", "tensor_rms", "tensor_peak", 0.01])
@pytest.mark.parametrize("estimator", ["additive", "mmse", "unbiased"])
def test_error_covariance_over_a_vision_transformer(vectors, mismatched, estimator, scale):
    if scale in ("tensor_rms", "tensor_peak"):
        vectors = [vector.select("transformer.*") for vector in vectors]
    received = transmit(vectors, mismatched, seed=4, estimator=estimator, scale=scale)
    assert all(isinstance(vector, TaskVector) for vector in received)
    gain = mismatched.gain if estimator == "mmse" else np.ones(USERS)
    errors = torch.stack(
        [
            (flat(got) - g * flat(sent)) / reference_scale(sent, scale)
            for got, sent, g in zip(received, vectors, gain, strict=True)
        ]
    )
    expected = noise_covariance(mismatched, estimator)
    assert np.abs(expected.imag).max() > 0.01
    check_covariance(errors, expected)


@pytest.mark.parametrize("estimator", ["additive", "mmse", "unbiased"])
def test_bare_mse_is_a_matched_receiver_with_independent_errors(vectors, estimator):
    mu = np.array([0.05, 0.3, 0.9])
    received = transmit(vectors, mu, seed=1, estimator=estimator)
    gain = 1 - mu if estimator == "mmse" else np.ones(USERS)
    errors = torch.stack(
        [(flat(r) - g * flat(v)) / reference_scale(v, "rms") for r, v, g in zip(received, vectors, gain, strict=True)]
    )
    variance = {"additive": mu, "mmse": mu * (1 - mu), "unbiased": mu / (1 - mu)}[estimator]
    check_covariance(errors, np.diag(variance).astype(complex))
    if estimator == "mmse":  # the total error of the MMSE estimate of a unit-variance symbol is the MSE again
        for r, v, m in zip(received, vectors, mu, strict=True):
            assert -snr_db(v, r) == pytest.approx(10 * math.log10(m), abs=0.05)


def test_block_fading_over_consecutive_equal_parts(vectors):
    mu = np.array([[0.01, 0.1, 1.0], [0.5, 0.05, 0.0], [0.2, 0.2, 0.2]])
    received = transmit(vectors, mu, seed=1)
    for q in range(USERS):
        error = ((flat(received[q]) - flat(vectors[q])) / reference_scale(vectors[q], "rms")).numpy()
        symbols = -(-len(error) // 2)
        for block, part in enumerate(np.split(error, [2 * -(-symbols // 3), 2 * -(-2 * symbols // 3)])):
            spread = 5 * math.sqrt(2 / len(part))
            assert np.mean(part**2) == pytest.approx(mu[block, q], rel=spread, abs=1e-12)
    batch = lmmse(complex_normal(np.random.default_rng(0), 2, 4, USERS), 1.0, np.eye(4))
    assert len(transmit(vectors, batch, seed=1)) == USERS


def test_the_same_bits_whatever_the_key_order_and_number_of_threads(vectors, mismatched):
    first = transmit(vectors, mismatched, seed=9)
    backwards = [{key: vector[key] for key in reversed(list(vector))} for vector in vectors]
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            again = transmit(backwards, mismatched, seed=9)
            assert all(torch.equal(a[key], b[key]) for a, b in zip(first, again, strict=True) for key in a)
    finally:
        torch.set_num_threads(threads)
    assert list(again[0]) == list(backwards[0])
    other = transmit(vectors, mismatched, seed=10)
    assert not any(torch.equal(a[key], b[key]) for a, b in zip(first, other, strict=True) for key in a)


def test_randomness_is_explicit(vectors):
    small = [vector.select("conv1.weight") for vector in vectors]
    torch.manual_seed(0)
    before = torch.get_rng_state()
    transmit(small, 0.1, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    generator = torch.Generator().manual_seed(3)
    one, two = (transmit(small, 0.1, seed=generator)[0]["conv1.weight"] for _ in range(2))
    assert not torch.equal(one, two)
    assert torch.equal(one, transmit(small, 0.1, seed=torch.Generator().manual_seed(3))[0]["conv1.weight"])


def test_noise_is_white_along_the_vector(vectors):
    """No repetition between chunks, tensors or users: no lag correlates, and chunks are uncorrelated."""
    received = transmit(vectors, 1.0, seed=5)
    errors = [(flat(r) - flat(v)) / reference_scale(v, "rms") for r, v in zip(received, vectors, strict=True)]
    n = len(errors[0])
    for lag in (1, 2, 1 << 16, 1 << 17):
        assert abs(float((errors[0][lag:] * errors[0][:-lag]).mean())) < 5 / math.sqrt(n - lag)
    assert abs(float((errors[0] * errors[1]).mean())) < 5 / math.sqrt(n)
    assert abs(float(errors[0].pow(4).mean()) - 3) < 5 * math.sqrt(96 / n)  # Gaussian kurtosis


def test_integers_running_statistics_and_ties_are_carried():
    weight = torch.linspace(-1, 1, 50)
    sent = {
        "steps": torch.tensor(7),
        "mask": torch.tensor([True, False]),
        "bn.running_var": torch.ones(4),
        "head.weight": weight,
        "embed.weight": weight,
    }
    (got,) = transmit([sent], [0.5], seed=0)
    assert list(got) == list(sent)
    for key in ("steps", "mask", "bn.running_var"):
        assert torch.equal(got[key], sent[key])
    assert got["head.weight"].data_ptr() == got["embed.weight"].data_ptr()  # sent once
    assert not torch.equal(got["head.weight"], weight)
    assert torch.equal(weight, torch.linspace(-1, 1, 50))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_come_back(dtype):
    sent = {"w": torch.linspace(-1, 1, 20_000, dtype=torch.float64).to(dtype).view(100, 200).T}
    (got,) = transmit([sent], 0.25, seed=0)
    assert got["w"].dtype == dtype
    assert got["w"].shape == sent["w"].shape
    assert snr_db({"w": sent["w"].double()}, {"w": got["w"].double()}) == pytest.approx(6.02, abs=0.2)


def test_no_noise_is_no_change_and_empty_tensors_pass():
    sent = {"w": torch.tensor([1.0, -2.0, 3.0]), "empty": torch.empty(0, 3)}
    for estimator in ("additive", "mmse", "unbiased"):
        (got,) = transmit([sent], 0.0, seed=0, estimator=estimator)
        assert torch.equal(got["w"], sent["w"])
        assert got["empty"].shape == (0, 3)
    (got,) = transmit([{"w": torch.zeros(1000)}], 0.25, seed=0, scale=2.0)  # a numeric scale needs no normalising
    assert float(got["w"].std()) == pytest.approx(1.0, rel=0.1)


def test_a_hard_nulled_reception_is_exact_for_the_users_who_escape():
    rng = np.random.default_rng(3)
    H = complex_normal(rng, 4, 2)
    C = np.outer(H[:, 0], H[:, 0].conj())
    rx = sic(H, 1.0, C, order=[1, 0])
    sent = [{"w": torch.randn(100, generator=torch.Generator().manual_seed(q))} for q in range(2)]
    got = transmit(sent, rx, seed=0)
    assert torch.equal(got[1]["w"], sent[1]["w"])
    assert not torch.equal(got[0]["w"], sent[0]["w"])


def test_gradients_reach_the_mse_and_the_vectors():
    """d/dmu of x + sqrt(mu) n is n/(2 sqrt mu): the received vector itself tells n."""
    mu = torch.tensor([0.25, 0.04], dtype=torch.float64, requires_grad=True)
    sent = [{"w": torch.randn(11, dtype=torch.float64, requires_grad=True)} for _ in range(2)]
    got = transmit(sent, mu, seed=0, scale=1.0)
    weights = torch.arange(11.0)
    sum((vector["w"] * weights).sum() for vector in got).backward()
    for q in range(2):
        noise = (got[q]["w"] - sent[q]["w"]).detach()
        assert float(mu.grad[q]) == pytest.approx(float((noise * weights).sum() / (2 * mu.detach()[q])))
        assert torch.equal(sent[q]["w"].grad, weights.double())


def test_a_reception_made_by_hand():
    """A user's own error covariance goes through the same door."""
    E = torch.tensor([[0.5, 0.4], [0.4, 0.5]])
    rx = Reception(E.diagonal(), None, None, None, None, E, None)
    sent = [{"w": torch.ones(40_000)}] * 2
    errors = torch.stack([vector["w"] - 1 for vector in transmit(sent, rx, seed=0)])
    assert float(torch.corrcoef(errors)[0, 1]) == pytest.approx(0.8, abs=0.02)


def test_a_singular_reception_keeps_its_correlations():
    """A rank-one error covariance has no Cholesky factor: all users then share one noise, with their own phases."""
    a = np.array([1.0, 0.5j, -0.7])
    E = np.outer(a, a.conj())
    rx = Reception(np.diag(E).real, None, None, None, None, E, None)
    sent = [{"w": torch.zeros(200_000)}] * 3
    errors = torch.stack([got["w"] for got in transmit(sent, rx, seed=0, scale=1.0)])
    check_covariance(errors, E)
    complex_errors = torch.view_as_complex(errors.view(3, -1, 2))
    torch.testing.assert_close(complex_errors[2], -0.7 * complex_errors[0])


def test_a_covariance_that_is_none_is_refused():
    sent = [{"w": torch.ones(4)}] * 2
    for bad, pattern in ((np.array([[1.0, 0.5], [0.1, 1.0]]), "Hermitian"), (np.diag([1.0, -1.0]), "positive semi")):
        with pytest.raises(NotPSDError, match=pattern):
            transmit(sent, Reception(None, None, None, None, None, bad, None), seed=0)
    unequal = Reception(None, None, None, np.ones((3, 2)), None, None, np.stack([np.eye(2)] * 2))
    with pytest.raises(ShapeError, match="3 blocks"):
        transmit(sent, unequal, seed=0, estimator="mmse")


def test_double_precision_vectors_get_double_precision_noise():
    sent = [{"w": torch.ones(100_000, dtype=torch.float64)}]
    error = transmit(sent, 1.0, seed=0)[0]["w"] - 1
    assert not torch.equal(error, error.float().double())
    exact = 1 + 1e-9 * error
    torch.testing.assert_close(transmit(sent, 1.0, seed=0, scale=1e-9)[0]["w"], exact, rtol=0, atol=1e-15)


def test_gradients_over_several_chunks():
    mu = torch.tensor([0.25], dtype=torch.float64, requires_grad=True)
    sent = [{"w": torch.zeros(200_001, dtype=torch.float64)}]
    (got,) = transmit(sent, mu, seed=0, scale=1.0)
    weights = torch.linspace(-1, 1, 200_001, dtype=torch.float64)
    (got["w"] * weights).sum().backward()
    assert float(mu.grad) == pytest.approx(float((got["w"].detach() * weights).sum() / 0.5), rel=1e-9)


def test_an_empty_tensor_has_no_scale_of_its_own_and_needs_none():
    sent = [{"w": torch.ones(3), "empty": torch.empty(0)}]
    for scale in ("tensor_rms", "tensor_peak"):
        (got,) = transmit(sent, 0.1, seed=0, scale=scale)
        assert got["empty"].shape == (0,)


def test_carried_entries_are_copies_and_iterators_will_do():
    steps = torch.tensor(7)
    (got,) = transmit(iter([{"w": torch.ones(3), "steps": steps}]), 0.1, seed=0)
    got["steps"] += 1
    assert int(steps) == 7
    by_name = {"cat": {"w": torch.ones(3)}, "dog": {"w": torch.ones(3)}}
    assert len(transmit(by_name.values(), 0.1, seed=0)) == 2


def test_streams_do_not_collide_in_their_low_bits():
    """torch's CPU generator drops all but 32 bits of a seed."""
    a, b, c = (torch.randn(8, generator=generator(0, key)) for key in (5, 5 + (77 << 32), 5))
    assert torch.equal(a, c)
    assert not torch.equal(a, b)
    plain = torch.randn(8, generator=torch.Generator().manual_seed(5))
    assert torch.equal(plain, torch.randn(8, generator=torch.Generator().manual_seed(5 + (77 << 32))))
    first = torch.stack([torch.randn(4, generator=generator(0, key)) for key in range(20_000)])
    assert len(torch.unique(first[:, 0])) > 19_900
    assert abs(float(first.mean())) < 5 / math.sqrt(80_000)
    assert abs(float((first[1:] * first[:-1]).mean())) < 5 / math.sqrt(80_000)


@pytest.mark.gpu
@pytest.mark.parametrize("estimator", ["additive", "mmse", "unbiased"])
def test_a_reception_on_cuda_for_vectors_on_the_cpu(estimator):
    rng = np.random.default_rng(17)
    H, C = (torch.from_numpy(value) for value in (complex_normal(rng, 2, 4, 3), np.eye(4) + 0j))
    sent = [{"w": torch.linspace(-1, 1, 1000)} for _ in range(3)]
    here = transmit(sent, sic(H, 1.0, C), seed=0, estimator=estimator)
    there = transmit(sent, sic(H.cuda(), 1.0, C.cuda()), seed=0, estimator=estimator)
    for ours, theirs in zip(there, here, strict=True):
        assert ours["w"].device.type == "cpu"
        torch.testing.assert_close(ours["w"], theirs["w"])
