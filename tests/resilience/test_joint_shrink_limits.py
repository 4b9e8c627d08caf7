"""Joint shrinkage where noise is singular, perfectly correlated or none at all, and where a user is silent."""

import pytest
import torch

from helpers.draws import independent, normal
from helpers.known_errors import correlated, error, random_psd
from rmtllmf.channel import transmit
from rmtllmf.resilience import joint_shrink, shrink


def test_perfectly_correlated_noise_is_taken_off_the_difference():
    """Both users hear the same noise: the difference of what they sent is known exactly, and comes out exactly."""
    sent = independent(2, {"w": (2000,), "b": (31,)})
    V = torch.full((2, 2), 4.0, dtype=torch.float64)
    received = transmit(sent, correlated(V), seed=1, scale=1.0)
    found, alone = joint_shrink(received, correlated(V), scale=1.0), shrink(received, correlated(V), scale=1.0)
    for key in sent[0]:
        difference = sent[0][key] - sent[1][key]
        torch.testing.assert_close(found[0][key] - found[1][key], difference, rtol=0, atol=1e-9)
    # left is half of the sum, of energy 1/2 beneath noise of 4, once in each user
    best = 2 * 2031 * 0.5 * 4 / 4.5
    assert error(found, sent) == pytest.approx(best, rel=0.1)
    assert error(found, sent) <= 0.6 * error(alone, sent)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 2])
def test_singular_covariances(dtype, rank):
    sent = [{"w": vector["w"].to(dtype)} for vector in independent(5, {"w": (3001,)})]
    V = random_psd(5, rank, seed=3, level=3.0)
    received = transmit(sent, correlated(V), seed=1, scale=1.0)
    found = joint_shrink(received, correlated(V), scale=1.0)
    assert all(bool(vector["w"].isfinite().all()) for vector in found)
    assert all(vector["w"].dtype == dtype for vector in found)
    values, vectors = torch.linalg.eigh(V)
    seen = vectors[:, values > 1e-9]
    inverse = torch.linalg.inv(torch.eye(rank).to(V) + seen.mH @ V @ seen)
    best = 3001 * float((torch.eye(rank).to(V) - inverse).diagonal().real.sum())
    assert error(found, sent) == pytest.approx(best, rel=0.12)
    assert error(found, sent) <= 0.6 * error(shrink(received, correlated(V), scale=1.0), sent)


def test_signals_without_energy_in_singular_noise():
    """Nothing was sent by anyone, or by one user: no NaN, and what is left is zero but for what the noise allows."""
    one = correlated(torch.ones(2, 2, dtype=torch.float64))
    nothing = [{"w": torch.zeros(501)} for _ in range(2)]
    received = transmit(nothing, one, seed=0, scale=1.0)
    for vector in joint_shrink(received, one, scale=1.0):
        assert float(vector["w"].abs().max()) <= 1e-5
    some = [{"w": torch.zeros(501)}, {"w": normal(501).float()}]
    found = joint_shrink(transmit(some, one, seed=0, scale=1.0), one, scale=1.0)
    assert error(found, some) < 0.1 * error(transmit(some, one, seed=0, scale=1.0), some)
    assert not joint_shrink([{"w": torch.zeros(4)}] * 2, [0.1, 0.2])[0]["w"].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_without_noise_the_bits_come_back(dtype):
    received = [{"w": normal(4, 5, seed=q).to(dtype), "x": normal(3, seed=q + 5).to(dtype)} for q in range(3)]
    for vector, found in zip(received, joint_shrink(received, [0.0] * 3), strict=True):
        assert all(torch.equal(found[key], vector[key]) for key in vector)
    V = torch.diag(torch.tensor([0.0, 0.5, 0.3], dtype=torch.float64))
    V[1, 2] = V[2, 1] = 0.2
    quiet, *loud = joint_shrink(received, correlated(V), scale=1.0)
    assert all(torch.equal(quiet[key], received[0][key]) for key in quiet)
    assert not torch.equal(loud[0]["w"], received[1]["w"])
    gain = torch.tensor([0.5, -4.0, 2.0], dtype=torch.float64)
    found = joint_shrink(received, correlated(torch.zeros(3, 3), gain), estimator="mmse")
    for g, vector, mine in zip(gain, received, found, strict=True):
        torch.testing.assert_close(mine["w"], (vector["w"].double() / g).to(dtype), rtol=0, atol=0)


def test_a_silent_user_is_known_only_by_what_others_have_in_common_with_it():
    """Gain 0: nothing of its own was heard; the others come out as without it."""
    size = 20_000
    common = normal(size, seed=7)
    gain = torch.tensor([0.9, 0.0, 0.8], dtype=torch.float64)
    V = torch.diag(torch.tensor([0.2, 0.3, 0.1], dtype=torch.float64))
    sent = [{"w": 0.9 * common + 0.4 * normal(size, seed=q)} for q in range(3)]
    received = transmit(sent, correlated(V, gain), seed=0, estimator="mmse", scale=1.0)
    found = joint_shrink(received, correlated(V, gain), estimator="mmse", scale=1.0)
    assert all(bool(vector["w"].isfinite().all()) for vector in found)
    without = [received[0], received[2]]
    two = joint_shrink(without, correlated(V[::2, ::2], gain[::2]), estimator="mmse", scale=1.0)
    for a, b in zip(two, (found[0], found[2]), strict=True):
        torch.testing.assert_close(a["w"], b["w"], rtol=1e-6, atol=1e-9)
    assert float(found[1]["w"].square().mean()) <= 1.0
    assert error(found[1:2], sent[1:2]) <= size
    zeros = joint_shrink(received[1:2], correlated(V[1:2, 1:2], gain[1:2]), estimator="mmse", scale=1.0)
    assert not zeros[0]["w"].any()
