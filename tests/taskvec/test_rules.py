"""What is true of every fusion rule, for every row of the table in helpers/fusion_rules.py."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rmtllmf.taskvec._engine as engine
from helpers.fusion_rules import ROWS
from rmtllmf.errors import NonFiniteError
from rmtllmf.taskvec import TaskVector

SHAPES = {"l0.w": (6, 4), "l1.w": (3, 7), "l1.b": (5,), "conv": (2, 3, 2, 2), "scalar": (), "one": (1,), "none": (0, 3)}

every_rule = pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Several pieces a tensor, and threads for small vectors too."""
    monkeypatch.setattr(engine, "PIECE", 8)


def make(seed, count, dtype=torch.float32):
    source = torch.Generator().manual_seed(seed)
    return [{k: torch.randn(s, generator=source).to(dtype) for k, s in SHAPES.items()} for _ in range(count)]


def close(actual, expected, tolerance):
    assert set(actual) == set(expected)
    peak = max([float(t.abs().max()) for t in expected.values() if t.numel()], default=0.0)
    for key, tensor in expected.items():
        torch.testing.assert_close(actual[key].double(), tensor.double(), rtol=0, atol=tolerance * peak + 1e-30)


def same_bits(left, right):
    assert set(left) == set(right)
    for key in left:
        assert left[key].dtype == right[key].dtype
        assert torch.equal(left[key], right[key]), key


def double(vectors):
    return [{key: tensor.double() for key, tensor in vector.items()} for vector in vectors]


@every_rule
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), extra=st.integers(0, 6))
def test_the_naive_definition(row, seed, extra):
    if row.naive is None:
        pytest.skip("has an oracle of its own")
    vectors = make(seed, row.fewest + extra)
    close(row.rule(vectors), row.naive(double(vectors)), row.tolerance)
    close(row.rule(vectors, compute_dtype=torch.float64, dtype=torch.float64), row.naive(double(vectors)), 1e-9)


@every_rule
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 10**6), order=st.permutations(range(5)))
def test_order_of_the_tasks(row, seed, order):
    if not row.permutable:
        pytest.skip("depends on the order")
    vectors = make(seed, 5)
    close(row.rule([vectors[i] for i in order]), row.rule(vectors), row.tolerance)


@every_rule
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 10**6), power=st.integers(-20, 20))
def test_scaling(row, seed, power):
    """A power of two, so that the scaling itself does not round."""
    if not row.homogeneous:
        pytest.skip("not homogeneous")
    vectors = make(seed, max(3, row.fewest))
    factor = 2.0**power
    scaled = row.rule([{key: factor * tensor for key, tensor in vector.items()} for vector in vectors])
    close(scaled, {key: factor * tensor for key, tensor in row.rule(vectors).items()}, row.tolerance)


@every_rule
def test_zero_vectors_give_a_zero_update(row):
    zeros = [{key: torch.zeros(shape) for key, shape in SHAPES.items()} for _ in range(max(3, row.fewest))]
    assert not any(tensor.any() for tensor in row.rule(zeros).values())


@every_rule
def test_one_silent_vector_and_zero_rows_are_no_trouble(row):
    vectors = make(1, max(4, row.fewest))
    vectors[2] = {key: torch.zeros_like(tensor) for key, tensor in vectors[2].items()}
    for vector in vectors:
        vector["l0.w"][2] = 0
    fused = row.rule(vectors)
    assert all(torch.isfinite(tensor).all() for tensor in fused.values())
    torch.testing.assert_close(fused["l0.w"][2], torch.zeros(4), rtol=0, atol=1e-6)


@every_rule
@pytest.mark.parametrize("threads", [2, 3])
def test_the_same_bits_for_any_number_of_threads_and_order_of_names(row, threads):
    vectors = make(2, max(4, row.fewest))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = row.rule(vectors)
        torch.set_num_threads(threads)
        same_bits(row.rule(vectors), expected)
        assert torch.get_num_threads() == threads
        same_bits(row.rule([dict(reversed(vector.items())) for vector in vectors]), expected)
    finally:
        torch.set_num_threads(before)


@every_rule
def test_the_length_of_the_pieces_changes_nothing(row, monkeypatch):
    vectors = make(9, max(4, row.fewest))
    expected = row.rule(vectors)
    monkeypatch.setattr(engine, "PIECE", 1 << 17)
    close(row.rule(vectors), expected, 1e-6)


@every_rule
def test_inputs_are_not_written_to_and_out_is(row):
    vectors = make(3, max(4, row.fewest))
    kept = [{key: tensor.clone() for key, tensor in vector.items()} for vector in vectors]
    expected = row.rule(vectors)
    assert isinstance(expected, TaskVector)
    assert list(expected) == list(vectors[0])
    out = {key: torch.full_like(tensor, 7.0) for key, tensor in vectors[0].items()}
    fused = row.rule(vectors, out=out)
    same_bits(fused, expected)
    for key in SHAPES:
        assert fused[key].data_ptr() == out[key].data_ptr()
    for vector, copy in zip(vectors, kept, strict=True):
        same_bits(vector, copy)


@every_rule
def test_memory_that_is_not_contiguous(row):
    vectors = make(4, max(3, row.fewest))
    expected = row.rule(vectors)
    turned = [{k: t.mT.contiguous().mT if t.ndim == 2 else t for k, t in vector.items()} for vector in vectors]
    out = {
        k: torch.empty_like(t).mT.contiguous().mT if t.ndim == 2 else torch.empty_like(t) for k, t in expected.items()
    }
    close(row.rule(turned), expected, 1e-6)
    close(row.rule(vectors, out=out), expected, 1e-6)


@every_rule
def test_tied_entries_stay_tied(row):
    vectors = make(5, max(3, row.fewest))
    for vector in vectors:
        vector["head"] = vector["l0.w"]
    fused = row.rule(vectors)
    assert fused["head"].data_ptr() == fused["l0.w"].data_ptr()


@every_rule
def test_half_precision_is_for_storage(row):
    vectors = make(6, max(4, row.fewest), torch.bfloat16)
    fused = row.rule(vectors)
    wide = row.rule([{key: tensor.float() for key, tensor in vector.items()} for vector in vectors])
    same_bits(fused, {key: tensor.bfloat16() for key, tensor in wide.items()})
    same_bits(row.rule(vectors, dtype=torch.float32), wide)


@every_rule
def test_what_is_skipped_is_not_in_the_update(row):
    vectors = make(7, max(4, row.fewest))
    fused = row.rule(vectors, skip=["l1.*", "conv"])
    assert set(fused) == set(SHAPES) - {"l1.w", "l1.b", "conv"}
    rest = [{key: vector[key] for key in fused} for vector in vectors]
    same_bits(fused, row.rule(rest))


@every_rule
def test_weights_per_task_and_per_layer(row):
    if not row.premultiplied:
        pytest.skip("weights mean something else")
    vectors = make(8, 4)
    weights = {"l1.*": [1.0, 0.5, 2.0, 0.25], "conv": 0.5}
    by_hand = [dict(vector) for vector in vectors]
    for index, vector in enumerate(by_hand):
        for key in ("l1.w", "l1.b"):
            vector[key] = vector[key] * weights["l1.*"][index]
        vector["conv"] = vector["conv"] * 0.5
    close(row.rule(vectors, weights=weights), row.rule(by_hand), row.tolerance)


@every_rule
def test_the_culprit_is_named(row):
    vectors = make(10, max(4, row.fewest))
    vectors[2]["conv"][1, 2, 0, 1] = float("nan")
    with pytest.raises(NonFiniteError, match=r"vectors\[2\]\['conv'\] holds 1 non-finite"):
        row.rule(vectors)


@every_rule
def test_in_inference_mode(row):
    vectors = make(11, max(4, row.fewest))
    expected = row.rule(vectors)
    with torch.inference_mode():
        same_bits(row.rule(make(11, max(4, row.fewest))), expected)
