"""Sign codes: the best scale, hard and soft decisions against integrals, and where they pay."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import minimize_scalar
from scipy.stats import norm

from rmtllmf.channel import UplinkScenario, sic, transmit
from rmtllmf.errors import InputError, NonFiniteError, ShapeError, StateMismatchError
from rmtllmf.resilience.coding import channel_uses
from rmtllmf.resilience.low_rank_code import low_rank_code
from rmtllmf.resilience.sign_code import sign_code, soft_signs


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def squared(left, right):
    return float((left - right).square().sum())


def test_the_scale_is_the_best_and_is_told_as_float32():
    vector = {"w": 2 * normal(7, 9), "v": normal(5, seed=1)}
    code = sign_code(vector)
    for name, tensor in vector.items():
        best = minimize_scalar(lambda s, x=tensor: squared(s * x.sign(), x)).x
        assert torch.equal(code.sent[name].sign(), tensor.sign())
        scale = code.sent[name].abs().unique()
        assert scale.item() == np.float32(scale.item()) == pytest.approx(best, rel=1e-6)
    assert code.bits == 2 * 32
    assert channel_uses(code, bits_per_use=4.0) == 34 + 16


def test_rows_have_scales_of_their_own():
    vector = {"w": normal(3, 4, 5) * torch.tensor([1.0, 10.0, 100.0])[:, None, None], "v": normal(6), "s": normal()}
    code = sign_code(vector, per="row")
    assert code.bits == 32 * (3 + 1 + 1)
    expected = vector["w"].abs().mean((1, 2)).float()
    torch.testing.assert_close(code.sent["w"].abs()[:, 0, 0].float(), expected, rtol=0, atol=0)
    one = sign_code(vector)
    assert squared(code.sent["w"], vector["w"]) < squared(one.sent["w"], vector["w"])


def test_hard_decisions_take_the_nearer_value():
    code = sign_code({"w": torch.tensor([1.0, -2.0, 0.0]), "none": torch.zeros(0, 2)})
    assert code.sent["w"].tolist() == [1, -1, 1]
    assert code.bits == 32
    decoded = code.decode({"w": torch.tensor([-1e-9, 0.0, -40.0]), "none": torch.zeros(0, 2)})
    assert decoded["w"].tolist() == [-1, 1, -1]
    assert decoded["none"].shape == (0, 2)


def expectation(function, noise):
    return quad(lambda z: function(1 + noise * z) * norm.pdf(z), -12, 12, limit=400)[0]


@pytest.mark.parametrize("mse", [0.05, 0.4, 1.0, 4.0])
def test_errors_after_transmission_are_the_closed_forms(mse):
    n, noise = 60_000, math.sqrt(mse)
    vector = {"w": normal(n)}
    code = sign_code(vector)
    s2 = float(code.sent["w"][0].square())
    energy = float(vector["w"].square().sum())
    (received,) = transmit([code.sent], [mse], seed=1)
    (soft,) = soft_signs([code], [received], [mse])
    p = norm.sf(1 / noise)
    hard_error = energy - n * s2 * (1 - 4 * p)
    soft_error = energy - n * s2 * expectation(lambda r: math.tanh(r / mse), noise)
    for decoded, expected in ((code.decode(received), hard_error), (soft, soft_error)):
        each = (decoded["w"] - vector["w"]).square()
        standard_error = float(each.std()) * math.sqrt(n)
        assert abs(float(each.sum()) - expected) < 5 * standard_error
        assert standard_error < 0.02 * expected
    assert soft_error < hard_error
    assert soft_error < energy  # the base model's
    assert (hard_error > energy) == (p > 0.25)


@pytest.mark.parametrize("estimator", ["additive", "mmse", "unbiased"])
@pytest.mark.parametrize("scale", ["rms", "peak", "tensor_rms", "tensor_peak", 2.5])
@pytest.mark.parametrize("per", ["tensor", "row"])
def test_soft_signs_are_the_posterior_mean_in_any_set_up(estimator, scale, per):
    """Calibrated, in every tensor and block: what is believed equals, on average, what is true.

    A wrong variance, gain or scale makes the means of the signs given the soft value differ from it.
    """
    mse = torch.tensor([[0.6, 0.3], [0.2, 0.9]])
    vectors = [{"a": 3 * normal(2, 10_000, seed=q), "b": normal(2, 10_000, seed=9 + q)} for q in range(2)]
    codes = [sign_code(vector, per=per) for vector in vectors]
    received = transmit([code.sent for code in codes], mse, seed=3, estimator=estimator, scale=scale)
    decoded = soft_signs(codes, received, mse, estimator=estimator, scale=scale)
    for code, soft in zip(codes, decoded, strict=True):
        for name in ("a", "b"):
            magnitude = code.sent[name].abs()
            belief, truth = (soft[name] / magnitude).flatten(), (code.sent[name] / magnitude).flatten()
            for half in (slice(0, 10_000), slice(10_000, None)):
                for low, high in ((-1, -0.6), (-0.6, 0), (0, 0.6), (0.6, 1.0)):
                    inside = (belief[half] >= low) & (belief[half] <= high)
                    if (count := int(inside.sum())) < 50:
                        continue
                    gap = float((belief[half][inside] - truth[half][inside]).mean())
                    spread = float((1 - belief[half][inside] ** 2).mean()) ** 0.5
                    assert abs(gap) < 5 * spread / count**0.5 + 1e-6


def test_the_posterior_mean_by_bayes():
    code = sign_code({"w": torch.tensor([2.0, -2.0, 2.0], dtype=torch.float64)})
    r = torch.tensor([0.3, -1.0, 5.0], dtype=torch.float64)
    variance = 0.7 * 4  # mse times the square of the rms
    weights = [np.exp(-((r.numpy() - s) ** 2) / (2 * variance)) for s in (2.0, -2.0)]
    expected = 2 * (weights[0] - weights[1]) / (weights[0] + weights[1])
    (soft,) = soft_signs([code], [{"w": r}], 0.7)
    np.testing.assert_allclose(soft["w"], expected, rtol=1e-12)


def test_soft_signs_over_an_unaware_receiver():
    """Below hard decisions for every user; correlated errors and gains that are not 1 - mse."""
    up = UplinkScenario(num_users=3).draw(seed=0)
    rx = sic(up.H, up.P, 300 * up.noise_covariance, designed_for=up.noise_covariance)
    vectors = [{"w": normal(20_000, seed=q)} for q in range(3)]
    codes = [sign_code(vector) for vector in vectors]
    for estimator in ("mmse", "unbiased"):
        received = transmit([code.sent for code in codes], rx, seed=1, estimator=estimator)
        soft = soft_signs(codes, received, rx, estimator=estimator)
        for code, hard, mean, vector in zip(codes, received, soft, vectors, strict=True):
            error = squared(mean["w"], vector["w"])
            assert error <= squared(code.decode(hard)["w"], vector["w"]) * (1 + 1e-6)
            assert error < float(vector["w"].square().sum())


def test_without_noise_soft_is_hard():
    code = sign_code({"w": normal(9), "zero": torch.zeros(3)})
    (soft,) = soft_signs([code], [code.sent], [0.0])
    torch.testing.assert_close(soft, code.decode(code.sent))
    assert not soft["zero"].any()


def test_signs_pay_under_a_peak_and_not_under_a_mean_power():
    vector = {"w": normal(20_000)}
    code = sign_code(vector)
    for scale, signs_win in (("rms", False), ("peak", True)):
        (plain,) = transmit([vector], [0.3], seed=0, scale=scale)
        (received,) = transmit([code.sent], [0.3], seed=0, scale=scale)
        (soft,) = soft_signs([code], [received], [0.3], scale=scale)
        # both decoded as well as can be: the posterior mean of a normal entry is a shrinkage
        unit = 1.0 if scale == "rms" else float(vector["w"].abs().max()) ** 2
        shrunk = plain["w"] / (1 + 0.3 * unit)
        assert (squared(soft["w"], vector["w"]) < squared(shrunk, vector["w"])) == signs_win


W = {"w": torch.ones(3)}
CODE = sign_code(W)
BAD = {
    "per": (lambda: sign_code(W, per="vector"), InputError, "per: expected 'tensor' or 'row', got 'vector'"),
    "nan": (lambda: sign_code({"w": torch.tensor([math.nan])}), NonFiniteError, "vector.'w'."),
    "large": (
        lambda: sign_code({"w": torch.full((2,), 1e60, dtype=torch.float64)}),
        NonFiniteError,
        "overflows float32",
    ),
    "other code": (lambda: soft_signs([low_rank_code(W, 1)], [W], 0.1), TypeError, "codes.0.: expected what sign_code"),
    "no code": (lambda: soft_signs([W], [W], 0.1), TypeError, "codes.0.: expected what sign_code returns, got dict"),
    "counts": (lambda: soft_signs([CODE], [W, W], 0.1), ShapeError, "codes: expected one for each of 2"),
    "names": (lambda: soft_signs([CODE], [{"v": torch.ones(3)}], 0.1), StateMismatchError, "received.0. lacks 'w'"),
    "estimator": (lambda: soft_signs([CODE], [W], 0.1, estimator="ml"), InputError, "estimator: expected one of"),
    "unknown scale": (lambda: soft_signs([CODE], [W], 0.1, scale="max"), InputError, "scale: expected one of"),
    "users": (lambda: soft_signs([CODE], [W], [0.1, 0.2]), ShapeError, "mse"),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
