"""Reversible merging: the optimal basis at every position, what comes back exactly, storage, and bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rmtllmf.errors import InputError, StateMismatchError
from rmtllmf.taskvec import adapter_vector, low_rank, reversible_merging, task_arithmetic

SHAPES = {"q": (9, 6), "tall": (12, 5), "conv": (4, 3, 2, 2), "b": (9,), "one": (1, 7)}


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(seed, count, rank=3, dtype=torch.float32):
    source = torch.Generator().manual_seed(seed)

    def entry(shape):
        if len(shape) < 2:
            return torch.randn(shape, generator=source).to(dtype)
        rows, columns = shape[0], torch.Size(shape[1:]).numel()
        left, right = torch.randn(rows, rank, generator=source), torch.randn(rank, columns, generator=source)
        return (left @ right).reshape(shape).to(dtype)

    return [low_rank({key: entry(shape) for key, shape in SHAPES.items()}, rank) for _ in range(count)]


def naive(vectors, p):
    """For N vectors of r numbers: from the eigenvectors of their covariance, in float64."""
    X = torch.stack([vector.double() for vector in vectors], 1)
    mean = X.mean(1, keepdim=True)
    V = torch.linalg.eigh((X - mean) @ (X - mean).mT).eigenvectors[:, -p:]
    return (mean + V @ V.mT @ (X - mean)).unbind(1)


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 10**6), count=st.integers(2, 6), p=st.integers(1, 3))
def test_every_row_and_column_by_definition(seed, count, p):
    updates = make(seed, count)
    stored = reversible_merging(updates, p)
    assert len(stored) == count
    for key in ("q", "tall", "conv"):
        for rows, given_, side in (
            (stored.B[key].mean.shape[0], [update.B[key] for update in updates], "B"),
            (stored.A[key].mean.shape[0], [update.A[key].mT for update in updates], "A"),
        ):
            for row in range(0, rows, 4):
                expected = naive([factor[row] for factor in given_], p)
                for task, vector in enumerate(expected):
                    back = stored.low_rank(task)
                    found = back.B[key][row] if side == "B" else back.A[key][:, row]
                    torch.testing.assert_close(found.double(), vector, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_everything_comes_back_with_as_many_components_as_tasks_or_ranks(dtype):
    for count, rank, p in ((4, 6, 3), (6, 2, 2), (3, 3, 99)):
        updates = make(0, count, rank, dtype)
        stored = reversible_merging(updates, p)
        for task, update in enumerate(updates):
            for key, tensor in stored.task_vector(task).items():
                assert tensor.dtype == dtype
                torch.testing.assert_close(tensor, update.dense()[key], rtol=1e-4, atol=1e-5)
            assert max(stored.errors[task].values()) < (1e-5 if dtype == torch.float32 else 1e-12)


def test_more_components_are_never_worse_and_the_best_of_their_number():
    updates = make(1, 6, rank=4)
    factors = torch.stack([update.B["q"] for update in updates], -1).double()

    def lost(p):
        stored = reversible_merging(updates, p)
        back = torch.stack([stored.low_rank(task).B["q"] for task in range(6)], -1).double()
        return (back - factors).square().sum((1, 2))

    values = torch.linalg.svdvals(factors - factors.mean(-1, keepdim=True))
    for p in range(1, 5):
        torch.testing.assert_close(lost(p), values[:, p:].square().sum(-1), rtol=1e-4, atol=1e-6)


def test_each_task_is_closer_than_in_a_merged_update():
    updates = make(2, 5)
    stored = reversible_merging(updates, 1)
    mean = task_arithmetic([update.dense() for update in updates], 1 / 5)
    for task, update in enumerate(updates):
        own = update.dense()["q"]
        assert (stored.task_vector(task)["q"] - own).norm() < (mean["q"] - own).norm()


def test_errors_are_of_the_products():
    updates = make(3, 5)
    stored = reversible_merging(updates, 1)
    for task, update in enumerate(updates):
        back = stored.low_rank(task)
        own, found = update.dense(), back.dense()
        for key, error in back.error.items():
            apart = float((found[key] - own[key]).double().norm() / own[key].double().norm())
            assert error == pytest.approx(apart, rel=1e-4, abs=1e-6)
        apart = (found - own).norm() / own.norm()
        assert back.total_error == pytest.approx(apart, rel=1e-4)


def test_storage_is_as_the_paper_counts():
    count, rank, p = 8, 4, 2
    updates = [
        low_rank({"w": torch.randn(30, 20, generator=torch.Generator().manual_seed(seed))}, rank)
        for seed in range(count)
    ]
    assert reversible_merging(updates, p).storage_bits == 32 * (30 + 20) * (p * (rank + count) + rank)
    with_bias = [low_rank({"w": torch.eye(3), "b": torch.ones(3)}, 1) for _ in range(2)]
    assert reversible_merging(with_bias, 1).storage_bits == 32 * (6 * 4 + 2 * 3)


def test_one_update_equal_updates_and_zeros():
    for updates in (make(4, 1), make(4, 1) * 3):
        stored = reversible_merging(updates)
        for task in range(len(updates)):
            for key, tensor in stored.task_vector(task).items():
                torch.testing.assert_close(tensor, updates[0].dense()[key], rtol=1e-5, atol=1e-6)
    zero = low_rank({"w": torch.zeros(3, 4)}, 2)
    stored = reversible_merging([zero, zero])
    assert not stored.task_vector(1)["w"].any()
    assert stored.errors[0]["w"] == 0
    assert stored.low_rank(0).total_error == 0


def test_ties_are_kept_and_stored_once():
    updates = []
    for seed in range(3):
        matrix = normal(seed, 5, 4)
        updates.append(low_rank({"x": matrix, "head": matrix}, 2))
    stored = reversible_merging(updates)
    assert stored.A["x"] is stored.A["head"]
    vector = stored.task_vector(0)
    assert vector["x"].data_ptr() == vector["head"].data_ptr()
    assert stored.storage_bits == 32 * 9 * (2 + 3 + 2)


@pytest.mark.parametrize("threads", [2, 3])
def test_the_same_bits_for_any_number_of_threads(threads):
    updates = make(5, 4)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = reversible_merging(updates, 2)
        torch.set_num_threads(threads)
        found = reversible_merging(updates, 2)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for key in found.A for a, b in zip(found.A[key], expected.A[key], strict=True))
    assert [dict(errors) for errors in found.errors] == [dict(errors) for errors in expected.errors]


def test_an_adapter_again(tmp_path):
    updates = [
        low_rank({"fc.weight": torch.randn(6, 5, generator=torch.Generator().manual_seed(seed))}, 2)
        for seed in range(3)
    ]
    stored = reversible_merging(updates, 2)
    stored.low_rank(1).save_adapter(tmp_path / "task")
    back = adapter_vector(tmp_path / "task")["fc.weight"]
    torch.testing.assert_close(back, updates[1].dense()["fc.weight"], rtol=1e-4, atol=1e-5)


def test_bad_input():
    one, two = make(6, 2)
    for updates, error, message in (
        (one, TypeError, "updates: expected a sequence of LowRank, got LowRank"),
        ([one, {"w": torch.ones(2, 2)}], TypeError, r"updates\[1\]: expected what low_rank\(\) returns, got dict"),
        ([], InputError, "updates: expected at least one"),
        ([one, low_rank({"q": torch.eye(3)}, 1)], StateMismatchError, r"updates\[1\] lacks"),
        ([one, make(7, 1, rank=2)[0]], StateMismatchError, r"updates\[1\]: 'q' has rank 2; in updates\[0\] it has 3"),
        (
            [low_rank({"w": torch.ones(2, 3)}, 1), low_rank({"w": torch.ones(3, 2)}, 1)],
            StateMismatchError,
            r"updates\[1\]: 'w' has shape \(3, 2\)",
        ),
        (
            [low_rank({"w": torch.ones(2, 3)}, 1), low_rank({"w": torch.ones(2, 3)}, 1, names=())],
            StateMismatchError,
            r"the factors of updates\[1\] lacks 'w'",
        ),
    ):
        with pytest.raises(error, match=message):
            reversible_merging(updates)
    with pytest.raises(InputError, match="components: expected a whole number of at least 1"):
        reversible_merging([one, two], 0)
    with pytest.raises(InputError, match="task: expected a number below 2"):
        reversible_merging([one, two]).low_rank(2)
    with pytest.raises(TypeError, match="task"):
        reversible_merging([one, two]).task_vector(0.5)
