"""The sorting network, and the two rules that are made of it."""

import itertools

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

import rmtllmf.taskvec.rules._sorting as sorting
from rmtllmf.errors import InputError, NonFiniteError
from rmtllmf.taskvec import coordinate_median, task_arithmetic, trimmed_mean
from rmtllmf.taskvec.rules._sorting import network


def run(comparators, wires):
    wires = list(wires)
    for low, high, needs_low, needs_high in comparators:
        a, b = wires[low], wires[high]
        wires[low], wires[high] = np.minimum(a, b) if needs_low else None, np.maximum(a, b) if needs_high else None
    return wires


@pytest.mark.parametrize("count", range(1, 13))
def test_the_network_on_all_inputs_of_zeros_and_ones(count):
    """By the zero-one principle that is on all inputs. In any order within the ranks: their sum decides."""
    every = np.array(list(itertools.product([0, 1], repeat=count))).T
    ordered = np.sort(every, axis=0)
    for first, last in itertools.combinations(range(count + 1), 2):
        ranks = range(first, last)
        out = run(network(count, ranks), every)
        assert np.array_equal(sum(out[rank] for rank in ranks), ordered[first:last].sum(0))


@pytest.mark.parametrize(("count", "comparators"), [(2, 0), (3, 3), (8, 16), (9, 22), (16, 52), (20, 80)])
def test_the_median_takes_fewer_comparators_than_sorting(count, comparators):
    ranks = range((count - 1) // 2, count // 2 + 1)
    assert len(network(count, ranks)) == comparators
    assert not network(count, range(count))


@pytest.mark.parametrize("count", [3, 4, 7, 8, 13, 20])
@pytest.mark.parametrize("rule", [coordinate_median, trimmed_mean])
def test_nan_and_infinity_on_any_wire_are_found(count, rule):
    for culprit, bad in itertools.product((0, 1, count // 2, count - 1), (np.nan, np.inf, -np.inf)):
        vectors = [{"w": torch.full((5,), float(q))} for q in range(count)]
        vectors[culprit]["w"][3] = bad
        with pytest.raises(NonFiniteError, match=rf"vectors\[{culprit}\]\['w'\] holds 1 non-finite"):
            rule(vectors)


def test_infinities_of_both_signs_do_not_cancel_unseen():
    vectors = [{"w": torch.tensor([value])} for value in (float("inf"), 1.0, 2.0, 3.0, float("-inf"))]
    with pytest.raises(NonFiniteError, match=r"vectors\[0\]"):
        coordinate_median(vectors)


def test_large_finite_numbers_are_no_infinities():
    vectors = [{"w": torch.tensor([value])} for value in (3e38, 3e38, -1.0, 3e38)]
    assert coordinate_median(vectors)["w"].item() == pytest.approx(3e38)
    assert coordinate_median(vectors[:3])["w"].item() == pytest.approx(3e38)
    assert trimmed_mean(vectors, 1)["w"].item() == pytest.approx(3e38)


@given(st.integers(1, 21), st.integers(0, 10**6), st.sampled_from([1, 2, 3, 100]))
def test_against_numpy_and_scipy_also_with_ties(count, seed, levels):
    rng = np.random.default_rng(seed)
    x = rng.integers(-levels, levels + 1, (count, 11)).astype(float)
    vectors = [{"w": torch.from_numpy(row)} for row in x]
    assert np.array_equal(coordinate_median(vectors)["w"], np.median(x, axis=0))
    for trim in range((count + 1) // 2):
        expected = scipy.stats.trim_mean(x, (trim + 0.5) / count, axis=0)
        np.testing.assert_allclose(trimmed_mean(vectors, trim)["w"], expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("count", [5, 8])
def test_chunks_inside_a_piece(monkeypatch, count):
    x = torch.randn(count, 1000, generator=torch.Generator().manual_seed(count))
    vectors = [{"w": row} for row in x]
    whole = coordinate_median(vectors)["w"]
    monkeypatch.setattr(sorting, "CHUNK", 64)
    assert torch.equal(coordinate_median(vectors)["w"], whole)
    vectors[3]["w"][997] = float("inf")
    with pytest.raises(NonFiniteError, match=r"vectors\[3\]"):
        coordinate_median(vectors)


def test_shares_and_counts():
    vectors = [{"w": torch.tensor([float(2**q)])} for q in range(10)]

    def value(trim):
        return trimmed_mean(vectors, trim)["w"].item()

    assert value(0.3) == value(3)
    assert value(0.299) == value(2)
    assert value(0.0) == value(0) == pytest.approx(102.3)
    assert value(4) == coordinate_median(vectors)["w"].item() == 24.0
    hundred = [{"w": torch.tensor([float(q**2)])} for q in range(100)]
    assert trimmed_mean(hundred, 0.29)["w"] == trimmed_mean(hundred, 29)["w"]  # .29 * 100 < 29 in floating point
    for trim, error in ((5, InputError), (0.5, InputError), (-1, InputError), (-0.1, InputError), (True, TypeError)):
        with pytest.raises(error, match="trim"):
            trimmed_mean(vectors, trim)


def test_an_odd_median_is_one_of_the_values_and_scale_multiplies():
    x = torch.randn(7, 100, generator=torch.Generator().manual_seed(0))
    vectors = [{"w": row} for row in x]
    found = coordinate_median(vectors)["w"]
    assert ((x == found).sum(0) == 1).all()
    assert torch.equal(coordinate_median(vectors, scale=-2.0)["w"], -2 * found)
    torch.testing.assert_close(trimmed_mean(vectors, 0, scale=0.3 * 7)["w"], task_arithmetic(vectors)["w"])
