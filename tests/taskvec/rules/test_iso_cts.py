"""Iso-CTS: its two ends, difficult spectra, and other tools' values."""

import contextlib
import io

import pytest
import torch

from helpers.subspace_definitions import iso_cts as naive
from rmtllmf.errors import InputError
from rmtllmf.taskvec import iso_c, iso_cts


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def with_spectrum(m, n, s, seed=0):
    """A float32 matrix (m, n) of singular values `s`."""
    U, V = (torch.linalg.qr(normal(size, len(s), seed=1000 * seed + size)).Q for size in (m, n))
    return ((U * s) @ V.mT).float()


def error(actual, expected):
    return float(torch.linalg.norm(actual.double() - expected) / torch.linalg.norm(expected))


def fused(*matrices, **options):
    return iso_cts([{"w": matrix} for matrix in matrices], **options)["w"]


def exact(matrices, **options):
    return naive(torch.stack([matrix.double() for matrix in matrices]), **options)


@pytest.mark.parametrize("shape", [(64, 64), (150, 60), (60, 150), (66, 64)])
@pytest.mark.parametrize("common", [0.0, 0.5, 0.8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_flat_spectra(shape, common, dtype):
    matrices = [normal(*shape, seed=seed, dtype=dtype) for seed in range(4)]
    result = fused(*matrices, common=common)
    assert error(result, exact(matrices, common=common)) < (1e-4 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize("shape", [(96, 96), (220, 90), (90, 220)])
@pytest.mark.parametrize("orders", [1, 3, 6])
def test_decaying_spectra(shape, orders):
    s = torch.logspace(0, -orders, min(shape), dtype=torch.float64)
    matrices = [with_spectrum(*shape, s, seed) for seed in range(4)]
    assert error(fused(*matrices), exact(matrices)) < 1e-3


def test_all_singular_values_are_their_mean():
    matrices = [normal(40, 30, seed=seed) for seed in range(3)]
    s = torch.linalg.svdvals(fused(*matrices, scale=2.0))
    torch.testing.assert_close(s, s.mean().expand(30), rtol=1e-8, atol=0)


def test_in_common_only_is_iso_c():
    vectors = [{"w": normal(20, 12, seed=seed), "b": normal(3, seed=seed)} for seed in range(3)]
    for key, tensor in iso_c(vectors).items():
        torch.testing.assert_close(iso_cts(vectors, 1.0)[key], tensor, rtol=0, atol=1e-9)


def test_more_tasks_than_directions_is_iso_c():
    matrices = [normal(3, 12, seed=seed) for seed in range(5)]
    torch.testing.assert_close(fused(*matrices, common=0.0), iso_c([{"w": m} for m in matrices])["w"])


def test_what_the_sum_hides_is_kept():
    """Iso-C knows of the sum only, in which a weak task drowns; here each task has directions of its own."""
    strong, weak = normal(30, 24), 0.01 * normal(30, 2, seed=1) @ normal(2, 24, seed=2)
    vectors = [{"w": strong}, {"w": weak}]

    def alignment(update):
        return float((update * weak).sum() / torch.linalg.norm(update) / torch.linalg.norm(weak))

    assert alignment(iso_cts(vectors, 0.8)["w"]) > 2 * alignment(iso_c(vectors)["w"]) > 0


@pytest.mark.parametrize("shape", [(48, 40), (40, 48), (120, 40)])
def test_low_rank_tasks(shape):
    """The rest of what is stored is rounding, and left out."""
    low = [normal(shape[0], 3, seed=q) @ normal(3, shape[1], seed=50 + q) for q in range(2)]
    expected = fused(*low, common=0.8)
    assert torch.linalg.matrix_rank(expected, rtol=1e-6) == 6
    assert error(fused(*(matrix.float() for matrix in low)), expected) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_tasks(dtype):
    """The directions that all have beside the common ones coincide, and count once."""
    matrix = normal(30, 20, dtype=dtype)
    U, s, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    length = (3 * s[:14].sum() + 3 * s[14:16].sum()) / 20  # of 14 common ones, and twice three
    expected = length * U[:, :16] @ Vh[:16]
    assert error(fused(matrix, matrix, matrix, common=0.7), expected) < 1e-4


@pytest.mark.parametrize("magnitude", [1e-30, 1e30])
def test_extreme_magnitudes(magnitude):
    matrices = [normal(9, 6, seed=seed, dtype=torch.float32) * magnitude for seed in range(2)]
    assert error(fused(*matrices), exact(matrices)) < 1e-4


def test_the_values_of_fusion_bench():
    peer = pytest.importorskip("fusion_bench.method.isotropic_merging.iso_utils")
    shapes = {"square": (64, 64), "tall": (150, 66), "wide": (66, 150), "b": (64,), "conv": (4, 3, 2, 2)}
    vectors = [{k: normal(*s, seed=10 * q + i) for i, (k, s) in enumerate(shapes.items())} for q in range(4)]
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = peer.iso_cts(vectors, 0.8, accelerator="cpu")
    ours = iso_cts(vectors)
    for key, expected in theirs.items():
        assert error(ours[key], expected) < 1e-9


@pytest.mark.parametrize("common", [-0.1, 1.1])
def test_common_is_a_share(common):
    with pytest.raises(InputError, match=r"common: expected a share in \[0, 1\]"):
        fused(torch.ones(2, 2), common=common)


def test_scale_is_finite():
    with pytest.raises(InputError, match="scale"):
        fused(torch.ones(2, 2), scale=float("inf"))


@pytest.mark.gpu
def test_on_the_device():
    for shape in [(96, 96), (300, 96), (96, 300)]:
        matrices = [normal(*shape, seed=seed, dtype=torch.float32) for seed in range(4)]
        update = fused(*(matrix.cuda() for matrix in matrices))
        assert update.is_cuda
        assert error(update.cpu(), exact(matrices)) < 1e-3
