"""False alarms within their rate, power at stated SNRs, and what a defence is worth."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rmtllmf.channel import UplinkScenario, sic, strongest_user_covariance, transmit
from rmtllmf.errors import InputError, ShapeError, StateMismatchError
from rmtllmf.resilience.attacks import backdoor, foreign, scaled, sign_flipped, with_nan
from rmtllmf.resilience.suspects import suspects
from rmtllmf.taskvec import TaskVector, coordinate_median, multi_krum, task_arithmetic

NAN = float("nan")
TRIALS = 100


def mse_of(snr_db, users=8):
    return [10 ** (-snr_db / 10)] * users


def with_cosines(cosines, n=2000, seed=0):
    """Vectors of unit mean square that have exactly these cosines, in float64."""
    cosines = torch.as_tensor(cosines, dtype=torch.float64)
    X = torch.randn(n, len(cosines), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows = torch.linalg.cholesky(cosines) @ torch.linalg.qr(X).Q.T * math.sqrt(n)
    return [{"w": row.clone()} for row in rows]


def matrix(users, **pairs):
    cosines = torch.eye(users, dtype=torch.float64)
    for pair, value in pairs.items():
        a, b = int(pair[1]), int(pair[2])
        cosines[a, b] = cosines[b, a] = value
    return cosines


def shapes(width=32, blocks=3):
    sizes = {"embed": (256, width), "ln.weight": (width,), "head": (width, 64)}
    for i in range(blocks):
        sizes |= {f"{i}.ln.weight": (width,), f"{i}.ln.bias": (width,)}
        sizes |= {f"{i}.qkv": (3 * width, width), f"{i}.out": (width, width)}
        sizes |= {f"{i}.up": (4 * width, width), f"{i}.down": (width, 4 * width)}
    return sizes


def task_vectors(users=8, common=0.1, seed=0, scatter=0.15):
    """Like those of a small transformer: energies that differ from tensor to tensor by a factor of a hundred, alike in
    all tasks but for a scatter; norms within a factor of two; cosines near `common`."""
    source = torch.Generator().manual_seed(seed)
    level = {key: 0.01 * math.exp(float(torch.randn((), generator=source))) for key in shapes()}
    shared = {key: torch.randn(size, generator=source) for key, size in shapes().items()}
    vectors = []
    for q in range(users):
        size_of = 2 ** (q / max(1, users - 1) - 0.5)
        vector = {}
        for key, size in shapes().items():
            own = math.sqrt(1 - common) * torch.randn(size, generator=source) + math.sqrt(common) * shared[key]
            vector[key] = size_of * level[key] * math.exp(scatter * float(torch.randn((), generator=source))) * own
        vectors.append(vector)
    return vectors


def jammed(users=4):
    """A receiver that is unaware of the strongest-user attack: errors of users are correlated up to .9."""
    scenario = UplinkScenario(num_users=users)
    up = scenario.draw(seed=3)
    thermal = scenario.noise * torch.eye(16, dtype=torch.complex128)
    C = strongest_user_covariance(up.H, up.P, 124 * scenario.noise) + thermal
    return sic(up.H, up.P, C, designed_for=thermal, order="strongest_first")


def at_most(rate, trials):
    """Successes that a binomial number with this rate exceeds once in ten thousand times."""
    from scipy.stats import binom

    return int(binom.isf(1e-4, trials, rate))


def at_least(rate, trials):
    from scipy.stats import binom

    return int(binom.isf(1 - 1e-4, trials, rate)) - 1


CHANNELS = {
    "10 dB": (mse_of(10, 4), "additive", "rms"),
    "0 dB": (mse_of(0, 4), "additive", "rms"),
    "-20 dB": (mse_of(-20, 4), "additive", "rms"),
    "-20 dB, known scale": (mse_of(-20, 4), "additive", 1.0),
    "shrunk estimates": ([0.1, 0.2, 0.9, 0.1], "mmse", "rms"),
    "correlated": (jammed(), "additive", "rms"),
    "correlated, known scale": (jammed(), "additive", 1.0),
    "correlated, shrunk": (jammed(), "mmse", "tensor_rms"),
    "two blocks": ([mse_of(10, 4), mse_of(-3, 4)], "additive", "rms"),
}


def trials_of(cosines, channel, count, **limits):
    reception, estimator, scale = CHANNELS[channel]
    sent = with_cosines(cosines)
    for seed in range(count):
        received = transmit(sent, reception, seed=seed, estimator=estimator, scale=scale)
        yield suspects(received, reception, estimator=estimator, scale=scale, **limits)


def test_the_errors_of_the_jammed_receiver_are_correlated():
    E = jammed().error_covariance.numpy()
    deviation = np.sqrt(np.diag(E).real)
    assert np.abs((E / np.outer(deviation, deviation)).real - np.eye(4)).max() > 0.9


@pytest.mark.parametrize("channel", CHANNELS)
def test_false_alarms_at_the_limit(channel):
    """Cosines of exactly 0 with the limit there: any of 4 + 6 tests at its own rate, the family below."""
    found = list(trials_of(matrix(4), channel, TRIALS, opposed=0.0, false_alarm=0.2))
    assert sum(len(s.accepted) < 4 for s in found) <= at_most(0.2, TRIALS)
    rows, columns = torch.triu_indices(4, 4, 1)
    for q in range(4):
        alone = sum(float(s.p_values["direction"][q]) <= 0.1 for s in found)
        assert at_least(0.05, TRIALS) <= alone <= at_most(0.1, TRIALS)
    # the errors are those that the tests believe in: scores have mean 0 and variance 1 (4.5 and 2 to 5 standard errors)
    scores = torch.special.ndtri(torch.stack([s.p_values["opposed"][rows, columns] for s in found]))
    assert scores.mean(dim=0).abs().max() < 4.5 / math.sqrt(TRIALS)
    assert float(scores.square().mean()) == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize("channel", CHANNELS)
def test_false_alarms_of_pairs_at_other_limits(channel):
    found = list(trials_of(matrix(4, _01=-0.1, _23=0.95), channel, TRIALS))
    for name, q, r in (("opposed", 0, 1), ("copied", 2, 3)):
        hits = sum(float(s.p_values[name][q, r]) <= 0.1 for s in found)
        assert at_least(0.1, TRIALS) <= hits <= at_most(0.1, TRIALS), name


@pytest.mark.parametrize("channel", ["0 dB", "-20 dB", "-20 dB, known scale", "correlated"])
def test_false_alarms_of_norms_at_the_limit(channel):
    """Three times as long as the others, exactly; and found when four times as long, where the scale is told."""
    reception, _, scale = CHANNELS[channel]
    scale = scale if scale == "rms" else [1.0, 1.0, 1.0, 3.0]
    sent = with_cosines(matrix(4))
    hits, power = 0, 0
    for seed in range(TRIALS // 2):
        for factor in (3.0, 4.0):
            vectors = [*sent[:3], scaled(sent[3], factor)]
            if scale == "rms":
                received = transmit(vectors, reception, seed=seed)
            else:  # every user by its own number: the noise is that of the number
                parts = [transmit(vectors, reception, seed=seed, scale=number) for number in (1.0, 3.0)]
                received = [*parts[0][:3], parts[1][3]]
            found = suspects(received, reception, scale=scale, false_alarm=0.2)
            if factor == 3.0:
                hits += float(found.p_values["norm"][3]) <= 0.1
            else:
                power += 3 not in found.accepted
    assert hits <= at_most(0.1, TRIALS // 2)
    assert (power == TRIALS // 2) == (
        scale == "rms"
    )  # a known scale tells nothing: energy must be seen through the noise


@pytest.mark.parametrize("snr_db", [20, 0, -10, -20])
def test_honest_vectors_pass_all_tests_at_any_noise(snr_db):
    sent = task_vectors()
    for scale in ("rms", "tensor_rms"):
        for seed in range(15):
            received = transmit(sent, mse_of(snr_db), seed=seed, scale=scale)
            found = suspects(received, mse_of(snr_db), scale=scale)
            assert found.accepted == tuple(range(8)), repr(found)
    if snr_db >= 0:
        assert (found.profile > 0.7).all()


def test_the_slope_of_a_common_profile_is_one_at_any_noise_that_it_is_seen_through():
    for snr_db in (20, 0):
        slopes = []
        for seed in range(10):
            sent = task_vectors(scatter=0.0)
            slopes.append(suspects(transmit(sent, mse_of(snr_db), seed=seed), mse_of(snr_db)).profile)
        found = torch.stack(slopes).flatten()
        error = float(found.std()) / math.sqrt(10)  # the eight slopes of one reception share a median
        assert float(found.mean()) == pytest.approx(1, abs=max(3 * error, 0.01))
        assert error < 0.03


def noiseless_cosines(vectors):
    rows = torch.stack([torch.cat([t.flatten().double() for t in v.values()]) for v in vectors])
    return rows.norm(dim=1), torch.nn.functional.normalize(rows) @ torch.nn.functional.normalize(rows).T


@pytest.mark.parametrize("estimator", ["additive", "mmse", "unbiased"])
def test_norms_and_cosines_are_those_of_what_was_sent(estimator):
    """Within five of the standard errors of theory: (1 + c) / sqrt(n) for a cosine, half of sqrt(2) for a norm."""
    sent = task_vectors(4)
    reception = [0.5, 0.4, 0.3, 0.6] if estimator == "mmse" else [[0.5, 0.4, 0.3, 0.6], [0.2, 0.3, 0.6, 0.1]]
    received = transmit(sent, reception, seed=1, estimator=estimator)
    found = suspects(received, reception, estimator=estimator)
    norm, cosines = noiseless_cosines(sent)
    n = sum(t.numel() for t in sent[0].values())
    noise = 1.5  # 0.6 / (1 - 0.6): of a coefficient, in the worst case
    torch.testing.assert_close(found.norm, norm, rtol=5 * (1 + noise) / math.sqrt(2 * n), atol=0)
    torch.testing.assert_close(found.cosines, cosines, rtol=0, atol=5 * (1 + noise) / math.sqrt(n))


def attacked(attack, snr_db, common=0.1, seed=0):
    """User 2 of eight lies."""
    sent = task_vectors(common=common)
    lies = {
        "scaled": lambda: scaled(sent[2], 100.0),
        "shrunk": lambda: scaled(sent[2], 0.01),
        "flipped": lambda: sign_flipped(sent[2]),
        "flipped twin": lambda: sign_flipped(backdoor(sent[5], sent[2], 0.5)),
        "against all": lambda: {key: -sum(v[key] for q, v in enumerate(sent) if q != 2) / 3 for key in sent[2]},
        "foreign": lambda: foreign(sent[2], 9),
        "foreign as a whole": lambda: foreign(sent[2], 9, per_tensor=False),
        "backdoor": lambda: backdoor(sent[2], foreign(sent[2], 8), 10.0),
        "weak backdoor": lambda: backdoor(sent[2], foreign(sent[2], 8), 1.0),
        "copy": lambda: scaled(sent[5], 1.1),
        "nan": lambda: sent[2],
    }
    sent[2] = lies[attack]()
    mse = mse_of(snr_db)
    if attack == "copy":
        mse[2] *= 1.2
    received = transmit(sent, mse, seed=seed)
    if attack == "nan":
        received[2] = with_nan(received[2], seed)
    return sent, received, mse


@pytest.mark.parametrize(
    ("attack", "lowest_snr", "reason"),
    [
        ("nan", -20, "1 entries are not finite"),
        ("scaled", -20, r"norm is 9\d\.?\d* times|norm is 1\d\d times"),
        ("shrunk", -20, r"norm is 0\.0\d+ times"),
        ("backdoor", -20, r"norm is \d+(\.\d)? times|norm is \d"),
        ("against all", -15, "opposes"),
        ("flipped", -5, "opposes"),
        ("flipped twin", -5, "opposes"),
        ("copy", 0, r"is the vector of user 5 \(cosine"),
        ("foreign as a whole", 0, "energy per tensor"),
    ],
)
def test_every_liar_is_found_and_nobody_else(attack, lowest_snr, reason):
    import re

    for snr_db in (math.inf, 20, lowest_snr):  # without noise there are no errors to count in
        for seed in range(5):
            _, received, mse = attacked(attack, snr_db, seed=seed)
            found = suspects(received, mse)
            assert found.accepted == (0, 1, 3, 4, 5, 6, 7), repr(found)
            assert re.search(reason, found.reasons[2]), found.reasons
            assert f"user 2: {found.reasons[2]}" in repr(found)


@pytest.mark.parametrize(("attack", "common"), [("foreign", 0.1), ("flipped", 0.0), ("weak backdoor", 0.1)])
def test_what_cannot_be_told_from_an_honest_vector_passes(attack, common):
    """The limits that the documentation states; if these are found one day it must be rewritten."""
    for snr_db in (20, -10):
        _, received, mse = attacked(attack, snr_db, common)
        assert suspects(received, mse).accepted == tuple(range(8))


def test_told_energies_show_a_foreign_profile_at_20_db_below_the_noise():
    sent = task_vectors()
    sent[2] = foreign(sent[2], 9, per_tensor=False)
    received = transmit(sent, mse_of(-20), seed=0, scale="tensor_rms")
    found = suspects(received, mse_of(-20), scale="tensor_rms")
    assert found.accepted == (0, 1, 3, 4, 5, 6, 7)
    assert abs(float(found.profile[2])) < 0.3


def test_of_two_opposed_the_rest_decides_and_where_it_cannot_both_are_out():
    told = matrix(5, _01=-0.8, _02=0.2, _03=0.2, _12=-0.2, _13=-0.2)
    equal = matrix(5, _01=-0.8)
    two = matrix(2, _01=-0.8)
    for cosines, accepted in ((told, (0, 2, 3, 4)), (equal, (2, 3, 4)), (two, ())):
        sent = with_cosines(cosines, n=20_000)
        found = suspects(transmit(sent, [0.5] * len(sent), seed=0), [0.5] * len(sent))
        assert found.accepted == accepted, repr(found)
    assert [found.reasons[q][:14] for q in (0, 1)] == ["opposes user 1", "opposes user 0"]
    _, received, mse = attacked("flipped twin", -15)  # too noisy to tell which of the twins it is
    assert suspects(received, mse).accepted == (0, 1, 3, 4, 6, 7)


def test_of_copies_the_one_received_best_is_kept():
    sent = with_cosines(matrix(4), n=20_000)
    sent[3] = sent[1]
    for mse, kept in (([0.1, 0.3, 0.1, 0.2], (0, 2, 3)), ([0.1, 0.2, 0.1, 0.3], (0, 1, 2))):
        assert suspects(transmit(sent, mse, seed=0), mse).accepted == kept


def test_three_liars_of_eight_that_shout_together():
    sent = task_vectors()
    for q in (1, 4, 6):
        sent[q] = scaled(sent[q], 100.0)
    for snr_db in (20, -20):
        received = transmit(sent, mse_of(snr_db), seed=0)
        assert suspects(received, mse_of(snr_db)).accepted == (0, 2, 3, 5, 7)


def test_tasks_whose_norms_spread_are_allowed_more():
    spread = [scaled(v, f) for v, f in zip(with_cosines(matrix(6)), (1, 3, 9, 27, 81, 243), strict=True)]
    alike = [scaled(v, f) for v, f in zip(with_cosines(matrix(6)), (1, 1.1, 1.2, 1.3, 1.4, 27), strict=True)]
    assert suspects(transmit(spread, [0.1] * 6, seed=0), [0.1] * 6).accepted == tuple(range(6))
    assert suspects(transmit(alike, [0.1] * 6, seed=0), [0.1] * 6).accepted == tuple(range(5))
    assert suspects(transmit(alike, [0.1] * 6, seed=0), [0.1] * 6, norm_ratio=30).accepted == tuple(range(6))


@pytest.mark.parametrize("bomb", [NAN, float("inf"), -float("inf"), 1e200])
def test_a_bomb_is_a_finding_and_the_others_are_judged_as_if_it_had_never_come(bomb):
    sent = with_cosines(matrix(5, _34=-0.8))
    received = transmit(sent, [0.1, 0.2, 0.3, 0.4, 0.5], seed=0)
    hit = {"w": received[1]["w"].clone()}
    hit["w"][[3, 7]] = bomb
    found = suspects([received[0], hit, *received[2:]], [0.1, 0.2, 0.3, 0.4, 0.5])
    rest = suspects([received[0], *received[2:]], [0.1, 0.3, 0.4, 0.5])
    assert found.nonfinite == (0, 2, 0, 0, 0)
    assert found.reasons[1] == "2 entries are not finite"
    assert found.reasons[3].startswith("opposes user 4 (cosine -0.8")
    assert found.accepted == (0, 2)
    others = torch.tensor([0, 2, 3, 4])
    assert found.norm[1].isnan()
    assert torch.equal(found.norm[others], rest.norm)
    assert torch.equal(found.cosines[others][:, others], rest.cosines)
    assert found.tests == rest.tests
    assert all(torch.equal(found.p_values["norm"][others], p) for p in [rest.p_values["norm"]])


def test_nobody_is_left_when_all_send_nan():
    found = suspects([{"w": torch.full((4,), NAN)}] * 3, [0.1] * 3)
    assert (found.accepted, found.nonfinite) == ((), (4, 4, 4))
    assert found.norm.isnan().all()
    assert "4 entries" in repr(found)


def test_a_single_user_cannot_be_compared_and_an_all_zero_vector_is_a_short_one():
    (sent,) = with_cosines(matrix(1))
    assert suspects(transmit([sent], [0.1], seed=0), [0.1]).accepted == (0,)
    received = [*with_cosines(matrix(4)), {"w": torch.zeros(2000, dtype=torch.float64)}]
    for scale in ("rms", "tensor_rms"):
        found = suspects(received, [0.0] * 5, scale=scale)
        assert found.accepted == (0, 1, 2, 3)
        assert found.reasons == {4: "norm is 0 times the median of the others"}


def test_form_and_ties_and_entries_that_are_not_sent_change_nothing():
    sent = task_vectors(4)
    received = transmit(sent, [0.3] * 4, seed=0)
    plain = suspects(received, [0.3] * 4)
    carried = [
        {**vector, "z": vector["embed"], "steps": torch.tensor(3), "bn.running_mean": torch.full((2,), NAN)}
        for vector in received
    ]
    for other in ([TaskVector(vector) for vector in received], carried, iter(received)):
        found = suspects(other, [0.3] * 4)
        assert repr(found) == repr(plain)
        assert torch.equal(found.cosines, plain.cosines)
    half = suspects([{k: t.to(torch.bfloat16) for k, t in v.items()} for v in received], [0.3] * 4)
    torch.testing.assert_close(half.norm, plain.norm, rtol=1e-2, atol=0)


@settings(max_examples=15)
@given(st.permutations(range(5)), st.integers(-60, 60), st.integers(0, 1000))
def test_permutations_and_common_scales(order, power, seed):
    sent = task_vectors(5, seed=seed % 3)
    sent[1], sent[3] = scaled(sent[1], 50.0), sign_flipped(sent[4])
    mse = [0.1, 0.2, 0.3, 0.4, 0.5]
    received = transmit(sent, mse, seed=seed)
    plain = suspects(received, mse)
    turned = suspects([received[q] for q in order], [mse[q] for q in order])
    assert {order[q] for q in turned.accepted} == set(plain.accepted)
    torch.testing.assert_close(turned.norm, plain.norm[order])
    torch.testing.assert_close(turned.cosines, plain.cosines[order][:, order])
    torch.testing.assert_close(turned.profile, plain.profile[order], equal_nan=True)
    for name, p in plain.p_values.items():
        moved = p[order] if p.ndim == 1 else p[order][:, order]
        torch.testing.assert_close(turned.p_values[name], moved, rtol=1e-4, atol=1e-12)
    louder = suspects([{k: t * 2.0**power for k, t in v.items()} for v in received], mse)
    assert louder.accepted == plain.accepted
    assert louder.reasons == plain.reasons
    torch.testing.assert_close(louder.norm, plain.norm * 2.0**power)
    for name, p in plain.p_values.items():
        torch.testing.assert_close(louder.p_values[name], p, rtol=1e-4, atol=1e-12)


def flat(vector):
    return torch.cat([vector[key].flatten() for key in sorted(vector)]).double()


DEFENCES = {
    "none": lambda received, mse: task_arithmetic(received, scale=1.0),
    "suspects": lambda received, mse: task_arithmetic(
        [received[q] for q in suspects(received, mse).accepted], scale=1.0
    ),
    "median": lambda received, mse: coordinate_median(received, scale=7.0),
    "krum": lambda received, mse: multi_krum(received, 1, scale=7.0),
    "oracle": lambda received, mse: task_arithmetic([v for q, v in enumerate(received) if q != 2], scale=1.0),
}


def cost_of(attack, defence, snr_db):
    """Distance of the fused update to the honest users' clean sum, relative to that; user 2 is hostile."""
    sent, received, mse = attacked(attack, snr_db)
    honest = flat(task_arithmetic([v for q, v in enumerate(sent) if q != 2], scale=1.0))
    return float((flat(DEFENCES[defence](received, mse)) - honest).norm() / honest.norm())


@pytest.mark.parametrize("snr_db", [20, 0, -10])
def test_what_attacks_cost(snr_db):
    """Detection of a liar gives what the honest rest gives; no rule that keeps a vote for the liar does better than
    the median does, and the plain sum is the liar's."""
    for attack in ("scaled", "backdoor"):
        cost = {defence: cost_of(attack, defence, snr_db) for defence in DEFENCES}
        assert cost["suspects"] == cost["oracle"]
        assert cost["none"] > 2 * cost["suspects"]
        assert cost["none"] > 2 * cost["median"]
    assert cost_of("scaled", "none", snr_db) > 20
    if snr_db >= 0:
        for attack in ("flipped", "foreign as a whole"):
            assert cost_of(attack, "suspects", snr_db) == cost_of(attack, "oracle", snr_db)
            assert cost_of(attack, "none", snr_db) > cost_of(attack, "suspects", snr_db)
    assert cost_of("foreign", "suspects", snr_db) == cost_of("foreign", "none", snr_db)


def test_nan_passes_through_every_sum_but_not_through_this():
    assert math.isnan(cost_of_nan("none"))
    assert cost_of_nan("suspects") == cost_of_nan("oracle") < 1


def cost_of_nan(defence):
    sent, received, mse = attacked("nan", 0)
    honest = flat(task_arithmetic([v for q, v in enumerate(sent) if q != 2], scale=1.0))
    if defence == "none":  # the rules look at what they fuse; a plain sum does not
        return float((sum(flat(v) for v in received) - honest).norm())
    return float((flat(DEFENCES[defence](received, mse)) - honest).norm() / honest.norm())


ONE = {"w": torch.ones(10)}


@pytest.mark.parametrize(
    ("call", "error", "pattern"),
    [
        (lambda: suspects([], [0.1]), InputError, "received: expected at least one"),
        (lambda: suspects(ONE, [0.1]), TypeError, "received: expected a sequence"),
        (lambda: suspects([ONE, 3], [0.1] * 2), TypeError, r"received\[1\]: expected a mapping"),
        (lambda: suspects([ONE, {"v": torch.ones(10)}], [0.1] * 2), StateMismatchError, "lacks 'w'"),
        (lambda: suspects([{"n": torch.arange(3)}], [0.1]), InputError, "no floating-point entries"),
        (lambda: suspects([{"w": torch.zeros(0)}], [0.1]), InputError, "received: all tensors are empty"),
        (lambda: suspects([ONE] * 2, [0.1] * 3), ShapeError, "for 2 vectors"),
        (lambda: suspects([ONE] * 2, [0.1, -0.1]), InputError, "mse: "),
        (lambda: suspects([ONE] * 2, [0.1] * 2, estimator="best"), InputError, "estimator: expected one of"),
        (lambda: suspects([ONE] * 2, [0.1] * 2, scale="peak"), InputError, "scale: the peak"),
        (lambda: suspects([ONE] * 2, [0.1] * 2, scale=[1.0]), ShapeError, "scale: expected one number for each"),
        (lambda: suspects([ONE] * 2, [0.1, 1.0], estimator="mmse"), InputError, "gain of user 1 is 0 in block 0"),
        (lambda: suspects([ONE] * 2, [0.1] * 2, false_alarm=0), InputError, "false_alarm: .*above 0.*got 0"),
        (lambda: suspects([ONE] * 2, [0.1] * 2, false_alarm=1.0), InputError, "false_alarm: .*below 1"),
        (lambda: suspects([ONE] * 2, [0.1] * 2, false_alarm="1"), TypeError, "false_alarm: expected a real number"),
        (lambda: suspects([ONE] * 2, [0.1] * 2, norm_ratio=0.5), InputError, "norm_ratio: .*at least 1"),
        (lambda: suspects([ONE] * 2, [0.1] * 2, opposed=0.1), InputError, "opposed: .*up to 0"),
        (lambda: suspects([ONE] * 2, [0.1] * 2, copied=1), InputError, "copied: .*below 1"),
        (lambda: suspects([ONE] * 2, [0.1] * 2, profile=NAN), InputError, "profile: expected a finite number"),
    ],
)
def test_bad_input(call, error, pattern):
    with pytest.raises(error, match=pattern):
        call()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_single_bomb_of_any_dtype_is_a_finding(dtype, value):
    source = torch.Generator().manual_seed(0)
    vectors = [{"w": torch.randn(4000, generator=source).to(dtype)} for _ in range(4)]
    vectors[1]["w"][7] = value
    found = suspects(vectors, [0.1] * 4, scale=1.0)
    assert found.nonfinite == (0, 1, 0, 0)
    assert found.accepted == (0, 2, 3)
