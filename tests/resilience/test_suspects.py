"""Who is suspected: what is measured of whom, who cannot be compared, and what does not matter."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.suspected_users import matrix, task_vectors, with_cosines
from rmtllmf.channel import transmit
from rmtllmf.errors import InputError, ShapeError, StateMismatchError
from rmtllmf.resilience.attacks import scaled, sign_flipped
from rmtllmf.resilience.suspects import suspects
from rmtllmf.taskvec import TaskVector

NAN = float("nan")


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


def test_of_copies_the_one_received_best_is_kept():
    sent = with_cosines(matrix(4), n=20_000)
    sent[3] = sent[1]
    for mse, kept in (([0.1, 0.3, 0.1, 0.2], (0, 2, 3)), ([0.1, 0.2, 0.1, 0.3], (0, 1, 2))):
        assert suspects(transmit(sent, mse, seed=0), mse).accepted == kept


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
