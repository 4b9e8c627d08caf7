"""Files that are replaced while others read them: each reader sees the old or the new, never a part, never a mix."""

import os
import sys
import threading

import pytest
import torch
from safetensors.torch import save_file

from rmtllmf._model_files import load_model
from rmtllmf._safetensors import TensorFile
from rmtllmf.errors import InputError
from rmtllmf.taskvec import MaskedVectors, TaskVector, adapter_vector, emr, fuse_files, low_rank
from rmtllmf.taskvec._adapter_save import _exchanged

ROUNDS = 60


def vector(value, rows):
    """All entries the same, in two tensors, of a number of rows that tells which it is."""
    return TaskVector(
        {"fc.weight": torch.full((rows, 3), float(value)), "head.weight": torch.full((rows, 3), float(value))}
    )


A, B = vector(1, 500), vector(2, 700)


def same(tensors):
    """The value and the size of all entries, which must be one."""
    values = {(float(v), t.numel()) for t in tensors.values() for v in t.unique()}
    assert values in ({(1.0, 1500)}, {(2.0, 2100)}), values
    return values.pop()


def rounded(tensors):
    return {key: tensor.round(decimals=3) for key, tensor in tensors.items()}


CASES = {
    "vector": (lambda v, p: v.save(p / "v.safetensors"), lambda p: TaskVector.load(p / "v.safetensors")),
    "masks": (
        lambda v, p: emr([v, v]).save(p / "m.safetensors"),
        lambda p: MaskedVectors.load(p / "m.safetensors").task_vector(1),
    ),
    "adapter": (
        lambda v, p: low_rank(v, 1 if v is A else 2).save_adapter(p / "adapter", overwrite=True),
        lambda p: rounded(dict(adapter_vector(p / "adapter"))),
    ),
    "fused": (
        lambda v, p: fuse_files(*inputs(p, v), p / "f.safetensors", scale=1.0),
        lambda p: load_model(p / "f.safetensors", "path"),
    ),
}


def inputs(folder, given):
    name = "a" if given is A else "b"
    base, tuned = folder / f"{name}-0.safetensors", folder / f"{name}-1.safetensors"
    if not tuned.exists():
        save_file({key: torch.zeros_like(tensor) for key, tensor in given.items()}, base)
        save_file(dict(given), tuned)
    return base, [tuned]


@pytest.mark.skipif(sys.platform == "win32", reason="files that are open cannot be replaced there")
@pytest.mark.parametrize("name", CASES)
def test_readers_beside_a_writer(name, tmp_path):
    write, read = CASES[name]
    write(A, tmp_path)
    if name == "adapter" and not _exchanged(*exchangeable(tmp_path)):
        pytest.skip("this system cannot exchange two folders at once")
    failed, seen, done = [], set(), threading.Event()

    def reading():
        try:
            while not done.is_set():
                seen.add(same(read(tmp_path)))
        except BaseException as error:
            failed.append(error)

    readers = [threading.Thread(target=reading) for _ in range(3)]
    for reader in readers:
        reader.start()
    try:
        for turn in range(ROUNDS):
            write(A if turn % 2 else B, tmp_path)
    finally:
        done.set()
        for reader in readers:
            reader.join()
    assert not failed, failed
    assert seen == {(1.0, 1500), (2.0, 2100)}
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def exchangeable(folder):
    for name in "xy":
        (folder / name).mkdir()
    return str(folder / "x"), str(folder / "y")


def test_an_adapter_that_is_replaced_between_its_two_files(tmp_path, monkeypatch):
    """The configuration of one and the factors of the other would make a third."""
    import rmtllmf.taskvec._adapter_file as reader

    low_rank(A, 1).save_adapter(tmp_path / "adapter")
    original, turns = reader.StoredFile, []

    def late(path, label, *, inside=None):
        turns.append(path)
        if len(turns) == 1:
            low_rank(B, 2).save_adapter(tmp_path / "adapter", overwrite=True)
        return original(path, label, inside=inside)

    monkeypatch.setattr(reader, "StoredFile", late)
    assert same(rounded(dict(adapter_vector(tmp_path / "adapter")))) == (2.0, 2100)
    assert len(turns) == 2

    def twice(path, label, *, inside=None):
        """The system may give the folder of now the number of the first, of which nothing is left."""
        turns.append(path)
        if len(turns) == 1:
            for given, rank in ((A, 1), (B, 2)) * 3:
                low_rank(given, rank).save_adapter(tmp_path / "adapter", overwrite=True)
        return original(path, label, inside=inside)

    low_rank(A, 1).save_adapter(tmp_path / "adapter", overwrite=True)
    turns.clear()
    monkeypatch.setattr(reader, "StoredFile", twice)
    assert same(rounded(dict(adapter_vector(tmp_path / "adapter")))) == (2.0, 2100)

    def always(path, label, *, inside=None):
        turns.append(path)
        low_rank(A if len(turns) % 2 else B, 1).save_adapter(tmp_path / "adapter", overwrite=True)
        return original(path, label, inside=inside)

    monkeypatch.setattr(reader, "StoredFile", always)
    with pytest.raises(InputError, match="is replaced whenever it is read"):
        adapter_vector(tmp_path / "adapter")


def test_a_model_that_is_written_to_while_it_is_read(tmp_path, monkeypatch):
    """In place, which nobody should: half of the old and half of the new are refused."""
    path = tmp_path / "v.safetensors"
    A.save(path)
    original, times = TensorFile.read_bytes, []

    def meanwhile(self, offset, into):
        original(self, offset, into)
        with open(path, "r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(b"\0\0\0\1")
        times.append(len(times))
        os.utime(path, (times[-1], times[-1]))

    monkeypatch.setattr(TensorFile, "read_bytes", meanwhile)
    with pytest.raises(InputError, match="was changed while it was read"):
        TaskVector.load(path)
    save_file(dict(A), path)
    with pytest.raises(InputError, match="was changed while it was read"):
        TaskVector.between(A, path)
