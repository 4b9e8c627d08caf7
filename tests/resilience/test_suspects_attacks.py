"""Which liars are found at which noise, which cannot be, and what attacks cost with every defence."""

import math

import pytest
import torch

from helpers.suspected_users import attacked, matrix, mse_of, task_vectors, with_cosines
from rmtllmf.channel import transmit
from rmtllmf.resilience.attacks import foreign, scaled
from rmtllmf.resilience.suspects import suspects
from rmtllmf.taskvec import coordinate_median, multi_krum, task_arithmetic


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


def test_three_liars_of_eight_that_shout_together():
    sent = task_vectors()
    for q in (1, 4, 6):
        sent[q] = scaled(sent[q], 100.0)
    for snr_db in (20, -20):
        received = transmit(sent, mse_of(snr_db), seed=0)
        assert suspects(received, mse_of(snr_db)).accepted == (0, 2, 3, 5, 7)


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
