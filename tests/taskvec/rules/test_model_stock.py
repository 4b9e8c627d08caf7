"""Model Stock: the ratio, what it is the best of, its edges, and other people's code."""

import math

import pytest
import torch

import rmtllmf.taskvec._engine as engine
from helpers import sparse_definitions as sparse
from rmtllmf.errors import InputError, NonFiniteError
from rmtllmf.taskvec import model_stock, model_stock_ratios


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def related(count, size=400, common=1.0):
    center = normal(size, seed=99)
    return [{"w": common * center + normal(size, seed=seed), "b": normal(5, seed=seed + 50)} for seed in range(count)]


@pytest.mark.parametrize("count", [2, 3, 7])
def test_nearest_to_the_centre(count):
    """The paper's geometry: noise orthogonal to the centre and among itself, of one length. Then t gives the foot."""
    basis = torch.linalg.qr(normal(30, count + 1, dtype=torch.float64)).Q.T
    center = 3 * basis[0]
    vectors = [{"w": center + 2 * noise} for noise in basis[1:]]
    mean = torch.stack([vector["w"] for vector in vectors]).mean(0)
    best = float(center @ mean / (mean @ mean))
    assert model_stock_ratios(vectors)["w"] == pytest.approx(best, abs=1e-12)
    torch.testing.assert_close(model_stock(vectors)["w"], best * mean)
    errors = [float((t * mean - center).norm()) for t in (best - 0.01, best, best + 0.01)]
    assert errors[1] == min(errors)


def test_equal_orthogonal_and_opposite_vectors():
    a, b = {"w": torch.tensor([2.0, 0.0])}, {"w": torch.tensor([0.0, 1.0])}
    assert model_stock_ratios([a, a, a])["w"] == 1
    assert model_stock([a, a])["w"].tolist() == [2, 0]
    assert model_stock([a, b])["w"].tolist() == [0, 0]
    minus = {"w": -a["w"]}
    for extrapolate in (False, True):  # the pole
        assert model_stock_ratios([a, minus], extrapolate=extrapolate)["w"] == 0
    obtuse = {"w": torch.tensor([-1.0, 2.0])}
    cosine = -1 / math.sqrt(5)
    assert model_stock_ratios([a, obtuse])["w"] == 0
    assert model_stock_ratios([a, obtuse], extrapolate=True)["w"] == pytest.approx(2 * cosine / (1 + cosine))


def test_a_vector_of_zeros_is_orthogonal():
    vectors = related(3)
    vectors[1] = {key: torch.zeros_like(tensor) for key, tensor in vectors[1].items()}
    x = torch.stack([vector["w"].double() for vector in vectors])
    torch.testing.assert_close(model_stock(vectors)["w"].double(), sparse.model_stock(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1e-30, 1e-4, 1e12])
def test_the_length_of_the_vectors_does_not_matter(size):
    vectors = related(4)
    expected = model_stock_ratios(vectors)
    scaled = [{key: tensor * size for key, tensor in vector.items()} for vector in vectors]
    assert model_stock_ratios(scaled) == pytest.approx(expected, rel=1e-5)


def test_average_of_angles():
    vectors = related(3)
    rows = torch.stack([vector["w"].double() for vector in vectors])
    units = rows / rows.norm(dim=1, keepdim=True)
    angle = sum(math.acos(float(units[p] @ units[q])) for p, q in ((0, 1), (0, 2), (1, 2))) / 3
    ratio = model_stock_ratios(vectors, average="angle")["w"]
    assert ratio == pytest.approx(3 * math.cos(angle) / (1 + 2 * math.cos(angle)))
    assert ratio != model_stock_ratios(vectors)["w"]


def test_every_tensor_by_itself_weights_and_ties(monkeypatch):
    monkeypatch.setattr(engine, "PIECE", 64)
    vectors = related(3)
    for vector in vectors:
        vector["tied"] = vector["w"]
    ratios = model_stock_ratios(vectors, skip="b")
    assert list(ratios) == ["w", "tied"]
    assert ratios["w"] == ratios["tied"] == model_stock_ratios(vectors)["w"]
    fused = model_stock(vectors, scale=2.0)
    mean = sum(vector["w"] for vector in vectors) / 3
    torch.testing.assert_close(fused["w"], 2 * ratios["w"] * mean)
    silent = [vectors[0], {key: 0 * tensor for key, tensor in vectors[1].items()}, vectors[2]]
    torch.testing.assert_close(model_stock(vectors, weights=[1, 0, 1])["w"], model_stock(silent)["w"])


def test_scalars_and_half_precision():
    vectors = [{"s": torch.tensor(2.0), "h": normal(40, seed=seed).bfloat16() + 1} for seed in range(3)]
    fused = model_stock(vectors)
    assert fused["s"] == 2
    assert fused["h"].dtype == torch.bfloat16


def test_bad_input():
    with pytest.raises(InputError, match="vectors: expected two vectors or more, which have angles, got 1"):
        model_stock(related(1))
    with pytest.raises(InputError, match="average: expected 'cosine' or 'angle', got 'mean'"):
        model_stock(related(2), average="mean")
    with pytest.raises(InputError, match="scale"):
        model_stock(related(2), scale=math.inf)
    with pytest.raises(InputError, match="gradients do not flow"):
        model_stock([{"w": torch.ones(3, requires_grad=True)}] * 2)
    broken = related(2)
    broken[1]["w"][7] = math.nan
    with pytest.raises(NonFiniteError, match=r"vectors\[1\]\['w'\] holds 1 non-finite"):
        model_stock(broken)


def test_beside_mergekit():
    merge = pytest.importorskip("mergekit.merge_methods.registry").get("model_stock")
    group = pytest.importorskip("mergekit.merge_methods.base").TensorGroup.from_tensors
    for common in (1.0, 0.1, -0.3):
        vectors = related(4, common=common)
        fused = model_stock(vectors, extrapolate=True)
        for key, tensor in fused.items():
            (theirs,) = merge([group([torch.zeros_like(tensor), *(v[key] for v in vectors)], base_index=0)])
            torch.testing.assert_close(tensor, theirs, rtol=1e-4, atol=1e-5)
