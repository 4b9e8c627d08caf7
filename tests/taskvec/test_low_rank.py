"""Low-rank factors: the theorem of Eckart and Young, what is factored, and what is refused."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.draws import rounded
from rmtllmf.errors import InputError, NonFiniteError
from rmtllmf.taskvec import LowRank, TaskVector, low_rank


def product(factors, key):
    return factors.B[key].double() @ factors.A[key].double()


@given(
    st.integers(0, 10**6),
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 14),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_eckart_and_young(seed, rows, columns, rank, dtype):
    matrix = rounded(rows, columns, seed=seed, dtype=dtype)
    factors = low_rank({"w": matrix}, rank)
    r = min(rank, rows, columns)
    assert factors.A["w"].shape == (r, columns)
    assert factors.B["w"].shape == (rows, r)
    assert factors.A["w"].dtype == factors.B["w"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = matrix.double()
    values = torch.linalg.svdvals(exact)
    close = 1e-12 if dtype == torch.float64 else 2e-6
    tail = float(values[r:].square().sum().sqrt() / values.square().sum().sqrt())
    assert factors.error["w"] == pytest.approx(tail, abs=close)
    assert factors.total_error == factors.error["w"]
    lost = float((exact - product(factors, "w")).norm() / exact.norm())
    assert lost == pytest.approx(factors.error["w"], abs=1e-12)
    # the singular values are split evenly
    size_A, size_B = factors.A["w"].double().norm(dim=1), factors.B["w"].double().norm(dim=0)
    torch.testing.assert_close(size_A, size_B, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(size_A * size_B, values[:r], rtol=1e-4, atol=close * float(values[0]))
    # and nothing of that rank is nearer: not at random, and not close by
    for trial in range(5):
        other = rounded(rows, r, seed=seed + trial).double() @ rounded(r, columns, seed=seed - trial).double()
        assert (exact - other).norm() >= (exact - product(factors, "w")).norm() - close * exact.norm()
        near = factors.B["w"].double() + 0.01 * rounded(rows, r, seed=seed + trial).double()
        assert (exact - near @ factors.A["w"].double()).norm() / exact.norm() >= tail - close


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (7, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_exact_from_the_true_rank_on(shape, dtype, size):
    matrix = (rounded(shape[0], 3, seed=1).double() @ rounded(3, shape[1], seed=2).double() * size).to(dtype)
    for rank in (3, 5, 100):
        factors = low_rank({"w": matrix}, rank)
        assert factors.error["w"] < (1e-13 if dtype == torch.float64 else 3e-7)
        torch.testing.assert_close(factors.dense()["w"] / size, matrix / size, rtol=1e-4, atol=1e-5)
    assert low_rank({"w": matrix}, 2).error["w"] > 0.01


def test_squares_of_entries_may_overflow():
    big = torch.diag(torch.tensor([4.0, 3.0], dtype=torch.float64)) * 1e200
    factors = low_rank({"w": big}, 1)
    assert (factors.error["w"], factors.total_error) == (pytest.approx(0.6), pytest.approx(0.6))
    torch.testing.assert_close(factors.dense()["w"] / 1e200, torch.diag(torch.tensor([4.0, 0.0], dtype=torch.float64)))


def test_small_singular_values_beside_large_ones():
    values = 10.0 ** -torch.arange(8, dtype=torch.float64)
    left, right = (
        torch.linalg.qr(rounded(30, 8, seed=1).double())[0],
        torch.linalg.qr(rounded(40, 8, seed=2).double())[0],
    )
    matrix = ((left * values) @ right.T).float()
    for turned in (matrix, matrix.T):
        for rank in range(1, 6):
            exact = torch.linalg.svdvals(turned.double())
            tail = float(exact[rank:].norm() / exact.norm())
            assert low_rank({"w": turned}, rank).error["w"] == pytest.approx(tail, rel=0.02)


def test_values_far_apart_and_matrices_of_zeros():
    spread = torch.diag(torch.tensor([1.0, 1e-3, 1e-6, 0.0]))
    factors = low_rank({"w": spread, "zero": torch.zeros(3, 2)}, 2)
    assert factors.error["w"] == pytest.approx(1e-6, rel=1e-3)
    assert factors.error["zero"] == 0
    assert not factors.dense()["zero"].any()
    assert low_rank({"zero": torch.zeros(3, 2)}, 1).total_error == 0


UPDATE = {
    "fc.weight": rounded(6, 5, seed=1),
    "fc.bias": rounded(6, seed=2),
    "conv.weight": rounded(4, 3, 2, 2, seed=3),
    "stack": rounded(2, 3, 4, seed=4),
    "scalar": torch.tensor(2.0),
    "none": torch.zeros(0, 3),
}


def test_what_is_factored_and_what_is_rest():
    factors = low_rank(UPDATE, 2)
    assert isinstance(factors, LowRank)
    assert list(factors.A) == list(factors.B) == list(factors.error) == ["fc.weight", "conv.weight"]
    assert list(factors.rest) == ["fc.bias", "stack", "scalar", "none"]
    assert factors.A["conv.weight"].shape == (2, 12)
    dense = factors.dense()
    assert isinstance(dense, TaskVector)
    assert list(dense) == list(UPDATE)
    assert {key: tuple(value.shape) for key, value in UPDATE.items()} == factors.shapes
    assert all(torch.equal(dense[key], UPDATE[key]) for key in factors.rest)
    lost = math.sqrt(sum(float((dense[key] - UPDATE[key]).double().square().sum()) for key in UPDATE))
    size = math.sqrt(sum(float(value.double().square().sum()) for value in UPDATE.values()))
    assert factors.total_error == pytest.approx(lost / size, rel=1e-5)
    assert repr(factors) == f"LowRank(2 matrices of rank 2, 4 other tensors, error {factors.total_error:.3g})"
    for name in ("A", "rest", "total_error"):
        with pytest.raises(AttributeError):
            setattr(factors, name, None)
    with pytest.raises(TypeError):
        factors.A["fc.weight"] = None


def test_names():
    assert list(low_rank(UPDATE, 2, names="fc.*").A) == ["fc.weight"], "a glob that also names a vector"
    chosen = low_rank(UPDATE, 2, names=["stack"])
    assert chosen.A["stack"].shape == (2, 12)
    assert set(chosen.rest) == set(UPDATE) - {"stack"}
    assert list(low_rank(UPDATE, 1, names=[]).rest) == list(UPDATE)


def test_tied_tensors_are_factored_once():
    shared = rounded(4, 3, seed=1)
    update = TaskVector({"a": shared, "b": shared, "c": shared.clone(), "v": shared[0], "w": shared[0]})
    factors = low_rank(update, 1)
    assert factors.A["a"] is factors.A["b"]
    assert factors.A["a"] is not factors.A["c"]
    assert factors.rest["v"] is factors.rest["w"]
    dense = factors.dense()
    assert dense["a"] is dense["b"]
    part = low_rank(update, 1, names=["a"])
    assert list(part.A) == ["a"]
    assert torch.equal(part.rest["b"], shared)


def test_the_same_bits_for_any_number_of_threads():
    update = {str(index): rounded(20 + index, 30, seed=index) for index in range(7)}
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(low_rank(update, 4))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert other.error == results[0].error
        assert other.total_error == results[0].total_error
        for key in update:
            assert torch.equal(other.A[key], results[0].A[key])
            assert torch.equal(other.B[key], results[0].B[key])


def test_bad_input():
    good = {"w": torch.ones(2, 2)}
    with pytest.raises(InputError, match="rank: expected a whole number of at least 1, got 0"):
        low_rank(good, 0)
    with pytest.raises(TypeError, match="rank"):
        low_rank(good, 1.5)
    with pytest.raises(TypeError, match="update: expected a mapping"):
        low_rank([good], 1)
    with pytest.raises(InputError, match="empty mapping"):
        low_rank({}, 1)
    with pytest.raises(TypeError, match=r"update\['steps'\] is torch.int64"):
        low_rank({"steps": torch.tensor(1)}, 1)
    with pytest.raises(InputError, match="names: 'x' matches none"):
        low_rank(good, 1, names="x")
    for bad in ({"w": torch.full((2, 2), torch.nan)}, {"w": torch.full((2,), torch.inf)}):
        with pytest.raises(NonFiniteError, match=r"update\['w'\]"):
            low_rank(bad, 1)


def test_gradients_are_not_dropped_in_silence():
    update = {"w": torch.ones(2, 2, requires_grad=True)}
    with pytest.raises(InputError, match="update: gradients do not flow"):
        low_rank(update, 1)
    with torch.no_grad():
        assert not low_rank(update, 1).A["w"].requires_grad
    assert not low_rank({"w": update["w"].detach()}, 1).A["w"].requires_grad
