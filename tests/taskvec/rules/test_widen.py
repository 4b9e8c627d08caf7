"""WIDEN: the paper's steps, small changes, columns and rows, what is not ranked, and bad input."""

import importlib
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from helpers.mask_definitions import widen as naive
from rmtllmf.errors import InputError, NonFiniteError, StateMismatchError
from rmtllmf.taskvec import TaskVector, fuse, fuse_files, widen

SHAPES = {"w": (6, 8), "b": (5,), "conv": (2, 3, 2, 2)}


def make(seed, count, size=1.0):
    source = torch.Generator().manual_seed(seed)
    return [{k: size * torch.randn(s, generator=source) for k, s in SHAPES.items()} for _ in range(count)]


def double(vectors):
    return [{key: tensor.double() for key, tensor in vector.items()} for vector in vectors]


BASE = make(10**7, 1)[0]


@pytest.mark.parametrize(("ratio", "calibration"), [(1.0, 1.0), (0.5, 1.0), (1.5, 0.3), (0.0, 2.0), (5.0, 1.0)])
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 4), exponent=st.integers(-6, 1))
def test_the_definition(ratio, calibration, seed, count, exponent):
    vectors = make(seed, count, 10.0**exponent)
    options = {"ratio": ratio, "calibration": calibration}
    expected = naive(double(vectors), BASE, **options)
    for key, tensor in widen(vectors, BASE, **options).items():
        torch.testing.assert_close(tensor.double(), expected[key], rtol=0, atol=1e-5 * float(expected[key].abs().max()))


def test_changes_that_float32_does_not_tell_apart():
    """1 - cos of them is of the order of 1e-9, below the rounding of cosines; from the vectors it is known."""
    source = torch.Generator().manual_seed(0)
    base = torch.randn(200, 32, generator=source)
    vectors = [
        {"w": 1e-5 * torch.rand(32, generator=source) * torch.randn(200, 32, generator=source)} for _ in range(3)
    ]
    cosines = [1 - torch.cosine_similarity(base + vector["w"], base, dim=0) for vector in vectors]
    exact = [1 - torch.cosine_similarity((base + v["w"].double()), base.double(), dim=0) for v in vectors]
    assert any((a.argsort() != b.argsort()).any() for a, b in zip(cosines, exact, strict=True))
    expected = naive(double(vectors), {"w": base})["w"]
    torch.testing.assert_close(widen(vectors, {"w": base})["w"].double(), expected, rtol=1e-5, atol=1e-11)


def test_one_vector_comes_back():
    vector = make(1, 1)[0]
    update = widen([vector], BASE)
    assert all(torch.equal(update[key], vector[key]) for key in SHAPES)
    twice = widen([vector], BASE, scale=2.0)
    assert all(torch.equal(twice[key], 2 * vector[key]) for key in SHAPES)


def test_without_calibration_equal_importance_is_an_average():
    """All columns of all tasks have moved equally far: in their order, so that every task ranks alike."""
    base = torch.eye(4)
    vector = {"w": torch.eye(4)}
    update = widen([vector] * 3, {"w": base}, ratio=10.0)
    torch.testing.assert_close(update["w"], vector["w"])
    assert torch.equal(widen([vector] * 3, {"w": base})["w"].diagonal(), torch.tensor([1.0, 1.0, 3.0, 3.0]))


def test_ranks_do_not_know_how_far_a_task_moved():
    """The weights stay the same when a task moves a hundred times less, so that the update is linear in it."""
    (a, b), c = make(2, 2, 1e-5), 0.01

    def fused(left, right):
        return widen([{"w": left * a["w"]}, {"w": right * b["w"]}], {"w": BASE["w"]})["w"]

    whole = fused(1, 1)
    torch.testing.assert_close(2 * whole - fused(c, 1) - fused(1, c), (1 - c) * whole, rtol=1e-5, atol=1e-10)


def test_rows_in_place_of_columns():
    vectors = make(4, 3)
    turned = [{**vector, "w": vector["w"].mT} for vector in vectors]
    base = {**BASE, "w": BASE["w"].mT}
    update = widen(vectors, BASE, by_row="w")
    assert torch.equal(update["w"], widen(turned, base)["w"].mT)
    assert torch.equal(update["b"], widen(vectors, BASE)["b"])
    for vector in vectors:
        vector["head"] = vector["w"]
    tied = widen(vectors, {**BASE, "head": BASE["w"]}, by_row="head")
    assert torch.equal(tied["w"], update["w"])
    assert tied["head"].data_ptr() == tied["w"].data_ptr()


def test_columns_that_are_zero():
    base = torch.tensor([[0.0, 0.0, 3.0, 1.0], [0.0, 0.0, 4.0, 1.0]])
    a = torch.tensor([[0.0, 1.0, -3.0, 0.1], [0.0, 0.0, -4.0, 0.1]])  # stays, starts, ends, grows
    update = widen([{"w": a}, {"w": torch.zeros(2, 4)}], {"w": base})["w"]
    assert torch.isfinite(update).all()
    # by length 0 < .14 < 1 < 5; by direction 0, 0 and then 1, 1 in their order
    length, direction = torch.tensor([0, 2, 3, 1]) / 4, torch.tensor([0, 2, 3, 1]) / 4
    zeros = torch.arange(4) / 4
    expected = 0
    for rank in (length, direction):
        score = torch.softmax(torch.stack([rank, zeros]), 0)[0]
        expected = expected + 0.5 * torch.where(rank > 1.5 / 4, 1.0, score) * a
    torch.testing.assert_close(update, expected)


def test_a_base_with_more_names_a_module_and_a_file(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    base = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    tuned = [{k: t + 0.1 * torch.rand_like(t) if t.is_floating_point() else t for k, t in base.items()} for _ in "ab"]
    update = widen([TaskVector.between(model, state) for state in tuned], model)
    assert set(update) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    fused = fuse(model, tuned, partial(widen, base=model))
    assert all(torch.equal(fused[key], update.apply_to(base)[key]) for key in update)
    for name, state in (("base", base), ("a", tuned[0]), ("b", tuned[1])):
        save_file(state, tmp_path / f"{name}.safetensors")
    first, *others, out = (tmp_path / f"{name}.safetensors" for name in ("base", "a", "b", "out"))
    fuse_files(first, others, out, partial(widen, base=first))
    for key, tensor in load_file(out).items():
        torch.testing.assert_close(tensor, fused[key])


def test_inputs_are_not_written_to_in_double_precision():
    vectors, base = double(make(5, 2)), double([BASE])[0]
    kept = [{key: tensor.clone() for key, tensor in state.items()} for state in (*vectors, base)]
    widen(vectors, base)
    for state, copy in zip((*vectors, base), kept, strict=True):
        assert all(torch.equal(state[key], copy[key]) for key in SHAPES)


def test_many_rows_are_taken_in_parts(monkeypatch):
    vectors = make(6, 3)
    expected = widen(vectors, BASE)
    monkeypatch.setattr(importlib.import_module("rmtllmf.taskvec.rules.widen"), "ROWS", 4)
    torch.testing.assert_close(widen(vectors, BASE)["w"], expected["w"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ratio": -1.0}, InputError, "ratio: expected a number of at least 0, got -1"),
        ({"ratio": float("nan")}, InputError, "ratio"),
        ({"calibration": float("inf")}, InputError, "calibration"),
        ({"scale": "1"}, TypeError, "scale: expected a real number"),
        ({"by_row": "x"}, InputError, "by_row: 'x' matches none"),
        ({"base": {"w": BASE["w"]}}, StateMismatchError, "base lacks 'b', 'conv'"),
        ({"base": {**BASE, "w": BASE["b"]}}, StateMismatchError, r"base\['w'\] has shape \(5,\)"),
        (
            {"base": {**BASE, "w": torch.zeros(6, 8, dtype=torch.int64)}},
            StateMismatchError,
            r"base\['w'\] is torch.int64",
        ),
        ({"base": {**BASE, "w": BASE["w"] / 0}}, NonFiniteError, r"base\['w'\] holds non-finite"),
        ({"base": 3}, TypeError, "base: expected"),
    ],
)
def test_bad_input(options, error, message):
    with pytest.raises(error, match=message):
        widen(make(7, 2), **{"base": BASE, **options})


def test_names_that_are_tied_in_the_vectors_must_not_differ_in_the_base():
    vectors = [{"x": tensor, "y": tensor} for tensor in (torch.ones(2, 2), torch.eye(2))]
    with pytest.raises(StateMismatchError, match="'x' and 'y' are one tensor in the vectors, but differ here"):
        widen(vectors, {"x": torch.ones(2, 2), "y": torch.eye(2)})
