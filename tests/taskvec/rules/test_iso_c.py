"""Iso-C: what it does to singular values, where the spectrum is difficult, and other tools' values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rmtllmf.errors import InputError
from rmtllmf.taskvec import iso_c
from rmtllmf.taskvec.rules import _spectral


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def with_spectrum(m, n, s, seed=0, dtype=torch.float32):
    """A matrix (m, n) of singular values `s`."""
    U, V = (torch.linalg.qr(normal(size, len(s), seed=seed + size)).Q for size in (m, n))
    return ((U * s) @ V.mT).to(dtype)


def exact(matrices):
    U, s, Vh = torch.linalg.svd(torch.stack([matrix.double() for matrix in matrices]).sum(0), full_matrices=False)
    return s.mean() * U @ Vh


def error(actual, expected):
    return float(torch.linalg.norm(actual.double() - expected) / torch.linalg.norm(expected))


def fused(*matrices, **options):
    return iso_c([{"w": matrix} for matrix in matrices], **options)["w"]


SHAPES = [(6, 4), (4, 6), (1, 5), (5, 1), (1, 1), (40, 300), (280, 270)]


@pytest.mark.parametrize("shape", SHAPES)
def test_all_singular_values_become_their_mean(shape):
    matrices = [normal(*shape, seed=seed, dtype=torch.float32) for seed in range(3)]
    mean = torch.linalg.svdvals(sum(matrices).double()).mean()
    s = torch.linalg.svdvals(fused(*matrices, scale=0.5).double())
    torch.testing.assert_close(s, (0.5 * mean).expand(min(shape)), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_is_its_own_direction_and_any_matrix_the_exact_one(shape, dtype):
    matrices = [normal(*shape, seed=seed, dtype=dtype) for seed in range(3)]
    assert error(fused(*matrices), exact(matrices)) < (1e-5 if dtype == torch.float32 else 1e-10)
    if 1 in shape:
        torch.testing.assert_close(fused(*matrices), sum(matrices))


@pytest.mark.parametrize("shape", [(48, 48), (160, 48), (48, 160), (130, 120)])
@pytest.mark.parametrize("condition", [10, 30, 100, 1e3, 1e4, 1e5, 1e6])
@pytest.mark.parametrize("kind", ["decaying", "one small", "half small"])
def test_ill_conditioned_sums(shape, condition, kind):
    size = min(shape)
    s = torch.ones(size, dtype=torch.float64)
    if kind == "decaying":
        s = torch.logspace(0, -torch.log10(torch.tensor(float(condition))).item(), size, dtype=torch.float64)
    else:
        s[-1 if kind == "one small" else size // 2 :] = 1 / condition
    matrix = with_spectrum(*shape, s)
    assert error(fused(matrix), exact([matrix])) < 1e-4
    double = with_spectrum(*shape, s, dtype=torch.float64)
    assert error(fused(double), exact([double])) < 1e-9


def test_ill_conditioned_in_double_precision():
    matrix = with_spectrum(40, 30, torch.logspace(0, -9, 30, dtype=torch.float64), dtype=torch.float64)
    assert error(fused(matrix), exact([matrix])) < 1e-6


def test_cheap_precision_where_the_spectrum_allows(monkeypatch):
    """Else every tensor would be as slow as the worst."""
    used = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda G: used.append(G.dtype) or eigh(G))
    fused(with_spectrum(60, 40, torch.linspace(1, 0.5, 40, dtype=torch.float64)))
    assert used == [torch.float32]
    used.clear()
    fused(with_spectrum(60, 40, torch.logspace(0, -4, 40, dtype=torch.float64)))
    assert used == [torch.float64]


@pytest.mark.parametrize("shape", [(300, 300), (500, 300)])
@pytest.mark.parametrize("weak", [1, 40, 90])
@pytest.mark.parametrize("least", [1e-3, 1e-5])
def test_weak_directions_are_told_apart_after_the_others(monkeypatch, shape, weak, least):
    """Up to a third of all; the eigenvalues of the strong ones end where those of the weak begin."""
    used = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda G: used.append((G.dtype, len(G))) or eigh(G))
    s = torch.cat([torch.linspace(1, 0.05, 300 - weak), torch.logspace(-1.4, torch.tensor(least).log10(), weak)])
    matrix = with_spectrum(*shape, s.double())
    assert error(fused(matrix), exact([matrix])) < 1e-5
    assert (torch.float64, 300) not in used


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(40, 30), (30, 40)])
@pytest.mark.parametrize("rank", [1, 3])
def test_what_has_no_direction_is_left_out(shape, rank, dtype):
    """A sum of low rank as one stores it: the rest of its singular values is rounding."""
    left, right = normal(shape[0], rank, dtype=dtype), normal(rank, shape[1], seed=1, dtype=dtype)
    product = left @ right
    U, s, Vh = torch.linalg.svd(left.double() @ right.double(), full_matrices=False)
    expected = s[:rank].sum() / 30 * U[:, :rank] @ Vh[:rank]
    assert error(fused(product), expected) < (1e-5 if dtype == torch.float32 else 1e-10)
    zero_row = product.clone()
    zero_row[4] = 0
    assert not fused(zero_row)[4].abs().max() > 1e-5


def test_parts_that_cancel_leave_rounding():
    a, b = normal(20, 10, dtype=torch.float32), normal(20, 10, seed=1, dtype=torch.float32)
    assert (a + b).double().sub(a.double() + b.double()).any()
    assert not fused(a.double(), b.double(), -(a.double() + b.double())).any()
    assert not fused(a, b, -(a + b)).any()


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 10**6))
def test_turned_spaces_turn_the_update(seed):
    matrices = [normal(9, 5, seed=seed + index) for index in range(4)]
    P, Q = (torch.linalg.qr(normal(size, size, seed=seed)).Q for size in (9, 5))
    turned = fused(*(P @ matrix @ Q for matrix in matrices))
    torch.testing.assert_close(turned, P @ fused(*matrices) @ Q, rtol=0, atol=1e-8)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-15, 1e15, 1e30])
def test_extreme_magnitudes(magnitude):
    matrices = [normal(7, 5, seed=seed, dtype=torch.float32) * magnitude for seed in range(3)]
    assert error(fused(*matrices), exact(matrices)) < 1e-5
    matrices = [normal(7, 5, seed=seed) for seed in range(3)]
    larger = magnitude**6
    update = fused(*(matrix * larger for matrix in matrices)) / larger
    assert error(update, exact(matrices)) < 1e-9


def test_other_tensors_are_averaged_and_scaled():
    vectors = [{"b": torch.tensor([1.0]), "conv": torch.ones(1, 1, 2, 2)}, {"b": torch.tensor([5.0])}]
    vectors[1]["conv"] = torch.zeros(1, 1, 2, 2)
    update = iso_c(vectors, scale=2.0)
    torch.testing.assert_close(update["b"], torch.tensor([6.0]))
    torch.testing.assert_close(update["conv"], torch.ones(1, 1, 2, 2))


def fusion_bench(vectors):
    """The steps of FusionBench 0.2.33's `iso_c`, in its order."""
    merged = {}
    for key in vectors[0]:
        merged[key] = sum(vector[key] for vector in vectors) / len(vectors)
        if merged[key].ndim == 2:
            merged[key] = merged[key] * len(vectors)
            U, S, V = torch.linalg.svd(merged[key], full_matrices=False)
            merged[key] = torch.linalg.multi_dot((U, torch.diag(torch.ones_like(S) * S.mean()), V))
    return merged


def test_the_values_of_fusion_bench():
    shapes = {"square": (64, 64), "tall": (192, 64), "wide": (64, 192), "b": (64,), "conv": (4, 3, 2, 2)}
    vectors = [
        {k: normal(*s, seed=10 * q + i, dtype=torch.float32) for i, (k, s) in enumerate(shapes.items())}
        for q in range(8)
    ]
    update = iso_c(vectors)
    for key, expected in fusion_bench(vectors).items():
        assert error(update[key], expected.double()) < 1e-4


def test_large_gram_matrices_are_put_together_from_blocks(monkeypatch):
    monkeypatch.setattr(_spectral, "BLOCK", 7)
    X = normal(40, 30)
    torch.testing.assert_close(_spectral.gram(X).tril(), (X.mT @ X).tril())


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_scale_is_finite(scale):
    with pytest.raises(InputError, match="scale"):
        iso_c([{"w": torch.ones(2, 2)}], scale=scale)


@pytest.mark.gpu
def test_on_the_device():
    shapes = [(96, 96), (300, 96), (96, 300)]
    matrices = [[normal(*shape, seed=seed, dtype=torch.float32) for seed in range(8)] for shape in shapes]
    matrices.append([with_spectrum(96, 96, torch.logspace(0, -5, 96, dtype=torch.float64))])
    for group in matrices:
        update = fused(*(matrix.cuda() for matrix in group))
        assert update.is_cuda
        assert error(update.cpu(), exact(group)) < 1e-4
