"""Shrinkage against the Bayes risk in closed form, at its limits, and what it must never do, whatever was sent."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.bad_receptions import BY_ENERGY, GOOD, NAN, PAIR
from helpers.draws import normal, with_energies
from helpers.known_errors import correlated, error
from rmtllmf.channel import transmit
from rmtllmf.errors import InputError, NonFiniteError, StateMismatchError
from rmtllmf.resilience import shrink
from rmtllmf.resilience._energy import energy_of
from rmtllmf.resilience._noise import KnownNoise


@pytest.mark.parametrize("estimator", ["additive", "mmse", "unbiased"])
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("users", [1, 3])
def test_the_risk_is_that_of_who_knows_the_energies(estimator, blocks, users):
    """v sigma^2 / (v + sigma^2) a coefficient: within 4 standard errors and 0.5 % for energies that are estimated."""
    size = 12_000
    energies = np.outer(np.linspace(0.5, 2, users), [3.0, 0.05, 0.6])
    mse = np.linspace(0.2, 0.9, blocks * users).reshape(blocks, users)
    sent = with_energies(energies, size)
    received = transmit(sent, mse, seed=1, estimator=estimator, scale=1.0)
    found = shrink(received, mse, estimator=estimator, scale=1.0)
    noise = mse if estimator == "additive" else mse / (1 - mse)  # of what was received over its gain
    expected = variance = 0.0
    for q in range(users):
        for k in range(3):
            # 3 tensors of one length in 1 or 3 blocks: a tensor is a block
            sigma2 = noise[k if blocks == 3 else 0, q]
            risk = energies[q, k] * sigma2 / (energies[q, k] + sigma2)
            expected += size * risk
            variance += size * 2 * risk**2
    assert abs(error(found, sent) - expected) <= 4 * variance**0.5 + 0.005 * expected


def test_parts_of_a_tensor_have_factors_of_their_own():
    """Every block's part is multiplied by g v / (g^2 v + n) of the block, with the tensor's own energy."""
    sent = with_energies([[2.0], [0.5]], 40_001)
    mse = torch.tensor([[0.1, 0.9], [0.5, 0.3], [0.0, 0.7], [0.8, 0.2]], dtype=torch.float64)
    for estimator in ("additive", "mmse", "unbiased"):
        received = transmit(sent, mse, seed=3, estimator=estimator, scale=1.0)
        found = shrink(received, mse, estimator=estimator, scale=1.0)
        for q, v in enumerate([2.0, 0.5]):
            factor = found[q]["w0"] / received[q]["w0"]
            for b in range(4):
                mu = float(mse[b, q])
                g = 1 - mu if estimator == "mmse" else 1.0
                n = {"additive": mu, "mmse": mu * (1 - mu), "unbiased": mu / (1 - mu)}[estimator]
                here = factor[2 * math.ceil(b * 20_001 / 4) : 2 * math.ceil((b + 1) * 20_001 / 4)]
                assert float(here.max() - here.min()) < 1e-12
                assert float(here[0]) == pytest.approx(g * v / (g * g * v + n), rel=0.03)


@pytest.mark.parametrize("estimator", ["additive", "mmse"])
def test_energies_are_unbiased_with_the_error_that_they_tell(estimator):
    """Over 100 receptions: the mean within 4 standard errors, the spread within 22 % (3 standard errors)."""
    mse, sizes = [[0.3, 0.6], [0.9, 0.5]], {"a": 301, "b": 700}
    measured, told = [], []
    for seed in range(100):
        sent = [
            {key: (0.2 + 0.1 * q) * normal(size, seed=[seed, q, size]) for key, size in sizes.items()} for q in (0, 1)
        ]
        received = transmit(sent, mse, seed=seed, estimator=estimator, scale=1.0)
        found = energy_of(KnownNoise.of(received, mse, estimator=estimator, scale=1.0))
        measured.append(found.measured)
        told.append(found.error)
    measured, told = torch.stack(measured), torch.stack(told).mean(0)
    assert found.keys == ["a", "b"]
    true = torch.tensor([[0.04, 0.04], [0.09, 0.09]], dtype=torch.float64)
    assert bool(((measured.mean(0) - true).abs() <= 4 * (told / 100).sqrt()).all())
    assert bool(((measured.std(0) / told.sqrt() - 1).abs() <= 0.22).all())


def test_energies_without_noise_are_exact():
    received = [{"a": torch.full((3,), 5.0), "b": normal(700, seed=q), "c": torch.zeros(9)} for q in range(2)]
    found = energy_of(KnownNoise.of(received, [0.0, 0.0]))
    for q, vector in enumerate(received):
        for key in vector:
            assert float(found.of(key)[q]) == pytest.approx(float(vector[key].double().square().mean()), rel=1e-6)


@given(
    users=st.integers(1, 6),
    tensors=st.integers(1, 8),
    profile=st.sampled_from(["equal", "decaying", "one", "users", "mixed"]),
    sizes=st.sampled_from([(30, 30), (100, 400), (300, 300)]),
    snr=st.floats(-30, 30),
    estimator=st.sampled_from(["additive", "mmse", "unbiased"]),
    scale=st.sampled_from(["rms", 1.0]),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=60)
def test_the_error_is_never_above_that_of_what_was_received(
    users, tensors, profile, sizes, snr, estimator, scale, seed
):
    """But for 3 % of the noise's energy and the noise of ten coefficients, for one draw."""
    energies = {
        "equal": np.ones((users, tensors)),
        "decaying": np.ones((users, 1)) * 10.0 ** -np.arange(tensors),
        "one": np.eye(tensors)[[0] * users] + 1e-9,
        "users": np.ones((1, tensors)) * 10.0 ** -np.arange(users)[:, None],
        "mixed": 10 ** np.random.default_rng(seed).uniform(-4, 2, (users, tensors)),
    }[profile]
    lengths = [sizes[k % 2] for k in range(tensors)]
    sent = [
        {f"w{k}": energies[q, k] ** 0.5 * normal(lengths[k], seed=[seed, q, k]) for k in range(tensors)}
        for q in range(users)
    ]
    for vector in sent:  # of unit rms, so that the scale that is read off is right
        rms = (sum(float(t.square().sum()) for t in vector.values()) / sum(lengths)) ** 0.5
        for tensor in vector.values():
            tensor /= rms
    ratio = 10 ** (-snr / 10)
    mse = [ratio if estimator == "additive" else ratio / (1 + ratio)] * users
    received = transmit(sent, mse, seed=seed, estimator=estimator, scale=1.0)
    found = shrink(received, mse, estimator=estimator, scale=scale)
    gain = 1 - mse[0] if estimator == "mmse" else 1.0
    plain = [{key: tensor / gain for key, tensor in vector.items()} for vector in received]
    assert error(found, sent) <= error(plain, sent) + ratio * (0.03 * users * sum(lengths) + 10)


@pytest.mark.parametrize(
    ("users", "tensors", "size"),
    [
        (8, 100, 768),  # one tensor of one of 8 users
        (1, 300, 64),  # one of 300 tensors
        (1, 2, 1),  # a single number
        (1, 7, 10),
    ],
)
def test_what_stands_out_of_the_noise_is_kept_however_much_does_not(users, tensors, size):
    """One tensor of 20 dB, all else nothing but noise: nobody can doubt that something was sent."""
    sent = [{f"w{k}": torch.zeros(size, dtype=torch.float64) for k in range(tensors)} for _ in range(users)]
    sent[0]["w0"] += 10 * (1 - 2 * (torch.arange(size) % 2))
    received = transmit(sent, [1.0] * users, seed=0, scale=1.0)
    found = shrink(received, [1.0] * users, scale=1.0)
    assert float((found[0]["w0"] / received[0]["w0"]).min()) >= 0.8
    assert error(found, sent) <= error(received, sent)


def test_factors_never_amplify():
    """Between 0 and 1 over the gain, for what is found and whatever was sent."""
    for seed in range(20):
        received = with_energies(10 ** normal(3, 4, seed=seed).numpy(), 11, seed=seed)
        mse = [0.9, 0.2, 0.5]
        for by in ("tensor", "vector", "row"):
            for vector, found in zip(received, shrink(received, mse, scale=1.0, by=by), strict=True):
                for key in vector:
                    factor = found[key] / vector[key]
                    assert float(factor.min()) >= 0
                    assert float(factor.max()) <= 1


def test_users_help_one_another():
    """Small tensors deep in noise: with eight users the error comes nearer to who knows the energies."""
    energies, mse, size = [[6.0, 0.05] * 4], 4.0, 20
    alone = together = best = 0.0
    for seed in range(12):
        sent = with_energies(energies * 8, size, seed)
        received = transmit(sent, [mse] * 8, seed=seed, scale=1.0)
        together += error(shrink(received, [mse] * 8, scale=1.0), sent)
        for vector, true in zip(received, sent, strict=True):
            alone += error(shrink([vector], [mse], scale=1.0), [true])
        best += sum(8 * size * v * mse / (v + mse) for v in energies[0])
    assert together <= 1.1 * best
    assert alone >= 1.1 * together


# Limits


@pytest.mark.parametrize("by", ["tensor", "vector", "row"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_without_noise_the_bits_come_back(by, dtype):
    received = [{"w": normal(4, 5, seed=q).to(dtype), "zero": torch.zeros(3, dtype=dtype)} for q in range(2)]
    for scale in ("rms", "tensor_rms", 3.0):
        for vector, found in zip(received, shrink(received, [0.0, 0.0], scale=scale, by=by), strict=True):
            assert all(torch.equal(found[key], vector[key]) for key in vector)
    small = [{"w": torch.full((3,), 1e-200, dtype=torch.float64)}] * 2  # whose energy underflows
    assert torch.equal(shrink(small, [0.0, 0.0], scale=3.0, by=by)[0]["w"], small[0]["w"])
    gain = torch.tensor([0.5, -4.0], dtype=torch.float64)
    silent = correlated(torch.zeros(2, 2), gain)
    for g, vector, found in zip(gain, received, shrink(received, silent, estimator="mmse", by=by), strict=True):
        assert torch.equal(found["w"], (vector["w"].double() / g).to(dtype))
    quiet, loud = shrink(received, [0.0, 0.5], scale=1.0, by=by)
    assert torch.equal(quiet["w"], received[0]["w"])
    assert not torch.equal(loud["w"], received[1]["w"])


@pytest.mark.parametrize("by", ["tensor", "vector", "row"])
def test_of_pure_noise_nearly_nothing_is_left(by):
    """In the mean of 10 draws less than 1 % of the energy, for four users of some hundred coefficients."""
    left = total = 0.0
    for seed in range(10):
        received = [
            {key: 2 * normal(12, 20, seed=100 * seed + 2 * q + k) for k, key in enumerate("ab")} for q in range(4)
        ]
        found = shrink(received, [4.0] * 4, scale=1.0, by=by)
        left += sum(float(vector[key].square().sum()) for vector in found for key in vector)
        total += sum(float(vector[key].square().sum()) for vector in received for key in vector)
    assert left <= 0.01 * total


def test_a_measured_scale_of_zero_gives_zeros():
    received = [{"w": torch.zeros(4, 5)}, {"w": torch.ones(4, 5)}]
    found = shrink(received, [0.3, 0.3])
    assert not found[0]["w"].any()
    assert found[1]["w"].isfinite().all()


def test_a_silent_user_comes_back_as_zeros():
    sent = with_energies([[1.0], [1.0]], 100)
    received = transmit(sent, [1.0, 0.2], seed=0, estimator="mmse")
    found = shrink(received, [1.0, 0.2], estimator="mmse", scale=1.0)
    assert not found[0]["w0"].any()
    assert error(found[1:], sent[1:]) < 0.4 * 100


BAD = {
    **BY_ENERGY,
    "other shapes": (([{"w": torch.eye(4)}, {"w": torch.eye(3)}], PAIR), {}, StateMismatchError, "shape"),
    "negative": ((GOOD, [0.1, -0.1]), {}, InputError, "at least 0"),
    "scale": ((GOOD, PAIR), {"scale": "peak"}, InputError, "scale: the peak"),
    "by": ((GOOD, PAIR), {"by": "column"}, InputError, "by: expected one of 'tensor', 'vector', 'row', got 'column'"),
    "by type": ((GOOD, PAIR), {"by": 1}, InputError, "by: expected one of"),
    "sensitivity inf": ((GOOD, PAIR), {"sensitivity": math.inf}, InputError, "sensitivity: expected a positive"),
    "sensitivity type": ((GOOD, PAIR), {"sensitivity": "big"}, TypeError, "sensitivity: expected a real number"),
    "sensitivity of": (
        (GOOD, PAIR),
        {"sensitivity": {"w": -1}},
        InputError,
        re.escape("sensitivity['w']: expected"),
    ),
    "NaN, measured": ((NAN, [0.1]), {}, NonFiniteError, re.escape("received[0]['w'] holds NaN")),
    "overflow": (
        ([{"w": torch.full((4, 4), 6e4, dtype=torch.float16)}], [0.9]),
        {"scale": 1.0, "estimator": "mmse"},
        NonFiniteError,
        "overflow torch.float16",
    ),
    "complex": (([{"w": torch.eye(2) + 0j}], [0.1]), {}, TypeError, "complex"),
    "blocks": (([{"w": torch.eye(2)}], [[0.1]] * 3), {}, InputError, "3 blocks are more than the 2 symbols"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    arguments, options, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        shrink(*arguments, **options)
