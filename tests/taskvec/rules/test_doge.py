"""DOGE: the correction lowers the gap and stays out of the shared subspace, and other tools' values."""

import pytest
import torch

from helpers import fusion_bench_peer
from helpers.subspace_definitions import doge as naive
from rmtllmf.errors import InputError, NonFiniteError
from rmtllmf.taskvec import doge


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


SHAPES = {"square": (12, 12), "tall": (20, 9), "wide": (9, 20), "b": (5,), "scalar": ()}


def make(count, dtype=torch.float64, size=0.05):
    return [
        {k: size * normal(*s, seed=10 * q + i, dtype=dtype) for i, (k, s) in enumerate(SHAPES.items())}
        for q in range(count)
    ]


@pytest.mark.parametrize("density", [1.0, 0.3])
@pytest.mark.parametrize("subspace", [1, 3, 6, 100])
def test_the_definition(density, subspace):
    options = {"density": density, "subspace": subspace, "steps": 20, "step_size": 1e-3}
    vectors = make(3)
    expected = naive(vectors, **options)
    for key, tensor in doge(vectors, **options).items():
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=1e-9)
    single = doge([{k: t.float() for k, t in vector.items()} for vector in vectors], **options)
    for key, tensor in single.items():
        torch.testing.assert_close(tensor.double(), expected[key], rtol=0, atol=1e-5)


def gap(update, vectors, key):
    return float(sum(((v[key] * (v[key] - update[key])).sum(1) ** 2).sum() for v in vectors))


def test_the_correction_brings_the_model_closer_to_the_tasks():
    """The paper's claim: the gap to each task's own model shrinks."""
    vectors = make(4)
    before, after = (doge(vectors, density=1.0, steps=steps, step_size=1e-3) for steps in (0, 100))
    for key in ("square", "tall", "wide"):
        assert gap(after, vectors, key) < 0.9 * gap(before, vectors, key)


def test_one_task_alone_has_coefficient_and_no_correction_where_all_is_shared():
    vector = make(1)[0]
    update = doge([vector], 0.5, 1.0, subspace=1)
    for key in ("square", "wide"):
        torch.testing.assert_close(update[key], 0.5 * vector[key] / vector[key].norm())
        torch.testing.assert_close(update[key].norm(), torch.tensor(0.5).double())


def test_strong_and_weak_tasks_count_the_same():
    strong, weak = make(2)
    again = doge([{k: 100 * t for k, t in strong.items()}, weak], density=1.0, steps=0)
    for key, tensor in doge([strong, weak], density=1.0, steps=0).items():
        torch.testing.assert_close(again[key], tensor)
    favoured = doge([strong, weak], density=1.0, steps=0, weights=[0.0, 2.0])
    torch.testing.assert_close(favoured["square"], 0.14 * weak["square"] / weak["square"].norm())


def test_a_silent_task_and_a_silent_matrix():
    vectors = make(2)
    silent = {k: torch.zeros_like(t) for k, t in vectors[0].items()}
    update = doge([*vectors, silent], steps=3)
    assert all(torch.isfinite(tensor).all() for tensor in update.values())
    assert not doge([silent, silent], steps=3)["square"].any()


def test_only_matrices_change():
    update = doge(make(2), steps=1)
    assert not update["b"].any()
    assert not update["scalar"].any()
    assert not doge([{"b": torch.ones(3)}])["b"].any()
    broken = make(2)
    broken[1]["b"][2] = float("inf")
    with pytest.raises(NonFiniteError, match=r"vectors\[1\]\['b'\] holds 1 non-finite"):
        doge(broken, steps=1)


def test_the_values_of_fusion_bench(capsys):
    shapes = {"square": (12, 12), "tall": (20, 12), "wide": (12, 20)}
    vectors = [{k: 0.01 * normal(*s, seed=10 * q + i) for i, (k, s) in enumerate(shapes.items())} for q in range(3)]
    count = sum(a * b for a, b in shapes.values())
    theirs = fusion_bench_peer.doge(vectors, 0.07, (int(0.3 * count) - 0.5) / count, 6)  # keeps one more than it says
    for key, tensor in doge(vectors).items():
        torch.testing.assert_close(tensor, theirs[key], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, r"density: expected a share in \(0, 1\]"),
        ({"density": 30}, r"density: expected a share in \(0, 1\]"),
        ({"subspace": 0}, "subspace"),
        ({"steps": -1}, "steps"),
        ({"step_size": 0.0}, "step_size: expected a positive number"),
        ({"scale": float("inf")}, "scale"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        doge(make(1), **options)
