"""Joint shrinkage against the Bayes risk in closed form, and against shrinkage of each user alone."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.bad_receptions import BY_ENERGY, GOOD, PAIR
from helpers.draws import independent, normal
from helpers.known_errors import correlated, error, random_psd
from rmtllmf.channel import UplinkScenario, sic, strongest_user_covariance, transmit
from rmtllmf.errors import InputError, NonFiniteError
from rmtllmf.resilience import joint_shrink, shrink
from rmtllmf.taskvec import TaskVector


def attacked(seed, users=6):
    """A receiver that does not know of the attack on the strongest user."""
    up = UplinkScenario(num_users=users).draw(seed=seed)
    C = strongest_user_covariance(up.H, up.P, 124 * up.noise) + up.noise_covariance
    return sic(up.H, up.P, C, designed_for=up.noise_covariance, order="strongest_first")


@pytest.mark.parametrize("estimator", ["additive", "mmse", "unbiased"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_risk_is_the_closed_form(estimator, seed):
    """Unit energies, unrelated signals: tr (I + D V^-1 D)^-1 within 5 standard errors, and 0.5 % for estimates."""
    heard_as, symbols = attacked(seed), 15_000
    sent = independent(6, {"w": 2 * symbols}, seed=seed)
    V = torch.as_tensor(heard_as.error_covariance if estimator == "additive" else heard_as.noise_covariance)
    g = torch.as_tensor(heard_as.gain).to(V) if estimator != "additive" else torch.ones(6).to(V)
    posterior = torch.linalg.inv(torch.eye(6).to(V) + g[:, None] * torch.linalg.inv(V) * g)
    received = transmit(sent, heard_as, seed=seed, estimator=estimator, scale=1.0)
    found = joint_shrink(received, heard_as, estimator=estimator, scale=1.0)
    expected = 2 * symbols * float(posterior.diagonal().real.sum())
    # |error|^2 of a symbol of unit energy: sum of exponentials of the eigenvalues
    spread = 2 * (symbols * float(torch.linalg.eigvalsh(posterior).square().sum())) ** 0.5
    assert abs(error(found, sent) - expected) <= 5 * spread + 0.005 * expected
    for q in range(6):
        own = error(found[q : q + 1], sent[q : q + 1])
        mean = 2 * symbols * float(posterior[q, q].real)
        assert abs(own - mean) <= 5 * mean / symbols**0.5 + 0.01 * mean
    alone = error(shrink(received, heard_as, estimator=estimator, scale=1.0), sent)
    assert alone >= 1.25 * error(found, sent)


def test_every_part_is_multiplied_by_the_matrix_of_its_block():
    """S D (D S D + V)^-1 by hand, with the energies that were sent; three blocks cut odd tensors within symbols."""
    shapes = {"a": (5001,), "b": (33, 333), "c": (7, 11, 91)}
    energy = np.array([[1.0, 4.0, 0.25], [0.5, 0.5, 2.0], [3.0, 0.1, 1.0]])
    sent = independent(3, shapes, seed=4)
    for q, vector in enumerate(sent):
        for k, key in enumerate(shapes):
            vector[key] *= energy[q, k] ** 0.5 / vector[key].square().mean().sqrt()
    V = torch.stack([random_psd(3, 4, seed) for seed in range(3)])
    gain = torch.tensor([[0.5, 1.5, -0.7], [1.0, 0.9, 0.8], [0.3, 1.1, 0.2]], dtype=torch.float64)
    received = transmit(sent, correlated(V, gain), seed=5, estimator="mmse", scale=1.0)
    found = joint_shrink(received, correlated(V, gain), estimator="mmse", scale=1.0)
    X = torch.stack([torch.cat([vector[key].reshape(-1) for key in shapes]) for vector in received])
    length, starts = X.shape[1], np.cumsum([0, *(math.prod(shape) for shape in shapes.values())])
    assert length % 2 == 1 or starts[1] % 2 == 1
    expected = torch.empty_like(X)
    for k in range(3):
        for j in range(starts[k], starts[k + 1]):
            symbol = j // 2
            b = symbol * 3 // ((length + 1) // 2)
            D, S = torch.diag(gain[b]), torch.diag(torch.from_numpy(energy[:, k]))
            pair = (2 * symbol, 2 * symbol + 1)
            if j % 500 and not (j - starts[k] < 2 or starts[k + 1] - j < 3):  # a few are enough
                expected[:, j] = torch.nan
                continue
            if pair[0] >= starts[k] and pair[1] < starts[k + 1]:
                z = torch.complex(X[:, pair[0]], X[:, pair[1]])
                mean = (S @ D).to(V) @ torch.linalg.solve((D @ S @ D).to(V) + V[b], z)
                expected[:, j] = mean.real if j % 2 == 0 else mean.imag
            else:  # the other half belongs to another tensor, or to none
                expected[:, j] = S @ D @ torch.linalg.solve(D @ S @ D + V[b].real, X[:, j])
    Y = torch.stack([torch.cat([vector[key].reshape(-1) for key in shapes]) for vector in found])
    there = ~expected.isnan().any(0)
    assert int(there.sum()) > 40
    # energies are estimated
    torch.testing.assert_close(Y[:, there], expected[:, there], rtol=0, atol=0.08)


def test_independent_errors_and_unrelated_signals_are_shrink():
    shapes = {"a": (40_001,), "b": (150, 133)}
    sent = independent(3, shapes)
    for q, vector in enumerate(sent):
        vector["b"] *= 0.3 * (q + 1)
    mse = [[0.5, 2.0, 0.1], [3.0, 0.2, 1.0]]
    for estimator, law in (("additive", mse), ("mmse", [[0.5, 0.9, 0.1], [0.7, 0.2, 0.4]])):
        received = transmit(sent, law, seed=1, estimator=estimator, scale=1.0)
        joint, alone = (f(received, law, estimator=estimator, scale=1.0) for f in (joint_shrink, shrink))
        assert error(joint, alone) <= 1e-3 * error(alone, sent)
        assert error(joint, sent) <= 1.001 * error(alone, sent)


def test_one_user_is_shrink():
    sent = independent(1, {"a": (301,), "b": (5, 7)})
    received = transmit(sent, [[0.5], [2.0]], seed=1)
    for key in "ab":
        torch.testing.assert_close(
            joint_shrink(received, [[0.5], [2.0]])[0][key],
            shrink(received, [[0.5], [2.0]])[0][key],
            rtol=1e-9,
            atol=1e-12,
        )


@pytest.mark.parametrize("noise", [0.3, 3.0])
@pytest.mark.parametrize("share", [0.5, 0.95, 1.0])
def test_what_the_users_have_in_common_is_used(noise, share):
    """Correlation `share` of all users: as good within 1 % as the linear estimate that knows it."""
    size, users = 40_000, 4
    common = normal(size, seed=9)
    sent = [{"w": share**0.5 * common + (1 - share) ** 0.5 * normal(size, seed=q)} for q in range(users)]
    received = transmit(sent, [noise] * users, seed=2, scale=1.0)
    found, alone = joint_shrink(received, [noise] * users, scale=1.0), shrink(received, [noise] * users, scale=1.0)
    S = share + (1 - share) * np.eye(users)
    best = size * np.trace(S - S @ np.linalg.solve(S + noise * np.eye(users), S))
    assert error(found, sent) == pytest.approx(best, rel=0.03)
    assert error(found, sent) <= (0.8 if share > 0.9 else 0.97) * error(alone, sent)


def test_common_signals_under_common_noise_are_told_apart():
    """Signals with the correlation .8, noise with .9: S (S + V)^-1 is known."""
    size, rho, noise = 40_000, 0.8, 2.0
    common = normal(size, seed=9)
    sent = [{"w": rho**0.5 * common + (1 - rho) ** 0.5 * normal(size, seed=q)} for q in range(2)]
    V = noise * np.array([[1, 0.9], [0.9, 1]])
    received = transmit(sent, correlated(V), seed=2, scale=1.0)
    S = np.array([[1, rho], [rho, 1]])
    best = size * np.trace(S - S @ np.linalg.solve(S + V, S))
    assert error(joint_shrink(received, correlated(V), scale=1.0), sent) == pytest.approx(best, rel=0.03)


SHAPES = ({"a": (301,), "b": (400,)}, {"a": (1501,)}, {"a": (11, 11), "b": (3,), "c": (500,)})


def ratio_to_shrink(draw):
    """Of squared errors, for users, noise, sizes and correlations as they come."""
    users, rank, level = draw.randint(1, 6), draw.randint(1, 8), 10 ** draw.uniform(-2, 2)
    share, shapes, seed = draw.choice([0.0, 0.5, 1.0]), draw.choice(SHAPES), draw.randrange(2**20)
    sent, common = independent(users, shapes, seed), independent(1, shapes, seed + 1)[0]
    sent = [{k: share**0.5 * common[k] + (1 - share) ** 0.5 * t for k, t in vector.items()} for vector in sent]
    noise = correlated(random_psd(users, rank, seed, level=level))
    received = transmit(sent, noise, seed=seed, scale=1.0)
    return error(joint_shrink(received, noise, scale=1.0), sent) / error(shrink(received, noise, scale=1.0), sent)


def test_the_error_is_that_of_shrink_or_far_below_but_for_bad_luck():
    """Correlations are estimated from some hundred coefficients: in a draw of a hundred they mislead."""
    draw = random.Random(0)
    ratios = np.array([ratio_to_shrink(draw) for _ in range(150)])
    assert ratios.mean() < 0.8
    assert (ratios > 1.04).mean() < 0.05  # 1 % of some thousand draws


def unlike(users, tensors, size, share, seed):
    """Energies from -30 to 10 dB, tensor by tensor and user by user, with a common part."""
    common, energy = (
        normal(tensors, size, seed=seed),
        10 ** (4 * np.random.default_rng(seed).random((users, tensors)) - 3),
    )
    own = [normal(tensors, size, seed=[seed, q]) for q in range(users)]
    mixed = [share**0.5 * common + (1 - share) ** 0.5 * x for x in own]
    return [{f"w{k}": energy[q, k] ** 0.5 * x[k] for k in range(tensors)} for q, x in enumerate(mixed)]


@given(
    users=st.integers(1, 6),
    snr=st.floats(-20, 20),
    share=st.sampled_from([0.0, 0.5, 1.0]),
    size=st.sampled_from([201, 500]),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=30)
def test_nor_for_energies_of_all_kinds(users, snr, share, size, seed):
    """But for 4 %, and 2 % of the noise's energy."""
    sent = unlike(users, 3, size, share, seed)
    noise = correlated(random_psd(users, users + 2, seed, level=10 ** (-snr / 10)))
    received = transmit(sent, noise, seed=seed, scale=1.0)
    joint, alone = joint_shrink(received, noise, scale=1.0), shrink(received, noise, scale=1.0)
    assert error(joint, sent) <= 1.04 * error(alone, sent) + 0.02 * error(received, sent)


def test_nor_where_some_directions_are_without_noise():
    """A singular covariance: wrong correlations must not blow up what is known exactly. In the sum of ten draws."""
    sums = np.zeros(2)
    for seed in range(10):
        sent = unlike(8, 4, 50, 0.9, seed)
        noise = correlated(random_psd(8, 4, seed, level=15.0))
        received = transmit(sent, noise, seed=seed, scale=1.0)
        sums += [error(f(received, noise, scale=1.0), sent) for f in (joint_shrink, shrink)]
    assert sums[0] <= 1.04 * sums[1]


# Sensitivity, equivariance, forms


def test_sensitivity_is_a_multiple_of_the_energies():
    """kappa S (kappa S + V)^-1, on a matrix whose energies the sample has exactly."""
    V = random_psd(2, 3, seed=1)
    sent = independent(2, {"a": (30_000,), "b": (30_000,)})
    received = transmit(sent, correlated(V), seed=2, scale=1.0)
    found = joint_shrink(received, correlated(V), scale=1.0, sensitivity={"b": 20.0})
    plain = joint_shrink(received, correlated(V), scale=1.0)
    for key, kappa in (("a", 1.0), ("b", 20.0)):
        z = torch.stack([torch.view_as_complex(vector[key].view(-1, 2)) for vector in received])
        y = torch.stack([torch.view_as_complex(vector[key].view(-1, 2)) for vector in found])
        expected = kappa * torch.linalg.solve(kappa * torch.eye(2).to(V) + V, z)
        assert float((y - expected).norm() / expected.norm()) < 0.02
    assert all(torch.equal(a["a"], b["a"]) for a, b in zip(found, plain, strict=True))


@pytest.mark.parametrize("scale", ["rms", "tensor_rms"])
def test_order_and_units_do_not_matter(scale):
    V = random_psd(3, 4, seed=1)
    shapes = {"a": (8, 4), "b": (40,), "c": (2, 3)}  # even: other orders have the same symbols
    received = [
        {key: 10.0**k * (q + 1) * t for k, (key, t) in enumerate(vector.items())}
        for q, vector in enumerate(independent(3, shapes))
    ]
    plain = joint_shrink(received, correlated(V), scale=scale)
    order = [2, 0, 1]
    turned = joint_shrink([received[q] for q in order], correlated(V[order][:, order]), scale=scale)
    renamed = joint_shrink(
        [{f"{9 - i}{k}": t for i, (k, t) in enumerate(v.items())} for v in received], correlated(V), scale=scale
    )
    bigger = joint_shrink([{k: 1e-9 * t for k, t in v.items()} for v in received], correlated(V), scale=scale)
    for q in range(3):
        for i, key in enumerate(shapes):
            close = {"rtol": 1e-8, "atol": 1e-9 * float(received[q][key].abs().max())}
            torch.testing.assert_close(turned[order.index(q)][key], plain[q][key], **close)
            torch.testing.assert_close(renamed[q][f"{9 - i}{key}"], plain[q][key], **close)
            torch.testing.assert_close(1e9 * bigger[q][key], plain[q][key], **close)


def test_forms_ties_and_dtypes():
    tied = [normal(6, 5, seed=q) for q in range(2)]
    extra = {"bn.running_mean": torch.full((3,), 7.0), "steps": torch.tensor(5), "empty": torch.zeros(0, 4)}
    noise = correlated(random_psd(2, 3, seed=1))
    received = [{"head": x, "embed": x, "half": x.to(torch.bfloat16), "odd": x[0, 0].clone(), **extra} for x in tied]
    before = [{key: tensor.clone() for key, tensor in vector.items()} for vector in received]
    found = joint_shrink(iter(received), noise, scale=1.0)
    exact = joint_shrink(
        [{k: t.double() if t.is_floating_point() else t for k, t in v.items() if k != "head"} for v in received],
        noise,
        scale=1.0,
    )
    for vector, was, given_, wide in zip(found, before, received, exact, strict=True):
        assert type(vector) is dict
        assert list(vector) == list(given_)
        assert vector["head"] is vector["embed"]
        assert all(torch.equal(vector[key], was[key]) and vector[key] is not given_[key] for key in extra)
        assert all(torch.equal(given_[key], was[key]) for key in was)
        assert vector["half"].dtype == torch.bfloat16
        torch.testing.assert_close(vector["half"].double(), wide["half"], rtol=2**-8, atol=1e-6)
        torch.testing.assert_close(vector["embed"], wide["embed"], rtol=1e-9, atol=1e-12)
    vectors = [TaskVector({"head": x, "embed": x}) for x in tied]
    for vector in joint_shrink(vectors, noise, scale=1.0):
        assert isinstance(vector, TaskVector)
        assert vector["head"] is vector["embed"]


BAD = {
    **BY_ENERGY,
    "scale": ((GOOD, PAIR), {"scale": "tensor_peak"}, InputError, "scale: the peak"),
    "overflow": (
        ([{"w": torch.full((40, 4), 6e4, dtype=torch.float16)}], correlated([[0.1]], torch.tensor([0.01]))),
        {"scale": 1.0, "estimator": "mmse"},
        NonFiniteError,
        "overflow torch.float16",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    arguments, options, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        joint_shrink(*arguments, **options)
