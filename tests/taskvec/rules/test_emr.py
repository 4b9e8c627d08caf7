"""EMR-Merging: the paper's algorithm on whole vectors, what it promises, and the edges."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rmtllmf.taskvec._engine as engine
from helpers.mask_definitions import emr_unified as elected
from rmtllmf.errors import InputError, NonFiniteError, StateMismatchError
from rmtllmf.taskvec import emr, emr_unified, fuse

SHAPES = {"m": (6, 5), "v": (70,), "s": (), "none": (0, 3)}


def make(seed, count, dtype=torch.float32):
    source = torch.Generator().manual_seed(seed)
    return [{k: torch.randn(s, generator=source).to(dtype) for k, s in SHAPES.items()} for _ in range(count)]


def naive(vectors, mean_of):
    """Algorithm 1 on one flat vector, in float64; `mean_of` measures it."""
    keys = list(SHAPES)
    rows = torch.stack([torch.cat([vector[key].double().reshape(-1) for key in keys]) for vector in vectors])
    unified = elected(rows)
    masks = rows * unified > 0
    rescalers = [mean_of(row.abs()) / mean_of((mask * unified).abs()) for row, mask in zip(rows, masks, strict=True)]
    return unified, masks, rescalers


def by_tensor(flat):
    sizes = [math.prod(shape) for shape in SHAPES.values()]
    return sum(part.mean() for part in flat.split(sizes) if len(part))


def flat(vector):
    return torch.cat([vector[key].reshape(-1) for key in SHAPES])


@pytest.mark.parametrize(("rescale", "mean_of"), [("entries", torch.sum), ("tensors", by_tensor)])
@pytest.mark.parametrize("piece", [8, 1 << 17])
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 6))
def test_the_algorithm(rescale, mean_of, piece, seed, count):
    vectors = make(seed, count)
    unified, masks, rescalers = naive(vectors, mean_of)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "PIECE", piece)
        stored = emr(vectors, rescale=rescale)
    torch.testing.assert_close(flat(stored.unified).double(), unified, rtol=1e-6, atol=0)
    assert torch.equal(torch.stack([flat(mask) for mask in stored.masks]), masks)
    assert stored.rescalers == pytest.approx([float(number) for number in rescalers], rel=1e-6)
    rule = emr_unified(vectors)
    assert all(torch.equal(rule[key], stored.unified[key]) for key in SHAPES)


def test_each_task_moves_its_own_way_and_as_far_in_the_mean():
    vectors = make(0, 5)
    stored = emr(vectors)
    for task, vector in enumerate(vectors):
        own, restored = flat(vector), flat(stored.task_vector(task))
        assert (own * restored >= 0).all()
        torch.testing.assert_close(restored.abs().mean(), own.abs().mean())


def test_masking_and_rescaling_bring_the_vectors_closer():
    """Theorem of the paper: each of the two steps lessens the mean distance to the tasks' vectors."""
    vectors = make(1, 6)
    stored = emr(vectors)
    whole = flat(stored.unified)
    apart = [0.0, 0.0, 0.0]
    for task, vector in enumerate(vectors):
        masked = whole * flat(stored.masks[task])
        factor = (masked @ flat(vector)) / (masked @ masked)
        for step, found in enumerate((whole, masked, factor * masked)):
            apart[step] += float((found - flat(vector)).square().sum())
    assert apart[0] > apart[1] > apart[2]


def test_tasks_that_agree_or_change_different_entries_come_back_exactly():
    one = make(2, 1)[0]
    for vectors in ([one], [one] * 3, [one, {key: torch.zeros_like(t) for key, t in one.items()}]):
        stored = emr(vectors)
        assert stored.rescalers[0] == pytest.approx(1.0, rel=1e-12)
        for key, tensor in stored.task_vector(0).items():
            torch.testing.assert_close(tensor, one[key], rtol=1e-6, atol=0)


def test_zero_vectors_draws_and_tasks_that_never_win():
    zero = {"w": torch.zeros(4)}
    assert emr([zero, zero]).rescalers == (0.0, 0.0)
    draw = emr([{"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([-1.0, 1.0])}])
    assert draw.unified["w"].tolist() == [0.0, 2.0]
    assert [mask["w"].tolist() for mask in draw.masks] == [[False, True], [False, True]]
    outvoted = emr([{"w": torch.tensor([3.0])}, {"w": torch.tensor([-1.0])}])
    assert outvoted.rescalers == (1.0, 0.0)
    assert not outvoted.task_vector(1)["w"].any()


def test_weights_are_of_the_vectors():
    vectors = make(3, 3)
    weighted = emr(vectors, weights=[1.0, 2.0, 0.5])
    by_hand = emr([{k: w * t for k, t in v.items()} for v, w in zip(vectors, [1.0, 2.0, 0.5], strict=True)])
    assert weighted.rescalers == by_hand.rescalers
    assert all(torch.equal(weighted.unified[key], by_hand.unified[key]) for key in SHAPES)


@pytest.mark.parametrize("threads", [2, 3])
def test_the_same_bits_for_any_number_of_threads_and_order_of_names(monkeypatch, threads):
    monkeypatch.setattr(engine, "PIECE", 8)
    vectors = make(4, 4)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = emr(vectors)
        torch.set_num_threads(threads)
        for found in (emr(vectors), emr([dict(reversed(vector.items())) for vector in vectors])):
            assert found.rescalers == expected.rescalers
            for task in range(4):
                for key in SHAPES:
                    assert torch.equal(found.task_vector(task)[key], expected.task_vector(task)[key])
    finally:
        torch.set_num_threads(before)


def test_skip_out_and_dtype():
    vectors = make(5, 3)
    out = {key: torch.empty(shape, dtype=torch.bfloat16) for key, shape in SHAPES.items() if key != "v"}
    stored = emr(vectors, skip="v", dtype=torch.bfloat16, out=out)
    assert list(stored.unified) == list(stored.masks[0]) == ["m", "s", "none"]
    assert stored.unified["m"].data_ptr() == out["m"].data_ptr()
    assert stored.task_vector(2)["m"].dtype == torch.bfloat16


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_the_culprit_is_named(bad):
    vectors = make(6, 4)
    vectors[2]["v"][7] = bad
    for call in (emr, emr_unified):
        with pytest.raises(NonFiniteError, match=r"vectors\[2\]\['v'\] holds 1 non-finite"):
            call(vectors)


def test_bad_input():
    vectors = make(7, 2)
    with pytest.raises(InputError, match="rescale: expected 'entries' or 'tensors', got 'model'"):
        emr(vectors, rescale="model")
    with pytest.raises(InputError, match="scale"):
        emr_unified(vectors, scale=float("nan"))
    with pytest.raises(StateMismatchError, match="lacks 's'"):
        emr([vectors[0], {key: vectors[1][key] for key in ("m", "v", "none")}])
    with pytest.raises(InputError, match="stores a vector for each task"):
        fuse(vectors[0], vectors, emr)
