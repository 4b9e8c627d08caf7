"""Masked vectors: bits, what comes back, what is stored, and files."""

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from helpers.masked_file import GOOD, MASKED
from rmtllmf.errors import InputError, NonFiniteError
from rmtllmf.taskvec import MaskedVectors, TaskVector, emr, tall_compression
from rmtllmf.taskvec import _bits as bits

SHAPES = {"m": (6, 5), "v": (70,), "s": (), "none": (0, 3)}


def make(seed, count, dtype=torch.float32):
    source = torch.Generator().manual_seed(seed)
    return [{k: torch.randn(s, generator=source).to(dtype) for k, s in SHAPES.items()} for _ in range(count)]


@settings(deadline=None, max_examples=25)
@given(flags=st.lists(st.booleans(), max_size=40))
@pytest.mark.parametrize("pack", [bits.packed, bits.packed_by_torch])
@pytest.mark.parametrize("unpack", [bits.unpacked, bits.unpacked_by_torch])
def test_bits(flags, pack, unpack):
    mask = torch.tensor(flags, dtype=torch.bool)
    found = pack(mask)
    assert found.tolist() == np.packbits(np.array(flags, bool), bitorder="little").tolist()
    assert torch.equal(unpack(found, (len(flags),)), mask)
    assert torch.equal(unpack(found, (1, len(flags), 1)), mask.view(1, -1, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_what_comes_back_is_the_vector_under_the_mask_times_the_factor(dtype):
    stored = emr(make(0, 3, dtype))
    assert len(stored) == 3
    for task in range(3):
        vector = stored.task_vector(task)
        assert list(vector) == list(SHAPES)
        for key, tensor in vector.items():
            expected = stored.unified[key] * stored.masks[task][key] * stored.rescalers[task]
            assert tensor.dtype == dtype
            assert torch.equal(tensor, expected)


def test_booleans_of_the_callers_own_are_masks_too():
    stored = MaskedVectors(TaskVector({"w": torch.tensor([2.0, 3.0])}), ({"w": torch.tensor([True, False])},), (2.0,))
    assert stored.task_vector(0)["w"].tolist() == [4.0, 0.0]
    assert stored.storage_bits == 64 + 8 + 64


def test_storage_is_a_bit_a_task_for_each_entry():
    count, entries = 5, 8 * 125
    vectors = [{"w": torch.randn(50, 20, generator=torch.Generator().manual_seed(seed))} for seed in range(count)]
    for stored in (emr(vectors), tall_compression(vectors)):
        assert stored.storage_bits == (32 + count) * entries + 64 * count
    assert emr(vectors, dtype=torch.bfloat16).storage_bits == (16 + count) * entries + 64 * count
    odd = tall_compression([{"a": torch.ones(3), "b": torch.ones(9)}] * 2)  # whole bytes for each tensor
    assert odd.storage_bits == 32 * 12 + 2 * 8 * (1 + 2) + 2 * 64


def test_ties_are_kept_and_stored_once(tmp_path):
    vectors = make(1, 2)
    alone = tall_compression(vectors).storage_bits
    for vector in vectors:
        vector["head"] = vector["m"]
    for make_stored in (emr, tall_compression):
        stored = make_stored(vectors)
        stored.save(tmp_path / "x.safetensors")
        for found in (stored, MaskedVectors.load(tmp_path / "x.safetensors")):
            assert found.storage_bits == alone
            vector = found.task_vector(1)
            assert vector["head"].data_ptr() == vector["m"].data_ptr()


def test_saved_and_loaded(tmp_path):
    path = tmp_path / "tasks.safetensors"
    stored = emr(make(2, 4))
    stored.save(path)
    assert os.listdir(tmp_path) == ["tasks.safetensors"]
    found = MaskedVectors.load(path)
    assert found.rescalers == stored.rescalers
    for task in range(4):
        before, after = stored.task_vector(task), found.task_vector(task)
        assert set(before) == set(after)
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert all(torch.equal(found.masks[task][key], stored.masks[task][key]) for key in before)


def test_the_file_is_as_large_as_it_says(tmp_path):
    path = tmp_path / "tasks.safetensors"
    stored = tall_compression([{"w": torch.ones(1000, 40)}] * 6)
    stored.save(path)
    assert stored.storage_bits == (32 + 6) * 40_000 + 6 * 64
    assert 0 < path.stat().st_size - stored.storage_bits / 8 < 2000  # the header


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "tasks.safetensors"
    stored = emr(make(3, 2))
    stored.save(path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError, match="no"):
        emr(make(4, 2)).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["tasks.safetensors"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rescalers": None}, InputError, "damaged: it holds no finite rescalers"),
        ({"rescalers": torch.ones(1)}, InputError, "damaged: it holds no finite rescalers"),
        ({"rescalers": torch.full((1,), torch.nan).double()}, InputError, "damaged: it holds no finite rescalers"),
        ({"mask.0.w": None}, InputError, "damaged: the mask of task 0 for 'w'"),
        ({"mask.0.w": torch.ones(3, dtype=torch.uint8)}, InputError, "damaged: the mask of task 0 for 'w'"),
        ({"mask.0.w": torch.ones(2)}, InputError, "damaged: the mask of task 0 for 'w'"),
        ({"mask.0.x": torch.ones(2, dtype=torch.uint8)}, InputError, "damaged: the mask of task 0 for 'x'"),
        ({"vector.w": torch.full((9,), torch.inf)}, NonFiniteError, "'w'"),
    ],
)
def test_damaged_files(tmp_path, change, error, message):
    path = tmp_path / "x.safetensors"
    save_file(GOOD, path, MASKED)
    assert MaskedVectors.load(path).task_vector(0)["w"].tolist() == [1.0, *[0.0] * 7, 1.0]
    save_file({key: value for key, value in {**GOOD, **change}.items() if value is not None}, path, MASKED)
    with pytest.raises(error, match=message):
        MaskedVectors.load(path)


def test_other_files(tmp_path):
    path = tmp_path / "x.safetensors"
    TaskVector({"w": torch.ones(2)}).save(path)
    with pytest.raises(InputError, match=r"holds no masked vectors written by MaskedVectors\.save"):
        MaskedVectors.load(path)
    emr(make(5, 2)).save(path)
    with pytest.raises(InputError, match=r"holds no task vector written by TaskVector\.save"):
        TaskVector.load(path)
    with pytest.raises(InputError, match=r"ends in \.safetensors"):
        emr(make(5, 2)).save(tmp_path / "x.pt")
    assert set(load_file(path)) == {f"{part}.{key}" for part in ("vector", "mask.0", "mask.1") for key in SHAPES} | {
        "rescalers"
    }


@pytest.mark.parametrize(
    ("task", "error", "message"),
    [(2, InputError, "below 2"), (-1, InputError, "at least 0"), (0.5, TypeError, "expected an int")],
)
def test_tasks_that_are_none(task, error, message):
    with pytest.raises(error, match=message):
        emr(make(6, 2)).task_vector(task)


def test_overflow():
    stored = MaskedVectors(TaskVector({"w": torch.tensor([6e4]).half()}), ({"w": torch.tensor([True])},), (2.0,))
    with pytest.raises(NonFiniteError, match=r"task 0\['w'\]"):
        stored.task_vector(0)
