"""Cosines against scipy on the concatenated vectors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import cosine

from rmtllmf.metrics import cosine_similarity, similarity
from rmtllmf.taskvec import TaskVector

SHAPES = {"b.weight": (3, 4), "a": (5,), "scalar": (), "empty": (0, 2)}


def vectors(count, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [
        {name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in SHAPES.items()}
        for _ in range(count)
    ]


def flat(vector):
    return torch.cat([vector[name].reshape(-1).double() for name in SHAPES]).numpy()


@given(count=st.integers(1, 5), seed=st.integers(0, 99), block=st.sampled_from([1, 3, 1 << 20]))
def test_against_scipy(count, seed, block):
    given_vectors = vectors(count, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rmtllmf.metrics.similarity._BLOCK", block)
        found = cosine_similarity(given_vectors)
    assert found.shape == (count, count)
    assert found.dtype == torch.float64
    assert torch.equal(found, found.mT)
    assert found.diagonal().tolist() == [1.0] * count
    for i, left in enumerate(given_vectors):
        for j, right in enumerate(given_vectors):
            assert float(found[i, j]) == pytest.approx(1 - cosine(flat(left), flat(right)), abs=1e-12)


def test_the_order_of_names_and_the_length_of_vectors_do_not_matter():
    first, second = vectors(2)
    shuffled = {name: second[name] for name in reversed(second)}
    assert torch.equal(cosine_similarity([first, second]), cosine_similarity([first, shuffled]))
    scaled = {name: 1e-30 * tensor.double() for name, tensor in second.items()}
    torch.testing.assert_close(cosine_similarity([first, scaled]), cosine_similarity([first, second]))
    tiny = {name: 1e-200 * tensor.double() for name, tensor in second.items()}
    torch.testing.assert_close(cosine_similarity([first, tiny]), cosine_similarity([first, second]))


def test_parallel_opposite_orthogonal_and_never_beyond_one():
    x = {"w": torch.full((1000,), 0.1)}
    similar = cosine_similarity([x, {"w": 3 * x["w"]}, {"w": -x["w"]}])
    assert similar.abs().max() <= 1
    torch.testing.assert_close(similar[0], torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64))
    assert cosine_similarity([{"w": torch.eye(2)[0]}, {"w": torch.eye(2)[1]}])[0, 1] == 0


def test_half_precision_is_accumulated_in_double():
    half = vectors(2, dtype=torch.bfloat16)
    exact = [{name: tensor.double() for name, tensor in vector.items()} for vector in half]
    torch.testing.assert_close(cosine_similarity(half), cosine_similarity(exact), rtol=0, atol=1e-15)


def test_task_vectors_are_not_concatenated(monkeypatch):
    monkeypatch.setattr(torch, "cat", None)
    monkeypatch.setattr(torch, "concat", None)
    assert cosine_similarity([TaskVector(vector) for vector in vectors(2)]).shape == (2, 2)
    assert similarity._BLOCK * 8 * 8 <= 1 << 26  # eight vectors: at most 64 MiB at a time


def test_integers_and_running_statistics_do_not_count():
    one = {"w": torch.tensor([1.0, 1.0]), "n": torch.tensor(10**6), "used": torch.tensor([True])}
    other = {**one, "w": -one["w"]}
    assert float(cosine_similarity([one, other])[0, 1]) == pytest.approx(-1.0)
