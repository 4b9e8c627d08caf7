"""TALL-mask compression: the sum under the masks of tall_masks, exact where tasks do not meet."""

import pytest
import torch

import rmtllmf.taskvec._engine as engine
from rmtllmf.errors import InputError, NonFiniteError, ShapeError, StateMismatchError
from rmtllmf.taskvec import fuse, tall_compression, tall_masks, task_arithmetic, ties

SHAPES = {"m": (6, 5), "v": (70,), "s": (), "none": (0, 3)}


def make(seed, count):
    source = torch.Generator().manual_seed(seed)
    return [{k: torch.randn(s, generator=source) for k, s in SHAPES.items()} for _ in range(count)]


@pytest.mark.parametrize("threshold", [0.2, 0.6, [0.2, 0.4, 0.6, 0.3]])
@pytest.mark.parametrize("piece", [8, 1 << 17])
def test_the_definition(monkeypatch, threshold, piece):
    monkeypatch.setattr(engine, "PIECE", piece)
    vectors = make(0, 4)
    stored = tall_compression(vectors, threshold)
    assert stored.rescalers == (1.0,) * 4
    total = task_arithmetic(vectors, 1.0)
    each = threshold if isinstance(threshold, list) else [threshold] * 4
    for task, (vector, number) in enumerate(zip(vectors, each, strict=True)):
        restored = stored.task_vector(task)
        for key in SHAPES:
            chosen = vector[key].abs() >= number * (total[key] - vector[key]).abs()
            assert torch.equal(stored.masks[task][key], chosen)
            assert torch.equal(restored[key], total[key] * chosen)


def test_the_masks_are_those_of_tall_masks():
    vectors = make(1, 3)
    for merged in (None, ties(vectors, combine="sum")):
        stored = tall_compression(vectors, 0.3, merged=merged, weights=[1.0, 0.5, 2.0])
        for mask, expected in zip(
            stored.masks, tall_masks(vectors, 0.3, merged=merged, weights=[1.0, 0.5, 2.0]), strict=True
        ):
            assert all(torch.equal(mask[key], expected[key]) for key in SHAPES)
        if merged is not None:
            assert all(torch.equal(stored.unified[key], merged[key]) for key in SHAPES)


def test_tasks_that_change_different_entries_come_back_exactly():
    source = torch.Generator().manual_seed(2)
    owner = torch.randint(0, 5, (400,), generator=source)
    entries = torch.randn(400, generator=source)
    vectors = [{"w": entries * (owner == task)} for task in range(5)]
    base = {"w": torch.randn(400, generator=source)}
    stored = tall_compression(vectors)
    for task, vector in enumerate(vectors):
        assert torch.equal(stored.task_vector(task)["w"], vector["w"])
        assert torch.equal(stored.task_vector(task).apply_to(base)["w"], base["w"] + vector["w"])


def test_each_task_is_closer_than_the_sum():
    vectors = make(3, 6)
    stored = tall_compression(vectors)
    total = stored.unified["v"]
    for task, vector in enumerate(vectors):
        masked = stored.task_vector(task)["v"]
        assert (masked - vector["v"]).norm() < (total - vector["v"]).norm()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_masked_is_not_hidden(bad):
    vectors = make(4, 4)
    vectors[1]["v"][3] = bad
    with pytest.raises(NonFiniteError, match=r"vectors\[1\]\['v'\] holds 1 non-finite"):
        tall_compression(vectors)
    with pytest.raises(NonFiniteError, match=r"merged\['v'\]"):
        tall_compression(make(4, 4), merged=vectors[1])


def test_bad_input():
    vectors = make(5, 2)
    with pytest.raises(InputError, match="threshold: expected a number of at least 0"):
        tall_compression(vectors, -1.0)
    with pytest.raises(ShapeError, match="threshold"):
        tall_compression(vectors, [0.1, 0.2, 0.3])
    with pytest.raises(StateMismatchError, match="merged"):
        tall_compression(vectors, merged={"m": vectors[0]["m"]})
    with pytest.raises(InputError, match="stores a vector for each task"):
        fuse(vectors[0], vectors, tall_compression)
