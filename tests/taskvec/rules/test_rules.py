"""What is true of every fusion rule, for every row of the table in helpers/fusion_rules.py."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rmtllmf.taskvec._engine as engine
from helpers.fusion_rules import ROWS
from rmtllmf.errors import InputError, NonFiniteError
from rmtllmf.taskvec import TaskVector, aligned, task_arithmetic, weighted_average
from rmtllmf.taskvec._sources import Source, Stored

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
@pytest.mark.parametrize("count", [1, 2, 4])  # a single vector, and two, are where sums start from an input
def test_inputs_are_not_written_to_and_out_is(row, count):
    vectors = make(3, max(count, row.fewest))
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


class MadeAsAWhole(Source):
    """What an adapter is to the engine: no memory, and no pieces."""

    def __init__(self, tensors):
        self.label, self.inner = "made", Stored(tensors, "made")
        self.specs = self.inner.specs

    def sliceable(self, key):
        return False

    def read(self, key, start, stop, buffer):
        return buffer.copy_(self.inner.read(key, start, stop, buffer))


@every_rule
def test_vectors_made_when_they_are_read(row):
    vectors = make(8, 5, torch.bfloat16)
    expected = row.rule(vectors)
    same_bits(row.rule([MadeAsAWhole(vector) for vector in vectors]), expected)
    same_bits(row.rule(aligned(vectors)), expected)
    same_bits(row.rule(aligned([MadeAsAWhole(vector) for vector in vectors])), expected)


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


FOUR = torch.arange(1.0, 5.0)
MEMORY = torch.zeros(8)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ({"a": MEMORY[:4], "b": MEMORY[2:6]}, "'a' and 'b' are one memory, at least in part"),
        ({"a": MEMORY[:4], "b": MEMORY[:4]}, "'a' and 'b' are one memory"),
        ({"a": MEMORY[:1].expand(4), "b": MEMORY[4:]}, r"out\['a'\]: several entries of it share memory"),
        ({"a": MEMORY[:4], "b": MEMORY.as_strided((2, 2), (1, 1))}, r"out\['b'\] has shape"),
    ],
)
def test_out_that_overlaps_itself(out, message):
    with pytest.raises(InputError, match=message):
        task_arithmetic([{"a": FOUR, "b": FOUR.clone()}], out=out)


def test_out_and_vectors_in_one_memory():
    memory = torch.arange(12.0)
    vectors = [{"a": memory[:4]}, {"a": memory[4:8]}]
    assert task_arithmetic(vectors, 1.0, out={"a": memory[8:]})["a"].tolist() == [4, 6, 8, 10]
    with pytest.raises(InputError, match=r"out\['a'\] shares memory with vectors\[1\]\['a'\]"):
        task_arithmetic(vectors, 1.0, out={"a": memory[7:11]})
    with pytest.raises(InputError, match="shares memory with"):  # though torch calls these two storages
        task_arithmetic(vectors, 1.0, out={"a": torch.from_numpy(memory.numpy()[1:5])})
    assert memory[:8].tolist() == list(range(8))


@pytest.mark.parametrize(("rule", "share"), [(task_arithmetic, 0.3), (weighted_average, 0.5)])
def test_gradients_flow_or_are_refused(rule, share):
    learnt = torch.ones(2, requires_grad=True)
    vectors = [{"w": learnt}, {"w": torch.ones(2)}]
    rule(vectors)["w"].sum().backward()
    torch.testing.assert_close(learnt.grad, torch.full((2,), share))
    with pytest.raises(InputError, match="gradients do not flow"):
        rule(vectors, out={"w": torch.empty(2)})
    with pytest.raises(InputError, match=r"scale\.detach"):
        rule([{"w": torch.ones(2)}], scale=torch.tensor(0.5, requires_grad=True))
    with torch.no_grad():
        rule(vectors, out={"w": torch.empty(2)})


@pytest.mark.filterwarnings("ignore:.*quantize.*", "ignore:.*Sparse.*", "ignore:.*deprecated")
def test_tensors_without_plain_entries_are_named():
    scales = [getattr(torch, name) for name in ("float8_e8m0fnu",) if hasattr(torch, name)]  # since torch 2.7
    for tensor, message in (
        (torch.empty(2, device="meta"), "meta device"),
        (torch.eye(2).to_sparse(), "sparse"),
        (torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "quantised"),
        *((torch.ones(2).to(dtype), "float8_e8m0fnu") for dtype in scales),
    ):
        with pytest.raises(InputError, match=rf"vectors\[1\]\['w'\].*{message}"):
            task_arithmetic([{"w": torch.ones(tensor.shape)}, {"w": tensor}])


def test_float8():
    vectors = [{"w": torch.tensor([1.0, 200.0])}, {"w": torch.tensor([2.0, 200.0])}]
    small = [{"w": vector["w"].to(torch.float8_e4m3fn)} for vector in vectors]
    assert task_arithmetic(small, 1.0)["w"].float().tolist() == [3, 384]
    for scale in (1.2, 100.0):  # torch would silently take the largest number, 448
        with pytest.raises(NonFiniteError, match="overflows"):
            task_arithmetic(vectors, scale, dtype=torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": {3: 1.0}}, "weights: expected names or glob patterns"),
        ({"weights": {0.5, 1.0}}, "weights: expected a number or numbers in order, got set"),
        ({"weights": "ab"}, "weights: expected 2 numbers or a mapping, got str"),
        ({"weights": 1.0}, "weights: expected 2 numbers"),
        ({"skip": 3}, "skip: expected names"),
        ({"skip": None}, "skip: expected names"),
        ({"skip": [3]}, "skip: expected names"),
        ({"dtype": "float16"}, "dtype: expected a floating-point torch.dtype"),
        ({"dtype": torch.int8}, "dtype: expected a floating-point torch.dtype"),
        *(
            ({"dtype": getattr(torch, name)}, "dtype: expected a dtype that holds any number")
            for name in ("float8_e8m0fnu",)  # since torch 2.7
            if hasattr(torch, name)
        ),
        ({"compute_dtype": torch.bfloat16}, "compute_dtype: expected torch.float32 or"),
        ({"out": [1]}, "out: expected a mapping"),
        ({"out": {"w": 3}}, r"out\['w'\]: expected a tensor"),
        ({"scale": 1j}, "scale: expected a real number"),
        ({"progres": True}, "unexpected keyword 'progres'"),
    ],
)
def test_options_of_the_wrong_kind(options, message):
    with pytest.raises((TypeError, InputError), match=message):
        task_arithmetic([{"w": torch.ones(2)}] * 2, **options)


def test_autocast_changes_nothing():
    vectors = make(12, 3)
    expected = [row.rule(vectors) for row in ROWS]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for row, update in zip(ROWS, expected, strict=True):
            same_bits(row.rule(vectors), update)
