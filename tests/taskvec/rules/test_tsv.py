"""TSV-Merge: what it keeps, where directions coincide or spectra decay, and other tools' values."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rmtllmf.errors import InputError
from rmtllmf.taskvec import tsv
from rmtllmf.taskvec.rules import _spectral

tsv_module = importlib.import_module("rmtllmf.taskvec.rules.tsv")


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def with_spectrum(m, n, s, seed=0, dtype=torch.float32):
    """A matrix (m, n) of singular values `s`."""
    U, V = (torch.linalg.qr(normal(size, len(s), seed=1000 * seed + size)).Q for size in (m, n))
    return ((U * s) @ V.mT).to(dtype)


def polar(X):
    U, _, Vh = torch.linalg.svd(X, full_matrices=False)
    return U @ Vh


def exact(matrices):
    """As the paper's algorithm says."""
    r = min(matrices[0].shape) // len(matrices)
    triplets = [torch.linalg.svd(matrix.double(), full_matrices=False) for matrix in matrices]
    U = torch.cat([U[:, :r] for U, _, _ in triplets], 1)
    s = torch.cat([s[:r] for _, s, _ in triplets])
    Vh = torch.cat([Vh[:r] for _, _, Vh in triplets], 0)
    return polar(U) @ torch.diag(s) @ polar(Vh)


def best(matrix, rank):
    U, s, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (U[:, :rank] * s[:rank]) @ Vh[:rank]


def error(actual, expected):
    return float(torch.linalg.norm(actual.double() - expected) / torch.linalg.norm(expected))


def fused(*matrices, **options):
    return tsv([{"w": matrix} for matrix in matrices], **options)["w"]


@pytest.mark.parametrize("shape", [(6, 4), (1, 5), (3, 3)])
def test_one_task_comes_back(shape):
    matrix = normal(*shape, dtype=torch.float32)
    torch.testing.assert_close(fused(matrix, scale=2.0), 2 * matrix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(64, 64), (300, 64), (64, 300), (300, 264), (97, 384), (9, 8)])
@pytest.mark.parametrize("count", [2, 3, 8])
def test_flat_spectra(shape, count, dtype):
    matrices = [normal(*shape, seed=seed, dtype=dtype) for seed in range(count)]
    assert error(fused(*matrices), exact(matrices)) < (1e-4 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize("shape", [(180, 180), (400, 180), (180, 300)])
@pytest.mark.parametrize("orders", [1, 2, 4, 8])
def test_decaying_spectra(shape, orders):
    s = torch.logspace(0, -orders, 180, dtype=torch.float64)
    matrices = [with_spectrum(*shape, s, seed) for seed in range(6)]
    assert error(fused(*matrices), exact(matrices)) < 1e-4


def test_directions_float32_cannot_see():
    """All that is kept spans five orders: what is small weighs as much in the polar factors as what is large."""
    s = torch.zeros(300, dtype=torch.float64)
    s[:50], s[50:] = torch.logspace(0, -5, 50, dtype=torch.float64), 3e-6
    matrices = [with_spectrum(400, 300, s, seed) for seed in range(6)]
    assert error(fused(*matrices), exact(matrices)) < 1e-3


def test_float32_where_it_can(monkeypatch):
    """Else every matrix would be as slow as the worst."""
    used = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda G: used.append((G.dtype, len(G))) or eigh(G))
    fused(*(normal(600, 300, seed=seed, dtype=torch.float32) for seed in range(6)))
    assert used.count((torch.float32, 300)) >= 6
    assert used.count((torch.float64, 300)) <= 2  # of the joined directions


def test_one_small_singular_value_of_the_joined_directions_does_no_harm(monkeypatch):
    """A square matrix of random directions often has one; errors grow only between two of them."""
    tried = []
    leading = tsv_module.leading
    monkeypatch.setattr(tsv_module, "leading", lambda *a, **k: tried.append(k["quick"]) or leading(*a, **k))
    matrices = [normal(180, 180, seed=seed, dtype=torch.float32) for seed in range(6)]
    U, s, Vh = torch.linalg.svd(matrices[1].double(), full_matrices=False)
    first = torch.linalg.svd(matrices[0].double(), full_matrices=False)
    for own, other in ((U, first.U), (Vh.mT, first.Vh.mT)):  # one direction all but shared
        own[:, 0] = other[:, 0] + 5e-4 * own[:, 0]
        own[:] = torch.linalg.qr(own).Q
    matrices[1] = ((U * s) @ Vh).float()
    assert error(fused(*matrices), exact(matrices)) < 1e-4
    assert all(tried)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orthogonal_tasks_are_kept_exactly(dtype):
    """Each has its own rows and columns, and a rank of r at most."""
    U, V = torch.linalg.qr(normal(20, 20)).Q, torch.linalg.qr(normal(12, 12, seed=1)).Q
    s = torch.linspace(3, 1, 12, dtype=torch.float64)
    matrices = [((U[:, 3 * q : 3 * q + 3] * s[q::4]) @ V[:, 3 * q : 3 * q + 3].mT).to(dtype) for q in range(4)]
    assert error(fused(*matrices), sum(matrices).double()) < (1e-5 if dtype == torch.float32 else 1e-12)


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 10**6), order=st.permutations(range(4)))
def test_order_and_turned_spaces(seed, order):
    matrices = [normal(15, 12, seed=seed + index) for index in range(4)]
    P, Q = (torch.linalg.qr(normal(size, size, seed=seed)).Q for size in (15, 12))
    plain = fused(*matrices)
    torch.testing.assert_close(fused(*(matrices[index] for index in order)), plain, rtol=0, atol=1e-7)
    torch.testing.assert_close(fused(*(P @ matrix @ Q for matrix in matrices)), P @ plain @ Q, rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(30, 24), (24, 30), (300, 264)])
@pytest.mark.parametrize("weights", [None, [1.0, 1.0, 1.0, 1.0], [1.0, 0.5, 2.0, 0.25]])
def test_equal_tasks_give_their_best_approximation(shape, weights, dtype):
    matrix = normal(*shape, dtype=dtype)
    mean = 1.0 if weights is None else sum(weights) / 4
    rank = min(shape) // 4
    assert error(fused(*[matrix] * 4, weights=weights), mean * best(matrix, rank)) < 1e-4


def test_all_but_equal_tasks():
    """Their joined directions have singular values near 1e-6, by whose inverse errors of the directions grow."""
    matrices = [normal(200, 180, seed=seed, dtype=torch.float32) for seed in range(6)]
    matrices[1] = matrices[0] + 3e-4 * matrices[1]
    assert error(fused(*matrices), exact(matrices)) < 1e-3


@pytest.mark.parametrize("rank", [1, 5])
def test_low_rank_tasks(rank):
    """Of rank below r, as adapters are: the rest of what is stored is rounding, and left out."""
    pairs = [(normal(48, rank, seed=q), normal(rank, 40, seed=50 + q)) for q in range(4)]
    triplets = [torch.linalg.svd(left @ right, full_matrices=False) for left, right in pairs]
    U = torch.cat([U[:, :rank] for U, _, _ in triplets], 1)
    s = torch.cat([s[:rank] for _, s, _ in triplets])
    Vh = torch.cat([Vh[:rank] for _, _, Vh in triplets], 0)
    expected = polar(U) @ torch.diag(s) @ polar(Vh)
    assert error(fused(*((left @ right).float() for left, right in pairs)), expected) < 1e-5
    assert error(fused(*(left @ right for left, right in pairs)), expected) < 1e-9


def test_a_silent_task_takes_its_share_and_gives_nothing():
    matrices = [normal(20, 12, seed=q) for q in range(3)]
    triplets = [torch.linalg.svd(matrix, full_matrices=False) for matrix in matrices]
    U = torch.cat([U[:, :3] for U, _, _ in triplets], 1)
    s = torch.cat([s[:3] for _, s, _ in triplets])
    Vh = torch.cat([Vh[:3] for _, _, Vh in triplets], 0)
    expected = polar(U) @ torch.diag(s) @ polar(Vh)
    assert error(fused(*matrices, torch.zeros(20, 12, dtype=torch.float64)), expected) < 1e-9


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (3, 9)])
def test_fewer_rows_than_tasks_are_averaged(shape):
    matrices = [normal(*shape, seed=seed, dtype=torch.float32) for seed in range(4)]
    torch.testing.assert_close(fused(*matrices, scale=2.0), sum(matrices) / 2)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-15, 1e15, 1e30])
def test_extreme_magnitudes(magnitude):
    matrices = [normal(9, 6, seed=seed, dtype=torch.float32) * magnitude for seed in range(3)]
    assert error(fused(*matrices), exact(matrices)) < 1e-4
    matrices = [normal(9, 6, seed=seed) for seed in range(3)]
    larger = magnitude**6
    update = fused(*(matrix * larger for matrix in matrices)) / larger
    assert error(update, exact(matrices)) < 1e-9


def fusion_bench(vectors):
    """The steps of FusionBench 0.2.33's `compute_and_sum_svd_mem_reduction`, in its order."""
    merged = {}
    for key in vectors[0]:
        for i, vector in enumerate(vectors):
            if vector[key].ndim == 2:
                u, s, vh = torch.linalg.svd(vector[key], full_matrices=False)
                if i == 0:
                    sum_u, sum_s, sum_vh = (torch.zeros_like(tensor) for tensor in (u, s, vh))
                r = int(s.shape[0] / len(vectors))
                sum_u[:, i * r : (i + 1) * r] = u[:, :r]
                sum_s[i * r : (i + 1) * r] = s[:r]
                sum_vh[i * r : (i + 1) * r, :] = vh[:r, :]
            elif i == 0:
                merged[key] = vector[key].clone()
            else:
                merged[key] += (vector[key] - merged[key]) / (i + 1)
        if vectors[0][key].ndim == 2:
            u_u, _, vh_u = torch.linalg.svd(sum_u, full_matrices=False)
            u_vh, _, vh_vh = torch.linalg.svd(sum_vh, full_matrices=False)
            merged[key] = torch.linalg.multi_dot((u_u, vh_u, torch.diag(sum_s), u_vh, vh_vh))
    return merged


def test_the_values_of_fusion_bench():
    shapes = {"square": (64, 64), "tall": (200, 66), "wide": (66, 200), "b": (64,), "conv": (4, 3, 2, 2)}
    vectors = [
        {k: normal(*s, seed=10 * q + i, dtype=torch.float32) for i, (k, s) in enumerate(shapes.items())}
        for q in range(8)
    ]
    update = tsv(vectors)
    theirs = fusion_bench([{key: tensor.double() for key, tensor in vector.items()} for vector in vectors])
    for key, expected in theirs.items():
        assert error(update[key], expected) < 1e-5
    for key, single in fusion_bench(vectors).items():  # in float32, as they calculate, which errs by up to 1e-3 here
        assert error(update[key], single.double()) < 5e-3


@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
def test_triplets_one_deflation_after_another(shape):
    """Float64 Gram matrices see five orders; twelve of them are seen nevertheless."""
    s = torch.logspace(0, -12, 40, dtype=torch.float64)
    matrix = with_spectrum(*shape, s, dtype=torch.float64)
    U, found, V = _spectral.leading(matrix, 40, 1e-14, torch.float32)
    assert len(found) == 40
    torch.testing.assert_close(found, s, rtol=1e-3, atol=0)
    for basis in (U, V):
        torch.testing.assert_close(basis.mT @ basis, torch.eye(40, dtype=torch.float64), rtol=0, atol=1e-4)
    _, fewer, _ = _spectral.leading(matrix, 40, 1e-7, torch.float32)
    assert len(fewer) == int((s > 1e-7).sum())


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_scale_is_finite(scale):
    with pytest.raises(InputError, match="scale"):
        tsv([{"w": torch.ones(2, 2)}], scale=scale)


@pytest.mark.gpu
def test_on_the_device():
    for shape in [(96, 96), (600, 300), (96, 300)]:
        matrices = [normal(*shape, seed=seed, dtype=torch.float32) for seed in range(6)]
        update = fused(*(matrix.cuda() for matrix in matrices))
        assert update.is_cuda
        assert error(update.cpu(), exact(matrices)) < 1e-3
