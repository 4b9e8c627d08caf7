"""The geometric median: its optimality conditions, where the optimum is a given vector, and bad spacing."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rmtllmf.errors import ConvergenceError, InputError, NonFiniteError
from rmtllmf.taskvec import coordinate_median, geometric_median
from rmtllmf.taskvec.rules._fermat_weber import gram_from, optimal_weights


def solve(x, **options):
    return geometric_median([{"w": torch.from_numpy(row)} for row in np.asarray(x, float)], **options)["w"].numpy()


def check_optimal(z, x, tolerance=1e-8):
    """The subgradient condition at z, in the given points' own coordinates."""
    apart = z - x
    distances = np.linalg.norm(apart, axis=1)
    here = distances <= 1e-9 * np.median(distances)
    pull = np.linalg.norm((apart[~here] / distances[~here, None]).sum(0))
    assert pull <= here.sum() + tolerance * len(x), (pull, here.sum())


@given(st.integers(3, 20), st.integers(1, 30), st.integers(0, 10**6))
def test_subgradient_condition(count, size, seed):
    x = np.random.default_rng(seed).standard_normal((count, size))
    check_optimal(solve(x), x)


@given(st.integers(3, 12), st.integers(2, 5), st.integers(0, 10**6), st.floats(1e-6, 1e6))
def test_spacings_over_many_magnitudes(count, size, seed, spread):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, size)) * np.exp(rng.uniform(-1, 1, (count, 1)) * abs(np.log(spread)) / 2)
    z, best = solve(x), min(np.linalg.norm(row - x, axis=1).sum() for row in x)
    value = np.linalg.norm(z - x, axis=1).sum()
    assert value <= best * (1 + 1e-12)
    rough = np.linalg.norm(z - x, axis=1) < 1e-6 * np.linalg.norm(x, axis=1).max()
    if not rough.any():  # next to a vector, the pull is no measure of how good z is
        check_optimal(z, x, 1e-6)


def test_the_fermat_point_of_a_triangle():
    x = np.array([[0.0, 0.0], [4.0, 0.0], [1.0, 3.0]])
    z = solve(x)
    rays = (x - z) / np.linalg.norm(x - z, axis=1)[:, None]
    np.testing.assert_allclose(rays @ rays.T, 1.5 * np.eye(3) - 0.5, atol=1e-9)  # 120 degrees apart


def test_an_optimum_on_one_of_the_vectors():
    wide = np.array([[0.0, 0.0], [10.0, 1.0], [-10.0, 1.0]])  # an angle of more than 120 degrees
    np.testing.assert_array_equal(solve(wide), wide[0])
    thrice = np.array([[1.0, 2.0], [5.0, -3.0], [1.0, 2.0], [0.0, 9.0], [1.0, 2.0], [7.0, 7.0]])
    np.testing.assert_allclose(solve(thrice), [1.0, 2.0], rtol=1e-15)


@pytest.mark.parametrize("excess", [1e-3, 1e-5, 1e-7, 1e-8, -1e-7])
def test_an_optimum_next_to_one_of_the_vectors(excess):
    """The angle is 120 degrees less a little: the optimum is off the vector by about that little."""
    half = np.pi / 3 * (1 - excess)
    x = np.array([[0.0, 0.0], [np.cos(half), np.sin(half)], [np.cos(half), -np.sin(half)]])
    z = solve(x)
    if excess < 0:
        np.testing.assert_array_equal(z, x[0])
    else:
        expected = np.cos(half) - np.sin(half) / np.tan(np.pi / 3)
        np.testing.assert_allclose(z, [expected, 0.0], rtol=1e-6, atol=1e-15)


def test_where_many_points_are_optimal_the_mean_of_the_vectors_among_them():
    np.testing.assert_allclose(solve([[1.0, 3.0], [3.0, -1.0]]), [2.0, 1.0], rtol=1e-15)
    line = np.array([[0.0], [1.0], [2.0], [10.0], [11.0], [50.0]]) * np.array([1.0, -2.0])
    np.testing.assert_allclose(solve(line), [6.0, -12.0], rtol=1e-14)
    np.testing.assert_allclose(solve(line[:5]), [2.0, -4.0], rtol=1e-14)


@given(st.lists(st.integers(-1000, 1000), min_size=1, max_size=12))
def test_in_one_dimension_it_is_the_median(values):
    vectors = [{"w": torch.tensor([float(value)], dtype=torch.float64)} for value in values]
    torch.testing.assert_close(geometric_median(vectors)["w"], coordinate_median(vectors)["w"], rtol=1e-12, atol=1e-9)


def test_near_and_far_on_one_line():
    """Inner products from distances alone would bend the line where it is short, and pull the middle off."""
    for seed in range(50):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal(8) * 10.0 ** rng.integers(-6, 7, 8)
        np.testing.assert_allclose(solve(x[:, None]), np.median(x, keepdims=True), rtol=1e-6)


@pytest.mark.parametrize("size", [1e3, 1e6, 1e9, 1e15, 1e30, 1e100])
@pytest.mark.parametrize("first", [True, False])
def test_far_away_vectors_cost_the_others_no_digits(size, first):
    """As exact as with the far ones replaced by their direction, which is all that counts of them."""
    x = np.random.default_rng(5).standard_normal((8, 20))
    hostile = np.random.default_rng(6).standard_normal((2, 20))
    rows = np.concatenate([size * hostile, x] if first else [x, size * hostile])
    z = solve(rows)
    check_optimal(z, rows, 1e-9)
    np.testing.assert_allclose(z, solve(np.concatenate([1e5 * hostile, x])), atol=1e-3)


def test_a_common_offset_costs_no_digits():
    x = np.random.default_rng(7).standard_normal((6, 10)).round(3)
    np.testing.assert_allclose(solve(x + 2.0**20) - 2.0**20, solve(x), atol=1e-8)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_identical_vectors_and_almost_identical_ones(count):
    vector = torch.randn(50, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(geometric_median([{"w": vector}] * count)["w"], vector, rtol=1e-6, atol=0)
    near = [{"w": vector.double() + 1e-13 * torch.randn(50, dtype=torch.float64)} for _ in range(count)]
    torch.testing.assert_close(geometric_median(near)["w"], vector.double(), rtol=0, atol=1e-12)


def test_few_steps_are_enough_and_too_few_are_an_error():
    x = np.random.default_rng(8).standard_normal((20, 40))
    solve(x, max_steps=8)
    with pytest.raises(ConvergenceError, match=r"after 1 steps.*raise max_steps"):
        solve(x, max_steps=1)
    for options in ({"tolerance": 0.0}, {"max_steps": 0}):
        with pytest.raises(InputError, match=next(iter(options))):
            solve(x, **options)


def test_weights_are_a_convex_combination():
    x = np.random.default_rng(9).standard_normal((7, 9))
    squared = ((x[:, None] - x) ** 2).sum(-1)
    weights = optimal_weights(squared, gram_from(squared), 1e-10, 100)
    assert weights.sum() == pytest.approx(1, abs=1e-15)
    assert (weights > 0).all()
    np.testing.assert_allclose(weights @ x, solve(x), rtol=1e-12, atol=1e-15)


def test_gradients_and_infinities_are_refused():
    vectors = [{"w": torch.randn(3)} for _ in range(3)]
    vectors[1]["w"].requires_grad_()
    with pytest.raises(InputError, match="gradients do not flow"):
        geometric_median(vectors)
    vectors[1] = {"w": torch.tensor([1.0, float("inf"), 0.0])}
    with pytest.raises(NonFiniteError, match=r"vectors\[1\]\['w'\] holds 1"):
        geometric_median(vectors)
