"""What is known of the noise against errors that were made, and the pooling of measurements against closed forms."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rmtllmf.channel import Reception, UplinkScenario, sic, strongest_user_covariance, transmit
from rmtllmf.errors import InputError, NonFiniteError, ShapeError, StateMismatchError
from rmtllmf.resilience._noise import KnownNoise
from rmtllmf.resilience._pooling import pooled

SHAPES = {"a": (71,), "b": (30, 11), "c": (), "d": (299,), "e": (20, 3, 5)}  # 1001 coefficients: symbols straddle
USERS = 3
REPEATS = 60


def vectors(shapes=SHAPES, users=USERS, seed=0):
    draw = np.random.default_rng(seed)
    return [
        {key: torch.as_tensor((q + 1.0) * draw.standard_normal(shape)) for key, shape in shapes.items()}
        for q in range(users)
    ]


def attacked(blocks, users=USERS, seed=3):
    """A receiver that does not know of the attack: complex error covariances, far from diagonal."""
    parts = []
    for b in range(blocks):
        up = UplinkScenario(num_users=users).draw(seed=seed + b)
        C = strongest_user_covariance(up.H, up.P, 124 * up.noise) + up.noise_covariance
        parts.append(sic(up.H, up.P, C, designed_for=up.noise_covariance, order="strongest_first"))
    if blocks == 1:
        return parts[0]
    names = ("mse", "sinr", "rate", "gain", "order", "error_covariance", "noise_covariance")
    return Reception(*(torch.stack([torch.as_tensor(getattr(part, name)) for part in parts]) for name in names))


def flat(vector):
    return torch.cat([vector[key].reshape(-1).double() for key in sorted(vector)])


def block_of(position, length, blocks):
    return position // 2 * blocks // ((length + 1) // 2)


def by_position(known, what):
    """One value a coefficient of the stream, from the parts."""
    return [
        what(key, part) for key in known.stream.keys for part in known.parts[key] for _ in range(part.start, part.stop)
    ]


@pytest.mark.parametrize("estimator", ["additive", "mmse", "unbiased"])
@pytest.mark.parametrize("noise", ["one block", "three blocks", "MSEs in blocks"])
@pytest.mark.parametrize("cut", [0, 1])
def test_gains_covariances_and_imaginary_parts_are_those_of_the_errors(estimator, noise, cut):
    """Every covariance within 5 standard errors, in every part, for an even and an odd number of coefficients."""
    shapes = {**SHAPES, "d": (299 - cut,)}
    sent, length = vectors(shapes), 1001 - cut
    reception = {
        "one block": lambda: attacked(1),
        "three blocks": lambda: attacked(3),
        "MSEs in blocks": lambda: [
            [0.5, 0.1, 0.8],
            [0.0, 0.3, 0.2],
            [0.9, 0.7, 0.05],
            [0.2, 0.2, 0.2],
            [0.4, 0.6, 0.3],
        ],
    }[noise]()
    scale = [float(flat(vector).square().mean().sqrt()) for vector in sent]
    true = torch.stack([flat(vector) for vector in sent])
    heard = torch.stack(
        [
            torch.stack([flat(vector) for vector in transmit(sent, reception, seed=seed, estimator=estimator)])
            for seed in range(REPEATS)
        ]
    )
    received = transmit(sent, reception, seed=0, estimator=estimator)
    known = KnownNoise.of(received, reception, estimator=estimator, scale=scale)
    blocks = len(known.gain)
    assert by_position(known, lambda _, part: part.block) == [block_of(j, length, blocks) for j in range(length)]
    gain = torch.stack(by_position(known, lambda _, part: known.gain[part.block]))
    error = heard - (gain * true.T).T
    assert estimator == "mmse" or bool((known.gain == 1).all())

    position = 0
    for key in known.stream.keys:
        for part in known.parts[key]:
            here = range(position, position := position + part.stop - part.start)
            samples = error[:, :, here].transpose(1, 2).reshape(-1, USERS)
            law = known.covariance_of(key, part.block)
            bound = 5 * ((torch.outer(law.diagonal(), law.diagonal()) + law**2) / len(samples)).sqrt()
            mean_bound = 5 * (law.diagonal() / len(samples)).sqrt()
            assert bool((samples.mean(0).abs() <= mean_bound + 1e-12).all())
            assert bool(((samples.T @ samples / len(samples) - law).abs() <= bound + 1e-12).all())

    even = length // 2 * 2
    x, y = error[:, :, 0:even:2], error[:, :, 1:even:2]
    for block in range(blocks):
        symbols = [k for k in range(even // 2) if block_of(2 * k, length, blocks) == block]
        u, w = (part[:, :, symbols].transpose(1, 2).reshape(-1, USERS) for part in (x, y))
        law = known.complex_covariance_of("a", block)
        power = law.diagonal().real
        bound = 5 * (torch.outer(power, power) * 2 / len(u)).sqrt() + 1e-12
        assert bool(((w.T @ u / len(u) - law.imag).abs() <= bound).all())
        z = torch.complex(u, w)
        assert bool(((z.T @ z.conj() / (2 * len(u)) - law).abs() <= bound).all())
        torch.testing.assert_close(law.real, known.covariance_of("a", block))


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) > 0),
    share=st.floats(0, 1),
)
@settings(max_examples=100)
def test_parts_tile_every_tensor(sizes, share):
    length = sum(sizes)
    blocks = 1 + int(share * ((length + 1) // 2 - 1))
    received = [{f"t{k}": torch.ones(size) for k, size in enumerate(sizes)} for _ in range(2)]
    known = KnownNoise.of(received, [[0.1, 0.2]] * blocks, scale=1.0)
    position = 0
    for key, size in zip(known.stream.keys, sizes, strict=True):
        at = 0
        for part in known.parts[key]:
            assert part.start == at < part.stop
            for j in range(position + part.start, position + part.stop):
                assert part.block == block_of(j, length, blocks)
            at = part.stop
        assert at == size
        position += size


@pytest.mark.parametrize("estimator", ["additive", "mmse", "unbiased"])
@pytest.mark.parametrize("scale", ["rms", "tensor_rms"])
def test_the_scale_is_read_off_the_received_power(estimator, scale):
    """Within 5 standard errors of the received power, whose relative one is sqrt(2 n^2 + 4 g^2 n)/(g^2 + n)/sqrt(N)."""
    draw = np.random.default_rng(5)
    sent = [
        {"a": torch.from_numpy(10.0**q * draw.standard_normal(3001)), "b": torch.from_numpy(draw.standard_normal(2001))}
        for q in range(2)
    ]
    mse = torch.tensor([[0.9, 0.1], [0.8, 0.3]]) if estimator == "additive" else torch.tensor([[0.9, 0.1]])
    received = transmit(sent, mse, seed=7, estimator=estimator, scale=scale)
    known = KnownNoise.of(received, mse, estimator=estimator, scale=scale)
    for q, vector in enumerate(sent):
        g, noise = float(known.gain[:, q].mean()), float(known.covariance[:, q, q].mean())
        for key in vector:
            part = torch.cat(list(vector.values())) if scale == "rms" else vector[key]
            expected = float(part.square().mean().sqrt())
            error = math.sqrt(2 * noise**2 + 4 * g**2 * noise) / (g**2 + noise) / math.sqrt(len(part)) / 2
            assert known.scale[q][key] == pytest.approx(expected, rel=5 * error)
            assert 5 * error < 0.09
    assert (known.scale[1]["a"] == known.scale[1]["b"]) == (scale == "rms")


def test_variances_are_means_over_parts_after_division_by_the_gains():
    received = [{"a": torch.ones(3), "b": torch.ones(5), "none": torch.ones(0)}]
    mse = [[0.5], [0.25]]  # symbols 0, 1 and 2, 3: coefficients 0 to 3 and 4 to 7
    for estimator in ("mmse", "unbiased"):
        known = KnownNoise.of(received, mse, estimator=estimator, scale=2.0)
        assert known.variance("a").tolist() == pytest.approx([4 * 1.0])
        assert known.variance("b").tolist() == pytest.approx([4 * (1 * 1.0 + 4 * (1 / 3)) / 5])
        assert known.variance("none").tolist() == [0.0]


def test_one_scale_for_all_or_one_for_each():
    received = vectors()
    for one in (2.0, np.float32(2.0), torch.tensor([2.0] * 3), np.full(3, 2.0), [2, 2, 2], (2.0,) * 3):
        known = KnownNoise.of(received, [0.5] * 3, scale=one)
        assert known.scale == [dict.fromkeys(SHAPES, 2.0)] * 3
        assert known.covariance_of("b", 0).diagonal().tolist() == pytest.approx([2.0] * 3)
    known = KnownNoise.of(received, [0.5] * 3, scale=[1, 2, 3])
    assert known.covariance_of("b", 0).diagonal().tolist() == pytest.approx([0.5, 2.0, 4.5])


def test_ties_are_sent_once_and_nothing_else_is_noisy():
    shared = [torch.arange(5.0) + q for q in range(2)]
    received = [
        {"z.head": x, "embed": x, "w": x + 1, "steps": torch.tensor(3), "bn.running_mean": torch.ones(4)}
        for x in shared
    ]
    known = KnownNoise.of(received, [[0.1, 0.2], [0.3, 0.4]], scale=1.0)
    assert known.stream.keys == ["embed", "w"]
    # 10 coefficients, 5 symbols; the second block starts with symbol 3
    assert [(p.start, p.stop, p.block) for p in known.parts["embed"]] == [(0, 5, 0)]
    assert [(p.start, p.stop, p.block) for p in known.parts["w"]] == [(0, 1, 0), (1, 5, 1)]
    result = known.stream.formed(0, {"embed": torch.zeros(5), "w": torch.ones(5)})
    assert result["embed"] is result["z.head"]
    assert torch.equal(result["bn.running_mean"], torch.ones(4))
    assert int(result["steps"]) == 3


GOOD = vectors()
MSE = [0.1, 0.2, 0.3]
NAN = [{"a": torch.ones(2)}, {"a": torch.tensor([1.0, math.nan])}]
BAD = {
    "peak": ((GOOD, MSE), {"scale": "peak"}, InputError, "scale: the peak .* got 'peak'; give the number"),
    "tensor_peak": ((GOOD, MSE), {"scale": "tensor_peak"}, InputError, "got 'tensor_peak'"),
    "no such scale": ((GOOD, MSE), {"scale": "max"}, InputError, "scale: expected one of 'rms'.*got 'max'"),
    "scale 0": ((GOOD, MSE), {"scale": 0.0}, InputError, "scale: expected a positive finite number, got 0"),
    "scale inf": ((GOOD, MSE), {"scale": math.inf}, InputError, "scale: expected a positive finite number"),
    "one of the scales": ((GOOD, MSE), {"scale": [1, -1, 1]}, InputError, re.escape("scale[1]: expected a positive")),
    "two scales": ((GOOD, MSE), {"scale": [1, 1]}, ShapeError, "one number for each of 3 users, got 2"),
    "scales in rows": (
        (GOOD, MSE),
        {"scale": np.ones((3, 1))},
        TypeError,
        re.escape("scale[0]: expected a real"),
    ),
    "scale of a wrong type": ((GOOD, MSE), {"scale": None}, TypeError, "scale: expected a real number, got NoneType"),
    "estimator": ((GOOD, MSE), {"estimator": "best"}, InputError, "estimator: expected one of"),
    "users": ((GOOD, [0.1, 0.2]), {}, ShapeError, "for 3 vectors"),
    "no vectors": (([], MSE), {}, InputError, "at least one mapping"),
    "nothing sent": (([{"i": torch.arange(3)}], [0.1]), {}, InputError, "no floating-point entries"),
    "blocks": (([{"a": torch.ones(4)}], [[0.1]] * 3), {}, InputError, "3 blocks are more than the 2 symbols"),
    "keys": (([{"a": torch.ones(2)}, {"b": torch.ones(2)}], [0.1, 0.1]), {}, StateMismatchError, "'a'"),
    "NaN in what is measured": ((NAN, [0.1, 0.1]), {}, NonFiniteError, re.escape("received[1]['a'] holds NaN")),
    "NaN in MSEs": ((GOOD, [0.1, math.nan, 0.1]), {}, NonFiniteError, "mse"),
    "negative MSE": ((GOOD, [0.1, -0.1, 0.1]), {}, InputError, "at least 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    arguments, options, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        KnownNoise.of(*arguments, **options)


# Pooling


def normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


@given(n=st.integers(2, 12), spread=st.floats(-4, 4), level=st.floats(-6, 6), seed=st.integers(0, 2**20))
def test_equal_errors_have_a_closed_form(n, spread, level, seed):
    """Paule and Mandel's t^2 is then the sample variance less the error's, as in James and Stein's estimate."""
    values = 10**level * (3 + 10**spread * normal(n, seed=seed))
    s2 = 10 ** (2 * level)
    mean, t2 = values.mean(), max(0.0, float(values.var()) - s2)
    expected = mean + t2 / (t2 + s2) * (values - mean)
    found = pooled(values, torch.full((n,), s2, dtype=torch.float64))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * 10**level)


@given(n=st.integers(2, 10), seed=st.integers(0, 2**20))
def test_the_spread_solves_paule_and_mandels_equation(n, seed):
    """With t^2 and m got back from two results, the weighted squares about m add up to n - 1, or t^2 is 0."""
    errors = 10 ** (2 * normal(n, seed=seed).double())
    values = 3 * normal(n, seed=seed + 1)
    found = pooled(values, errors)
    moved = (found - values) / errors  # (m - v) / (t^2 + s^2)
    i, j = int(errors.argmin()), int(errors.argmax())
    # two linear equations for t^2 and m
    matrix = torch.stack([torch.stack([moved[k], torch.tensor(-1.0, dtype=torch.float64)]) for k in (i, j)])
    t2, m = torch.linalg.solve(matrix, torch.stack([-values[k] - moved[k] * errors[k] for k in (i, j)])).tolist()
    weight = 1 / (errors + t2)
    assert m == pytest.approx(float((weight * values).sum() / weight.sum()), rel=1e-4, abs=1e-6)
    squares = float((weight * (values - m) ** 2).sum())
    if t2 > 1e-6:
        assert squares == pytest.approx(n - 1, rel=1e-4)
    else:
        assert t2 == pytest.approx(0, abs=1e-6)
        assert squares <= (n - 1) * (1 + 1e-6)


def test_limits_of_pooling():
    values = torch.tensor([1.0, 2.0, 6.0, 100.0], dtype=torch.float64)
    inf = math.inf
    exact = pooled(values, torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64))
    assert exact[0] == values[0]
    assert torch.equal(pooled(values, torch.zeros(4, dtype=torch.float64)), values)
    # what says nothing becomes the mean of the others, and changes none of them
    with_nothing = pooled(values, torch.tensor([1.0, 1.0, 1.0, inf], dtype=torch.float64))
    torch.testing.assert_close(with_nothing[:3], pooled(values[:3], torch.ones(3, dtype=torch.float64)))
    assert with_nothing[3] == pytest.approx(3.0)
    assert pooled(values, torch.full((4,), inf, dtype=torch.float64)).tolist() == [0.0] * 4
    # no more spread than the errors': the weighted mean
    errors = torch.tensor([100.0, 400.0, 25.0], dtype=torch.float64)
    mean = float((values[:3] / errors).sum() / (1 / errors).sum())
    assert pooled(values[:3], errors).tolist() == pytest.approx([mean] * 3)
    assert pooled(values[:1], torch.ones(1, dtype=torch.float64)).tolist() == [1.0]


def test_rows_are_pooled_by_themselves_and_units_do_not_matter():
    values, errors = 3 * normal(5, 7, seed=1), normal(5, 7, seed=2) ** 2
    errors[1, 2], errors[3] = math.inf, 0.0
    whole = pooled(values, errors)
    for row in range(5):
        torch.testing.assert_close(whole[row], pooled(values[row], errors[row]), rtol=1e-9, atol=1e-12)
    for unit in (1e-12, 1e9):
        torch.testing.assert_close(pooled(unit * values, unit**2 * errors), unit * whole, rtol=1e-9, atol=0)
    shifted = pooled(values[0] + 5, errors[0])
    torch.testing.assert_close(shifted, whole[0] + 5, rtol=0, atol=1e-9)


@pytest.mark.parametrize("spread", [0.0, 0.3, 1.0, 3.0, 30.0])
@pytest.mark.parametrize("count", [5, 50])
def test_pooled_values_are_nearer_to_the_truth(spread, count):
    """Never farther than the raw ones, and by less than half of one measurement's error than those of who knows t."""
    draws = 4000
    errors = torch.logspace(-1, 1, count, dtype=torch.float64).expand(draws, count)
    true = 7 + spread * normal(draws, count, seed=1)
    values = true + errors.sqrt() * normal(draws, count, seed=2)
    weight, trust = 1 / (spread**2 + errors), spread**2 / (spread**2 + errors)
    mean = (weight * values).sum(-1, keepdim=True) / weight.sum(-1, keepdim=True)
    risk, raw, oracle = (
        (found - true).square().sum(-1) for found in (pooled(values, errors), values, mean + trust * (values - mean))
    )
    gained = raw - risk
    assert gained.mean() >= -4 * gained.std() / draws**0.5
    assert (risk - oracle).mean() <= 0.5 * errors.mean()
    if spread <= 3:
        assert risk.mean() <= 0.75 * raw.mean()
