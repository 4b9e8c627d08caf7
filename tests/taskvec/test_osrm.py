"""OSRM: the optimum, adapters that do not interfere, and bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rmtllmf.errors import InputError, NonFiniteError, NotPSDError, ShapeError, StateMismatchError
from rmtllmf.taskvec import input_grams, osrm, task_arithmetic

N = 12


def inputs(seed, count, size=200, dimension=N):
    """Of tasks whose features each lie in a subspace of their own."""
    source = torch.Generator().manual_seed(seed)
    return [
        torch.randn(size, dimension, generator=source) @ torch.randn(dimension, N, generator=source)
        for _ in range(count)
    ]


def grams(data, **more):
    return [{"fc": x.mT @ x / len(x), **more} for x in data]


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 10**6), count=st.integers(2, 4), rank=st.integers(1, N))
def test_no_orthonormal_rows_see_less_of_the_others(seed, count, rank):
    given_ = grams(inputs(seed, count))
    for task, begin in enumerate(osrm(given_, rank)):
        A = begin["fc"].double()
        assert A.shape == (rank, N)
        torch.testing.assert_close(A @ A.mT, torch.eye(rank).double(), rtol=0, atol=1e-6)
        others = sum(gram["fc"].double() for other, gram in enumerate(given_) if other != task)
        seen = (A @ others @ A.mT).trace()
        least = torch.linalg.eigvalsh(others)[:rank].sum()
        torch.testing.assert_close(seen, least, rtol=1e-4, atol=1e-5 * float(others.trace()))
        random = torch.linalg.qr(torch.randn(N, rank, generator=torch.Generator().manual_seed(seed)).double()).Q.mT
        assert seen <= (random @ others @ random.mT).trace() + 1e-4 * others.trace()


def test_adapters_from_there_do_not_interfere():
    """Whatever is learnt for B: fused, every task's outputs are those of its own adapter alone."""
    data = inputs(1, 3, dimension=3)  # 3 tasks of 3 features each: 6 of the others, of 12
    begins = osrm(grams(data), rank=4)
    source = torch.Generator().manual_seed(2)
    updates = [{"fc": torch.randn(7, 4, generator=source) @ begin["fc"]} for begin in begins]
    fused = task_arithmetic(updates, 1.0)["fc"]
    for x, update in zip(data, updates, strict=True):
        alone = x @ update["fc"].mT
        torch.testing.assert_close(x @ fused.mT, alone, rtol=0, atol=1e-4 * float(alone.abs().max()))
        assert alone.abs().max() > 0.1
    naive = [{"fc": torch.randn(7, 4, generator=source) @ torch.randn(4, N, generator=source)} for _ in data]
    total = task_arithmetic(naive, 1.0)["fc"]
    assert (data[0] @ (total - naive[0]["fc"]).mT).norm() > (data[0] @ naive[0]["fc"].mT).norm()


def test_from_a_model_and_its_data():
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    tasks = [[torch.randn(20, 5, generator=torch.Generator().manual_seed(seed))] for seed in range(2)]
    begins = osrm([input_grams(model, task) for task in tasks], rank=2)
    assert {key: tuple(A.shape) for key, A in begins[0].items()} == {"0.weight": (2, 5), "2.weight": (2, 4)}


def test_blocks_are_added_up_and_dtypes_kept():
    data = inputs(3, 2)
    parts = [{"fc": torch.stack([x[:50].mT @ x[:50], x[50:].mT @ x[50:]]) / len(x)} for x in data]
    for whole, apart in zip(osrm(grams(data), 3), osrm(parts, 3), strict=True):
        torch.testing.assert_close((apart["fc"] @ whole["fc"].mT).abs().det(), torch.tensor(1.0), rtol=1e-3, atol=0)
    for dtype, expected in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        small = [{"fc": torch.diag(torch.arange(5.0)).to(dtype)}] * 2
        assert osrm(small, 2)[0]["fc"].dtype == expected


@pytest.mark.parametrize(
    ("given_", "rank", "error", "message"),
    [
        ([{"fc": torch.eye(3)}], 1, InputError, "grams: expected those of two tasks or more, got 1"),
        ({"fc": torch.eye(3)}, 1, TypeError, "grams: expected a sequence of mappings"),
        ([{"fc": torch.eye(3)}, {}], 1, InputError, r"grams\[1\]: holds no Gram matrices"),
        ([{"fc": torch.eye(3)}, {"fd": torch.eye(3)}], 1, StateMismatchError, r"grams\[1\] lacks 'fc'"),
        ([{"fc": torch.eye(3)}, {"fc": torch.eye(4)}], 1, StateMismatchError, r"grams\[1\]\['fc'\] is of size 4"),
        ([{"fc": torch.eye(3)}, {"fc": torch.ones(3, 4)}], 1, ShapeError, r"grams\[1\]\['fc'\]: expected \(n, n\)"),
        ([{"fc": torch.eye(3)}] * 2, 4, ShapeError, r"grams\[0\]\['fc'\]: rank 4 needs as many inputs"),
        ([{"fc": torch.eye(3)}] * 2, 0, InputError, "rank: expected a whole number of at least 1"),
        ([{"fc": torch.eye(3)}, {"fc": -torch.eye(3)}], 1, NotPSDError, "those of 'fc' have the eigenvalue -1"),
        ([{"fc": torch.eye(3)}, {"fc": torch.eye(3) / 0}], 1, NonFiniteError, r"grams\[1\]\['fc'\]"),
        ([{"fc": torch.eye(3)}, {"fc": torch.eye(3).long()}], 1, TypeError, r"grams\[1\]\['fc'\]: expected a floating"),
    ],
)
def test_bad_input(given_, rank, error, message):
    with pytest.raises(error, match=message):
        osrm(given_, rank)
